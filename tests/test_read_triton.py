"""READ's Triton kernels by themselves: guarded buffers, odd sizes, and what launches may depend on.

Under the interpreter with PYEFF_EMULATE=1 (float32 and float16: it is wrong for bfloat16), on a GPU otherwise. The
interpreter sees no access out of bounds, so inputs lie in NaN, and outputs between numbers that must stay.
"""

from __future__ import annotations

import importlib
import math
from itertools import chain, product
from types import SimpleNamespace

import pytest
import torch

import pyeff
from pyeff import backends
from pyeff.ops import _read_kernels
from tests import helpers
from tests.helpers import CELLS, NORMS, WEIGHTS, make_read

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
    read = backends.triton_kernels("read")
    return SimpleNamespace(read=read, launch=importlib.import_module("pyeff.kernels._launch"))


def guarded(values: torch.Tensor, fill: float, guard: int = GUARD) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``values`` between numbers ``fill``, and all of that buffer."""
    buffer = torch.full((values.numel() + 2 * guard,), fill, dtype=values.dtype, device=DEVICE)
    inside = buffer[guard : guard + values.numel()].view(values.shape)
    return inside.copy_(values), buffer


class Outputs:
    """Buffers poisoned with NaN between guards."""

    def __init__(self, guard: int) -> None:
        self.guard, self.buffers = guard, []

    def like(self, t: torch.Tensor) -> torch.Tensor:
        inside, buffer = guarded(torch.full_like(t, math.nan), 12345.0, self.guard)
        if t.numel():
            self.buffers.append(buffer)
        return inside if t.numel() else t

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.guard] == 12345.0).all()
            assert (buffer[-self.guard :] == 12345.0).all()


def run(kernels, call, wanted=None, grad_out=None, grad_c=None, recompute=False, guard=GUARD):
    """out, c_last and the gradients of ``wanted``, by the kernels' own functions on guarded buffers."""
    wanted = set(call.tensors if wanted is None else wanted)
    inputs = {
        name: t if name.startswith("phi") and not t.is_contiguous() else guarded(t, math.nan, guard)[0]
        for name, t in call.tensors.items()
    }
    phi, rest = [inputs[f"phi{i}"] for i in range(call.layers)], [inputs.get(name) for name in WEIGHTS]
    o, w_ih, w_hh = call.options, inputs["w_ih"], inputs["w_hh"]
    options = (o["cell"], o["norm"], o["eps"], o["reduce"])
    save = 0 if grad_out is None else 1 if recompute else 2
    outputs = Outputs(guard)
    found = [outputs.like(t) for t in _read_kernels.empty_forward(phi, w_ih, w_hh, o["cell"], o["norm"], save)]
    kernels.read.forward(phi, *rest, *options, *found)
    outputs.check()
    result = {"out": found[0]} | ({"c_last": found[1]} if o["cell"] == "lstm" else {})
    if grad_out is None:
        return result
    saved = [guarded(t, math.nan)[0] if t.numel() else t for t in found[2:]]
    if all(t.isfinite().all() for t in phi):
        assert not any(t.isnan().any() for t in saved), "what is saved has unwritten places"
    grad_out = guarded(grad_out, math.nan, guard)[0]
    absent, outputs = w_ih.new_empty(0), Outputs(guard)
    grads = {
        name: outputs.like(t.to(w_ih.dtype)) if name in wanted else absent for name, t in call.tensors.items()
    }  # fmt: skip
    grads = {name: grads.get(name, absent) for name in (*(f"phi{i}" for i in range(call.layers)), *WEIGHTS)}
    dphi = [grads[f"phi{i}"] for i in range(call.layers)]
    kernels.read.backward(
        grad_out, grad_c, phi, *rest, *saved, *options, dphi, *(grads[name] for name in WEIGHTS)
    )  # fmt: skip
    outputs.check()
    return result | {name: grads[name] for name in wanted}


def definition(call, dtype, grad_out, grad_c=None):
    """The same by the definition, in another dtype; c_last through its steps."""
    call = call.to(dtype).require_grad(call.tensors)
    weights = {name: t for name, t in call.tensors.items() if name in WEIGHTS and name not in ("h0", "c0")}
    cell = call.options["cell"]
    options = {name: value for name, value in call.options.items() if name != "reduce"}
    h0, c0 = call.tensors.get("h0"), call.tensors.get("c0")
    state = (h0, c0) if h0 is not None and cell == "lstm" else h0
    total = 0
    for phi_i in call.phi:
        state = pyeff.reference.read_step(phi_i, state, **weights, **options)
        h = state[0] if cell == "lstm" else state
        total = h if call.options["reduce"] == "last" else total + h
    out = total if call.options["reduce"] == "last" else total / call.layers
    result = {"out": out.detach()} | ({"c_last": state[1].detach()} if cell == "lstm" else {})
    ends, grads = [out], [grad_out.to(dtype)]
    if grad_c is not None:
        ends, grads = [out, state[1]], [*grads, grad_c.to(dtype)]
    found = torch.autograd.grad(ends, list(call.tensors.values()), grads)
    return result | dict(zip(call.tensors, found, strict=True))


