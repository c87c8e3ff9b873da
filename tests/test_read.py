"""READ against its float64 oracle: outputs and gradients over cells, norms, dtypes, shapes and strides."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import pyeff
from tests import helpers, places
from tests.helpers import CELLS, NORMS, REDUCTIONS, check_read, dtypes, make_read

EVERY_KIND = list(product(CELLS, NORMS))


def shape_id(value):
    return "x".join(map(str, value)) or "scalar" if isinstance(value, tuple) else None


@dtypes
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_forward(backend, cell, norm, reduce, dtype):
    for bias, state, affine in product((True, False), repeat=3):
        check_read(make_read(cell, norm, reduce, dtype=dtype, bias=bias, state=state, affine=affine))


@dtypes
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_gradients(kernels, cell, norm, reduce, dtype):
    for full in (True, False):
        call = make_read(cell, norm, reduce, dtype=dtype, bias=full, state=full, affine=full)
        for recompute in (False, True):
            check_read(call, call.tensors, recompute=recompute)


@pytest.mark.parametrize("name", ["b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0"])
@dtypes
def test_each_optional_argument_alone(kernels, name, dtype):
    """One optional argument given and the others not: none stands in for another."""
    call = make_read("lstm", "layer", dtype=dtype)
    optional = {"b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0"}
    for kept in ({name}, optional - {name}):
        some = helpers.Read({n: t for n, t in call.tensors.items() if n in kept or n not in optional}, call.options)
        check_read(some, some.tensors)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (63,), (500,)], ids=shape_id)
def test_leading_shapes(kernels, cell, lead, dtype):
    call = make_read(cell, "rms", lead=lead, dtype=dtype, d=20, r=7)
    check_read(call, call.tensors)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=shape_id)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_no_tokens(backend, cell, reduce, lead):
    """No token: an empty output, and gradients of zero for the weights."""
    call = make_read(cell, "layer", reduce, lead=lead, dtype=torch.float32)
    found = helpers.gradients(call, call.tensors, torch.zeros(*lead, call.rank))
    assert found["out"].shape == (*lead, call.rank)
    for name, t in call.tensors.items():
        assert found[name].shape == t.shape
        assert not found[name].any(), f"the gradient of {name} is not zero without a token"


@dtypes
@pytest.mark.parametrize(
    ("cell", "norm", "tokens", "layers", "d", "r"),
    [
        ("rnn", "rms", 63, 1, 63, 63),
        ("gru", "rms", 500, 3, 63, 16),
        ("gru", "layer", 63, 2, 1023, 33),
        ("lstm", "rms", 1023, 2, 48, 31),
        ("lstm", "none", 17, 2, 63, 17),
        ("rnn", "layer", 500, 2, 31, 100),
        ("gru", "none", 1023, 1, 500, 24),
        ("gru", "rms", 3, 1, 1, 1),
        ("lstm", "layer", 1, 1, 2, 1),
    ],
)
def test_odd_sizes(kernels, cell, norm, tokens, layers, d, r, dtype):
    call = make_read(cell, norm, lead=(tokens,), layers=layers, d=d, r=r, dtype=dtype)
    check_read(call, call.tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_wide_state(kernels, cell):
    dtype = torch.bfloat16 if cell == "rnn" else torch.float32
    call = make_read(cell, lead=(9,), layers=2, d=72, r=1024, dtype=dtype)
    check_read(call, call.tensors)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_many_layers(kernels, cell, dtype):
    call = make_read(cell, lead=(9,), layers=128, d=20, r=18, dtype=dtype)
    check_read(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", [k for k in helpers.STRIDES if k != "contiguous"])
@pytest.mark.parametrize(("cell", "norm"), [("gru", "rms"), ("lstm", "layer"), ("rnn", "none")])
def test_strided_phi(backend, cell, norm, kind, dtype):
    call = make_read(cell, norm, lead=(3, 4), d=19, r=9, dtype=dtype, strides=(kind,))
    assert kind == "permuted" or call.phi[0].stride() != make_read(cell, norm, lead=(3, 4), d=19, r=9).phi[0].stride()
    check_read(call, call.tensors)


@dtypes
def test_phi_of_different_strides(kernels, dtype):
    call = make_read("gru", "layer", lead=(3, 4), layers=7, d=19, r=9, dtype=dtype, strides=helpers.STRIDES)
    check_read(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", [k for k in helpers.STRIDES if k != "contiguous"])
@pytest.mark.parametrize("cell", CELLS)
def test_strided_weights_and_states(kernels, cell, kind, dtype):
    call = make_read(cell, "layer", lead=(3, 4), d=19, r=9, dtype=dtype, weight_strides=kind)
    check_read(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", helpers.STRIDES)
def test_strided_gradient(kernels, kind, dtype):
    """The incoming gradient may have any strides; that of ``out.sum()`` has strides of 0."""
    call = make_read("gru", lead=(3, 4), dtype=dtype)
    grad_out = helpers.lay_out(torch.randn(3, 4, call.rank).to(dtype), kind)
    check_read(call, call.tensors, grad_out=grad_out)
    check_read(call, call.tensors, grad_out=torch.ones((), dtype=dtype).expand(3, 4, call.rank))


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_some_phi_ask_for_gradients(kernels, cell, dtype):
    call = make_read(cell, "rms", layers=4, dtype=dtype)
    for wanted in (["phi0"], ["phi3"], ["phi1", "phi2"], ["phi0", "phi3", "w_ih"], ["phi2", "h0"]):
        check_read(call, wanted)


@pytest.mark.parametrize("backend_too", [False, True])
def test_one_tensor_for_every_layer(kernels, backend_too):
    """The same tensor at several depths gets the sum of their gradients."""
    phi = torch.randn(6, 12, dtype=places.here().dtypes[0], requires_grad=True)
    call = make_read("gru", lead=(6,), layers=1, d=12, r=5)
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}
    layers = [phi, phi.detach(), phi] if backend_too else [phi, phi]

    def gradient(function, dtype):
        rounded = {n: t.to(dtype) for n, t in weights.items()}
        return torch.autograd.grad(function([t.to(dtype) for t in layers], **rounded).square().sum(), phi)[0]

    found = gradient(pyeff.ops.read_recurrence, phi.dtype)
    same = gradient(pyeff.reference.read_recurrence, phi.dtype)
    truth = gradient(pyeff.reference.read_recurrence, torch.float64)
    helpers.assert_three_way("phi", found, same, truth, call.terms("phi0"))


@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_recompute_changes_nothing(kernels, cell, norm):
    call = make_read(cell, norm, lead=(37,), dtype=torch.float32)
    grad_out = torch.randn(37, call.rank)
    saved = helpers.gradients(call, call.tensors, grad_out, recompute=False)
    again = helpers.gradients(call, call.tensors, grad_out, recompute=True)
    for name in saved:
        assert torch.equal(saved[name], again[name]), name


@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_recompute_for_few_tokens(kernels, cell, norm):
    """Few tokens take a path with another order of additions for the saved gates, not for the recomputed ones."""
    call = make_read(cell, norm, lead=(7,), dtype=torch.float32)
    grad_out = torch.randn(7, call.rank)
    saved = helpers.gradients(call, call.tensors, grad_out, recompute=False)
    again = helpers.gradients(call, call.tensors, grad_out, recompute=True)
    assert torch.equal(saved["out"], again["out"])
    for name in call.tensors:
        slack = helpers.rounding(torch.float32, call.terms(name), saved[name].abs().max().item())
        assert helpers.error(saved[name], again[name]) <= slack, name


@dtypes
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_steps_chain_to_the_recurrence(backend, cell, norm, dtype):
    call = make_read(cell, norm, "last", lead=(2, 7), layers=4, dtype=dtype, state=cell != "lstm")
    options = {n: v for n, v in call.options.items() if n != "reduce"}
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi") and n not in ("h0", "c0")}

    def chain(step, to):
        state = call.tensors["h0"].to(to) if "h0" in call.tensors else None
        for phi_i in call.phi:
            state = step(phi_i.to(to), state, **{n: t.to(to) for n, t in weights.items()}, **options)
        return state

    fused, same = chain(pyeff.ops.read_step, dtype), chain(pyeff.reference.read_step, dtype)
    oracle = chain(pyeff.reference.read_step, torch.float64)
    if cell == "lstm":
        helpers.assert_three_way("c", fused[1], same[1], oracle[1], call.terms("out"))
        fused, same, oracle = fused[0], same[0], oracle[0]
    helpers.assert_three_way("h", fused, same, oracle, call.terms("out"))
    whole = call.to(torch.float64)(pyeff.reference.read_recurrence)
    helpers.assert_three_way("the chain", fused, same, whole, call.terms("out"))


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_through_steps(kernels, cell):
    """Gradients flow from step to step, through h and through c."""
    call = make_read(cell, "rms", "last", layers=3, state=False)
    options = {n: v for n, v in call.options.items() if n != "reduce"}

    def run(step, dtype):
        leaf = call.to(dtype).require_grad(call.tensors)
        weights = {n: t for n, t in leaf.tensors.items() if not n.startswith("phi")}
        state = None
        for phi_i in leaf.phi:
            state = step(phi_i, state, **weights, **options)
        # c as well as h, so that the gradient of each arrives.
        value = state.square().sum() if cell != "lstm" else state[0].square().sum() + state[1].sin().sum()
        return dict(zip(call.tensors, torch.autograd.grad(value, list(leaf.tensors.values())), strict=True))

    dtype = places.here().dtypes[0]
    fused, same = run(pyeff.ops.read_step, dtype), run(pyeff.reference.read_step, dtype)
    truth = run(pyeff.reference.read_step, torch.float64)
    for name in call.tensors:
        helpers.assert_three_way(name, fused[name], same[name], truth[name], call.terms(name))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@dtypes
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_nan_stays_in_its_token(backend, cell, norm, dtype, bad):
    """A token that is not finite spoils its own output (and gradient) and that of no other token."""
    call = make_read(cell, norm, lead=(70,), dtype=dtype, layers=2)
    clean = helpers.gradients(call, ["phi0", "phi1", "h0"], torch.ones(70, call.rank))
    call.tensors["phi1"][33, 5] = bad
    spoilt = helpers.gradients(call, ["phi0", "phi1", "h0"], torch.ones(70, call.rank))
    others = torch.arange(70) != 33
    for name, t in spoilt.items():
        assert torch.equal(t[others], clean[name][others]), name
    if math.isnan(bad):
        assert spoilt["out"][33].isnan().all()


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_repeats_are_bitwise_equal(backend, cell, dtype):
    call = make_read(cell, "layer", lead=(301,), dtype=dtype, d=65, r=33)
    grad_out = torch.randn(301, call.rank)
    first = helpers.gradients(call, call.tensors, grad_out)
    for _ in range(2):
        for name, t in helpers.gradients(call, call.tensors, grad_out).items():
            assert torch.equal(t, first[name]), name


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_thread_count_changes_no_bit(cpu_kernels, cell, dtype):
    """Tokens are shared out to threads, sums over tokens are not: no result depends on how many threads there are."""
    call = make_read(cell, "layer", lead=(613,), dtype=dtype, d=65, r=33)
    grad_out, threads, found = torch.randn(613, call.rank), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(helpers.gradients(call, call.tensors, grad_out))
    finally:
        torch.set_num_threads(threads)
    check_read(call, call.tensors)
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


@pytest.mark.parametrize("lead", [(2, 1, 2, 1, 2, 2, 1, 2), (2, 2, 2, 1, 2, 2, 2, 2, 2)], ids=shape_id)
def test_many_leading_dimensions(backend, lead):
    """More dimensions than a kernel can walk by strides, stored in an order that does not fold."""
    call = make_read("gru", lead=lead, layers=2, d=7, r=5, strides=("permuted",), dtype=torch.float32)
    check_read(call, call.tensors)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@dtypes
def test_outlying_values(kernels, norm, offset, dtype):
    """Hidden states of real networks have a few features that dwarf the others, and a mean far from zero."""
    call = make_read("gru", norm, lead=(40,), d=96, r=24, dtype=dtype)
    for phi_i in call.phi:
        phi_i[:, 7] *= 300
        phi_i += offset
    check_read(call, call.tensors)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps(backend, norm, eps):
    call = make_read("gru", norm, eps=eps, dtype=torch.float32)
    for phi_i in call.phi:
        phi_i *= 1e-2
    check_read(call, call.tensors)


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_of_zeros(backend, norm):
    """The norm of a zero token is zero by its eps: finite values, finite gradients."""
    call = make_read("gru", norm)
    for phi_i in call.phi:
        phi_i[2] = 0
    check_read(call, call.tensors)


def test_float16_is_served_by_the_reference():
    call = make_read("gru", dtype=torch.float16)
    with pyeff.backend("auto"):
        assert torch.equal(call(), call(pyeff.reference.read_recurrence))


def test_unbound_tensor_of_layers(backend):
    """phi may be any sequence, a stacked tensor or a tuple too."""
    call = make_read("gru")
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}
    expected = call()
    for phi in (tuple(call.phi), torch.stack(call.phi)):
        assert torch.equal(pyeff.ops.read_recurrence(phi, **weights), expected)


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers_whose_squares_overflow(backend, tokens, dtype):
    """They are normalised to nothing, as by the definition, and never overflow in a product first."""
    phi = torch.randn(tokens, 33, dtype=torch.float64).to(dtype)
    phi[3] = 3e38
    weights = [torch.randn(30, n, dtype=torch.float64).to(dtype) for n in (33, 10)]
    for layer in (phi, phi.t().contiguous().t()):
        out = pyeff.ops.read_recurrence([layer, layer], *weights)
        assert out.isfinite().all()
        with pyeff.backend("reference"):
            expected = pyeff.ops.read_recurrence([layer, layer], *weights)
        torch.testing.assert_close(out[3], expected[3])
