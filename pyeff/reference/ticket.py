"""The linear layer of a ticket, by its definition: every living block on its own, then the sum of each row."""

from __future__ import annotations

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
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"{op}: activation is {activation!r}, expected None, 'relu' or 'gelu'")


def ticket_linear(
    x: Tensor, values: Tensor, ticket: Ticket, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``act(x W^T + b)`` for a W of living blocks; see :func:`pyeff.ops.ticket_linear` for the arguments.

    What the blocks of a row do not select of x plays no part in that row's output, whatever it holds.

    Raises:
        ValueError: an unknown activation, or shapes that do not fit.

    Example:
        >>> import torch, pyeff
        >>> ticket = pyeff.Ticket.from_blocks(torch.eye(3, dtype=torch.bool), (24, 48), (8, 16))
        >>> pyeff.reference.ticket_linear(torch.randn(5, 48), torch.randn(3, 8, 16), ticket).shape
        torch.Size([5, 24])
    """
    check_activation("ticket_linear", activation)
    return linear(x, values, ticket.index, ticket.shape[0], bias, activation)


def linear(x: Tensor, values: Tensor, index: Tensor, out: int, bias: Tensor | None, activation: str | None) -> Tensor:
    """The same from the parts of a ticket, all of them tensors and numbers."""
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
    z = sums.transpose(0, 1).reshape(-1, rows * bo)[:, :out].reshape(*x.shape[:-1], out)
    return activate(z if bias is None else z + bias, activation)
