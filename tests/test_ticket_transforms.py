"""Tickets under forward-mode AD and torch.func: the reference serves, or a named backend refuses."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import pyeff
from tests.test_read_transforms import CLOSE, FORWARD_MODE, TRANSFORMS, dual, jvp
from tests.ticket_calls import ACTIVATIONS, TENSORS, TicketCall, make_call

OPERATION = "ticket_linear"


def small(activation="gelu", **more) -> TicketCall:
    return make_call((8, 9), (3, 4), 0.7, lead=(4,), activation=activation, traps=False, dtype=torch.float64, **more)


def function_of(call, names, where):
    """ticket_linear as a function of some of the call's tensors."""
    return lambda *values: call.but(**dict(zip(names, values, strict=True)))(where.ticket_linear)


@pytest.mark.parametrize(
    ("how", "names"),
    [("jvp", ["x"]), ("jvp", ["x", "values", "bias"]), ("dual", ["values"]), ("dual", ["x", "values", "bias"]),
     ("jvp compiled", ["x", "values"]), ("dual compiled", ["x", "values"])],
)  # fmt: skip
def test_forward_mode(how, names):
    call = small()
    values = tuple(call.tensors[n] for n in names)
    tangents = tuple(torch.randn_like(v) for v in values)
    expected = jvp(function_of(call, names, pyeff.reference), values, tangents)
    assert expected[1].any()
    with pyeff.backend("auto"):
        out, tangent = FORWARD_MODE[how](function_of(call, names, pyeff.ops), values, tangents)
    torch.testing.assert_close(out, expected[0], **CLOSE)
    torch.testing.assert_close(tangent, expected[1], **CLOSE)


@pytest.mark.parametrize("how", FORWARD_MODE)
def test_kernels_refuse_forward_mode(native_kernels, how):
    call = small().to(torch.float32)
    message = f"forward-mode differentiation is not supported by the {native_kernels} kernels"
    values = (call.tensors["values"],)
    with pytest.raises(Exception, match=message) as caught:
        FORWARD_MODE[how](function_of(call, ["values"], pyeff.ops), values, values)
    if "compiled" not in how:  # torch.compile wraps what is raised while it traces
        assert caught.type is RuntimeError


@pytest.mark.parametrize("name", TENSORS)
def test_a_graph_compiled_without_tangents_refuses_them(native_kernels, name):
    """torch.compile does not guard on tangents, so that such a graph is met with tensors that have some."""
    call = small().to(torch.float32)
    traced = torch.compile(function_of(call, [name], pyeff.ops), backend="aot_eager", fullgraph=True)
    values = (call.tensors[name],)
    assert torch.equal(traced(*values), call())
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported by the"):
        dual(traced, values, values)


def test_a_backward_refuses_tangents(native_kernels):
    """Forward over reverse, with a tangent in the incoming gradient alone."""
    call = small().to(torch.float32).require_grad(["values"])
    out = call()
    with forward_ad.dual_level():
        grad_out = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
            torch.autograd.grad(out, call.tensors["values"], grad_out)


def test_a_dual_level_that_is_not_used_leaves_the_kernels(native_kernels):
    call = small().to(torch.float32)
    expected = call()
    with forward_ad.dual_level():
        assert torch.equal(call(), expected)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, traced):
    call = small()

    def of(where):
        return lambda x: TRANSFORMS[transform](function_of(call, ["x"], where), x)

    function = torch.compile(of(pyeff.ops), backend="aot_eager") if traced else of(pyeff.ops)
    with pyeff.backend("auto"):
        found = function(call.tensors["x"])
    torch.testing.assert_close(found, of(pyeff.reference)(call.tensors["x"]), **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_vmap_over_each_argument(name, activation):
    """An ensemble: several sets of one tensor with the others shared."""
    call = small(activation)
    stacked = torch.stack([call.tensors[name], 2 * call.tensors[name], -call.tensors[name]])
    with pyeff.backend("auto"):
        found = torch.func.vmap(function_of(call, [name], pyeff.ops))(stacked)
    for i in range(3):
        torch.testing.assert_close(found[i], function_of(call, [name], pyeff.reference)(stacked[i]), **CLOSE)


def test_per_sample_gradients():
    """vmap of grad, as differential privacy needs them: their sum is the gradient of all."""
    call = small()

    def loss(values, x):
        return call.but(values=values, x=x)().square().sum()

    with pyeff.backend("auto"):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(call.tensors["values"], call.tensors["x"])
        whole = torch.func.grad(loss)(call.tensors["values"], call.tensors["x"])
    assert each.shape == (4, *call.tensors["values"].shape)
    torch.testing.assert_close(each.sum(0), whole, **CLOSE)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_kernels_refuse_transforms(native_kernels, transform):
    call = small().to(torch.float32)
    with pytest.raises(RuntimeError, match=f"torch.func .* is not supported by the {native_kernels} kernels"):
        TRANSFORMS[transform](function_of(call, ["x"], pyeff.ops), call.tensors["x"])
