"""Which kernels the multimask family launches for a call, for ``multimask_model``.

Triton's launches are those that kernels/multimask.py makes, recorded with tensors that have no memory; those of CUDA
C++ are in ``multimask_cuda_plan``. What a kernel takes of an SM is in the committed tables of the resource report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from . import multimask_cuda_plan, multimask_model
from .gpus import Card
from .multimask_model import Shape, Step
from .plans import Family, arguments, ceil, recorded, resources

# Name: B, T, M, K, kept tokens of a row; the settings that the operations are measured at.
SETTINGS = {"image": (8, 196, 16, 10, 39), "audio": (2, 1000, 8, 8, 500), "text": (4, 512, 8, 12, 266)}
# Each, and whether it has a backward pass of its own.
_OPS = {
    "multimask_targets": False,
    "multimask_gather": True,
    "multimask_scatter": True,
    "multimask_loss": False,
    "multimask_relative_bias": True,
    "block_mask": False,
    "ema_update_": False,
}


def shapes(op: str) -> Iterator[Shape]:
    """The calls that are predicted."""
    for training in (False, True)[: 1 + _OPS[op]]:
        for name, numbers in SETTINGS.items():
            # One model is averaged whatever it is trained on, and distances are for sound.
            only = {"ema_update_": "image", "multimask_relative_bias": "audio"}.get(op, name)
            if name == only:
                yield Shape(op, name, *numbers, training=training)


def plan(backend: str, shape: Shape, card: Card) -> list[Step]:
    """The launches of a call.

    Raises:
        NoPlan: this machine cannot tell, or the resource table has no such kernel.
    """
    return list(_triton(shape, card)) if backend == "triton" else multimask_cuda_plan.steps(shape, card)


_KERNELS = {
    "sum_rows": "sum",
    "scatter": "scatter",
    "whole": "targets",
    "rows": "layer norm",
    "distance": "loss",
    "finish": "finish",
    "relative_bias": "bias",
    "relative_bias_backward": "bias gradient",
    "add": "add",
    "block_mask": "mask",
    "ema_update": "average",
}


def _triton(shape: Shape, card: Card) -> Iterator[Step]:
    for launch in _recorded(shape, card):
        given, name = arguments(launch), launch.kernel.__name__
        threads, resident, _ = resources(launch.config.name, card)
        kernel = _KERNELS.get(name) or ("gather from rows" if given["masks"] == 1 else "gather")
        groups = int(given.get("groups") or given.get("parts") or 1) if name in ("finish", "add") else 1
        moments = given.get("moments") is not None
        if name == "distance" and moments:
            groups = int(given["moments"].shape[0])
        blocks, shared = math.prod(launch.grid), 0.0
        if kernel == "targets":
            # A tile stays in registers. Sums of its numbers, of what their mean leaves of them, and of its squares.
            columns = int(given["BLOCK_C"]) * shape.s // 16
            shared = multimask_model.in_shared(shape, blocks, threads, columns, sums=3, passes=2)
        steps = {"targets": 8 * shape.layers, "layer norm": 8, "mask": multimask_model.MASK_STEPS}.get(kernel, 0)
        yield Step(kernel, blocks, resident, groups, moments, _rounds(name, given, shape), steps, shared)


def _rounds(name: str, given: dict[str, Any], shape: Shape) -> int:
    """How often a program waits for its loads after the first ones: as often as its loop goes round."""
    if name == "sum_rows":
        return multimask_model.waits_of_sum(shape)
    if name == "distance":
        # Tile after tile a program goes through the masks, and waits for indices and then for what they say.
        return int(given["each"]) * ceil(shape.masks, int(given["AHEAD"])) * 2
    if name == "relative_bias_backward":
        return int(given["each"])
    if name in ("finish", "add"):
        return ceil(int(given.get("groups") or given["parts"]), int(given.get("BLOCK_G") or given["BLOCK_P"]))
    return 0


def _recorded(shape: Shape, card: Card) -> list[Any]:
    """The launches of kernels/multimask.py for this call, as on the card."""
    import torch
    from torch import Tensor

    b, t, m, k, d = shape.batch, shape.tokens, shape.masks, shape.kept, shape.width
    rows, half, wide, index = b * m, getattr(torch, shape.dtype), torch.float32, torch.int32

    def empty(*sizes: int, kind: torch.dtype = half) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    ids, counts, inverse = empty(rows, k, kind=index), empty(rows, kind=index), empty(rows, t, kind=index)
    lengths, seed, none = empty(b, kind=index), empty(1, kind=torch.int64), empty(0)
    x, kept, large, target = empty(b, t, d), empty(rows, k, d), empty(rows, t, d), empty(b, t, d, kind=wide)
    with recorded("multimask", card) as (family, launches):
        if shape.op == "multimask_targets":
            post = 2 if shape.post_norm else 0
            family.targets([x] * shape.layers, lengths, 1, post, 1e-5, 1 / shape.layers, False, target)
        elif shape.op == "multimask_gather":
            family.gather(x, ids, counts, kept)
            if shape.training:
                family.gather_backward(kept, inverse, x)
        elif shape.op == "multimask_scatter":
            family.scatter(kept, inverse, lengths, None, seed, None, 0.01, large)
            if shape.training:
                family.scatter_backward(large, ids, counts, inverse, lengths, kept, none)
        elif shape.op == "multimask_loss":
            number, moments = empty(kind=wide), empty(1 + 4 * d, kind=torch.float64)
            family.loss(large, target, inverse, lengths, None, 0, 0.0, 1.0, number, large, moments)
        elif shape.op == "multimask_relative_bias":
            bias, slopes = empty(rows, shape.heads, k, k), empty(shape.heads, kind=wide)
            family.relative_bias(ids, counts, slopes, 0, bias)
            if shape.training:
                family.relative_bias_backward(bias, ids, counts, 0, slopes)
        elif shape.op == "block_mask":
            grid = 14 if shape.name == "image" else 0
            family.block_mask(seed, None, lengths, m, grid, k / t, 0.03, 3, True, ids, counts, inverse)
        else:
            tensors = [empty(n, kind=wide) for n in shape.averaged]
            family.ema_update(tensors, tensors, empty(1, kind=torch.float64), [])
    return launches


def _family(op: str) -> Family:
    return Family(
        op, "docs/multimask.md", lambda: shapes(op), plan, multimask_model.predict, multimask_model.floor_seconds,
        multimask_model.notes,
    )  # fmt: skip


FAMILIES = {op: _family(op) for op in _OPS}
