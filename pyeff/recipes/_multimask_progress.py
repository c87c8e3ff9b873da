"""What a pre-training says while it runs: sums on the device that are read now and then, bars and lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyeff import ops


class Meter:
    """Sums of what happened since they were last read; nothing is waited for but to read them.

    Args:
        width (int): D of targets and predictions.
        device: where the sums are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        # Steps, those left out, losses, gradients' norms (the same in all processes), then the moments of this one.
        self.sums = torch.zeros(4 + 1 + 4 * width, dtype=torch.float64, device=device)
        self.samples, self.since = 0, time.perf_counter()

    def reset(self) -> None:
        """Forgets what was added."""
        self.sums.zero_()
        self.samples, self.since = 0, time.perf_counter()

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor, moments: Tensor | None, samples: int, scaled: bool = False) -> None:
        """One step: its loss and the norm of its gradient, over all processes; its moments, of this one.

        Where gradients are ``scaled`` for float16, a norm that is not finite is that of a step that was left out.
        """
        skipped = ~norm.isfinite() if scaled else torch.zeros_like(norm, dtype=torch.bool)
        kept = torch.where(skipped, 0, norm)
        self.sums[:4] += torch.stack([t.double() for t in (torch.ones_like(loss), skipped, loss, kept)])
        if moments is not None:
            self.sums[4:] += moments
        self.samples += samples

    def read(self, world: int) -> dict[str, float]:
        """The means since the last reading: one all-reduce, one transfer."""
        sums = self.sums.clone()
        if world > 1:
            torch.distributed.all_reduce(sums)
        spread = torch.stack(ops.multimask_spread(sums[4:]))
        count, skipped, loss, norm, targets, predictions = torch.cat([sums[:4], spread]).tolist()
        loss, norm = loss / max(count, 1.0), norm / max(count - skipped, 1.0)
        if world > 1:
            skipped /= world
        seconds = time.perf_counter() - self.since
        rate = self.samples / seconds if seconds > 0 else math.nan
        self.reset()
        return {
            "loss": loss, "grad_norm": norm, "skipped_steps": skipped, "target_spread": targets,
            "prediction_spread": predictions, "samples_per_second": rate,
        }  # fmt: skip


class CollapseWarning(UserWarning):
    """Targets or predictions hardly differ between tokens any more: the students have found the easy way out.

    Args:
        message (str): what has collapsed, at which step, how far.

    Example:
        >>> from pyeff.recipes import multimask
        >>> issubclass(multimask.CollapseWarning, UserWarning)
        True
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


def collapsed(record: Mapping[str, float], floor: float) -> str | None:
    """What has collapsed, for a message; NaN has."""
    for what in ("target", "prediction"):
        spread = record[f"{what}_spread"]
        if not spread >= floor:
            return (
                f"step {record['step']:.0f}: the spread of {what}s over hidden tokens is {spread:.3g}, expected at "
                f"least {floor:g}: the students are collapsing (a slower teacher or a lower learning rate may help)"
            )
    return None


_SHOWN = (
    ("loss", ".4f"), ("grad_norm", ".2f"), ("target_spread", ".3f"), ("prediction_spread", ".3f"), ("lr", ".2e"),
    ("samples_per_second", ".1f"),
)  # fmt: skip


def line(record: Mapping[str, float]) -> str:
    """A record in one line."""
    skipped = f"  skipped {record['skipped_steps']:.0f}" if record.get("skipped_steps") else ""
    return "  ".join(f"{name} {record[name]:{form}}" for name, form in _SHOWN if name in record) + skipped


class Silent:
    """Says nothing."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def step(self) -> None:
        self.done += 1

    def record(self, record: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """A line for each record."""

    def record(self, record: Mapping[str, float]) -> None:
        print(f"step {self.done}/{self.total}  {line(record)}", file=sys.stderr, flush=True)


class Bar(Silent):
    """A bar, with the last record behind it."""

    def __init__(self, total: int, done: int) -> None:
        from rich import console, progress

        super().__init__(total, done)
        self._bar = progress.Progress(
            progress.BarColumn(20), progress.MofNCompleteColumn(), progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[record]}"), console=console.Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done, record="")
        self._bar.start()

    def step(self) -> None:
        super().step()
        self._bar.advance(self._task)

    def record(self, record: Mapping[str, float]) -> None:
        spreads = "/".join(f"{record[f'{what}_spread']:.2f}" for what in ("target", "prediction"))
        self._bar.update(self._task, record=f"loss {record['loss']:.4f} spread {spreads}")

    def close(self) -> None:
        self._bar.stop()


def progress(how: Any, total: int, done: int, first: bool) -> Silent:
    """What shows the progress.

    Args:
        how (str or bool): "auto" (a bar in a terminal where rich is installed, else lines), "bar", "lines", or False
            (or "none") for nothing.
        first (bool): whether this process is the first one; the others say nothing.

    Raises:
        ValueError: ``how`` is something else.
    """
    if how not in ("auto", "bar", "lines", "none", True, False):
        raise ValueError(f"progress is {how!r}, expected 'auto', 'bar', 'lines' or False")
    if how in ("none", False) or not first:
        return Silent(total, done)
    if how == "bar" or (how != "lines" and sys.stderr.isatty()):
        try:
            return Bar(total, done)
        except ImportError:
            if how == "bar":
                raise
    return Lines(total, done)
