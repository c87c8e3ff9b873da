"""The loss of many students against its float64 oracle, and the moments that watch for collapse."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from tests import helpers
from tests.helpers import dtypes
from tests.multimask_calls import KINDS, REDUCTIONS, check_call, make_loss, make_plan, oracle, results

OPERATION = "multimask_loss"
kinds = pytest.mark.parametrize("kind", KINDS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
# batch, masks, tokens, width
SIZES = [(1, 1, 1, 1), (3, 1, 7, 64), (1, 16, 5, 3), (2, 2, 63, 17), (1, 2, 500, 5), (1, 2, 6, 1023)]
ALL = [["pred"], ["target"], ["pred", "target"]]


def beta_of(kind: str) -> float:
    return 0.7 if kind == "smooth_l1" else 0.0


@dtypes
@kinds
@reductions
@pytest.mark.parametrize("names", ALL, ids="-".join)
def test_kinds_and_reductions(backend, names, reduction, kind, dtype):
    """By each path to a gradient: of predictions alone it is written in the forward pass."""
    check_call(make_loss(kind=kind, beta=beta_of(kind), reduction=reduction, dtype=dtype), names)


@dtypes
@kinds
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(native_kernels, size, kind, dtype):
    batch, masks, tokens, width = size
    for ragged in (True, False):
        plan = make_plan(batch, masks, tokens, ragged=ragged)
        call = make_loss(plan, width, kind=kind, beta=beta_of(kind), dtype=dtype)
        check_call(call, [])
        check_call(call, ["pred"])
        check_call(call)


@dtypes
@kinds
def test_more_than_a_tile_of_everything(native_kernels, kind, dtype):
    call = make_loss(make_plan(2, 8, 196), 96, kind=kind, beta=beta_of(kind), dtype=dtype)
    check_call(call, ["pred"])
    check_call(call)


@dtypes
@pytest.mark.parametrize("strides", [k for k in helpers.STRIDES if k != "contiguous"])
def test_strides(backend, strides, dtype):
    for names in ALL[::2]:
        check_call(make_loss(dtype=dtype, strides=strides), names)
        check_call(make_loss(dtype=dtype, strides=strides, kind="cosine", reduction="none"), names)


@pytest.mark.parametrize("scale", [None, 1.0, 0.125, -2.0, 0.0])
@reductions
def test_scale(backend, reduction, scale):
    """1 / sqrt(D) unless it is given, a factor of all."""
    call = make_loss(width=16, reduction=reduction, scale=scale)
    found = check_call(call)["out"]
    ones = call.but(scale=1.0)()
    torch.testing.assert_close(found, (0.25 if scale is None else scale) * ones, rtol=1e-5, atol=1e-6)


@dtypes
def test_smooth_l1(backend, dtype):
    """Beta 0 is L1; a large one is half of L2 over beta; the same as torch's own."""
    call = make_loss(kind="smooth_l1", scale=1.0, dtype=dtype, traps=False)
    assert torch.equal(call(), call.but(kind="l1")())
    wide_call = call.to(torch.float64)
    hidden = call.plan.hidden().flatten(0, 1)
    target = wide_call.tensors["target"].repeat_interleave(3, 0)[hidden]
    for beta in (0.3, 100.0):
        expected = torch.nn.functional.smooth_l1_loss(wide_call.first[hidden], target, reduction="sum", beta=beta)
        found = check_call(call.but(beta=beta))["out"]
        assert helpers.error(found, expected) <= helpers.rounding(found.dtype, 9 * 78, expected.item())


@kinds
def test_the_definition_in_other_words(backend64, kind):
    """By boolean indexing of repeated targets, as it is usually written."""
    call = make_loss(kind=kind, beta=beta_of(kind), scale=1.0, traps=False)
    hidden = call.plan.hidden().flatten(0, 1)
    x, y = call.first[hidden], call.tensors["target"].repeat_interleave(3, 0)[hidden]
    expected = {
        "l2": lambda: (x - y).square().sum(), "l1": lambda: (x - y).abs().sum(),
        "smooth_l1": lambda: torch.nn.functional.smooth_l1_loss(x, y, reduction="sum", beta=0.7),
        "cosine": lambda: (1 - torch.nn.functional.cosine_similarity(x, y)).sum(),
    }[kind]()  # fmt: skip
    torch.testing.assert_close(call().double(), expected, rtol=1e-11, atol=1e-11)
    each = call.but(reduction="none")()
    assert each.shape == hidden.shape
    assert not each[~hidden].any()
    torch.testing.assert_close(each.sum(), expected, rtol=1e-11, atol=1e-11)
    mean = call.but(reduction="mean")() * len(x) * (1 if kind == "cosine" else 9)
    torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-11)


@kinds
@reductions
@pytest.mark.parametrize("lengths", [None, (0, 0)], ids=["kept", "padding"])
def test_nothing_hidden(backend, lengths, kind, reduction):
    """Zero, and NaN for a mean of nothing; gradients of zero, NaN for that."""
    plan = MaskPlan.from_mask(torch.zeros(2, 3, 5, dtype=torch.bool), lengths and torch.tensor(lengths))
    call = make_loss(plan, kind=kind, beta=beta_of(kind), reduction=reduction)
    assert call.first.isnan().all()
    for names in ALL:
        found = results(call, names, torch.ones(call().shape))
        if reduction == "mean":
            assert found["out"].isnan()
        else:
            assert not found["out"].any()
        for name in names:
            assert not found[name].any(), name


