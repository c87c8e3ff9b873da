"""Bad calls of READ: an error that names the argument, what came and what was expected; never a crash."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import pyeff
from tests import helpers
from tests.helpers import make_read, says


def put(name, change):
    """A mutation that changes one tensor of the call (or gives one that was absent)."""

    def mutate(call):
        call.tensors[name] = change(call.tensors.get(name))

    return mutate


def drop(*names):
    def mutate(call):
        for name in names:
            call.tensors.pop(name, None)

    return mutate


def option(**options):
    return lambda call: call.options.update(options)


def each(*mutations):
    def mutate(call):
        for m in mutations:
            m(call)

    return mutate


# The valid call: gru, rms, phi [5, 24] of 3 layers, r = 10. Case: what is changed, then what the message must say in
# this order: the argument, what came, what was expected.
CASES = {
    "cell unknown": (option(cell="sru"), "cell", "'sru'", "expected", "'rnn', 'gru', 'lstm'"),
    "cell of another case": (option(cell="GRU"), "cell", "'GRU'", "expected"),
    "norm unknown": (option(norm="batch"), "norm", "'batch'", "expected", "'rms', 'layer', 'none'"),
    "reduce unknown": (option(reduce="sum"), "reduce", "'sum'", "expected", "'mean', 'last'"),
    "eps negative": (option(eps=-1e-6), "eps", "-1e-06", "expected"),
    "eps nan": (option(eps=math.nan), "eps", "nan", "expected"),
    "eps infinite": (option(eps=math.inf), "eps", "inf", "expected"),
    "eps of another type": (option(eps="small"), "float", "eps", "str"),
    "phi narrower than w_ih": (
        each(*(put(f"phi{i}", lambda t: t[:, :20]) for i in range(3)), drop("norm_weight")),
        "w_ih", "[30, 24]", "expected", "[30, 20]",
    ),
    "one phi narrower": (put("phi1", lambda t: t[:, :20]), "phi[1]", "[5, 20]", "expected", "[5, 24]"),
    "one phi with fewer tokens": (put("phi2", lambda t: t[:4]), "phi[2]", "[4, 24]", "expected", "[5, 24]"),
    "one phi with another rank": (put("phi1", lambda t: t[None]), "phi[1]", "[1, 5, 24]", "expected", "[5, 24]"),
    "phi of no width": (put("phi0", lambda t: t[:, :0]), "phi[0]", "[5, 0]", "expected", "[*, d]"),
    "phi a scalar": (put("phi0", lambda t: t[0, 0]), "phi[0]", "[]", "expected", "[*, d]"),
    "one phi of another dtype": (put("phi1", lambda t: t.float()), "phi[1]", "float32", "expected", "float64"),
    "one phi of integers": (put("phi1", lambda t: t.long()), "phi[1]", "int64", "expected", "float64"),
    "one phi on another device": (put("phi1", lambda t: t.to("meta")), "phi[1]", "meta", "expected", "cpu"),
    "one phi sparse": (put("phi1", lambda t: t.to_sparse()), "phi[1]", "sparse_coo", "expected", "strided"),
    "w_ih of one gate": (put("w_ih", lambda t: t[:10]), "w_ih", "[10, 24]", "expected", "[30, 24]"),
    "w_ih transposed": (put("w_ih", lambda t: t.T), "w_ih", "[24, 30]", "expected", "[30, 24]"),
    "w_ih a vector": (put("w_ih", lambda t: t[0]), "w_ih", "[24]", "expected", "[30, 24]"),
    "w_ih of another dtype": (put("w_ih", lambda t: t.float()), "float64", "expected", "float32"),
    "w_ih of integers": (put("w_ih", lambda t: t.int()), "w_ih", "int32", "expected", "float32"),
    "w_ih complex": (put("w_ih", lambda t: t.to(torch.complex64)), "w_ih", "complex64", "expected", "float32"),
    "w_ih sparse": (put("w_ih", lambda t: t.to_sparse()), "w_ih", "sparse_coo", "expected", "strided"),
    "w_hh of the gru for another cell": (option(cell="lstm"), "w_hh", "[30, 10]", "expected", "[4 r, r]", "'lstm'"),
    "w_ih missing": (put("w_ih", lambda _: None), "w_ih", "NoneType", "expected a tensor"),
    "w_hh missing": (put("w_hh", lambda _: None), "w_hh", "NoneType", "expected a tensor"),
    "one phi missing": (put("phi1", lambda _: None), "phi[1]", "NoneType", "expected a tensor"),
    "w_hh not square in its gates": (put("w_hh", lambda t: t[:, :9]), "w_hh", "[30, 9]", "expected", "[3 r, r]"),
    "w_hh empty": (put("w_hh", lambda t: t[:0, :0]), "w_hh", "[0, 0]", "expected", "[3 r, r]"),
    "w_hh a vector": (put("w_hh", lambda t: t[0]), "w_hh", "[10]", "expected", "[3 r, r]"),
    "w_hh of another dtype": (put("w_hh", lambda t: t.bfloat16()), "w_hh", "bfloat16", "expected", "float64"),
    "w_hh on another device": (put("w_hh", lambda t: t.to("meta")), "w_hh", "meta", "expected", "cpu"),
    "b_ih too short": (put("b_ih", lambda t: t[:29]), "b_ih", "[29]", "expected", "[30]"),
    "b_ih of two dimensions": (put("b_ih", lambda t: t[None]), "b_ih", "[1, 30]", "expected", "[30]"),
    "b_hh too long": (put("b_hh", lambda t: t.repeat(2)), "b_hh", "[60]", "expected", "[30]"),
    "b_hh of another dtype": (put("b_hh", lambda t: t.half()), "b_hh", "float16", "expected", "float64"),
    "norm_weight too short": (put("norm_weight", lambda t: t[:1]), "norm_weight", "[1]", "expected", "[24]"),
    "norm_weight without a norm": (option(norm="none"), "norm_weight", "norm='none'", "expected None"),
    "norm_weight of another dtype": (put("norm_weight", lambda t: t.float()), "norm_weight", "float32", "expected"),
    "norm_bias with the rms norm": (put("norm_bias", lambda _: torch.zeros(24).double()), "norm_bias", "'rms'", "None"),
    "norm_bias too long": (
        each(option(norm="layer"), put("norm_bias", lambda _: torch.zeros(25).double())),
        "norm_bias", "[25]", "expected", "[24]",
    ),
    "h0 of one token": (put("h0", lambda t: t[:1]), "h0", "[1, 10]", "expected", "[5, 10]"),
    "h0 too narrow": (put("h0", lambda t: t[:, :9]), "h0", "[5, 9]", "expected", "[5, 10]"),
    "h0 of another dtype": (put("h0", lambda t: t.float()), "h0", "float32", "expected", "float64"),
    "h0 a number": (put("h0", lambda _: 0.0), "h0", "float", "expected a tensor or None"),
    "one phi of NumPy": (put("phi1", lambda t: t.numpy()), "phi[1]", "ndarray", "expected a tensor"),
    "one phi a string": (put("phi2", lambda _: "phi"), "phi[2]", "str", "expected a tensor"),
    "w_ih of NumPy": (put("w_ih", lambda t: t.numpy()), "w_ih", "ndarray", "expected a tensor"),
    "w_hh a list": (put("w_hh", lambda t: t.tolist()), "w_hh", "list", "expected a tensor"),
    "b_ih a number": (put("b_ih", lambda _: 1.0), "b_ih", "float", "expected a tensor or None"),
    "norm_weight of NumPy": (put("norm_weight", lambda t: t.numpy()), "norm_weight", "ndarray", "expected a tensor"),
    "c0 without lstm": (put("c0", lambda _: torch.zeros(5, 10).double()), "c0", "'gru'", "expected None"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_the_argument(backend, case):
    mutate, *parts = CASES[case]
    call = make_read("gru", "rms")
    assert torch.isfinite(call()).all()
    mutate(call)
    # What is no number is refused by the schema.
    with pytest.raises(RuntimeError if case == "eps of another type" else ValueError, match=says(*parts)):
        call()


OPTION_CASES = [
    "cell unknown", "cell of another case", "norm unknown", "reduce unknown", "eps negative", "eps nan", "eps infinite",
    "norm_weight without a norm", "norm_bias with the rms norm", "c0 without lstm",
]  # fmt: skip


@pytest.mark.parametrize("case", OPTION_CASES)
def test_the_definition_refuses_the_same_options(case):
    mutate, *parts = CASES[case]
    call = make_read("gru", "rms")
    mutate(call)
    with pytest.raises(ValueError, match=says(*parts)) as ours:
        call()
    with pytest.raises(ValueError, match=says(*parts)) as definition:
        call(pyeff.reference.read_recurrence)
    assert str(ours.value) == str(definition.value)
    options = {n: v for n, v in call.options.items() if n != "reduce"}
    weights = {n: t for n, t in call.tensors.items() if not n.startswith("phi") and n not in ("h0", "c0")}
    if case not in ("reduce unknown", "c0 without lstm"):
        with pytest.raises(ValueError, match=says("read_step", *parts)):
            pyeff.reference.read_step(call.phi[0], None, **weights, **options)


@pytest.mark.parametrize(
    ("cell", "count", "parts"),
    [
        # [2, r] would unpack into an h and a c of one token each.
        ("lstm", 1, ("one tensor", "expected", "(h, c)")),
        ("lstm", 3, ("tuple of Tensor, Tensor, Tensor", "expected", "(h, c)")),
        ("gru", 2, ("tuple of Tensor, Tensor", "expected", "one tensor")),
    ],
)
@pytest.mark.parametrize("function", [pyeff.ops.read_step, pyeff.reference.read_step], ids=["op", "definition"])
def test_states_of_another_cell(function, cell, count, parts):
    call = make_read(cell, layers=1, lead=(2,), state=False)
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    h = torch.zeros(2, call.rank, dtype=torch.float64)
    with pytest.raises(ValueError, match=says("read_step", "state", *parts)):
        function(call.phi[0], h if count == 1 else (h,) * count, **weights, cell=cell)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c[:4], ("c0", "[4, 10]", "expected", "[5, 10]")),
        (lambda c: c.float(), ("c0", "float32", "expected", "float64")),
    ],
)
def test_bad_cell_state(backend, change, parts):
    call = make_read("lstm")
    call.tensors["c0"] = change(call.tensors["c0"])
    with pytest.raises(ValueError, match=says(*parts)):
        call()


@pytest.mark.parametrize("phi", [None, 3, object(), "phi", torch.tensor(1.0)], ids=lambda phi: type(phi).__name__)
def test_phi_that_is_no_sequence(phi):
    call = make_read("gru")
    with pytest.raises(ValueError, match=says("phi is a", type(phi).__name__[1:], "expected")):
        pyeff.ops.read_recurrence(phi, call.tensors["w_ih"], call.tensors["w_hh"])


@pytest.mark.parametrize("where", [pyeff.ops, pyeff.reference], ids=["op", "definition"])
def test_no_layers(where):
    call = make_read("gru")
    with pytest.raises(ValueError, match=says("phi", "empty", "expected")):
        where.read_recurrence([], call.tensors["w_ih"], call.tensors["w_hh"])


@pytest.mark.parametrize(
    ("cell", "state", "parts"),
    [
        ("lstm", "h", ("state", "one tensor", "expected", "(h, c)")),
        ("gru", "hc", ("state", "tuple of Tensor, Tensor", "expected", "one tensor")),
        ("lstm", "hhh", ("state", "tuple of Tensor, Tensor, Tensor", "expected", "(h, c)")),
        ("lstm", 3, ("state", "int", "expected", "(h, c)")),
        ("gru", 3, ("state", "int", "expected", "one tensor")),
        ("gru", "short", ("state", "[4, 10]", "expected", "[5, 10]")),
        ("lstm", "short c", ("state", "[4, 10]", "expected", "[5, 10]")),
        ("gru", "float32", ("state", "float32", "expected", "float64")),
    ],
)
def test_bad_step_state(backend, cell, state, parts):
    call = make_read(cell, layers=1, state=False)
    h = torch.zeros(5, 10, dtype=torch.float64)
    made = {"h": h, "hc": (h, h), "hhh": (h, h, h), "short": h[:4], "short c": (h, h[:4]), "float32": h.float()}
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    with pytest.raises(ValueError, match=says("read_step", *parts)):
        pyeff.ops.read_step(call.phi[0], made.get(state, state), **weights, cell=cell)


def test_step_names_its_own_arguments(backend):
    call = make_read("gru", layers=1, state=False)
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    with pytest.raises(ValueError, match=says("read_step", "phi_i", "float32", "expected", "float64")):
        pyeff.ops.read_step(call.phi[0].float(), None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "phi_i", "[]", "expected")):
        pyeff.ops.read_step(call.phi[0][0, 0], None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "phi_i", "ndarray", "expected a tensor")):
        pyeff.ops.read_step(call.phi[0].numpy(), None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "b_hh", "ndarray", "expected a tensor")):
        pyeff.ops.read_step(call.phi[0], None, **{**weights, "b_hh": call.tensors["b_hh"].numpy()})


def test_the_op_itself_checks_what_its_schema_lets_pass():
    call = make_read("gru")
    with pytest.raises(ValueError, match=says("read_recurrence", "w_hh", "NoneType", "expected a tensor")):
        torch.ops.pyeff.read_recurrence(call.phi, call.tensors["w_ih"], None)


def test_mixed_precision_without_autocast_raises(backend):
    """float32 beside float64, or bfloat16 beside float32, is a mistake unless autocast was asked for."""
    for low, high in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        weights = {n: t for n, t in make_read("gru", dtype=low).tensors.items() if not n.startswith("phi")}
        with pytest.raises(ValueError, match=says("phi[0]", high, "expected", low)):
            pyeff.ops.read_recurrence(make_read("gru", dtype=high).phi, **weights)


def test_shapes_are_inferred_on_the_meta_device(recwarn):
    call = make_read("lstm", "layer", lead=(2, 3)).map(lambda t: t.to("meta"))
    out = call()
    assert out.device.type == "meta"
    assert out.shape == (2, 3, 10)


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
    "numpy": lambda t: t.numpy(),
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


# Changes that leave a call valid, whatever the tensor.
HARMLESS = ("expanded", "every second", "negated view", "parameter")


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
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        refusal = None
        try:
            out = call(recompute=recompute)
        except (ValueError, RuntimeError) as error:
            refusal = error
    if refusal is not None:
        hypothesis.note(f"{done}: {refusal}")
        assert any(change not in HARMLESS for _, change in done), (done, refusal)
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
