"""Which kernels READ launches for a call, and how they are cut: what ``read_model`` makes its amounts of.

For Triton the launches are those that kernels/read.py makes, recorded with tensors that have no memory. For CUDA C++
they follow csrc/cuda/read.cu and read_backward.cu, whose tiles are repeated here. What a kernel takes of an SM is in
the committed table of the resource report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from . import read_model
from .gpus import Card
from .plans import Family, NoPlan, arguments, ceil, entry, recorded, resources
from .read_model import GATES, GRADIENTS, SIZES, Shape, Step

_THREADS = 256
_SCRATCH = 1 << 30  # bytes that grow with the tokens: beyond, they pass in turns. The same in both backends
_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "float"}
_CELLS = {"rnn": 0, "gru": 1, "lstm": 2}
TOKENS = (512, 1024, 8192, 32768)


def shapes() -> Iterator[Shape]:
    """The calls that are predicted."""
    for training, dtype, cell, tokens in itertools.product((False, True), SIZES, GATES, TOKENS):
        yield Shape(tokens, cell, dtype, training)


def plan(backend: str, shape: Shape, card: Card) -> list[Step]:
    """The launches of a call.

    Raises:
        NoPlan: this machine cannot tell, or the resource table has no such kernel.
    """
    return (_triton if backend == "triton" else _cuda)(shape, card)


# Triton ---------------------------------------------------------------------------------------------------------------


def _triton(shape: Shape, card: Card) -> list[Step]:
    steps = []
    for launch in _recorded(shape, card):
        given = arguments(launch)
        name = launch.kernel.__name__
        threads, blocks, instruction = resources(_known(launch.config.name, shape.cell, card), card)
        kernel, rows, columns = _triton_kernel(name, given, shape)
        steps.append(
            Step(
                kernel, int(given.get("count", shape.tokens)), math.prod(launch.grid), rows, columns, threads, blocks,
                instruction if shape.dtype != "float32" else "", splits=_splits(name, launch, given),
            )
        )  # fmt: skip
    return steps


def _known(key: str, cell: str, card: Card) -> str:
    """The table's name: that of the cell, or of any if the kernel does not depend on it."""
    names = [f"{key} {cell}", *(f"{key} {other}" for other in _CELLS)]
    return next((name for name in names if entry(name, card)), names[0])


def _triton_kernel(name: str, given: dict[str, Any], shape: Shape) -> tuple[str, int, int]:
    """The model's kernel, and the sides of its tile."""
    if name == "fold":
        return "fold", given["BLOCK_ROWS"], shape.width
    if name == "project":
        return "project", given["BLOCK_N"], given["BLOCK_M"]
    if name == "recur":
        return "fused" if given["FUSED"] else "recur", given["BLOCK_N"], given["BLOCK_U"]
    if name == "reverse":
        return "reverse", given["BLOCK_N"], given["BLOCK_U"]
    if name == "outer":
        return "outer_state" if given["STATE"] else "outer", given["BLOCK_M"], given["BLOCK_N"]
    if name == "reduce_weight":
        return "reduce", given["BLOCK_M"], int(given["width"])
    if name in ("reduce_bias", "reduce_norm", "describe"):
        return "small", shape.tokens, 1
    raise NoPlan(f"the model does not know the kernel {name}")


def _splits(name: str, launch: Any, given: dict[str, Any]) -> int:
    return int(launch.grid[1]) if name == "outer" else int(given["splits"]) if name == "reduce_weight" else 1


