"""READ called with one or two arguments changed at random: it raises, or gives what the reference gives."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import pyeff
from tests import helpers, places
from tests.helpers import make_read

TENSOR_CHANGES = {
    "float32": lambda t: t.to(torch.float32),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "float16": lambda t: t.to(torch.float16),
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "complex128": lambda t: t.to(torch.complex128),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.dim() else t,
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "shorter": lambda t: t[:-1] if t.dim() else t,
    "narrower": lambda t: t[..., :-1] if t.dim() else t,
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t,
    "unsqueezed": lambda t: t[None],
    "flattened": lambda t: t.reshape(-1),
    "empty": lambda t: t[:0] if t.dim() else t,
    "no width": lambda t: t[..., :0] if t.dim() else t,
    "scalar": lambda t: t.sum(),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "every second": lambda t: torch.stack([t, t * math.nan], -1).flatten(-2)[..., ::2] if t.dim() else t,
    "negated view": lambda t: torch._neg_view(t),
    "conjugate": lambda t: t.conj(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "None": lambda t: None,
    "number": lambda t: 1.5,
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.cpu().numpy(),
}
OPTION_VALUES = {
    "cell": ["rnn", "gru", "lstm", "", "Gru", None, 1],
    "norm": ["rms", "layer", "none", "", None],
    "reduce": ["mean", "last", "max", None],
    "eps": [0.0, 1e-6, -1.0, math.inf, math.nan, 0, 1e30, "1e-6", None],
    "recompute": [True, False, 0, "yes", None],
}


@st.composite
def mutations(draw):
    call = make_read(
        draw(st.sampled_from(helpers.CELLS)), draw(st.sampled_from(helpers.NORMS)),
        draw(st.sampled_from(helpers.REDUCTIONS)), lead=draw(st.sampled_from([(), (1,), (4,), (2, 3)])), d=6, r=4,
        layers=draw(st.integers(1, 3)), bias=draw(st.booleans()), state=draw(st.booleans()),
    )  # fmt: skip
    done = []
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 3)):
            name = draw(st.sampled_from(sorted(call.tensors)))
            change = draw(st.sampled_from(sorted(TENSOR_CHANGES)))
            if isinstance(call.tensors[name], torch.Tensor):
                try:
                    call.tensors[name] = TENSOR_CHANGES[change](call.tensors[name])
                except (RuntimeError, TypeError, IndexError):
                    continue  # the change itself is impossible for what an earlier one left
                done.append((name, change))
        else:
            name = draw(st.sampled_from(sorted(OPTION_VALUES)))
            call.options[name] = draw(st.sampled_from(OPTION_VALUES[name]))
            done.append((name, call.options[name]))
    return call, done


# Changes that leave a call valid, whatever the tensor; so does the dtype that it has already.
HARMLESS = ("expanded", "every second", "negated view", "parameter")


def harmless(change) -> bool:
    return change in (*HARMLESS, str(places.here().dtypes[0]).removeprefix("torch."))


def options_fit(call) -> bool:
    """Whether the options are known ones and leave a place for every tensor: what the definition checks too."""
    cell, norm, eps = call.options["cell"], call.options["norm"], call.options["eps"]
    present = {name for name, t in call.tensors.items() if t is not None}
    return (
        cell in helpers.CELLS and norm in helpers.NORMS and call.options["reduce"] in helpers.REDUCTIONS
        and isinstance(eps, int | float) and 0 <= eps < math.inf
        and not (norm == "none" and "norm_weight" in present) and not (norm != "layer" and "norm_bias" in present)
        and not (cell != "lstm" and "c0" in present)
    )  # fmt: skip


def assert_names_what_is_wrong(error, call, done):
    """One line of ours, or the schema's, with the op or an argument in it; nothing from inside of the library."""
    text = str(error)
    names = {"phi" if name.startswith("phi") else name for name in [*call.tensors, *call.options, "recompute"]}
    assert "read_recurrence" in text, (done, text)
    assert any(name in text for name in names) or "cannot serve: the tensors are" in text, (done, text)
    for inside in ("csrc/", "pyeff_cpu", "read_forward"):
        assert inside not in text, (done, text)


