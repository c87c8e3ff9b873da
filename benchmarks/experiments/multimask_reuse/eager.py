"""The way of data2vec 2.0's code: what is repeated, indexed, converted and copied there is so here.

Rewritten from the paper and its code: samples and targets repeated M times, boolean indexing, float32 copies for each
norm, masks row by row with a look from the host, two statistics of all hidden places, a loop over parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import ops
from pyeff.plans import MaskPlan


@contextlib.contextmanager
def in_place_of_ops() -> Iterator[None]:
    """While it is open, what modules and recipes call in ``pyeff.ops`` is the functions of this file."""
    ours = {
        "multimask_gather": gather, "multimask_scatter": scatter, "multimask_targets": targets,
        "multimask_accumulate_": accumulate_, "multimask_loss": loss, "block_mask": block_mask,
        "ema_update_": ema_update_,
    }  # fmt: skip
    before = {name: getattr(ops, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def gather(x: Tensor, plan: MaskPlan) -> Tensor:
    x = x.repeat_interleave(plan.masks, 0)
    return torch.gather(x, 1, plan.ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))


def scatter(
    x: Tensor, plan: MaskPlan, *, fill: Tensor | None = None, noise_std: float = 0.01, seed: Any = 0,
    sample_ids: Any = None,
) -> Tensor:  # fmt: skip
    if fill is not None:
        raise ValueError("fill is a tensor, expected None: the experiment has noise alone")
    rows, width = x.shape[0], x.shape[-1]
    noise = x.new_empty(rows, plan.tokens - plan.width, width).normal_(0, noise_std)
    restore = _restore(plan)
    return torch.gather(torch.cat([x, noise], 1), 1, restore[..., None].expand(-1, -1, width))


def _restore(plan: MaskPlan) -> Tensor:
    """Where each token is among the kept ones, and behind them the hidden ones. All rows are full here."""
    hidden = plan.inverse < 0
    return torch.where(hidden, plan.width + hidden.cumsum(1) - 1, plan.inverse).long()


def targets(
    layers: Sequence[Tensor], *, lengths: Tensor | None = None, norm: str = "instance", post_norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    normed = [_norm(layer.float(), norm, eps) for layer in layers]
    mean = normed[0].clone()
    for layer in normed[1:]:
        mean.add_(layer)
    return _norm(mean.div_(len(normed)), post_norm, eps)


def accumulate_(
    total: Tensor, layer: Tensor, *, weight: float, lengths: Tensor | None = None, norm: str = "instance",
    eps: float = 1e-5,
) -> None:  # fmt: skip
    total.add_(_norm(layer.float(), norm, eps), alpha=weight)


def _norm(y: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "instance":
        return F.instance_norm(y.transpose(1, 2), eps=eps).transpose(1, 2)
    return F.layer_norm(y, y.shape[-1:], eps=eps) if norm == "layer" else y


def loss(
    pred: Tensor, target: Tensor, plan: MaskPlan, *, kind: str = "l2", beta: float = 0.0, scale: float | None = None,
    reduction: str = "sum", statistics: bool = False,
) -> Any:  # fmt: skip
    if kind != "l2" or reduction != "sum":
        raise ValueError(f"kind is {kind!r} and reduction {reduction!r}, expected 'l2' and 'sum'")
    hidden = plan.hidden().flatten(0, 1)
    x = pred[hidden].float()
    y = target.repeat_interleave(plan.masks, 0)[hidden]
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    total = (F.mse_loss(x, y, reduction="none") * scale).sum()
    if not statistics:
        return total
    with torch.no_grad():
        # In float64 for the same watch; data2vec's code has sums in float32 of the same sizes.
        sums = [s for t in (y.double(), x.double()) for s in (t.sum(0), t.square().sum(0))]
        return total, torch.cat([hidden.sum().double()[None], *sums])


def block_mask(
    B: int, M: int, shape: Sequence[int], *, keep: float, adjust: float, length: int, inverse: bool = True,
    seed: Any = 0, sample_ids: Any = None, lengths: Any = None, device: Any = None,
) -> MaskPlan:  # fmt: skip
    height, width = (1, shape[0]) if len(shape) == 1 else shape
    tokens, rows = height * width, B * M
    share = keep if inverse else 1 - keep
    count = max(int(tokens * (share + adjust) / length ** len(shape)), 1)
    marked = torch.zeros(rows, height, width, device=device)
    centres = torch.randint(0, tokens, (rows, count), device=device)
    marked.view(rows, -1).scatter_(1, centres, 1)
    sides = [1 if len(shape) == 1 else length, length]
    marked = F.conv_transpose2d(
        marked[:, None], torch.ones(1, 1, *sides, device=device), padding=[(s - 1) // 2 for s in sides]
    )
    mask = marked[:, 0, :height, :width].reshape(rows, -1) > 0
    wanted = int(tokens * keep) if inverse else tokens - int(tokens * keep)
    for row in mask:
        n = int(row.sum().item())
        if n > wanted:
            on = row.nonzero().squeeze(-1)
            row[on[torch.randperm(n, device=device)[: n - wanted]]] = False
        elif n < wanted:
            off = (~row).nonzero().squeeze(-1)
            row[off[torch.randperm(len(off), device=device)[: wanted - n]]] = True
    hidden = ~mask if inverse else mask
    return MaskPlan.from_mask(hidden.view(B, M, tokens), width=max(int(tokens * keep), 1))


@torch.no_grad()
def ema_update_(
    ema: Sequence[Tensor], params: Sequence[Tensor], decay: Any, *, copies: Sequence[Tensor] | None = None
) -> None:
    d = float(decay)
    for average, parameter in zip(ema, params, strict=True):
        average.mul_(d)
        average.add_(parameter.to(average.dtype), alpha=1 - d)
