"""The multimask family under torch.compile, torch.export, autocast and torch.func."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import pyeff
from pyeff import MaskPlan
from tests import helpers, places
from tests.multimask_calls import MAKERS, OPS, Call, make_loss, make_plan, make_targets, random_grad, results
from tests.test_multimask_plan import same
from tests.test_read_transforms import CLOSE, FORWARD_MODE, TRANSFORMS, jvp

OPERATION = "multimask_loss"
ops = pytest.mark.parametrize("op", OPS)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def agree(call: Call, function) -> None:
    """``function`` gives what the op gives, and the same gradients."""
    grad_out = random_grad(call)
    expected = results(call, call.tensors, grad_out)
    found = results(call, call.tensors, grad_out, function)
    for name, t in expected.items():
        size = t[t.isfinite()].abs().max().item()
        assert helpers.error(found[name], t) <= helpers.rounding(t.dtype, 100, size), name


@ops
def test_fullgraph(native, op):
    agree(MAKERS[op](dtype=torch.float32), compiled(getattr(pyeff.ops, op)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_of_losses(native, reduction):
    call = make_loss(reduction=reduction, kind="cosine", dtype=torch.float32)
    agree(call, compiled(pyeff.ops.multimask_loss))
    loss, moments = call.but(statistics=True)(compiled(pyeff.ops.multimask_loss))
    expected = call.but(statistics=True)()
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(moments, expected[1])


class Step(torch.nn.Module):
    """What of a pre-training step is not an encoder: masks to loss, and averages after it."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.decoder = torch.nn.Linear(width, width)
        self.token = torch.nn.Parameter(torch.randn(width))

    def forward(self, x, layers, seed, masks=3):
        plan = pyeff.ops.block_mask(x.shape[0], masks, (x.shape[1],), keep=0.5, adjust=0.1, length=2, seed=seed)
        target = pyeff.ops.multimask_targets(layers, post_norm="layer")
        kept = pyeff.ops.multimask_gather(x, plan)
        decoded = pyeff.ops.multimask_scatter(kept, plan, fill=self.token, seed=seed)
        loss, moments = pyeff.ops.multimask_loss(self.decoder(decoded), target, plan, reduction="mean", statistics=True)
        return loss, moments


def step_inputs(batch: int, tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, *layers = (torch.randn(batch, tokens, 6, generator=generator, device="cpu") for _ in range(3))
    device = places.here().device
    return x.to(device), [t.to(device) for t in layers], torch.tensor(seed, device=device)


def test_a_whole_step_in_one_graph(native):
    """Masks are drawn inside of it, and change with the seed; nothing compiles again."""
    step, counter = Step(), CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, backend=counter, fullgraph=True)
    for seed in (0, 1, 2):
        inputs = step_inputs(2, 10, seed)
        loss, moments = function(*inputs)
        expected, of = step(*inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(moments, of)
        found = torch.autograd.grad(loss, list(step.parameters()))
        for a, b in zip(found, torch.autograd.grad(expected, list(step.parameters())), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_other_sizes(native):
    """The first call is taken as fixed, the second makes sizes dynamic, and that is the last time: of the kernels.

    The definition draws noise for a number of counters that torch does not keep open for every size.
    """
    step, counter = Step(), CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, backend=counter, fullgraph=True)
    counts = []
    # Of the definition fewer: each is another graph.
    for batch, tokens in ((2, 10), (3, 14), (5, 30), (4, 21), (7, 16))[: 3 if native == "reference" else 5]:
        inputs = step_inputs(batch, tokens)
        torch.testing.assert_close(function(*inputs)[0], step(*inputs)[0])
        counts.append(counter.frame_count)
    assert counts[-1] <= (3 if native != "reference" else len(counts))


def test_plans_as_inputs(native):
    """Other masks of the same sizes compile nothing."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(pyeff.ops.multimask_gather, backend=counter, fullgraph=True)
    x = torch.randn(2, 13, 4)
    for seed in range(4):
        plan = make_plan(ragged=False, seed=seed)
        assert torch.equal(function(x, plan), pyeff.ops.multimask_gather(x, plan))
    assert counter.frame_count == 1


def test_plans_made_inside(native):
    hidden = make_plan().hidden()

    def make(mask):
        plan = MaskPlan.from_mask(mask, width=7).with_prefix(1)
        return plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths

    for a, b in zip(compiled(make)(hidden), make(hidden), strict=True):
        assert torch.equal(a, b)
    assert same(MaskPlan(*compiled(make)(hidden), 1), MaskPlan.from_mask(hidden, width=7).with_prefix(1))


def test_factors_of_the_loss(native):
    """What comes from above is a number of the graph's, whatever it is."""
    call = make_loss(dtype=torch.float32)

    def scaled(pred, factor):
        return factor * call.but(pred=pred)()

    function = compiled(scaled)
    for factor in (1.0, 0.5, 65536.0):
        leaf = call.first.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf, torch.tensor(factor)), leaf)
        expected = results(call, ["pred"], torch.tensor(factor))["pred"]
        torch.testing.assert_close(found, expected)


