"""Bad calls of the multimask family: an error that names the argument, what came and what was expected; no crash."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from tests import places
from tests.conftest import place_fixture
from tests.helpers import says
from tests.multimask_calls import MAKERS, OPS, Call, make_plan, make_targets, refusal

OPERATION = "multimask_loss"
ops = pytest.mark.parametrize("op", OPS)
OTHER = {torch.float64: torch.float32, torch.float32: torch.float64}
# On a GPU an index is not looked at before it is used: that would be waited for.
on_cpu = place_fixture([place for place in places.PLACES if place.device == "cpu" and not place.emulated])
GATHER, SCATTER, TARGETS, LOSS, BIAS = OPS


def other(t):
    return t.to(OTHER[t.dtype])


def put(**changes):
    """A mutation of tensors and options; functions are given what is there."""

    def mutate(call: Call) -> Call:
        found = Call(call.op, dict(call.tensors), call.plan, dict(call.options))
        for name, change in changes.items():
            where = found.tensors if name in found.tensors else found.options
            where[name] = change(where.get(name)) if callable(change) else change
        return found

    return mutate


def with_plan(plan):
    return lambda call: Call(call.op, call.tensors, plan() if callable(plan) else plan, call.options)


# The valid calls: B 2, M 3, T 13, D 9 (targets: B 3; a bias of 3 heads). Case: the op, what is changed, then what the
# message must say in this order.
CASES = {
    "gather: no plan": (GATHER, with_plan(None), "plan is a NoneType", "expected a pyeff.MaskPlan"),
    "gather: a mask for a plan": (GATHER, with_plan(torch.ones(2, 3, 13) > 0), "plan is a Tensor", "expected"),
    "gather: a plan of other tokens": (
        GATHER, with_plan(lambda: make_plan(2, 3, 12)), "x has shape [2, 13, 9]", "expected [B, 12, D]",
    ),
    "gather: a plan of other samples": (
        GATHER, with_plan(lambda: make_plan(5, 1, 13)), "x has shape [2, 13, 9]", "expected [5, 13, D]",
    ),
    "gather: a plan of other samples with as many rows": (
        GATHER, with_plan(lambda: make_plan(3, 2, 13)), "x has shape [2, 13, 9]", "expected [3, 13, D]", "2 masks",
    ),
    "gather: x repeated for each mask": (
        GATHER, put(x=lambda t: t.repeat_interleave(3, 0)), "x has shape [6, 13, 9]", "expected [2, 13, D]", "3 masks",
    ),
    "gather: a plan elsewhere": (
        GATHER, with_plan(lambda: make_plan().to("meta")), "ids_keep is on meta", "expected {device}",
    ),
    "gather: x flat": (GATHER, put(x=lambda t: t.flatten()), "x has shape [234]", "expected [B, 13, D]"),
    "gather: x of no sample": (GATHER, put(x=lambda t: t[:0]), "x has shape [0, 13, 9]", "expected [2, 13, D]"),
    "gather: x of integers": (GATHER, put(x=lambda t: t.nan_to_num().long()), "x is torch.int64", "expected one of"),
    "gather: x complex": (GATHER, put(x=lambda t: t.cfloat()), "x is torch.complex64", "expected one of"),
    "gather: x sparse": (GATHER, put(x=lambda t: t.to_sparse()), "x has layout", "expected torch.strided"),
    "gather: x elsewhere": (GATHER, put(x=lambda t: t.to("meta")), "{device}", "expected meta"),
    "gather: x a list": (GATHER, put(x=lambda t: t.tolist()), "x is a list", "expected a tensor"),
    "scatter: no plan": (SCATTER, with_plan("plan"), "plan is a str", "expected a pyeff.MaskPlan"),
    "scatter: x of other rows": (SCATTER, put(x=lambda t: t[:5]), "x has shape [5, ", "expected [6, "),
    "scatter: x of fewer slots": (SCATTER, put(x=lambda t: t[:, 1:]), "x has shape [6, ", "expected [6, "),
    "scatter: x of two dimensions": (SCATTER, put(x=lambda t: t[0]), "x has shape", "expected [6, "),
    "scatter: fill of another width": (SCATTER, put(fill=lambda t: t[..., :8]), "fill has shape", "expected", "9]"),
    "scatter: fill a vector of another width": (SCATTER, put(fill=lambda t: t[0, 0, :8]), "fill has shape [8]", "[9]"),
    "scatter: fill of other samples": (
        SCATTER, put(fill=lambda t: t[[0, 1, 1]]), "fill has shape [3, 13, 9]", "expected [2, 13, 9]",
    ),
    "scatter: fill a number": (SCATTER, put(fill=lambda t: t[0, 0, 0]), "fill has shape []", "expected [9]"),
    "scatter: fill of four dimensions": (SCATTER, put(fill=lambda t: t[None]), "fill has shape [1, 2, 13, 9]"),
    "scatter: fill of another dtype": (SCATTER, put(fill=other), "fill is {other}", "expected {dtype} as x"),
    "scatter: fill elsewhere": (SCATTER, put(fill=lambda t: t.to("meta")), "fill is on meta", "expected {device}"),
    "scatter: fill a float": (SCATTER, put(fill=0.5), "fill is a float", "expected a tensor"),
    "scatter: noise negative": (SCATTER, put(noise_std=-0.1), "noise_std is -0.1", "finite number of at least 0"),
    "scatter: noise no number": (SCATTER, put(noise_std=math.nan), "noise_std is nan", "finite number of at least 0"),
    "scatter: noise infinite": (SCATTER, put(noise_std=math.inf), "noise_std is inf", "finite number of at least 0"),
    "scatter: noise a text": (SCATTER, put(noise_std="x"), "noise_std is 'x'", "expected a number"),
    "scatter: seed a float": (SCATTER, put(seed=1.5), "seed is a float", "expected an integer"),
    "scatter: seed true": (SCATTER, put(seed=True), "seed is a bool", "expected an integer"),
    "scatter: seed too large": (SCATTER, put(seed=2**64), "seed is 18446744073709551616", "64 bits"),
    "scatter: seeds": (SCATTER, put(seed=lambda s: torch.tensor([1, 2])), "seed is torch.int64 [2]", "one int64"),
    "scatter: seed elsewhere": (SCATTER, put(seed=lambda s: torch.tensor(1, device="meta")), "seed is", "meta"),
    "scatter: names too many": (
        SCATTER, put(sample_ids=lambda s: torch.arange(3)), "sample_ids is torch.int64 [3]", "expected int64 [2]",
    ),
    "scatter: names of floats": (SCATTER, put(sample_ids=lambda s: torch.ones(2)), "sample_ids is torch.float32"),
    "scatter: names a list": (SCATTER, put(sample_ids=[0, 1]), "sample_ids is a list", "expected int64 [2]"),
    "targets: of another shape": (
        TARGETS, put(layer1=lambda t: t[:, :12]), "layers[1] has shape [3, 12, 9]", "expected [3, 13, 9]",
    ),
    "targets: of another dtype": (TARGETS, put(layer2=other), "layers[2] is {other}", "expected {dtype} as layers[0]"),
    "targets: elsewhere": (TARGETS, put(layer1=lambda t: t.to("meta")), "layers[1] is on meta", "expected {device}"),
    "targets: of two dimensions": (TARGETS, put(layer0=lambda t: t[0]), "layers[0] has shape [13, 9]", "[B, T, D]"),
    "targets: of integers": (TARGETS, put(layer0=lambda t: t.int()), "layers[0] is torch.int32", "expected one of"),
    "targets: None": (TARGETS, put(layer1=lambda t: None), "layers[1] is a NoneType", "expected a tensor"),
    "targets: sparse": (TARGETS, put(layer1=lambda t: t.to_sparse()), "layers[1] has layout", "torch.strided"),
    "targets: norm unknown": (TARGETS, put(norm="group"), "norm is 'group'", "expected one of 'none', 'instance'"),
    "targets: post norm unknown": (TARGETS, put(post_norm="rms"), "post_norm is 'rms'", "expected one of"),
    "targets: norms": (TARGETS, put(norm=["layer"]), "norm is ['layer']", "expected one of 'none', 'instance'"),
    "targets: eps a list": (TARGETS, put(eps=[1e-5]), "eps is a list", "expected a number"),
    "targets: eps zero": (TARGETS, put(eps=0.0), "eps is 0.0", "finite number above 0"),
    "targets: eps no number": (TARGETS, put(eps=math.nan), "eps is nan", "finite number above 0"),
    "targets: lengths too many": (
        TARGETS, put(lengths=lambda t: t[[0, 0, 0, 0]]), "lengths is torch.int64 [4]", "expected integers [3]",
    ),
    "targets: lengths of floats": (TARGETS, put(lengths=lambda t: t.float()), "lengths is torch.float32", "integers"),
    "targets: lengths too long": (TARGETS, put(lengths=lambda t: t + 1), "lengths has values outside of 0 to 13"),
    "loss: no plan": (LOSS, with_plan(7), "plan is a int", "expected a pyeff.MaskPlan"),
    "loss: a plan of other tokens": (
        LOSS, with_plan(lambda: make_plan(2, 3, 12)), "pred has shape [6, 13, 9]", "B 2, M 3, T 12",
    ),
    "loss: a plan of other rows": (LOSS, with_plan(lambda: make_plan(2, 4, 13)), "[B*M, T, D]", "B 2, M 4, T 13"),
    "loss: a plan of other samples": (LOSS, with_plan(lambda: make_plan(3, 2, 13)), "target [2, 13, 9]", "B 3, M 2"),
    "loss: a plan elsewhere": (LOSS, with_plan(lambda: make_plan().to("meta")), "inverse is on meta", "{device}"),
    "loss: pred of other rows": (LOSS, put(pred=lambda t: t[:5]), "pred has shape [5, 13, 9]", "expected [B*M, T, D]"),
    "loss: pred of two dimensions": (LOSS, put(pred=lambda t: t[0]), "pred has shape [13, 9]", "[B*M, T, D]"),
    "loss: target of another width": (
        LOSS, put(target=lambda t: t[..., :8]), "target has shape [2, 13, 8]", "expected [2, 13, 9]",
    ),
    "loss: target repeated": (LOSS, put(target=lambda t: t.repeat_interleave(3, 0)), "target [6, 13, 9]", "B 2, M 3"),
    "loss: target of no sample": (LOSS, put(target=lambda t: t[:0]), "target [0, 13, 9]", "expected [B*M, T, D]"),
    "loss: target elsewhere": (LOSS, put(target=lambda t: t.to("meta")), "target is on meta", "expected {device}"),
    "loss: target of integers": (LOSS, put(target=lambda t: t.nan_to_num().long()), "target is torch.int64"),
    "loss: pred of float8": (LOSS, put(pred=lambda t: t.to(torch.float8_e4m3fn)), "pred is torch.float8_e4m3fn"),
    "loss: kind unknown": (LOSS, put(kind="huber"), "kind is 'huber'", "expected one of 'l2', 'smooth_l1'"),
    "loss: kinds": (LOSS, put(kind=["l2"]), "kind is ['l2']", "expected one of 'l2', 'smooth_l1'"),
    "loss: no kind": (LOSS, put(kind=None), "kind is None", "expected one of 'l2', 'smooth_l1'"),
    "loss: reductions": (LOSS, put(reduction=("sum",)), "reduction is ('sum',)", "expected one of 'sum'"),
    "loss: beta a text": (LOSS, put(kind="smooth_l1", beta="x"), "beta is 'x'", "expected a number"),
    "loss: scale a text": (LOSS, put(scale="x"), "scale is 'x'", "expected a number"),
    "loss: scale true": (LOSS, put(scale=True), "scale is True", "expected a number"),
    "loss: scale a tensor": (LOSS, put(scale=torch.ones(())), "scale is a Tensor", "expected a number"),
    "loss: reduction unknown": (LOSS, put(reduction="batchmean"), "reduction is 'batchmean'", "expected one of 'sum'"),
    "loss: beta negative": (LOSS, put(kind="smooth_l1", beta=-1.0), "beta is -1.0", "'smooth_l1'"),
    "loss: beta of another kind": (LOSS, put(beta=0.5), "beta is 0.5 for kind 'l2'", "expected 0"),
    "loss: beta no number": (LOSS, put(kind="smooth_l1", beta=math.nan), "beta is nan", "positive number"),
    "loss: scale infinite": (LOSS, put(scale=math.inf), "scale is inf", "finite number"),
    "bias: no plan": (BIAS, with_plan(None), "plan is a NoneType", "expected a pyeff.MaskPlan"),
    "bias: a plan elsewhere": (BIAS, with_plan(lambda: make_plan().to("meta")), "ids_keep is on meta", "{device}"),
    "bias: slopes of two dimensions": (BIAS, put(slopes=lambda t: t[None]), "slopes [1, 3]", "expected [H]"),
    "bias: scale of other heads": (BIAS, put(scale=lambda t: t[:2]), "scale has shape [2] and slopes [3]", "[H]"),
    "bias: slopes of integers": (BIAS, put(slopes=lambda t: t.int()), "slopes is torch.int32", "expected one of"),
    "bias: no head": (BIAS, put(slopes=lambda t: t[:0], scale=lambda t: t[:0]), "slopes has shape [0]", "[H]"),
    "bias: dtype of integers": (BIAS, put(dtype=torch.int32), "dtype is torch.int32", "expected one of"),
    "bias: scale a list": (BIAS, put(scale=[1.0, 1.0, 1.0]), "scale is a list", "expected a tensor"),
}  # fmt: skip


def said(op, parts):
    """What a message must say: ``{dtype}`` and ``{device}`` are the call's, ``{other}`` is the other dtype."""
    dtype = places.here().dtypes[0]
    names = {"dtype": dtype, "other": OTHER[dtype], "device": places.here().device}
    return says(op, *(part.format(**names) for part in parts))


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_the_argument(native, case):
    op, mutate, *parts = CASES[case]
    call = MAKERS[op]()
    call()
    with pytest.raises(ValueError, match=said(op, parts)):
        mutate(call)()


