"""Tickets put into a model, taken out again, and changed while an optimizer is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.nn._ticket_carry import check_optimizers
from pyeff.plans import Ticket
from pyeff.recipes import _ticket_select as select_module
from pyeff.recipes._ticket_masks import unmask
from pyeff.recipes._ticket_targets import Prunable, check_untied, element_scores, is_prunable, replace, targets


def tickets(model: nn.Module) -> dict[str, Ticket]:
    """The ticket of every pruned layer of a model, by its path; empty where there is none.

    Args:
        model (Module): any.

    Returns:
        dict of Ticket: they share the memory of the layers' indices.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> _ = ticket.prune(model, density=0.5, block=8, method="one_shot")
        >>> sum(t.nnz for t in ticket.tickets(model).values())
        8
    """
    return {name: m.ticket for name, m in model.named_modules() if isinstance(m, TicketLinear)}


def select(
    model: nn.Module,
    density: float,
    block: int | Sequence[int] = 32,
    *,
    scope: str = "global",
    floor: float = 0.0,
    score: Callable[[str, Any], Tensor] | None = None,
    grow: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
) -> dict[str, Ticket]:
    """The best blocks of a model's linear layers; the model stays as it is.

    Args:
        model (Module): as of :func:`prune`.
        density (float): the share of the elements that is to survive.
        block (int or (int, int)): (bo, bi), or one number for both; of layers that are pruned already, their own.
        scope (str), floor (float), include, exclude, stack: as of :func:`prune`.
        score (callable, optional): ``score(path, layer)`` gives what each element [out, in] is worth; a block is worth
            the mean. Default: the magnitude.
        grow (bool): blocks of a ticket that died may live again where ``score`` says so. Default: only living ones may
            survive.

    Returns:
        dict of Ticket: by path, for :func:`install`.

    Raises:
        ValueError: an option is out of its range, or ``score`` gives what does not fit.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> found = ticket.select(model, 0.25, block=8)
        >>> sum(t.nnz for t in found.values())
        4
    """
    select_module.densities(density, "one_shot", None)
    wanted = select_module.pair(block)
    layers = targets(model, include=include, exclude=exclude, stack=stack)
    return rank(layers, density, wanted, scope, floor, score, grow)


def rank(
    layers: Mapping[str, Prunable],
    density: float,
    block: tuple[int, int],
    scope: str,
    floor: float = 0.0,
    score: Callable[[str, Any], Tensor] | None = None,
    grow: bool = False,
) -> dict[str, Ticket]:
    """:func:`select` for layers that were found already."""
    blocks = {name: layer.block if isinstance(layer, TicketLinear) else block for name, layer in layers.items()}
    scores, sizes, allowed = {}, {}, {}
    for name, layer in layers.items():
        scores[name] = select_module.block_means(element_scores(score, name, layer), blocks[name])
        shape = (layer.out_features, layer.in_features)
        sizes[name] = select_module.block_sizes(shape, blocks[name], scores[name].device)
        allowed[name] = torch.ones_like(scores[name], dtype=torch.bool)
        if isinstance(layer, TicketLinear) and not grow:
            allowed[name] = layer.ticket.blocks()
    chosen = select_module.choose(scores, sizes, density, scope, allowed, floor)
    return {
        name: Ticket.from_blocks(alive, (layers[name].out_features, layers[name].in_features), blocks[name])
        for name, alive in chosen.items()
    }


@torch.no_grad()
def install(
    model: nn.Module,
    tickets: Mapping[str, Ticket],
    *,
    weights: Mapping[str, Tensor] | None = None,
    rewind: bool = False,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Puts tickets into a model: linear layers become TicketLinear, and those that are get another ticket.

    In the middle of a training, too: with ``optimizers``, moments of what survives are carried over.

    Args:
        model (Module): changed in place.
        tickets (mapping): path of a torch.nn.Linear or TicketLinear to its Ticket. A layer that stands in several
            places may be named by any of its paths.
        weights (mapping, optional): by path, the dense weights [out, in] that new blocks take their values from, and
            all blocks with ``rewind``. Default: of a linear layer its own (under a mask, its ``weight_orig``), of a
            ticket zeros.
        rewind (bool): surviving blocks take their values from ``weights`` too.
        optimizers (iterable of torch.optim.Optimizer): those that train the model. A new layer's values take the place
            of the weight in their parameter groups.

    Raises:
        ValueError: a path names no such layer, a ticket or weight does not fit, or another module has a layer's very
            weight; nothing is changed then.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for density in (0.75, 0.5):
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     ticket.install(model, ticket.select(model, density, block=8), optimizers=[optimizer])
        >>> optimizer.state[model[0].values]["exp_avg"].shape == model[0].values.shape
        True
    """
    modules, optimizers, weights = dict(model.named_modules(remove_duplicate=False)), list(optimizers), weights or {}
    check_optimizers("install", optimizers)
    first: dict[int, str] = {}
    for name, ticket in tickets.items():
        module = modules.get(name)
        if module is None or not is_prunable(module):
            raise ValueError(
                f"install: {name} is a {type(module).__name__}, expected a torch.nn.Linear or TicketLinear of the model"
            )
        shape = (module.out_features, module.in_features)
        if not isinstance(ticket, Ticket) or ticket.shape != shape:
            raise ValueError(f"install: the ticket of {name} is {ticket!r}, expected a pyeff.Ticket of {list(shape)}")
        other = first.setdefault(id(module), name)
        if ticket != tickets[other]:
            raise ValueError(f"install: {name} and {other} are one layer with two tickets, expected the same for both")
        if name in weights and tuple(weights[name].shape) != shape:
            raise ValueError(
                f"install: the weight of {name} has shape {list(weights[name].shape)}, expected {list(shape)}"
            )
    try:
        check_untied(model, {name: modules[name] for name in first.values()})
    except ValueError as error:
        raise ValueError(f"install: {error}") from None
    for name in first.values():
        fill, ticket = weights.get(name), tickets[name]
        layer: Any = modules[name]
        if isinstance(layer, TicketLinear):
            layer.set_ticket(ticket, fill, rewind=rewind and fill is not None, optimizers=optimizers)
        else:
            _convert(model, layer, ticket, fill, optimizers)


