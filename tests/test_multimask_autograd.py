"""The derivatives of the multimask family against finite differences, what is kept for them, and torch's own checks."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyeff
from tests import helpers, places
from tests.multimask_calls import (
    KINDS,
    MAKERS,
    NORMS,
    OPS,
    REDUCTIONS,
    Call,
    check_call,
    make_bias,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    normal,
    random_grad,
    results,
)  # fmt: skip

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


def small(op: str) -> Call:
    """Finite, for finite differences."""
    if op == "multimask_targets":
        return make_targets(2, 5, 3, 2, norm="instance", post_norm="layer", lengths=None)
    if op == "multimask_relative_bias":
        return make_bias(make_plan(1, 2, 5), 2)
    return MAKERS[op](plan=make_plan(2, 2, 5), width=3, traps=False)


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


class Work(TorchDispatchMode):
    """The sizes of what the inner ops return."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[list[int]]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if function.namespace == "pyeff":
            given = out if isinstance(out, (tuple, list)) else () if out is None else (out,)
            self.found.setdefault(function._opname, []).append([t.numel() for t in given])
        return out


def test_the_gradient_is_written_in_the_forward_pass(native_kernels):
    """Where predictions alone want it and a backward with one comes from above: nothing else is done."""
    call = make_loss(dtype=torch.float32)
    size = call.first.numel()
    with Work() as work:
        results(call, ["pred"], torch.ones(()))
        results(call, ["pred", "target"], torch.ones(()))
        results(call, ["target"], torch.ones(()))
        results(call.but(reduction="none"), ["pred"], torch.ones(6, 13))
        call()
    assert [sizes[1] for sizes in work.found["multimask_loss_forward"]] == [size, 0, 0, 0, 0]
    pairs = [[size, 2 * 13 * 9], [0, 2 * 13 * 9], [size, 0]]
    assert work.found["multimask_loss_backward"] == pairs


@pytest.mark.parametrize("names", [("x",), ("fill",), ("x", "fill")], ids="-".join)
def test_only_wanted_gradients_are_formed(native_kernels, names):
    call = make_scatter(fill="TD")
    with Work() as work:
        results(call, names, random_grad(call))
    ((dx, dfill),) = work.found["multimask_scatter_backward"]
    assert (dx > 0, dfill > 0) == ("x" in names, "fill" in names)


