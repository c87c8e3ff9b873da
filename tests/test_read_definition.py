"""The oracle itself: the reference against torch.nn's cells and norms, and against the equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyeff
from tests.helpers import CELLS, NORMS, REDUCTIONS, make_read

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def normalized(call):
    """The inputs of the cell by torch's own norms."""
    weight, bias = call.tensors.get("norm_weight"), call.tensors.get("norm_bias")
    eps = call.options["eps"]
    if call.options["norm"] == "rms":
        return [F.rms_norm(phi_i, (call.width,), weight, eps) for phi_i in call.phi]
    if call.options["norm"] == "layer":
        return [F.layer_norm(phi_i, (call.width,), weight, bias, eps) for phi_i in call.phi]
    return call.phi


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize(("bias", "state"), [(True, True), (False, False)])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch_nn(cell, norm, reduce, state, bias, eps):
    """Each token is a sequence of L steps for torch.nn.RNN, GRU and LSTM, with the same layout of weights."""
    call = make_read(cell, norm, reduce, lead=(2, 3), layers=4, state=state, bias=bias, eps=eps)
    module = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](
        call.width, call.rank, bias=bias, dtype=torch.float64
    )
    names = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
    module.load_state_dict({theirs: call.tensors[ours] for theirs, ours in names.items() if ours in call.tensors})
    first = tuple(call.tensors[n].reshape(1, -1, call.rank) for n in ("h0", "c0") if n in call.tensors)
    steps = torch.stack(normalized(call)).reshape(4, -1, call.width)
    states, _ = module(steps, None if not first else first if cell == "lstm" else first[0])
    expected = states.mean(0) if reduce == "mean" else states[-1]
    torch.testing.assert_close(
        call(pyeff.reference.read_recurrence), expected.reshape(2, 3, call.rank).detach(), **CLOSE
    )


def test_against_the_equations():
    """The GRU with an RMS norm, the paper's usual choice, written out once more without torch."""
    call = make_read("gru", "rms", layers=3)
    a = {n: t.numpy() for n, t in call.tensors.items()}
    (wr, wz, wn), (rr, rz, rn) = np.split(a["w_ih"], 3), np.split(a["w_hh"], 3)
    (br, bz, bn), (cr, cz, cn) = np.split(a["b_ih"], 3), np.split(a["b_hh"], 3)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    out = np.zeros((5, call.rank))
    for token in range(5):
        h = a["h0"][token]
        for layer in range(3):
            phi = a[f"phi{layer}"][token]
            x = a["norm_weight"] * phi / np.sqrt((phi**2).mean() + call.options["eps"])
            r = sigmoid(wr @ x + br + rr @ h + cr)
            z = sigmoid(wz @ x + bz + rz @ h + cz)
            n = np.tanh(wn @ x + bn + r * (rn @ h + cn))
            h = (1 - z) * n + z * h
            out[token] += h / 3
    np.testing.assert_allclose(call(pyeff.reference.read_recurrence).numpy(), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_statistics_are_taken_in_float32(norm, dtype):
    """Squares of half-precision numbers overflow or drown in their own dtype."""
    call = make_read("gru", norm, dtype=dtype)
    for phi_i in call.phi:
        phi_i *= 300  # 300^2 is past float16's range
    exact = call.to(torch.float64)(pyeff.reference.read_recurrence)
    found = call(pyeff.reference.read_recurrence).double()
    assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps


def test_step_without_a_state_starts_at_zero():
    for cell in CELLS:
        call = make_read(cell, layers=1, state=False)
        weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
        zero = torch.zeros(5, call.rank, dtype=torch.float64)
        first = pyeff.reference.read_step(call.phi[0], None, **weights, cell=cell)
        given = pyeff.reference.read_step(call.phi[0], (zero, zero) if cell == "lstm" else zero, **weights, cell=cell)
        torch.testing.assert_close(first, given, rtol=0, atol=0)