def _recorded(shape: Shape, card: Card) -> list[Any]:
    """The launches of kernels/read.py for this call, as on the card."""
    import torch
    from torch import Tensor

    dtype, n, r, d = getattr(torch, shape.dtype), shape.tokens, shape.rank, shape.width

    def empty(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    lstm, none, phi = shape.cell == "lstm", empty(0), [empty(n, d) for _ in range(shape.layers)]
    inputs = (empty(shape.rows, d), empty(shape.rows, r), empty(shape.rows), empty(shape.rows), empty(d), *[None] * 3)
    options, out = (shape.cell, "rms", 1e-6, "mean"), empty(n, r)
    kept = (none,) * 4
    if shape.training:
        states = empty(shape.layers, n, r)
        gates = none if shape.cell == "rnn" else empty(shape.layers, n, 4 * r)
        kept = (states, states if lstm else none, gates, empty(1, shape.layers, n, kind=torch.float32))
    with recorded("read", card) as (read, launches):
        read.forward(phi, *inputs, *options, out, empty(n, r) if lstm else none, *kept)
        if shape.training:
            wanted = [none if t is None else t for t in inputs]
            read.backward(out, None, phi, *inputs, *kept, *options, [none] * shape.layers, *wanted)
    return launches


# CUDA C++ -------------------------------------------------------------------------------------------------------------


def _cuda(shape: Shape, card: Card) -> list[Step]:
    half, number = shape.dtype != "float32", _NAMES[shape.dtype]
    wgmma = card.cc == 90 and half
    training = shape.training
    # Scratch of a forward turn: pre unless the gates are kept, two states unless they are, the running sum.
    row = shape.rank * shape.s * (0 if training else shape.layers * shape.g + 2) + 4 * shape.rank
    steps = [_step("fold", f"read_fold<{number}>", card, shape.tokens, shape.rows, 1, shape.width)]
    if shape.cell == "rnn" and training:
        row = (shape.layers * shape.rank + shape.rank) * shape.s  # the RNN keeps no gates: pre is scratch
    for tokens in _turns(shape.tokens, row):
        steps += _cuda_forward(shape, card, tokens, wgmma, number)
    if training:
        row = shape.layers * GRADIENTS[shape.cell] * shape.rank * shape.s + 8 * shape.rank
        steps += _cuda_backward(shape, card, _turns(shape.tokens, row), number)
    return steps


def _turns(tokens: int, bytes_a_token: int, tile: int = 128) -> list[int]:
    most = max(_SCRATCH // bytes_a_token // tile * tile, tile)
    each = ceil(ceil(tokens, ceil(tokens, most)), tile) * tile if tokens > most else tokens
    return [min(each, tokens - first) for first in range(0, tokens, each)]


def _step(
    kernel: str, name: str, card: Card, tokens: int, blocks: int, rows: int, columns: int, **more: Any
) -> Step:  # fmt: skip
    threads, resident, instruction = resources(name, card)
    return Step(kernel, tokens, blocks, rows, columns, threads, resident, instruction, **more)


def _cuda_forward(shape: Shape, card: Card, tokens: int, wgmma: bool, number: str) -> Iterator[Step]:
    cell = _CELLS[shape.cell]
    if number == "float":
        yield _step("statistics", "read_stats<float>", card, tokens, ceil(tokens, 8) * shape.layers, 8, shape.width)
    large = wgmma and shape.rows >= 128
    name = "read_project_wgmma" if large else "read_project"
    columns = 256 if large else 64 if number == "float" else 128
    blocks = ceil(shape.rows, columns) * ceil(tokens, 128) * shape.layers
    yield _step("project", f"{name}<{number}, {number}>", card, tokens, blocks, 128, columns)
    if wgmma and shape.rank in (64, 128, 256):
        # As many clusters as run at once, in as few rounds as they can: as if no cluster were short of neighbours.
        name = f"read_resident<{number}, Cell {cell}>"
        side, tiles = shape.rank // 64, ceil(tokens, 128)
        at_once = max(card.sms * resources(name, card)[1] // side, 1)
        blocks = ceil(tiles, ceil(tiles, at_once)) * side
        yield _step("recur", name, card, tokens, blocks, 128, 64, resident=True, side_by_side=side)
    else:
        yield _step("recur", f"read_recur<{number}, Cell {cell}>", card, tokens, ceil(tokens, 64), 64, 64)


def _cuda_backward(shape: Shape, card: Card, turns: list[int], number: str) -> Iterator[Step]:
    cell = _CELLS[shape.cell]

    def cut(width: int) -> tuple[str, int, int, int]:
        """The long product with this many columns: its kernel, columns of a tile, tiles, and parts of the tokens."""
        wide = card.cc == 90 and number != "float" and width >= 128
        columns = 256 if wide else 128
        tiles = ceil(shape.rows, 128) * ceil(width, columns)
        parts = max(min(_parts(tiles, card.sms), ceil(turns[0] * shape.layers, 256)), 1)
        return f"{'read_outer_wgmma' if wide else 'read_outer'}<{number}, {number}>", columns, tiles, parts

    for tokens in turns:
        yield _step("reverse", f"read_reverse<{number}, Cell {cell}>", card, tokens, ceil(tokens, 64), 64, 128)
        for kernel, width in (("outer", shape.width), ("outer_state", shape.rank)):
            name, columns, tiles, parts = cut(width)
            yield _step(kernel, name, card, tokens, tiles * parts, 128, columns, splits=parts)
    for width in (shape.width, shape.rank):
        blocks = ceil(width, _THREADS) * ceil(shape.rows, 16)
        yield _step("reduce", f"read_finish<{number}>", card, shape.tokens, blocks, 16, width, splits=cut(width)[3])
        if width == shape.width:
            yield _step("small", f"read_norm_grads<{number}>", card, shape.tokens, ceil(width, _THREADS), 16, 1)


def _parts(tiles: int, sms: int) -> int:
    """best_splits of csrc/cuda/read_backward.cu: more parts where they keep the SMs a tenth busier."""
    best, least = 1, float(ceil(tiles, sms))
    for parts in range(2, 65):
        if tiles * parts <= 4 * sms and ceil(tiles * parts, sms) / parts < 0.9 * least:
            best, least = parts, ceil(tiles * parts, sms) / parts
    return best


FAMILY = Family("read_recurrence", "docs/read.md", shapes, plan, read_model.predict, read_model.floor_seconds)
