"""The experiment on shared teachers: its eager path, its data and its probe, and all of it on very little of both."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import pyeff
from benchmarks.experiments.multimask_reuse import __main__ as program
from benchmarks.experiments.multimask_reuse import data, eager, report, steps, store, train
from benchmarks.experiments.multimask_reuse.settings import DEFAULT, MASKS, quick
from pyeff import ops
from pyeff.demo.data import Corpus, Example

ROOT = Path(pyeff.__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "multimask_reuse.json"
STEPS = RESULT.with_name("multimask_steps.json")
BATCH, COUNT, GRID, WIDTH = 2, 3, (4, 5), 8


def full_plan():
    return ops.block_mask(BATCH, COUNT, GRID, keep=0.4, adjust=0.1, length=2, seed=1)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(found, expected, leaf):
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((t * weights).sum(), leaf)[0] for t in (found, expected)]
    torch.testing.assert_close(*grads)


def test_the_eager_path_computes_what_the_operations_do():
    plan, tokens = full_plan(), 20
    x = draw(BATCH, tokens, WIDTH)
    same(eager.gather(x, plan), ops.multimask_gather(x, plan), x)
    z = draw(BATCH * COUNT, plan.width, WIDTH)
    same(eager.scatter(z, plan, noise_std=0.0), ops.multimask_scatter(z, plan, noise_std=0.0), z)
    noisy = eager.scatter(z, plan, noise_std=0.5)[plan.hidden().flatten(0, 1)]
    assert 0.3 < float(noisy.detach().std()) < 0.7
    layers = [torch.randn(BATCH, tokens, WIDTH) for _ in range(3)]
    for norm in ("instance", "layer", "none"):
        torch.testing.assert_close(
            eager.targets(layers, norm=norm, post_norm="layer"),
            ops.multimask_targets(layers, norm=norm, post_norm="layer"), rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    totals = [torch.zeros(BATCH, tokens, WIDTH) for _ in range(2)]
    for total, add in zip(totals, (eager.accumulate_, ops.multimask_accumulate_), strict=True):
        add(total, layers[0], weight=0.25)
    torch.testing.assert_close(*totals)
    pred, target = torch.randn(BATCH * COUNT, tokens, WIDTH, requires_grad=True), layers[0]
    found, expected = (
        f(pred, target, plan, scale=0.5, statistics=True) for f in (eager.loss, ops.multimask_loss)
    )  # fmt: skip
    same(found[0], expected[0], pred)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-3)
    averages = [[torch.ones(3), torch.zeros(2, 2)] for _ in range(2)]
    for each, update in zip(averages, (eager.ema_update_, ops.ema_update_), strict=True):
        update(each, [torch.full((3,), 2.0), torch.ones(2, 2)], torch.tensor(0.75, dtype=torch.float64))
    torch.testing.assert_close(*averages)


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize(("shape", "length"), [((20,), 1), ((20,), 3), ((4, 5), 2), ((4, 5), 3)])
def test_eager_masks_keep_as_many_tokens(shape, length, inverse):
    plan = eager.block_mask(3, 4, shape, keep=0.4, adjust=0.1, length=length, inverse=inverse)
    assert plan.keep_len.tolist() == [8] * 12
    assert plan.width == 8
    assert len({tuple(row) for row in plan.ids_keep.tolist()}) > 1
    again = pyeff.MaskPlan.from_mask(plan.hidden())
    assert all(torch.equal(getattr(plan, part), getattr(again, part)) for part in ("ids_keep", "inverse", "lengths"))


def test_operations_are_put_back():
    before = dict(vars(ops))
    with eager.in_place_of_ops():
        assert ops.multimask_gather is eager.gather
    with pytest.raises(KeyError), eager.in_place_of_ops():
        raise KeyError
    assert dict(vars(ops)) == before
    for wrong in ({"kind": "l1"}, {"reduction": "mean"}):
        with pytest.raises(ValueError, match="expected 'l2' and 'sum'"):
            eager.loss(torch.ones(6, 20, 8), torch.ones(2, 20, 8), full_plan(), **wrong)


def test_the_probe_finds_what_is_linear():
    torch.manual_seed(0)
    centres, labels = 3 * torch.randn(5, 16, dtype=torch.float64), torch.randint(5, (200,))
    x = centres[labels] + 0.5 * torch.randn(200, 16, dtype=torch.float64)
    answers = train.ridge(x[:100], labels[:100], x[100:], 5)
    assert (answers == labels[100:]).float().mean() > 0.95
    noise = train.ridge(torch.randn(100, 16).double(), labels[:100], torch.randn(100, 16).double(), 5)
    assert (noise == labels[100:]).float().mean() < 0.5


def text_task():
    subjects = ("apples pears plums", "iron copper zinc", "rain snow hail")
    examples = [
        Example(f"{subjects[label]} number {i} and {subjects[label].split()[i % 3]}", label, f"{label}.py:{i}")
        for label in range(3)
        for i in range(20)
    ]
    corpus = Corpus("tiny texts", ("fruit", "metal", "weather"), examples[::2], examples[1::2])
    # A number for each word, whatever the process.
    return data.docstrings(12, corpus=corpus, tokenizer=lambda text: [sum(map(ord, word)) for word in text.split()])


def image_task():
    pixels, labels = torch.rand(60, 1, 4, 4), torch.arange(60) % 3
    pixels[torch.arange(60), 0, labels, labels] += 2
    rest, test = slice(0, 40), slice(40, 60)
    sides = [{"pixel_values": pixels[s], "labels": labels[s]} for s in (rest, test)]
    return data.Task("image", "tiny images", {"pixel_values": pixels[rest]}, *sides, 3)


def test_text_is_one_stream_and_the_test_set_is_not_in_it():
    task = text_task()
    assert task.unlabelled["input_ids"].shape[1] == 12
    assert (task.unlabelled["input_ids"] != data.PAD).all()
    assert task.vocabulary == int(task.unlabelled["input_ids"].max()) + 1
    assert set(task.train) == {"input_ids", "attention_mask", "labels"}
    assert task.facts() == {
        "name": "tiny texts", "samples": task.samples, "train": 30, "test": 30, "labels": 3, "majority": 1 / 3,
    }  # fmt: skip
    # Of what occurs once, all is the same unknown piece.
    assert (task.test["input_ids"] == data.UNKNOWN).any()


def test_digits():
    pytest.importorskip("sklearn")
    task = data.digits(5, seed=0)
    assert len(task.train["labels"]) == 50
    assert torch.bincount(task.train["labels"]).tolist() == [5] * 10
    assert task.samples + len(task.test["labels"]) == 1797
    held_out = {tuple(t.flatten().tolist()) for t in task.test["pixel_values"]}
    known = {tuple(t.flatten().tolist()) for t in task.unlabelled["pixel_values"]}
    assert len(held_out & known) < 3  # a few digits were written twice


def command(folder, *more):
    return ["--out", str(folder / "found.json"), "--quick", "--masks", "1", "4", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("reuse")
    tasks = {"text": text_task(), "image": image_task()}
    patch = pytest.MonkeyPatch()
    small = {kind: small_settings(kind) for kind in tasks}
    patch.setattr(program, "quick", lambda s: small["text" if s == DEFAULT["text"] else "image"])
    assert program.main(command(folder), tasks=tasks) == 0
    yield folder, tasks
    patch.undo()


def small_settings(kind):
    """Quick, and of the size of the tiny data."""
    return dataclasses.replace(
        quick(DEFAULT[kind]), tokens=12 if kind == "text" else 16, rows=8, heads=2, decoder_width=32
    )


def test_a_quick_run(finished):
    folder, _ = finished
    found = store.load(folder / "found.json")
    done = [(r["kind"], r["masks"], r["path"]) for r in found["trainings"]]
    assert sorted(done) == sorted((k, m, p) for k in ("text", "image") for m in (1, 4) for p in train.PATHS)
    for row in found["trainings"]:
        assert [m["step"] for m in row["moments"]] == [0, 2, 4]
        assert row["batch"] * row["masks"] == 8
        seconds = [m["seconds"] for m in row["moments"]]
        assert seconds == sorted(seconds)
        assert seconds[0] == 0 < seconds[1]
        assert all(m["loss"] > 0 and m["target_spread"] > 0 for m in row["moments"][1:])
    # Before any training all are the same encoder.
    for kind in ("text", "image"):
        assert len({r["moments"][0]["right"] for r in found["trainings"] if r["kind"] == kind}) == 1
    assert found["trained"]["shared"] is True
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_restart_goes_on_and_other_settings_are_refused(finished, tmp_path, capsys):
    folder, tasks = finished
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "found.json"
    found = json.loads(path.read_text())
    first = {**found["trainings"][0], "batch": -1}
    path.write_text(json.dumps(found | {"trainings": [first, *found["trainings"][1:-1]]}))
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- multimask-reuse:passes -->\nold\n<!-- /multimask-reuse -->\n\nb\n")
    assert program.main(command(tmp_path / "cut", "--into", str(page)), tasks=tasks) == 0
    again = store.load(path)["trainings"]
    assert len(again) == len(found["trainings"])
    assert again[0]["batch"] == -1  # what was there has not been done again
    text = page.read_text()
    assert text.count(report.passes(store.load(path))) == 1
    assert "old" not in text
    assert "other programs were running" in text
    assert program.main(command(tmp_path / "cut", "--only-report", "--into", str(page)), tasks=tasks) == 0
    assert page.read_text() == text
    for more, match in (
        (("--steps", "3"), "steps 4, not 3"), (("--masks", "3"), "masks has 3"),
        (("--into", str(tmp_path / "cut" / "found.json")), "no place for a table"),
    ):  # fmt: skip
        assert program.main(command(tmp_path / "cut", *more), tasks=tasks) == 1
        assert match in " ".join(capsys.readouterr().out.split())
    path.write_text("[]")
    assert program.main(command(tmp_path / "cut"), tasks=tasks) == 1
    assert "no result of this experiment" in " ".join(capsys.readouterr().out.split())


def test_reading_between_probes():
    curve = [(0.0, 0.2), (10.0, 0.6), (20.0, 0.5), (30.0, 0.8)]
    assert report.at(curve, 5.0) == pytest.approx(0.4)
    assert report.at(curve, 30.0) == pytest.approx(0.8)
    assert report.at(curve, 31.0) is None
    assert report.reached(curve, 0.1) == 0
    assert report.reached(curve, 0.4) == pytest.approx(5.0)
    assert report.reached(curve, 0.7) == pytest.approx(20 + 10 * 2 / 3)
    assert report.reached(curve, 0.9) is None
    moments = [{"step": 10 * i, "seconds": seconds} for i, seconds in enumerate((0.0, 5.0, 90.0, 96.0))]
    assert report.pace(moments) == pytest.approx(0.6)


def test_defaults_fit_each_other():
    for settings in DEFAULT.values():
        assert all(settings.rows % masks == 0 for masks in MASKS)
        assert settings.top <= settings.layers
    assert DEFAULT["image"].tokens == 64


def test_tables_are_those_of_the_committed_result(tmp_path):
    pages = [p for p in (ROOT / "docs").glob("*.md") if report.MARKED.search(p.read_text())]
    assert pages
    if not RESULT.exists():
        for page in pages:  # nothing is typed into a place before there is a result
            assert not any(re.sub(r"\s", "", found[2]) for found in report.MARKED.finditer(page.read_text()))
        return
    for page in pages:
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        report.write_into(store.load(RESULT), copy)
        assert copy.read_text() == page.read_text(), f"--only-report --out {RESULT} --into {page}"
    found = store.load(RESULT)
    assert (ROOT / "docs" / "figures" / "multimask_reuse.png").exists()
    for kind in report.kinds(found):
        done = {(r["masks"], r["path"]) for r in found["trainings"] if r["kind"] == kind}
        assert done == {(m, p) for m in MASKS for p in train.PATHS}


def test_steps_by_all_paths_on_tiny_encoders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "SHAPES", {"image": (2, 16), "audio": (2, 20), "text": (2, 12)})
    monkeypatch.setattr(
        steps, "ENCODER",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    )  # fmt: skip
    page, out = tmp_path / "page.md", tmp_path / "steps.json"
    page.write_text("before\n<!-- multimask-steps -->\nold\n<!-- /multimask-steps -->\nafter\n")
    steps.main(["--turns", "2", "--out", str(out), "--into", str(page)])
    found, text = json.loads(out.read_text()), page.read_text()
    assert [row["kind"] for row in found["rows"]] == ["image", "audio", "text"]
    for row in found["rows"]:
        assert {path: len(times) for path, times in row["seconds"].items()} == dict.fromkeys(steps.PATHS, 2)
        assert row["peak_bytes"].keys() == set(steps.PATHS)
    assert "| image: B=2, T=16, M=16 |" in text
    assert "old" not in text
    page.write_text("before\n<!-- multimask-steps --><!-- /multimask-steps -->\nafter\n")
    steps.main(["--only-report", "--out", str(out), "--into", str(page)])
    assert page.read_text() == text


def test_the_table_of_steps_is_of_the_committed_result(tmp_path):
    page = tmp_path / "multimask.md"
    page.write_text((ROOT / "docs" / "multimask.md").read_text())
    assert steps.write_into(json.loads(STEPS.read_text()), page) == 1
    assert page.read_text() == (ROOT / "docs" / "multimask.md").read_text()
