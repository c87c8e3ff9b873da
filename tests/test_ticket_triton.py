"""The ticket's Triton kernels by themselves: guarded buffers, every way through them, and what launches may depend on.

Under the interpreter with PYEFF_EMULATE=1 (float32 and float16: it is wrong for bfloat16), on a GPU otherwise. The
interpreter sees no access out of bounds, so inputs lie in NaN, and outputs between numbers that must stay.
"""

from __future__ import annotations

import importlib
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from pyeff import Ticket, backends
from pyeff.ops import _ticket_kernels
from tests import helpers
from tests.ticket_calls import ACTIVATIONS, check_call, make_call, make_ticket, random_grad

DEVICE = "cpu" if backends.EMULATED else "cuda"
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not (backends.EMULATED or torch.cuda.is_available()), reason="no GPU, and not PYEFF_EMULATE=1"),
]
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
GUARD = 64  # numbers on each side of a buffer: whole lines, so that what is between them is aligned
ODD_GUARD = 61


@pytest.fixture(scope="module")
def kernels():
    """The modules of the kernels; their package has its name from pyeff."""
    ticket = backends.triton_kernels("ticket")
    names = {"launch": "_launch", "forward": "ticket_forward", "backward": "ticket_backward"}
    return SimpleNamespace(
        ticket=ticket, **{k: importlib.import_module(f"pyeff.kernels.{v}") for k, v in names.items()}
    )


@pytest.fixture(autouse=True)
def on_device():
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def guarded(values: torch.Tensor, fill: float, guard: int = GUARD) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``values`` between numbers ``fill``, and all of that buffer."""
    buffer = torch.full((values.numel() + 2 * guard,), fill, dtype=values.dtype)
    inside = buffer[guard : guard + values.numel()].view(values.shape)
    return inside.copy_(values), buffer


class Guarded:
    """ticket_linear by the kernels' own functions: inputs that lie in NaN, outputs of NaN between guards."""

    def __init__(self, kernels, guard: int = GUARD) -> None:
        self.ticket, self.guard, self.buffers = kernels.ticket, guard, []

    def input(self, t):
        # Rows that are apart stay so.
        return t if t is None or not t.is_contiguous() else guarded(t, math.nan, self.guard)[0]

    def output(self, shape, like, wanted=True):
        if not wanted:
            return like.new_empty(0)
        inside, buffer = guarded(like.new_full(shape, math.nan), 12345.0, self.guard)
        self.buffers.append(buffer)
        return inside

    def check(self):
        for buffer in self.buffers:
            assert (buffer[: self.guard] == 12345.0).all()
            assert (buffer[len(buffer) - self.guard :] == 12345.0).all()
        self.buffers.clear()

    def __call__(self, x, values, ticket, bias, *, activation):
        return _Linear.apply(self, x, values, ticket, bias, activation or "none")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, by, x, values, ticket, bias, activation):
        x, values, bias = (by.input(t) for t in (x, values, bias))
        shape = (x.shape[0], ticket.shape[0])
        y, z = by.output(shape, values), by.output(shape, values, activation == "gelu" and any(ctx.needs_input_grad))
        by.ticket.forward(x, values, ticket.index, bias, activation, y, z)
        by.check()
        saved = {"relu": y, "gelu": z}.get(activation, values.new_empty(0))
        ctx.save_for_backward(x, values, ticket.index, saved)
        ctx.by, ctx.bias, ctx.activation = by, bias is not None, activation
        return y

    @staticmethod
    def backward(ctx, grad):
        by, (x, values, index, saved) = ctx.by, ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 4)]
        grads = [
            by.output(x.shape, values, needs[0]),
            by.output(values.shape, values, needs[1]),
            by.output(grad.shape[1:], values, needs[2]),
        ]
        grad, saved = by.input(grad), by.input(saved)
        by.ticket.backward(grad, x, values, index, saved, ctx.activation, *grads)
        by.check()
        dx, dvalues, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
        return None, dx, dvalues, None, dbias, None


