"""What survives: schedules, ranking of elements and blocks, and the projection of a mask to blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from pyeff.plans import Ticket
from pyeff.plans.ticket import _to_blocks

SCHEDULES = ("imp", "cubic", "one_shot")
SCOPES = ("global", "scaled", "layer")


def densities(density: float, schedule: str, rounds: int | None) -> list[float]:
    """The density after each round, the last of them ``density``.

    Args:
        density (float): the share that is to survive, 0 to 1.
        schedule (str): ``"imp"`` takes the same share of the original weights in every round, ``"cubic"`` much at first
            and little at the end (``s (1 - (1 - t)^3)``, Zhu and Gupta 2017), ``"one_shot"`` all at once.
        rounds (int, optional): how many. Default: as many as take at most a tenth of the weights each by ``"imp"``.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 <= density <= 1:
        raise ValueError(f"prune: density is {density!r}, expected a number from 0 to 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"prune: schedule is {schedule!r}, expected one of {', '.join(map(repr, SCHEDULES))}")
    if rounds is not None and (not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1):
        raise ValueError(f"prune: rounds is {rounds!r}, expected an integer of at least 1 or None")
    if schedule == "one_shot":
        if rounds not in (None, 1):
            raise ValueError(f"prune: rounds is {rounds} with schedule 'one_shot', expected None or 1")
        return [float(density)]
    sparsity = 1.0 - density
    # A tenth a round; the small number forgives what 1 - density is off by.
    count = max(math.ceil(10 * sparsity - 1e-9), 1) if rounds is None else rounds
    shares = [(i + 1) / count for i in range(count)]
    if schedule == "cubic":
        shares = [1 - (1 - share) ** 3 for share in shares]
    return [1.0 - sparsity * share for share in shares[:-1]] + [float(density)]


def check(scope: str, floor: float, density: float) -> None:
    """Raises ValueError for an unknown scope, and where ``floor`` is not from 0 to ``density``."""
    if scope not in SCOPES:
        raise ValueError(f"prune: scope is {scope!r}, expected one of {', '.join(map(repr, SCOPES))}")
    if not isinstance(floor, (int, float)) or isinstance(floor, bool) or not 0 <= floor <= density:
        raise ValueError(f"prune: floor is {floor!r}, expected a number from 0 to the density {density:g}")


def _keep(scores: Tensor, sizes: Tensor, allowed: Tensor, budget: float) -> Tensor:
    """The best of a list whose sizes come nearest to a budget: bool, never where not ``allowed``. Ties: the first."""
    # Only these are ranked at all: no score is so low that it could stand for "not allowed".
    scores, sizes = scores[allowed], sizes[allowed]
    if bool((sizes == 1).all()):
        best = _largest(scores, min(max(math.ceil(budget + 0.5) - 1, 0), len(scores)))
    else:
        order = torch.argsort(scores, descending=True, stable=True)
        size = sizes[order].double()
        best = torch.zeros_like(scores, dtype=torch.bool)
        best[order] = size.cumsum(0) - size / 2 < budget
    return torch.zeros_like(allowed).masked_scatter_(allowed, best)


def _largest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest of many numbers, without sorting them; ties: the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = torch.kthvalue(scores, scores.numel() - count + 1).values
    keep = scores > least
    ties = (scores == least).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep


def choose(
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    density: float,
    scope: str,
    allowed: Mapping[str, Tensor] | None = None,
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """The best units of some layers that make up ``density`` of their elements.

    Args:
        scores (mapping): by layer, what an element of each unit is worth, of any shape.
        sizes (mapping): by layer, how many elements each unit has, of the same shapes.
        density (float): of all elements.
        scope (str): ``"global"`` ranks the units of all layers together, ``"scaled"`` too but over the mean worth of
            what lives in their layer, ``"layer"`` those of each layer by themselves.
        allowed (mapping, optional): by layer, the units that may survive.
        floor (float): the share of every layer's elements that survives in any case, its best.

    Returns:
        dict of Tensor: bool, of the same shapes, on the same devices.

    Raises:
        ValueError: an unknown scope, or ``floor`` is not from 0 to ``density``.
    """
    check(scope, floor, density)
    flat = {}
    for name, score in scores.items():
        units = torch.ones_like(score, dtype=torch.bool) if allowed is None else allowed[name]
        score, size, units = score.flatten().cpu(), sizes[name].flatten().cpu(), units.flatten().cpu()
        if scope == "scaled":
            mean = (score * size)[units].sum(dtype=torch.float64) / size[units].sum()
            score = score / max(float(mean), torch.finfo(torch.float32).tiny) if bool(units.any()) else score
        if floor:
            best = _keep(score, size, units, budget=floor * float(size.sum(dtype=torch.float64)))
            score = score.masked_fill(best, math.inf)
        flat[name] = (score, size, units)
    groups = [[name] for name in scores] if scope == "layer" else [list(scores)]
    chosen: dict[str, Tensor] = {}
    for names in groups:
        score, size, units = (torch.cat(parts) for parts in zip(*(flat[name] for name in names), strict=True))
        kept = _keep(score, size, units, budget=density * float(size.sum(dtype=torch.float64)))
        for name, part in zip(names, kept.split([scores[name].numel() for name in names]), strict=True):
            chosen[name] = part.view(scores[name].shape).to(scores[name].device)
    return {name: chosen[name] for name in scores}


def block_sums(values: Tensor, block: Sequence[int]) -> Tensor:
    """[out, in] -> [R, C]: the sum of each block."""
    return _to_blocks(values, (block[0], block[1])).sum((-2, -1))


def block_sizes(shape: Sequence[int], block: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[R, C]: how many elements of the weight each block has; fewer at its end."""
    sides = []
    for length, side in zip(shape, block, strict=True):
        count = -(-length // side)
        sides.append((length - torch.arange(count, device=device) * side).clamp(max=side))
    return sides[0][:, None] * sides[1]


def block_means(values: Tensor, block: Sequence[int]) -> Tensor:
    """[R, C]: the mean of each block over the elements that the weight has there; the criterion of block IMP."""
    return block_sums(values, block) / block_sizes(values.shape, block, values.device)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A mask of elements as a mask of blocks: what :func:`project` returns for one layer.

    Args:
        ticket (Ticket): the blocks that are kept.
        values (Tensor): [nnz, bo, bi]: the given weight in them, also where the mask was False.
        density (float): of the ticket.
        survivors (float): the share of the mask's own magnitude that lies in kept blocks.
        retained (float): the share of the whole weight's magnitude that lies in kept blocks.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> weight = torch.randn(32, 32)
        >>> found = ticket.project(weight.abs() > 0.7, weight, block=8)
        >>> isinstance(found, ticket.Projection), 0 < found.survivors < 1
        (True, True)
    """

    ticket: Ticket
    values: Tensor
    density: float
    survivors: float
    retained: float


@overload
def project(
    mask: Tensor, weight: Tensor, block: int | Sequence[int], *, density: float | None = None, scope: str = "global",
    floor: float = 0.0,
) -> Projection: ...  # fmt: skip


@overload
def project(
    mask: Mapping[str, Tensor], weight: Mapping[str, Tensor], block: int | Sequence[int], *,
    density: float | None = None, scope: str = "global", floor: float = 0.0,
) -> dict[str, Projection]: ...  # fmt: skip


def project(mask, weight, block, *, density=None, scope="global", floor=0.0):
    """An unstructured ticket as one of blocks: those in which most magnitude survives, filled with the given weight.

    At 70% sparsity no 32 x 32 block of an unstructured ticket is empty, so that "any survivor" would keep all of them.

    Args:
        mask (Tensor or mapping of Tensor): [out, in] bool, True for what survives; for several layers by name.
        weight (Tensor or mapping of Tensor): [out, in], the weights before pruning, of the same layers.
        block (int or (int, int)): (bo, bi), or one number for both.
        density (float, optional): the share of the elements that is kept. Default: that of the mask.
        scope (str): ``"global"`` ranks the blocks of all layers together, ``"scaled"`` too but over the mean of their
            layer, ``"layer"`` those of each by themselves.
        floor (float): the share of every layer that survives in any case.

    Returns:
        Projection, or dict of Projection: the ticket, its values, and what of the magnitude was retained.

    Raises:
        ValueError: masks and weights do not fit each other, or an option is out of its range.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> weight = torch.randn(64, 32)
        >>> found = ticket.project(weight.abs() > 1, weight, block=8, density=0.25)
        >>> found.ticket.nnz, found.values.shape
        (8, torch.Size([8, 8, 8]))
    """
    single = isinstance(mask, Tensor)
    masks, weights = ({"": mask}, {"": weight}) if single else (mask, weight)
    if set(masks) - set(weights) or not masks:
        raise ValueError(f"project: mask has {sorted(set(masks) - set(weights))}, expected layers that weight has too")
    for name, m in masks.items():
        label = f" of {name}" if name else ""
        if not isinstance(m, Tensor) or m.dtype != torch.bool or m.dim() != 2:
            came = f"{m.dtype} {list(m.shape)}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
            raise ValueError(f"project: mask{label} is {came}, expected a bool tensor [out, in]")
        if tuple(weights[name].shape) != tuple(m.shape):
            raise ValueError(
                f"project: weight{label} has shape {list(weights[name].shape)}, expected {list(m.shape)} as mask"
            )
    if density is None:
        density = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    densities(density, "one_shot", None)
    block = pair(block)
    magnitude = {name: weights[name].detach().float().abs() for name in masks}
    for name, worth in magnitude.items():
        if not bool(worth.isfinite().all()):
            label = f" of {name}" if name else ""
            raise ValueError(f"project: weight{label} has NaN or infinity, expected finite numbers")
    scores = {name: block_means(magnitude[name] * m, block) for name, m in masks.items()}
    sizes = {name: block_sizes(m.shape, block, m.device) for name, m in masks.items()}
    found = {}
    for name, blocks in choose(scores, sizes, density, scope, floor=floor).items():
        ticket = Ticket.from_blocks(blocks, masks[name].shape, block)
        own, every = block_sums(magnitude[name] * masks[name], block), block_sums(magnitude[name], block)
        found[name] = Projection(
            ticket, ticket.gather(weights[name].detach()), ticket.density, _share(own, blocks), _share(every, blocks)
        )
    return found[""] if single else found


def _share(sums: Tensor, blocks: Tensor) -> float:
    whole = float(sums.sum(dtype=torch.float64))
    return float(sums[blocks].sum(dtype=torch.float64)) / whole if whole else 1.0


def retained(weight: Tensor, ticket: Ticket) -> float:
    """The share of a weight's magnitude that lies in a ticket's blocks."""
    return _share(block_sums(weight.detach().float().abs(), ticket.block), ticket.blocks().to(weight.device))


def pair(block: int | Sequence[int]) -> tuple[int, int]:
    """(bo, bi).

    Raises:
        ValueError: it is none.
    """
    from pyeff.plans.ticket import _block

    try:
        return _block(block)
    except ValueError as error:
        raise ValueError(str(error).replace("Ticket: ", "block: ", 1)) from None
