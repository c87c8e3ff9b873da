"""The multimask family at sizes, plans, strides and options at random: what its definitions give, bitwise the masks of
one definition, and for arguments changed at random either a result or a message."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import given

import pyeff
from pyeff import MaskPlan
from tests import helpers, places
from tests.multimask_calls import (
    KINDS,
    MAKERS,
    NORMS,
    REDUCTIONS,
    Call,
    check_call,
    make_bias,
    make_gather,
    make_loss,
    make_plan,
    make_scatter,
    make_targets,
    normal,
)
from tests.test_multimask_plan import same
from tests.test_read_fuzz import TENSOR_CHANGES

OPERATION = "multimask_loss"
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0, 1, width=16)
few = hypothesis.settings(max_examples=max(hypothesis.settings().max_examples // 2, 1))


@st.composite
def plans(draw) -> MaskPlan:
    batch, masks, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 19))
    ragged = draw(st.booleans())
    lengths = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)) if ragged else None
    plan = make_plan(
        batch, masks, tokens, keep=draw(st.floats(0, 0.5, width=16)), ragged=ragged, lengths=lengths, seed=draw(SEEDS)
    )
    if draw(st.booleans()):  # more slots than any row needs, or too few for some
        plan = MaskPlan.from_mask(plan.hidden(), plan.lengths, width=draw(st.integers(1, tokens + 2)))
    return plan


@st.composite
def calls(draw) -> Call:
    op = draw(st.sampled_from(sorted(MAKERS)))
    dtype, seed = draw(st.sampled_from(places.here().dtypes)), draw(SEEDS)
    if op == "multimask_relative_bias":
        plan, prefix = draw(plans()), draw(st.sampled_from([0, 0, 2]))
        to = draw(st.none() | st.sampled_from(places.here().dtypes)) if dtype != torch.float64 else None
        to = None if to == torch.float64 else to
        return make_bias(
            plan.with_prefix(prefix), draw(st.integers(1, 5)), scale=draw(st.booleans()), to=to, dtype=dtype, seed=seed
        )  # fmt: skip
    more = {"dtype": dtype, "seed": seed, "strides": draw(st.sampled_from(helpers.STRIDES))}
    width = draw(st.integers(1, 21))
    if op == "multimask_targets":
        batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 19))
        lengths = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        norms = {"norm": draw(st.sampled_from(NORMS)), "post_norm": draw(st.sampled_from(NORMS))}
        return make_targets(batch, tokens, width, draw(st.integers(1, 4)), lengths=lengths, eps=1e-2, **norms, **more)
    if op == "multimask_gather":
        return make_gather(draw(plans()), width, **more)
    if op == "multimask_scatter":
        fill, noise = draw(st.sampled_from(["", "D", "TD", "BTD"])), draw(st.sampled_from([0.0, 0.01, 1.0]))
        return make_scatter(draw(plans()), width, fill=fill, noise=noise, **more)
    kind = draw(st.sampled_from(KINDS))
    return make_loss(
        draw(plans()), width, kind=kind, beta=draw(st.sampled_from([0.0, 0.5])) if kind == "smooth_l1" else 0.0,
        scale=draw(st.none() | st.sampled_from([0.25, -2.0])), reduction=draw(st.sampled_from(REDUCTIONS)), **more,
    )  # fmt: skip


def settled(call: Call) -> bool:
    """Nothing of which a derivative is a jump, or the mean of nothing."""
    if call.what == "loss":
        return bool(call.plan.count() > 0) or call.options["reduction"] != "mean"
    return True


@given(data=st.data())
def test_as_defined(native_kernels, data):
    """Output and gradients."""
    call = data.draw(calls())
    hypothesis.assume(settled(call))
    check_call(call)


@given(data=st.data(), batch=st.integers(1, 3), masks=st.integers(1, 4), keep=SHARES, adjust=SHARES, seed=SEEDS)
@few
def test_masks(native_kernels, data, batch, masks, keep, adjust, seed):
    """The same bits as the definition's, and as many tokens as were asked for."""
    shape = data.draw(st.tuples(st.integers(1, 40)) | st.tuples(st.integers(1, 7), st.integers(1, 7)))
    tokens, lengths = math.prod(shape), None
    if len(shape) == 1:
        lengths = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {
        "keep": keep, "adjust": adjust, "length": data.draw(st.integers(1, 5)), "inverse": data.draw(st.booleans()),
        "seed": seed, "lengths": lengths, "device": torch.get_default_device(),
    }  # fmt: skip
    found = pyeff.ops.block_mask(batch, masks, shape, **options)
    assert same(found, pyeff.reference.block_mask(batch, masks, shape, **options))
    size = torch.full((batch,), tokens) if lengths is None else lengths
    assert found.keep_len.tolist() == (size.double() * keep).int().repeat_interleave(masks).tolist()


