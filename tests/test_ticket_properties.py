"""Tickets over random shapes, blocks, strides and options, and what must hold for all of them."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given

import pyeff
from pyeff import Ticket
from tests import helpers, places
from tests.helpers import DTYPES
from tests.ticket_calls import ACTIVATIONS, TicketCall, check_call, make_call, make_ticket, sizes

OPERATION = "ticket_linear"
WIDE = (torch.float64, torch.float32)


@st.composite
def tickets(draw):
    """A ticket of up to 10 by 10 blocks, its shape often no multiple of the block."""
    side = st.integers(1, 12) | st.sampled_from([16, 32])
    block = (draw(side), draw(side))
    shape = tuple(draw(st.integers(1, 10)) * b - draw(st.integers(0, b - 1)) for b in block)
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    return make_ticket(shape, block, density, seed=draw(st.integers(0, 2**20)), holes=draw(st.booleans()))


@st.composite
def calls(draw, dtypes=DTYPES, activations=ACTIVATIONS, **more):
    here = places.here().dtypes
    lead = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    if draw(st.booleans()):
        lead = (draw(st.integers(1, 80) | st.sampled_from([127, 128, 129, 257])),)
    return make_call(
        ticket=draw(tickets()), lead=lead, dtype=draw(st.sampled_from([d for d in dtypes if d in here] or here[:1])),
        bias=draw(st.booleans()), activation=draw(st.sampled_from(activations)), seed=draw(st.integers(0, 2**20)),
        x_strides=draw(st.sampled_from(helpers.STRIDES)),
        strides=draw(st.sampled_from([k for k in helpers.STRIDES if k != "expanded"])), **more,
    )  # fmt: skip


def close(call: TicketCall, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Two ways to compute one thing differ by what rounding does to each."""
    scale = sizes(call, None)[0]["out"]
    return helpers.error(a, b) <= 2 * helpers.rounding(b.dtype, call.terms("out"), scale)


@given(call=calls(), data=st.data())
def test_output_and_gradients(native_kernels, call, data):
    """Any call, any set of inputs that ask for gradients."""
    check_call(call, sorted(data.draw(st.sets(st.sampled_from(sorted(call.tensors))))))


@given(call=calls(dtypes=WIDE), data=st.data())
def test_split_and_padded_batches(native, call, data):
    """A batch in two parts, or with tokens of NaN behind it, gives what the whole gives."""
    tokens, x = call.tokens, call.tensors["x"].reshape(-1, call.ticket.shape[1])
    whole = call().reshape(-1, call.ticket.shape[0])
    cut = data.draw(st.integers(0, tokens))
    parts = [call.but(x=part)() for part in (x[:cut], x[cut:])]
    assert close(call, torch.cat(parts), whole)
    assert close(call, call.but(x=torch.cat([x, torch.full_like(x[:3], math.nan)]))()[:tokens], whole)


@given(call=calls(dtypes=WIDE, activations=(None,), traps=False), data=st.data())
def test_permuted_blocks(native, call, data):
    """Rows of the weight in another order are the outputs in another order; columns go with those of x."""
    ticket, (out, width) = call.ticket, call.ticket.shape
    rows = torch.tensor(data.draw(st.permutations(range(out))))
    columns = torch.tensor(data.draw(st.permutations(range(width))))
    dense = ticket.scatter(call.tensors["values"])[rows][:, columns]
    other = Ticket.from_mask(ticket.mask()[rows][:, columns], ticket.block)
    bias = call.tensors["bias"][rows] if "bias" in call.tensors else None
    found = TicketCall({}, other).but(x=call.tensors["x"][..., columns], values=other.gather(dense), bias=bias)()
    assert close(call, found, call()[..., rows])


@given(call=calls(dtypes=WIDE, activations=(None,), traps=False), factor=st.sampled_from([0.5, -2.0, 4.0]))
def test_linear_in_x_and_in_the_values(native, call, factor):
    """A factor of a power of two on either changes the output by it exactly, without a bias."""
    call = call.but(bias=None)
    expected = call() * factor
    for name in ("x", "values"):
        assert torch.equal(call.but(**{name: call.tensors[name] * factor})(), expected)


@given(call=calls(dtypes=WIDE, traps=False))
def test_the_dense_layer(native, call):
    weight = call.ticket.scatter(call.tensors["values"])
    z = torch.nn.functional.linear(call.tensors["x"], weight, call.tensors.get("bias"))
    assert close(call, call(), pyeff.reference.ticket.activate(z, call.activation))


@given(call=calls(dtypes=WIDE, traps=False))
def test_blocks_may_be_cut_smaller(native, call):
    """The same weight in blocks of one row each."""
    finer = Ticket.from_mask(call.ticket.mask(), (1, call.ticket.block[1]))
    dense = call.ticket.scatter(call.tensors["values"])
    found = TicketCall({**call.tensors, "values": finer.gather(dense)}, finer, call.activation)()
    assert close(call, found, call())


@given(ticket=tickets(), data=st.data())
def test_ways_to_make_a_ticket(ticket, data):
    """Its mask, its index and its BSR make it again; its columns are the rows of the transposed one."""
    (out, width), (bo, bi) = ticket.shape, ticket.block
    assert Ticket.from_mask(ticket.mask(), ticket.block) == ticket
    assert Ticket(ticket.index, ticket.shape, ticket.block) == ticket
    assert math.isclose(ticket.density, ticket.mask().double().mean(), abs_tol=1e-12)
    other = Ticket.from_blocks(ticket.blocks().T, (width, out), (bi, bo))
    assert torch.equal(other.row_start, ticket.column_start)
    assert torch.equal(other.column, ticket.row)
    assert torch.equal(other.row_order, ticket.column_order)
    assert torch.equal(ticket.slot[other.slot.long()].long(), torch.arange(ticket.nnz))
    values = torch.randn(ticket.nnz, bo, bi)
    whole = ticket.scatter(values)
    assert torch.equal(ticket.scatter(ticket.gather(whole)), whole)
    if not (out % bo or width % bi):
        assert Ticket.from_sparse_bsr(ticket.to_sparse_bsr(values)) == ticket
        assert torch.equal(ticket.to_sparse_bsr(values).to_dense(), whole)
    survivors = torch.rand(out, width) < data.draw(st.sampled_from([0.0, 0.02, 0.3]))
    assert (Ticket.from_mask(survivors, ticket.block).mask() >= survivors).all()