def test_no_layer(native):
    with pytest.raises(ValueError, match=says("multimask_targets", "layers is empty", "at least one")):
        pyeff.ops.multimask_targets([])


def total_of(call: Call) -> torch.Tensor:
    return torch.zeros(call.first.shape, dtype=pyeff.reference.multimask.wide(call.first.dtype))


BAD_TOTALS = {
    "of another shape": (lambda t: t[:, 1:], {}, "total has shape [3, 12, 9]", "expected [3, 13, 9]"),
    "of 16 bits": (lambda t: t.bfloat16(), {}, "total is torch.bfloat16", "expected {dtype}"),
    "not contiguous": (lambda t: t.mT.contiguous().mT, {}, "total is not contiguous", "expected a contiguous buffer"),
    "a parameter": (lambda t: t.requires_grad_(), {}, "requires a gradient", "expected a contiguous buffer"),
    "elsewhere": (lambda t: t.to("meta"), {}, "total is on meta", "expected {device}"),
    "a list": (lambda t: t.tolist(), {}, "total is a list", "expected a tensor"),
    "weight no number": (lambda t: t, {"weight": math.nan}, "weight is nan", "expected a finite number"),
    "norm unknown": (lambda t: t, {"norm": "rms"}, "norm is 'rms'", "expected one of"),
    "eps negative": (lambda t: t, {"eps": -1e-5}, "eps is -1e-05", "above 0"),
}


