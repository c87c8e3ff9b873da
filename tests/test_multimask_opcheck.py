"""torch.library's own checks of the multimask family's ops, of the inner ones too."""

from __future__ import annotations

import pytest
import torch

import pyeff
from tests import places
from tests.multimask_calls import OPS, Call, make_plan, normal
from tests.multimask_parts import small

OPERATION = "multimask_loss"
ops = pytest.mark.parametrize("op", OPS)


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
