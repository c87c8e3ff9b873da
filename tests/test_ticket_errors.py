"""Bad calls of ticket_linear: an error that names the argument, what came and what was expected; never a crash."""

from __future__ import annotations

import pytest
import torch

import pyeff
from pyeff.plans.ticket import PARTS
from tests import places
from tests.conftest import place_fixture
from tests.helpers import says
from tests.ticket_calls import TicketCall, make_call, make_ticket

OPERATION = "ticket_linear"
# The dtypes that a call is made in, each with one that it must not be mixed with.
OTHER = {torch.float64: torch.float32, torch.float32: torch.float64}
# On a GPU an index is not looked at before it is used: that would be waited for.
on_cpu = place_fixture([place for place in places.PLACES if place.device == "cpu" and not place.emulated])


def other(t):
    return t.to(OTHER[t.dtype])


def put(name, change):
    """A mutation that changes one tensor of the call."""

    def mutate(call: TicketCall) -> TicketCall:
        tensors = dict(call.tensors)
        tensors[name] = change(tensors[name])
        return TicketCall(tensors, call.ticket, call.activation)

    return mutate


def with_ticket(ticket):
    return lambda call: TicketCall(call.tensors, ticket() if callable(ticket) else ticket, call.activation)


def activated(name):
    return lambda call: TicketCall(call.tensors, call.ticket, name)


# The valid call: x [5, 56], a weight of 40 x 56 in blocks of 16. Case: what is changed, then what the message must say
# in this order: the argument, what came, what was expected.
CASES = {
    "activation unknown": (activated("silu"), "activation", "'silu'", "expected", "'relu' or 'gelu'"),
    "activation of another case": (activated("GELU"), "activation", "'GELU'", "expected"),
    "activation empty": (activated(""), "activation", "''", "expected"),
    "no ticket": (with_ticket(None), "ticket", "NoneType", "expected a pyeff.Ticket"),
    "a mask for a ticket": (with_ticket(torch.ones(40, 56, dtype=torch.bool)), "ticket", "Tensor", "expected"),
    "the ticket of another layer": (
        with_ticket(lambda: make_ticket((56, 40), 16)), "x has shape [5, 56]", "expected [*, 40]", "shape=(56, 40)",
    ),
    "a ticket with other blocks": (
        with_ticket(lambda: make_ticket((40, 56), 8)), "values has shape", "expected", "8, 8]", "block=(8, 8)",
    ),
    "a ticket elsewhere": (
        with_ticket(lambda: make_ticket((40, 56), 16).to("meta")), "index is on meta", "expected", "{device}",
    ),
    "x narrower": (put("x", lambda t: t[:, :40]), "x has shape [5, 40]", "expected [*, 56]"),
    "x wider": (put("x", lambda t: t.repeat(1, 2)), "x has shape [5, 112]", "expected [*, 56]"),
    "x as wide as all blocks": (put("x", lambda t: t.repeat(1, 2)[:, :64]), "x has shape [5, 64]", "expected [*, 56]"),
    "x transposed": (put("x", lambda t: t.T), "x has shape [56, 5]", "expected [*, 56]"),
    "x a number": (put("x", lambda t: t[0, 0]), "x has shape []", "expected [*, 56]"),
    "x of no width": (put("x", lambda t: t[:, :0]), "x has shape [5, 0]", "expected [*, 56]"),
    "x of another dtype": (put("x", other), "x is {other}", "expected {dtype} as values"),
    "x of integers": (put("x", lambda t: t.nan_to_num().long()), "x is torch.int64", "expected {dtype}"),
    "x on another device": (put("x", lambda t: t.to("meta")), "x is on meta", "expected {device}"),
    "x sparse": (put("x", lambda t: t.to_sparse()), "x has layout", "sparse_coo", "expected torch.strided"),
    "x of NumPy": (put("x", lambda t: t.cpu().numpy()), "x is a ndarray", "expected a tensor"),
    "x None": (put("x", lambda t: None), "x is a NoneType", "expected a tensor"),
    "values of one block less": (put("values", lambda t: t[:-1]), "values has shape", "expected", "16, 16]"),
    "values transposed": (
        put("values", lambda t: t[:, :, :8].mT), "values has shape", "8, 16]", "expected", "16, 16]",
    ),
    "values dense": (
        put("values", lambda t: torch.ones(40, 56, dtype=t.dtype)), "values has shape [40, 56]", "expected", "16, 16]",
    ),
    "values of another dtype": (put("values", other), "x is {dtype}", "expected {other} as values"),
    "values of integers": (put("values", lambda t: t.nan_to_num().int()), "values is torch.int32", "expected one of"),
    "values complex": (put("values", lambda t: t.to(torch.complex64)), "values is torch.complex64", "expected one of"),
    "values of float8": (
        put("values", lambda t: t.to(torch.float8_e4m3fn)), "values is torch.float8_e4m3fn", "expected one of",
    ),
    "values on another device": (put("values", lambda t: t.to("meta")), "{device}", "expected meta as values"),
    "values sparse": (put("values", lambda t: t.to_sparse()), "values has layout", "sparse_coo", "expected"),
    "values a list": (put("values", lambda t: t.tolist()), "values is a list", "expected a tensor"),
    "bias too short": (put("bias", lambda t: t[:39]), "bias has shape [39]", "expected [40]"),
    "bias padded": (put("bias", lambda t: torch.cat([t, t[:8]])), "bias has shape [48]", "expected [40]"),
    "bias of two dimensions": (put("bias", lambda t: t[None]), "bias has shape [1, 40]", "expected [40]"),
    "bias of another dtype": (put("bias", other), "bias is {other}", "expected {dtype} as values"),
    "bias on another device": (put("bias", lambda t: t.to("meta")), "bias is on meta", "expected {device}"),
    "bias a number": (put("bias", lambda t: 0.0), "bias is a float", "expected a tensor or None"),
}  # fmt: skip