@pytest.mark.parametrize("case", BAD_TOTALS)
def test_nothing_is_added_by_a_bad_call(native, case):
    change, options, *parts = BAD_TOTALS[case]
    call = make_targets()
    total = total_of(call)
    given = change(total)
    options = {"weight": 1.0, "lengths": call.options["lengths"], **options}
    with pytest.raises(ValueError, match=said("multimask_accumulate_", parts)):
        pyeff.ops.multimask_accumulate_(given, call.first, **options)
    assert not total.detach().any()


def test_a_total_that_is_the_layer(native):
    """What is read again after it was written would be wrong without a word."""
    layer = torch.randn(2, 5, 4, dtype=places.here().dtypes[0])
    before = layer.clone()
    twice = torch.cat([layer, layer])
    pyeff.ops.multimask_accumulate_(twice[:2], twice[2:], weight=1.0)
    for total, part in ((layer, layer), (layer, layer[:1].expand(2, 5, 4)), (twice[:2], twice[1:3])):
        with pytest.raises(ValueError, match=says("multimask_accumulate_", "total shares memory with layer")):
            pyeff.ops.multimask_accumulate_(total, part, weight=1.0)
    assert torch.equal(layer, before)


@pytest.mark.parametrize("bad", [torch.zeros(9), torch.zeros(8, dtype=torch.float64), None, [1.0]], ids=str)
def test_spread_of_no_moments(bad):
    with pytest.raises(ValueError, match=says("multimask_spread", "moments is", "expected float64 [1 + 4 D]")):
        pyeff.ops.multimask_spread(bad)


