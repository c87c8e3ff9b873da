"""Units put into groups of one size, so that what is worth much shares blocks.

A unit (a neuron, a head) has a profile: what it adds to each block in which it would take part. The worth of a block
is the sum over its units, and the best share of all blocks is kept. With M the kept blocks of each group as zeros and
ones, what is retained is ``sum_groups sum_units profile . M``: so we choose M for the groups at hand, then move units
to where they gain most, and so on. Neither step loses anything, and it ends where nothing gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 12
SWEEPS = 200


def kept(profile: Tensor, groups: Tensor, count: int, density: float) -> Tensor:
    """[groups, K] bool: the best ``density`` of all blocks."""
    worth = torch.zeros(count, profile.shape[1], dtype=profile.dtype).index_add_(0, groups, profile)
    take = round(density * worth.numel())
    out = torch.zeros(worth.numel(), dtype=torch.bool)
    out[torch.argsort(worth.flatten(), descending=True, stable=True)[:take]] = True
    return out.view_as(worth)


def retained(profile: Tensor, groups: Tensor, count: int, density: float) -> float:
    """The share of all worth that lies in the best ``density`` of all blocks."""
    whole = float(profile.sum())
    blocks = kept(profile, groups, count, density).to(profile.dtype)
    return float((profile * blocks[groups]).sum()) / whole if whole else 1.0


def order(profile: Tensor, size: int, density: float) -> tuple[Tensor, float, float]:
    """An order of the units in which consecutive ``size`` of them make good blocks.

    Args:
        profile (Tensor): [units, K], not negative: what each unit adds to each of its K blocks.
        size (int): units of a group; it divides their number.
        density (float): the share of all blocks that will be kept.

    Returns:
        (Tensor, float, float): the order, int64 [units]; the retained share before and after. Never worse than before:
        then the order is the one at hand.
    """
    profile = profile.double().cpu()
    units = len(profile)
    count = units // size
    at_hand = torch.arange(units) // size
    before = retained(profile, at_hand, count, density)
    best, after = at_hand, before
    for start in (at_hand, _by_principal_components(profile, size)):
        groups = start
        for _ in range(ROUNDS):
            moved = _exchange(profile, groups, kept(profile, groups, count, density).to(profile.dtype), size)
            if torch.equal(moved, groups):
                break
            groups = moved
        found = retained(profile, groups, count, density)
        if found > after * (1 + 1e-9):
            best, after = groups, found
    return torch.argsort(best, stable=True), before, after


def _exchange(profile: Tensor, groups: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Swaps units between groups as long as two of them gain by it, with the kept blocks as they are."""
    count, groups = len(blocks), groups.clone()
    gain = profile @ blocks.T  # [units, groups]: what a unit retains in each group
    for _ in range(SWEEPS):
        members = torch.argsort(groups, stable=True).view(count, size)
        better = gain[members] - gain[members, torch.arange(count)[:, None]][..., None]  # [group, member, other group]
        most, who = better.max(1)
        both = (most + most.T).triu(1)
        # Every group swaps at most once in a sweep, the pairs that gain most first.
        values, flat = both.flatten().sort(descending=True, stable=True)
        flat = flat[values > 1e-12 * float(profile.sum())]
        if not len(flat):
            break
        free = [True] * count
        for pair in flat[: 8 * count].tolist():
            a, b = divmod(pair, count)
            if free[a] and free[b]:
                free[a] = free[b] = False
                groups[members[a, who[a, b]]], groups[members[b, who[b, a]]] = b, a
    return groups


def _by_principal_components(profile: Tensor, size: int) -> Tensor:
    """Groups of alike profiles: halved along the direction in which they differ most, again and again."""
    shape = profile / profile.sum(1, keepdim=True).clamp(min=torch.finfo(profile.dtype).tiny)
    groups, waiting, number = torch.zeros(len(profile), dtype=torch.long), [torch.arange(len(profile))], 0
    while waiting:
        units = waiting.pop()
        if len(units) == size:
            groups[units], number = number, number + 1
            continue
        centred = shape[units] - shape[units].mean(0)
        direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        direction = direction * torch.sign(direction[direction.abs().argmax()])
        units = units[torch.argsort(centred @ direction, stable=True)]
        half = (len(units) // size + 1) // 2 * size
        waiting += [units[half:], units[:half]]
    return groups