def test_averages_and_streaming_sums(native):
    """Changes in place reach the tensors that were given."""
    call = make_targets(dtype=torch.float32)

    def both(total, ema, params, decay):
        for layer in call.tensors.values():
            pyeff.ops.multimask_accumulate_(total, layer, weight=0.5, lengths=call.options["lengths"])
        pyeff.ops.ema_update_(ema, params, decay)
        return total + 1

    def run(function):
        total, ema = torch.zeros(call.first.shape), [torch.zeros(3), torch.ones(2)]
        out = function(total, ema, [torch.ones(3), torch.zeros(2)], torch.tensor(0.75, dtype=torch.float64))
        assert torch.equal(out, total + 1)
        return [total, *ema]

    for a, b in zip(run(compiled(both)), run(both), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(native_kernels):
    """One small graph: what torch generates around an op."""
    call = make_loss(dtype=torch.float32, traps=False)

    def tamed(pred):
        return call.but(pred=torch.tanh(pred))()

    leaf = call.first.detach().requires_grad_()
    loss, expected = compiled(tamed, "inductor")(leaf), tamed(leaf)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, leaf)[0] for t in (loss, expected)))


def test_the_definition_under_compile():
    call = make_loss(dtype=torch.float32)
    agree(call, compiled(pyeff.reference.multimask_loss))


@pytest.mark.parametrize("strict", [False, True])
def test_export(native, strict, tmp_path):
    """The graph holds the ops; the file of it gives what the module gives, for any number of samples."""
    step, batch = Step().eval(), torch.export.Dim("batch", min=2)
    with torch.no_grad():
        shapes = {"x": {0: batch}, "layers": [{0: batch}, {0: batch}], "seed": None, "masks": None}
        program = torch.export.export(step, (*step_inputs(5, 10), 3), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "step.pt2")
        loaded = torch.export.load(tmp_path / "step.pt2").module()
        for count in (2, 3, 7):
            inputs = step_inputs(count, 10, seed=count)
            torch.testing.assert_close(loaded(*inputs, 3), step(*inputs))


@ops
def test_autocast(native, op):
    """The ops take what they are given: a predictor's 16 bits, and targets in float32 beside them."""
    call = MAKERS[op](dtype=torch.float32)
    expected = call()
    with torch.autocast(places.here().device, torch.bfloat16):
        assert torch.equal(call(), expected)