@ops
def test_a_dtype_without_kernels_says_so(cpu_kernels, op):
    with pytest.raises(RuntimeError, match=says(op, "cpu", "float16", "float64, float32, bfloat16")):
        MAKERS[op](dtype=torch.float16)()


@ops
def test_a_device_without_kernels_says_so(native_kernels, op):
    call = MAKERS[op]()
    options = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in call.options.items()}
    plan = call.plan and call.plan.to("meta")
    meta = Call(op, {n: t.to("meta") for n, t in call.tensors.items()}, plan, options)
    with pytest.raises(RuntimeError, match=says(op, native_kernels, "meta")):
        meta()
    with pyeff.backend("auto"):
        out = meta()
    assert out.device.type == "meta"
    assert out.shape == call().shape


# Through the ops themselves, which take any tensors for a plan's.
def raw(op: str, call: Call, plan: MaskPlan, backend: str):
    x = call.first
    if op == GATHER:
        return torch.ops.pyeff.multimask_gather(x, plan.ids_keep, plan.keep_len, plan.inverse, backend=backend)
    if op == SCATTER:
        fill = call.tensors["fill"]
        return torch.ops.pyeff.multimask_scatter(
            x, plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths, torch.tensor(1), fill, backend=backend
        )
    if op == LOSS:
        return torch.ops.pyeff.multimask_loss(
            x, call.tensors["target"], plan.inverse, plan.lengths, plan.keep_len, statistics=True, backend=backend
        )[0]
    return torch.ops.pyeff.multimask_relative_bias(plan.ids_keep, plan.keep_len, x, backend=backend)


