"""The bias of relative positions from kept ids: against its oracle, and against a whole bias that is gathered."""

from __future__ import annotations

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from tests import helpers
from tests.helpers import DTYPES, dtypes, says
from tests.multimask_calls import check_call, make_bias, make_plan, oracle

OPERATION = "multimask_relative_bias"


@dtypes
@pytest.mark.parametrize("scale", [True, False], ids=["scale", "no_scale"])
@pytest.mark.parametrize(
    "size", [(2, 3, 13, 3), (1, 1, 1, 1), (1, 2, 63, 12), (1, 1, 500, 2)], ids=lambda s: "x".join(map(str, s))
)
def test_bias(backend, size, scale, dtype):
    batch, masks, tokens, heads = size
    for ragged in (True, False):
        check_call(make_bias(make_plan(batch, masks, tokens, ragged=ragged), heads, scale=scale, dtype=dtype))


@dtypes
@pytest.mark.parametrize("to", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtype_of_the_result(native, to, dtype):
    """The slopes of a float32 parameter may give a bias for scores in bfloat16; what they give is rounded once."""
    call = make_bias(dtype=dtype, to=to)
    if native != "reference" and pyeff.backends.refusal("multimask_relative_bias", native, call.first.device, to):
        with pytest.raises(RuntimeError, match="float"):
            call()
        return
    if native != "reference" and torch.float64 in (dtype, to) and dtype != to:
        with pytest.raises(RuntimeError, match=says(f"backend '{native}' was asked for", "float64 for both")):
            call()
        with pyeff.backend("auto"):
            found = call()
        with pyeff.backend("reference"):
            assert torch.equal(found, call())
        return
    out = call()
    assert out.dtype == to
    truth = oracle(call, [], None)["out"].double()
    finite = truth.isfinite()
    assert torch.equal(out.isfinite(), finite)
    size = truth[finite].abs().max().item()
    # Slope times scale is rounded to their dtype before.
    slack = helpers.rounding(to, 1, size) + helpers.rounding(dtype, 1, size)
    assert (out.double() - truth)[finite].abs().max() <= slack


def test_rows_and_columns_of_the_whole_bias(backend64):
    """As gathering from [T, T] gives it; -inf for keys that are not there."""
    plan, slopes = make_plan(2, 3, 17), torch.rand(4, dtype=torch.float64)
    at = torch.arange(17, dtype=torch.float64)
    whole = -slopes[:, None, None] * (at[:, None] - at).abs()
    found = pyeff.ops.multimask_relative_bias(plan, slopes)
    assert found.shape == (6, 4, plan.width, plan.width)
    for row in range(plan.rows):
        ids = plan.ids_keep[row, : plan.keep_len[row]].long()
        torch.testing.assert_close(found[row, :, : len(ids), : len(ids)], whole[:, ids][:, :, ids], rtol=0, atol=1e-14)
        if len(ids):
            assert (found[row, :, :, len(ids) :] == float("-inf")).all()
        else:
            assert not found[row].any()


@dtypes
@pytest.mark.parametrize("prefix", [1, 3])
def test_prefix(backend, prefix, dtype):
    """Tokens outside of the sequence have no distance to any; the others have what they had."""
    plan = make_plan(2, 3, 11)
    call = make_bias(plan.with_prefix(prefix), dtype=dtype)
    found, plain = check_call(call)["out"], make_bias(plan, dtype=dtype)()
    assert not found[:, :, :prefix].nan_to_num(neginf=0).any()
    assert not found[:, :, :, :prefix].any()
    rows = plan.keep_len > 0
    assert torch.equal(found[rows][:, :, prefix:, prefix:], plain[rows])


def test_attention_of_rows_that_keep_nothing(backend):
    """No query is NaN, whatever a row keeps."""
    plan = make_plan(2, 3, 9)
    assert 0 in plan.keep_len.tolist()
    bias = pyeff.ops.multimask_relative_bias(plan, torch.tensor([0.5, 0.25]))
    q = torch.randn(6, 2, plan.width, 8)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)
    assert out.isfinite().all()


def test_one_scale_for_all_heads(backend64):
    plan, slopes = make_plan(), torch.rand(3, dtype=torch.float64)
    for shape in ((), (1,)):
        scale = torch.full(shape, 1.5, dtype=torch.float64, requires_grad=True)
        out = pyeff.ops.multimask_relative_bias(plan, slopes, scale)
        assert torch.equal(out, pyeff.ops.multimask_relative_bias(plan, 1.5 * slopes))
        (grad,) = torch.autograd.grad(out.nan_to_num(neginf=0).sum(), scale)
        assert grad.shape == shape
        assert grad < 0


def test_large_distances_are_exact(backend):
    """Ids up to 2^24 are numbers of float32; a difference of two of them is taken before it is rounded to 16 bits."""
    hidden = torch.ones(1, 1, 5000, dtype=torch.bool)
    hidden[0, 0, [0, 4098, 4099, 4999]] = False
    plan = MaskPlan.from_mask(hidden)
    found = pyeff.ops.multimask_relative_bias(plan, torch.tensor([1.0]))[0, 0]
    assert found[1, 2] == -1
    assert found[0, 3] == -4999
