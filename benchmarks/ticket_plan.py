"""Which kernels the ticket launches for a call, and how they are cut: what ``ticket_model`` makes its amounts of.

For Triton the launches are those that kernels/ticket.py makes, recorded with tensors that have no memory. For CUDA C++
they follow csrc/cuda/ticket_launch.cuh and ticket_backward.cu, whose tiles are repeated here. What a kernel takes of an
SM is in the committed table of the resource report.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from . import ticket_model
from .gpus import Card
from .plans import Family, arguments, ceil, entry, recorded, resources
from .ticket_model import SIZES, Shape, Step

_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "float"}
_BLOCKS, _TOKENS = (16, 32, 64, 128), (1, 128, 4096, 32768)
# Beside the density of three tenths.
_DENSITIES, _DENSITY_TOKENS = (0.1, 0.5), 4096


def shapes() -> Iterator[Shape]:
    """The calls that are predicted: blocks by tokens, and some densities."""
    for training, dtype, block in itertools.product((False, True), SIZES, _BLOCKS):
        for tokens in _TOKENS:
            yield Shape(tokens, block, 0.3, dtype, training)
        for density in _DENSITIES:
            yield Shape(_DENSITY_TOKENS, block, density, dtype, training)


def plan(backend: str, shape: Shape, card: Card) -> list[Step]:
    """The launches of a call.

    Raises:
        NoPlan: this machine cannot tell, or the resource table has no such kernel.
    """
    return list((_triton if backend == "triton" else _cuda)(shape, card))


# Triton ---------------------------------------------------------------------------------------------------------------

_KERNELS = {
    "multiply": "product",
    "multiply_few": "few",
    "outer_blocks": "outer",
    "derive": "derive",
    "add_parts": "add",
}


def _triton(shape: Shape, card: Card) -> Iterator[Step]:
    for launch in _recorded(shape, card):
        given, kernel = arguments(launch), _KERNELS[launch.kernel.__name__]
        rows, columns, depth = (given.get(name, 1) for name in ("BLOCK_N", "BLOCK_M", "BLOCK_K"))
        size, splits = 0, 1
        if kernel == "few":
            rows, depth = 4, given["BLOCK_STEP"]
        elif kernel == "add":
            columns, size, splits = rows, int(given["size"]), int(given["parts"])
        elif kernel in ("outer", "derive"):
            splits = int(launch.grid[1])
        yield _step(
            kernel, launch.config.name, card, shape, rows, columns, depth,
            along_columns=bool(given.get("COLUMNS", False)), splits=splits, size=size,
        )  # fmt: skip


def _recorded(shape: Shape, card: Card) -> list[Any]:
    """The launches of kernels/ticket.py for this call, as on the card."""
    import torch
    from torch import Tensor

    dtype, n, b = getattr(torch, shape.dtype), shape.tokens, shape.block

    def empty(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    x, y, values, bias, none = (
        empty(n, shape.width),
        empty(n, shape.out),
        empty(shape.blocks, b, b),
        empty(shape.out),
        empty(0),
    )
    rows, columns = shape.side(False)[:2]
    index = empty(2 * (rows + columns) + 2 + 3 * shape.blocks, kind=torch.int32)
    with recorded("ticket", card) as (ticket, launches):
        ticket.forward(x, values, index, bias, "none", y, none)
        if shape.training:
            ticket.backward(y, x, values, index, none, "none", x, values, bias)
    return launches


def _step(
    kernel: str, name: str, card: Card, shape: Shape, rows: int, columns: int, depth: int, **more: Any
) -> Step:  # fmt: skip
    threads, resident, instruction = resources(name, card)
    instruction = "" if shape.dtype == "float32" or kernel not in ("product", "resident", "outer") else instruction
    return Step(kernel, rows, columns, depth, threads, resident, instruction, **more)


# CUDA C++ -------------------------------------------------------------------------------------------------------------

_THREADS, _FEW, _MANY, _SCRATCH = 256, 16, 512, 1 << 30
_SHARED = 227 * 1024  # bytes of a block on sm_90


def _cuda(shape: Shape, card: Card) -> Iterator[Step]:
    number, half = _NAMES[shape.dtype], shape.dtype != "float32"
    wgmma, narrow, depth = card.cc == 90 and half, 64 if half else 32, 64 if half else 32
    side = narrow if shape.block <= narrow else 2 * narrow
    suffix = "_wgmma" if wgmma else ""

    def product(transposed: bool) -> Step:
        if shape.tokens < _FEW:
            return _vector(shape, card, transposed, number)
        if wgmma and shape.tokens >= _MANY and (step := _resident(shape, card, transposed, number)):
            return step
        rows = 128
        # A tile of 256 tokens where there is one for each SM.
        if wgmma and side == 128 and shape.tokens > 128:
            own = shape.side(transposed).groups * ceil(shape.block, side)
            rows = 256 if ceil(shape.tokens, 256) * own >= card.sms else 128
        tile = f"{rows}, {side}" if wgmma else str(side)
        name = _named(f"ticket_product{suffix}<{number}, {{}}, {tile}>", transposed, card)
        return _step("product", name, card, shape, rows, side, depth, along_columns=transposed)

    yield product(False)
    if not shape.training:
        return
    splits = min(_best_splits(ceil(shape.out, 64), 2 * card.sms), ceil(shape.tokens, 64))
    yield _step("derive", f"ticket_gradient<{number}>", card, shape, 8, 64, 1, splits=splits)
    yield _add(shape, card, number, splits, shape.out)
    yield product(True)
    strip = 256 if wgmma and side == 64 else 128
    live = ceil(shape.blocks * shape.block, strip) * ceil(shape.block, side)
    splits = min(_best_splits(live, card.sms), ceil(shape.tokens, 256), max(_SCRATCH // (4 * shape.values), 1))
    yield _step("outer", f"ticket_outer{suffix}<{number}, {side}>", card, shape, strip, side, depth, splits=splits)
    if splits > 1:
        yield _add(shape, card, number, splits, shape.values)


def _add(shape: Shape, card: Card, number: str, splits: int, size: int) -> Step:
    return _step("add", f"ticket_sum<{number}>", card, shape, 1, _THREADS, 1, splits=splits, size=size)


def _resident(shape: Shape, card: Card, transposed: bool, number: str) -> Step | None:
    """Tokens that stay in shared memory while warpgroups pass the lines of small blocks; or None where none fit.

    Up to four groups of a warpgroup, at least two; with lines of 64, up to two groups of a pair of warpgroups.
    """
    side = shape.side(transposed)
    if shape.block > 64 or shape.block % 16:
        return None
    columns = next(n for n in (16, 32, 64) if n >= shape.block)
    panels = ceil(side.other_width, 64) * 128 * 128
    most, least = (4, 2) if columns <= 32 else (2, 1)
    groups = min((_SHARED - panels) // (4 * (columns * 128 + 16)), most)
    if groups < least:
        return None
    shares = min(_best_splits(ceil(shape.tokens, 128), card.sms), max(side.groups // groups, 1))
    name = _named(f"ticket_resident<{number}, {{}}, {columns}>", transposed, card)
    return _step(
        "resident", name, card, shape, 128, columns, 64, along_columns=transposed, splits=shares, side_by_side=groups
    )  # fmt: skip


def _vector(shape: Shape, card: Card, transposed: bool, number: str) -> Step:
    """Eight warps share a line's blocks, each with four loads of 16 bytes a lane on their way."""
    chunk, lanes = 16 // shape.s, 1
    while lanes * chunk < shape.block and lanes < (4 if transposed else 32):
        lanes *= 2
    columns = lanes * chunk if transposed else 32 // lanes
    depth = 32 // lanes if transposed else lanes * chunk
    name = _named(f"ticket_vector<{number}, {{}}>", transposed, card)
    return _step("few", name, card, shape, 8, columns, depth, along_columns=transposed, side_by_side=32)


def _named(pattern: str, transposed: bool, card: Card) -> str:
    """The table's name of an instance: compilers differ in how they write a truth value."""
    names = [pattern.format(value) for value in (("true", "1") if transposed else ("false", "0"))]
    return next((name for name in names if entry(name, card)), names[0])


def _best_splits(tiles: int, processors: int) -> int:
    """best_splits of csrc/cuda: more parts where they keep the SMs a tenth busier."""
    best, least = 1, float(ceil(tiles, processors))
    for splits in range(2, 65):
        if tiles * splits <= 4 * processors and ceil(tiles * splits, processors) / splits < 0.9 * least:
            best, least = splits, ceil(tiles * splits, processors) / splits
    return best


FAMILY = Family(
    "ticket_linear", "docs/ticket.md", shapes, plan, ticket_model.predict, ticket_model.floor_seconds,
    ticket_model.notes,
)  # fmt: skip