def said(parts):
    """What a message must say: ``{dtype}`` and ``{device}`` are the call's, ``{other}`` is the other dtype."""
    dtype = places.here().dtypes[0]
    names = {"dtype": dtype, "other": OTHER[dtype], "device": places.here().device}
    return says("ticket_linear", *(part.format(**names) for part in parts))


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_the_argument(native, case):
    mutate, *parts = CASES[case]
    call = make_call()
    assert call().isfinite().all()
    with pytest.raises(ValueError, match=said(parts)):
        mutate(call)()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.startswith(("activation", "x as wide", "x narrower", "values of one", "bias"))
             and not any(word in c for word in ("device", "number"))]
)  # fmt: skip
def test_the_definition_refuses_the_same(case):
    mutate, *parts = CASES[case]
    with pytest.raises(ValueError, match=says(parts[0].split(" ")[0], "expected")):
        mutate(make_call())(pyeff.reference.ticket_linear)


def call_op(native: str, **changed):
    """torch.ops.pyeff.ticket_linear of a valid call with arguments changed."""
    x, values, index, out, bias = make_call(traps=False).raw()
    given = {"x": x, "values": values, "index": index, "out_features": out, "bias": bias, **changed}
    return torch.ops.pyeff.ticket_linear(**given, backend=native)


OP_CASES = {
    "index of int64": (lambda i: {"index": i.long()}, "index is torch.int64", "expected torch.int32"),
    "index too short": (lambda i: {"index": i[:-1]}, "index has shape", "expected"),
    "index too long": (lambda i: {"index": torch.cat([i, i])}, "index has shape", "expected"),
    "index of two dimensions": (lambda i: {"index": i[None]}, "index has shape [1, ", "expected"),
    "index sparse": (lambda i: {"index": i.to_sparse()}, "index has layout", "expected torch.strided"),
    "another number of rows": (lambda i: {"out_features": 400}, "index has shape", "expected"),
    "no output": (lambda i: {"out_features": 0}, "out_features is 0", "expected at least 1"),
    "a negative output": (lambda i: {"out_features": -40}, "out_features is -40", "expected at least 1"),
    "blocks of no height": (
        lambda i: {"values": torch.ones(3, 0, 16, dtype=places.here().dtypes[0])}, "values has shape [3, 0, 16]",
        "expected [nnz, bo, bi]",
    ),
    "values of two dimensions": (
        lambda i: {"values": torch.ones(16, 16, dtype=places.here().dtypes[0])}, "values has shape [16, 16]",
        "expected [nnz, bo, bi]",
    ),
    "x of no width": (
        lambda i: {"x": torch.ones(5, 0, dtype=places.here().dtypes[0])}, "x has shape [5, 0]", "expected [*, in]",
    ),
    "activation unknown": (lambda i: {"activation": "tanh"}, "activation is 'tanh'", "expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", OP_CASES)
def test_the_op_itself_checks_what_its_schema_lets_pass(native, case):
    change, *parts = OP_CASES[case]
    with pytest.raises(ValueError, match=says("ticket_linear", *parts)):
        call_op(native, **change(make_ticket((40, 56), 16).index))


def test_an_unknown_backend_in_the_op():
    with pytest.raises(ValueError, match=says("backend", "'gpu'", "expected")):
        call_op("gpu")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 4, 7, 1000, 2**31 - 1])
