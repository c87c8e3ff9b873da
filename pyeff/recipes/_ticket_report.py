"""What a pruning or a conversion did, layer by layer: numbers, a dict, a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.recipes._ticket_targets import Prunable

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerPruning:
    """What is left of one layer.

    Attributes:
        shape ((int, int)): (out, in).
        block ((int, int), optional): (bo, bi); None for a mask of elements.
        density (float): the share of the elements that is left.
        retained (float): the share of the magnitude, of the weights before pruning, that lies in it.
        magnitude (float): that whole magnitude, the sum of all absolute values.
    """

    shape: tuple[int, int]
    block: tuple[int, int] | None
    density: float
    retained: float
    magnitude: float


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What :func:`prune` did.

    Args:
        method (str): as it was given.
        layers (dict of LayerPruning): by path; each with ``shape``, ``block``, ``density``, ``retained`` (the share of
            the magnitude before pruning that survives) and ``magnitude`` (the whole of it).
        rounds (list of dict): of each round, the ``density`` after it and what ``train`` ``returned``.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> pruning = ticket.prune(model, density=0.5, block=8, method="one_shot")
        >>> isinstance(pruning, ticket.Pruning), pruning.density, pruning.retained > 0.5
        (True, 0.5, True)
        >>> sorted(pruning.to_dict()["layers"]["0"])
        ['block', 'density', 'magnitude', 'retained', 'shape']
    """

    method: str
    layers: dict[str, LayerPruning]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def density(self) -> float:
        """The share of the elements of all pruned layers that is left."""
        sizes = {name: row.shape[0] * row.shape[1] for name, row in self.layers.items()}
        return sum(row.density * sizes[name] for name, row in self.layers.items()) / sum(sizes.values())

    @property
    def retained(self) -> float:
        """The share of the magnitude before pruning that survives, over all pruned layers."""
        whole = sum(row.magnitude for row in self.layers.values())
        return sum(row.retained * row.magnitude for row in self.layers.values()) / whole if whole else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and dicts, for JSON; what ``train`` returned as it is."""
        return dataclasses.asdict(self) | {"density": self.density, "retained": self.retained}

    def table(self) -> Table:
        """A rich table, one row a layer; needs the package rich."""
        rows = [
            (
                short(name),
                f"{row.shape[0]} x {row.shape[1]}",
                _block(row.block),
                percent(row.density),
                percent(row.retained),
            )
            for name, row in self.layers.items()
        ]
        total = ("all", "", "", percent(self.density), percent(self.retained))
        return table(f"{self.method}: what is left", ("layer", "shape", "block", "density", "magnitude"), rows, total)


def describe(method: str, layers: Mapping[str, Prunable], before: Mapping[str, Tensor], rounds: list) -> Pruning:
    """The result for layers as they are now, against their dense weights before."""
    return Pruning(method, {name: _layer(layer, before[name]) for name, layer in layers.items()}, rounds)


def _layer(layer: nn.Module, before: Tensor) -> LayerPruning:
    magnitude = before.float().abs()
    if isinstance(layer, TicketLinear):
        block, density, alive = layer.block, layer.density, layer.ticket.mask()
    else:
        mask = getattr(layer, "weight_mask", None)
        alive = torch.ones_like(before, dtype=torch.bool) if mask is None else mask != 0
        block, density = None, int(alive.sum()) / alive.numel()
    whole = float(magnitude.sum(dtype=torch.float64))
    left = float(magnitude[alive].sum(dtype=torch.float64))
    return LayerPruning(tuple(before.shape), block, density, left / whole if whole else 1.0, whole)  # type: ignore[arg-type]


def short(path: str) -> str:
    """A layer's path from its number in the stack on."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def percent(share: float) -> str:
    """A share as per cent, with one decimal."""
    return f"{100 * share:.1f} %"


def _block(block: tuple[int, int] | None) -> str:
    return "" if block is None else f"{block[0]} x {block[1]}"


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> Table:
    """A rich table whose first column is text and whose others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for i, name in enumerate(names):
        out.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for row in rows:
        out.add_row(*row)
    if total is not None:
        out.add_section()
        out.add_row(*total)
    return out