WRONG = (-(2**31), -2, -1, 13, 14, 1000, 2**31 - 1)


@pytest.mark.parametrize("part", ["ids_keep", "keep_len", "inverse", "lengths"])
@pytest.mark.parametrize("op", [GATHER, SCATTER, LOSS, BIAS])
def test_an_index_that_leads_outside(on_cpu, op, part):
    """Refused, forward or backward, or harmless: never a crash, nor memory that is not the call's."""
    for value in WRONG:
        call = MAKERS[op](traps=False) if op != BIAS else MAKERS[op]()
        call = call.require_grad(call.tensors)
        plan = make_plan()
        index = getattr(plan, part)
        index.view(-1)[[0, index.numel() // 2, -1]] = value

        def both(call=call, plan=plan):
            out = raw(op, call, plan, on_cpu)
            torch.autograd.grad(out, call.first, torch.ones_like(out))

        text = refusal(both)
        if on_cpu == "cpu":
            assert not text or part in text
            used = op in (GATHER, SCATTER) and part in ("ids_keep", "inverse") and value >= 13
            assert text or not used, f"{part} with {value} was taken"


def test_an_index_of_noise(on_cpu):
    generator = torch.Generator().manual_seed(0)
    for limit in (3, 20, 2**31 - 1):
        for op in (GATHER, SCATTER, LOSS, BIAS):
            call = MAKERS[op](traps=False) if op != BIAS else MAKERS[op]()
            call = call.require_grad(call.tensors)
            plan = make_plan()
            for name in ("ids_keep", "keep_len", "inverse", "lengths"):
                t = getattr(plan, name)
                t.copy_(torch.randint(-limit, limit, t.shape, generator=generator, dtype=torch.int32))

            def both(op=op, call=call, plan=plan):
                out = raw(op, call, plan, on_cpu)
                torch.autograd.grad(out, call.first, torch.ones_like(out))

            refusal(both)


@pytest.mark.parametrize("value", WRONG)
def test_lengths_that_lead_outside(on_cpu, value):
    """Of targets, of a streaming sum and of masks."""
    lengths, layer = torch.tensor([13, value, 5], dtype=torch.int32), torch.randn(3, 13, 9, requires_grad=True)
    seed, total = torch.tensor(1), torch.zeros(3, 13, 9)

    def targets():
        torch.ops.pyeff.multimask_targets([layer], lengths, backend=on_cpu).sum().backward()

    def accumulate():
        torch.ops.pyeff.multimask_accumulate_(total, layer.detach(), lengths, weight=1.0, backend=on_cpu)

    def masks():
        torch.ops.pyeff.block_mask(seed, None, lengths, 2, 13, 0, 0.5, 0.2, 3, True, 6, backend=on_cpu)

    for function in (targets, accumulate, masks):
        text = refusal(function)
        assert not text or "lengths" in text or on_cpu == "reference"


def test_the_ops_check_what_their_schemas_let_pass(native):
    plan, x = make_plan(), torch.randn(2, 13, 9, dtype=places.here().dtypes[0])
    index = plan.ids_keep, plan.keep_len, plan.inverse
    seed, decay = torch.tensor([1, 2]), torch.tensor([0.5, 0.5], dtype=torch.float64)
    kept = torch.zeros(6, plan.width, 9, dtype=x.dtype)
    calls = {
        "ids_keep is torch.int64": lambda: torch.ops.pyeff.multimask_gather(x, index[0].long(), *index[1:]),
        "keep_len has shape [5]": lambda: torch.ops.pyeff.multimask_gather(x, index[0], index[1][:5], index[2]),
        "inverse has shape [5, 13]": lambda: torch.ops.pyeff.multimask_gather(x, *index[:2], index[2][:5]),
        "ids_keep has shape [6]": lambda: torch.ops.pyeff.multimask_gather(x, index[1], *index[1:]),
        "lengths is torch.int64": lambda: torch.ops.pyeff.multimask_targets([x], plan.lengths.long()),
        "lengths has 4 samples": lambda: torch.ops.pyeff.multimask_scatter(
            kept, *index, plan.lengths[[0, 0, 0, 0]], torch.tensor(1)
        ),
        "seed has shape [2]": lambda: torch.ops.pyeff.multimask_scatter(kept, *index, plan.lengths, seed),
        "seed has shape [0]": lambda: torch.ops.pyeff.multimask_scatter(kept, *index, plan.lengths, seed[:0]),
        "keep_len has shape [2]": lambda: torch.ops.pyeff.multimask_loss(
            kept, kept[:2], index[0], plan.lengths, plan.lengths
        ),
        "prefix is -1": lambda: torch.ops.pyeff.multimask_relative_bias(*index[:2], x[0, 0], prefix=-1),
        "decay is torch.float64 [2]": lambda: torch.ops.pyeff.ema_update_([x.clone()], [x], decay, []),
        "do not fit each other": lambda: torch.ops.pyeff.block_mask(
            torch.tensor(1), None, plan.lengths, 3, 13, 5, 0.5, 0.1, 2, True, 6
        ),
        "keep is 1.5": lambda: torch.ops.pyeff.block_mask(
            torch.tensor(1), None, plan.lengths, 3, 13, 0, 1.5, 0.1, 2, True, 6
        ),
    }  # fmt: skip
    for text, function in calls.items():
        with pytest.raises(ValueError, match=says(text)):
            function()


def test_more_slots_than_tokens_or_fewer_than_are_kept(on_cpu):
    """block_mask through its op, with a number of slots of any size: rows that do not fit lose their last tokens."""
    seed, lengths = torch.tensor(1), torch.tensor([13, 7], dtype=torch.int32)
    for slots in (1, 3, 13, 40):
        ids, keep_len, inverse = torch.ops.pyeff.block_mask(
            seed, None, lengths, 3, 13, 0, 0.9, 0.1, 2, True, slots, backend=on_cpu
        )
        expected = torch.ops.pyeff.block_mask(seed, None, lengths, 3, 13, 0, 0.9, 0.1, 2, True, slots,
                                              backend="reference")  # fmt: skip
        for a, b in zip((ids, keep_len, inverse), expected, strict=True):
            assert torch.equal(a, b)


@ops
def test_a_refused_call_changes_nothing(native, op):
    """The next call is as if it had not been."""
    call = MAKERS[op]()
    expected = call()
    bad = next(case for case in CASES.values() if case[0] == op)[1]
    leaves = call.require_grad(call.tensors)
    if op != TARGETS:
        with pytest.raises(ValueError, match=op):
            bad(leaves)()
    assert all(t.grad is None for t in leaves.tensors.values())
    assert torch.equal(call(), expected)
