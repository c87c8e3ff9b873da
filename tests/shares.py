"""Grids of cases in shares: what a run of CI leaves to the turns of other commits; see scripts/turn.py.

A test of an operation with many parameters is a grid. In a turn of CI it runs a share of its cases at each place (see
``places``), never none; without PYEFF_TURN it runs all of them. A test joins by having many cases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")

# One case in so many: of three or more where a GPU's kernels are emulated, of eight or more elsewhere.
EMULATED, ELSEWHERE = 3, 2
_MANY = 8


def shares(cases: int, emulated: bool) -> int:
    """In how many shares a grid of this size is divided."""
    if emulated:
        return EMULATED if cases >= EMULATED else 1
    return ELSEWHERE if cases >= _MANY else 1


def share_of(i: int, count: int) -> int:
    """The share that case ``i`` belongs to: of ``count`` neighbours one in each, and not always the same parameter's.

    The sum of the digits in base ``count``, so that the inner parameters of a grid take turns within a share.
    """
    total = 0
    while i:
        i, digit = divmod(i, count)
        total += digit
    return total % count


def left_to_others(
    items: Iterable[Item], grid: Callable[[Item], Hashable], turn: int | None, emulated: bool
) -> list[Item]:
    """The cases that do not run in this turn; ``grid`` says which ones belong together, None which one always runs."""
    if turn is None:
        return []
    grids: dict[Hashable, list[Item]] = {}
    for item in items:
        if (name := grid(item)) is not None:
            grids.setdefault(name, []).append(item)
    left = []
    for cases in grids.values():
        count = shares(len(cases), emulated)
        left += [case for i, case in enumerate(cases) if share_of(i, count) != turn % count] if count > 1 else []
    return left
