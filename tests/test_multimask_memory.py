"""What the derivatives of the multimask family keep and make: no more than is wanted, at any size and stride."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import helpers
from tests.multimask_calls import (
    Call,
    check_call,
    make_bias,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    random_grad,
    results,
)  # fmt: skip

OPERATION = "multimask_loss"


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
    call, plan = call.require_grad([next(iter(call.tensors))]), call.plan
    parts = (plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths) if plan else ()
    return helpers.bytes_of(helpers.kept_for_backward(call, (*call.tensors.values(), *parts)))


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
