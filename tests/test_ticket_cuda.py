"""Tickets on a CUDA device, beyond what every backend must do: graphs, streams, launches, memory, large sizes."""

from __future__ import annotations

import pytest
import torch

import pyeff
from benchmarks import memory
from pyeff import Ticket
from tests import helpers
from tests.cuda_steps import Step, captured, fill_free_memory, launched, need_memory
from tests.helpers import gpu_dtypes
from tests.ticket_calls import ACTIVATIONS, TENSORS, TicketCall, check_call, make_call, make_ticket, random_blocks

OPERATION = "ticket_linear"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
# A token by itself, few, a tile and a bit.
tokens = pytest.mark.parametrize("tokens", [1, 9, 150])


def training_step(call: TicketCall, names=()) -> tuple[Step, dict[str, torch.Tensor]]:
    """A function that returns the output and the gradients of ``names``, and the tensors that it reads."""
    leaves = call.require_grad(names)
    wanted = [leaves.tensors[name] for name in names]
    grad_out = torch.randn(call.out_shape, dtype=call.tensors["values"].dtype)

    def step() -> list[torch.Tensor]:
        out = leaves()
        return [out.detach(), *(torch.autograd.grad(out, wanted, grad_out) if wanted else ())]

    return step, {**leaves.tensors, "grad_out": grad_out}


@gpu_dtypes
@tokens
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_graph_capture_and_replay(gpu_kernels, training, tokens, dtype):
    """A replay reads what is in the tensors then, and gives bit for bit what the calls give."""
    ticket = make_ticket((200, 136), 16)
    given = {"ticket": ticket, "lead": (tokens,), "dtype": dtype, "activation": "gelu"}
    call = make_call(**given)
    step, tensors = training_step(call, TENSORS if training else ())
    graph, results = captured(step)
    for seed in (1, 2):
        with torch.no_grad():
            for name, t in make_call(**given, seed=seed).tensors.items():
                tensors[name].copy_(t)
            tensors["grad_out"].normal_()
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for found, expected in zip(results, step(), strict=True):
            assert torch.equal(found, expected)


@tokens
@activations
def test_nothing_waits_for_the_device(gpu_kernels, activation, tokens):
    call = make_call((200, 136), 16, lead=(tokens,), dtype=torch.float32, activation=activation)
    step, _ = training_step(call, TENSORS)
    step()  # kernels are loaded and compiled, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@tokens
def test_work_is_on_the_current_stream(gpu_kernels, tokens):
    """Inputs that arrive late on the caller's stream: another one would still read NaN."""
    call = make_call((200, 136), 16, lead=(tokens,), dtype=torch.float32, activation="gelu")
    step, tensors = training_step(call, TENSORS)
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


def test_a_device_that_is_not_the_current_one(gpu_kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    call = make_call((200, 136), 16, lead=(150,), dtype=torch.float32)
    grad_out = torch.randn(call.out_shape)
    expected = helpers.gradients(call, TENSORS, grad_out)
    there = TicketCall({n: t.to("cuda:1") for n, t in call.tensors.items()}, call.ticket.to("cuda:1"))
    found = helpers.gradients(there, TENSORS, grad_out)
    assert torch.cuda.current_device() == 0
    for name, t in found.items():
        assert t.device.index == 1
        assert torch.equal(t.to("cuda:0"), expected[name]), name
    with pytest.raises(ValueError, match="index is on cuda:0, expected cuda:1"):
        TicketCall(there.tensors, call.ticket)()


@tokens
def test_number_of_launches(gpu_kernels, tokens):
    """Two kernels forward at most; none for each block, row or column, forward or backward."""
    counts = []
    for density in (0.05, 0.9):
        call = make_call((768, 768), 32, density, lead=(tokens,), dtype=torch.bfloat16, activation="gelu")
        forward = launched(training_step(call)[0])
        assert len(forward) <= 2, forward
        counts.append(len(launched(training_step(call, TENSORS)[0])))
    assert counts[0] == counts[1] <= 8


@tokens
@gpu_dtypes
def test_scratch_is_written_before_it_is_read(gpu_kernels, dtype, tokens):
    """Zeros, NaN and large numbers in the memory that the kernels are given change no bit of a result."""
    call = make_call((333, 250), 16, lead=(tokens,), dtype=dtype, activation="gelu")
    step, _ = training_step(call, TENSORS)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = []
    for pattern in (0x00, 0xFF, 0x7B):
        fill_free_memory(pattern)
        found.append([t.cpu() for t in step()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@gpu_dtypes
def test_less_memory_than_the_dense_layer(gpu_kernels, dtype):
    """What a training step takes beside x and the parameters: gradients of living blocks, no dense weight."""
    call = make_call((3072, 768), 32, 0.3, lead=(64,), dtype=dtype, traps=False)
    weight = call.ticket.scatter(call.tensors["values"]).requires_grad_()
    grad_out = torch.randn(call.out_shape, dtype=dtype)
    step, tensors = training_step(call, TENSORS)

    def dense() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.linear(call.tensors["x"], weight)
        return torch.autograd.grad(out, weight, grad_out)

    for work in (step, dense):
        work()
    ours = memory.saved_and_peak(step, [*tensors.values(), call.ticket.index], "cuda")
    theirs = memory.saved_and_peak(dense, [call.tensors["x"], weight], "cuda")
    assert ours[0] == 0
    assert ours[1] < theirs[1]


@gpu_dtypes
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072)], ids=str)
def test_the_sizes_of_a_base_encoder(gpu_kernels, shape, block, dtype):
    """The largest tiles, every stage of a pipeline, and all processors of the device busy."""
    call = make_call(shape, block, 0.3, lead=(1000,), dtype=dtype, activation="gelu")
    check_call(call, TENSORS)
    for few in (1, 5, 16):
        check_call(make_call(ticket=call.ticket, lead=(few,), dtype=dtype), TENSORS)


