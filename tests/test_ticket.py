"""Tickets against their float64 oracle: outputs and gradients over blocks, dtypes, shapes and strides.

By default a call has NaN in everything that must not count: past the end of the weight in the stored blocks, and in the
columns of x that no block selects (``ticket_calls.make_call``).
"""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff import Ticket
from tests import helpers, places
from tests.helpers import dtypes
from tests.ticket_calls import ACTIVATIONS, check_call, make_call, make_ticket, random_grad

OPERATION = "ticket_linear"
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
BLOCKS = (8, 16, 32, 64, 128, (8, 32), (32, 8), (128, 16), (16, 64), (5, 7), (24, 40), (1, 1), (3, 128), (65, 2))
TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129, 500)


def no_multiple(block) -> tuple[int, int]:
    """A shape of three blocks by four of which the last are cut."""
    bo, bi = (block, block) if isinstance(block, int) else block
    return 2 * bo + (bo + 1) // 2, 3 * bi + (bi + 2) // 3


def shape_id(value):
    return "x".join(map(str, value)) or "scalar" if isinstance(value, tuple) else None


@dtypes
@pytest.mark.parametrize("block", BLOCKS, ids=shape_id)
def test_blocks(kernels, block, dtype):
    """Blocks of every size, square or not, at the end of a weight that is no multiple of them."""
    for activation, lead in zip(ACTIVATIONS, ((17,), (3,), (33,)), strict=True):
        call = make_call(no_multiple(block), block, lead=lead, dtype=dtype, activation=activation)
        check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_blocks_that_divide_the_weight(kernels, block, dtype):
    call = make_call((4 * block, 3 * block), block, lead=(19,), dtype=dtype)
    check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("block", [8, 32, (16, 24), (7, 5)], ids=shape_id)
def test_numbers_of_tokens(kernels, block, dtype):
    """Few tokens may take another path than many, and tiles of tokens end somewhere."""
    ticket = make_ticket((71, 90), block)
    for tokens in TOKENS:
        call = make_call(ticket=ticket, lead=(tokens,), dtype=dtype, activation="gelu")
        check_call(call, call.tensors)


@dtypes
@activations
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_bias_and_activation(backend, bias, activation, dtype):
    for tokens in (3, 40):
        call = make_call(lead=(tokens,), bias=bias, activation=activation, dtype=dtype)
        check_call(call)
        check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("lead", [(), (1,), (4, 3), (2, 1, 3), (2, 2, 1, 5)], ids=shape_id)
def test_leading_shapes(backend, lead, dtype):
    call = make_call(lead=lead, dtype=dtype, activation="relu")
    assert check_call(call, call.tensors)["out"].shape == (*lead, 40)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=shape_id)
@activations
def test_no_tokens(backend, activation, lead):
    """No token: an empty output, and gradients of zero."""
    call = make_call(lead=lead, activation=activation, traps=False)
    found = helpers.gradients(call, call.tensors, torch.zeros(call.out_shape))
    assert found["out"].shape == (*lead, 40)
    for name, t in call.tensors.items():
        assert found[name].shape == t.shape
        assert not found[name].any(), f"the gradient of {name} is not zero without a token"


