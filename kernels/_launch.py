"""From tensors to launches: where a layer's rows are, scratch, and one place through which every kernel is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import Config

# Bytes of scratch that grows with the tokens (pre-activations, gate gradients): beyond it, they pass in chunks.
SCRATCH_LIMIT = 1 << 30
# A chunk's tokens are a multiple of every tile's.
CHUNK_UNIT = 128


class Machine(NamedTuple):
    """What the choice of tiles depends on."""

    arch: int
    multiprocessors: int


class Launch(NamedTuple):
    """One call of a kernel: what ``record`` collects instead of calling it."""

    kernel: Any
    config: Config
    args: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]


_recording: tuple[Machine, list[Launch]] | None = None


@contextlib.contextmanager
def record(machine: Machine) -> Iterator[list[Launch]]:
    """Collects the launches made inside, as on ``machine``, instead of making them; tensors may be on ``meta``."""
    global _recording
    before, launches = _recording, []
    _recording = (machine, launches)
    try:
        yield launches
    finally:
        _recording = before


@functools.cache
def _device(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine(configs.supported(properties.major, properties.minor), properties.multi_processor_count)


def machine(device: torch.device) -> Machine:
    """The machine behind a device; for CPU tensors Triton's interpreter, with few multiprocessors to fill."""
    if _recording is not None:
        return _recording[0]
    if device.type != "cuda":
        return Machine(configs.INTERPRETER, 2)
    return _device(device.index if device.index is not None else torch.cuda.current_device())


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Calls a kernel with the blocks, warps and stages of a configuration."""
    constants |= config.blocks
    if _recording is not None:
        _recording[1].append(Launch(kernel, config, args, constants, grid))
        return
    kernel[grid](*args, **constants, **config.options())


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, as Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def given(t: Tensor | None) -> Tensor | None:
    """None for an absent tensor: None, or one without elements."""
    return None if t is None or t.numel() == 0 else t


def chunks(tokens: int, bytes_of_token: int) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of tokens whose scratch stays below SCRATCH_LIMIT."""
    most = max(SCRATCH_LIMIT // max(bytes_of_token, 1) // CHUNK_UNIT, 1) * CHUNK_UNIT
    for first in range(0, tokens, most):
        yield first, min(most, tokens - first)


class Rows(NamedTuple):
    """Row n of a layer starts at (n // inner) outer_stride + (n % inner) inner_stride elements."""

    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(t: Tensor) -> Rows:
    """How the leading dimensions of [*, d] fold; at most two strides may be left."""
    folded: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 2 or (t.shape[-1] > 1 and t.stride(-1) != 1):
        raise ValueError(
            f"phi has strides {t.stride()} for shape {tuple(t.shape)}, expected rows of at most two strides"
        )
    if len(folded) == 2:
        return Rows(folded[1][0], folded[0][1], folded[1][1])
    return Rows(folded[0][0], 0, folded[0][1]) if folded else Rows(1, 0, 0)


def encode(number: int) -> int:
    """A number for a kernel's tuple of 64-bit integers, such that no compilation depends on its value.

    Triton compiles integers that are 1, divisible by 16 or short anew, in a tuple always. These are none of it.
    """
    return (1 << 62) + 2 * number + 1


# Layers whose lines fit one launch's parameters, and the step in which their number is rounded up.
LINES, LINES_STEP = 64, 16


class Layers(NamedTuple):
    """The layers as the kernels see them: their table, and what its entries have in common."""

    table: Tensor
    lines: list[tuple[int, ...]]
    constants: dict[str, Any]

    def batches(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(first layer, encoded lines) of each launch that writes the table."""
        for start in range(0, len(self.lines), LINES):
            some = self.lines[start : start + LINES]
            padded = some + [(0,) * 5] * (-len(some) % LINES_STEP)
            yield start, tuple(encode(number) for line in padded for number in line)


def layers_of(phi: Sequence[Tensor], dphi: Sequence[Tensor] | None, kind: Callable[[torch.dtype], Any]) -> Layers:
    """Looks at the layers' addresses and strides; ``kind`` names a dtype in Triton."""
    rows = [rows_of(t) for t in phi]
    outputs = [0] * len(phi) if dphi is None else [t.data_ptr() if t.numel() else 0 for t in dphi]
    lines = [(t.data_ptr(), *r, o) for t, r, o in zip(phi, rows, outputs, strict=True)]
    # Strides in elements: 8 of them are 16 bytes of the narrowest numbers.
    aligned = not any(line[0] % 16 or line[4] % 16 or line[2] % 8 or line[3] % 8 for line in lines)
    return Layers(
        torch.empty(len(phi), 5, dtype=torch.int64, device=phi[0].device),
        lines,
        {"PHI": kind(phi[0].dtype), "ALIGNED": aligned, "FLAT": all(r.outer_stride == 0 for r in rows)},
    )