def test_a_target_of_another_dtype(backend):
    """Taken as float32, or as float64 for float64; its gradient comes back in its own dtype."""
    call = make_loss(dtype=torch.float32)
    half = call.but(target=call.tensors["target"].bfloat16())
    same = call.but(target=half.tensors["target"].float())
    assert torch.equal(half(), same())
    found, expected = (results(c, ["target"], torch.ones(()))["target"] for c in (half, same))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_predictions_equal_to_targets(backend):
    """No loss and no gradient: that of a length, or of an absolute value, at zero is zero."""
    plan = make_plan(2, 3, 7)
    target = torch.randn(2, 7, 8)
    pred = target.repeat_interleave(3, 0)
    for kind in KINDS[:3]:
        leaf = pred.clone().requires_grad_()
        loss = pyeff.ops.multimask_loss(leaf, target, plan, kind=kind, beta=beta_of(kind))
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss == 0
        assert not grad.any()


def test_vectors_without_length(backend):
    """A cosine with a vector of zeros is 0, its loss 1; nothing is divided by nothing."""
    plan = MaskPlan.from_mask(torch.ones(1, 1, 3, dtype=torch.bool))
    pred, target = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    pred[0, 0], target[0, 1] = 0, 0
    call = make_loss(plan, 8, kind="cosine", reduction="none", scale=1.0).but(pred=pred, target=target)
    found = results(call, ["pred", "target"], torch.ones(1, 3))
    same = results(call, ["pred", "target"], torch.ones(1, 3), call.definition)
    assert torch.equal(found["out"][0, :2], torch.ones(2))
    for name, t in same.items():
        assert t.isfinite().all()
        torch.testing.assert_close(found[name], t)


@dtypes
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_moments(backend, offset, dtype):
    """Against float64; at mean 30 and deviation .01 a variance is left that is right."""
    call = make_loss(make_plan(3, 4, 33), 12, dtype=dtype)
    if offset:
        call = call.map(lambda t: t * 0.01 + offset)
    call = call.but(statistics=True)
    loss, found = call()
    plain = call.but(statistics=False)()
    assert torch.equal(loss, plain)
    assert found.dtype == torch.float64
    assert found.shape == (49,)
    _, expected = call.to(torch.float64)(call.definition)
    assert found[0] == expected[0] == call.plan.count()
    # What they are sums of is in the dtype; the sums are as good as float64's, or nearly.
    torch.testing.assert_close(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-9, atol=1e-9)
    for a, b in zip(pyeff.ops.multimask_spread(found), pyeff.ops.multimask_spread(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_moments_do_not_change_the_gradient(backend):
    call = make_loss(dtype=torch.float32)
    expected = results(call, ["pred"], torch.ones(()))["pred"]
    leaves = call.require_grad(["pred"])
    loss, moments = leaves.but(statistics=True)()
    assert not moments.requires_grad
    assert torch.equal(torch.autograd.grad(loss, leaves.first)[0], expected)


def test_moments_of_processes_add_up(backend64):
    call = make_loss(make_plan(4, 2, 9), traps=False).but(statistics=True)
    _, whole = call()
    parts = 0
    for half in (slice(0, 2), slice(2, 4)):
        rows = slice(2 * half.start, 2 * half.stop)
        plan = MaskPlan(
            call.plan.ids_keep[rows], call.plan.keep_len[rows], call.plan.inverse[rows], call.plan.lengths[half]
        )
        part = make_loss(plan).but(pred=call.first[rows], target=call.tensors["target"][half], statistics=True)
        parts = parts + part()[1]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_spread(backend64):
    """mean_d sqrt(var_d + eps), with the unbiased variance over hidden tokens."""
    call = make_loss(make_plan(2, 3, 50), 6).but(statistics=True)
    hidden = call.plan.hidden().flatten(0, 1)
    spreads = pyeff.ops.multimask_spread(call()[1])
    tensors = call.tensors["target"].repeat_interleave(3, 0)[hidden], call.first[hidden]
    for found, t in zip(spreads, tensors, strict=True):
        torch.testing.assert_close(found, (t.var(0) + 1e-6).sqrt().mean(), rtol=1e-10, atol=0)
    collapsed = call.but(pred=torch.full_like(call.first, 2.5))
    assert abs(pyeff.ops.multimask_spread(collapsed()[1])[1] - 1e-3) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(backend, bad):
    """In a hidden place it is in the loss, and in the gradient of its own token alone."""
    plan = MaskPlan.from_mask(torch.ones(2, 2, 5, dtype=torch.bool))
    call = make_loss(plan)
    clean = results(call, ["pred"], torch.ones(()))
    call.tensors["pred"][1, 2, 3] = bad
    spoilt = results(call, ["pred"], torch.ones(()))
    assert not spoilt["out"].isfinite()
    others = torch.ones(4, 5, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(spoilt["pred"][others], clean["pred"][others])


def test_the_sum_of_many(backend):
    """A running sum in float32 stands still at 2^24; the count and the sum of these does not."""
    plan = MaskPlan.from_mask(torch.ones(1, 8, 1300, dtype=torch.bool))
    pred, target = torch.full((8, 1300, 32), 1.001), torch.zeros(1, 1300, 32)
    found = pyeff.ops.multimask_loss(pred, target, plan, scale=100.0)
    call = make_loss(plan, 32, scale=100.0).but(pred=pred, target=target)
    truth = oracle(call, [], None)["out"]
    assert helpers.error(found, truth) <= 2e-6 * truth.item()
