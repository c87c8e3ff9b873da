"""The derivatives of tickets against finite differences, what is kept for them, and torch's own checks of operators."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyeff
from tests import helpers
from tests.helpers import dtypes
from tests.ticket_calls import ACTIVATIONS, TENSORS, TicketCall, check_call, make_call, padding

OPERATION = "ticket_linear"
SUBSETS = [names for count in (1, 2, 3) for names in combinations(TENSORS, count)]
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
subsets = pytest.mark.parametrize("names", SUBSETS, ids="-".join)


def small(activation=None, block=(3, 4), **more) -> TicketCall:
    """A weight of 8 x 9 with an empty row, an empty column and cut blocks; finite, for finite differences."""
    return make_call((8, 9), block, 0.7, lead=(4,), activation=activation, traps=False, **more)


def check_gradient(call: TicketCall, names) -> None:
    """torch.autograd.gradcheck of the named inputs; the others are fixed."""

    def function(*changed):
        out = call.but(**dict(zip(names, changed, strict=True)))()
        assert out.requires_grad
        return out

    assert torch.autograd.gradcheck(function, [call.tensors[n].detach().clone().requires_grad_() for n in names])


@activations
@pytest.mark.parametrize("block", [(3, 4), (1, 1), (8, 8)], ids=str)
def test_gradcheck(kernels64, block, activation):
    check_gradient(small(activation, block), TENSORS)


@activations
@subsets
def test_gradcheck_of_every_subset(native_kernels, names, activation):
    """The work for gradients that nobody asked for is skipped; what is left must not need it."""
    check_gradient(small(activation), names)


@dtypes
@activations
@subsets
def test_every_subset(native_kernels, names, activation, dtype):
    for tokens in (2, 41):
        check_call(make_call((41, 30), 8, lead=(tokens,), activation=activation, dtype=dtype), names)


@activations
def test_gradcheck_without_bias(native_kernels, activation):
    check_gradient(small(activation, bias=False), ["x", "values"])


def test_gradcheck_without_blocks(native_kernels):
    call = make_call((8, 9), (3, 4), 0.0, lead=(4,), activation="gelu", traps=False)
    check_gradient(call, TENSORS)


class Work(TorchDispatchMode):
    """What the kernels are asked for: the sizes of z, and of the gradients."""

    def __init__(self):
        super().__init__()
        self.kept, self.gradients = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        if function is torch.ops.pyeff.ticket_forward.default:
            self.kept.append(found[1].numel())
        if function is torch.ops.pyeff.ticket_backward.default:
            self.gradients.append([t.numel() > 0 for t in found])
        return found


@subsets
def test_only_wanted_gradients_are_formed(native_kernels, names):
    call = make_call()
    with Work() as work:
        helpers.gradients(call, names, torch.ones(call.out_shape))
    assert work.gradients == [[name in names for name in TENSORS]]


@activations
def test_what_is_kept(native_kernels, activation):
    """Without a gradient nothing; with one what gelu was taken of, and nothing else beside the output."""
    call = make_call(activation=activation)
    with Work() as work:
        call()
        with torch.no_grad():
            call.require_grad(["x"])()
        call.require_grad(["bias"])()
    assert work.kept == [0, 0, 5 * 40 if activation == "gelu" else 0]


def saved_bytes(call: TicketCall) -> int:
    """Bytes that the graph holds beyond its inputs and its output."""
    call = call.require_grad(call.tensors)
    return helpers.bytes_of(helpers.kept_for_backward(call, (*call.tensors.values(), call.ticket.index)))


@dtypes
@activations
@pytest.mark.parametrize("lead", [(64,), (8, 8)], ids=str)
def test_saved_for_backward(native_kernels, lead, activation, dtype):
    """Inputs and output by reference, and for gelu one number more for each output."""
    call = make_call((96, 112), 16, lead=lead, activation=activation, dtype=dtype)
    assert saved_bytes(call) == (64 * 96 * dtype.itemsize if activation == "gelu" else 0)


def test_no_input_asks_for_a_gradient(native):
    call = make_call(activation="gelu")
    out = call()
    assert not out.requires_grad
    assert out.grad_fn is None
    with torch.no_grad():
        assert not call.require_grad(call.tensors)().requires_grad
    with torch.inference_mode():
        assert torch.equal(call(), out)


@pytest.mark.parametrize("wanted", TENSORS)
@activations
def test_double_backward_raises(native_kernels, activation, wanted):
    """The formula has no second derivative: an error, never a silent constant."""
    call = make_call(activation=activation).require_grad([wanted])
    leaf = call.tensors[wanted]
    (grad,) = torch.autograd.grad(call().square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="ticket_linear: double backward is not supported"):
        torch.autograd.grad(grad.square().sum(), leaf)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_second_derivatives_by_the_reference(activation):
    with pyeff.backend("reference"):
        call = small(activation)
        leaves = [t.detach().clone().requires_grad_() for t in call.tensors.values()]
        assert torch.autograd.gradgradcheck(lambda *t: call.but(**dict(zip(TENSORS, t, strict=True)))(), leaves)


def test_create_graph_alone_is_allowed(native_kernels):
    """A penalty on other gradients may keep the graph: only a derivative through the op's own backward raises."""
    call = make_call(activation="relu").require_grad(["values"])
    leaf = call.tensors["values"]
    (kept,) = torch.autograd.grad(call().sum(), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(call().sum(), leaf)
    assert torch.equal(kept.detach(), plain)


@activations
def test_backward_twice_through_one_graph(native, activation):
    call = make_call(activation=activation).require_grad(TENSORS)
    out, leaves = call(), list(call.tensors.values())
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["x", "values"])
def test_changing_an_input_in_place_is_noticed(native_kernels, name):
    call = make_call().require_grad(TENSORS)
    out = call()
    with torch.no_grad():
        call.tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_changing_the_output_in_place(native_kernels, activation):
    """Adding to the output in place, as a residual connection may, leaves the gradients right."""
    call = make_call(activation=activation).require_grad(TENSORS)
    leaves = list(call.tensors.values())
    expected = torch.autograd.grad((call() + 3).sum(), leaves)
    out = call()
    out.add_(3)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_changing_the_output_of_relu_in_place_is_noticed(native_kernels):
    """As with torch's own: the output says where the gradient goes."""
    out = make_call(activation="relu").require_grad(TENSORS)()
    out.add_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@activations
