"""The derivatives of the multimask family: against finite differences, by factors, again, in sums, and hooks."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import pyeff
from tests import helpers
from tests.multimask_calls import (
    KINDS,
    MAKERS,
    NORMS,
    OPS,
    REDUCTIONS,
    Call,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    normal,
    random_grad,
    results,
)  # fmt: skip
from tests.multimask_parts import small

OPERATION = "multimask_loss"
ops = pytest.mark.parametrize("op", OPS)
kinds = pytest.mark.parametrize("kind", KINDS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def beta_of(kind: str) -> float:
    return 0.7 if kind == "smooth_l1" else 0.0


def subsets(call: Call) -> list[tuple[str, ...]]:
    names = list(call.tensors)
    return [some for count in range(1, len(names) + 1) for some in combinations(names, count)]


def check_gradient(call: Call, names) -> None:
    """torch.autograd.gradcheck of the named inputs; the others are fixed."""

    def function(*changed):
        out = call.but(**dict(zip(names, changed, strict=True)))()
        assert out.requires_grad
        return out.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(function, [call.tensors[n].detach().clone().requires_grad_() for n in names])


@ops
def test_gradcheck_of_every_subset(backend64, op):
    """The work for gradients that nobody asked for is skipped; what is left must not need it."""
    call = small(op)
    for names in subsets(call):
        check_gradient(call, names)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("post_norm", NORMS)
def test_gradcheck_of_targets(kernels64, norm, post_norm):
    call = make_targets(2, 4, 3, 2, norm=norm, post_norm=post_norm, eps=0.1)
    call = call.map(lambda t: t.nan_to_num(0.5))
    check_gradient(call, list(call.tensors))


@kinds
@reductions
def test_gradcheck_of_losses(kernels64, kind, reduction):
    call = make_loss(make_plan(2, 2, 4), 3, kind=kind, beta=beta_of(kind), reduction=reduction, traps=False)
    for names in subsets(call):
        check_gradient(call, names)


@pytest.mark.parametrize("fill", ["", "D", "TD", "BTD"], ids=lambda f: f or "none")
def test_gradcheck_of_scatter(kernels64, fill):
    """Noise is a constant of the seed."""
    call = make_scatter(make_plan(2, 2, 4), 3, fill=fill, noise=0.3, traps=False)
    check_gradient(call, list(call.tensors))


def scaled(call: Call, factor: float) -> Call:
    return call.but(scale=factor * 9**-0.5)


@kinds
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_factors_of_the_loss(native, kind, reduction, dtype):
    """What comes from above is no one: by a factor, by a mean of losses, by a scaler of gradients."""
    call = make_loss(kind=kind, beta=beta_of(kind), reduction=reduction, dtype=dtype)
    for factor in (1.0, 0.25, -3.0, 65536.0, 0.0):
        leaves = call.require_grad(["pred"])
        (leaves() * factor).backward()
        expected = results(scaled(call, factor), ["pred"], torch.ones(()))["pred"]
        slack = helpers.rounding(dtype, 1, expected.abs().max().item())
        assert helpers.error(leaves.first.grad, expected) <= slack, factor


@pytest.mark.parametrize("names", [["pred"], ["pred", "target"]], ids="-".join)
def test_backward_again(native, names):
    """A graph that is kept gives the same gradient again, with another factor another, and leaves the first alone."""
    call = make_loss().require_grad(names)
    leaves, loss = [call.tensors[n] for n in names], call()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    before = [g.clone() for g in first]
    double = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, torch.full_like(loss, -0.5))
    for name, a, b, c, d, e in zip(names, first, before, double, again, last, strict=True):
        assert torch.equal(a, b), f"{name}: a later backward changed a gradient that was given out"
        assert torch.equal(a, d), name
        torch.testing.assert_close(c, 2 * a, rtol=1e-6, atol=0)
        torch.testing.assert_close(e, -0.5 * a, rtol=1e-6, atol=0)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "freed"])
def test_several_factors_at_once(native, keep):
    """torch.autograd.grad with is_grads_batched, as Jacobians are made."""
    call = make_loss().require_grad(["pred"])
    factors = torch.tensor([1.0, 2.0], dtype=call().dtype)
    (found,) = torch.autograd.grad(call(), call.first, factors, is_grads_batched=True, retain_graph=keep)
    for factor, each in zip(factors, found, strict=True):
        assert torch.equal(each, torch.autograd.grad(call(), call.first, factor)[0])


def test_a_gradient_that_is_changed_in_place(native):
    """Clipping changes what backward gave out; a graph that is kept still gives the right one."""
    call = make_loss().require_grad(["pred"])
    loss = call()
    (first,) = torch.autograd.grad(loss, call.first, retain_graph=True)
    expected = first.clone()
    first.mul_(100)
    (again,) = torch.autograd.grad(loss, call.first)
    assert torch.equal(again, expected)


def test_gradients_accumulate(native):
    """Two backward passes without zeroing in between, of two graphs and of one."""
    call = make_loss().require_grad(["pred"])
    once = torch.autograd.grad(call(), call.first)[0]
    call().backward()
    call().backward()
    torch.testing.assert_close(call.first.grad, 2 * once)
    call.first.grad = None
    loss = call()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(call.first.grad, 2 * once)


def test_two_losses_of_one_prediction(native):
    """A decoder's output in two losses, of different kinds and factors, below a common sum."""
    call = make_loss().require_grad(["pred"])
    other = call.but(kind="cosine")

    def total(a, b):
        return a() + 0.5 * b()

    found = torch.autograd.grad(total(call, other), call.first)[0]
    expected = sum(
        w * torch.autograd.grad(c(), call.first)[0] for w, c in ((1.0, call), (0.5, other))
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_one_loss_used_twice(native):
    """loss + loss^2: what comes from above adds up to a number that is no one."""
    call = make_loss(reduction="mean").require_grad(["pred"])
    loss = call()
    (found,) = torch.autograd.grad(loss + loss.square(), call.first)
    (once,) = torch.autograd.grad(call(), call.first)
    torch.testing.assert_close(found, (1 + 2 * loss.item()) * once)


def test_through_a_layer_below(native):
    """The gradient goes on to the predictor's weights, under a checkpoint, too."""
    call = make_loss(width=6, traps=False, dtype=torch.float32)
    layer = torch.nn.Linear(6, 6)

    def loss(x):
        return call.but(pred=layer(x))()

    expected = torch.autograd.grad(loss(call.first), layer.weight)[0]
    again = torch.utils.checkpoint.checkpoint(loss, call.first.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, layer.weight)[0], expected)


