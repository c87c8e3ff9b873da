"""Gather and scatter by a plan against their float64 oracle: dtypes, odd sizes, ragged rows, padding and strides.

By default everything that must not count is NaN: tokens that nobody keeps, slots past what a row keeps, fills where
nothing is hidden, and gradients of what is constant (``multimask_calls``).
"""

from __future__ import annotations

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from tests import helpers
from tests.helpers import dtypes
from tests.multimask_calls import MAKERS, OPS, check_call, make_gather, make_plan, make_scatter, random_grad, results

OPERATION = "multimask_gather"
ops = pytest.mark.parametrize("op", OPS)
FILLS = ("", "D", "TD", "BTD")
# batch, masks, tokens, width
SIZES = [(2, 3, 13, 9), (1, 1, 1, 1), (3, 1, 7, 64), (1, 16, 5, 1), (2, 2, 63, 17), (1, 2, 500, 3), (1, 2, 6, 1023)]
LONG = [(2, 2, 1023, 33), (2, 16, 196, 40)]


def size_id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_gather(backend, size, dtype):
    batch, masks, tokens, width = size
    for ragged in (True, False):
        plan = make_plan(batch, masks, tokens, ragged=ragged)
        check_call(make_gather(plan, width, dtype=dtype))


@dtypes
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: f or "none")
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_scatter(backend, size, fill, dtype):
    batch, masks, tokens, width = size
    check_call(make_scatter(make_plan(batch, masks, tokens, ragged=len(fill) != 2), width, fill=fill, dtype=dtype))
    check_call(make_scatter(make_plan(batch, masks, tokens), width, fill=fill, noise=0.5, dtype=dtype))


@dtypes
@pytest.mark.parametrize("size", LONG, ids=size_id)
def test_more_than_a_tile_of_everything(native_kernels, size, dtype):
    batch, masks, tokens, width = size
    for ragged in (True, False):
        plan = make_plan(batch, masks, tokens, ragged=ragged)
        check_call(make_gather(plan, width, dtype=dtype))
        check_call(make_scatter(plan, width, fill="BTD", noise=0.01, dtype=dtype))


@dtypes
def test_what_is_moved_keeps_its_bits(backend, dtype):
    """Kept tokens, and gradients that go to one place, are copied: no rounding, infinities and NaN as they are."""
    plan = make_plan(2, 3, 13)
    call = make_gather(plan, dtype=dtype, traps=False)
    call.tensors["x"][0, 3], call.tensors["x"][1, 2, ::2] = float("inf"), float("nan")
    kept = call()
    for row in range(plan.rows):
        ids = plan.ids_keep[row, : plan.keep_len[row]].long()
        assert torch.equal(kept[row, : len(ids)].nan_to_num(7), call.tensors["x"][row // 3][ids].nan_to_num(7))
        assert not kept[row, len(ids) :].any()
    back = pyeff.ops.multimask_scatter(kept, plan, noise_std=0.0)
    assert torch.equal(pyeff.ops.multimask_gather(back.view(6, 13, 9), _each_alone(plan)).nan_to_num(7),
                       kept.nan_to_num(7))  # fmt: skip


def _each_alone(plan: MaskPlan) -> MaskPlan:
    """The same rows, each of a sample of its own."""
    return MaskPlan(plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths.repeat_interleave(plan.masks))


@dtypes
@pytest.mark.parametrize("kind", [k for k in helpers.STRIDES if k != "contiguous"])
def test_strides(backend, kind, dtype):
    """Inputs and incoming gradients of any strides."""
    for call in (make_gather(dtype=dtype, strides=kind), make_scatter(fill="BTD", dtype=dtype, strides=kind)):
        check_call(call)
        grad_out = random_grad(call)
        check_call(call, grad_out=helpers.lay_out(grad_out if kind != "expanded" else grad_out.nan_to_num(1.0), kind))
    check_call(make_gather(dtype=dtype), grad_out=torch.ones((), dtype=dtype).expand(6, 13, 9))


def test_one_sample_for_all(backend):
    """An x that is expanded over the batch, as a mask token is."""
    plan = make_plan(4, 2, 10)
    x = torch.randn(10, 9).expand(4, 10, 9)
    assert torch.equal(pyeff.ops.multimask_gather(x, plan), pyeff.reference.multimask_gather(x, plan))
    token = torch.randn(1, 9).expand(10, 9)
    found = pyeff.ops.multimask_scatter(torch.zeros(8, plan.width, 9), plan, fill=token, noise_std=0.0)
    assert torch.equal(found[plan.hidden().flatten(0, 1)], token[:1].expand(int(plan.count()), 9))


@dtypes
def test_nothing_kept_and_everything_kept(backend, dtype):
    for hide in (True, False):
        plan = MaskPlan.from_mask(torch.full((2, 3, 7), hide), torch.tensor([7, 4]))
        gather, scatter = make_gather(plan, dtype=dtype), make_scatter(plan, fill="TD", noise=0.1, dtype=dtype)
        found = check_call(gather), check_call(scatter)
        assert hide is not bool(found[0]["out"].any())
        assert hide is bool(found[1]["fill"].any())
        assert hide is not bool(found[1]["x"].any())


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (5, 1)], ids=str)
def test_samples_of_padding_alone(backend, lengths):
    plan = make_plan(2, 3, 5, lengths=lengths)
    check_call(make_gather(plan))
    found = check_call(make_scatter(plan, fill="D", noise=0.1))["out"].view(2, 3, 5, 9)
    for sample, length in enumerate(lengths):
        assert not found[sample, :, length:].any()