def test_autocast_of_a_step(native):
    """Linear layers give bfloat16 to float32 targets; the gradient goes back through them."""
    step, inputs = Step(), step_inputs(2, 10)
    with torch.autocast(places.here().device, torch.bfloat16):
        loss, _ = step(*inputs)
    assert loss.dtype == torch.float32
    expected, _ = step(*inputs)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    found = torch.autograd.grad(loss, list(step.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected, list(step.parameters())), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm()


def small(op: str) -> Call:
    traps = {} if op in ("multimask_relative_bias", "multimask_targets") else {"traps": False}
    if op == "multimask_targets":
        return make_targets(2, 5, 3, 2, lengths=None, dtype=torch.float64)
    return MAKERS[op](plan=make_plan(2, 2, 5), dtype=torch.float64, **traps)


def function_of(call: Call, names, where):
    return lambda *values: call.but(**dict(zip(names, values, strict=True)))(getattr(where, call.op)).nan_to_num(
        neginf=0.0
    )


@ops
@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_forward_mode(op, how):
    """The reference serves."""
    call = small(op)
    names = list(call.tensors)
    values = tuple(call.tensors.values())
    tangents = tuple(torch.randn_like(v) for v in values)
    expected = jvp(function_of(call, names, pyeff.reference), values, tangents)
    assert expected[1].any()
    with pyeff.backend("auto"):
        found = FORWARD_MODE[how](function_of(call, names, pyeff.ops), values, tangents)
    torch.testing.assert_close(tuple(found), tuple(expected), **CLOSE)


@ops
def test_kernels_refuse_forward_mode(native_kernels, op):
    call = small(op).to(torch.float32)
    name, value = next(iter(call.tensors.items()))
    message = f"forward-mode differentiation is not supported by the {native_kernels} kernels"
    for how in ("jvp", "dual"):
        with pytest.raises(RuntimeError, match=message):
            FORWARD_MODE[how](function_of(call, [name], pyeff.ops), (value,), (value,))


@ops
def test_a_backward_refuses_tangents(native_kernels, op):
    """Forward over reverse, with a tangent in the incoming gradient alone."""
    call = small(op).to(torch.float32)
    call = call.require_grad(call.tensors)
    out = call()
    with forward_ad.dual_level():
        grad_out = forward_ad.make_dual(torch.full_like(out, 2.0), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
            torch.autograd.grad(out, call.first, grad_out)


@ops
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap of grad"])
def test_transforms(op, transform):
    """torch.func over the first tensor; an ensemble of it."""
    call = small(op)
    name, value = next(iter(call.tensors.items()))
    if "vmap" in transform:
        value = torch.stack([value, 2 * value])

    def of(where):
        return TRANSFORMS[transform](function_of(call, [name], where), value)

    with pyeff.backend("auto"):
        found = of(pyeff.ops)
    torch.testing.assert_close(found, of(pyeff.reference), **CLOSE)


@ops
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_kernels_refuse_transforms(native_kernels, op, transform):
    call = small(op).to(torch.float32)
    name, value = next(iter(call.tensors.items()))
    with pytest.raises(RuntimeError, match=f"torch.func .* is not supported by the {native_kernels} kernels"):
        TRANSFORMS[transform](function_of(call, [name], pyeff.ops), value[None] if transform == "vmap" else value)


def test_functional_call(native):
    """A predictor with other parameters, as meta-learning has it."""
    step, inputs = Step(), step_inputs(2, 10)
    others = {name: 2 * p.detach().requires_grad_() for name, p in step.named_parameters()}
    loss, _ = torch.func.functional_call(step, others, inputs)
    for p, value in zip(step.parameters(), others.values(), strict=True):
        p.data.copy_(value.data)
    torch.testing.assert_close(loss, step(*inputs)[0])


def test_integer_seeds_share_a_graph():
    """A loop over steps gives another seed each time."""
    plan, counter = make_plan(2, 3, 9), CompileCounterWithBackend("eager")
    x = torch.randn(plan.rows, plan.width, 4)

    def noisy(seed):
        return pyeff.ops.multimask_scatter(x, plan, noise_std=0.5, seed=seed)

    function = torch.compile(noisy, backend=counter, fullgraph=True)
    for seed in (3, 4, 5, 6):
        assert torch.equal(function(seed), noisy(seed))
    assert counter.frame_count <= 2  # with the first seed as a constant, and with any