def on_device(call):
    return call if DEVICE == "cpu" else call.map(lambda t: t.to(DEVICE))


def gradients_in(call, seed=1):
    """Random gradients of out and, for the LSTM, of c_last."""
    generator = torch.Generator().manual_seed(seed)
    shape, like = (*call.phi[0].shape[:-1], call.rank), call.tensors["w_ih"]
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64).to(like) for _ in range(2)]
    return grads[0], grads[1] if call.options["cell"] == "lstm" else None


def check(kernels, call, **how):
    """Output and all gradients, three ways."""
    call = on_device(call)
    grad_out, grad_c = gradients_in(call)
    found = run(kernels, call, grad_out=grad_out, grad_c=grad_c, **how)
    same = definition(call, call.tensors["w_ih"].dtype, grad_out, grad_c)
    oracle = definition(call, torch.float64, grad_out, grad_c)
    # As in helpers.check_read; what arrives through c has the size of what arrives through out.
    scales = {"out": 1.0, "c_last": 1.0} | helpers.few_element_scales(call, grad_out)
    scales |= dict.fromkeys((n for n in found if n.startswith("phi")), helpers.phi_gradient_scale(call, grad_out))
    for name, t in found.items():
        terms = call.terms("out" if name == "c_last" else name)
        helpers.assert_three_way(name, t, same[name], oracle[name], terms, scales.get(name, 0.0))


SHAPES = [
    {"lead": (1,), "layers": 1, "d": 33, "r": 5},
    {"lead": (7,), "layers": 3, "d": 64, "r": 16},
    {"lead": (33,), "layers": 2, "d": 64, "r": 16},
    {"lead": (33,), "layers": 2, "d": 33, "r": 40},
    {"lead": (7,), "layers": 2, "d": 130, "r": 40},
]


@dtypes
@pytest.mark.parametrize(("cell", "norm"), list(product(CELLS, NORMS)))
def test_output_and_gradients(kernels, cell, norm, dtype):
    """Over the odd sizes, options and ways of saving, each kind meets several."""
    kind = CELLS.index(cell) * 3 + NORMS.index(norm)
    for i, shape in enumerate(SHAPES):
        if i in (2, kind % 5, (kind + 3) % 5):
            full = (i + kind) % 3 > 0
            reduce = "last" if (i + kind) % 4 == 0 else "mean"
            call = make_read(cell, norm, reduce, dtype=dtype, bias=full, state=full, affine=full, **shape)
            check(kernels, call, recompute=i % 2 == 1, guard=ODD_GUARD if i == 4 else GUARD)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_strided_layers(kernels, cell, dtype):
    """Rows of one stride and of two, each layer another, aligned or not; between them lies NaN."""
    call = on_device(make_read(cell, "layer", lead=(3, 7), layers=4, d=32, r=16, dtype=dtype))
    tensors = dict(call.tensors)
    for name, kind in (("phi0", "sliced"), ("phi1", "permuted"), ("phi2", "expanded")):
        tensors[name] = helpers.lay_out(tensors[name], kind)
    check(kernels, helpers.Read(tensors, call.options))


