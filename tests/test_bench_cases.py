"""The registry's cases, what their contenders compute, and how memory is measured."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.nn.functional as F

import pyeff
from benchmarks import gemm, memory, read, read_folded, registry, results, runner
from benchmarks.registry import FORWARD, TRAINING, Selection

MEASURED = {
    "linear", "read_recurrence", "ticket_linear", "multimask_targets", "multimask_gather", "multimask_scatter",
    "multimask_loss", "multimask_relative_bias", "multimask_step", "block_mask", "ema_update_",
}  # fmt: skip
LONGER = {"multimask_relative_bias", "ema_update_"}  # what a quick look leaves out


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(1000, requires_grad=True)

    def call():
        y = x.exp()  # saves its result, 4000 bytes
        z = y[:10] * y[10:20]  # saves two views of it
        torch.autograd.grad((z * x[:10]).sum(), x)  # saves z, 40 bytes, and an input

    with torch.enable_grad():
        saved, _, method = memory.saved_and_peak(call, [x], "cpu")
    assert saved == 4000 + 40
    assert method in memory.METHODS


def test_what_is_dropped_before_the_backward_is_not_kept():
    x = torch.randn(1000, requires_grad=True)

    def call():
        for _ in range(3):
            y = x.exp().exp()  # two saved results, and gone with the next round
        torch.autograd.grad(y.sum(), x)

    with torch.enable_grad():
        saved, _, _ = memory.saved_and_peak(call, [x], "cpu")
    assert 2 * 4000 <= saved <= 4 * 4000


@pytest.mark.parametrize("method", ["default", "allocator"])
def test_peak_bytes(method, monkeypatch):
    if method == "allocator":
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size = 40_000_000

    def call():
        a = torch.ones(size // 4)
        b = a + 1
        del a
        return b * 2

    call()
    _, peak, name = memory.saved_and_peak(call, [], "cpu")
    # Two of the three live at any time; the resident set is counted in batches.
    assert 2 * size - 2_000_000 < peak < 2 * size + 4_000_000
    assert method == "default" or name == "allocator"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_kept_while_it_is_timed_and_given_back_after():
    size = 256 << 20

    def resident():
        gc.collect()
        return memory._status("VmRSS")

    def use():
        torch.ones(size, dtype=torch.uint8)

    before = resident()
    with memory.freed_pages_kept():
        use()
        assert resident() - before > size // 2
    assert resident() - before < size // 2
    use()
    assert resident() - before < size // 2


def test_an_error_in_the_measured_call_arrives():
    def call():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        memory.saved_and_peak(call, [], "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_every_case_has_a_reference_and_ours(size, device):
    cases = registry.cases(None, Selection(size, device))
    assert {case.op for case in cases} == MEASURED - (LONGER if size == "quick" else set())
    for case in cases:
        roles = [c.role for c in case.contenders]
        assert roles.count("reference") == roles.count("fused") == 1
        names = [c.name for c in case.contenders]
        assert len(set(names)) == len(names)
        assert max(map(len, names)) <= 9
    keys = [(case.op, case.label, case.dtype, case.mode) for case in cases]
    assert len(set(keys)) == len(keys)


def test_selection():
    assert len(registry.cases("read", Selection(match="gru 64 float32 forward"))) == 1
    assert len(registry.cases("ticket", Selection(match="up b32 4096 0.3 bfloat16 forward"))) == 1
    assert {c.op for c in registry.cases("linear", Selection())} == {"linear"}
    with pytest.raises(ValueError, match="no benchmark is called 'nothing'"):
        registry.cases("nothing", Selection())


def test_work_of_read():
    # The figures of the definition's own table: GRU, 2048 tokens, 12 layers, d = 768, r = 256.
    flops, least = read.work(2048, "gru", 4, False, 12, 768, 256)
    assert flops == 2048 * 12 * 2 * 3 * 256 * (768 + 256)
    assert least == 4 * (2048 * 12 * 768 + 2048 * 256 + 3 * 256 * (768 + 256 + 2) + 768)
    training, _ = read.work(2048, "gru", 4, True, 12, 768, 256)
    assert training == flops + 2048 * 12 * 2 * 3 * 256 * (768 + 2 * 256)


# Those of READ's contenders that neither compile nor need the native library.
PLAIN = ("eager", "torch.nn", "naive")


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_plain_contenders_compute_read(cell, mode, dtype):
    case = read.case(5, cell, dtype, "cpu", mode, layers=3, width=24, rank=8)
    only = tuple(c for c in case.contenders if c.name in PLAIN)
    (inputs,) = case.make(1, 0)
    with torch.set_grad_enabled(mode == TRAINING):
        truth = case.oracle(inputs)
        reference = next(c for c in only if c.role == "reference")
        limits = runner.error_limits(
            runner.relative_errors(reference.prepare([inputs])[0](), truth), dtype, case.reduction
        )
        for c in only:
            outputs = [t.detach() for t in c.prepare([inputs])[0]()]
            assert len(outputs) == (6 if mode == TRAINING else 1)
            errors = runner.relative_errors(outputs, truth)
            assert runner._verdict(errors, limits)[0] == results.TIMED, (c.name, errors, limits)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_folded_rival_is_read(cell):
    case = read.case(5, cell, torch.float64, "cpu", TRAINING, layers=3, width=24, rank=8)
    (inputs,) = case.make(1, 0)
    truth = case.oracle(inputs)
    out, *kept = read_folded.forward(inputs.phi, *inputs.weights, cell, inputs.eps, True)
    w_ih, w_hh, _, _, gamma = (w.detach() for w in inputs.weights)
    grads = read_folded.backward(inputs.grad_out, inputs.phi, w_ih, w_hh, gamma, *(t.detach() for t in kept), cell)
    # Its inner arithmetic is float32, whatever the tensors are.
    errors = runner.relative_errors([out.detach(), *grads], truth)
    assert max(errors) < 30 * torch.finfo(torch.float32).eps


def test_the_oracle_does_not_depend_on_its_chunks(monkeypatch):
    case = read.case(11, "gru", torch.float32, "cpu", TRAINING, layers=2, width=16, rank=4)
    (inputs,) = case.make(1, 0)
    whole = case.oracle(inputs)
    monkeypatch.setattr(read, "_ORACLE_TOKENS", 4)
    for one, other in zip(whole, case.oracle(inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_linear(dtype):
    case = gemm.case(9, 32, 16, dtype, "cpu")
    sets = case.make(2, 0)
    for s, call in zip(sets, gemm.onednn(sets), strict=True):
        expected = F.linear(s.x.double(), s.weight.double())
        assert runner.relative_errors(call(), [expected])[0] < 4 * torch.finfo(dtype).eps


def test_the_reference_does_not_pose_as_ours():
    case = read.case(3, "rnn", torch.float32, "cpu", FORWARD, layers=2, width=8, rank=4)
    ours = next(c for c in case.contenders if c.role == "fused")
    with pyeff.backend("reference"), pytest.raises(registry.Unavailable):
        ours.prepare(case.make(1, 0))
