"""READ's derivatives against finite differences, and its ops against torch's own checks of operators."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import pyeff
from tests import helpers
from tests.helpers import CELLS, NORMS, REDUCTIONS, make_read

EVERY_KIND = list(product(CELLS, NORMS))
SMALL = {"lead": (3,), "layers": 2, "d": 4, "r": 2}


def check_gradient(call: helpers.Read, wanted, **extra) -> None:
    """torch.autograd.gradcheck of the named inputs, those of the others absent."""
    wanted = list(wanted)
    fixed = {name: t.detach() for name, t in call.tensors.items()}

    def function(*changed):
        out = helpers.Read({**fixed, **dict(zip(wanted, changed, strict=True))}, call.options)(**extra)
        assert out.requires_grad
        return out

    leaves = [call.tensors[name].detach().clone().requires_grad_() for name in wanted]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_gradcheck(kernels64, cell, norm, reduce, recompute):
    call = make_read(cell, norm, reduce, **SMALL)
    check_gradient(call, call.tensors, recompute=recompute)


@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_gradcheck_of_each_input_alone(kernels64, cell, norm):
    """The work for gradients that nobody asked for is skipped; what is left must not need it."""
    call = make_read(cell, norm, **SMALL)
    for name in call.tensors:
        check_gradient(call, [name])


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "none"), ("gru", "rms"), ("lstm", "layer")])
def test_gradcheck_of_all_inputs_but_one(kernels64, cell, norm):
    call = make_read(cell, norm, **SMALL)
    for name in call.tensors:
        check_gradient(call, [n for n in call.tensors if n != name])


@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_gradcheck_of_a_frozen_backbone(kernels64, cell, norm):
    """The main use: every weight trains and no phi does."""
    call = make_read(cell, norm, **SMALL)
    weights = [n for n in call.tensors if not n.startswith("phi")]
    check_gradient(call, weights)
    check_gradient(call, [n for n in weights if n not in ("h0", "c0")])


def test_no_input_asks_for_a_gradient(backend):
    call = make_read("lstm", "layer")
    out = call()
    assert not out.requires_grad
    assert out.grad_fn is None
    with torch.no_grad():
        assert not call.require_grad(call.tensors)().requires_grad
    with torch.inference_mode():
        assert torch.equal(call(), out)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_a_step(kernels64, cell):
    call = make_read(cell, "layer", lead=(3,), layers=1, d=4, r=2)
    names = list(call.tensors)
    options = {n: v for n, v in call.options.items() if n != "reduce"}

    def step(*values):
        given = dict(zip(names, values, strict=True))
        phi_i, h, c = given.pop("phi0"), given.pop("h0"), given.pop("c0", None)
        return pyeff.ops.read_step(phi_i, h if c is None else (h, c), **given, **options)

    leaves = [t.detach().clone().requires_grad_() for t in call.tensors.values()]
    assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("wanted", ["w_ih", "phi0", "h0"])
@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_raises(kernels, cell, wanted):
    """The formula has no second derivative: an error, never a silent constant."""
    call = make_read(cell).require_grad([wanted])
    leaf = call.tensors[wanted]
    (grad,) = torch.autograd.grad(call().square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)read.*(double backward|twice|second)"):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_create_graph_alone_is_allowed(kernels):
    """A penalty on other gradients may keep the graph: only a derivative through READ's own backward raises."""
    call = make_read("gru").require_grad(["w_ih"])
    leaf = call.tensors["w_ih"]
    (kept,) = torch.autograd.grad(call().sum(), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(call().sum(), leaf)
    assert torch.equal(kept.detach(), plain)


def test_backward_twice_through_one_graph(backend):
    call = make_read("lstm").require_grad(["w_hh", "phi1"])
    out = call()
    leaves = [call.tensors["w_hh"], call.tensors["phi1"]]
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_changing_an_input_in_place_is_noticed(kernels, recompute):
    """What the backward needs must not have changed since: autograd's version check sees it."""
    for name in ("phi1", "w_hh", "norm_weight"):
        call = make_read("gru").require_grad(["phi0", "w_ih", "w_hh", "norm_weight"])
        out = call(recompute=recompute)
        with torch.no_grad():
            call.tensors[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_changing_the_output_in_place(kernels, cell, reduce):
    """Adding to the output in place, as a residual connection may, leaves the gradients right."""
    call = make_read(cell, reduce=reduce).require_grad(["w_ih", "w_hh"])
    leaves = [call.tensors["w_ih"], call.tensors["w_hh"]]
    expected = torch.autograd.grad((call() + 3).sum(), leaves)
    out = call()
    out.add_(3)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_not_changed(backend):
    call = make_read("lstm", "layer", strides=helpers.STRIDES, lead=(3, 4), layers=6)
    before = call.map(lambda t: t.clone())
    found = helpers.gradients(call, call.tensors, torch.randn(3, 4, call.rank))
    for name, t in call.tensors.items():
        assert torch.equal(t, before.tensors[name]), name
        # Memory of its own: a result that shares an input's would change with it.
        assert found[name].untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def recurrence_arguments(cell: str, norm: str, wanted=(), **more):
    call = make_read(cell, norm, lead=(2, 3), **more).require_grad(wanted)
    given = {n: call.tensors.get(n) for n in helpers.WEIGHTS}
    first = (call.phi, given.pop("w_ih"), given.pop("w_hh"), given.pop("b_ih"), given.pop("b_hh"))
    return first, {**given, **call.options}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("cell", "norm"), [("rnn", "none"), ("gru", "rms"), ("lstm", "layer")])
def test_opcheck_recurrence(backend, cell, norm, trains):
    call = make_read(cell, norm)
    wanted = [n for n in call.tensors if trains and n != "phi1"]
    arguments, keywords = recurrence_arguments(cell, norm, wanted)
    torch.library.opcheck(torch.ops.pyeff.read_recurrence, arguments, {**keywords, "backend": backend})
    torch.library.opcheck(
        torch.ops.pyeff.read_recurrence, arguments, {**keywords, "backend": backend, "recompute": True}
    )


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_step(backend, cell, trains):
    wanted = ["phi0", "w_ih", "h0"] if trains else []
    (phi, *weights), keywords = recurrence_arguments(cell, "rms", wanted, layers=1)
    h, c = keywords.pop("h0"), keywords.pop("c0")
    del keywords["reduce"]
    torch.library.opcheck(torch.ops.pyeff.read_step, (phi[0], h, c, *weights), {**keywords, "backend": backend})


def inner_arguments(cell: str, norm: str, save: int, wanted=(), **more):
    first, keywords = recurrence_arguments(cell, norm, wanted, **more)
    tensors = (*first, keywords["norm_weight"], keywords["norm_bias"], keywords["h0"], keywords["c0"])
    return tensors, (cell, norm, 1e-6, "mean"), save


@pytest.mark.parametrize("save", [0, 1, 2])
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_opcheck_forward(kernels, cell, norm, save):
    for strides in (("contiguous",), ("transposed", "sliced")):
        tensors, options, save = inner_arguments(cell, norm, save, strides=strides)
        torch.library.opcheck(torch.ops.pyeff.read_forward, (*tensors, *options, save, kernels))


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_forward_with_gradients(kernels, cell, save):
    tensors, options, save = inner_arguments(cell, "layer", save, ["phi0", "w_ih", "w_hh", "b_hh", "norm_weight", "h0"])
    torch.library.opcheck(torch.ops.pyeff.read_forward, (*tensors, *options, save, kernels))


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize(("cell", "norm"), EVERY_KIND)
def test_opcheck_backward(kernels, cell, norm, save):
    tensors, options, save = inner_arguments(cell, norm, save)
    out, _, *kept = torch.ops.pyeff.read_forward(*tensors, *options, save, kernels)
    given = [t is not None for t in tensors[1:]]
    grad_c = torch.randn_like(out) if cell == "lstm" and save == 2 else None
    needs_phi = [save == 2, False, save == 2]
    torch.library.opcheck(
        torch.ops.pyeff.read_backward,
        (torch.randn_like(out), grad_c, *tensors, *kept, *options, needs_phi, given, kernels),
    )
