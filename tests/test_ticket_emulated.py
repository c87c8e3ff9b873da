"""Tickets at the smallest shapes that reach every path of a GPU's kernel, few enough for Triton's interpreter.

The same tests run at every other place, too. As everywhere, what must not count is NaN (``ticket_calls.make_call``).
"""

from __future__ import annotations

import math

import pytest
import torch

from pyeff import Ticket
from tests import helpers, places
from tests.conftest import place_fixture
from tests.helpers import gpu_dtypes
from tests.ticket_calls import ACTIVATIONS, check_call, make_call, make_ticket, random_grad

OPERATION = "ticket_linear"
pytestmark = pytest.mark.emulated
triton_emulated = place_fixture([place for place in places.KERNELS if place == ("triton", "cpu")])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@gpu_dtypes
@pytest.mark.parametrize(("block", "activation"), [(8, None), (16, "relu"), (32, "gelu")])
@pytest.mark.parametrize("tokens", [3, 33])
def test_output_and_gradients(kernels, tokens, block, activation, dtype):
    call = make_call((2 * block + 3, 3 * block - 1), block, lead=(tokens,), activation=activation, dtype=dtype)
    check_call(call, call.tensors)


@gpu_dtypes
@pytest.mark.parametrize("block", [64, 128])
def test_large_blocks(kernels, block, dtype):
    call = make_call((block + 9, 2 * block), block, 1.0, lead=(17,), dtype=dtype, activation="relu", holes=False)
    check_call(call, call.tensors)


