"""The multimask family at the smallest shapes that reach every path of a GPU's kernel, few enough for an interpreter.

The same tests run at every other place, too. As everywhere, what must not count is NaN (``multimask_calls``).
"""

from __future__ import annotations

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from tests import helpers, places
from tests.helpers import gpu_dtypes
from tests.multimask_calls import (
    KINDS,
    NORMS,
    check_call,
    make_bias,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    random_grad,
    refusal,
    results,
)  # fmt: skip
from tests.test_block_mask import CASES, draw
from tests.test_ema import check as check_ema
from tests.test_ema import make as make_ema
from tests.test_multimask_noise import noise, zero
from tests.test_multimask_plan import same
from tests.test_multimask_targets import accumulated

OPERATION = "multimask_loss"
pytestmark = pytest.mark.emulated
kinds = pytest.mark.parametrize("kind", KINDS)
norms = pytest.mark.parametrize("norm", NORMS)
# Widths below and above what a block of threads takes at once, and ones that no vector divides.
WIDTHS = (1, 9, 64, 136)


def beta_of(kind: str) -> float:
    return 0.7 if kind == "smooth_l1" else 0.0


@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((width, torch.float32) for width in WIDTHS), (9, torch.bfloat16), (9, torch.float16)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_gather_and_scatter(kernels, width, dtype):
    plan = make_plan(2, 3, 7)
    check_call(make_gather(plan, width, dtype=dtype))
    check_call(make_scatter(plan, width, fill="BTD", noise=0.5, dtype=dtype))


@pytest.mark.parametrize("fill", ["", "D", "TD"], ids=lambda f: f or "none")
def test_fills(kernels, fill):
    check_call(make_scatter(make_plan(2, 2, 5), 12, fill=fill, dtype=torch.float32))


@pytest.mark.parametrize("names", [["x"], ["fill"]], ids="-".join)
def test_some_gradients(kernels, names):
    check_call(make_scatter(make_plan(2, 2, 5), 12, fill="D", dtype=torch.float32), names)


def test_many_students(kernels):
    """More of them, and more tokens, than one block has threads for."""
    plan = make_plan(1, 17, 5)
    check_call(make_gather(plan, 8, dtype=torch.float32))
    check_call(make_loss(plan, 8, dtype=torch.float32))
    check_call(make_gather(make_plan(1, 1, 300), 4, dtype=torch.float32))


@gpu_dtypes
@norms
def test_targets(kernels, norm, dtype):
    check_call(make_targets(2, 7, 12, 2, norm=norm, dtype=dtype))


# Each after another, and statistics after statistics of the same kind.
@pytest.mark.parametrize(
    ("norm", "post_norm"),
    [("none", "batch"), ("instance", "layer"), ("layer", "instance"), ("batch", "layer"), ("batch", "batch")],
)
def test_targets_and_a_norm_after(kernels, norm, post_norm):
    check_call(make_targets(2, 5, 12, 2, norm=norm, post_norm=post_norm, dtype=torch.float32))


@pytest.mark.parametrize("size", [(1, 70, 40, 1), (1, 3, 136, 3), (2, 300, 3, 1)], ids=str)
def test_targets_of_more_than_a_tile(kernels, size):
    check_call(make_targets(*size, dtype=torch.float32))
    check_call(make_targets(*size, norm="batch", post_norm="layer", dtype=torch.float32, eps=0.1), [])


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_a_mean_that_drowns_the_variance(kernels, norm):
    check_call(make_targets(2, 40, 40, 2, norm=norm, mean=30.0, deviation=0.01, eps=1e-12, dtype=torch.float32))


def test_one_token(kernels):
    call = make_targets(2, 1, 9, lengths=None, mean=3.0, dtype=torch.float32)
    assert not check_call(call)["out"].any()


@norms
def test_layer_by_layer(kernels, norm):
    call = make_targets(2, 5, 12, 2, norm=norm, dtype=torch.float32)
    assert helpers.error(accumulated(call), call(call.definition)) < 1e-5


@gpu_dtypes
@kinds
def test_losses(kernels, kind, dtype):
    """By the forward pass that writes the gradient, and by the backward pass."""
    for names in (["pred"], ["pred", "target"]):
        check_call(make_loss(make_plan(2, 3, 5), 12, kind=kind, beta=beta_of(kind), dtype=dtype), names)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reductions(kernels, reduction, width):
    check_call(make_loss(make_plan(2, 2, 5), width, reduction=reduction, dtype=torch.float32))
    check_call(make_loss(make_plan(2, 2, 5), width, reduction=reduction, dtype=torch.float32), ["pred"])


def test_factors_of_the_loss(kernels):
    """Read on the device; a graph that is kept is not spoilt."""
    call = make_loss(make_plan(2, 2, 5), 12, dtype=torch.float32).require_grad(["pred"])
    (one,) = torch.autograd.grad(call(), call.first)
    (twice,) = torch.autograd.grad(2 * call(), call.first)
    torch.testing.assert_close(twice, 2 * one)
    loss = call()
    (first,) = torch.autograd.grad(loss, call.first, retain_graph=True)
    (again,) = torch.autograd.grad(loss, call.first, torch.tensor(3.0))
    assert torch.equal(first, one)
    torch.testing.assert_close(again, 3 * one)


