"""Calls of ticket_linear: random tickets and tensors with traps in them, and the three-way check of a call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import pyeff
from pyeff import Ticket
from tests import helpers, places

TENSORS = ("x", "values", "bias")
ACTIVATIONS = (None, "relu", "gelu")


@dataclasses.dataclass
class TicketCall:
    """One call of ticket_linear; ``tensors`` holds x, values and, where there is one, bias."""

    tensors: dict[str, Tensor]
    ticket: Ticket
    activation: str | None = None

    @property
    def tokens(self) -> int:
        return math.prod(self.tensors["x"].shape[:-1])

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.tensors["x"].shape[:-1], self.ticket.shape[0])

    def to(self, dtype: torch.dtype) -> TicketCall:
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> TicketCall:
        return dataclasses.replace(self, tensors={name: change(t) for name, t in self.tensors.items()})

    def but(self, **tensors: Tensor | None) -> TicketCall:
        """The call with other tensors; None takes one away."""
        changed = {**self.tensors, **tensors}
        return dataclasses.replace(self, tensors={name: t for name, t in changed.items() if t is not None})

    def require_grad(self, names: Iterable[str]) -> TicketCall:
        names = set(names)
        assert names <= set(self.tensors), names
        leaves = {name: t.detach().requires_grad_(name in names) for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=leaves)

    def __call__(self, function: Callable[..., Tensor] | None = None) -> Tensor:
        function = pyeff.ops.ticket_linear if function is None else function
        x, values, bias = (self.tensors.get(name) for name in TENSORS)
        return function(x, values, self.ticket, bias, activation=self.activation)

    def raw(self) -> tuple:
        """The arguments of torch.ops.pyeff.ticket_linear by position."""
        x, values, bias = (self.tensors.get(name) for name in TENSORS)
        return x, values, self.ticket.index, self.ticket.shape[0], bias

    def terms(self, name: str) -> int:
        """The length of the longest sum behind one element of the output or of a gradient."""
        blocks, (bo, bi) = self.ticket.blocks(), self.ticket.block
        if name == "out":
            return int(blocks.sum(1).max()) * bi + 1
        # The gradient before the activation carries the error of the sum that the activation was taken of.
        own = int(blocks.sum(0).max()) * bo if name == "x" else self.tokens
        return own + (0 if self.activation is None else self.terms("out"))


def random_blocks(grid: tuple[int, int], density: float, seed: int, holes: bool = True) -> Tensor:
    """[R, C] bool on the CPU; with ``holes`` one row and one column are empty, wherever there are two or more."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(grid, generator=generator, device="cpu") < density
    blocks[0, 0] = density > 0
    if holes and grid[0] > 1:
        blocks[grid[0] // 2] = False
    if holes and grid[1] > 1:
        blocks[:, grid[1] // 2] = False
    return blocks


def make_ticket(
    shape: tuple[int, int], block: int | Sequence[int], density: float = 0.5, *, seed: int = 0, holes: bool = True
) -> Ticket:
    """A random ticket on torch's default device."""
    bo, bi = (block, block) if isinstance(block, int) else block
    blocks = random_blocks((-(-shape[0] // bo), -(-shape[1] // bi)), density, seed, holes)
    return Ticket.from_blocks(blocks.to(torch.get_default_device()), shape, block)


def padding(ticket: Ticket) -> Tensor:
    """[nnz, bo, bi] bool, True for what a stored block holds past the end of the weight."""
    return ~(ticket.gather(torch.ones(ticket.shape)) > 0)


def unselected(ticket: Ticket) -> Tensor:
    """[in] bool, True for the columns of the weight in which no block is alive."""
    return ~ticket.mask().any(0)


def make_call(
    shape: tuple[int, int] = (40, 56), block: int | Sequence[int] = 16, density: float = 0.5, *,
    lead: tuple[int, ...] = (5,), dtype: torch.dtype | None = None, bias: bool = True, activation: str | None = None,
    ticket: Ticket | None = None, holes: bool = True, traps: bool = True, x_strides: str = "contiguous",
    strides: str = "contiguous", seed: int = 0,
) -> TicketCall:  # fmt: skip
    """A random call on torch's default device; the dtype is the place's widest unless one is given.

    With ``traps`` everything that must not count is NaN: what the values hold past the end of the weight, and x where
    no block selects it.
    """
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.get_default_device(), dtype or places.here().dtypes[0]
    ticket = make_ticket(shape, block, density, seed=seed, holes=holes) if ticket is None else ticket
    (out, width), (bo, bi) = ticket.shape, ticket.block
    fan_in = max(1.0, ticket.density * width)

    def normal(*size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return (drawn * scale + offset).to(device, dtype)

    # x is not centred, so that a column taken for another one shows, and one that is left out.
    tensors = {"x": normal(*lead, width, offset=0.25), "values": normal(ticket.nnz, bo, bi, scale=fan_in**-0.5)}
    if bias:
        tensors["bias"] = normal(out, scale=0.5)
    if traps:
        tensors["x"] = tensors["x"].masked_fill(unselected(ticket), math.nan)
        tensors["values"] = tensors["values"].masked_fill(padding(ticket), math.nan)
    laid = {name: helpers.lay_out(t, x_strides if name == "x" else strides) for name, t in tensors.items()}
    return TicketCall(laid, ticket, activation)


def random_grad(call: TicketCall, seed: int = 99) -> Tensor:
    """A gradient of the call's output, in the call's dtype: all who are compared must get the same."""
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(call.out_shape, generator=generator, dtype=torch.float64, device="cpu")
    return grad_out.to(call.tensors["values"])


def _largest(t: Tensor) -> float:
    t = t[t.isfinite()].abs()
    return t.max().item() if t.numel() else 0.0


def sizes(call: TicketCall, grad_out: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """The size of the sums behind output and gradients, the root of the sum of the squares of their terms; and z.

    A sum may come out small because its terms cancel, or be cut by the activation; its rounding errors stay.
    """
    linear = dataclasses.replace(call.to(torch.float64), activation=None)
    z = linear(pyeff.reference.ticket_linear).detach().requires_grad_()
    squares = linear.map(lambda t: t.square()).require_grad(linear.tensors)
    size = squares(pyeff.reference.ticket_linear)
    found = {"out": _largest(size.detach().sqrt())}
    if grad_out is not None:
        y = pyeff.reference.ticket.activate(z, call.activation)
        grad_z = torch.autograd.grad(y, z, grad_out.double())[0].nan_to_num()
        # gelu's derivative may vanish where its error does not.
        grad_z = torch.maximum(grad_z.abs(), 0.1 * grad_out.double().abs()) if call.activation == "gelu" else grad_z
        grads = torch.autograd.grad(size, list(squares.tensors.values()), grad_z.square())
        found |= {name: _largest(g.sqrt()) for name, g in zip(squares.tensors, grads, strict=True)}
    return found, z.detach()


def check_call(
    call: TicketCall, names: Iterable[str] = (), *, grad_out: Tensor | None = None, function=None
) -> dict[str, Tensor]:
    """Output and gradients of a call, three ways, on the backend in force; what does not count has gradient zero."""
    names, definition = list(names), pyeff.reference.ticket_linear
    if not names:
        scales, _ = sizes(call, None)
        with torch.no_grad():
            fused, same = {"out": call(function)}, {"out": call(definition)}
            oracle = {"out": call.to(torch.float64)(definition)}
    else:
        grad_out = random_grad(call) if grad_out is None else grad_out
        scales, z = sizes(call, grad_out)
        if call.activation == "relu":
            # At its kink a rounding decides the derivative: nobody is asked there.
            near = z.abs() <= helpers.rounding(torch.float32, call.terms("out"), scales["out"])
            grad_out = grad_out.masked_fill(near.expand(grad_out.shape), 0)
        fused = helpers.gradients(call, names, grad_out, function)
        same = helpers.gradients(call, names, grad_out, definition)
        oracle = helpers.gradients(call.to(torch.float64), names, grad_out, definition)
        if "values" in names:
            past = fused["values"].masked_select(padding(call.ticket))
            assert not past.any(), "what a block holds past the end of the weight has a gradient"
        if "x" in names:
            assert not fused["x"][..., unselected(call.ticket)].any(), "x has a gradient where no block selects it"
    for name in fused:
        helpers.assert_three_way(name, fused[name], same[name], oracle[name], call.terms(name), scales[name])
    return fused