@pytest.mark.parametrize("block", [(8, 32), (32, 8), (16, 64), (64, 16), (24, 40), (5, 7), (1, 1), (3, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16])
def test_blocks_of_other_shapes(kernels, block, dtype):
    """Rectangular ones, and ones that no tile divides: the last of each row and column are cut."""
    bo, bi = block
    call = make_call((2 * bo + (bo + 1) // 2, 2 * bi + (bi + 1) // 2), block, lead=(18,), dtype=dtype)
    check_call(call, call.tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_bias_and_activation(kernels, bias, activation):
    for tokens in (2, 17):
        call = make_call((24, 40), 8, lead=(tokens,), bias=bias, activation=activation, dtype=torch.float32)
        check_call(call)
        check_call(call, call.tensors)


@pytest.mark.parametrize("names", [["x"], ["values"], ["bias"], ["x", "bias"]], ids="-".join)
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_some_gradients(kernels, names, activation):
    check_call(make_call((24, 40), 8, lead=(18,), activation=activation, dtype=torch.float32), names)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_no_block_is_alive(kernels, activation, tokens):
    call = make_call((24, 40), 8, 0.0, lead=(tokens,), activation=activation, dtype=torch.float32)
    found = check_call(call, call.tensors)
    assert not found["x"].any()


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_no_tokens(kernels, lead):
    call = make_call((24, 40), 8, lead=lead, activation="gelu", traps=False)
    found = helpers.gradients(call, call.tensors, torch.zeros(call.out_shape))
    assert found["out"].shape == (*lead, 24)
    assert not any(found[name].any() for name in call.tensors)


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 9)], ids=str)
def test_leading_shapes(kernels, lead):
    call = make_call((24, 40), 8, lead=lead, dtype=torch.float32)
    check_call(call, call.tensors)


@pytest.mark.parametrize("kind", ["sliced", "transposed", "permuted", "expanded"])
def test_strides(kernels, kind):
    """Rows of x at any distance from each other, read where they are; of a gradient, too."""
    call = make_call((24, 41), 8, lead=(3, 6), x_strides=kind, dtype=torch.float32)
    check_call(call, call.tensors, grad_out=helpers.lay_out(random_grad(call), kind))


@halves
def test_more_than_a_tile_of_everything(kernels, dtype):
    """Tiles are of up to 128 tokens; several blocks in a row and several rows of blocks in a tile."""
    call = make_call((150, 180), 16, 0.6, lead=(133,), activation="gelu", dtype=dtype)
    check_call(call, call.tensors)


@halves
def test_long_rows(kernels, dtype):
    """More steps along a row of blocks than a pipeline has stages, and runs of neighbours between single ones."""
    blocks = torch.zeros(3, 24, dtype=torch.bool)
    blocks[0], blocks[2, ::3], blocks[2, 9:14] = True, True, True
    call = make_call(ticket=Ticket.from_blocks(blocks, (48, 24 * 16 - 3), 16), lead=(19,), dtype=dtype)
    check_call(call, call.tensors)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_few_tokens(kernels, tokens, dtype):
    call = make_call((40, 72), 16, lead=(tokens,), activation="gelu", dtype=dtype)
    check_call(call, call.tensors)


def test_narrow_weights(kernels):
    for shape in ((1, 1), (2, 50), (50, 3)):
        call = make_call(shape, 16, 1.0, lead=(18,), dtype=torch.float32, holes=False)
        check_call(call, call.tensors)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_row_does_not_select(kernels, bad, tokens):
    """A column that is not finite shows in the rows that select it, and in no other."""
    ticket = make_ticket((32, 48), 16, 0.5, seed=3, holes=False)
    call = make_call(ticket=ticket, lead=(tokens,), dtype=torch.float32)
    clean = call()
    for column in range(3):
        x = call.tensors["x"].clone()
        x[:, column * 16 + 5] = bad
        spoilt, hit = call.but(x=x)(), ticket.blocks()[:, column].repeat_interleave(16)
        assert torch.equal(spoilt[:, ~hit], clean[:, ~hit])
        assert not spoilt[:, hit].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("tokens", [4, 40])
def test_nan_stays_in_its_token(kernels, tokens, activation):
    """It goes through relu, and into no other token."""
    call = make_call((32, 32), 16, 1.0, lead=(tokens,), dtype=torch.float32, activation=activation, holes=False)
    clean = helpers.gradients(call, ["x"], torch.ones(call.out_shape))
    call.tensors["x"][2, 5] = math.nan
    spoilt, others = helpers.gradients(call, ["x"], torch.ones(call.out_shape)), torch.arange(tokens) != 2
    assert all(torch.equal(spoilt[name][others], clean[name][others]) for name in clean)
    assert spoilt["out"][2].isnan().all()


@pytest.mark.parametrize("tokens", [5, 70])
def test_repeats_are_bitwise_equal(kernels, tokens):
    call = make_call((40, 56), 8, lead=(tokens,), activation="gelu", dtype=torch.float32)
    grad_out = random_grad(call)
    first, again = (helpers.gradients(call, call.tensors, grad_out) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@halves
def test_sums_are_in_float32(kernels, dtype):
    """Many terms of one size: a sum in 16 bits would stand still."""
    call = make_call((16, 512), 16, 1.0, lead=(17,), dtype=dtype, holes=False, bias=False)
    call.tensors["x"].fill_(1), call.tensors["values"].fill_(1 / 64)
    assert (call() == 8).all()
    many = make_call((16, 16), 16, 1.0, lead=(600,), dtype=dtype, holes=False)
    many.tensors["x"].fill_(1)
    found = helpers.gradients(many, many.tensors, torch.full(many.out_shape, 1 / 64, dtype=dtype))
    assert (found["values"] == 600 / 64).all()
    assert (found["bias"] == 600 / 64).all()


@pytest.mark.parametrize("training", [False, True])
def test_launches_do_not_depend_on_the_ticket(triton_emulated, training, monkeypatch):
    """As many kernels for one block as for many; on a device, test_ticket_cuda counts them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched, launch = [], interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn) or launch(self, *a, **k)
    )
    counts = []
    for blocks in ([[1, 0, 0]], [[1, 1, 1], [0, 1, 0]]):
        ticket = Ticket.from_blocks(torch.tensor(blocks) > 0, (16 * len(blocks), 48), 16)
        call, before = make_call(ticket=ticket, lead=(20,), dtype=torch.float32), len(launched)
        helpers.gradients(call, call.tensors if training else ["bias"], torch.ones(call.out_shape))
        counts.append(len(launched) - before)
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("where", ["grad", "x"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_padding_has_no_gradient_whatever_a_token_holds(kernels, tokens, where):
    """What a block holds past the end of the weight is multiplied with nothing, not with zero."""
    call = make_call((24, 24), 16, 1.0, lead=(tokens,), holes=False)
    grad = random_grad(call)
    (grad if where == "grad" else call.tensors["x"])[3, 20] = math.nan
    leaves = call.require_grad(["values"])
    (dvalues,) = torch.autograd.grad(leaves(), leaves.tensors["values"], grad)
    outside = call.ticket.gather(torch.ones(24, 24, dtype=dvalues.dtype)) == 0
    assert outside.any()
    assert (dvalues[outside] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16])
def test_gelu_of_what_the_dtype_cannot_hold(kernels, dtype):
    """A neuron far below zero is dead: its gradients are zero, though what it is taken of is stored as infinite."""
    call = make_call((16, 32), 16, 1.0, lead=(20,), dtype=dtype, activation="gelu", holes=False)
    call.tensors["x"].fill_(60)
    call.tensors["values"].fill_(-60)
    leaves = call.require_grad(["x", "values", "bias"])
    out = leaves()
    grads = torch.autograd.grad(out, list(leaves.tensors.values()), torch.ones_like(out))
    assert all((t == 0).all() for t in (out, *grads))