def test_moments_in_a_sum_have_no_gradient(native):
    call = make_loss().require_grad(["pred"])
    loss, moments = call.but(statistics=True)()
    assert not moments.requires_grad
    expected = torch.autograd.grad(call(), call.first)[0]
    assert torch.equal(torch.autograd.grad(loss + moments.sum().detach() * 0, call.first)[0], expected)


@ops
def test_no_input_asks_for_a_gradient(native, op):
    call = MAKERS[op]()
    out = call()
    assert not out.requires_grad
    assert out.grad_fn is None
    with torch.no_grad():
        assert not call.require_grad(call.tensors)().requires_grad
    with torch.inference_mode():
        assert torch.equal(call(), out)


@ops
def test_backward_twice_through_one_graph(native, op):
    call = MAKERS[op]().require_grad(MAKERS[op]().tensors)
    out, leaves, grad_out = call(), list(call.tensors.values()), random_grad(call)
    first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves, grad_out), strict=True):
        assert torch.equal(a, b)


@ops
def test_double_backward_raises(native_kernels, op):
    """The formulas have no second derivative: an error, never a silent constant."""
    call = small(op)
    name = next(iter(call.tensors))
    call = call.require_grad([name])
    leaf, factor = call.tensors[name], torch.ones((), requires_grad=True)
    out = call().nan_to_num(neginf=0.0)
    (grad,) = torch.autograd.grad((out.square() * factor).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        torch.autograd.grad(grad.square().sum(), leaf)


@ops
def test_second_derivatives_by_the_reference(op):
    call = small(op)
    if op == "multimask_loss":  # that of l2 is a constant
        call = make_loss(make_plan(1, 2, 3), 3, kind="cosine", traps=False)
    with pyeff.backend("reference"):
        leaves = [t.detach().clone().requires_grad_() for t in call.tensors.values()]
        names = list(call.tensors)
        assert torch.autograd.gradgradcheck(
            lambda *t: call.but(**dict(zip(names, t, strict=True)))().nan_to_num(neginf=0.0).square(), leaves
        )


@ops
def test_create_graph_alone_is_allowed(native_kernels, op):
    """A penalty on other gradients may keep the graph: only a derivative through the op's own backward raises."""
    call = MAKERS[op]()
    call = call.require_grad(call.tensors)
    leaves, grad_out = list(call.tensors.values()), random_grad(call)
    kept = torch.autograd.grad(call(), leaves, grad_out, create_graph=True)
    plain = torch.autograd.grad(call(), leaves, grad_out)
    for a, b in zip(kept, plain, strict=True):
        assert torch.equal(a.detach(), b)


def test_changing_an_input_in_place_is_noticed(native_kernels):
    for op, name in (("multimask_targets", "layer0"), ("multimask_loss", "target")):
        call = MAKERS[op]().require_grad(MAKERS[op]().tensors)
        out = call()
        with torch.no_grad():
            call.tensors[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_changing_the_output_in_place(native_kernels):
    """Adding positions to a decoder's input in place, as a program may, leaves the gradients right."""
    for make in (make_gather, make_scatter):
        call = make().require_grad(["x"])
        grad_out = random_grad(call)
        expected = torch.autograd.grad(call(), call.first, grad_out)[0]
        out = call()
        out.add_(3)
        assert torch.equal(torch.autograd.grad(out, call.first, grad_out)[0], expected)


def test_a_view_of_a_leaf(native):
    """Predictions that are a part of a larger tensor get their gradient in that part."""
    call = make_loss()
    rows, tokens, width = call.first.shape
    leaf = normal(rows, tokens + 2, width, seed=3).to(call.first).requires_grad_()
    (found,) = torch.autograd.grad(call.but(pred=leaf[:, 1:-1])(), leaf)
    whole = results(call.but(pred=leaf[:, 1:-1].detach().clone()), ["pred"], torch.ones(()))["pred"]
    assert torch.equal(found[:, 1:-1], whole)
    assert not found[:, [0, -1]].any()


def test_a_hook_on_predictions(native):
    """It sees the gradient once, and what it returns is what is accumulated."""
    call, seen = make_loss().require_grad(["pred"]), []
    call.first.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    call().backward()
    (once,) = seen
    assert torch.equal(once, results(call, ["pred"], torch.ones(()))["pred"])
    assert torch.equal(call.first.grad, 2 * once)
