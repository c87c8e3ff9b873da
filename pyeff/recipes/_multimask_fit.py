"""The loop around the steps of a pre-training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyeff.recipes import _multimask_progress, _multimask_resume
from pyeff.recipes._multimask_data import Order, Places, is_dataset, loader
from pyeff.recipes._multimask_interrupts import Interrupts

if TYPE_CHECKING:
    from pyeff.recipes.multimask import Pretrainer


def fit(
    trainer: Pretrainer,
    data: Any,
    steps: int | None,
    *,
    every: int,
    progress: str | bool,
    callbacks: Sequence[Callable[[Pretrainer, dict[str, float]], Any]],
    floor: float,
    stop: bool,
    workers: int,
    path: str | os.PathLike | None,
    save_every: int | None,
) -> list[dict[str, float]]:
    """:meth:`pyeff.recipes.multimask.Pretrainer.fit`."""
    engine = trainer._engine
    if steps is None:
        steps = max(trainer.settings.steps - trainer.steps_done, 0)
        if steps == 0 and engine.rank == 0:
            warnings.warn(
                f"fit: steps={trainer.settings.steps} is reached, nothing is trained; fit(data, steps=...) goes on at "
                "the end of the schedule, where the rate is 0 unless a schedule= was given; Pretrainer.load(path, "
                "model, steps=...) goes on with a longer one",
                stacklevel=3,
            )
    for name, value in (("steps", steps), ("every", every), ("save_every", save_every), ("workers", workers)):
        least = 0 if name in ("steps", "workers") else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    if save_every is not None and path is None:
        raise ValueError("save_every was given without a path, expected one to save to")
    if path is not None and not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"path is {os.fspath(path)!r}, but there is no folder {folder!r}, expected one to save to")
    batches = iter(_batches(trainer, data, steps, workers))
    bar = _multimask_progress.progress(progress, trainer.steps_done + steps, trainer.steps_done, engine.rank == 0)
    history: list[dict[str, float]] = []
    trainer._meter.reset()

    def record() -> bool:
        history.append(trainer.metrics())
        bar.record(history[-1])
        going = _watch(trainer, history[-1], floor, stop)
        for callback in callbacks:
            going = callback(trainer, history[-1]) is not False and going
        return going

    interrupts, saved, begun = Interrupts(), 0, trainer.steps_done
    try:
        with interrupts:
            for done in range(1, steps + 1):
                batch = next(batches, None)
                if batch is None:
                    if done == 1:
                        raise ValueError(
                            "data has no batch, expected at least one: an iterator that was read to its end has to be "
                            "made anew"
                        )
                    if (done - 1) % every:
                        record()
                    break
                with interrupts.step():
                    trainer.step(batch)
                bar.step()
                going = record() if done % every == 0 or done == steps else True
                if path is not None and save_every is not None and done % save_every == 0 and going and done < steps:
                    trainer.save(path)
                    saved = trainer.steps_done
                if not going:
                    break
        if path is not None:
            trainer.save(path)
    except KeyboardInterrupt as interrupt:
        made = trainer.steps_done > begun
        raise KeyboardInterrupt(_stopped(trainer, path, saved, made, interrupts.inside)) from interrupt
    finally:
        bar.close()
    return history


def _stopped(trainer: Pretrainer, path: str | os.PathLike | None, saved: int, made: bool, inside: bool) -> str:
    """What of a training that was interrupted is saved, after saving it where it can be and there is anything new."""
    step, where = trainer.steps_done, None if path is None else os.fspath(path)
    if inside:
        done = f"{where} has step {saved}" if saved else "this fit had saved nothing yet"
        return f"interrupted in the middle of step {step + 1}: what is in memory is not to be saved; {done}"
    if not made:
        return "interrupted before the first step of this fit: nothing was saved"
    if path is None:
        return (
            f"interrupted after step {step}: nothing was saved; trainer.save(path) still can, and fit(..., path=) does "
            "so by itself"
        )
    _multimask_resume.save(trainer, path, wait=False)
    if trainer._engine.rank:
        return f"interrupted after step {step}, which the first process saves in {where}"
    return f"interrupted after step {step}, saved in {where}: Pretrainer.load goes on from there"


def _batches(trainer: Pretrainer, data: Any, steps: int, workers: int) -> Iterable[Any]:
    if isinstance(data, (str, bytes, Mapping)):
        raise ValueError(
            f"data is a {type(data).__name__}, expected samples, or batches to iterate; step takes a batch"
        )
    if not is_dataset(data) or isinstance(data, torch.utils.data.DataLoader):
        if not hasattr(data, "__iter__"):
            raise ValueError(f"data is a {type(data).__name__}, expected samples by index, or batches to iterate")
        return data
    engine, s = trainer._engine, trainer.settings
    order = Order(len(data), s.seed)
    places = Places(order, trainer.samples_done, steps, s.batch_size, engine.rank, engine.world)
    pin = trainer.device.type == "cuda"
    return loader(data, trainer._collate, places, workers=workers, pin=pin, seed=s.seed)


def _watch(trainer: Pretrainer, record: dict[str, float], floor: float, stop: bool) -> bool:
    """Whether to go on. While the rate still rises, spreads are small for another reason."""
    early = trainer.steps_done <= trainer.settings.warmup
    message = None if early else _multimask_progress.collapsed(record, floor)
    if message is None:
        return True
    if trainer._engine.rank == 0:
        warnings.warn(message, _multimask_progress.CollapseWarning, stacklevel=5)
    return not stop
