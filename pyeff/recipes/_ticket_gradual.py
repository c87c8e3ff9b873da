"""Pruning in the course of one training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes._ticket_install import install, select
from pyeff.recipes._ticket_select import check, densities, pair
from pyeff.recipes._ticket_targets import targets


class Gradual:
    """Prunes a model step by step while it trains, without rewinding; moments of what survives are carried over.

    From ``begin`` to ``end`` the sparsity grows as ``s (1 - (1 - t)^3)`` (Zhu and Gupta, 2017, arXiv 1710.01878): much
    at first, when much can be spared, and little at the end.

    Args:
        model (Module): in training; its linear layers become tickets.
        optimizers (Optimizer or iterable of Optimizer): those that train it.
        density (float): the share of the elements that is left at the end.
        begin (int), end (int): the steps of the first and of the last pruning.
        every (int): steps between two of them.
        block (int or (int, int)): (bo, bi), or one number for both.
        scope (str), floor (float), score (callable), include, exclude, stack: as of :func:`prune`.
        schedule (str): ``"cubic"``, or ``"imp"`` for the same share each time.

    Raises:
        ValueError: an option is unknown or out of its range, or no layer is left to prune.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> gradual = ticket.Gradual(model, optimizer, density=0.25, begin=2, end=8, every=2, block=8)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = gradual.step()
        >>> sum(t.nnz for t in ticket.tickets(model).values())
        4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        density: float = 0.3,
        begin: int = 0,
        end: int,
        every: int = 1,
        block: int | Sequence[int] = 32,
        scope: str = "global",
        floor: float = 0.0,
        schedule: str = "cubic",
        score: Callable[[str, Any], Tensor] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    ) -> None:
        for name, value, least in (("begin", begin, 0), ("end", end, begin), ("every", every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Gradual: {name} is {value!r}, expected an integer of at least {least}")
        if schedule == "one_shot":
            raise ValueError("Gradual: schedule is 'one_shot', expected 'cubic' or 'imp'")
        when = [*range(begin, end, every), end]
        self._plan = dict(zip(when, densities(density, schedule, len(when)), strict=True))
        self.model, self.steps = model, 0
        single = isinstance(optimizers, torch.optim.Optimizer)
        self.optimizers: list[torch.optim.Optimizer] = [optimizers] if single else list(optimizers)  # type: ignore[list-item, arg-type]
        pair(block)
        check(scope, floor, density)
        targets(model, include=include, exclude=exclude, stack=stack)
        self._options: dict[str, Any] = {
            "block": block, "scope": scope, "floor": floor, "score": score, "include": include, "exclude": exclude,
            "stack": stack,
        }  # fmt: skip

    def step(self) -> bool:
        """After each step of the optimizer: prunes where it is time. Returns whether it did."""
        density = self._plan.get(self.steps)
        self.steps += 1
        if density is None:
            return False
        install(self.model, select(self.model, density, **self._options), optimizers=self.optimizers)
        return True

    def state_dict(self) -> dict[str, int]:
        """Where it stands; the tickets are in the model's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from there."""
        self.steps = int(state["steps"])