# Shape, block and density, such that all kernels and ways of joining blocks are met: joined in a step, one for a step,
# several steps for one, no power of two, sides larger than a tile, nothing divisible by 8, one number a block.
CASES = {
    "joined": ((48, 72), (8, 8), 0.5),
    "joined_cut": ((50, 37), (8, 16), 0.5),
    "one": ((96, 64), (32, 32), 0.6),
    "several": ((128, 192), (64, 64), 0.7),
    "large": ((150, 270), (128, 256), 0.9),
    "larger": ((270, 40), (256, 32), 0.9),
    "no_power": ((72, 100), (24, 40), 0.6),
    "odd": ((23, 31), (5, 3), 0.4),
    "single": ((7, 9), (1, 1), 0.3),
}


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(kernels, case, dtype):
    """Few tokens and many; every activation meets some of each."""
    shape, block, density = CASES[case]
    kind = list(CASES).index(case)
    for i, tokens in enumerate((1, 6, 37)):
        activation = ACTIVATIONS[(kind + i) % 3]
        call = make_call(
            shape, block, density, lead=(tokens,), dtype=dtype, activation=activation, bias=(kind + i) % 4 > 0
        )
        check_call(call, call.tensors, function=Guarded(kernels, ODD_GUARD if i == 1 else GUARD))


@dtypes
def test_sums_over_tokens_in_parts(kernels, monkeypatch, dtype):
    """Gradients of blocks and bias are cut where there are many tokens; where scratch is short, less."""
    call = make_call((24, 24), 8, 0.4, lead=(270,), dtype=dtype, activation="gelu", holes=False)
    found = check_call(call, call.tensors, function=Guarded(kernels))
    count = counted(kernels, call)
    assert count["add_parts"] == 2
    monkeypatch.setattr(kernels.launch, "SCRATCH_LIMIT", 1)
    whole = check_call(call, call.tensors, function=Guarded(kernels))
    assert counted(kernels, call)["add_parts"] == 1
    for name in ("out", "x", "bias"):
        assert torch.equal(found[name], whole[name]), name


def counted(kernels, call):
    """How often each kernel is launched for the gradients of a call."""
    x, values, bias = (call.tensors[name].detach() for name in ("x", "values", "bias"))
    y = x.new_empty(call.out_shape)
    machine = kernels.launch.machine(x.device)
    with kernels.launch.record(machine) as launches:
        kernels.ticket.backward(y, x, values, call.ticket.index, y, "gelu", x, values, bias)
    names = [name_of(launch) for launch in launches]
    return {name: names.count(name) for name in names}


def name_of(launch):
    return launch.kernel.__name__ if hasattr(launch.kernel, "__name__") else launch.kernel.fn.__name__


@dtypes
@pytest.mark.parametrize("strides", ["sliced", "expanded"])
def test_strided_rows(kernels, strides, dtype):
    """Rows apart, aligned to nothing, or the same one again and again; between them lies NaN."""
    for tokens in (5, 21):
        call = make_call((48, 64), (16, 32), lead=(tokens,), dtype=dtype, x_strides=strides, traps=False)
        check_call(call, call.tensors, function=Guarded(kernels))
    wide = torch.full((21, 80), math.nan, dtype=dtype)
    wide[:, :64] = call.tensors["x"]
    check_call(call.but(x=wide[:, :64]), call.tensors, function=Guarded(kernels))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_only_what_is_wanted(kernels, activation):
    """Each gradient alone is bit for bit what it is among all of them, and the output what it is without."""
    call = make_call((40, 56), 8, lead=(19,), dtype=torch.float32, activation=activation)
    grad_out, function = random_grad(call), Guarded(kernels)
    every = helpers.gradients(call, call.tensors, grad_out, function)
    for name in call.tensors:
        assert torch.equal(helpers.gradients(call, [name], grad_out, function)[name], every[name]), name
    with torch.no_grad():
        assert torch.equal(call(function), every["out"])


