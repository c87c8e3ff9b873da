"""A model whose layers are tickets where that is faster on this machine, and dense elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pyeff.nn import TicketLinear
from pyeff.nn._ticket_fused import Projection
from pyeff.plans import Ticket
from pyeff.recipes import _ticket_measure as measure
from pyeff.recipes._ticket_activations import fuse_activations, split_activations
from pyeff.recipes._ticket_install import dense_layer, install, rank
from pyeff.recipes._ticket_qkv import CHILD, fuse_qkv, split_qkv
from pyeff.recipes._ticket_report import percent, short, table
from pyeff.recipes._ticket_select import check, densities, pair, retained
from pyeff.recipes._ticket_targets import Prunable, dense_weight, replace, targets

if TYPE_CHECKING:
    from rich.table import Table

MODES = ("inference", "training", "all")


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """One layer, dense and as a ticket.

    Attributes:
        shape ((int, int)): (out, in).
        block ((int, int)): (bo, bi).
        density (float), retained (float): of the ticket: the share of elements and of magnitude in it.
        tokens (int): rows of the input; 0 where the sample did not reach the layer.
        dense, ticket ((float, float)): seconds for a forward, and for forward and backward.
        dense_bytes, ticket_bytes (int): of the weight, for the ticket with its index.
        chosen (str): ``"ticket"`` or ``"dense"``: what the model has now.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    density: float
    retained: float
    tokens: int
    dense: tuple[float, float]
    ticket: tuple[float, float]
    dense_bytes: int
    ticket_bytes: int
    chosen: str

    def training_bytes(self) -> tuple[float, float]:
        """Of the ticket and of the dense layer: weights, gradients and two moments of Adam."""
        # The index is there once, the values four times.
        return self.ticket_bytes + 3 * self.density * self.dense_bytes, 4 * self.dense_bytes


