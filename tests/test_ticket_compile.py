"""Tickets under torch.compile, torch.export and autocast."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pyeff
from tests import helpers, places
from tests.ticket_calls import ACTIVATIONS, TENSORS, TicketCall, make_call, make_ticket, sizes, unselected

OPERATION = "ticket_linear"
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def agree(call: TicketCall, function) -> None:
    """``function`` gives what the op gives, and the same gradients."""
    grad_out = torch.randn(call.out_shape)
    expected = helpers.gradients(call, call.tensors, grad_out)
    found = helpers.gradients(call, call.tensors, grad_out, function)
    scales, _ = sizes(call, grad_out)
    for name, t in expected.items():
        assert helpers.error(found[name], t) <= helpers.rounding(t.dtype, call.terms(name), scales[name]), name


@activations
def test_fullgraph(native, activation):
    call = make_call(dtype=torch.float32, activation=activation, bias=activation is not None)
    agree(call, compiled(pyeff.ops.ticket_linear))


@pytest.mark.parametrize("kind", ["sliced", "transposed", "permuted", "expanded"])
def test_fullgraph_with_strided_inputs(native, kind):
    call = make_call(lead=(3, 4), x_strides=kind, dtype=torch.float32, activation="gelu")
    agree(call, compiled(pyeff.ops.ticket_linear))


def test_fullgraph_without_blocks(native):
    agree(make_call(density=0.0, dtype=torch.float32, activation="relu"), compiled(pyeff.ops.ticket_linear))


def test_no_gradient_under_compile(native):
    call = make_call(dtype=torch.float32, activation="gelu")
    with torch.no_grad():
        assert torch.equal(call(compiled(pyeff.ops.ticket_linear)), call())


class Layer(torch.nn.Module):
    """Two layers with their tickets as attributes, as a program would have them; their index is a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32, block: int = 16):
        super().__init__()
        self.tickets = [make_ticket((40, 56), block), make_ticket((30, 40), block, seed=1)]
        self.values, self.bias = torch.nn.ParameterList(), torch.nn.Parameter(torch.randn(40, dtype=dtype))
        for i, ticket in enumerate(self.tickets):
            self.values.append(torch.nn.Parameter(torch.randn(ticket.nnz, *ticket.block, dtype=dtype)))
            self.register_buffer(f"index{i}", ticket.index)

    def forward(self, x):
        x = pyeff.ops.ticket_linear(x, self.values[0], self.tickets[0], self.bias, activation="gelu")
        return pyeff.ops.ticket_linear(x, self.values[1], self.tickets[1])


@pytest.mark.parametrize("training", [False, True])
def test_a_new_token_count_compiles_nothing(native, training):
    counter = CompileCounterWithBackend("aot_eager")
    layer = Layer().requires_grad_(training)
    function = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (5, 7, 64, 33, 500):
        x = torch.randn(tokens, 56)
        torch._dynamo.mark_dynamic(x, 0)
        out = function(x)
        torch.testing.assert_close(out, layer(x))
        if training:
            out.sum().backward()
    assert counter.frame_count == 1


def test_batch_and_length_may_both_change(native):
    """Without a mark: the first call is taken as fixed, the second makes sizes dynamic, and that is the last time."""
    counter, layer = CompileCounterWithBackend("aot_eager"), Layer()
    function = torch.compile(layer, backend=counter, fullgraph=True)
    for batch, length in ((2, 6), (3, 9), (8, 64), (5, 17), (4, 33)):
        x = torch.randn(batch, length, 56)
        torch.testing.assert_close(function(x), layer(x))
    assert counter.frame_count <= 2


def test_dynamic_from_the_start(native):
    counter, layer, compilations = CompileCounterWithBackend("aot_eager"), Layer(), set()
    function = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (6, 9, 64, 17):
        x = torch.randn(tokens, 56)
        torch.testing.assert_close(function(x), layer(x))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "a new token count was compiled again"


def test_another_ticket_is_noticed(native):
    """A mask update: other blocks of the same number, and then fewer of them, through one compiled function."""
    function = compiled(pyeff.ops.ticket_linear)
    for seed, density in ((0, 0.5), (1, 0.5), (2, 0.2), (3, 0.8), (4, 0.3)):
        call = make_call(density=density, seed=seed, dtype=torch.float32)
        torch.testing.assert_close(call(function), call())


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(native_kernels):
    agree(make_call(dtype=torch.float32, activation="gelu"), compiled(pyeff.ops.ticket_linear, "inductor"))


def test_the_definition_under_compile():
    call = make_call(dtype=torch.float32, activation="gelu")
    agree(call, compiled(pyeff.reference.ticket_linear))


