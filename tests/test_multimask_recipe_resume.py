"""A pre-training that is saved and resumed: the same bits; files that do not fit, and files that were not finished."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyeff
from tests.multimask_models import assert_same, bert, everything, images, multimask, texts, trainer, vit

CASES = {
    "text": (lambda: bert(dropout=0.1), texts, {"accumulate": 2}),
    "text in fp16": (lambda: bert(dropout=0.1), texts, {"amp": "fp16"}),
    "images": (lambda: vit(dropout=0.1), images, {"cls_loss": 0.5, "amp": "bf16", "teacher_dtype": "bf16"}),
    "sgd": (
        lambda: bert(kind="Roberta", pad_token_id=1), texts,
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), "clip": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_as_never_interrupted(case, tmp_path):
    make, data, options = CASES[case]
    straight = trainer(make(), **options)
    straight.fit(data(), 6, progress=False)
    first = trainer(make(), **options)
    first.fit(data(), 3, progress=False, path=tmp_path / "a")
    halfway = everything(first)
    # What an interrupted process leaves: none of its objects, and generators that are somewhere else.
    torch.manual_seed(123)
    model = make()
    for p in model.parameters():
        p.data.normal_()
    given = {name: value for name, value in options.items() if name == "optimizer"}
    second = multimask.Pretrainer.load(tmp_path / "a", model, **given)
    assert_same(everything(second), halfway)
    second.fit(data(), 3, progress=False)
    assert_same(everything(second), everything(straight))
    assert not any(torch.equal(t, halfway[name]) for name, t in everything(second).items() if "encoder.layer" in name)
    assert second.metrics()["step"] == 6
    # And once more from the other side: a trainer that is there already.
    third = trainer(make(), **options).resume(tmp_path / "a")
    third.fit(data(), 3, progress=False, path=tmp_path / "b")
    straight.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_resumed_in_another_process(tmp_path):
    straight = trainer(bert(dropout=0.1))
    straight.fit(texts(), 2, progress=False, path=tmp_path / "a")
    straight.fit(texts(), 2, progress=False, path=tmp_path / "b")
    code = (
        "import sys, torch; torch.set_num_threads(1); torch.use_deterministic_algorithms(True)\n"
        "from tests.multimask_models import bert, multimask, texts\n"
        "t = multimask.Pretrainer.load(sys.argv[1], bert(seed=5, dropout=0.1))\n"
        "t.fit(texts(), 2, progress=False, path=sys.argv[2])\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "c"], check=True, cwd=root)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_saving_does_not_touch_the_training_or_the_callers_generators(tmp_path):
    left, right = trainer(bert(dropout=0.1)), trainer(bert(dropout=0.1))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    left.fit(texts(), 4, progress=False, path=tmp_path / "a", save_every=1)
    assert torch.equal(torch.rand(3), expected)
    right.fit(texts(), 4, progress=False)
    assert_same(everything(left), everything(right))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    one = trainer(bert())
    one.save(path)
    before = path.read_bytes()
    one.fit(texts(), 1, progress=False)

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        one.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def wide_decoder():
    return pyeff.nn.ConvDecoder1d(32, hidden=48, kernel=3, groups=1, layers=2)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: trainer(vit()), "model is 'BertModel', expected 'ViTModel'"),
        (lambda: trainer(bert(num_hidden_layers=2)), r"top_k_layers is 3 in the file, expected 2"),
        (lambda: trainer(bert(num_hidden_layers=4), top_k_layers=3), "num_hidden_layers is 3 in the file, expected 4"),
        (lambda: trainer(bert(dropout=0.1)), "hidden_dropout_prob is 0.0 in the file, expected 0.1"),
        (lambda: trainer(bert(), decoder=torch.nn.Linear(32, 32)), r"decoder\..* is missing"),
        (lambda: trainer(bert(), decoder=wide_decoder()), r"decoder\..* in the file, expected .*\[48"),
        (lambda: trainer(bert(), masks=4), "masks is 3 in the file, expected 4"),
        (lambda: trainer(bert(), seed=1), "seed is 0 in the file, expected 1"),
        (
            lambda: trainer(bert(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
            "optimizer is 'AdamW', expected 'SGD'",
        ),
    ],
)
def test_files_that_do_not_fit(other, match, tmp_path):
    trainer(bert()).save(tmp_path / "a")
    theirs = other()
    before = everything(theirs)
    with pytest.raises(ValueError, match=match):
        theirs.resume(tmp_path / "a")
    assert_same(everything(theirs), before)


def test_files_of_others(tmp_path):
    (tmp_path / "a").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        trainer(bert()).resume(tmp_path / "a")
    from pyeff.recipes import _files

    _files.save(tmp_path / "b", {"x": torch.ones(1)}, {"recipe": "other"})
    with pytest.raises(ValueError, match="'other', expected one of 'multimask'"):
        trainer(bert()).resume(tmp_path / "b")


def test_load_names_another_model_before_its_settings(tmp_path):
    trainer(bert()).save(tmp_path / "a")
    with pytest.raises(ValueError, match="another model configuration: num_hidden_layers is 3 in the file, expected 2"):
        multimask.Pretrainer.load(tmp_path / "a", bert(num_hidden_layers=2))
    with pytest.raises(ValueError, match="model is 'BertModel', expected 'ViTModel'"):
        multimask.Pretrainer.load(tmp_path / "a", vit())


def test_batches_may_be_cut_otherwise_and_settings_changed_on_purpose(tmp_path):
    one = trainer(bert())
    one.fit(texts(), 1, progress=False, path=tmp_path / "a")
    assert trainer(bert(), accumulate=2).resume(tmp_path / "a").steps_done == 1
    changed = multimask.Pretrainer.load(tmp_path / "a", bert(seed=3), steps=100, clip=0)
    assert (changed.settings.steps, changed.settings.clip, changed.settings.masks) == (100, None, 3)