@dtypes
@pytest.mark.parametrize("density", [0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("block", [8, 32])
def test_densities(kernels, block, density, dtype):
    ticket = make_ticket((136, 200), block, density, holes=density < 1)
    for tokens in (2, 50):
        call = make_call(ticket=ticket, lead=(tokens,), dtype=dtype)
        check_call(call, call.tensors)


@dtypes
@activations
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_no_block_is_alive(backend, bias, activation, dtype):
    """Nothing of x counts, and the output is that of the bias alone."""
    for tokens in (1, 20):
        call = make_call(density=0.0, lead=(tokens,), bias=bias, activation=activation, dtype=dtype)
        assert call.ticket.nnz == 0
        assert call.tensors["x"].isnan().all()
        found = check_call(call, call.tensors)
        expected = pyeff.reference.ticket.activate(call.tensors["bias"] if bias else torch.zeros(40), activation)
        torch.testing.assert_close(found["out"], expected.to(dtype).expand(tokens, 40))
        assert not found["x"].any()
        assert found["values"].shape == (0, 16, 16)


PATTERNS = {
    "one block": [[0, 0, 0], [0, 0, 1], [0, 0, 0]],
    "one row": [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    "one column": [[0, 1, 0], [0, 1, 0], [0, 1, 0]],
    "first row and column empty": [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
    "last row and column empty": [[1, 1, 0], [1, 0, 0], [0, 0, 0]],
    "diagonal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "every other": [[1, 0, 1], [0, 0, 0], [1, 0, 1]],
}


@dtypes
@pytest.mark.parametrize("block", [16, (8, 24)], ids=shape_id)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(kernels, pattern, block, dtype):
    bo, bi = (block, block) if isinstance(block, int) else block
    blocks = torch.tensor(PATTERNS[pattern], dtype=torch.bool)
    ticket = Ticket.from_blocks(blocks, (3 * bo - 3, 3 * bi - 5), block)
    for tokens in (1, 37):
        call = make_call(ticket=ticket, lead=(tokens,), dtype=dtype, activation="relu")
        check_call(call, call.tensors)


def test_rows_of_very_different_lengths(kernels):
    """One full row among empty and short ones: work is shared out by what there is to do."""
    blocks = torch.zeros(24, 40, dtype=torch.bool)
    blocks[5], blocks[11, 7], blocks[:, 3] = True, True, True
    ticket = Ticket.from_blocks(blocks, (24 * 8, 40 * 8), 8)
    for tokens in (1, 9, 130):
        call = make_call(ticket=ticket, lead=(tokens,))
        check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", [k for k in helpers.STRIDES if k != "contiguous"])
@pytest.mark.parametrize("lead", [(6,), (3, 7)], ids=shape_id)
def test_strided_x(backend, lead, kind, dtype):
    call = make_call((40, 57), lead=lead, dtype=dtype, x_strides=kind)
    assert kind == "permuted" or call.tensors["x"].stride() != torch.empty(*lead, 57).stride()
    check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", [k for k in helpers.STRIDES if k != "contiguous"])
def test_strided_values_and_bias(backend, kind, dtype):
    # One row for all, it holds no trap: what is past the end in one block is inside in the next.
    call = make_call((40, 57), dtype=dtype, strides=kind, traps=kind != "expanded")
    check_call(call, call.tensors)


@dtypes
@pytest.mark.parametrize("kind", helpers.STRIDES)
def test_strided_gradient(kernels, kind, dtype):
    """The incoming gradient may have any strides; that of ``out.sum()`` has strides of 0."""
    call = make_call(lead=(3, 4), dtype=dtype, activation="gelu")
    check_call(call, call.tensors, grad_out=helpers.lay_out(random_grad(call), kind))
    check_call(call, call.tensors, grad_out=torch.ones((), dtype=dtype).expand(call.out_shape))


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)], ids=shape_id)
def test_narrow_weights(kernels, shape, dtype):
    """A weight that is smaller than a block, down to one element."""
    for tokens in (1, 21):
        call = make_call(shape, 16, 1.0, lead=(tokens,), dtype=dtype, holes=False)
        check_call(call, call.tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@dtypes
def test_what_a_row_does_not_select(backend, dtype, bad):
    """A column that is not finite shows in the rows that select it, and in no other, nor in their gradients."""
    ticket = make_ticket((48, 64), 16, 0.5, seed=3, holes=False)
    for tokens in (2, 30):
        call = make_call(ticket=ticket, lead=(tokens,), dtype=dtype)
        clean = helpers.gradients(call, call.tensors, torch.ones(call.out_shape))
        for column in range(4):
            rows = ticket.blocks()[:, column]
            assert not rows.all()
            x = call.tensors["x"].clone()
            x[:, column * 16 + 5] = bad
            spoilt = helpers.gradients(call.but(x=x), call.tensors, torch.ones(call.out_shape))
            hit = rows.repeat_interleave(16)
            assert torch.equal(spoilt["out"][:, ~hit], clean["out"][:, ~hit])
            assert not spoilt["out"][:, hit].isfinite().any()
            others = ticket.column != column
            assert torch.equal(spoilt["values"][others], clean["values"][others])
            assert torch.equal(spoilt["x"], clean["x"])


@dtypes
def test_where_a_gradient_that_is_not_finite_goes(kernels, dtype):
    """From an output into the columns that its row selects, and into its row's values; into nothing else."""
    ticket = make_ticket((45, 61), 16, 0.5, seed=3, holes=False)
    for tokens in (2, 30):
        call = make_call(ticket=ticket, lead=(tokens,), dtype=dtype)
        clean = helpers.gradients(call, call.tensors, random_grad(call))
        for row in range(3):
            grad_out = random_grad(call)
            grad_out[1, row * 16 + 3] = math.nan
            spoilt = helpers.gradients(call, call.tensors, grad_out)
            selected = ticket.blocks()[row].repeat_interleave(16)[:61]
            hit = torch.zeros(tokens, 61, dtype=torch.bool)
            hit[1] = selected
            assert torch.equal(spoilt["x"][~hit], clean["x"][~hit])
            assert spoilt["x"][hit].isnan().all()
            start, end = ticket.row_start[row : row + 2].tolist()
            others = torch.arange(ticket.nnz)
            others = (others < start) | (others >= end)
            assert torch.equal(spoilt["values"][others], clean["values"][others])
            assert spoilt["bias"].isnan().nonzero().flatten().tolist() == [row * 16 + 3]


@dtypes
@activations
def test_nan_stays_in_its_token(backend, activation, dtype):
    """It spoils its own output, through relu too, and that of no other token."""
    call = make_call((48, 64), 16, 1.0, lead=(70,), dtype=dtype, activation=activation, holes=False)
    clean = helpers.gradients(call, ["x"], torch.ones(call.out_shape))
    call.tensors["x"][33, 5] = math.nan
    spoilt, others = helpers.gradients(call, ["x"], torch.ones(call.out_shape)), torch.arange(70) != 33
    for name in spoilt:
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    assert spoilt["out"][33].isnan().all()


@dtypes
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_far_from_zero(backend, activation, dtype):
    """What the activation is taken of, over all its range: nothing overflows, and the tails are flat."""
    call = make_call((40, 56), lead=(9,), activation=activation, dtype=dtype)
    call.tensors["bias"] = torch.linspace(-60, 60, 40, dtype=torch.float64).to(call.tensors["bias"])
    found = check_call(call, call.tensors)
    # The first bias is -60, and nothing else is of that size.
    assert not found["out"][:, 0].any()
    assert not found["values"][0, 0].any()


def test_gelu_is_the_exact_one(backend64):
    """By the error function: the approximation by tanh is off by up to 5e-4."""
    call = make_call(density=0.0, lead=(1,), activation="gelu")
    call.tensors["bias"] = torch.linspace(-4, 4, 40, dtype=torch.float64)
    z = call.tensors["bias"]
    torch.testing.assert_close(call()[0], z * torch.special.ndtr(z), rtol=1e-13, atol=1e-13)


@dtypes
@activations
@pytest.mark.parametrize("tokens", [3, 301])
def test_repeats_are_bitwise_equal(backend, tokens, activation, dtype):
    call = make_call((100, 136), 8, lead=(tokens,), dtype=dtype, activation=activation)
    grad_out = random_grad(call)
    first = helpers.gradients(call, call.tensors, grad_out)
    for _ in range(2):
        for name, t in helpers.gradients(call, call.tensors, grad_out).items():
            assert torch.equal(t, first[name]), name


@dtypes
@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("tokens", [1, 5, 613])
def test_thread_count_changes_no_bit(cpu_kernels, tokens, block, dtype):
    """Rows and tokens are shared out to threads, sums are not: no result depends on how many threads there are."""
    call = make_call((200, 136), block, lead=(tokens,), dtype=dtype, activation="gelu")
    grad_out, threads, found = random_grad(call), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(helpers.gradients(call, call.tensors, grad_out))
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


def test_auto_takes_the_kernels(cpu_kernels):
    call = make_call(dtype=torch.float32, activation="gelu")
    expected = call()
    with pyeff.backend("auto"):
        assert torch.equal(call(), expected)


def test_strided_index(backend):
    """The op itself takes an index that lies scattered in memory, as a slice of a larger buffer may."""
    call = make_call()
    x, values, index, out, bias = call.raw()
    scattered = torch.stack([index, torch.full_like(index, -1)], 1)[:, 0]
    assert not scattered.is_contiguous()
    assert torch.equal(torch.ops.pyeff.ticket_linear(x, values, scattered, out, bias, backend=backend), call())


def test_float16_is_served_by_the_reference():
    call = make_call(dtype=torch.float16)
    with pyeff.backend("auto"):
        assert torch.equal(call(), call(pyeff.reference.ticket_linear))


@dtypes
def test_definition_is_the_dense_layer(backend, dtype):
    """The oracle itself: the dense linear layer on the scattered weight."""
    call = make_call((40, 57), lead=(4,), dtype=dtype, activation="relu", traps=False).to(torch.float64)
    weight = call.ticket.scatter(call.tensors["values"])
    z = torch.nn.functional.linear(call.tensors["x"], weight, call.tensors["bias"])
    torch.testing.assert_close(call(pyeff.reference.ticket_linear), z.relu(), rtol=1e-12, atol=1e-12)


def test_more_rows_than_a_tile_of_everything(kernels):
    """Many blocks in a row and a column, many tokens: several tiles, and runs of neighbouring blocks, in each sum."""
    dtype = places.here().dtypes[0]
    call = make_call((520, 777), 32, 0.6, lead=(200,), dtype=dtype, activation="gelu")
    check_call(call, call.tensors)
