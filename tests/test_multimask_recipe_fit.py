"""The loop around the steps of a pre-training: records, callbacks, progress, collapse, and how it ends."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from pyeff.recipes import _multimask_progress
from tests.multimask_models import WIDTH, assert_same, bert, everything, images, multimask, texts, trainer, vit


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
    with pytest.raises(ValueError, match="data has no batch, expected at least one: an iterator that was read"):
        of.fit(iter([]), 9, progress=False)
    with pytest.raises(ValueError, match="data has 0 samples, expected at least 1"):
        of.fit([], 9, progress=False)
    assert of.fit(iter([]), 0, progress=False) == []


def test_a_training_that_is_done_says_how_to_go_on(tmp_path):
    of = trainer(bert(), steps=2)
    assert len(of.fit(texts(), every=1, progress=False)) == 2
    with pytest.warns(UserWarning, match=r"steps=2 is reached.* fit\(data, steps=...\) goes on"):
        assert of.fit(texts(), progress=False, path=tmp_path / "a") == []
    assert of.steps_done == 2
    assert (tmp_path / "a").exists()
    assert len(of.fit(texts(), 1, progress=False)) == 1


def test_steps_that_the_scaler_left_out():
    """They are counted, and not in the norm; nothing is trained by them."""
    of = trainer(bert(), amp="fp16")
    of._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    before = everything(of)["encoder.encoder.layer.0.output.dense.weight"]
    first = of.fit(texts(), 1, every=1, progress=False)[0]
    assert (first["skipped_steps"], first["grad_norm"]) == (1.0, 0.0)
    assert torch.equal(everything(of)["encoder.encoder.layer.0.output.dense.weight"], before)
    of._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    second = of.fit(texts(), 1, every=1, progress=False)[0]
    assert second["skipped_steps"] == 0 < second["grad_norm"]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_norms_that_are_not_finite_are_seen_without_a_scaler(value):
    meter = _multimask_progress.Meter(2, torch.device("cpu"))
    one, bad = torch.tensor(1.0), torch.tensor(value)
    for norm in (one, bad, 3 * one):
        meter.add(one, norm, None, 4, scaled=True)
    found = meter.read(1)
    assert (found["grad_norm"], found["skipped_steps"], found["loss"]) == (2.0, 1.0, 1.0)
    assert "skipped 1" in _multimask_progress.line(found)
    meter.add(one, bad, None, 4)
    found = meter.read(1)
    assert not torch.tensor(found["grad_norm"]).isfinite()
    assert found["skipped_steps"] == 0
    assert "skipped" not in _multimask_progress.line(found)


def test_no_other_gpus_generator_is_seeded(monkeypatch):
    """torch.manual_seed seeds those of every GPU, which nobody gives back."""

    def everywhere(seed):
        raise AssertionError("all GPUs were seeded")

    model = bert(dropout=0.1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", everywhere)
    before = torch.get_rng_state()
    trainer(model).fit(texts(), 1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


class Stopping:
    """Samples, of which one that is asked for is Ctrl-C."""

    def __init__(self, samples, at):
        self.samples, self.left = samples, at

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.samples[i]


def test_an_interrupt_between_two_steps(tmp_path):
    """With a path the last whole step is saved; without one it is said that nothing is."""
    straight = trainer(bert(dropout=0.1))
    straight.fit(texts(), 4, progress=False)
    of = trainer(bert(dropout=0.1))
    with pytest.raises(KeyboardInterrupt, match=r"after step 2, saved in .*a: Pretrainer.load goes on from there"):
        of.fit(Stopping(texts(), 9), 4, progress=False, path=tmp_path / "a")
    again = multimask.Pretrainer.load(tmp_path / "a", bert(dropout=0.1))
    again.fit(texts(), 2, progress=False)
    assert_same(everything(again), everything(straight))
    of = trainer(bert(dropout=0.1))
    with pytest.raises(KeyboardInterrupt, match=r"after step 2: nothing was saved; trainer.save\(path\) still can"):
        of.fit(Stopping(texts(), 9), 4, progress=False)
    of.fit(texts(), 2, progress=False)
    assert_same(everything(of), everything(straight))


def test_an_interrupt_before_the_first_step_leaves_the_file(tmp_path):
    trained = trainer(bert())
    trained.fit(texts(), 2, progress=False, path=tmp_path / "a")
    kept = (tmp_path / "a").read_bytes()
    with pytest.raises(KeyboardInterrupt, match="before the first step of this fit: nothing was saved"):
        trainer(bert()).fit(Stopping(texts(), 0), 4, progress=False, path=tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == kept


def test_an_interrupt_of_the_last_save_saves(tmp_path, monkeypatch):
    of, save, times = trainer(bert()), trainer(bert()).save.__func__, []

    def interrupted(path):
        times.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(of, "save", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after step 2, saved in"):
        of.fit(texts(), 2, progress=False, path=tmp_path / "a")
    assert len(times) == 1
    save(of, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
def test_an_interrupt_within_a_step_waits_for_its_end(tmp_path):
    """Unless it comes twice."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    times = 1

    def interrupt(*arguments):
        if of.steps_done == 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    straight, of = trainer(bert()), trainer(bert())
    straight.fit(texts(), 2, progress=False)
    of.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="after step 2, saved in"):
        of.fit(texts(), 4, progress=False, path=tmp_path / "a")
    assert_same(everything(of), everything(straight))
    assert multimask.Pretrainer.load(tmp_path / "a", bert()).steps_done == 2
    of, times = trainer(bert()), 2
    of.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"in the middle of step 2: .*; this fit had saved nothing yet"):
        of.fit(texts(), 4, progress=False, path=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    of = trainer(bert())
    of.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"in the middle of step 2: .*; .*b has step 1"):
        of.fit(texts(), 4, progress=False, path=tmp_path / "b", save_every=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