@ops
@pytest.mark.parametrize("empty", ["width", "tokens"])
def test_empty(backend, op, empty):
    """No channel or no token: empty results of the right shapes, gradients too."""
    sizes = {"width": 0} if empty == "width" and op != "multimask_relative_bias" else {"tokens": 0}
    if op == "multimask_targets":
        call = MAKERS[op](lengths=None, **sizes)
    else:
        call = MAKERS[op](**sizes, **({"ragged": False} if "tokens" in sizes else {}))
    expected = call(call.definition)
    found = results(call, call.tensors, torch.zeros_like(expected))
    assert (found["out"].shape, found["out"].dtype) == (expected.shape, expected.dtype)
    for name, t in call.tensors.items():
        assert found[name].shape == t.shape
        assert not found[name].any()


@ops
@dtypes
def test_repeats_are_bitwise_equal(backend, op, dtype):
    call = MAKERS[op](dtype=dtype, tokens=40)
    grad_out = random_grad(call)
    first = results(call, call.tensors, grad_out)
    for name, t in results(call, call.tensors, grad_out).items():
        assert torch.equal(t.nan_to_num(7), first[name].nan_to_num(7)), name


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_thread_count_changes_no_bit(cpu_kernels, op, dtype):
    """Work is shared out to threads, sums are not: no result depends on how many threads there are."""
    sizes = {"batch": 3, "tokens": 211} | ({"width": 70} if op != "multimask_relative_bias" else {"masks": 2})
    call = MAKERS[op](dtype=dtype, **sizes)
    grad_out, threads, found = random_grad(call), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(results(call, call.tensors, grad_out))
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


@ops
def test_auto_takes_the_kernels(cpu_kernels, op):
    call = MAKERS[op](dtype=torch.float32)
    expected = call()
    with pyeff.backend("auto"):
        assert torch.equal(call(), expected)


@ops
def test_float16_on_a_cpu_is_served_by_the_reference(op):
    call = MAKERS[op](dtype=torch.float16)
    check_call(call)
    with pyeff.backend("auto"):
        assert torch.equal(call(), call(call.definition))


@ops
def test_inputs_are_not_changed(native, op):
    call = MAKERS[op]()
    before = {name: t.clone() for name, t in call.tensors.items()}
    parts = ("ids_keep", "keep_len", "inverse", "lengths")
    plan = {name: getattr(call.plan, name).clone() for name in parts} if call.plan else {}
    found = results(call, call.tensors, random_grad(call))
    for name, t in call.tensors.items():
        assert torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)), name
        # Memory of its own: a result that shares an input's would change with it.
        assert found[name].untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
    for name, t in plan.items():
        assert torch.equal(getattr(call.plan, name), t), name


def test_gather_and_scatter_are_each_others_derivative(backend64):
    """<gather(x), y> = <x, gather'(y)>, and for one student the derivative of gather is scatter without noise."""
    plan = make_plan(3, 1, 11)
    x = torch.randn(3, 11, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, plan.width, 5, dtype=torch.float64)
    (dx,) = torch.autograd.grad(pyeff.ops.multimask_gather(x, plan), x, y)
    assert torch.equal(dx, pyeff.ops.multimask_scatter(y, plan, noise_std=0.0))


def test_strided_index(backend):
    """The ops themselves take index tensors that lie scattered in memory, as parts of a larger buffer may."""
    plan = make_plan()
    scattered = MaskPlan(*(
        torch.stack([t, torch.full_like(t, -7)], -1)[..., 0] for t in (plan.ids_keep, plan.keep_len, plan.inverse,
                                                                       plan.lengths)
    ))  # fmt: skip
    assert not scattered.inverse.is_contiguous()
    for op in set(OPS) - {"multimask_targets"}:
        call = MAKERS[op](plan=plan)
        grad_out = random_grad(call)
        expected = results(call, call.tensors, grad_out)
        call.plan = scattered
        for name, t in results(call, call.tensors, grad_out).items():
            assert torch.equal(t.nan_to_num(7), expected[name].nan_to_num(7)), (op, name)
