"""What a benchmark is: cases, and the contenders that run each of them.

A row's file (``benchmarks/<stem>.py``) registers a function that yields its cases:

    @registry.register("read")
    def cases(select: Selection) -> Iterator[Case]: ...
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"
# The row files and their operations, in the order of the tables. A file is imported on first use and registers itself.
ROWS = {
    "gemm": ("linear",),
    "read": ("read_recurrence",),
    "ticket": ("ticket_linear",),
    # A step is no op of its own: all of these, one after another.
    "multimask": (
        "multimask_targets", "multimask_gather", "multimask_scatter", "multimask_loss", "multimask_relative_bias",
        "block_mask", "ema_update_", "multimask_step",
    ),
}  # fmt: skip

Call = Callable[[], Sequence[Tensor]]


class Unavailable(Exception):  # noqa: N818 (not an error: a finding)
    """A contender cannot run here; the message says why. Raised by its ``prepare``."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name (str): short (nine letters at most), the same for the same method in every table.
        about (str): one line, for the legend under the table.
        role (str): ``"fused"`` is ours and has the row, ``"variant"`` is another setting of ours, ``"rival"`` is
            anybody else's, and ``"reference"`` is the rival whose error sets the others' limit.
        prepare (callable): input sets -> for each a function without arguments that returns the outputs (gradients
            included where the case has a backward). What a user does once (packing, compiling) belongs here, it is not
            timed. Raises :class:`Unavailable`.
        bytes_needed (float): an estimate of the memory that a call takes. Beyond what the machine has free the
            contender is reported as absent instead of being tried.
    """

    name: str
    about: str
    role: str
    prepare: Callable[[Sequence[Any]], list[Call]]
    bytes_needed: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operation at one shape, dtype and mode.

    Args:
        op (str): the operation's public name.
        group (str), point (str): the row's label is ``"group point"``; a plot has one panel for each group and the
            points along its axis. ``axis`` names what the points are. The first of several words in a group is a
            section, with tables of its own.
        shape (dict): every size, by its usual letter.
        dtype (torch.dtype), device (str), mode (str): ``FORWARD`` or ``TRAINING``.
        flops (float), bytes (float): the least arithmetic and the least traffic of the operation, for the floor.
        reduction (int): the length of the longest sum in it; rounding errors grow with its root.
        make (callable): a number of sets and a seed -> that many input sets. Sets differ in what changes from call to
            call, so that rotating them empties the caches; weights that stay in place between calls may be shared.
        set_bytes (int): what one set adds; the runner takes as many as fill the last cache twice.
        tensors (callable): an input set -> its tensors; what is saved of these is not counted as memory for the
            backward.
        oracle (callable): an input set -> the outputs in float64.
        contenders (tuple): at least one with the role ``"reference"``.
        comparable (callable): an input set and a contender's outputs -> these as the oracle has them, where a contender
            may give them in another form; not timed.
    """

    op: str
    group: str
    point: str
    axis: str
    shape: dict[str, int]
    dtype: torch.dtype
    device: str
    mode: str
    flops: float
    bytes: float
    reduction: int
    make: Callable[[int, int], list[Any]]
    set_bytes: int
    tensors: Callable[[Any], Sequence[Tensor]]
    oracle: Callable[[Any], Sequence[Tensor]]
    contenders: tuple[Contender, ...]
    comparable: Callable[[Any, Sequence[Tensor]], Sequence[Tensor]] = lambda inputs, outputs: outputs

    @property
    def label(self) -> str:
        return f"{self.group} {self.point}".strip()


@dataclass(frozen=True)
class Selection:
    """What to run: ``size`` is ``"quick"`` (about a minute), ``"default"`` or ``"full"`` (the largest sizes, too)."""

    size: str = "default"
    device: str = "cpu"
    match: str = ""

    def takes(self, case: Case) -> bool:
        return matches(self.match, case.op, case.label, dtype_name(case.dtype), case.mode)


Cases = Callable[[Selection], Iterator[Case]]
_rows: dict[str, Cases] = {}


def register(stem: str) -> Callable[[Cases], Cases]:
    """Puts a function that yields cases into the registry, under its row's stem."""

    def add(cases: Cases) -> Cases:
        _rows[stem] = cases
        return cases

    return add


def operations(op: str | None) -> tuple[str, ...]:
    """The operations of a row (``"read"``), an operation itself (``"read_recurrence"``), or all of them.

    Raises:
        ValueError: no such row or operation.
    """
    known = tuple(name for names in ROWS.values() for name in names)
    if op is not None and op not in ROWS and op not in known:
        raise ValueError(f"no benchmark is called {op!r}, expected one of {', '.join((*ROWS, *known))}")
    return known if op is None else ROWS.get(op, (op,))


def cases(op: str | None, select: Selection) -> list[Case]:
    """The cases of what :func:`operations` takes, in the order of the tables."""
    wanted, found = operations(op), []
    for stem, names in ROWS.items():
        if set(names) & set(wanted):
            importlib.import_module(f"{__package__}.{stem}")
            found += [case for case in _rows[stem](select) if case.op in wanted and select.takes(case)]
    return found


def matches(words: str, op: str, label: str, dtype: str, mode: str) -> bool:
    """Whether a case has all of ``words``, such as ``"gru 64 float32 forward"``."""
    return set(words.split()) <= {op, dtype, mode, *label.split()}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")