@halves
@pytest.mark.parametrize("block", [16, 64])
def test_rows_of_very_different_lengths(gpu_kernels, block, dtype):
    """One full row and column of blocks among nearly empty ones, at a size that takes many processors."""
    blocks = random_blocks((2048 // block, 2048 // block), 0.02, seed=1)
    blocks[3], blocks[:, 5] = True, True
    ticket = Ticket.from_blocks(blocks.to("cuda"), (2048, 2048), block)
    call = make_call(ticket=ticket, lead=(500,), dtype=dtype)
    check_call(call, TENSORS)


def test_many_repeats_are_bitwise_equal(gpu_kernels):
    """Whatever the order in which the processors come to their work."""
    call = make_call((1024, 768), 32, 0.4, lead=(700,), dtype=torch.bfloat16, activation="gelu")
    step, _ = training_step(call, TENSORS)
    first = step()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def check_tail(call: TicketCall, names) -> None:
    """The last tokens of a call of more than 2^31 elements. No other token gets a gradient, so that they decide all."""
    few = 70
    tail = call.but(x=call.tensors["x"][-few:].clone())
    grad_few = torch.randn(tail.out_shape).to(call.tensors["values"].dtype)
    grad_out = torch.zeros(call.out_shape, dtype=grad_few.dtype)
    grad_out[-few:] = grad_few
    found = helpers.gradients(call, names, grad_out)
    definition = pyeff.reference.ticket_linear
    same = helpers.gradients(tail, names, grad_few, definition)
    truth = helpers.gradients(tail.to(torch.float64), names, grad_few, definition)
    for name, t in found.items():
        t = t[-few:] if t.shape[0] == call.tokens else t
        helpers.assert_three_way(name, t, same[name], truth[name], tail.terms(name), truth[name].abs().max().item())


@pytest.mark.parametrize("shape", [(64, 768), (768, 64)], ids=str)
def test_past_2_to_the_31_elements(gpu_kernels, shape):
    """Offsets into x and its gradient, and into the output and its gradient."""
    need_memory(60e9)
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokens = 2_900_001
    call = make_call(shape, 32, 0.5, lead=(1,), dtype=torch.bfloat16, traps=False)
    call.tensors["x"] = torch.empty(tokens, shape[1], dtype=torch.bfloat16).normal_()
    assert tokens * max(shape) > 2**31
    check_tail(call, TENSORS)


def test_values_past_2_to_the_31_elements(gpu_kernels):
    """Offsets into the stored blocks and their gradient: the last row of blocks, by itself and as part of all."""
    need_memory(40e9)
    torch.utils.deterministic.fill_uninitialized_memory = False
    side, block = 46_400, 128
    grid = -(-side // block)
    ticket = Ticket.from_blocks(torch.ones(grid, grid, dtype=torch.bool), (side, side), block)
    values = torch.empty(ticket.nnz, block, block, dtype=torch.bfloat16).normal_(std=side**-0.5)
    assert values.numel() > 2**31
    x = torch.randn(20, side, dtype=torch.bfloat16)
    call = TicketCall({"x": x, "values": values}, ticket)
    height = side - (grid - 1) * block
    last = Ticket.from_blocks(torch.ones(1, grid, dtype=torch.bool), (height, side), (block, block))
    tail = TicketCall({"x": x, "values": values[-grid:].clone()}, last)
    grad_few = torch.randn(20, height, dtype=torch.bfloat16)
    grad_out = torch.zeros(20, side, dtype=torch.bfloat16)
    grad_out[:, -height:] = grad_few
    found = helpers.gradients(call, ["x", "values"], grad_out)
    definition = pyeff.reference.ticket_linear
    same = helpers.gradients(tail, ["x", "values"], grad_few, definition)
    truth = helpers.gradients(tail.to(torch.float64), ["x", "values"], grad_few, definition)
    found["out"], found["values"] = found["out"][:, -height:], found["values"][-grid:]
    for name, t in found.items():
        helpers.assert_three_way(name, t, same[name], truth[name], tail.terms(name))
