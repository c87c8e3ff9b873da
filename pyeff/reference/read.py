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

# The options by name; of a cell, how many gates its weights stack.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
NORMS = ("rms", "layer", "none")
REDUCTIONS = ("mean", "last")


def check_options(
    op: str, cell: str, norm: str, eps: float, reduce: str, norm_weight: object, norm_bias: object, c0: object = None
) -> None:
    """Raises ValueError for an unknown option, or for a tensor that the options leave no place for."""
    for name, value, known in (("cell", cell, GATES), ("norm", norm, NORMS), ("reduce", reduce, REDUCTIONS)):
        if value not in tuple(known):
            raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    # A number of torch.compile's is a SymFloat.
    if not isinstance(eps, int | float | torch.SymFloat) or not eps >= 0 or eps == float("inf"):
        raise ValueError(f"{op}: eps is {eps!r}, expected a finite number of at least 0")
    if norm == "none" and norm_weight is not None:
        raise ValueError(f"{op}: norm_weight was given with norm='none', expected None")
    if norm != "layer" and norm_bias is not None:
        raise ValueError(f"{op}: norm_bias was given with norm={norm!r}, expected None (only norm='layer' has a bias)")
    if cell != "lstm" and c0 is not None:
        name = "state (c)" if op == "read_step" else "c0"
        raise ValueError(f"{op}: {name} was given with cell={cell!r}, expected None (only the lstm has a cell state)")


def check_layers(op: str, phi: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is a layer to read."""
    if not len(phi):
        raise ValueError(f"{op}: phi is empty, expected at least one layer output")


def split_state(state: object, cell: str) -> tuple[Tensor | None, Tensor | None]:
    """h and c of a state as read_step takes it; raises ValueError where it is not one of this cell."""
    if state is None:
        return None, None
    if isinstance(state, Tensor) and cell != "lstm":
        return state, None
    found = "one tensor" if isinstance(state, Tensor) else f"a {type(state).__name__}"
    if isinstance(state, tuple | list):
        if cell == "lstm" and len(state) == 2 and all(isinstance(t, Tensor) for t in state):
            return state[0], state[1]
        found += f" of {', '.join(type(t).__name__ for t in state) or 'nothing'}"
    expected = "(h, c), two tensors," if cell == "lstm" else "one tensor"
    raise ValueError(f"read_step: state is {found}, expected None or {expected} for cell={cell!r}")


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

    Raises:
        ValueError: an unknown option, a tensor that the options leave no place for, or a state of another cell.

    Example:
        >>> import torch, pyeff
        >>> gru = torch.nn.GRU(16, 8)
        >>> h = pyeff.reference.read_step(torch.randn(5, 16), None, gru.weight_ih_l0, gru.weight_hh_l0)
        >>> h.shape
        torch.Size([5, 8])
    """
    check_options("read_step", cell, norm, eps, "last", norm_weight, norm_bias)
    split_state(state, cell)
    return _step(phi_i, state, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, cell, norm, eps)


def _step(phi_i, state: Any, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, cell, norm, eps) -> Any:
    x = normalize(phi_i, norm, norm_weight, norm_bias, eps)
    if state is None:
        zero = x.new_zeros(*x.shape[:-1], w_hh.shape[1])
        state = (zero, zero) if cell == "lstm" else zero
    if cell == "lstm":
        h, c = state
        return lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    return {"gru": gru_cell, "rnn": rnn_cell}[cell](x, state, w_ih, w_hh, b_ih, b_hh)


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

    Raises:
        ValueError: an unknown option, a tensor that the options leave no place for, or no layer.

    Example:
        >>> import torch, pyeff
        >>> phi = [torch.randn(2, 5, 16) for _ in range(3)]
        >>> gru = torch.nn.GRU(16, 8)
        >>> pyeff.reference.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0).shape
        torch.Size([2, 5, 8])
    """
    check_options("read_recurrence", cell, norm, eps, reduce, norm_weight, norm_bias, c0)
    check_layers("read_recurrence", phi)
    state: Any = None
    total: Any = None
    given = h0 if h0 is not None else c0
    if given is not None:
        zero = torch.zeros_like(given)
        h0 = zero if h0 is None else h0
        state = (h0, zero if c0 is None else c0) if cell == "lstm" else h0
    for phi_i in phi:
        state = _step(phi_i, state, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, cell, norm, eps)
        h = state[0] if cell == "lstm" else state
        total = h if total is None or reduce == "last" else total + h
    return total if reduce == "last" else total / len(phi)