@given(data=st.data(), decay=SHARES, sizes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5))
@few
def test_averages(native_kernels, data, decay, sizes):
    """Of tensors of any shapes and dtypes beside each other."""
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    make = [[normal(*size, seed=3 * i + j).to(data.draw(dtypes)) for i, size in enumerate(sizes)] for j in range(3)]
    ema, params, copies = ([t.to(torch.get_default_device()) for t in given] for given in make)
    if not data.draw(st.booleans()):
        copies = None
    mine, theirs = ([[t.clone() for t in given or []] for given in (ema, copies)] for _ in range(2))
    for (average, copied), where in ((mine, pyeff.ops), (theirs, pyeff.reference)):
        where.ema_update_(average, params, decay, copies=copied or None)
    for a, b in zip([*mine[0], *mine[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b)


OPTION_VALUES = {
    "noise_std": [-1.0, math.nan, math.inf, 0, 1e-3], "seed": [1.5, None, 2**63, -(2**63), True, "1"],
    "norm": ["batch", "none", "", None, 1], "post_norm": ["layer", "rms", None], "kind": ["l1", "L2", "", None],
    "eps": [0.0, -1.0, math.inf, math.nan, 1], "beta": [1.0, -1.0, math.nan, math.inf], "dtype": [torch.int32, None],
    "scale": [0.0, math.inf, math.nan, None], "reduction": ["none", "mean", "max", None],
    "lengths": [None, [1, 2], torch.tensor([1]), torch.tensor([99, 1, 1]), torch.tensor([0.5, 1.0, 2.0])],
}  # fmt: skip
HARMLESS = ("every second", "negated view", "parameter")


@given(data=st.data())
def test_changed_arguments(native_kernels, data):
    """One line that names the op, or what the definition gives for the same arguments."""
    op = data.draw(st.sampled_from(sorted(MAKERS)))
    traps = {} if op in ("multimask_relative_bias", "multimask_targets") else {"traps": False}
    call = MAKERS[op](dtype=places.here().dtypes[0], **traps)
    if op == "multimask_scatter":
        call = call.but(noise_std=0.0)
    name = data.draw(st.sampled_from(sorted({*call.tensors, *(set(call.options) & set(OPTION_VALUES)), "plan"})))
    change = ""
    if name in call.tensors:
        change = data.draw(st.sampled_from(sorted(TENSOR_CHANGES)))
        call.tensors[name] = TENSOR_CHANGES[change](call.tensors[name])
    elif name == "plan" and call.plan is not None:
        call.plan = data.draw(st.sampled_from([None, 1, make_plan(1, 6), make_plan(2, 3, 12), make_plan(3, 2)]))
    elif name in OPTION_VALUES:
        call.options[name] = data.draw(st.sampled_from(OPTION_VALUES[name]))
    hypothesis.note(f"{op} {name} {change or call.options.get(name)}")
    refusal = None
    try:
        out = call()
    except (ValueError, RuntimeError, TypeError) as error:
        refusal = str(error)
    if refusal is not None:
        assert op in refusal
        assert change not in HARMLESS, refusal
        assert not any(inside in refusal for inside in ("csrc/", "pyeff_cpu", "kernels.py")), refusal
        return
    with torch.no_grad():
        expected = call(call.definition)
    assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
    if out.device.type != "meta":
        torch.testing.assert_close(out.detach(), expected, equal_nan=True)