@dtypes
@pytest.mark.parametrize("name", ["b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0"])
def test_each_optional_argument_alone(kernels, name, dtype):
    call = on_device(make_read("lstm", "layer", lead=(5,), layers=2, d=20, r=8, dtype=dtype))
    optional = {"b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0"}
    grad_out, grad_c = gradients_in(call)
    for kept in ({name}, optional - {name}):
        some = helpers.Read({n: t for n, t in call.tensors.items() if n in kept or n not in optional}, call.options)
        found = run(kernels, some, grad_out=grad_out, grad_c=grad_c)
        zeros = {n: torch.zeros_like(call.tensors[n]) for n in ("h0", "c0")}
        whole = helpers.Read({**zeros, **some.tensors}, call.options)
        same, oracle = (definition(whole, t, grad_out, grad_c) for t in (dtype, torch.float64))
        for n, t in found.items():
            terms = call.terms("out" if n == "c_last" else n)
            scale = helpers.phi_gradient_scale(some, grad_out) if n.startswith("phi") else 1.0
            helpers.assert_three_way(n, t, same[n], oracle[n], terms, scale)


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "layer"), ("gru", "layer"), ("lstm", "rms")])
def test_only_what_is_wanted(kernels, cell, norm):
    """Each gradient alone is bit for bit what it is among all of them."""
    call = on_device(make_read(cell, norm, lead=(5,), layers=2, d=20, r=8, dtype=torch.float32))
    grad_out, grad_c = gradients_in(call)
    every = run(kernels, call, grad_out=grad_out, grad_c=grad_c)
    for name in call.tensors:
        alone = run(kernels, call, [name], grad_out=grad_out, grad_c=grad_c)
        assert torch.equal(alone[name], every[name]), name
    for name, t in run(kernels, call).items():
        assert torch.equal(t, every[name]), f"{name} without a gradient"


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_the_last_state_alone(kernels, cell):
    """No gradient of out: of c_last alone for the LSTM, none at all for the others."""
    call = on_device(make_read(cell, "rms", lead=(5,), layers=2, d=20, r=8, dtype=torch.float32))
    zero, grad_c = torch.zeros_like(gradients_in(call)[0]), gradients_in(call)[1]
    # `run` saves for a backward where there is a gradient; then the same without it.
    expected = run(kernels, call, grad_out=zero, grad_c=grad_c)
    backward = kernels.read.backward
    without = SimpleNamespace(forward=kernels.read.forward, backward=lambda _, *rest: backward(None, *rest))
    found = run(SimpleNamespace(read=without), call, grad_out=zero, grad_c=grad_c)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_gates_come_out_the_same_again(kernels, cell, dtype):
    call = on_device(make_read(cell, "layer", lead=(19,), layers=2, d=33, r=20, dtype=dtype))
    grad_out, grad_c = gradients_in(call)
    saved, again = (run(kernels, call, grad_out=grad_out, grad_c=grad_c, recompute=r) for r in (False, True))
    for name in saved:
        assert torch.equal(saved[name], again[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_repeats_are_bitwise_equal(kernels, cell):
    call = on_device(make_read(cell, "layer", lead=(37,), layers=2, d=48, r=16, dtype=torch.float32))
    grad_out, grad_c = gradients_in(call)
    first, again = (run(kernels, call, grad_out=grad_out, grad_c=grad_c) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_tokens_in_chunks(kernels, monkeypatch, cell, recompute):
    """Little scratch: what belongs to a token stays the same, what is summed over tokens is as good."""
    call = make_read(cell, "rms", lead=(35,), layers=2, d=17, r=8, dtype=torch.float32)
    grad_out, grad_c = gradients_in(on_device(call))
    whole = run(kernels, on_device(call), grad_out=grad_out, grad_c=grad_c)
    monkeypatch.setattr(kernels.launch, "SCRATCH_LIMIT", 1)
    monkeypatch.setattr(kernels.launch, "CHUNK_UNIT", 128 if DEVICE == "cuda" else 16)
    check(kernels, call, recompute=recompute)
    pieces = run(kernels, on_device(call), grad_out=grad_out, grad_c=grad_c, recompute=recompute)
    for name in ("out", "phi0", "phi1", "h0"):
        assert torch.equal(pieces[name], whole[name]), name
    inference = run(kernels, on_device(call))
    assert torch.equal(inference["out"], whole["out"])


def test_more_layers_than_one_launch_describes(kernels):
    call = make_read("rnn", "rms", lead=(3,), layers=kernels.launch.LINES + 3, d=16, r=16, dtype=torch.float32)
    check(kernels, call)


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "rms"), ("gru", "layer"), ("lstm", "none")])
def test_float32_layers_beside_half_precision(kernels, cell, norm):
    """phi is rounded as it is read; the statistics are those of the float32 numbers."""
    half = torch.float16
    call = on_device(make_read(cell, norm, lead=(21,), layers=2, d=48, r=16, dtype=half))
    mixed = helpers.Read(
        {n: t.float() * (1 + 1e-5) if n.startswith("phi") else t for n, t in call.tensors.items()}, call.options
    )
    rounded = mixed.to(half)
    grad_out, grad_c = gradients_in(call)
    found = run(kernels, mixed, grad_out=grad_out, grad_c=grad_c)
    same, oracle = definition(rounded, half, grad_out, grad_c), definition(mixed, torch.float64, grad_out, grad_c)
    for name, t in found.items():
        scale = helpers.phi_gradient_scale(mixed, grad_out) if name.startswith("phi") else 1.0
        terms = call.terms("out" if name == "c_last" else name)
        helpers.assert_three_way(name, t, same[name], oracle[name], terms, scale)


