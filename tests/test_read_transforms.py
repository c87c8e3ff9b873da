"""READ under forward-mode AD and torch.func: the reference serves, or a named backend refuses."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import pyeff
from tests import helpers
from tests.helpers import make_read

SMALL = {"lead": (4,), "layers": 2, "d": 6, "r": 3}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def function_of(call, names, where):
    """read_recurrence as a function of some of the call's tensors."""

    def function(*values):
        given = {**call.tensors, **dict(zip(names, values, strict=True))}
        return helpers.Read(given, call.options)(where.read_recurrence)

    return function


def jvp(function, values, tangents):
    return torch.func.jvp(function, values, tangents)


def dual(function, values, tangents):
    with forward_ad.dual_level():
        made = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(function(*made)))


def compiled(method):
    def whole(function, values, tangents):
        traced = torch.compile(lambda v, t: method(function, v, t), backend="aot_eager", fullgraph=True)
        return traced(values, tangents)

    return whole


FORWARD_MODE = {
    "jvp": jvp, "dual": dual, "jvp compiled": compiled(jvp), "dual compiled": compiled(dual),
}  # fmt: skip


@pytest.mark.parametrize("names", [["phi1"], ["w_ih", "h0"], ["b_hh", "norm_weight"]])
@pytest.mark.parametrize("how", FORWARD_MODE)
def test_forward_mode(how, names):
    call = make_read("gru", **SMALL)
    values = tuple(call.tensors[n] for n in names)
    tangents = tuple(torch.randn_like(v) for v in values)
    expected = jvp(function_of(call, names, pyeff.reference), values, tangents)
    assert expected[1].abs().min() > 0
    with pyeff.backend("auto"):
        out, tangent = FORWARD_MODE[how](function_of(call, names, pyeff.ops), values, tangents)
    torch.testing.assert_close(out, expected[0], **CLOSE)
    torch.testing.assert_close(tangent, expected[1], **CLOSE)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("method", [jvp, dual])
def test_forward_mode_of_a_step(method, cell):
    call = make_read(cell, **{**SMALL, "layers": 1}, state=False)
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}

    def step(where):
        def function(phi_i):
            state = where.read_step(phi_i, None, **weights, cell=cell)
            return state[1] if cell == "lstm" else state

        return function

    values, tangents = (call.phi[0],), (torch.randn_like(call.phi[0]),)
    with pyeff.backend("auto"):
        found = method(step(pyeff.ops), values, tangents)
    torch.testing.assert_close(tuple(found), jvp(step(pyeff.reference), values, tangents), **CLOSE)


@pytest.mark.parametrize("how", FORWARD_MODE)
def test_kernels_refuse_forward_mode(kernels, how):
    call = make_read("gru", **SMALL)
    message = f"forward-mode differentiation is not supported by the {kernels} kernels"
    with pytest.raises(Exception, match=message) as caught:
        FORWARD_MODE[how](function_of(call, ["w_hh"], pyeff.ops), (call.tensors["w_hh"],), (call.tensors["w_hh"],))
    if "compiled" not in how:  # torch.compile wraps what is raised while it traces
        assert caught.type is RuntimeError


def test_a_graph_compiled_without_tangents_refuses_them(kernels):
    """torch.compile does not guard on tangents, so that such a graph is met with tensors that have some."""
    call = make_read("gru", **SMALL)
    traced = torch.compile(function_of(call, ["w_hh"], pyeff.ops), backend="aot_eager", fullgraph=True)
    values = (call.tensors["w_hh"],)
    assert torch.equal(traced(*values), call())
    with pytest.raises(RuntimeError, match=f"forward-mode differentiation is not supported by the {kernels} kernels"):
        dual(traced, values, values)


def test_a_backward_refuses_tangents(kernels):
    """Forward over reverse, with a tangent in the incoming gradient alone."""
    call = make_read("gru", **SMALL).require_grad(["w_hh"])
    out = call()
    with forward_ad.dual_level():
        grad_out = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
            torch.autograd.grad(out, call.tensors["w_hh"], grad_out)


def test_a_dual_level_that_is_not_used_leaves_the_kernels(kernels):
    call = make_read("gru", **SMALL)
    expected = call()
    with forward_ad.dual_level():
        assert torch.equal(call(), expected)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda v: f(v).square().sum())(x),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, traced):
    call = make_read("gru", **SMALL, state=False)

    def of(where):
        return lambda phi: TRANSFORMS[transform](
            lambda x: where.read_recurrence([x, 2 * x], call.tensors["w_ih"], call.tensors["w_hh"]), phi
        )

    function = torch.compile(of(pyeff.ops), backend="aot_eager") if traced else of(pyeff.ops)
    with pyeff.backend("auto"):
        found = function(call.phi[0])
    torch.testing.assert_close(found, of(pyeff.reference)(call.phi[0]), **CLOSE)


def test_vmap_over_the_weights():
    """An ensemble: several sets of weights on the same layer outputs."""
    call = make_read("lstm", **SMALL)
    w_hh = torch.stack([call.tensors["w_hh"], 2 * call.tensors["w_hh"]])
    with pyeff.backend("auto"):
        found = torch.func.vmap(function_of(call, ["w_hh"], pyeff.ops))(w_hh)
    for i in range(2):
        torch.testing.assert_close(found[i], function_of(call, ["w_hh"], pyeff.reference)(w_hh[i]), **CLOSE)


def test_vmap_of_a_step():
    call = make_read("lstm", **{**SMALL, "layers": 1}, state=False)
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    with pyeff.backend("auto"):
        found = torch.func.vmap(lambda x: pyeff.ops.read_step(x, None, **weights, cell="lstm"))(call.phi[0])
    expected = pyeff.reference.read_step(call.phi[0], None, **weights, cell="lstm")
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_kernels_refuse_transforms(kernels, transform):
    call = make_read("gru", **SMALL, state=False)
    with pytest.raises(RuntimeError, match=f"torch.func .* is not supported by the {kernels} kernels"):
        TRANSFORMS[transform](
            lambda x: pyeff.ops.read_recurrence([x], call.tensors["w_ih"], call.tensors["w_hh"]), call.phi[0]
        )
