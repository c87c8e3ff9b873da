"""READ under torch.compile and under autocast."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pyeff
from tests import helpers, places
from tests.helpers import CELLS, make_read


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def agree(call: helpers.Read, function) -> None:
    """``function`` gives what the op gives, and the same gradients."""
    grad_out = torch.randn(*call.phi[0].shape[:-1], call.rank)
    expected = helpers.gradients(call, call.tensors, grad_out)
    found = helpers.gradients(call, call.tensors, grad_out, function)
    for name in expected:
        scale = expected[name].abs().max().item()
        assert helpers.error(found[name], expected[name]) <= helpers.rounding(
            expected[name].dtype, call.terms(name), scale
        ), name


@pytest.mark.parametrize("norm", helpers.NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_fullgraph(backend, cell, norm):
    agree(make_read(cell, norm, dtype=torch.float32), compiled(pyeff.ops.read_recurrence))


def test_fullgraph_with_strided_inputs_and_recomputation(backend):
    call = make_read("lstm", "layer", lead=(3, 4), layers=6, strides=helpers.STRIDES, dtype=torch.float32)
    agree(call, compiled(lambda *a, **k: pyeff.ops.read_recurrence(*a, recompute=True, **k)))


def test_no_gradient_under_compile(backend):
    call = make_read("gru", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(call(compiled(pyeff.ops.read_recurrence)), call())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_step_under_compile(backend, cell):
    call = make_read(cell, layers=2, dtype=torch.float32, state=False)
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}

    def two_steps(first, second):
        state = pyeff.ops.read_step(first, None, **weights, cell=cell)
        return pyeff.ops.read_step(second, state, **weights, cell=cell)

    found, expected = compiled(two_steps)(*call.phi), two_steps(*call.phi)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_new_token_count_compiles_nothing(backend, cell, training):
    counter = CompileCounterWithBackend("aot_eager")
    weights = make_read(cell, state=False, dtype=torch.float32).require_grad(["w_ih", "w_hh"] if training else [])
    weights = {n: t for n, t in weights.tensors.items() if not n.startswith("phi")}

    @compiled_with(counter)
    def function(phi):
        return pyeff.ops.read_recurrence(phi, **weights, cell=cell)

    for tokens in (5, 7, 64, 33, 500):
        phi = [torch.randn(tokens, 24) for _ in range(3)]
        for phi_i in phi:
            torch._dynamo.mark_dynamic(phi_i, 0)
        out = function(phi)
        assert torch.equal(out, pyeff.ops.read_recurrence(phi, **weights, cell=cell))
        if training:
            out.sum().backward()
    assert counter.frame_count == 1


def compiled_with(counter, **options):
    return lambda function: torch.compile(function, backend=counter, fullgraph=True, **options)


def test_batch_and_length_may_both_change(backend):
    """Without a mark: the first call is taken as fixed, the second makes sizes dynamic, and that is the last time."""
    counter = CompileCounterWithBackend("aot_eager")
    call = make_read("gru", state=False, dtype=torch.float32)
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}
    function = compiled_with(counter)(lambda phi: pyeff.ops.read_recurrence(phi, **weights))
    for batch, length in ((2, 6), (3, 9), (8, 64), (5, 17), (4, 33)):
        phi = [torch.randn(batch, length, 24) for _ in range(3)]
        assert torch.equal(function(phi), pyeff.ops.read_recurrence(phi, **weights))
    assert counter.frame_count <= 2


def test_dynamic_from_the_start(backend):
    counter = CompileCounterWithBackend("aot_eager")
    call = make_read("lstm", state=False, dtype=torch.float32)
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}
    function = compiled_with(counter, dynamic=True)(lambda phi: pyeff.ops.read_recurrence(phi, **weights, cell="lstm"))
    compilations = set()
    for tokens in (6, 9, 64, 17):
        phi = [torch.randn(tokens, 24) for _ in range(3)]
        assert torch.equal(function(phi), pyeff.ops.read_recurrence(phi, **weights, cell="lstm"))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "a new token count was compiled again"


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(backend):
    agree(make_read("gru", "rms", dtype=torch.float32), compiled(pyeff.ops.read_recurrence, "inductor"))


def test_choice_of_backend_reaches_compiled_code(kernels):
    """A function that was compiled under one backend runs another one when it is asked to."""
    counter = CompileCounterWithBackend("eager")
    function = compiled_with(counter)(pyeff.ops.read_recurrence)
    call = make_read("gru", dtype=torch.float32)

    def kept_by(name: str) -> int:
        kept = []
        with pyeff.backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
            leaf = call.require_grad(["w_ih", "w_hh"])
            assert leaf(function).requires_grad
        return len(kept)

    # The reference saves every intermediate of every layer; the kernels a handful of tensors.
    first, fused, again = kept_by("reference"), kept_by(kernels), kept_by("reference")
    assert first == again
    assert fused < first


def test_choice_that_cannot_serve_raises_under_compile(backend):
    function = torch.compile(pyeff.ops.read_recurrence, backend="eager")
    call = make_read("gru", dtype=torch.float32)
    assert torch.equal(call(function), call())
    # Another device's; and of those that can be emulated on the CPU, none computes in float64.
    other = "cpu" if places.here().device == "cuda" else "triton"
    with pyeff.backend(other), pytest.raises(Exception, match=other):
        make_read("gru", dtype=torch.float64)(function)


def check_autocast(call: helpers.Read, dtype: torch.dtype, wide: bool, function=None) -> None:
    """A float32 call under autocast is as good as the call in its dtype; gradients come back in their inputs' dtypes.

    With ``wide`` phi is in float32, too, else in autocast's dtype.
    """
    mixed = call.map(lambda t: t)
    for i, phi_i in enumerate(call.phi):
        mixed.tensors[f"phi{i}"] = phi_i if wide else phi_i.to(dtype)
    leaves = mixed.require_grad(mixed.tensors)
    with torch.autocast(places.here().device, dtype):
        out = leaves(function)
    assert out.dtype == dtype
    grad_out = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, list(leaves.tensors.values()), grad_out)
    rounded = call.to(dtype)
    same = helpers.gradients(rounded, call.tensors, grad_out, pyeff.reference.read_recurrence)
    truth = helpers.gradients(rounded.to(torch.float64), call.tensors, grad_out, pyeff.reference.read_recurrence)
    helpers.assert_three_way("out", out, same["out"], truth["out"], call.terms("out"))
    for name, grad in zip(call.tensors, found, strict=True):
        assert grad.dtype == mixed.tensors[name].dtype
        helpers.assert_three_way(name, grad.to(dtype), same[name], truth[name], call.terms(name))


# Those of the two that are computed in at the place.
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
phi_dtypes = pytest.mark.parametrize("wide", [True, False], ids=["phi_float32", "phi_half"])


@phi_dtypes
@halves
@pytest.mark.parametrize("norm", helpers.NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(backend, cell, norm, dtype, wide):
    check_autocast(make_read(cell, norm, dtype=torch.float32), dtype, wide)


@phi_dtypes
@halves
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_under_compile(backend, cell, dtype, wide):
    check_autocast(make_read(cell, dtype=torch.float32), dtype, wide, compiled(pyeff.ops.read_recurrence))


@phi_dtypes
@halves
@pytest.mark.parametrize("kind", helpers.STRIDES)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_of_strided_phi(kernels, cell, kind, dtype, wide):
    call = make_read(cell, "layer", lead=(23, 4), d=37, r=19, dtype=torch.float32, strides=(kind,))
    check_autocast(call, dtype, wide)


@phi_dtypes
@halves
def test_autocast_keeps_no_copy_of_phi(kernels, dtype, wide):
    """The frozen network's outputs are kept by reference, also where the kernels read them in another dtype."""
    call = make_read("gru", lead=(512,), d=208, r=16, dtype=torch.float32)
    for i, phi_i in enumerate(call.phi):
        call.tensors[f"phi{i}"] = phi_i if wide else phi_i.to(dtype)
    leaves = call.require_grad(["w_ih", "w_hh"])
    inputs, kept = {t.untyped_storage().data_ptr() for t in leaves.tensors.values()}, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast(places.here().device, dtype):
        assert leaves().requires_grad
    assert not [t.shape for t in kept if t.shape == (512, 208) and t.untyped_storage().data_ptr() not in inputs]