@dataclasses.dataclass(frozen=True)
class Sparsification:
    """What :func:`sparsify` measured and chose.

    Args:
        mode (str): ``"inference"`` or ``"training"``: by which time was chosen; ``"all"``: by none.
        layers (dict of LayerTimes): by path; each with ``shape``, ``block``, ``density``, ``retained``, ``tokens``, the
            seconds ``dense`` and ``ticket`` for (forward, forward and backward), ``dense_bytes``, ``ticket_bytes`` and
            what was ``chosen``.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> found = ticket.sparsify(model, torch.randn(8, 16), density=0.5, block=8)
        >>> isinstance(found, ticket.Sparsification), sorted(found.to_dict()["total"])[:2]
        (True, ['bytes', 'dense_bytes'])
    """

    mode: str
    layers: dict[str, LayerTimes]

    def total(self) -> dict[str, float]:
        """Sums over all layers: what was all dense, and what is chosen.

        ``bytes`` are weights with index; ``training_bytes`` weights, gradients and two moments of Adam.
        """
        rows = list(self.layers.values())
        mine = [(r.ticket, r.ticket_bytes) if r.chosen == "ticket" else (r.dense, r.dense_bytes) for r in rows]
        elements = [row.shape[0] * row.shape[1] for row in rows]
        left = [n * (row.density if row.chosen == "ticket" else 1.0) for n, row in zip(elements, rows, strict=True)]
        out: dict[str, float] = {"density": sum(left) / sum(elements)}
        for i, name in enumerate(("forward", "step")):
            out[f"dense_{name}"] = sum(row.dense[i] for row in rows)
            out[name] = sum(times[i] for times, _ in mine)
        out["dense_bytes"] = sum(row.dense_bytes for row in rows)
        out["bytes"] = sum(size for _, size in mine)
        out["dense_training_bytes"] = 4 * out["dense_bytes"]
        out["training_bytes"] = sum(row.training_bytes()[row.chosen == "dense"] for row in rows)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and dicts, for JSON."""
        return dataclasses.asdict(self) | {"total": self.total()}

    def table(self) -> Table:
        """A rich table, one row a layer, ticket / dense; memory as in :meth:`total`. Needs the package rich."""
        names = ("layer", "density", "magnitude", "forward ms", "step ms", "training MiB", "now")
        rows = [
            (short(name), percent(row.density), percent(row.retained), _beside(row.ticket[0], row.dense[0], 1000),
             _beside(row.ticket[1], row.dense[1], 1000), _beside(*row.training_bytes(), 2**-20), row.chosen)
            for name, row in self.layers.items()
        ]  # fmt: skip
        sums = self.total()
        totals = [_beside(sums[name], sums[f"dense_{name}"], 1000) for name in ("forward", "step")]
        size = _beside(sums["training_bytes"], sums["dense_training_bytes"], 2**-20)
        tokens = max((row.tokens for row in self.layers.values()), default=0)
        title = f"Ticket / dense, {tokens} tokens, chosen for {self.mode}"
        return table(title, names, rows, ("as chosen", percent(sums["density"]), "", *totals, size, ""))


def _beside(ours: float, dense: float, scale: float) -> str:
    return " / ".join(f"{v:.{2 if v < 10 else 1 if v < 100 else 0}f}" for v in (ours * scale, dense * scale))


def sparsify(
    model: nn.Module,
    sample: Any,
    *,
    density: float | None = None,
    tickets: Mapping[str, Ticket] | None = None,
    block: int | Sequence[int] = 32,
    mode: str = "inference",
    scope: str = "global",
    floor: float = 0.0,
    fuse: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Sparsification:
    """Makes tickets of the layers in which that is faster on this machine, and leaves the others dense.

    Every layer is timed, dense and as a ticket in turns, on random numbers of the shape that it gets for ``sample``. A
    linear layer that stays dense is not pruned; a ticket that becomes dense keeps its zeros. A layer that the sample
    does not reach stays what it is. What is fused is taken apart for that, and fused again as far as it still can be.

    Args:
        model (Module): changed in place.
        sample (Tensor, tuple, mapping or callable): what the model is called with: the shapes that matter; a function
            gets the model.
        density (float, optional): prune linear layers to this by :func:`select`, by magnitude.
        tickets (mapping, optional): the tickets to take instead, by path. Without either, the model's own tickets are
            measured.
        block (int or (int, int)): with ``density``: (bo, bi), or one number for both.
        mode (str): ``"inference"`` chooses by the forward, ``"training"`` by forward and backward, ``"all"`` makes
            every layer a ticket, whatever the times.
        scope (str), floor (float), include, exclude, stack: with ``density``: as of :func:`prune`.
        fuse (bool): at the end, :func:`fuse_qkv` and :func:`fuse_activations` of all that can be.
        progress (callable, optional): called as ``progress(path, number, count)`` before each layer.

    Returns:
        Sparsification: sizes, times, retained magnitude and the choice for each layer.

    Raises:
        ValueError: an option is unknown or out of its range, or nothing is to be measured.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> found = ticket.sparsify(model, torch.randn(8, 16), density=0.5, block=8)
        >>> {row.chosen for row in found.layers.values()} <= {"ticket", "dense"}
        True
    """
    if mode not in MODES:
        raise ValueError(f"sparsify: mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    if density is not None and tickets is not None:
        raise ValueError("sparsify: density and tickets were both given, expected one of the two")
    if density is not None:
        densities(density, "one_shot", None)
        check(scope, floor, density)
        pair(block)
    elif not (any(isinstance(m, TicketLinear) for m in model.modules()) if tickets is None else tickets):
        raise ValueError("sparsify: neither density nor tickets were given, expected one, or a model with tickets")
    stacked = {path: m.get_submodule(CHILD) for path, m in model.named_modules() if CHILD in m._modules}
    split_qkv(model)
    activations: list[str] | None = split_activations(model)
    attentions: list[str] | None = list(stacked)
    found = {}
    try:
        if density is not None:
            targeted = targets(model, include=include, exclude=exclude, stack=stack)
            tickets = rank(targeted, density, pair(block), scope, floor)
        elif tickets is None:
            tickets = {name: m.ticket for name, m in model.named_modules() if isinstance(m, TicketLinear)}
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in tickets}
        given = measure.inputs_of(model, layers, sample)
        for number, (name, wanted) in enumerate(tickets.items()):
            if progress is not None:
                progress(name, number, len(tickets))
            found[name] = _layer(model, name, layers[name], wanted, given.get(name), MODES.index(mode))
        if fuse:
            activations = attentions = None
    finally:
        _fuse_again(model, stacked, fuse_qkv(model, attentions))
        fuse_activations(model, activations)
    return Sparsification(mode, found)


def _fuse_again(model: nn.Module, stacked: Mapping[str, nn.Module], fused: Sequence[str]) -> None:
    """The very layers that were there, where they are what was fused now: an optimizer has their parameters."""
    for path in fused:
        attention: Any = model.get_submodule(path)
        old: Any = stacked.get(path)
        if old is not None and old.ticket == getattr(attention, CHILD).ticket:
            setattr(attention, CHILD, old)
            for part in attention.children():
                if isinstance(part, Projection):
                    part.shared.layer = old


def _layer(
    model: nn.Module, name: str, layer: Prunable, wanted: Ticket, given: measure.Input | None, by: int
) -> LayerTimes:
    """Measures one layer, and puts what is faster into the model; what cannot be measured stays as it is."""
    every, is_ticket = by == MODES.index("all"), isinstance(layer, TicketLinear)
    if given is None and not every and isinstance(layer, TicketLinear):
        wanted = layer.ticket
    weight = dense_weight(layer)
    sparse, dense = _both(layer, wanted)
    never = {"dense": (0.0, 0.0), "ticket": (0.0, 0.0)}
    times = never if given is None else measure.compare({"dense": dense, "ticket": sparse}, given)
    faster = every or (is_ticket if given is None else times["ticket"][by] < times["dense"][by])
    if faster:
        install(model, {name: wanted})
    elif is_ticket:
        replace(model, layer, dense)
    return LayerTimes(
        shape=wanted.shape, block=wanted.block, density=wanted.density, retained=retained(weight, wanted),
        tokens=0 if given is None else given.tokens, dense=times["dense"], ticket=times["ticket"],
        dense_bytes=weight.numel() * weight.element_size(),
        ticket_bytes=sum(t.numel() * t.element_size() for t in (sparse.values, sparse.index)),
        chosen="ticket" if faster else "dense",
    )  # fmt: skip


def _both(layer: Prunable, wanted: Ticket) -> tuple[TicketLinear, nn.Module]:
    if isinstance(layer, TicketLinear):
        sparse = layer
        if wanted != layer.ticket:
            sparse = TicketLinear.from_linear(layer.to_linear(), wanted, activation=layer.activation)
        return sparse, dense_layer(layer)
    return TicketLinear.from_linear(layer, wanted), layer