def test_choice_of_backend_reaches_compiled_code(native_kernels):
    """A function that was compiled under one backend runs another one when it is asked to."""
    function = compiled(pyeff.ops.ticket_linear, "eager")
    call = make_call(dtype=torch.float32)

    def kept_by(name: str) -> int:
        kept = []
        with pyeff.backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
            assert call.require_grad(["x", "values"])(function).requires_grad
        return len(kept)

    # The reference saves intermediates, the kernels x, values, the index and an empty tensor.
    first, fused, again = kept_by("reference"), kept_by(native_kernels), kept_by("reference")
    assert first == again
    assert fused < first


def test_choice_that_cannot_serve_raises_under_compile(native):
    function = torch.compile(pyeff.ops.ticket_linear, backend="eager")
    call = make_call(dtype=torch.float32)
    assert torch.equal(call(function), call())
    other = "cpu" if places.here().device == "cuda" else "triton"
    with pyeff.backend(other), pytest.raises(Exception, match=other):
        make_call(dtype=torch.float64)(function)


@pytest.mark.parametrize("strict", [False, True])
def test_export(native, strict, tmp_path):
    """The graph holds the op; the file of it gives what the module gives, for any number of tokens."""
    layer, tokens = Layer().eval(), torch.export.Dim("tokens", min=2)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, 56),), dynamic_shapes={"x": {0: tokens}}, strict=strict)
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        for count in (2, 5, 33):
            x = torch.randn(count, 56)
            torch.testing.assert_close(loaded(x), layer(x))


def check_autocast(call: TicketCall, dtype: torch.dtype, function=None) -> None:
    """A float32 call under autocast is as good as the call in its dtype; gradients come back in float32."""
    leaves = call.require_grad(call.tensors)
    with torch.autocast(places.here().device, dtype):
        out = leaves(function)
    assert out.dtype == dtype
    rounded, grad_out = call.to(dtype), torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, list(leaves.tensors.values()), grad_out)
    same = helpers.gradients(rounded, call.tensors, grad_out, pyeff.reference.ticket_linear)
    truth = helpers.gradients(rounded.to(torch.float64), call.tensors, grad_out, pyeff.reference.ticket_linear)
    scales, _ = sizes(rounded, grad_out)
    helpers.assert_three_way("out", out, same["out"], truth["out"], call.terms("out"), scales["out"])
    for name, grad in zip(call.tensors, found, strict=True):
        assert grad.dtype == torch.float32
        helpers.assert_three_way(name, grad.to(dtype), same[name], truth[name], call.terms(name), scales[name])


# Those of the two that are computed in at the place.
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@halves
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_autocast(native, how, activation, dtype):
    function = compiled(pyeff.ops.ticket_linear) if how == "compiled" else None
    check_autocast(make_call(lead=(3, 4), dtype=torch.float32, activation=activation), dtype, function)


def test_autocast_of_the_definition():
    """Its sums are not autocast's."""
    call = make_call(dtype=torch.bfloat16, activation="gelu")
    expected = call(pyeff.reference.ticket_linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(pyeff.reference.ticket_linear), expected)


def test_autocast_takes_x_in_either_dtype(native):
    call = make_call(dtype=torch.float32)
    half = call.but(x=call.tensors["x"].bfloat16())
    with torch.autocast(places.here().device, torch.bfloat16):
        assert torch.equal(half(), call())


def test_autocast_leaves_float64_alone(backend64):
    call = make_call(dtype=torch.float64)
    expected = call()
    with torch.autocast(places.here().device, torch.bfloat16):
        out = call()
    assert out.dtype == torch.float64
    assert torch.equal(out, expected)
    mixed = call.but(x=call.tensors["x"].float())
    with torch.autocast(places.here().device, torch.bfloat16), pytest.raises(ValueError, match=r"x is .*float64"):
        mixed()


def test_autocast_disabled_inside(native):
    call = make_call(dtype=torch.float32)
    device = places.here().device
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert call().dtype == torch.float32


def test_autocast_keeps_no_copy_of_what_it_does_not_cast(native_kernels):
    call = make_call((40, 56), lead=(512,), dtype=torch.float32, traps=False)
    call = call.but(x=call.tensors["x"].bfloat16()).require_grad(["values", "bias"])
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast(places.here().device, torch.bfloat16):
        assert call().requires_grad
    wide = [t for t in kept if t.shape == (512, 56)]
    assert [t.data_ptr() for t in wide] == [call.tensors["x"].data_ptr()]


def test_a_row_of_nan_under_compile(native):
    """What is not selected does not leak through a graph either."""
    call = make_call(dtype=torch.float32)
    assert unselected(call.ticket).any()
    assert set(TENSORS) == set(call.tensors)
    assert call(compiled(pyeff.ops.ticket_linear)).isfinite().all()
