"""Several tickets as one layer: stacked rows, and query, key and value of an attention from one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import backends
from pyeff.nn.ticket import TicketLinear
from pyeff.ops._calls import autocast_dtype
from pyeff.plans import Ticket


def stack(layers: Sequence[TicketLinear]) -> TicketLinear:
    """One layer whose output is those of several layers, one after another.

    Args:
        layers (sequence of TicketLinear): of one input width, block, dtype, device and activation, all with a bias or
            all without; the rows of each but the last are a multiple of the block.

    Returns:
        TicketLinear: a new layer with the layers' numbers.

    Raises:
        ValueError: they do not fit.

    Example:
        >>> import torch, pyeff
        >>> from pyeff.nn._ticket_fused import stack, unstack
        >>> full = torch.ones(16, 32, dtype=torch.bool)
        >>> layers = [pyeff.nn.TicketLinear(pyeff.Ticket.from_mask(full, block=8)) for _ in range(3)]
        >>> stack(layers)(torch.randn(2, 32)).shape
        torch.Size([2, 48])
    """
    if not layers or not all(isinstance(layer, TicketLinear) for layer in layers):
        raise ValueError(f"stack: layers is {layers!r}, expected one or more TicketLinear")
    first = layers[0]
    for i, layer in enumerate(layers):
        for name in ("in_features", "block", "activation"):
            came, expected = getattr(layer, name), getattr(first, name)
            if came != expected:
                raise ValueError(f"stack: layers[{i}] has {name} {came!r}, expected {expected!r} as layers[0]")
        if (layer.bias is None) != (first.bias is None):
            raise ValueError(f"stack: layers[{i}] has bias={layer.bias is not None}, expected that of layers[0]")
        if layer is not layers[-1] and layer.out_features % first.block[0]:
            raise ValueError(
                f"stack: layers[{i}] has {layer.out_features} outputs, expected a multiple of {first.block[0]}"
            )
    shape = (sum(layer.out_features for layer in layers), first.in_features)
    ticket = Ticket.from_blocks(torch.cat([layer.ticket.blocks() for layer in layers]), shape, first.block)
    out = TicketLinear(
        ticket, first.bias is not None, first.activation, device=first.values.device, dtype=first.values.dtype
    )
    with torch.no_grad():
        out.values.copy_(torch.cat([layer.values.detach() for layer in layers]))
        out.values.requires_grad_(any(layer.values.requires_grad for layer in layers))
        if out.bias is not None:
            biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
            out.bias.copy_(torch.cat(biases))
            out.bias.requires_grad_(any(layer.bias is not None and layer.bias.requires_grad for layer in layers))
    return out.train(first.training)


def unstack(layer: TicketLinear, sizes: Sequence[int]) -> list[TicketLinear]:
    """The inverse of :func:`stack`: layers of ``sizes`` outputs each.

    Raises:
        ValueError: the sizes do not add up, or cut a block.

    Example:
        >>> import torch, pyeff
        >>> from pyeff.nn._ticket_fused import stack, unstack
        >>> layer = pyeff.nn.TicketLinear(pyeff.Ticket.from_mask(torch.ones(48, 32, dtype=torch.bool), block=8))
        >>> [part.out_features for part in unstack(layer, [16, 32])]
        [16, 32]
    """
    bo = layer.block[0]
    if sum(sizes) != layer.out_features or min(sizes, default=0) < 1 or any(size % bo for size in sizes[:-1]):
        raise ValueError(
            f"unstack: sizes is {list(sizes)}, expected multiples of {bo} that add up to {layer.out_features}"
        )
    blocks, start, at, out = layer.ticket.blocks(), layer.ticket.row_start.tolist(), 0, []
    for size in sizes:
        first, last = at // bo, -(-(at + size) // bo)
        ticket = Ticket.from_blocks(blocks[first:last], (size, layer.in_features), layer.block)
        part = TicketLinear(
            ticket, layer.bias is not None, layer.activation, device=layer.values.device, dtype=layer.values.dtype
        )
        with torch.no_grad():
            part.values.copy_(layer.values[start[first] : start[last]])
            part.values.requires_grad_(layer.values.requires_grad)
            if part.bias is not None and layer.bias is not None:
                part.bias.copy_(layer.bias[at : at + size])
                part.bias.requires_grad_(layer.bias.requires_grad)
        out.append(part.train(layer.training))
        at += size
    return out


# Tensors that must be the very same, and what must be equal.
_Moment = tuple[tuple[Tensor | None, ...], tuple[object, ...]]


def _moment(layer: TicketLinear, x: Tensor) -> _Moment:
    """All that the layer's output for ``x`` depends on, as of now."""
    tensors = (x, layer.values, layer.index, layer.bias)
    if torch.compiler.is_compiling():  # a graph being traced has no versions
        return tensors, (torch.is_grad_enabled(),)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x.device), backends.current())
    return tensors, (modes, *(_state(t) for t in tensors))


def _state(t: Tensor | None) -> tuple[int, bool, torch.dtype] | None:
    return None if t is None else (0 if t.is_inference() else t._version, t.requires_grad, t.dtype)


def _same(one: _Moment, other: _Moment) -> bool:
    return one[1] == other[1] and all(a is b for a, b in zip(one[0], other[0], strict=True))


class Projections:
    """The layer that several projections of one input share, and what it gave for the last input.

    The parts are asked one after another with the same tensor. The first that is asked computes all; each takes its
    own, and the last one lets go of them. A part that is asked with another tensor computes anew, and so does one for
    which anything has changed since: the tensor or the layer was written to or replaced, or the mode of gradients,
    autocast or the backend is another. So the results are right in whatever order, and from however many threads, they
    are asked for. Not seen is a write that torch does not count: through ``.data``, to a tensor made in inference mode,
    or between two projections of one compiled graph.
    """

    def __init__(self, layer: TicketLinear, sizes: Sequence[int]) -> None:
        self.layer, self.sizes = layer, tuple(sizes)
        self.last: tuple[_Moment, tuple[Tensor, ...], tuple[bool, ...]] | None = None

    def take(self, part: int, x: Tensor) -> Tensor:
        """What projection ``part`` gives for ``x``."""
        self.layer._check(x)
        last, now = self.last, _moment(self.layer, x)
        if last is None or not last[2][part] or not _same(last[0], now):
            last = (now, self.layer(x).split(self.sizes, -1), (True,) * len(self.sizes))
        left = tuple(there and i != part for i, there in enumerate(last[2]))
        self.last = (last[0], last[1], left) if any(left) else None
        return last[1][part]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


class Projection(nn.Module):
    """In the place of one linear layer: its share of what a stacked layer computes for all of them.

    It has no parameters: they are the stacked layer's, which is a module of its own beside it.

    Args:
        shared (Projections): with the others.
        part (int): which of them this is.
    """

    def __init__(self, shared: Projections, part: int) -> None:
        super().__init__()
        self.shared, self.part = shared, part
        self.in_features, self.out_features = shared.layer.in_features, shared.sizes[part]

    def forward(self, x: Tensor) -> Tensor:
        """[*, in] -> [*, out]."""
        return self.shared.take(self.part, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.part}"
