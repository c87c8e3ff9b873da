"""The optimizer's part of a step: groups, rates, and gradients of what several batches and processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes._multimask_settings import Settings


def adamw(named: Sequence[tuple[str, nn.Parameter]], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay for matrices only."""
    device = named[0][1].device
    rest: dict[str, Any] = {
        "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": device.type in ("cpu", "cuda"),
    }  # fmt: skip
    if device.type == "cuda":
        # A number on the device may change between replays of a graph.
        rest["lr"] = torch.tensor(settings.lr, device=device)
    decayed = [p for _, p in named if p.dim() > 1]
    plain = [p for _, p in named if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], **rest)


class Rates:
    """The learning rate of each group of an optimizer, times a factor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.base = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, factor: float) -> float:
        """Sets them; that of the first group."""
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        return self.base[0] * factor


@torch.no_grad()
def scale_and_clip(parameters: Sequence[nn.Parameter], factor: Tensor | None, limit: float | None) -> Tensor:
    """Multiplies all gradients by a factor, and by another one where their norm would pass a limit; in one pass.

    Args:
        parameters (sequence of Parameter): those without a gradient are left out.
        factor (Tensor, optional): a number on their device.
        limit (float, optional): of the norm of all gradients, after the factor.

    Returns:
        Tensor: that norm, before it was limited; nothing has been waited for.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if factor is not None:
        factor = factor.to(norm.dtype)
        norm = norm * factor
    if limit is not None:
        shrink = (limit / (norm + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    return norm