@dtypes
@pytest.mark.parametrize("tokens", [3, 260])
def test_repeats_are_bitwise_equal(kernels, tokens, dtype):
    call = make_call((32, 32), 16, lead=(tokens,), dtype=dtype, activation="gelu", holes=False)
    grad_out = random_grad(call)
    first, again = (helpers.gradients(call, call.tensors, grad_out, Guarded(kernels)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


@dtypes
def test_not_a_number_stays_where_it_is(kernels, dtype):
    """In one token it shows in that token's output and gradient; the other tokens are what they were, bit for bit."""
    for tokens in (7, 20):
        call = make_call((32, 48), 16, 0.7, lead=(tokens,), dtype=dtype, activation="relu", traps=False, holes=False)
        function, selected = Guarded(kernels), int(call.ticket.column[0]) * 16
        with torch.no_grad():
            clean = call(function)
            bad = call.tensors["x"].clone()
            bad[4, selected] = math.nan
            found = call.but(x=bad)(function)
        others = torch.arange(tokens) != 4
        assert torch.equal(found[others], clean[others])
        assert found[4].isnan().any()


@pytest.mark.parametrize("wrong", [-1, 7, -(1 << 31), (1 << 31) - 1])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_index_leads_out_of_the_tensors(kernels, wrong):
    """Nobody has looked into an index on the device: a wrong one gives any numbers, and touches nothing else."""
    for tokens in (3, 20):
        call = make_call((40, 56), 8, 0.4, lead=(tokens,), dtype=torch.float32, activation="gelu")
        for part in range(7):
            index = call.ticket.index.clone()
            index[part::7] = wrong
            ticket = SimpleNamespace(index=index, shape=call.ticket.shape)
            x, values, bias = (call.tensors[name].detach().requires_grad_() for name in ("x", "values", "bias"))
            y = Guarded(kernels)(x, values, ticket, bias, activation="gelu")
            y.sum().backward()
            if tokens == 20:
                break


def test_no_block_is_alive(kernels):
    for tokens in (3, 20):
        call = make_call((20, 24), 8, 0.0, lead=(tokens,), dtype=torch.float32, activation="gelu")
        check_call(call, call.tensors, function=Guarded(kernels))


def launches(kernels, tokens, block=32, dtype=torch.bfloat16, shape=(3072, 768), stride=None, activation="gelu"):
    """What a training step launches on an H200."""
    meta = {"device": "meta", "dtype": dtype}
    rows, columns = -(-shape[0] // block), -(-shape[1] // block)
    nnz = rows * columns * 3 // 10
    x = torch.empty(tokens, stride or shape[1], **meta)[:, : shape[1]]
    values, y, bias = (
        torch.empty(nnz, block, block, **meta),
        torch.empty(tokens, shape[0], **meta),
        torch.empty(shape[0], **meta),
    )
    index = torch.empty(2 * rows + 2 * columns + 2 + 3 * nnz, device="meta", dtype=torch.int32)
    with kernels.launch.record(kernels.launch.Machine(90, 132)) as forward:
        kernels.ticket.forward(x, values, index, bias, activation, y, y)
    with kernels.launch.record(kernels.launch.Machine(90, 132)) as backward:
        kernels.ticket.backward(y, x, values, index, y, activation, torch.empty(x.shape, **meta), values, bias)
    return forward, backward


@pytest.mark.parametrize("tokens", [1, 100, 4096, 1 << 20])
def test_few_launches(kernels, tokens):
    for activation in ("none", "gelu"):
        forward, backward = launches(kernels, tokens, activation=activation)
        assert len(forward) == 1
        assert len(backward) <= 5


@pytest.mark.parametrize("block", [8, 32, 128])
def test_a_new_number_of_tokens_compiles_nothing(kernels, block):
    """What differs between two calls is nothing that Triton compiles for."""
    first, second = ([*chain(*launches(kernels, tokens, block))] for tokens in (32768, 33333))
    for before, after in zip(first, second, strict=True):
        assert before.kernel is after.kernel
        assert before.config == after.config
        assert before.constants == after.constants
        kernel = before.kernel
        free = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"] or []
        for name, a, b in zip(kernel.arg_names, before.args, after.args, strict=False):
            if type(a) is int and a != b:
                assert name in free, f"{name_of(before)}: {name} is {a}, then {b}"
            assert type(a) is type(b), name


def test_tiles_are_those_of_the_block(kernels):
    """The height is the block's own side, or what it is cut into; what comes number by number has small tiles."""
    for block, height in ((8, 16), (16, 16), (24, 32), (32, 32), (64, 64), (96, 128), (128, 128), (192, 128)):
        (forward,), _ = launches(kernels, 8192, block)
        assert forward.constants["BLOCK_M"] == height, block
        assert forward.config.name.startswith(f"ticket_multiply{height}")
        rows = -(-3072 // block) * -(-block // height)
        assert forward.grid == (rows * -(-8192 // forward.constants["BLOCK_N"]),)
    for odd in ({"block": 20}, {"stride": 769}, {"shape": (3072, 760)}):
        (forward,), backward = launches(kernels, 8192, **odd)
        assert forward.config.name.endswith("/odd")
        assert any(launch.config.name == "ticket_outer32/odd" for launch in backward)
    # No tile is half empty, and few rows of blocks take lower tiles of tokens.
    for tokens, block, rows in ((8192, 128, 256), (1024, 128, 128), (16, 128, 64), (128, 16, 64), (8192, 16, 256)):
        (forward,), _ = launches(kernels, tokens, block, activation="none")
        assert forward.constants["BLOCK_N"] == rows, (tokens, block)
    # What takes registers at the end leaves fewer for the tile.
    (forward,), _ = launches(kernels, 8192, 128, activation="gelu")
    assert forward.config.name == "ticket_multiply128_gelu/large"
    for activation, height in (("none", 64), ("gelu", 32)):
        (forward,), _ = launches(kernels, 8192, 128, shape=(3080, 768), activation=activation)
        assert forward.config.name == f"ticket_multiply{height}/large"
    (few,), _ = launches(kernels, 15)
    assert few.config.name == "ticket_few/rows"
    assert few.grid == (96 * (32 // few.constants["BLOCK_M"]) * 4,)


def test_more_programs_than_a_grid_has(kernels):
    """Tokens then come in turns, of whole tiles."""
    found, _ = launches(kernels, 1 << 20, 4, shape=(1 << 22, 8))
    rows = found[0].constants["BLOCK_N"]
    assert len(found) > 1
    assert all(launch.grid[0] < 1 << 31 for launch in found)
    counts = [launch.args[6] for launch in found]
    assert sum(counts) == 1 << 20
    assert all(count % rows == 0 for count in counts[:-1])
    assert [launch.args[0].shape[0] for launch in found] == counts


def test_every_block_has_its_strip(kernels):
    """Strips run along the longer side of the weight, as many as a full row could need."""
    for shape, columns in (((3072, 768), True), ((768, 3072), False)):
        _, backward = launches(kernels, 8192, 32, shape=shape)
        (outer,) = (launch for launch in backward if name_of(launch) == "outer_blocks")
        assert outer.constants["COLUMNS"] == columns
        assert outer.grid[0] == 24 * (96 * 32 // outer.constants["BLOCK_N"])


def test_scratch_is_bounded(kernels):
    """A sum over a million tokens of a large weight is cut into no more parts than fit."""
    _, backward = launches(kernels, 1 << 20, 8, shape=(16384, 16384))
    partial = [launch.args[3] for launch in backward if name_of(launch) == "outer_blocks"]
    assert all(t.numel() * 4 <= max(kernels.launch.SCRATCH_LIMIT, t[0].numel() * 4) for t in partial)


def test_weights_that_32_bits_do_not_address(kernels):
    x, values = torch.empty(4, 1 << 23, device="meta"), torch.empty(1, 8, 8, device="meta")
    index = torch.empty(2 * (2 + (1 << 20)) + 5, device="meta", dtype=torch.int32)
    with pytest.raises(ValueError, match="2\\^23 columns"):
        kernels.ticket.forward(x, values, index, None, "none", torch.empty(4, 16, device="meta"), values.new_empty(0))


def test_the_op_calls_these_kernels(kernels):
    """The outputs as the op makes them, through its own call."""
    ticket = make_ticket((40, 56), 8)
    assert isinstance(ticket, Ticket)
    call = make_call(ticket=ticket, lead=(2, 9), dtype=torch.float32, activation="gelu")
    x, values, bias = (call.tensors[name] for name in ("x", "values", "bias"))
    outputs = _ticket_kernels.empty_forward(x, values, 40, True)
    _ticket_kernels.forward("triton", x, values, ticket.index, bias, "gelu", outputs)
    with torch.no_grad():
        assert torch.equal(outputs[0].view(18, 40), call.but(x=x.view(18, 56))(Guarded(kernels)))
