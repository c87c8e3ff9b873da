"""The multimask family on a CUDA device, beyond what every backend must do: graphs, waiting, streams, memory, sizes."""

from __future__ import annotations

import pytest
import torch

import pyeff
from benchmarks import memory
from tests.cuda_steps import Step, captured, fill_free_memory, launched, need_memory
from tests.helpers import gpu_dtypes
from tests.multimask_calls import (
    KINDS,
    MAKERS,
    NORMS,
    OPS,
    check_call,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    random_grad,
    results,
)  # fmt: skip
from tests.test_multimask_plan import same

OPERATION = "multimask_loss"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
ops = pytest.mark.parametrize("op", OPS)


class Training:
    """What of a pre-training step is not an encoder, on tensors whose memory stays; masks change with the seed."""

    def __init__(self, dtype: torch.dtype, batch=2, masks=4, tokens=50, width=72, layers=3):
        self.sizes = batch, masks, (tokens,)
        self.x = torch.randn(batch, tokens, width, dtype=dtype).requires_grad_()
        self.layers = [torch.randn(batch, tokens, width, dtype=dtype) for _ in range(layers)]
        self.decoder = torch.randn(width, width, dtype=dtype).div_(width**0.5).requires_grad_()
        self.ema, self.params = ([torch.randn(n) for n in (7, 3000, 1)] for _ in range(2))
        self.seed, self.decay = torch.tensor(0), torch.tensor(0.9, dtype=torch.float64)
        self.names = torch.arange(batch)

    def __call__(self) -> list[torch.Tensor]:
        plan = pyeff.ops.block_mask(
            *self.sizes, keep=0.4, adjust=0.05, length=3, seed=self.seed, sample_ids=self.names, device="cuda"
        )
        target = pyeff.ops.multimask_targets(self.layers, post_norm="layer")
        kept = pyeff.ops.multimask_gather(self.x, plan)
        decoded = pyeff.ops.multimask_scatter(kept, plan, seed=self.seed, sample_ids=self.names)
        pred = decoded @ self.decoder
        loss, moments = pyeff.ops.multimask_loss(pred, target, plan, reduction="mean", statistics=True)
        spreads = pyeff.ops.multimask_spread(moments)
        grads = torch.autograd.grad(3.0 * loss, [self.x, self.decoder])
        ema = [t.clone() for t in self.ema]
        pyeff.ops.ema_update_(ema, self.params, self.decay)
        return [loss.detach(), moments, *spreads, *grads, plan.ids_keep, plan.inverse, *ema]


@gpu_dtypes
def test_a_whole_step_in_one_graph(gpu_kernels, dtype):
    """Captured once; each replay draws its own masks and noise, and gives bit for bit what the calls give."""
    step = Training(dtype)
    graph, found = captured(step)
    masks = []
    for seed in (1, 2, 3):
        with torch.no_grad():
            step.seed.fill_(seed)
            step.decay.fill_(1 - 0.1 * seed)
            step.x.normal_()
            for t in step.layers:
                t.normal_()
        for t in found:
            t.fill_(-1 if not t.is_floating_point() else float("nan"))
        graph.replay()
        for a, b in zip(found, step(), strict=True):
            assert torch.equal(a, b)
        masks.append(found[7].clone())
    assert not torch.equal(masks[0], masks[1])


def test_plans_that_change_between_replays(gpu_kernels):
    """Masks from elsewhere, put into the plan that the graph knows."""
    plan, x = make_plan(ragged=False), torch.randn(2, 13, 40, requires_grad=True)

    def step() -> list[torch.Tensor]:
        kept = pyeff.ops.multimask_gather(x, plan)
        out = pyeff.ops.multimask_scatter(kept, plan, noise_std=0.0)
        return [out.detach(), *torch.autograd.grad(out.sum(), x)]

    graph, found = captured(step)
    for seed in (1, 2):
        other = make_plan(ragged=False, seed=seed)
        assert same(plan.copy_(other), other)
        graph.replay()
        for a, b in zip(found, step(), strict=True):
            assert torch.equal(a, b)


def without_waiting(step: Step) -> None:
    step()  # kernels are loaded and compiled, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(gpu_kernels):
    without_waiting(Training(torch.bfloat16))


@ops
def test_no_op_waits_for_the_device(gpu_kernels, op):
    call = MAKERS[op](dtype=torch.float32)
    grad_out, leaves = random_grad(call), call.require_grad(call.tensors)
    without_waiting(lambda: torch.autograd.grad(leaves(), list(leaves.tensors.values()), grad_out))


def test_plans_do_not_wait(gpu_kernels):
    """From a mask, if the width is given; from ids; with a prefix; to what is hidden and how many that are."""
    hidden, lengths = make_plan().hidden(), torch.tensor([13, 9])
    ids = make_plan(ragged=False).ids_keep.view(2, 3, -1)

    def step():
        plan = pyeff.MaskPlan.from_mask(hidden, lengths, width=5).with_prefix(1)
        pyeff.MaskPlan.from_ids(ids, 13)
        return [plan.hidden(), plan.count(), plan.slots()]

    without_waiting(step)


