"""READ on a CUDA device, beyond what every backend must do: graphs, streams, waiting, launches, memory, large sizes."""

from __future__ import annotations

import pytest
import torch

import pyeff
from benchmarks import memory
from tests import helpers
from tests.cuda_steps import Step, captured, fill_free_memory, launched, need_memory
from tests.helpers import CELLS, gpu_dtypes, make_read

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def training_step(call: helpers.Read, names=None, **extra) -> tuple[Step, dict[str, torch.Tensor]]:
    """A function that returns the output and the gradients of ``names``, and the tensors that it reads.

    Without names it is a forward alone.
    """
    leaves = call.require_grad(names or ())
    wanted = [leaves.tensors[name] for name in names or ()]
    grad_out = torch.randn(*call.phi[0].shape[:-1], call.rank, dtype=call.tensors["w_ih"].dtype)

    def step() -> list[torch.Tensor]:
        out = leaves(**extra)
        return [out.detach(), *(torch.autograd.grad(out, wanted, grad_out) if wanted else ())]

    return step, {**leaves.tensors, "grad_out": grad_out}


@gpu_dtypes
@pytest.mark.parametrize("training", [False, True, "recompute"], ids=["forward", "training", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_graph_capture_and_replay(gpu_kernels, cell, training, dtype):
    """A replay reads what is in the tensors then, and gives bit for bit what the calls give."""
    shape = {"lead": (150,), "layers": 4, "d": 72, "r": 40, "dtype": dtype}
    call = make_read(cell, "layer", **shape)
    extra = {"recompute": True} if training == "recompute" else {}
    step, tensors = training_step(call, call.tensors if training else None, **extra)
    graph, results = captured(step)
    for seed in (1, 2):
        with torch.no_grad():
            for name, t in make_read(cell, "layer", seed=seed, **shape).tensors.items():
                tensors[name].copy_(t)
            tensors["grad_out"].normal_()
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for found, expected in zip(results, step(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_for_the_device(gpu_kernels, cell, recompute):
    call = make_read(cell, "layer", lead=(150,), dtype=torch.float32)
    step, _ = training_step(call, call.tensors, recompute=recompute)
    step()  # kernels are loaded and compiled, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cell", CELLS)
def test_work_is_on_the_current_stream(gpu_kernels, cell):
    """Inputs that arrive late on the caller's stream: another one would still read NaN."""
    call = make_read(cell, "rms", lead=(150,), dtype=torch.float32)
    step, tensors = training_step(call, call.tensors)
    expected = step()
    kept = [t.detach().clone() for t in tensors.values()]
    with torch.no_grad():
        for t in tensors.values():
            t.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles, some hundredths of a second
        with torch.no_grad():
            for t, values in zip(tensors.values(), kept, strict=True):
                t.copy_(values)
        found = step()
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_a_device_that_is_not_the_current_one(gpu_kernels, cell):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    call = make_read(cell, "rms", lead=(150,), dtype=torch.float32)
    grad_out = torch.randn(150, call.rank)
    expected = helpers.gradients(call, call.tensors, grad_out)
    found = helpers.gradients(call.map(lambda t: t.to("cuda:1")), call.tensors, grad_out)
    assert torch.cuda.current_device() == 0
    for name, t in found.items():
        assert t.device.index == 1
        scale = expected[name].abs().max().item()
        slack = 2 * helpers.rounding(t.dtype, call.terms(name), scale)
        assert helpers.error(t.to("cuda:0"), expected[name]) <= slack, name
    call.tensors["phi1"] = call.tensors["phi1"].to("cuda:1")
    with pytest.raises(ValueError, match=r"phi\[1\] is on cuda:1, expected cuda:0"):
        call()


@pytest.mark.parametrize("cell", CELLS)
def test_number_of_launches(gpu_kernels, cell):
    """Three kernels forward, and none for each layer, forward or backward."""
    counts = []
    for layers in (3, 24):
        call = make_read(cell, lead=(128,), layers=layers, d=256, r=64, dtype=torch.bfloat16, state=False)
        forward = launched(training_step(call)[0])
        assert len(forward) <= 3, forward
        weights = [name for name in call.tensors if not name.startswith("phi")]
        counts.append((len(forward), len(launched(training_step(call, weights)[0]))))
    assert counts[0] == counts[1]


@gpu_dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_tokens_for_the_largest_tiles(gpu_kernels, cell, dtype):
    """So many that every kernel takes its largest tiles, which the small sizes of the other tests never do."""
    call = make_read(cell, "layer", lead=(20011,), layers=2, d=264, r=256, dtype=dtype)
    helpers.check_read(call, call.tensors)


@pytest.mark.parametrize("recompute", [False, True])
@gpu_dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_scratch_is_written_before_it_is_read(gpu_kernels, cell, dtype, recompute):
    """Zeros, NaN and large numbers in the memory that the kernels are given change no bit of a result."""
    call = make_read(cell, "layer", lead=(333,), layers=3, d=100, r=72, dtype=dtype)
    step, _ = training_step(call, call.tensors, recompute=recompute)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = []
    for pattern in (0x00, 0xFF, 0x7B):
        fill_free_memory(pattern)
        found.append([t.cpu() for t in step()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@gpu_dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_less_memory_than_the_definition(gpu_kernels, cell, dtype):
    """A training step over a frozen backbone: what is kept, and the peak with all scratch memory."""
    call = make_read(cell, lead=(4096,), layers=12, d=768, r=256, dtype=dtype, state=False)
    weights = [name for name in call.tensors if not name.startswith("phi")]
    found = {}
    for name in (gpu_kernels, "reference"):
        with pyeff.backend(name):
            step, tensors = training_step(call, weights)
            step()
            found[name] = memory.saved_and_peak(step, tensors.values(), "cuda")[:2]
    assert found[gpu_kernels][0] < found["reference"][0]
    assert found[gpu_kernels][1] < found["reference"][1]


def check_tail(call: helpers.Read, names: list[str]) -> None:
    """The last tokens of a call of more than 2^31 elements. No other token gets a gradient, so that they decide all."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    few = 70
    tail = call.map(lambda t: t[-few:].clone() if t.dim() == 2 and t.shape[0] == call.tokens else t)
    grad_few = torch.randn(few, call.rank).to(call.tensors["w_ih"].dtype)
    grad_out = torch.zeros(call.tokens, call.rank, dtype=grad_few.dtype)
    grad_out[-few:] = grad_few
    found = helpers.gradients(call, names, grad_out)
    same = helpers.gradients(tail, names, grad_few, pyeff.reference.read_recurrence)
    truth = helpers.gradients(tail.to(torch.float64), names, grad_few, pyeff.reference.read_recurrence)
    for name, t in found.items():
        t = t[-few:] if t.shape[0] == call.tokens else t
        scale = helpers.phi_gradient_scale(tail, grad_few) if name.startswith("phi") else 1.0 * (name == "out")
        helpers.assert_three_way(name, t, same[name], truth[name], tail.terms(name), scale)


def test_phi_past_2_to_the_31_elements(gpu_kernels):
    """Offsets into phi and into its gradient, and over all rows of all layers."""
    need_memory(40e9)
    tokens, d = 2_900_001, 768
    call = make_read("rnn", lead=(1,), layers=2, d=d, r=16, dtype=torch.bfloat16, state=False)
    for i in range(2):
        call.tensors[f"phi{i}"] = torch.empty(tokens, d, dtype=torch.bfloat16).normal_()
    assert call.phi[0].numel() > 2**31
    check_tail(call, ["phi1", "w_ih", "w_hh"])


def test_saved_past_2_to_the_31_elements(gpu_kernels):
    """Offsets into the states and gates of all layers."""
    need_memory(40e9)
    tokens, layers, r = 750_001, 3, 256
    call = make_read("gru", lead=(1,), layers=layers, d=32, r=r, dtype=torch.bfloat16, state=False)
    for i in range(layers):
        call.tensors[f"phi{i}"] = torch.empty(tokens, 32, dtype=torch.bfloat16).normal_()
    assert layers * tokens * 4 * r > 2**31
    check_tail(call, ["phi0", "w_ih", "w_hh", "b_hh"])
