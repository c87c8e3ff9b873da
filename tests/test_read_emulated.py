"""READ at the smallest shapes that reach every path of a GPU's kernel, few enough for Triton's interpreter.

A call is made once where the other files make it over a grid. The same tests run at every other place, too.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import pyeff
from tests import helpers, places
from tests.conftest import place_fixture
from tests.helpers import CELLS, NORMS, check_read, gpu_dtypes, make_read

pytestmark = pytest.mark.emulated
triton_emulated = place_fixture([place for place in places.KERNELS if place == ("triton", "cpu")])
EVERY_KIND = list(product(CELLS, NORMS))
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@gpu_dtypes
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_output_and_gradients(kernels, cell, norm, dtype):
    call = make_read(cell, norm, lead=(3,), layers=2, d=20, r=10, dtype=dtype)
    check_read(call, call.tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_must_be_given(kernels, cell):
    call = make_read(cell, "rms", "last", lead=(3,), layers=2, bias=False, state=False, affine=False)
    check_read(call)
    check_read(call, call.tensors)


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "layer"), ("gru", "rms"), ("lstm", "none")])
def test_gates_computed_again(kernels, cell, norm):
    call = make_read(cell, norm, lead=(5,), layers=3)
    check_read(call, call.tensors, recompute=True)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_backbone(kernels, cell):
    """The main use: weights train, no phi does."""
    call = make_read(cell, "rms", lead=(5,), layers=2)
    check_read(call, [name for name in call.tensors if name not in ("h0", "c0") and not name.startswith("phi")])


@pytest.mark.parametrize("wanted", [["phi1"], ["h0"], ["w_hh"], ["norm_weight", "norm_bias"]], ids="-".join)
def test_some_gradients(kernels, wanted):
    check_read(make_read("lstm", "layer", layers=2), wanted)


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "rms"), ("gru", "layer"), ("lstm", "rms")])
@halves
def test_more_than_a_tile_of_everything(kernels, cell, norm, dtype):
    """Tiles are of 128 tokens at most, of 64 to 256 gates and of 64 features; none of these divides the sizes."""
    call = make_read(cell, norm, lead=(131,), layers=2, d=135, r=70, dtype=dtype)
    check_read(call, call.tensors)


@halves
def test_more_steps_than_stages(kernels, dtype):
    """Along the features a stage holds 64 and there are four at most: here the first ones are filled again."""
    call = make_read("gru", lead=(3,), layers=1, d=461, r=44, dtype=dtype)
    check_read(call, call.tensors)


def test_more_than_a_tile_in_float32(kernels):
    call = make_read("gru", "layer", lead=(131,), layers=1, d=70, r=35, dtype=torch.float32)
    check_read(call, call.tensors)


@halves
def test_rank_of_the_paper(kernels, dtype):
    """256 is the largest that keeps the recurrent weights on chip; 257 does not fit."""
    for rank in (256, 257):
        call = make_read("gru", lead=(2,), layers=2, d=16, r=rank, dtype=dtype)
        check_read(call, ["w_ih", "w_hh", "h0"])


def test_one_of_everything(kernels):
    check_read(call := make_read("gru", lead=(1,), layers=1, d=1, r=1), call.tensors)
    check_read(make_read("rnn", lead=(), layers=1))


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_no_tokens(kernels, lead):
    call = make_read("lstm", "layer", lead=lead)
    found = helpers.gradients(call, call.tensors, torch.zeros(*lead, call.rank))
    assert found["out"].shape == (*lead, call.rank)
    assert not any(found[name].any() for name in call.tensors)


def test_strides(kernels):
    call = make_read("gru", "rms", lead=(3, 4), layers=6, d=19, r=9, strides=helpers.STRIDES, weight_strides="sliced")
    check_read(call, call.tensors)


@gpu_dtypes
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_outlying_values(kernels, norm, dtype):
    """A feature that dwarfs the others, and a mean far from zero: the statistics must not cancel."""
    call = make_read("gru", norm, lead=(5,), layers=1, d=96, r=12, dtype=dtype)
    call.phi[0][:, 7] *= 300
    call.phi[0].add_(30)
    check_read(call, call.tensors)


@gpu_dtypes
@pytest.mark.parametrize("ratio", [32, 128])
@pytest.mark.parametrize("r", [12, 64])
def test_means_far_from_zero(kernels, ratio, r, dtype):
    """The weight's gradient: a mean that is taken off a product must be the mean of what was multiplied."""
    call = make_read("gru", "layer", lead=(70,), layers=2, d=136, r=r, dtype=dtype)
    for phi_i in call.phi:
        phi_i.add_(1.5 * ratio)
    check_read(call, [name for name in call.tensors if not name.startswith("phi")])


