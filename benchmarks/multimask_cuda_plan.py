"""Which CUDA C++ kernels the multimask family launches for a call, for ``multimask_model``.

They follow csrc/cuda/multimask_*.cu and multimask_targets_launch.cuh, whose blocks are repeated here, for tensors in
their usual places: contiguous, aligned, with rows of whole vectors of 16 bytes. Registers are the locked ones. The
resource table has what a kernel takes at most, and a call of these has often less: fewer threads, less shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from . import lock
from .gpus import Card, blocks_per_sm
from .multimask_model import MASK_STEPS, Shape, Step, in_shared, waits_of_sum
from .plans import NoPlan, ceil

_THREADS, _WARP = 256, 32
_NAMES = {"bfloat16": "bf16", "float32": "float"}
_GATHER, _SCATTER = 4, 2  # vectors of a thread
_AHEAD = 8  # masks that a thread of the loss has on their way
_PLACES, _NUMBERS = 8 * _THREADS, 16 * _THREADS  # of a block: of the bias, of the moving average
_LAYERS = 32  # of a launch
_ROWS = 8  # tokens of a thread of a slice, at most
# Loads that a loop has on its way which does nothing but add them up, as the compiler unrolls it.
_UNROLLED = 4


def steps(shape: Shape, card: Card) -> list[Step]:
    """The launches of a call.

    Raises:
        NoPlan: nobody has written down what is launched for such a call, or the lock has no such kernel.
    """
    if shape.width * shape.s % 16:
        raise NoPlan("the CUDA kernels are predicted for tokens of whole vectors")
    return list(_OPS[shape.op](shape, card))


def _step(
    kernel: str, source: str, name: str, card: Card, blocks: int, threads: int = _THREADS, shared: int = 0,
    passed: float = 0.0, **more: Any,
) -> Step:  # fmt: skip
    registers = _registers(source).get(f"{name} sm_{card.cc}")
    if registers is None:
        raise NoPlan(f"the lock of {source}.cu has no {name} on sm_{card.cc}")
    return Step(kernel, blocks, blocks_per_sm(card.cc, threads, registers, shared), name=name, shared=passed, **more)


@functools.cache
def _registers(source: str) -> dict[str, int]:
    entries = lock.read(lock.LOCKS / f"{source}.cu.json").entries
    return {name: int(figures["registers"]) for name, (_, figures) in entries.items()}


def _number(shape: Shape) -> str:
    return f"{_NAMES[shape.dtype]}, true"


def _vectors(shape: Shape) -> int:
    """Of a token."""
    return shape.width * shape.s // 16


# What moves tokens: multimask_move.cu ---------------------------------------------------------------------------------


def _gather(shape: Shape, card: Card) -> Iterator[Step]:
    yield _gathered("gather", shape, card)
    if shape.training:
        blocks = ceil(shape.batch * shape.tokens * _vectors(shape), _THREADS)
        name = f"multimask_sums_kernel<{_number(shape)}>"
        yield _step("sum", "multimask_move", name, card, blocks, rounds=waits_of_sum(shape))


def _gathered(kernel: str, shape: Shape, card: Card) -> Step:
    blocks = ceil(shape.batch * shape.masks * shape.kept * _vectors(shape), _GATHER * _THREADS)
    return _step(kernel, "multimask_move", f"multimask_gather_kernel<{_number(shape)}>", card, blocks)


def _scatter(shape: Shape, card: Card) -> Iterator[Step]:
    blocks = ceil(shape.batch * shape.masks * shape.tokens * _vectors(shape), _SCATTER * _THREADS)
    yield _step("scatter", "multimask_move", f"multimask_scatter_kernel<{_number(shape)}>", card, blocks)
    if shape.training:
        yield _gathered("gather from rows", shape, card)


# Teacher targets: multimask_targets_launch.cuh ------------------------------------------------------------------------


def _targets(shape: Shape, card: Card) -> Iterator[Step]:
    if shape.layers > _LAYERS or shape.width > 1024:
        raise NoPlan("the CUDA kernels are predicted for up to 32 layers of up to 1024 channels")
    if shape.tokens <= _ROWS * _THREADS // 2:
        yield _slices(shape, card)
    else:
        yield from _stages(shape, card)
    if shape.post_norm:
        # A warp has a token; float, as the targets are.
        blocks = ceil(shape.batch * shape.tokens, _THREADS // _WARP)
        yield _step("layer norm", "multimask_targets", "multimask_targets_warp<float, true>", card, blocks)


def _slices(shape: Shape, card: Card) -> Step:
    """Instance norm where a block has all tokens of some vectors of channels, layer after layer in shared memory."""

    def blocks(columns: int) -> int:
        return shape.batch * ceil(_vectors(shape), columns)

    columns = next(
        n
        for n in (8, 4, 2)
        if shape.tokens <= _ROWS * _THREADS // n and (n == 2 or blocks(n) >= 2 * card.sms)
    )  # fmt: skip
    sums = (_THREADS // _WARP + 1) * columns * 16 // shape.s * 4
    # Two stages of a vector for each thread, as often as it has tokens.
    shared = sums + 2 * ceil(shape.tokens, _THREADS // columns) * _THREADS * 16
    name = f"multimask_targets_slice<{_number(shape)}, {columns}>"
    # The next layer is under way while one is worked on. That takes a load, and sums of two barriers no longer: of the
    # numbers, of squares about their mean, in float32 also of what that was rounded by.
    passed = in_shared(shape, blocks(columns), _THREADS, columns, 3 if shape.s == 4 else 2, passes=4)
    return _step(
        "targets", "multimask_targets", name, card, blocks(columns), shared=shared, rounds=shape.layers, passed=passed
    )  # fmt: skip


def _stages(shape: Shape, card: Card) -> Iterator[Step]:
    """Instance norm of more tokens than a block has: statistics of parts, those of the whole, then the sum."""
    columns = 8
    parts = ceil(shape.tokens, _ROWS * _THREADS // columns)
    blocks = shape.batch * parts * ceil(_vectors(shape), columns) * shape.layers
    shared = (_THREADS // _WARP + 1) * columns * 16 // shape.s * 4
    yield _step(
        "part", "multimask_targets", f"multimask_targets_part<{_number(shape)}, false>", card, blocks, shared=shared,
        groups=parts, steps=4,
    )  # fmt: skip
    blocks = ceil(shape.layers * shape.batch * shape.width, _THREADS)
    yield _step(
        "whole", "multimask_targets", "multimask_targets_whole<false>", card, blocks, groups=parts, rounds=parts
    )
    blocks = ceil(shape.batch * shape.tokens * _vectors(shape), _THREADS)
    yield _step(
        "apply", "multimask_targets", f"multimask_targets_apply<{_number(shape)}>", card, blocks,
        rounds=ceil(shape.layers, 4),
    )  # fmt: skip


# The loss with its derivative and moments: multimask_loss.cu ----------------------------------------------------------


def _loss(shape: Shape, card: Card) -> Iterator[Step]:
    units = shape.width // 4  # with moments a thread has four channels
    columns = min(units, _THREADS)
    lanes = _THREADS // columns
    threads = ceil(columns * lanes, _WARP) * _WARP
    across, tokens = ceil(units, columns), shape.batch * shape.tokens
    groups = min(ceil(3 * card.sms, across), ceil(tokens, lanes))
    # Token after token a block goes through the masks, and waits for indices and then for what they say.
    rounds = ceil(tokens, groups * lanes) * ceil(shape.masks, _AHEAD) * 2
    shared = threads * 4 * 8
    yield _step(
        "loss", "multimask_loss", f"multimask_loss_channels<{_number(shape)}, true>", card, groups * across, threads,
        shared, groups=groups, moments=True, rounds=rounds,
    )  # fmt: skip
    warps = _THREADS // _WARP
    yield _step(
        "total", "multimask_loss", "multimask_loss_total<double>", card, 1, shared=8 * warps, groups=groups * across,
        rounds=_trips(groups * across, _THREADS),
    )  # fmt: skip
    yield _step(
        "finish", "multimask_loss", "multimask_loss_moments<double>", card, ceil(1 + 4 * shape.width, _WARP),
        shared=8 * _THREADS, groups=groups, moments=True, rounds=_trips(groups, warps),
    )  # fmt: skip


def _trips(count: int, share: int) -> int:
    """How often a thread waits that adds up one of ``share`` parts of so many numbers."""
    return ceil(ceil(count, share), _UNROLLED)


# Plans: multimask_plan.cu ---------------------------------------------------------------------------------------------


def _bias(shape: Shape, card: Card) -> Iterator[Step]:
    rows, number = shape.batch * shape.masks, _NAMES[shape.dtype]
    across = ceil(shape.kept**2, _PLACES)
    # Distances are made once for several heads, if there are blocks enough.
    each = ceil(shape.heads, min(max(8 * card.sms // (across * rows), 1), shape.heads))
    blocks = across * rows * ceil(shape.heads, each)
    yield _step("bias", "multimask_plan", f"multimask_bias_kernel<{number}>", card, blocks)
    if not shape.training:
        return
    warps = _THREADS // _WARP
    # A head's numbers are asked for when those of the one before have been added.
    yield _step(
        "bias gradient", "multimask_plan", f"multimask_bias_backward_kernel<{number}>", card, blocks,
        shared=4 * each * warps, rounds=each,
    )  # fmt: skip
    yield _step(
        "add", "multimask_plan", "multimask_bias_sum_kernel", card, shape.heads, shared=4 * warps,
        groups=across * rows, rounds=_trips(across * rows, _THREADS),
    )  # fmt: skip


def _mask(shape: Shape, card: Card) -> Iterator[Step]:
    # Centres, sums of warps, and five bytes for each of an odd number of tokens a thread.
    shared = 4 * 4 * _THREADS + 8 * _THREADS // _WARP
    scores = 5 * (ceil(shape.tokens, _THREADS) | 1) * _THREADS
    inside = shared + scores <= 99 << 10
    name = f"multimask_draw_kernel<{'true' if inside else 'false'}>"
    shared += scores if inside else 0
    yield _step("mask", "multimask_plan", name, card, shape.batch * shape.masks, shared=shared, steps=MASK_STEPS)


def _average(shape: Shape, card: Card) -> Iterator[Step]:
    # A launch takes a hundred tensors, which is more than there are.
    blocks = sum(ceil(size, _NUMBERS) for size in shape.averaged)
    yield _step("average", "multimask_plan", "multimask_ema_kernel", card, blocks)


_OPS = {
    "multimask_targets": _targets,
    "multimask_gather": _gather,
    "multimask_scatter": _scatter,
    "multimask_loss": _loss,
    "multimask_relative_bias": _bias,
    "block_mask": _mask,
    "ema_update_": _average,
}