@pytest.mark.parametrize("part", ["row_start", "column"])
def test_an_index_that_leads_outside(on_cpu, part, value, grad):
    """Through the op itself, which takes any tensor for an index: refused before anything is read by it."""
    ticket = make_ticket((40, 56), 16, 0.9, holes=False)
    right = getattr(ticket, part)
    limit = ticket.grid[1] if part == "column" else ticket.nnz + 1
    for at in range(len(right)):
        index = ticket.index.clone()
        index[{"row_start": 0, "column": ticket.grid[0] + 1}[part] + at] = value
        # A row's start that still rises, and a column that there is, may be another ticket's.
        fits = 0 <= value < limit and not (part == "row_start" and at in (0, len(right) - 1))
        if fits or right[at] == value:
            continue
        values = torch.ones(ticket.nnz, 16, 16, requires_grad=grad)
        with pytest.raises((ValueError, RuntimeError), match="index"):
            torch.ops.pyeff.ticket_linear(torch.ones(5, 56), values, index, 40, backend=on_cpu)


@pytest.mark.parametrize("value", [-(2**31), -1, 1000, 2**31 - 1])
@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_an_index_leads_outside(cpu_kernels, part, value):
    """The kernels' backward goes by columns: what only it reads is looked at, too."""
    ticket = make_ticket((40, 56), 16, 0.9, holes=False)
    start = torch.tensor([0, *(len(getattr(ticket, name)) for name in PARTS)]).cumsum(0)[PARTS.index(part)]
    for at in range(len(getattr(ticket, part))):
        index = ticket.index.clone()
        index[start + at] = value
        x, values = torch.ones(5, 56, requires_grad=True), torch.ones(ticket.nnz, 16, 16, requires_grad=True)

        def both(x=x, values=values, index=index):
            torch.ops.pyeff.ticket_linear(x, values, index, 40, backend=cpu_kernels).sum().backward()

        with pytest.raises((ValueError, RuntimeError), match="index"):
            both()


def test_an_index_of_noise(on_cpu):
    """Any numbers of the right length. That they are a ticket's is as good as impossible."""
    ticket = make_ticket((40, 56), 16)
    values = torch.ones(ticket.nnz, 16, 16)
    generator = torch.Generator().manual_seed(0)
    for limit in (2, 3, 5, 2**31 - 1):
        for _ in range(20):
            index = torch.randint(-limit, limit, ticket.index.shape, generator=generator, dtype=torch.int32)
            with pytest.raises((ValueError, RuntimeError), match="index"):
                torch.ops.pyeff.ticket_linear(torch.ones(5, 56), values, index, 40, backend=on_cpu)


def test_mixed_precision_without_autocast_raises(native):
    for low, high in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        call = make_call(dtype=low)
        with pytest.raises(ValueError, match=says("x is", high, "expected", low)):
            call.but(x=call.tensors["x"].to(high))()


def test_a_dtype_without_kernels_says_so(cpu_kernels):
    with pytest.raises(RuntimeError, match=says("ticket_linear", "cpu", "float16", "float64, float32, bfloat16")):
        make_call(dtype=torch.float16)()


def test_a_device_without_kernels_says_so(native_kernels):
    call = make_call()
    meta = TicketCall({n: t.to("meta") for n, t in call.tensors.items()}, call.ticket.to("meta"), None)
    with pytest.raises(RuntimeError, match=says("ticket_linear", native_kernels, "meta")):
        meta()
    with pyeff.backend("auto"):
        out = meta()
    assert out.device.type == "meta"
    assert out.shape == (5, 40)


def test_a_refused_call_changes_nothing(native):
    """An error comes before any gradient is there, and the next call is as if it had not been."""
    call = make_call(traps=False)
    expected = call()
    leaves = call.require_grad(call.tensors)
    with pytest.raises(ValueError, match="bias"):
        leaves.but(bias=leaves.tensors["bias"][:1])()
    assert all(t.grad is None for t in leaves.tensors.values())
    assert torch.equal(call(), expected)