def saved_bytes(call: Call) -> int:
    """Bytes that the graph holds beyond its inputs, the plan and its output."""
    call = call.require_grad([next(iter(call.tensors))])
    known = {t.untyped_storage().data_ptr() for t in call.tensors.values()}
    if call.plan:
        parts = (call.plan.ids_keep, call.plan.keep_len, call.plan.inverse, call.plan.lengths)
        known |= {t.untyped_storage().data_ptr() for t in parts}
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    known.add(out.untyped_storage().data_ptr())
    return sum(size for address, size in kept.items() if address not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_saved_for_backward(native_kernels, dtype):
    """Inputs and the plan by reference, numbers of a few bytes, and of the loss the gradient itself."""
    plan = make_plan(2, 3, 40, ragged=False)
    for call in (make_gather(plan, 16), make_scatter(plan, 16, fill="BTD", noise=0.1), make_targets(2, 40, 16)):
        assert saved_bytes(call.to(dtype)) <= 64, call.op
    loss = make_loss(plan, 16, dtype=dtype)
    assert saved_bytes(loss) <= loss.first.numel() * dtype.itemsize + 64
    assert saved_bytes(make_bias(plan, scale=False)) <= 64


@pytest.mark.parametrize("names", [["pred"], ["pred", "target"]], ids="-".join)
def test_nothing_of_the_size_of_predictions_but_the_gradient(cpu_kernels, names):
    """No tensor of [B*M, T, D] is allocated but the gradient, in its dtype."""
    call = make_loss(make_plan(2, 8, 100), 64, dtype=torch.bfloat16, traps=False).require_grad(names)
    leaves, one = [call.tensors[n] for n in names], call.first.numel() * 2

    def step():
        return torch.autograd.grad(call(), leaves)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    large = [size for size in events if size >= one // 2]
    assert large == [one]


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


def test_shapes_past_2_to_the_31_elements():
    """Without memory: outputs and gradients beyond what 32 bits can count."""
    with FakeTensorMode():
        rows, tokens, width = 64 * 16, 4096, 1024

        def empty(*size, dtype=torch.bfloat16):
            return torch.empty(size, dtype=dtype, device="cpu")

        ids, keep = empty(rows, 2048, dtype=torch.int32), empty(rows, dtype=torch.int32)
        inverse, lengths = empty(rows, tokens, dtype=torch.int32), empty(64, dtype=torch.int32)
        kept = torch.ops.pyeff.multimask_gather_forward(empty(64, tokens, width), ids, keep, inverse, "cpu")
        assert kept.numel() == rows * 2048 * width >= 2**31
        back = torch.ops.pyeff.multimask_gather_backward(kept, inverse, 64, "cpu")
        assert back.shape == (64, tokens, width)
        seed = empty(dtype=torch.int64)
        out = torch.ops.pyeff.multimask_scatter_forward(
            kept, ids, keep, inverse, lengths, None, seed, None, 0.01, "cpu"
        )
        assert out.numel() > 2**31
        target = empty(64, tokens, width, dtype=torch.float32)
        loss, dpred, moments = torch.ops.pyeff.multimask_loss_forward(
            out, target, inverse, lengths, None, "l2", 0.0, 1.0, "sum", True, True, "cpu"
        )
    assert (loss.shape, dpred.shape, moments.shape) == ((), out.shape, (1 + 4 * width,))


def test_rows_far_apart(cpu_kernels):
    """Strides of 2^30 elements: in 32 bits the offset of the third sample would be negative."""
    stride = 2**30
    storage = torch.UntypedStorage(2 * (3 * stride))

    def far(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=t.dtype).set_(storage, 0, t.shape, (stride, t.shape[2], 1)).copy_(t)

    plan = make_plan(3, 1, 7)
    for make, name in ((make_gather, "x"), (make_scatter, "x"), (make_loss, "pred")):
        call = make(plan, dtype=torch.bfloat16)
        call = call.but(**{name: far(call.first)})
        assert call.first.stride(0) == stride
        check_call(call, [name])
    call = make_targets(3, 7, layers=1, dtype=torch.bfloat16)
    check_call(call.but(layer0=far(call.first)))


def inner_calls() -> list[tuple[str, tuple]]:
    """Valid arguments of every inner op but the backend's name, which comes last."""
    plan = make_plan(2, 2, 5)
    index, dtype = (plan.ids_keep, plan.keep_len, plan.inverse), places.here().dtypes[0]
    x, fill = (normal(*s, seed=1).to(index[0].device, dtype) for s in ((4, plan.width, 3), (2, 5, 3)))
    whole, seed = normal(4, 5, 3, seed=2).to(x), torch.tensor(3)
    target = normal(2, 5, 3, seed=3).to(x.device, pyeff.reference.multimask.wide(dtype))
    loss, slopes = (whole, target, plan.inverse, plan.lengths, plan.count()), target.new_tensor([0.5, 1.0])
    total, above = torch.zeros_like(target), normal(4, 2, plan.width, plan.width, seed=4)
    return [
        ("multimask_gather_forward", (fill, *index)),
        ("multimask_gather_backward", (x, plan.inverse, 2)),
        ("multimask_scatter_forward", (x, *index, plan.lengths, fill, seed, None, 0.1)),
        ("multimask_scatter_forward", (x, *index, plan.lengths, None, seed, torch.tensor([7, 9]), 0.0)),
        ("multimask_scatter_backward", (whole, *index, plan.lengths, 2, [True, True])),
        ("multimask_scatter_backward", (whole, *index, plan.lengths, 0, [True, False])),
        ("multimask_targets_forward", ([fill, 2 * fill], plan.lengths, "instance", "layer", 1e-5)),
        ("multimask_targets_backward", (target, [fill, 2 * fill], plan.lengths, "instance", "layer", 1e-5)),
        ("multimask_accumulate_kernels", (total, fill, plan.lengths, 0.5, "batch", 1e-5)),
        ("multimask_loss_forward", (*loss, "l2", 0.0, 1.0, "mean", True, True)),
        ("multimask_loss_forward", (*loss[:4], None, "cosine", 0.0, 1.0, "none", False, False)),
        ("multimask_loss_backward", (target.new_tensor(2.0), *loss, "smooth_l1", 0.5, 1.0, [True, True])),
        ("multimask_loss_backward", (target.new_tensor(2.0), *loss, "l2", 0.0, 1.0, [False, True])),
        ("multimask_relative_bias_forward", (*index[:2], slopes, 0, dtype)),
        ("multimask_relative_bias_backward", (above.to(x), *index[:2], slopes, 0)),
        ("block_mask_kernels", (seed, None, plan.lengths, 3, 5, 0, 0.4, 0.2, 2, True, 2)),
        ("ema_update_kernels", ([total.clone()], [target], torch.tensor(0.9, dtype=torch.float64), [])),
    ]  # fmt: skip


@pytest.mark.parametrize("which", range(17))
def test_opcheck_of_inner_ops(native_kernels, which):
    calls = inner_calls()
    assert len(calls) == 17
    name, arguments = calls[which]
    changed = name.endswith("_kernels") and not name.startswith("block")
    # An op that changes its arguments has no derivative to be traced.
    tests = ("test_schema", "test_faketensor") if changed else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(getattr(torch.ops.pyeff, name), (*arguments, native_kernels), test_utils=tests)


@ops
def test_opcheck(native_kernels, op):
    check_op(small(op), native_kernels)


def test_opcheck_by_the_reference():
    check_op(small("multimask_gather"), "reference")


def check_op(call: Call, backend: str) -> None:
    op, call = call.op, call.require_grad(call.tensors)
    given, plan = list(call.tensors.values()), call.plan
    options = {**call.options, "backend": backend}
    if op == "multimask_targets":
        lengths = torch.full((2,), 5, dtype=torch.int32)
        arguments = (given, lengths)
    elif op == "multimask_relative_bias":
        arguments = (plan.ids_keep, plan.keep_len, given[0])
        options = {"prefix": 0, "backend": backend}
    elif op == "multimask_loss":
        arguments = (*given, plan.inverse, plan.lengths, plan.keep_len)
    else:
        arguments = (given[0], plan.ids_keep, plan.keep_len, plan.inverse)
    if op == "multimask_scatter":
        options = {"noise_std": 0.1, "backend": backend}
        arguments = (*arguments, plan.lengths, torch.tensor(3), given[1])
    torch.library.opcheck(getattr(torch.ops.pyeff, op), arguments, options)


def test_opcheck_of_ops_without_a_gradient(native_kernels):
    seed, lengths = torch.tensor(3), torch.tensor([9, 7], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.pyeff.block_mask, (seed, None, lengths, 3, 9, 0, 0.4, 0.2, 2, True, 3), {"backend": native_kernels}
    )
    layer = torch.randn(2, 9, 4)
    torch.library.opcheck(
        torch.ops.pyeff.multimask_accumulate_, (torch.zeros(2, 9, 4), layer, lengths),
        {"weight": 0.5, "backend": native_kernels}, test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    decay = torch.tensor(0.9, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.pyeff.ema_update_, ([torch.zeros(3)], [torch.ones(3)], decay, [torch.zeros(3)]),
        {"backend": native_kernels}, test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