def test_work_is_on_the_current_stream(gpu_kernels):
    """Inputs that arrive late on the caller's stream: another one would still read NaN."""
    step = Training(torch.float32)
    expected, values = step(), step.x.detach().clone()
    with torch.no_grad():
        step.x.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles, some hundredths of a second
        with torch.no_grad():
            step.x.copy_(values)
        found = step()
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_device_that_is_not_the_current_one(gpu_kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    for op in OPS:
        call = MAKERS[op](dtype=torch.float32)
        if op == "multimask_targets":
            call = call.but(lengths=None)
            call = call.map(lambda t: t.nan_to_num())
        grad_out = random_grad(call)
        expected = results(call, call.tensors, grad_out)
        call = call.map(lambda t: t.to("cuda:1"))
        call.plan = call.plan and call.plan.to("cuda:1")
        found = results(call, call.tensors, grad_out.to("cuda:1"))
        assert torch.cuda.current_device() == 0
        for name, t in found.items():
            assert torch.equal(t.to("cuda:0").nan_to_num(7), expected[name].nan_to_num(7)), (op, name)


def test_launches_do_not_depend_on_the_number_of_students_or_tensors(gpu_kernels):
    counts = []
    for masks, tensors in ((2, 3), (16, 300)):
        call = make_loss(make_plan(2, masks, 40), 64, dtype=torch.bfloat16)
        leaves = call.require_grad(["pred"])
        ema, params = ([torch.zeros(50) for _ in range(tensors)] for _ in range(2))
        loss = len(launched(lambda leaves=leaves: list(torch.autograd.grad(leaves(), leaves.first))))
        average = launched(lambda ema=ema, params=params: pyeff.ops.ema_update_(ema, params, 0.5))
        counts.append((loss, len(average) <= 1 + tensors // 50 + 1))
    assert counts[0][0] == counts[1][0]
    assert all(few for _, few in counts)


@ops
@gpu_dtypes
def test_scratch_is_written_before_it_is_read(gpu_kernels, op, dtype):
    """Zeros, NaN and large numbers in the memory that the kernels are given change no bit of a result."""
    call = MAKERS[op](dtype=dtype, tokens=333)
    grad_out = random_grad(call)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = []
    for pattern in (0x00, 0xFF, 0x7B):
        fill_free_memory(pattern)
        found.append([t.cpu().nan_to_num(7) for t in results(call, call.tensors, grad_out).values()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@gpu_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_the_sizes_of_an_encoder(gpu_kernels, kind, dtype):
    call = make_loss(make_plan(4, 16, 196), 768, kind=kind, beta=0.7 if kind == "smooth_l1" else 0.0, dtype=dtype)
    check_call(call, ["pred"])
    check_call(call)


@gpu_dtypes
@pytest.mark.parametrize("norm", NORMS)
def test_targets_at_the_sizes_of_an_encoder(gpu_kernels, norm, dtype):
    for size in ((4, 196, 768, 10), (2, 1000, 768, 8)):
        check_call(make_targets(*size, norm=norm, post_norm="layer", dtype=dtype))


@gpu_dtypes
def test_rows_at_the_sizes_of_an_encoder(gpu_kernels, dtype):
    plan = make_plan(4, 16, 196)
    check_call(make_gather(plan, 768, dtype=dtype))
    check_call(make_scatter(plan, 768, fill="TD", noise=0.01, dtype=dtype))


def test_many_repeats_are_bitwise_equal(gpu_kernels):
    """Whatever the order in which the processors come to their work."""
    step = Training(torch.bfloat16, batch=4, masks=16, tokens=196, width=256)
    first = step()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def test_memory_of_the_loss(gpu_kernels):
    """Nothing of the predictions' size is made but the gradient."""
    call = make_loss(make_plan(4, 16, 196), 256, dtype=torch.bfloat16, traps=False).require_grad(["pred"])
    known = [*call.tensors.values(), call.plan.inverse, call.plan.lengths, call.plan.keep_len]

    def step():
        return torch.autograd.grad(call(), call.first)

    step()
    saved, peak, _ = memory.saved_and_peak(step, known, "cuda")
    one = call.first.numel() * call.first.element_size()
    assert saved <= one + 4096
    assert peak <= 1.1 * one


def test_past_2_to_the_31_elements(gpu_kernels):
    """The last row of a call of more than that many, beside the same row by itself."""
    need_memory(60e9)
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch, masks, tokens, width = 33, 16, 4096, 1024
    hidden = torch.rand(batch, masks, tokens) < 0.5
    plan = pyeff.MaskPlan.from_mask(hidden, width=2200)
    last = pyeff.MaskPlan.from_mask(hidden[-1:], width=2200)
    pred = torch.empty(batch * masks, tokens, width, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randn(batch, tokens, width)
    assert pred.numel() > 2**31
    loss = pyeff.ops.multimask_loss(pred, target, plan, reduction="none")
    (grad,) = torch.autograd.grad(loss[-masks:].sum(), pred)
    tail = pred[-masks:].detach().requires_grad_()
    expected = pyeff.ops.multimask_loss(tail, target[-1:], last, reduction="none")
    assert torch.equal(loss[-masks:], expected)
    assert torch.equal(grad[-masks:], torch.autograd.grad(expected.sum(), tail)[0])
    del grad, loss
    kept = pyeff.ops.multimask_gather(pred[::masks].detach(), plan)
    assert torch.equal(kept[-masks:], pyeff.ops.multimask_gather(pred[-masks::masks].detach(), last))
    names = torch.arange(batch)
    whole = pyeff.ops.multimask_scatter(kept, plan, seed=3, sample_ids=names)
    part = pyeff.ops.multimask_scatter(kept[-masks:], last, seed=3, sample_ids=names[-1:])
    assert torch.equal(whole[-masks:], part)
