"""The eager code of the paper's kind (``benchmarks/multimask_paper.py``) in the place of the operations.

The same trainer then repeats samples and targets M times, indexes by masks, copies for each norm, makes masks row by
row on the host, and takes its statistics of predictions and targets at hidden places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff import ops
from pyeff.plans import MaskPlan

from ... import multimask_paper as paper


@contextlib.contextmanager
def in_place_of_ops(wrap: Callable[[Callable], Callable] | None = None) -> Iterator[None]:
    """While it is open, what modules and recipes call in ``pyeff.ops`` is the functions of this file.

    Args:
        wrap (callable, optional): is given each of them, but masks, which are made on the host row by row; what it
            returns is called instead.
    """
    ours = {
        "multimask_gather": gather, "multimask_scatter": scatter, "multimask_targets": targets,
        "multimask_accumulate_": accumulate_, "multimask_loss": loss, "block_mask": block_mask,
        "ema_update_": ema_update_,
    }  # fmt: skip
    if wrap is not None:
        ours |= {name: wrap(function) for name, function in ours.items() if name != "block_mask"}
    before = {name: getattr(ops, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


class Plan(MaskPlan):
    """A plan that has the paper's index tensors with it, made once for a batch as the paper's code makes them."""

    paper: paper.Masks


def block_mask(
    B: int, M: int, shape: Sequence[int], *, keep: float, adjust: float, length: int, inverse: bool = True,
    seed: Any = 0, sample_ids: Any = None, lengths: Any = None, device: Any = None,
) -> MaskPlan:  # fmt: skip
    hidden = paper.block_mask(B, M, shape, keep=keep, adjust=adjust, length=length, inverse=inverse).to(device)
    masks = paper.Masks.of(hidden, max(int(hidden.shape[1] * keep), 1))
    kept = masks.keep.shape[1]
    plan = Plan(
        masks.keep.int(), torch.full((B * M,), kept, dtype=torch.int32, device=device),
        torch.where(hidden, -1, masks.restore).int(),
        torch.full((B,), hidden.shape[1], dtype=torch.int32, device=device),
    )  # fmt: skip
    plan.paper = masks
    return plan


def masks_of(plan: MaskPlan) -> paper.Masks:
    return plan.paper if isinstance(plan, Plan) else paper.Masks.of_plan(plan)


def gather(x: Tensor, plan: MaskPlan) -> Tensor:
    return paper.gather(x, plan.masks, plan.ids_keep.long())


def scatter(
    x: Tensor, plan: MaskPlan, *, fill: Tensor | None = None, noise_std: float = 0.01, seed: Any = 0,
    sample_ids: Any = None,
) -> Tensor:  # fmt: skip
    if fill is not None:
        raise ValueError("fill is a tensor, expected None: the experiment has noise alone")
    return paper.scatter(x, masks_of(plan).restore, noise_std)


def targets(
    layers: Sequence[Tensor], *, lengths: Tensor | None = None, norm: str = "instance", post_norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return paper.targets(layers, norm, post_norm)


def accumulate_(
    total: Tensor, layer: Tensor, *, weight: float, lengths: Tensor | None = None, norm: str = "instance",
    eps: float = 1e-5,
) -> None:  # fmt: skip
    total.add_(paper.targets([layer], norm, "none"), alpha=weight)


def loss(
    pred: Tensor, target: Tensor, plan: MaskPlan, *, kind: str = "l2", beta: float = 0.0, scale: float | None = None,
    reduction: str = "sum", statistics: bool = False,
) -> Any:  # fmt: skip
    if kind != "l2" or reduction != "sum":
        raise ValueError(f"kind is {kind!r} and reduction {reduction!r}, expected 'l2' and 'sum'")
    scale = pred.shape[-1] ** -0.5 if scale is None else scale
    total, x, y = paper.loss(pred, target, plan.masks, masks_of(plan).hidden, scale)
    if not statistics:
        return total
    with torch.no_grad():
        # The sums that the paper's statistics are made of, for the same watch.
        sums = [s for t in (y, x.detach()) for s in (t.sum(0), t.square().sum(0))]
        return total, torch.cat([total.new_full((1,), len(x)), *sums]).double()


def ema_update_(
    ema: Sequence[Tensor], params: Sequence[Tensor], decay: Any, *, copies: Sequence[Tensor] | None = None
) -> None:
    paper.ema_update_(list(ema), list(params), float(decay))