@pytest.mark.parametrize(("size", "gradient"), [(1e-3, 300.0), (500.0, 1e-3)])
@pytest.mark.parametrize("r", [12, 64])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_rows_far_from_one(kernels, size, gradient, r, dtype):
    """float16 holds the gradients and the normalised rows, but not every gradient times a row's rstd."""
    call = make_read("gru", lead=(70,), layers=2, d=136, r=r, dtype=dtype)
    for phi_i in call.phi:
        phi_i.mul_(size)
    grad_out = (gradient * torch.randn(70, r)).to(dtype)
    check_read(call, [name for name in call.tensors if not name.startswith("phi")], grad_out=grad_out)


def test_squares_that_overflow(kernels):
    """Normalised to nothing, as by the definition."""
    call = make_read("gru", lead=(5,), layers=2, dtype=torch.float32)
    for phi_i in call.phi:
        phi_i[3] = 3e38
    out, expected = call(), call(pyeff.reference.read_recurrence)
    assert out.isfinite().all()
    torch.testing.assert_close(out[3], expected[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_token(kernels, bad):
    call = make_read("gru", "rms", lead=(9,), layers=2)
    names, ones = ["phi0", "phi1", "h0"], torch.ones(9, call.rank)
    clean = helpers.gradients(call, names, ones)
    call.tensors["phi1"][4, 5] = bad
    spoilt, others = helpers.gradients(call, names, ones), torch.arange(9) != 4
    assert all(torch.equal(spoilt[name][others], clean[name][others]) for name in clean)
    assert spoilt["out"][4].isnan().all() or not math.isnan(bad)


@pytest.mark.parametrize("cell", CELLS)
def test_repeats_are_bitwise_equal(kernels, cell):
    call = make_read(cell, "layer", lead=(67,), layers=1, d=33, r=17)
    grad_out = torch.randn(67, call.rank)
    first, again = (helpers.gradients(call, call.tensors, grad_out) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_one_layer(kernels, cell):
    call = make_read(cell, "rms", "last", layers=1)
    state = (call.tensors["h0"], call.tensors["c0"]) if cell == "lstm" else call.tensors["h0"]
    rest = {name: t for name, t in call.tensors.items() if name not in ("phi0", "h0", "c0")}
    stepped = pyeff.ops.read_step(call.phi[0], state, **rest, cell=cell)
    assert torch.equal(stepped[0] if cell == "lstm" else stepped, call())


@pytest.mark.parametrize("layers", [3, 24])
@pytest.mark.parametrize("cell", CELLS)
def test_launches_do_not_depend_on_the_layers(triton_emulated, cell, layers, monkeypatch):
    """Three kernels forward, eight more backward: as many as for one layer. On a device, test_read_cuda counts them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched, launch = [], interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn) or launch(self, *a, **k)
    )
    call = make_read(cell, lead=(3,), layers=layers, d=16, r=8, dtype=torch.float32, state=False)
    call()
    assert len(launched) <= 3
    forward = len(launched)
    helpers.gradients(call, [name for name in call.tensors if not name.startswith("phi")], torch.ones(3, 8))
    assert len(launched) - 2 * forward <= 8


@halves
def test_float32_phi_under_autocast(kernels, dtype):
    """The kernels round phi as they read it."""
    call = make_read("gru", lead=(5,), layers=2, dtype=torch.float32)
    rounded = call.to(dtype)
    with torch.autocast(places.here().device, dtype):
        out = call()
    truth = rounded.to(torch.float64)(pyeff.reference.read_recurrence)
    helpers.assert_three_way("out", out, rounded(pyeff.reference.read_recurrence), truth, call.terms("out"), 1.0)
