"""The linear layer of a ticket, by its definition: every living block on its own, then the sum of each row."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from pyeff.plans import Ticket

ACTIVATIONS = ("none", "relu", "gelu")


def activate(z: Tensor, activation: str | None) -> Tensor:
    """relu, gelu (by the error function, not its approximation by tanh) or nothing."""
    if activation == "relu":
        return torch.relu(z)
    return F.gelu(z) if activation == "gelu" else z


def check_activation(op: str, activation: str | None) -> None:
    """Raises ValueError unless it is one of those there are."""
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(f"{op}: activation is {activation!r}, expected None, 'relu' or 'gelu'")


def ticket_linear(
    x: Tensor, values: Tensor, ticket: Ticket, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``act(x W^T + b)`` for a W of living blocks; see :func:`pyeff.ops.ticket_linear` for the arguments.

    What the blocks of a row do not select of x plays no part in that row's output, whatever it holds.

    Raises:
        ValueError: an unknown activation, or shapes or dtypes that do not fit.

    Example:
        >>> import torch, pyeff
        >>> ticket = pyeff.Ticket.from_blocks(torch.eye(3, dtype=torch.bool), (24, 48), (8, 16))
        >>> pyeff.reference.ticket_linear(torch.randn(5, 48), torch.randn(3, 8, 16), ticket).shape
        torch.Size([5, 24])
    """
    check_activation("ticket_linear", activation)
    out, width = ticket.shape
    expected = {"x": (*x.shape[:-1], width), "values": (ticket.nnz, *ticket.block), "bias": (out,)}
    for name, t in (("x", x), ("values", values), ("bias", bias)):
        if t is not None and tuple(t.shape) != expected[name]:
            raise ValueError(
                f"ticket_linear: {name} has shape {list(t.shape)}, expected {list(expected[name])} for {ticket!r}"
            )
        if t is not None and t.dtype != values.dtype:
            raise ValueError(f"ticket_linear: {name} is {t.dtype}, expected {values.dtype} as values")
    return linear(x, values, ticket.index, out, bias, activation)


def linear(x: Tensor, values: Tensor, index: Tensor, out: int, bias: Tensor | None, activation: str | None) -> Tensor:
    """The same from the parts of a ticket, all of them tensors and numbers."""
    dtype, device = values.dtype, values.device.type
    # Sums and what they are made of are in float32 at least, also where autocast would have it otherwise.
    wide = torch.promote_types(dtype, torch.float32)
    plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with plain:
        z = _sums(x.to(wide), values.to(wide), index, out)
        return activate(z if bias is None else z + bias, activation).to(dtype)


def _sums(x: Tensor, values: Tensor, index: Tensor, out: int) -> Tensor:
    """``x W^T``: every living block's product, added up by rows."""
    (nnz, bo, bi), width = values.shape, x.shape[-1]
    rows, columns = -(-out // bo), -(-width // bi)
    start, column = index[: rows + 1].long(), index[rows + 1 : rows + 1 + nnz].long()
    row = torch.searchsorted(start, torch.arange(nnz, device=index.device), right=True) - 1
    # What a block holds past the end of the weight is no part of it.
    inside = (row[:, None] * bo + torch.arange(bo, device=index.device) < out)[:, :, None] & (
        column[:, None] * bi + torch.arange(bi, device=index.device) < width
    )[:, None]
    values = torch.where(inside, values, 0)
    tokens = F.pad(x.reshape(-1, width), (0, columns * bi - width)).view(-1, columns, bi)
    products = torch.einsum("nki,koi->kno", tokens[:, column], values)
    sums = products.new_zeros(rows, products.shape[1], bo).index_add(0, row, products)
    return sums.transpose(0, 1).reshape(-1, rows * bo)[:, :out].reshape(*x.shape[:-1], out)
