"""What one ticket's blocks hold, as another ticket's blocks: for values and for an optimizer's moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyeff.plans import Ticket


def check_optimizers(op: str, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raises ValueError for an optimizer that knows its parameters by more than ``param_groups`` and ``state``.

    LBFGS keeps a list of them beside the groups, and in the state of the first one vectors as long as all together:
    neither can follow one parameter.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
            raise ValueError(f"{op}: optimizers has a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        for name, kept in vars(optimizer).items():
            if isinstance(kept, list | tuple) and any(isinstance(t, Tensor) for t in kept):
                raise ValueError(
                    f"{op}: optimizers has {type(optimizer).__name__}, which keeps parameters in {name!r}, expected "
                    "those with a state for each parameter; make it anew afterwards"
                )


class Carry:
    """Values of one ticket's blocks as those of another."""

    def __init__(self, old: Ticket, new: Ticket) -> None:
        self.old, self.new = old, new
        self.same = old.block == new.block
        rows, columns = old.grid
        if self.same:
            slot = torch.full((rows * columns,), -1, device=old.index.device)
            slot[old._positions()] = torch.arange(old.nnz, device=old.index.device)
            self.source = slot[new._positions()]
            self.survives = self.source >= 0

    def __call__(self, values: Tensor, dense: Tensor | None = None) -> Tensor:
        """[nnz, bo, bi] -> [nnz', bo', bi']; what is new is taken from ``dense`` (of that shape), or zero."""
        if self.same:
            out = self._rows(values)
            return out if dense is None else torch.where(self.survives[:, None, None], out, dense)
        out = self.new.gather(self.old.scatter(values))
        if dense is None:
            return out
        return torch.where(self.new.gather(self.old.mask()), out, dense)

    def state(self, moment: Tensor) -> Tensor | None:
        """The same for a moment of an optimizer; None where it cannot follow."""
        if tuple(moment.shape) == (self.old.nnz, *self.old.block):
            return self(moment)
        return self._rows(moment) if self.same and moment.shape[0] == self.old.nnz else None

    def _rows(self, values: Tensor) -> Tensor:
        out = values.new_zeros(len(self.source), *values.shape[1:])
        out[self.survives] = values[self.source[self.survives]]
        return out