def test_autocast_leaves_float64_alone(backend64):
    call = make_read("gru")
    expected = call()
    with torch.autocast(places.here().device, torch.bfloat16):
        out = call()
    assert out.dtype == torch.float64
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_autocast_does_not_mix_float64_with_less(backend64, how, tokens):
    """float64 weights stay float64, and a float32 phi beside them is the mistake that it is outside of autocast."""
    call = make_read("gru", lead=(tokens,))
    mixed = helpers.Read({n: t.float() if n.startswith("phi") else t for n, t in call.tensors.items()}, call.options)
    function = compiled(pyeff.ops.read_recurrence) if how == "compiled" else pyeff.ops.read_recurrence
    with (
        torch.autocast(places.here().device, torch.bfloat16),
        pytest.raises(Exception, match=r"phi\[0\] is .*, expected .*float64"),
    ):
        mixed(function)


@phi_dtypes
@halves
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_step(backend, cell, dtype, wide):
    """One step under autocast is the recurrence over one layer under autocast."""
    call = make_read(cell, reduce="last", layers=1, dtype=torch.float32)
    call.tensors["phi0"] = call.tensors["phi0"].to(torch.float32 if wide else dtype)
    weights = {n: t for n, t in call.tensors.items() if n not in ("phi0", "h0", "c0")}
    state = (call.tensors["h0"], call.tensors["c0"]) if cell == "lstm" else call.tensors["h0"]
    with torch.autocast(places.here().device, dtype):
        found = pyeff.ops.read_step(call.phi[0], state, **weights, cell=cell)
        expected = call()
    found = found if cell == "lstm" else (found,)
    assert all(t.dtype == dtype for t in found)
    assert torch.equal(found[0], expected)


def test_autocast_disabled_inside(backend):
    call = make_read("gru", dtype=torch.float32)
    with torch.autocast(places.here().device, torch.bfloat16), torch.autocast(places.here().device, enabled=False):
        assert call().dtype == torch.float32
