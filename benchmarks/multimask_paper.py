"""The eager code path of data2vec 2.0, written from its description: what a program does without these ops.

Features and targets are repeated M times, then gathered or indexed by a mask; each norm works on a float32 copy; masks
are made row by row on the host; noise is drawn for all hidden tokens and put in place by a gather; parameters are
averaged by torch's own functions for many tensors. Nothing is slower than it has to be in that form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import MaskPlan


@dataclass
class Masks:
    """Masks as such a program has them.

    Args:
        hidden (Tensor): [R, T] bool.
        keep (Tensor): [R, K] int64, the kept tokens.
        restore (Tensor): [R, T] int64, for each token its place among the kept ones with the hidden ones behind them.
    """

    hidden: Tensor
    keep: Tensor
    restore: Tensor

    @staticmethod
    def of(hidden: Tensor, kept: int) -> Masks:
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        return Masks(hidden, order[:, :kept].contiguous(), order.argsort(1))

    @staticmethod
    def of_plan(plan: MaskPlan) -> Masks:
        return Masks.of(plan.hidden().flatten(0, 1), plan.width)


def block_mask(
    batch: int, masks: int, shape: Sequence[int], *, keep: float, adjust: float, length: int, inverse: bool
) -> Tensor:
    """[R, T] bool, True = hidden: blocks around random centres, then row by row the right number."""
    rows, tokens = batch * masks, shape[0] * (shape[1] if len(shape) == 2 else 1)
    kept = int(tokens * keep)
    wanted = kept if inverse else tokens - kept
    share = (keep if inverse else 1 - keep) + adjust
    drawn = torch.zeros(rows, tokens, dtype=torch.bool)
    centres = torch.randint(0, tokens, (rows, max(int(tokens * share / length ** len(shape)), 0)))
    steps = torch.arange(length) - length // 2
    if len(shape) == 2:
        y = (centres[..., None, None] // shape[1] + steps[:, None]).clamp(0, shape[0] - 1)
        x = (centres[..., None, None] % shape[1] + steps).clamp(0, shape[1] - 1)
        places = (y * shape[1] + x).flatten(1)
    else:
        places = (centres[..., None] + steps).clamp(0, tokens - 1).flatten(1)
    drawn.scatter_(1, places, True)
    for row in drawn:
        missing = wanted - int(row.sum().item())
        if missing:
            among = (row if missing < 0 else ~row).nonzero().flatten()
            row[among[torch.randperm(len(among))[: abs(missing)]]] = missing > 0
    return ~drawn if inverse else drawn


def gather(x: Tensor, masks: int, keep: Tensor) -> Tensor:
    x = x.repeat_interleave(masks, 0)
    return torch.gather(x, 1, keep[..., None].expand(-1, -1, x.shape[-1]))


def scatter(x: Tensor, restore: Tensor, std: float) -> Tensor:
    rows, kept, width = x.shape
    noise = x.new_empty(rows, restore.shape[1] - kept, width).normal_(0, std)
    return torch.gather(torch.cat([x, noise], 1), 1, restore[..., None].expand(-1, -1, width))


def targets(layers: Sequence[Tensor], norm: str, post_norm: str) -> Tensor:
    total = _norm(layers[0], norm)
    for layer in layers[1:]:
        total = total + _norm(layer, norm)
    return _norm(total / len(layers), post_norm)


def _norm(y: Tensor, norm: str) -> Tensor:
    if norm == "instance":
        return F.instance_norm(y.float().transpose(1, 2)).transpose(1, 2)
    return F.layer_norm(y.float(), y.shape[-1:]) if norm == "layer" else y.float()


def loss(pred: Tensor, target: Tensor, masks: int, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over hidden elements; predictions and targets at hidden tokens."""
    y = target.repeat_interleave(masks, 0)[hidden].float()
    x = pred[hidden].float()
    return F.mse_loss(x, y, reduction="none").mul(scale).sum(), x, y


def spread(y: Tensor) -> Tensor:
    """mean_d sqrt(var_d + 1e-6) of [N, D], by sums, as several processes would add them up."""
    count, total, squares = len(y), y.sum(0), y.square().sum(0)
    return (squares / (count - 1) - total.square() / (count * (count - 1)) + 1e-6).sqrt().mean()


def relative_bias(slopes: Tensor, scale: Tensor, batch: int, masks: int, keep: Tensor, tokens: int) -> Tensor:
    """The whole bias [H, T, T] for each student, then its rows, then its columns."""
    at = torch.arange(tokens, dtype=slopes.dtype, device=slopes.device)
    whole = -(slopes * scale)[:, None, None] * (at[:, None] - at).abs()
    whole = whole.expand(batch, -1, -1, -1).repeat_interleave(masks, 0)
    heads, index = len(slopes), keep[:, None, :, None]
    some = torch.gather(whole, 2, index.expand(-1, heads, -1, tokens))
    return torch.gather(some, 3, index.mT.expand(-1, heads, keep.shape[1], -1))


def ema_update_(ema: list[Tensor], params: list[Tensor], decay: float) -> None:
    """In float32, whatever the parameters are."""
    with torch.no_grad():
        wide = [p.float() for p in params]
        torch._foreach_mul_(ema, decay)
        torch._foreach_add_(ema, wide, alpha=1 - decay)