@given(mutated=mutations(), training=st.booleans(), autocast=st.booleans())
def test_fuzz(backend, mutated, training, autocast):
    """A call with one or two arguments changed at random raises, or gives what the reference gives."""
    call, done = mutated
    recompute = call.options.pop("recompute", False)
    if training:
        call.tensors = {
            n: t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for n, t in call.tensors.items()
        }
    with torch.autocast(places.here().device, torch.bfloat16, enabled=autocast):
        refusal = None
        try:
            out = call(recompute=recompute)
        except (ValueError, RuntimeError) as error:
            refusal = error
    if refusal is not None:
        hypothesis.note(f"{done}: {refusal}")
        assert not all(harmless(change) for _, change in done), (done, refusal)
        assert_names_what_is_wrong(refusal, call, done)
        if not options_fit(call):
            with pytest.raises(ValueError, match="read_recurrence"):
                call(pyeff.reference.read_recurrence)
        return
    # It passed the checks, so it is a valid call, and the reference knows the answer.
    assert options_fit(call), done
    assert all(t is None or isinstance(t, torch.Tensor) for t in call.tensors.values()), done
    call.tensors = {n: t for n, t in call.tensors.items() if t is not None}
    weights = call.tensors["w_ih"].dtype
    assert out.dtype == (torch.bfloat16 if autocast and weights != torch.float64 else weights), done
    assert out.device == call.tensors["w_ih"].device, done
    assert out.shape == (*call.tensors["phi0"].shape[:-1], call.rank), done
    if out.device.type == "meta":
        return
    # What autocast casts is the oracle's input: all three are asked about the same numbers.
    rounded = call.map(lambda t: t.detach().to(out.dtype))
    names = [n for n, t in call.tensors.items() if t.requires_grad]
    if not names:
        with torch.no_grad():
            same = rounded(pyeff.reference.read_recurrence)
            truth = rounded.to(torch.float64)(pyeff.reference.read_recurrence)
        helpers.assert_three_way(f"out {done}", out.detach(), same, truth, call.terms("out"), 1.0)
        return
    grad_out = torch.ones(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, [call.tensors[n] for n in names], grad_out)
    found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
    same = helpers.gradients(rounded, names, grad_out, pyeff.reference.read_recurrence)
    truth = helpers.gradients(rounded.to(torch.float64), names, grad_out, pyeff.reference.read_recurrence)
    scales = {"out": 1.0, **helpers.few_element_scales(rounded, grad_out)}
    scales |= dict.fromkeys((n for n in names if n.startswith("phi")), helpers.phi_gradient_scale(rounded, grad_out))
    for name, value in found.items():
        assert name == "out" or value.dtype == call.tensors[name].dtype, (name, done)
        if value.dtype.itemsize < out.dtype.itemsize:  # float8 under autocast: the gradient is rounded to that, too
            slack = torch.finfo(value.dtype).eps * truth[name].abs().max().item()
            assert helpers.error(value, truth[name]) <= slack, (name, done)
            continue
        helpers.assert_three_way(
            f"{name} {done}", value.to(out.dtype), same[name], truth[name], call.terms(name), scales.get(name, 0.0)
        )


@given(mutated=mutations())
def test_fuzz_the_definition(mutated):
    """Wrong options never give a result, and right ones are never refused for themselves."""
    call, done = mutated
    call.options.pop("recompute", None)
    if not options_fit(call):
        with pytest.raises(ValueError, match=r"read_recurrence: .* expected"):
            call(pyeff.reference.read_recurrence)
    elif not any(name == "cell" or name in call.tensors for name, _ in done):  # another cell needs other weights
        assert torch.isfinite(call(pyeff.reference.read_recurrence)).all(), done
