"""READ's recurrence over the depth of a frozen network (Nguyen et al., 2023, arXiv 2305.15348, section 3).

For every token on its own, layers i = 1..L share one recurrent cell:

    x_i  = gamma * phi_i / sqrt(mean_d(phi_i^2) + eps)
    h_i  = Cell(x_i, h_{i-1})
    out  = mean_i h_i      (or h_L)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Tensor | tuple[Tensor, Tensor] | None


def normalize(phi: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises the last dimension of ``phi``, with the statistics in at least float32."""
    if norm == "none":
        return phi
    wide = phi.to(torch.promote_types(phi.dtype, torch.float32))
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(phi.dtype)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def rnn_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """One step of torch.nn.RNN's tanh cell."""
    return torch.tanh(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """One step of torch.nn.GRU's cell; the gates are stacked r, z, n."""
    x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step of torch.nn.LSTM's cell; the gates are stacked i, f, g, o."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def read_step(
    phi_i: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cell: str = "gru",
    norm: str = "rms",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """One layer of the recurrence; see :func:`pyeff.ops.read_step` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> gru = torch.nn.GRU(16, 8)
        >>> h = pyeff.reference.read_step(torch.randn(5, 16), None, gru.weight_ih_l0, gru.weight_hh_l0)
        >>> h.shape
        torch.Size([5, 8])
    """
    x = normalize(phi_i, norm, norm_weight, norm_bias, eps)
    before: Any = state
    if state is None:
        zero = x.new_zeros(*x.shape[:-1], w_hh.shape[1])
        before = (zero, zero) if cell == "lstm" else zero
    if cell == "lstm":
        h, c = before
        return lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    step = gru_cell if cell == "gru" else rnn_cell
    return step(x, before, w_ih, w_hh, b_ih, b_hh)


def read_recurrence(
    phi: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    cell: str = "gru",
    norm: str = "rms",
    eps: float = 1e-6,
    reduce: str = "mean",
) -> Tensor:
    """The whole recurrence; see :func:`pyeff.ops.read_recurrence` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> phi = [torch.randn(2, 5, 16) for _ in range(3)]
        >>> gru = torch.nn.GRU(16, 8)
        >>> pyeff.reference.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0).shape
        torch.Size([2, 5, 8])
    """
    state: Any = None
    total: Any = None
    given = h0 if h0 is not None else c0
    if given is not None:
        zero = torch.zeros_like(given)
        h0 = zero if h0 is None else h0
        state = (h0, zero if c0 is None else c0) if cell == "lstm" else h0
    for phi_i in phi:
        state = read_step(
            phi_i, state, w_ih, w_hh, b_ih, b_hh,
            norm_weight=norm_weight, norm_bias=norm_bias, cell=cell, norm=norm, eps=eps,
        )  # fmt: skip
        h = state[0] if cell == "lstm" else state
        total = h if total is None or reduce == "last" else total + h
    return total if reduce == "last" else total / len(phi)
