"""READ's loop with the norm folded into the weights, in plain PyTorch with a backward by hand: the strongest rival.

With ``W' = W * gamma``, ``W x_i = rstd_i * (W' phi_i)``; in the backward ``S = sum_i (da_i * rstd_i)^T phi_i`` gives
``dW = S * gamma`` and ``dgamma = colsum(W * S)``, so that no gradient of width d is formed. Both directions are
unrolled over the layers and compiled as one graph each. RMS norm, no first state, mean over the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .compiled import compiled

Pair = tuple[Tensor, Tensor]


def rstd(phi: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, [N, 1] in float32."""
    return torch.rsqrt(phi.float().square().mean(-1, keepdim=True) + eps)


def cell_forward(cell: str, a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One step from the products of both sides.

    Args:
        cell (str): ``"rnn"``, ``"gru"`` or ``"lstm"``.
        a, b (Tensor): [N, g r] in float32, ``W x + b_ih`` and ``R h + b_hh``.
        h, c (Tensor): [N, r] in float32, the state before; c is for the LSTM only.

    Returns:
        tuple: h and c after, and what the backward needs of the step, [N, r] each.
    """
    if cell == "rnn":
        h = torch.tanh(a + b)
        return h, c, ()
    if cell == "gru":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return (1 - z) * n + z * h, c, (r, z, n, b_n)
    i, f, g, o = (a + b).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c, (i, f, g, o)


def cell_backward(
    cell: str, dh: Tensor, dc: Tensor, h: Tensor, h_before: Tensor, c: Tensor, c_before: Tensor, saved: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a and b, and what goes straight on to h and c before (beside ``db R``)."""
    if cell == "rnn":
        da = dh * (1 - h * h)
        return da, da, torch.zeros_like(dh), dc
    if cell == "gru":
        r, z, n, b_n = saved
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h_before - n) * z * (1 - z)
        dr = dn * b_n * r * (1 - r)
        return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), dh * z, dc
    i, f, g, o = saved
    t = torch.tanh(c)
    dc = dc + dh * o * (1 - t * t)
    da = torch.cat((dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)), -1)
    return da, da, torch.zeros_like(dh), dc * f


def forward(
    phi: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    gamma: Tensor,
    cell: str,
    eps: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """The mean of the states; with ``save`` also the states [L, N, r], rstd [L, N, 1], c, and what a step saves."""
    rank, dtype = w_hh.shape[1], w_ih.dtype
    folded = w_ih * gamma
    h = c = torch.zeros(phi[0].shape[0], rank, dtype=torch.float32, device=w_ih.device)
    total = torch.zeros_like(h)
    states, cells, scales, gates = [], [], [], []
    for phi_i in phi:
        scale = rstd(phi_i, eps)
        a = (phi_i @ folded.T).float() * scale + b_ih.float()
        b = (h.to(dtype) @ w_hh.T).float() + b_hh.float()
        h, c, saved = cell_forward(cell, a, b, h, c)
        total = total + h
        if save:
            states.append(h.to(dtype))
            scales.append(scale)
            cells.append(c.to(dtype))
            gates.append(torch.cat([t.to(dtype) for t in saved], -1) if saved else states[-1][:, :0])
    out = (total / len(phi)).to(dtype)
    if not save:
        return (out,)
    kept_cells = torch.stack(cells) if cell == "lstm" else out[:0]
    return out, torch.stack(states), torch.stack(scales), kept_cells, torch.stack(gates)


def backward(
    grad: Tensor, phi: list[Tensor], w_ih: Tensor, w_hh: Tensor, gamma: Tensor, states: Tensor, scales: Tensor,
    cells: Tensor, gates: Tensor, cell: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of w_ih, w_hh, b_ih, b_hh and gamma."""
    layers, dtype, rank = len(phi), w_ih.dtype, w_hh.shape[1]
    zero = torch.zeros_like(states[0], dtype=torch.float32)
    direct = grad.float() / layers
    dh, dc = direct, zero
    s = torch.zeros_like(w_ih, dtype=torch.float32)
    db_ih = db_hh = torch.zeros(w_ih.shape[0], dtype=torch.float32, device=w_ih.device)
    db_all: list[Tensor] = [zero] * layers
    for i in reversed(range(layers)):
        h, h_before = states[i].float(), (states[i - 1].float() if i else zero)
        c = cells[i].float() if cell == "lstm" else zero
        c_before = cells[i - 1].float() if cell == "lstm" and i else zero
        saved = gates[i].float().split(rank, -1) if gates.shape[-1] else ()
        da, db, straight, dc = cell_backward(cell, dh, dc, h, h_before, c, c_before, saved)
        db_all[i] = db.to(dtype)
        dh = (db_all[i] @ w_hh).float() + straight + direct
        s = s + (da * scales[i]).to(dtype).T @ phi[i]
        db_ih = db_ih + da.sum(0)
        if cell == "gru":
            db_hh = db_hh + db.sum(0)
    # The first state is zero, so that the first layer adds nothing to dw_hh.
    dw_hh = (
        torch.stack(db_all[1:]).flatten(0, 1).T @ states[:-1].flatten(0, 1) if layers > 1 else torch.zeros_like(w_hh)
    )
    dw_ih, dgamma = (s * gamma).to(dtype), (w_ih * s).sum(0).to(dtype)
    return dw_ih, dw_hh, db_ih.to(dtype), (db_hh if cell == "gru" else db_ih.clone()).to(dtype), dgamma


@functools.cache
def compiled_pair(cell: str, dtype: torch.dtype, save: bool, device: str = "cpu") -> tuple:
    """Both directions, compiled once for a cell, dtype, mode and device."""
    return compiled(forward, device), compiled(backward, device) if save else None


class Folded(torch.autograd.Function):
    """The compiled pair as one differentiable function of the weights; phi gets no gradient."""

    @staticmethod
    def forward(ctx, cell: str, eps: float, w_ih, w_hh, b_ih, b_hh, gamma, *phi) -> Tensor:  # type: ignore[override]
        run, _ = compiled_pair(cell, w_ih.dtype, True, w_ih.device.type)
        out, *kept = run(list(phi), w_ih, w_hh, b_ih, b_hh, gamma, cell, eps, True)
        ctx.cell = cell
        ctx.save_for_backward(w_ih, w_hh, gamma, *kept, *phi)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:  # type: ignore[override]
        w_ih, w_hh, gamma, states, scales, cells, gates, *phi = ctx.saved_tensors
        _, run = compiled_pair(ctx.cell, w_ih.dtype, True, w_ih.device.type)
        grads = run(grad, phi, w_ih, w_hh, gamma, states, scales, cells, gates, ctx.cell)
        return (None, None, *grads, *(None for _ in phi))
