"""Which kernels the multimask family launches for a call, for ``multimask_model``.

Triton's launches are those that kernels/multimask.py makes, recorded with tensors that have no memory. What a kernel
takes of an SM is in the committed table of the resource report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from . import multimask_model
from .gpus import Card
from .multimask_model import Shape, Step
from .plans import Family, NoPlan, arguments, recorded, resources

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
    if backend != "triton":
        raise NoPlan("nobody has written down the launches of csrc/cuda/multimask*")
    return list(_triton(shape, card))


_KERNELS = {
    "sum_rows": "sum",
    "scatter": "scatter",
    "whole": "targets",
    "rows": "layer norm",
    "distance": "loss",
    "finish": "finish",
    "relative_bias": "bias",
    "relative_bias_backward": "bias",
    "add": "add",
    "block_mask": "mask",
    "ema_update": "average",
}


def _triton(shape: Shape, card: Card) -> Iterator[Step]:
    for launch in _recorded(shape, card):
        given, name = arguments(launch), launch.kernel.__name__
        _, resident, _ = resources(launch.config.name, card)
        kernel = _KERNELS.get(name) or ("gather from rows" if given["masks"] == 1 else "gather")
        groups = int(given.get("groups") or given.get("parts") or 1) if name in ("finish", "add") else 1
        moments = given.get("moments") is not None
        if name == "distance" and moments:
            groups = int(given["moments"].shape[0])
        yield Step(kernel, math.prod(launch.grid), resident, groups, moments)


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
            post = 2 if shape.name == "image" else 0
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
            # The tensors of a vision transformer: twelve blocks of twelve million numbers, roughly.
            tensors = [empty(n, kind=wide) for n in (d * d * 4, d * d * 3, d * d * 4, d * d, d) * 12]
            family.ema_update(tensors, tensors, empty(1, kind=torch.float64), [])
    return launches


def _family(op: str) -> Family:
    return Family(
        op, "docs/multimask.md", lambda: shapes(op), plan, multimask_model.predict, multimask_model.floor_seconds,
        multimask_model.notes,
    )  # fmt: skip


FAMILIES = {op: _family(op) for op in _OPS}