@gpu_dtypes
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_moments(kernels, offset, dtype):
    call = make_loss(make_plan(2, 3, 9), 12, dtype=dtype)
    if offset:
        call = call.map(lambda t: t * 0.01 + offset)
    call = call.but(statistics=True)
    _, found = call()
    _, expected = call.to(torch.float64)(call.definition)
    assert found[0] == expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prefix", [0, 1])
@gpu_dtypes
def test_bias(kernels, prefix, dtype):
    check_call(make_bias(make_plan(2, 3, 9).with_prefix(prefix), 3, dtype=dtype))


@pytest.mark.parametrize("case", [name for name, (shape, _) in CASES.items() if len(shape) == 2 or shape[0] < 100])
def test_masks(kernels, case):
    assert same(draw(case, 1, 2), draw(case, 1, 2, where=pyeff.reference))


def test_masks_of_samples_with_padding(kernels):
    lengths = torch.tensor([40, 0, 1, 17])
    options = {"keep": 0.5, "adjust": 0.1, "length": 3, "lengths": lengths, "seed": -3}
    found, expected = (where.block_mask(4, 2, (40,), **options) for where in (pyeff.ops, pyeff.reference))
    assert same(found, expected)


def test_masks_of_more_tokens_than_threads(kernels):
    options = {"keep": 0.4, "adjust": 0.1, "length": 5}
    found, expected = (where.block_mask(1, 1, (600,), **options) for where in (pyeff.ops, pyeff.reference))
    assert same(found, expected)


def test_the_layout_of_the_batch_does_not_matter(kernels):
    names = torch.tensor([7, 2**40 + 1])
    whole = noise(zero(2, 2, 5), 10, seed=4, sample_ids=names).view(2, 2, 5, 10)
    part = noise(zero(1, 2, 5), 10, seed=4, sample_ids=names[1:])
    assert torch.equal(part.view(2, 5, 10), whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_averages(kernels, dtype):
    """Copies in another dtype; as many tensors as one launch may not be able to name."""
    if dtype == torch.float16:
        dtype = next(d for d in places.here().dtypes if d.itemsize == 2)
    shapes = [(), (7,), (0,), (3, 5), (300,), *[(2,)] * 40]
    ema, params = make_ema(torch.float32, shapes=shapes)
    check_ema(ema, params, 0.999, None if dtype == torch.float32 else [torch.zeros_like(e, dtype=dtype) for e in ema])


def test_nothing_kept_and_everything_kept(kernels):
    for hide in (True, False):
        plan = MaskPlan.from_mask(torch.full((2, 2, 5), hide), torch.tensor([5, 0]))
        check_call(make_gather(plan, 8, dtype=torch.float32))
        check_call(make_scatter(plan, 8, fill="TD", dtype=torch.float32))
        check_call(make_loss(plan, 8, dtype=torch.float32), ["pred"])


@pytest.mark.parametrize("kind", ["sliced", "transposed", "permuted", "expanded"])
def test_strides(kernels, kind):
    for make in (make_gather, make_scatter, make_loss):
        check_call(make(make_plan(2, 2, 5), 9, strides=kind, dtype=torch.float32))
    check_call(make_targets(2, 5, 9, 2, strides=kind, dtype=torch.float32, eps=0.1))


def test_repeats_are_bitwise_equal(kernels):
    plan = make_plan(2, 3, 9)
    for call in (
        make_gather(plan, 20, dtype=torch.float32), make_scatter(plan, 20, fill="D", dtype=torch.float32),
        make_loss(plan, 20, dtype=torch.float32), make_bias(plan, dtype=torch.float32),
        make_targets(2, 9, 20, dtype=torch.float32),
    ):  # fmt: skip
        grad_out = random_grad(call)
        first, again = (results(call, call.tensors, grad_out) for _ in range(2))
        assert all(torch.equal(first[name].nan_to_num(7), again[name].nan_to_num(7)) for name in first)


def test_indices_that_lead_outside(kernels):
    """What is not in range is not kept, or cut to it: nothing beyond the tensors is read or written."""
    for part in ("ids_keep", "keep_len", "inverse", "lengths"):
        for value in (-(2**31), -2, 13, 2**31 - 1):
            for make in (make_gather, make_scatter, make_loss):
                call = make(make_plan(2, 2, 5), 8, traps=False, dtype=torch.float32)
                call = call.require_grad(call.tensors)
                getattr(call.plan, part).view(-1)[[0, -1]] = value

                def both(call=call):
                    out = call()
                    torch.autograd.grad(out, call.first, torch.ones_like(out))

                text = refusal(both)
                assert not text or part in text