@dtypes
@pytest.mark.parametrize(("cell", "norm"), [("rnn", "rms"), ("rnn", "layer"), ("gru", "rms"), ("gru", "layer")])
def test_squares_that_overflow(kernels, cell, norm, dtype):
    """Finite rows are normalised to nothing and make nothing but their bias; infinite ones make NaN, in their row."""
    call = on_device(make_read(cell, norm, lead=(19,), layers=2, d=48, r=16, dtype=torch.float32))
    names = ["phi0", "phi1", "h0"]
    if dtype != torch.float32:
        call = call.to(dtype).map(lambda t: t)
        call = helpers.Read({n: t.float() if n[:3] == "phi" else t for n, t in call.tensors.items()}, call.options)
    grad_out, _ = gradients_in(call)
    clean = run(kernels, call, names, grad_out=grad_out)
    big = call.map(torch.clone)
    signs = torch.where(torch.arange(48, device=DEVICE) % 2 > 0, 1.0, -1.0)
    big.phi[1][4] = (1e20 if dtype == torch.float32 else 6e4) * signs
    big.phi[0][9, 3] = math.inf
    big.phi[0][17, 0] = math.nan
    found = run(kernels, big, names, grad_out=grad_out)
    others = torch.tensor([n not in (4, 9, 17) for n in range(19)], device=DEVICE)
    for name in found:
        assert torch.equal(found[name][others], clean[name][others]), name
    assert found["out"][[9, 17]].isnan().all()
    expected = big.to(torch.float32)(pyeff.reference.read_recurrence)
    assert found["out"][4].isfinite().all()
    slack = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found["out"][4].float(), expected[4], rtol=0, atol=slack)


def launches(kernels, cell, tokens, save=2, width=768, rank=256, dtype=torch.bfloat16):
    """What a training step, or inference, launches on an H200."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell] * rank
    meta = {"device": "meta", "dtype": dtype}
    phi = [torch.empty(tokens, width, **meta) for _ in range(12)]
    w_ih, w_hh, bias = torch.empty(gates, width, **meta), torch.empty(gates, rank, **meta), torch.empty(gates, **meta)
    rest = (w_ih, w_hh, bias, bias, torch.empty(width, **meta), None, None, None)
    options = (cell, "rms", 1e-6, "mean")
    outputs = _read_kernels.empty_forward(phi, w_ih, w_hh, cell, "rms", save)
    with kernels.launch.record(kernels.launch.Machine(90, 132)) as forward:
        kernels.read.forward(phi, *rest, *options, *outputs)
    if not save:
        return forward, []
    needs = [t is not None for t in rest]
    grads = _read_kernels.empty_backward(phi, w_ih, w_hh, [False] * 12, needs)
    with kernels.launch.record(kernels.launch.Machine(90, 132)) as backward:
        kernels.read.backward(outputs[0], None, phi, *rest, *outputs[2:], *options, [grads[0]] * 12, *grads[1:])
    return forward, backward


@pytest.mark.parametrize("tokens", [1, 100, 8192, 32768])
@pytest.mark.parametrize("cell", CELLS)
def test_few_launches(kernels, cell, tokens):
    for save in (0, 2):
        forward, backward = launches(kernels, cell, tokens, save)
        assert len(forward) <= 3
        assert len(backward) <= 9


@pytest.mark.parametrize("cell", CELLS)
def test_a_new_number_of_tokens_compiles_nothing(kernels, cell):
    """What differs between two calls is nothing that Triton compiles for."""
    first, second = ([*chain(*launches(kernels, cell, tokens))] for tokens in (32768, 33333))
    for before, after in zip(first, second, strict=True):
        assert before.kernel is after.kernel
        assert before.config == after.config
        assert before.constants == after.constants
        kernel = before.kernel
        free = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"] or []
        for name, a, b in zip(kernel.arg_names, before.args, after.args, strict=False):
            if type(a) is int and a != b:
                assert name in free, f"{kernel.__name__}: {name} is {a}, then {b}"
            assert type(a) is type(b), name


def test_scratch_is_bounded(kernels):
    """A million tokens of 48 layers: nothing that grows with tokens times layers is larger than the limit."""
    limit = kernels.launch.SCRATCH_LIMIT
    runs = list(kernels.launch.chunks(1 << 20, 48 * 4 * 256 * 2))
    assert sum(count for _, count in runs) == 1 << 20
    assert all(count * 48 * 4 * 256 * 2 <= limit for _, count in runs)
    assert [first for first, _ in runs] == [i * runs[0][1] for i in range(len(runs))]


def test_strides_that_do_not_fold(kernels):
    call = on_device(make_read("gru", lead=(2, 3, 4), d=8, r=4, dtype=torch.float32))
    phi = call.phi[0].new_empty(4, 3, 2, 8).permute(2, 1, 0, 3)
    with pytest.raises(ValueError, match="at most two strides"):
        kernels.launch.rows_of(phi)
    assert kernels.launch.rows_of(phi[:, 0]) == (4, 8, 48)
    assert kernels.launch.rows_of(call.phi[0]) == (24, 0, 8)
    assert kernels.launch.rows_of(call.phi[0][:1, :1, :1]) == (1, 0, 0)
