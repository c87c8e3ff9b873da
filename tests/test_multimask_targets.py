"""Targets against their float64 oracle: norms, padding, strides, means that drown the variance, the streaming sum."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff.reference.multimask import wide
from tests import helpers, places
from tests.helpers import dtypes
from tests.multimask_calls import NORMS, Call, check_call, make_targets, oracle, sizes, terms

OPERATION = "multimask_targets"
norms = pytest.mark.parametrize("norm", NORMS)
post_norms = pytest.mark.parametrize("post_norm", NORMS)
# batch, tokens, width, layers
SIZES = [(1, 2, 1, 1), (1, 7, 64, 2), (2, 63, 17, 1), (1, 500, 3, 2), (2, 6, 1023, 2)]
EACH = ("none", "instance", "layer", "batch")


@dtypes
@norms
@post_norms
def test_norms(backend, norm, post_norm, dtype):
    check_call(make_targets(norm=norm, post_norm=post_norm, dtype=dtype))


@dtypes
@norms
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(native_kernels, size, norm, dtype):
    batch, tokens, width, layers = size
    # Over one channel, or two tokens, the deviation may be anything down to zero.
    eps = 1e-5 if width > 2 and tokens > 2 else 0.1
    check_call(make_targets(batch, tokens, width, layers, norm=norm, eps=eps, dtype=dtype))
    check_call(make_targets(batch, tokens, width, layers, norm=norm, eps=eps, lengths=None, dtype=dtype))


@dtypes
@pytest.mark.parametrize("size", [(2, 1023, 33, 2), (2, 196, 300, 5)], ids=lambda s: "x".join(map(str, s)))
def test_more_than_a_tile_of_everything(native_kernels, size, dtype):
    check_call(make_targets(*size, post_norm="layer", dtype=dtype))
    check_call(make_targets(*size, norm="batch", post_norm="instance", dtype=dtype), [])


@dtypes
@norms
@pytest.mark.parametrize("strides", [k for k in helpers.STRIDES if k != "contiguous"])
def test_strides(backend, strides, norm, dtype):
    check_call(make_targets(norm=norm, strides=strides, dtype=dtype, eps=0.1))


def test_layers_of_different_strides(backend):
    call = make_targets(layers=4, lengths=None)
    for i, kind in enumerate(("sliced", "transposed", "permuted", "every_second")):
        call.tensors[f"layer{i}"] = helpers.lay_out(call.tensors[f"layer{i}"], kind)
    check_call(call)


@dtypes
@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_one_of_everything(backend, norm, dtype):
    """One token, one channel, one sample: nothing to divide by but eps, and exactly zero, as its gradient is."""
    batch, tokens, width = {"instance": (2, 1, 9), "layer": (2, 5, 1), "batch": (1, 1, 9)}[norm]
    call = make_targets(batch, tokens, width, norm=norm, lengths=None, mean=3.0, dtype=dtype)
    found = check_call(call)
    assert found["out"].shape == (batch, tokens, width)
    assert not found["out"].any()
    assert not found["layer0"].any()


@dtypes
@norms
def test_lengths(backend, norm, dtype):
    """Padding is zero, whatever is there, and counts in no statistic."""
    call = make_targets(4, 9, norm=norm, lengths=[9, 0, 1, 5], eps=0.1, dtype=dtype)
    found = check_call(call)
    for sample, length in enumerate([9, 0, 1, 5]):
        assert not found["out"][sample, length:].any()
        assert not found["layer1"][sample, length:].any()
        if norm != "batch":  # the same as without the padding
            alone = call.map(lambda t: t[sample : sample + 1, :length]).but(lengths=None)  # noqa: B023
            helpers.assert_three_way(
                "out", alone(), alone(call.definition), oracle(call, [], None)["out"][sample : sample + 1, :length],
                terms(call, "out"), sizes(call, None)["out"],
            )  # fmt: skip


MEAN, DEVIATION = 30.0, 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
@pytest.mark.parametrize("tokens", [40, 1023])
def test_a_mean_that_drowns_the_variance(backend, tokens, norm, dtype):
    """Mean 30, deviation .01: the mean of squares less the square of the mean is negative in float32."""
    call = make_targets(2, tokens, 64, 2, norm=norm, mean=MEAN, deviation=DEVIATION, eps=1e-12, dtype=dtype)
    naive = call.first[0].square().mean(0) - call.first[0].mean(0).square()
    assert dtype == torch.float64 or (naive < 0).any()
    found = check_call(call)["out"]
    if norm == "instance":
        # And not by the measure of the definition alone: numbers of deviation one again, to four digits.
        spread = found[0].double().square().mean(0)
        assert (spread > 0.1).all()
        assert helpers.error(found, oracle(call, [], None)["out"]) < 2e-3


def test_a_mean_that_drowns_the_variance_of_the_mean(backend):
    """The same for the norm of what was averaged."""
    call = make_targets(2, 40, 64, 3, norm="none", post_norm="layer", mean=MEAN, deviation=DEVIATION, eps=1e-12,
                        dtype=torch.float32)  # fmt: skip
    found = check_call(call)["out"]
    assert helpers.error(found, oracle(call, [], None)["out"]) < 5e-3


@norms
def test_large_and_small_numbers(backend, norm):
    """Squares of 1e18 are in the range of float32, those of 1e-18 too; what is between is not lost."""
    for size in (1e18, 1e-15):
        call = make_targets(deviation=size, mean=0.25 * size, norm=norm, eps=1e-36, dtype=torch.float32)
        check_call(call, [])


@norms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(backend, norm, bad):
    """In its channel of its sample, in its token, or in its channel of all samples."""
    call = make_targets(3, 11, 8, 2, norm=norm, lengths=None)
    clean = call()
    call.tensors["layer1"][1, 4, 5] = bad
    hit = torch.zeros(3, 11, 8, dtype=torch.bool)
    where = {"none": (1, 4, 5), "instance": (1, slice(None), 5), "layer": (1, 4), "batch": (..., 5)}[norm]
    hit[where] = True
    spoilt = call()
    assert torch.equal(spoilt[~hit], clean[~hit])
    assert not spoilt[1, 4, 5].isfinite()
    if not math.isinf(bad):
        assert spoilt[hit].isnan().all()


def accumulated(call: Call, post_norm: str = "none") -> torch.Tensor:
    options = {n: v for n, v in call.options.items() if n != "post_norm"}
    total = torch.zeros(call.first.shape, dtype=wide(call.first.dtype))
    for layer in call.tensors.values():
        pyeff.ops.multimask_accumulate_(total, layer, weight=1 / len(call.tensors), **options)
    if post_norm == "none":
        return total
    return pyeff.ops.multimask_targets([total], **{**options, "norm": post_norm})


@dtypes
@norms
@pytest.mark.parametrize("post_norm", ["none", "layer"])
def test_layer_by_layer(backend, norm, post_norm, dtype):
    """The streaming sum gives the same targets."""
    for strides in ("contiguous", "transposed"):
        call = make_targets(layers=4, norm=norm, post_norm=post_norm, dtype=dtype, strides=strides)
        found = accumulated(call, post_norm)
        same, truth = call(call.definition), oracle(call, [], None)["out"]
        helpers.assert_three_way("out", found, same, truth, terms(call, "out"), sizes(call, None)["out"])


def test_layer_by_layer_leaves_padding_alone(backend):
    call = make_targets(3, 9, lengths=[9, 0, 4])
    total = torch.full(call.first.shape, 5.0, dtype=wide(call.first.dtype))
    pyeff.ops.multimask_accumulate_(total, call.first, weight=0.5, lengths=call.options["lengths"])
    assert (total[1] == 5).all()
    assert (total[2, 4:] == 5).all()
    assert (total[0] != 5).any()
    expected = torch.full_like(total, 5.0)
    pyeff.reference.multimask_accumulate_(expected, call.first, weight=0.5, lengths=call.options["lengths"])
    slack = helpers.rounding(total.dtype, terms(call, "out"), 5 + sizes(call, None)["out"])
    assert helpers.error(total, expected) <= 2 * slack


def test_layer_by_layer_records_no_gradient(backend):
    call = make_targets(dtype=torch.float32).require_grad(["layer0"])
    total = torch.zeros(call.first.shape)
    version = total._version
    pyeff.ops.multimask_accumulate_(total, call.first, weight=1.0)
    assert not total.requires_grad
    assert total._version > version, "autograd would not notice the change"


@dtypes
def test_lengths_of_either_kind(backend, dtype):
    call = make_targets(dtype=dtype)
    for kind in (torch.int32, torch.int64):
        assert torch.equal(call.but(lengths=call.options["lengths"].to(kind))(), call())


def test_one_layer_many_times(backend64):
    """K times the same layer gives that layer's norm; the order of different ones does not matter much."""
    call = make_targets(layers=1, dtype=torch.float64)
    repeated = pyeff.ops.multimask_targets([call.first] * 5, **call.options)
    torch.testing.assert_close(repeated, call(), rtol=1e-12, atol=1e-12)
    assert places.here().dtypes[0] == torch.float64