def _convert(
    model: nn.Module, linear: Any, ticket: Ticket, fill: Tensor | None, optimizers: list[torch.optim.Optimizer]
) -> None:
    if hasattr(linear, "weight_mask"):
        unmask(linear, linear.weight_orig.detach() if fill is None else fill)
    layer = TicketLinear.from_linear(linear, ticket)
    if fill is not None:
        own = layer.ticket
        layer.values.copy_(own.gather(fill.to(layer.values.device, layer.values.dtype)))
    # The very parameter, so that an optimizer goes on with it.
    layer.bias = linear.bias
    for optimizer in optimizers:
        _take_over(optimizer, linear.weight, layer)
    replace(model, linear, layer)


def _take_over(optimizer: torch.optim.Optimizer, weight: Tensor, layer: TicketLinear) -> None:
    """The values in the place of the weight, with the moments of their blocks."""
    for group in optimizer.param_groups:
        group["params"] = [layer.values if p is weight else p for p in group["params"]]
    state = optimizer.state.pop(weight, None)
    if state:
        ticket = layer.ticket
        # A factored moment is of whole rows and columns and has no blocks: then the optimizer begins anew with them.
        if all(t.dim() == 0 or t.shape == weight.shape for t in state.values() if isinstance(t, Tensor)):
            optimizer.state[layer.values] = {
                key: ticket.gather(t).contiguous() if isinstance(t, Tensor) and t.dim() else t
                for key, t in state.items()
            }


def to_dense(model: nn.Module) -> nn.Module:
    """Puts ordinary linear layers in the place of all tickets, with zeros where no block lives.

    Args:
        model (Module): changed in place; what was fused is split first.

    Returns:
        Module: the model, or a new layer where the model is a ticket itself.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> _ = ticket.prune(model, density=0.5, block=8, method="one_shot")
        >>> int(ticket.to_dense(model)[0].weight.count_nonzero()) % 64
        0
    """
    from pyeff.recipes._ticket_activations import split_activations
    from pyeff.recipes._ticket_qkv import split_qkv

    if isinstance(model, TicketLinear):
        return dense_layer(model)
    split_qkv(model)
    split_activations(model)
    for module in [m for m in model.modules() if isinstance(m, TicketLinear)]:
        replace(model, module, dense_layer(module))
    return model


def dense_layer(layer: TicketLinear) -> nn.Module:
    """A linear layer that computes what the ticket does, with its activation behind it if there is one."""
    if layer.activation is None:
        return layer.to_linear()
    return nn.Sequential(layer.to_linear(), nn.ReLU() if layer.activation == "relu" else nn.GELU())
