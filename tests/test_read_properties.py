"""READ over random shapes, strides and options, and what must hold for all of them."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given

import pyeff
from tests import helpers, places
from tests.helpers import CELLS, DTYPES, NORMS, REDUCTIONS, check_read, make_read


@st.composite
def calls(draw, dtypes=DTYPES, norms=NORMS, cells=CELLS, reductions=REDUCTIONS, min_tokens=0):
    here = places.here().dtypes
    lead = tuple(draw(st.lists(st.integers(min_tokens and 1, 9), max_size=3)))
    if draw(st.booleans()):
        # The kernels take tokens in groups of 8, blocks of 96 and chunks of 256 or 512.
        lead = (draw(st.integers(1, 80) | st.sampled_from([95, 96, 97, 255, 256, 257, 511, 513])),)
    return make_read(
        draw(st.sampled_from(cells)), draw(st.sampled_from(norms)), draw(st.sampled_from(reductions)), lead=lead,
        layers=draw(st.integers(1, 6)), d=draw(st.integers(1, 70)), r=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from([d for d in dtypes if d in here] or here[:1])), bias=draw(st.booleans()),
        state=draw(st.booleans()), affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        seed=draw(st.integers(0, 2**20)),
        strides=tuple(draw(st.lists(st.sampled_from(helpers.STRIDES), min_size=1, max_size=3))),
        weight_strides=draw(st.sampled_from([k for k in helpers.STRIDES if k != "expanded"])),
    )  # fmt: skip


def close(call: helpers.Read, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Two ways to compute one thing differ by what rounding does to each."""
    scale = max(1.0, b.abs().max().item()) if b.numel() else 0.0
    return helpers.error(a, b) <= 2 * helpers.rounding(b.dtype, call.terms("out"), scale)


@given(call=calls(), data=st.data())
def test_output_and_gradients(kernels, call, data):
    """Any call, any set of inputs that ask for gradients, gates saved or computed again."""
    wanted = data.draw(st.sets(st.sampled_from(sorted(call.tensors))))
    check_read(call, wanted, recompute=data.draw(st.booleans()))


def change_tokens(call: helpers.Read, change) -> helpers.Read:
    """The call with every tensor that has a row for each token as rows [N, width], changed."""
    rows = call.map(lambda t: t)
    for name, t in call.tensors.items():
        if name.startswith("phi") or name in ("h0", "c0"):
            rows.tensors[name] = change(t.reshape(call.tokens, t.shape[-1]))
    return rows


@given(call=calls(dtypes=(torch.float64, torch.float32)), data=st.data())
def test_tokens_are_independent(backend, call, data):
    """Permuting tokens permutes outputs; where a token stands does not matter to it."""
    order = torch.tensor(data.draw(st.permutations(range(call.tokens))), dtype=torch.int64)
    expected = call().reshape(call.tokens, call.rank)
    assert close(call, change_tokens(call, lambda t: t[order])(), expected[order])


@given(call=calls(dtypes=(torch.float64, torch.float32)), data=st.data())
def test_split_and_padded_batches(backend, call, data):
    """A batch in two parts, or padded by tokens of NaN, gives what the whole gives."""
    tokens, whole = call.tokens, call().reshape(call.tokens, call.rank)
    cut = data.draw(st.integers(0, tokens))
    parts = [change_tokens(call, lambda t, p=part: t[p])() for part in (slice(0, cut), slice(cut, tokens))]
    assert close(call, torch.cat(parts), whole)
    out = change_tokens(call, lambda t: torch.cat([t, t.new_full((3, t.shape[1]), math.nan)]))()
    assert close(call, out[:tokens], whole)
    assert out[tokens:].isnan().all()


@given(call=calls(norms=("rms",), min_tokens=1), power=st.integers(-6, 6))
def test_rms_norm_forgets_the_scale(backend, call, power):
    """With eps = 0 a factor on phi changes nothing; a power of two is exact in every dtype."""
    call = call.but(eps=0.0)
    scaled = call.map(lambda t: t)
    for i in range(call.layers):
        scaled.tensors[f"phi{i}"] = call.tensors[f"phi{i}"] * 2.0**power
    assert close(call, scaled(), call())


@given(call=calls(norms=("layer",), dtypes=(torch.float64,)), shift=st.floats(-3, 3))
def test_layer_norm_forgets_the_mean(backend, call, shift):
    shifted = call.map(lambda t: t)
    for i in range(call.layers):
        shifted.tensors[f"phi{i}"] = call.tensors[f"phi{i}"] + shift
    out, expected = shifted(), call()
    # The shift itself is rounded, and a feature of width 1 or 2 may be all cancellation: divided by sqrt(eps).
    slack = 64 * helpers.rounding(out.dtype, call.terms("out"), (1 + abs(shift)) / math.sqrt(call.options["eps"]))
    assert helpers.error(out, expected) <= slack


@given(call=calls(dtypes=(torch.float64, torch.float32), reductions=("mean",)))
def test_mean_is_the_mean_of_every_last(backend, call):
    """The mean over layers is that of the last states after 1, 2, .. L layers."""
    states = []
    for depth in range(1, call.layers + 1):
        shallow = {n: t for n, t in call.tensors.items() if not n.startswith("phi") or int(n[3:]) < depth}
        states.append(helpers.Read(shallow, {**call.options, "reduce": "last"})())
    assert close(call, call(), torch.stack(states).mean(0))


@given(call=calls(dtypes=(torch.float64, torch.float32), cells=("rnn", "gru"), reductions=("last",)), data=st.data())
def test_depth_can_be_cut(backend, call, data):
    """The last state of the first layers is the first state of the others."""
    cut = data.draw(st.integers(0, call.layers - 1))
    rest = {n: t for n, t in call.tensors.items() if not n.startswith("phi")}
    if cut:
        rest["h0"] = helpers.Read({**rest, **{f"phi{i}": call.phi[i] for i in range(cut)}}, call.options)()
    rest |= {f"phi{i}": t for i, t in enumerate(call.phi[cut:])}
    assert close(call, helpers.Read(rest, call.options)(), call())


@given(call=calls(dtypes=(torch.float64, torch.float32), reductions=("last",)))
def test_layers_of_states_by_steps(backend, call):
    """read_step, layer after layer, ends where read_recurrence does, from any first state."""
    rest = {n: t for n, t in call.tensors.items() if not n.startswith("phi") and n not in ("h0", "c0")}
    options = {n: v for n, v in call.options.items() if n != "reduce"}
    state = call.tensors.get("h0")
    if call.options["cell"] == "lstm" and state is not None:
        state = (state, call.tensors["c0"])
    for phi_i in call.phi:
        state = pyeff.ops.read_step(phi_i, state, **rest, **options)
    assert close(call, state[0] if call.options["cell"] == "lstm" else state, call())
