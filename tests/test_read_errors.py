"""Bad calls of READ: an error that names the argument, what came and what was expected; never a crash."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from tests import places
from tests.helpers import make_read, says

# The dtypes that a call is made in, each with one that it must not be mixed with.
OTHER = {torch.float64: torch.float32, torch.float32: torch.float64}


def other(t):
    return t.to(OTHER[t.dtype])


def numpy(t):
    return t.cpu().numpy()


def zeros(*shape):
    return torch.zeros(*shape, dtype=places.here().dtypes[0])


def said(parts):
    """What a message must say: ``{dtype}`` and ``{device}`` are the call's, ``{other}`` is the other dtype."""
    dtype = places.here().dtypes[0]
    names = {"dtype": dtype, "other": OTHER[dtype], "device": places.here().device}
    return says(*(part.format(**names) for part in parts))


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
    "eps of another type": (option(eps="small"), "eps", "'small'", "expected"),
    "recompute a word": (option(recompute="no"), "recompute", "'no'", "expected False or True"),
    "eps a tensor": (option(eps=torch.tensor(1e-6)), "eps", "Tensor", "expected a number"),
    "eps past all floats": (option(eps=10**400), "eps", "too large", "expected"),
    "phi narrower than w_ih": (
        each(*(put(f"phi{i}", lambda t: t[:, :20]) for i in range(3)), drop("norm_weight")),
        "w_ih", "[30, 24]", "expected", "[30, 20]",
    ),
    "one phi narrower": (put("phi1", lambda t: t[:, :20]), "phi[1]", "[5, 20]", "expected", "[5, 24]"),
    "one phi with fewer tokens": (put("phi2", lambda t: t[:4]), "phi[2]", "[4, 24]", "expected", "[5, 24]"),
    "one phi with another rank": (put("phi1", lambda t: t[None]), "phi[1]", "[1, 5, 24]", "expected", "[5, 24]"),
    "phi of no width": (put("phi0", lambda t: t[:, :0]), "phi[0]", "[5, 0]", "expected", "[*, d]"),
    "phi a scalar": (put("phi0", lambda t: t[0, 0]), "phi[0]", "[]", "expected", "[*, d]"),
    "one phi of another dtype": (put("phi1", other), "phi[1]", "{other}", "expected", "{dtype}"),
    "one phi of integers": (put("phi1", lambda t: t.long()), "phi[1]", "int64", "expected", "{dtype}"),
    "one phi on another device": (put("phi1", lambda t: t.to("meta")), "phi[1]", "meta", "expected", "{device}"),
    "one phi sparse": (put("phi1", lambda t: t.to_sparse()), "phi[1]", "sparse_coo", "expected", "strided"),
    "w_ih of one gate": (put("w_ih", lambda t: t[:10]), "w_ih", "[10, 24]", "expected", "[30, 24]"),
    "w_ih transposed": (put("w_ih", lambda t: t.T), "w_ih", "[24, 30]", "expected", "[30, 24]"),
    "w_ih a vector": (put("w_ih", lambda t: t[0]), "w_ih", "[24]", "expected", "[30, 24]"),
    "w_ih of another dtype": (put("w_ih", other), "{dtype}", "expected", "{other}"),
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
    "w_hh of another dtype": (put("w_hh", lambda t: t.bfloat16()), "w_hh", "bfloat16", "expected", "{dtype}"),
    "w_hh on another device": (put("w_hh", lambda t: t.to("meta")), "w_hh", "meta", "expected", "{device}"),
    "b_ih too short": (put("b_ih", lambda t: t[:29]), "b_ih", "[29]", "expected", "[30]"),
    "b_ih of two dimensions": (put("b_ih", lambda t: t[None]), "b_ih", "[1, 30]", "expected", "[30]"),
    "b_hh too long": (put("b_hh", lambda t: t.repeat(2)), "b_hh", "[60]", "expected", "[30]"),
    "b_hh of another dtype": (put("b_hh", lambda t: t.half()), "b_hh", "float16", "expected", "{dtype}"),
    "norm_weight too short": (put("norm_weight", lambda t: t[:1]), "norm_weight", "[1]", "expected", "[24]"),
    "norm_weight without a norm": (option(norm="none"), "norm_weight", "norm='none'", "expected None"),
    "norm_weight of another dtype": (put("norm_weight", other), "norm_weight", "{other}", "expected"),
    "norm_bias with the rms norm": (put("norm_bias", lambda _: zeros(24)), "norm_bias", "'rms'", "None"),
    "norm_bias too long": (
        each(option(norm="layer"), put("norm_bias", lambda _: zeros(25))),
        "norm_bias", "[25]", "expected", "[24]",
    ),
    "h0 of one token": (put("h0", lambda t: t[:1]), "h0", "[1, 10]", "expected", "[5, 10]"),
    "h0 too narrow": (put("h0", lambda t: t[:, :9]), "h0", "[5, 9]", "expected", "[5, 10]"),
    "h0 of another dtype": (put("h0", other), "h0", "{other}", "expected", "{dtype}"),
    "h0 a number": (put("h0", lambda _: 0.0), "h0", "float", "expected a tensor or None"),
    "one phi of NumPy": (put("phi1", numpy), "phi[1]", "ndarray", "expected a tensor"),
    "one phi a string": (put("phi2", lambda _: "phi"), "phi[2]", "str", "expected a tensor"),
    "w_ih of NumPy": (put("w_ih", numpy), "w_ih", "ndarray", "expected a tensor"),
    "w_hh a list": (put("w_hh", lambda t: t.tolist()), "w_hh", "list", "expected a tensor"),
    "b_ih a number": (put("b_ih", lambda _: 1.0), "b_ih", "float", "expected a tensor or None"),
    "norm_weight of NumPy": (put("norm_weight", numpy), "norm_weight", "ndarray", "expected a tensor"),
    "c0 without lstm": (put("c0", lambda _: zeros(5, 10)), "c0", "'gru'", "expected None"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_the_argument(backend, case):
    mutate, *parts = CASES[case]
    call = make_read("gru", "rms")
    assert torch.isfinite(call()).all()
    mutate(call)
    with pytest.raises(ValueError, match=said(parts)):
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
        (other, ("c0", "{other}", "expected", "{dtype}")),
    ],
)
def test_bad_cell_state(backend, change, parts):
    call = make_read("lstm")
    call.tensors["c0"] = change(call.tensors["c0"])
    with pytest.raises(ValueError, match=said(parts)):
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
        ("gru", "other dtype", ("state", "{other}", "expected", "{dtype}")),
    ],
)
def test_bad_step_state(backend, cell, state, parts):
    call = make_read(cell, layers=1, state=False)
    h = zeros(5, 10)
    made = {"h": h, "hc": (h, h), "hhh": (h, h, h), "short": h[:4], "short c": (h, h[:4]), "other dtype": other(h)}
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    with pytest.raises(ValueError, match=said(("read_step", *parts))):
        pyeff.ops.read_step(call.phi[0], made.get(state, state), **weights, cell=cell)


def test_step_names_its_own_arguments(backend):
    call = make_read("gru", layers=1, state=False)
    weights = {n: t for n, t in call.tensors.items() if n != "phi0"}
    with pytest.raises(ValueError, match=said(("read_step", "phi_i", "{other}", "expected", "{dtype}"))):
        pyeff.ops.read_step(other(call.phi[0]), None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "phi_i", "[]", "expected")):
        pyeff.ops.read_step(call.phi[0][0, 0], None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "phi_i", "ndarray", "expected a tensor")):
        pyeff.ops.read_step(call.phi[0].cpu().numpy(), None, **weights)
    with pytest.raises(ValueError, match=says("read_step", "b_hh", "ndarray", "expected a tensor")):
        pyeff.ops.read_step(call.phi[0], None, **{**weights, "b_hh": call.tensors["b_hh"].cpu().numpy()})


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