def test_inputs_are_not_changed(native, activation):
    call = make_call(lead=(3, 4), activation=activation, x_strides="sliced")
    before, index = call.map(lambda t: t.clone()), call.ticket.index.clone()
    found = helpers.gradients(call, call.tensors, torch.randn(call.out_shape))
    assert torch.equal(call.ticket.index, index)
    for name, t in call.tensors.items():
        assert torch.equal(t.nan_to_num(), before.tensors[name].nan_to_num()), name
        # Memory of its own: a result that shares an input's would change with it.
        assert found[name].untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_one_ticket_for_several_layers(native_kernels):
    """The same values in two calls get the sum of their gradients."""
    call = make_call((48, 48), 16, lead=(6,), traps=False).require_grad(["values"])
    values = call.tensors["values"]

    def twice(function):
        return torch.autograd.grad(call.but(x=call(function))(function).square().sum(), values)[0]

    torch.testing.assert_close(twice(None), twice(pyeff.reference.ticket_linear))


def test_optimizer_steps_leave_the_padding_at_zero(native):
    """AdamW with its decay, on values whose padding is zero: what never counts never moves."""
    call = make_call((41, 30), 8, traps=False)
    call.tensors["values"].masked_fill_(padding(call.ticket), 0)
    call = call.require_grad(["values", "bias"])
    optimizer = torch.optim.AdamW(call.tensors.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        call().square().sum().backward()
        optimizer.step()
    assert not call.tensors["values"][padding(call.ticket)].any()


def public_arguments(call: TicketCall):
    return call.raw(), {"activation": call.activation}


@pytest.mark.parametrize("trains", [False, True])
@activations
def test_opcheck(native_kernels, activation, trains):
    for bias in (True, False):
        call = make_call(lead=(2, 3), activation=activation, bias=bias, traps=False)
        arguments, keywords = public_arguments(call.require_grad(call.tensors if trains else ()))
        torch.library.opcheck(torch.ops.pyeff.ticket_linear, arguments, {**keywords, "backend": native_kernels})


def test_opcheck_by_the_reference():
    arguments, keywords = public_arguments(make_call(lead=(2, 3), activation="relu", traps=False).require_grad(TENSORS))
    torch.library.opcheck(torch.ops.pyeff.ticket_linear, arguments, {**keywords, "backend": "reference"})


@pytest.mark.parametrize("trains", [False, True])
@activations
def test_opcheck_forward(native_kernels, activation, trains):
    for strides in ("contiguous", "transposed", "sliced"):
        call = make_call(lead=(2, 3), activation=activation, traps=False, x_strides=strides)
        arguments, _ = public_arguments(call.require_grad(["x", "values", "bias"] if trains else ()))
        keep = trains and activation == "gelu"
        torch.library.opcheck(torch.ops.pyeff.ticket_forward, (*arguments, activation or "none", keep, native_kernels))


@activations
def test_opcheck_backward(native_kernels, activation):
    call = make_call(lead=(2, 3), activation=activation, traps=False)
    (x, values, index, out, bias), _ = public_arguments(call)
    name = activation or "none"
    y, z = torch.ops.pyeff.ticket_forward(x, values, index, out, bias, name, activation == "gelu", native_kernels)
    saved = {"relu": y, "gelu": z}.get(name, values.new_empty(0))
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(
            torch.ops.pyeff.ticket_backward,
            (torch.randn_like(y), x, values, index, saved, True, name, needs, native_kernels),
        )


def test_the_forward_must_keep_what_its_backward_needs(native_kernels):
    arguments, _ = public_arguments(make_call().require_grad(["x"]))
    with pytest.raises(RuntimeError, match="ticket_forward: keep is False, expected True"):
        torch.ops.pyeff.ticket_forward(*arguments, "gelu", False, native_kernels)


def test_shapes_past_2_to_the_31_elements():
    """Without memory: x, values and output beyond what 32 bits can count, and their gradients."""
    tokens, (out, width), block = 3_000_000, (3072, 768), 32
    with FakeTensorMode():
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device="cpu")
        index = torch.empty(2 * 96 + 2 * 24 + 2 + 3 * 700, dtype=torch.int32, device="cpu")
        values = torch.empty(700, block, block, dtype=torch.bfloat16, device="cpu")
        y, z = torch.ops.pyeff.ticket_forward(x, values, index, out, None, "gelu", True, "cpu")
        assert y.shape == z.shape == (tokens, out)
        assert min(x.numel(), y.numel()) > 2**31
        dx, dvalues, dbias = torch.ops.pyeff.ticket_backward(
            y, x, values, index, z, False, "gelu", [True, True, False], "cpu"
        )
    assert (dx.shape, dvalues.shape, dbias.shape) == (x.shape, values.shape, (0,))
    with FakeTensorMode():
        many = torch.empty(2**20, 64, 64, dtype=torch.bfloat16, device="cpu")
        assert torch.ops.pyeff.ticket_backward(
            torch.empty(1, 65536, dtype=torch.bfloat16, device="cpu"),
            torch.empty(1, 65536, dtype=torch.bfloat16, device="cpu"),
            many, torch.empty(4 * 1024 + 2 + 3 * 2**20, dtype=torch.int32, device="cpu"),
            torch.empty(0, dtype=torch.bfloat16, device="cpu"), False, "none", [False, True, False], "cpu",
        )[1].numel() > 2**31  # fmt: skip


def test_rows_far_apart(cpu_kernels):
    """A row stride of 2^30 elements: in 32 bits the offset of the third token would be negative."""
    call = make_call((40, 56), 16, lead=(3,), dtype=torch.bfloat16)
    stride = 2**30
    storage = torch.UntypedStorage(2 * (2 * stride + 56))
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, 56), (stride, 1))
    far.copy_(call.tensors["x"])
    assert far.stride() == (stride, 1)
    check_call(call.but(x=far), call.tensors)


def test_gradients_accumulate_into_parameters(native):
    """Two backward passes without zeroing in between add up, also where the ticket has no block."""
    for density in (0.0, 0.5):
        call = make_call(density=density, traps=False).require_grad(TENSORS)
        for _ in range(2):
            call().sum().backward()
        once = torch.autograd.grad(call().sum(), list(call.tensors.values()))
        for t, grad in zip(call.tensors.values(), once, strict=True):
            torch.testing.assert_close(t.grad, 2 * grad)
