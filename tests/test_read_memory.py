"""What READ keeps for its backward, and what it does not."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyeff
from tests import helpers
from tests.helpers import CELLS, NORMS, dtypes, make_read

EVERY_KIND = list(product(CELLS, NORMS))


def saved(call: helpers.Read, recompute: bool) -> list[torch.Tensor]:
    """What the graph of a call holds, with all derivatives but those of the layers' outputs wanted."""
    call = call.require_grad(n for n in call.tensors if not n.startswith("phi"))
    return helpers.kept_for_backward(lambda: call(recompute=recompute), call.tensors.values())


@pytest.mark.parametrize("recompute", [False, True])
@dtypes
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_saved_for_backward(kernels, cell, norm, dtype, recompute):
    """A token costs its states, the norm's statistics and (unless recomputed) its gates: nothing of width d."""
    layers, r, d = 3, 32, 208
    less = saved(make_read(cell, norm, lead=(256,), layers=layers, d=d, r=r, dtype=dtype), recompute)
    kept = saved(make_read(cell, norm, lead=(512,), layers=layers, d=d, r=r, dtype=dtype), recompute)
    few, many = helpers.bytes_of(less), helpers.bytes_of(kept)
    states = layers * r * (2 if cell == "lstm" else 1)
    gates = 0 if recompute or cell == "rnn" else layers * 4 * r
    statistics = {"rms": 1, "layer": 2, "none": 0}[norm] * layers
    allowed = (states + gates) * dtype.itemsize + statistics * max(4, dtype.itemsize)
    assert few > 0
    assert (many - few) / 256 <= allowed
    assert not [t.shape for t in kept if d in t.shape and t.numel() >= 512 * d]


def test_the_documented_bytes_a_token():
    """The table in docs/read.md, its columns of the definition included, is what the hooks count."""
    page = Path(pyeff.__file__).resolve().parents[1] / "docs" / "read.md"
    if not page.exists():
        pytest.skip("these are not the sources")
    rows = re.findall(r"^\| (RNN|GRU|LSTM) \| ([\d,]+(?: \| [\d,]+){5}) \|$", page.read_text(), re.M)
    assert [cell for cell, _ in rows] == ["RNN", "GRU", "LSTM"]
    helpers.need("read_recurrence", "cpu")

    def a_token(backend, recompute, **kind):
        with pyeff.backend(backend):
            counts = [
                helpers.bytes_of(saved(make_read(lead=(n,), layers=12, d=768, r=256, state=False, **kind), recompute))
                for n in (64, 96)
            ]
        return (counts[1] - counts[0]) // 32

    for cell, numbers in rows:
        counted = [
            a_token(backend, recompute, cell=cell.lower(), norm="rms", dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for backend, recompute in (("cpu", False), ("cpu", True), ("reference", False))
        ]
        assert [int(number.replace(",", "")) for number in numbers.split(" | ")] == counted, cell


class Allocations(TorchDispatchMode):
    """Counts the elements of what READ's forward returns beside its results."""

    kept = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        if function is torch.ops.pyeff.read_forward.default:
            self.kept += sum(t.numel() for t in found[2:])
        return found


@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_nothing_is_kept_without_gradients(kernels, cell, norm):
    """Inference allocates no states, gates or statistics."""
    call = make_read(cell, norm)
    with Allocations() as frozen:
        assert not call().requires_grad
    with Allocations() as no_grad, torch.no_grad():
        call.require_grad(["w_ih"])()
    assert frozen.kept == no_grad.kept == 0
    with Allocations() as training:
        call.require_grad(["w_ih"])()
    assert training.kept > 0


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_past_2_to_the_31_elements(cell):
    """Without memory: what is kept for three million tokens, and their gradients."""
    tokens, layers, d, r = 3_000_000, 12, 768, 256
    rows = helpers.GATES[cell] * r
    with FakeTensorMode():
        phi = [torch.empty(tokens, d, dtype=torch.bfloat16, device="cpu") for _ in range(layers)]
        weights = [torch.empty(rows, k, dtype=torch.bfloat16, device="cpu") for k in (d, r)]
        tensors, options = (phi, *weights, *(None,) * 6), (cell, "rms", 1e-6, "mean")
        out, _, h, c, gates, stats = torch.ops.pyeff.read_forward(*tensors, *options, 2, "cpu")
        assert out.shape == (tokens, r)
        assert h.shape == (layers, tokens, r)
        assert h.numel() > 2**31
        assert c.numel() == (h.numel() if cell == "lstm" else 0)
        assert gates.numel() == (0 if cell == "rnn" else 4 * h.numel())
        assert stats.shape == (1, layers, tokens)
        needs = [True, True, *(False,) * 6]
        dphi, dw_ih, dw_hh, *_ = torch.ops.pyeff.read_backward(
            out, None, *tensors, h, c, gates, stats, *options, [True] * layers, needs, "cpu"
        )
    assert dphi.shape == (layers, tokens, d)
    assert (dw_ih.shape, dw_hh.shape) == ((rows, d), (rows, r))
