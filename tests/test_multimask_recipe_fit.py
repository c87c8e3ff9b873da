"""The loop around the steps of a pre-training: records, callbacks, progress, collapse, and how it ends."""

from __future__ import annotations

import pytest
import torch

from tests.multimask_models import WIDTH, bert, images, multimask, texts, trainer, vit


def test_records_callbacks_and_progress(capsys):
    seen = []

    def enough(of, record):
        seen.append(record["step"])
        return record["step"] < 4

    of = trainer(bert())
    history = of.fit(texts(), 9, every=2, progress="lines", callbacks=[enough])
    assert seen == [2, 4] == [r["step"] for r in history]
    lines = capsys.readouterr().err.splitlines()
    assert [line[:15] for line in lines] == ["step 2/9  loss ", "step 4/9  loss "]
    assert of.fit(texts(), 1, progress="bar")[0]["step"] == 5
    assert "5/5" in capsys.readouterr().err
    of.fit(texts(), 1, progress=False)
    assert capsys.readouterr() == ("", "")
    assert {"loss", "grad_norm", "target_spread", "prediction_spread", "lr", "decay"} < set(history[0])
    assert history[0]["decay"] == pytest.approx(of.settings.decay(2))
    assert history[0]["lr"] == pytest.approx(of.settings.lr * of.settings.rate(1))


class Constant(torch.nn.Module):
    """A decoder that says the same everywhere."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return 0 * x + self.value


def test_collapse_is_seen():
    of = trainer(bert(), decoder=Constant(), warmup=1)
    with pytest.warns(multimask.CollapseWarning, match=r"step 2: the spread of predictions .* expected at least 0.01"):
        history = of.fit(texts(), 6, every=1, progress=False, stop=True)
    assert len(history) == 2
    with pytest.warns(multimask.CollapseWarning):
        assert len(of.fit(texts(), 3, every=1, progress=False)) == 3


def test_a_record_of_what_came_before_batches_ran_out():
    of, batches = trainer(vit()), list(images(8).split(2))
    assert [record["step"] for record in of.fit(iter(batches), 9, every=3, progress=False)] == [3, 4]
    assert [record["step"] for record in of.fit(iter(batches), 9, every=4, progress=False)] == [8]
    assert of.fit(iter([]), 9, progress=False) == []
