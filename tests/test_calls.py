"""When an op is called as the function behind it, and that nobody can tell the difference."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyeff
from pyeff.ops import _calls
from tests.helpers import make_read
from tests.multimask_calls import make_gather, make_plan, make_scatter, make_targets

OPERATION = "multimask_gather"


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(f"{function.namespace}::{function._opname}")
        return function(*arguments, **(keywords or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*arguments, **(keywords or {}))


class Own(torch.Tensor):
    pass


def test_what_is_plain():
    x = torch.randn(3)
    assert _calls.plain([x, None, torch.nn.Parameter(x)])
    assert not _calls.plain([x, x.as_subclass(Own)])
    with Seen():
        assert not _calls.plain([x])
    with Functions():
        assert not _calls.plain([x])
    inside = []
    torch.func.vmap(lambda t: inside.append(_calls.plain([t])) or t)(x)
    torch.func.grad(lambda t: inside.append(_calls.plain([t])) or t.sum())(x)
    torch.jit.trace(lambda t: inside.append(_calls.plain([t])) or t + 1, x, check_trace=False)
    assert inside == [False] * 3
    assert torch.compile(lambda t: t if _calls.plain([t]) else t + 1, backend="eager", fullgraph=True)(x) is not x


def lazy_ones(x):
    """Tensors of torch's own type that are not their memory."""
    return {"negative": torch._neg_view(x), "zero": torch._efficientzerotensor(x.shape, dtype=x.dtype)}


def test_what_is_lazy_is_not_plain():
    x = torch.randn(3)
    assert all(_calls.unwatched([t]) and not _calls.plain([t]) for t in lazy_ones(x).values())
    assert not _calls.plain([x.to("meta")])
    assert not _calls.plain([torch.eye(3).to_sparse()])


def test_a_profiler_watches():
    plan, x = make_plan(), torch.randn(2, 13, 4)
    with torch.profiler.profile() as seen:
        assert not _calls.unwatched([x])
        pyeff.ops.multimask_gather(x, plan)
    assert "pyeff::multimask_gather" in {event.key for event in seen.key_averages()}


def test_whose_gradient_is_wanted():
    x, wanted = torch.randn(3), torch.randn(3, requires_grad=True)
    assert not _calls.wants_gradient([x, None])
    assert _calls.wants_gradient([x, wanted])
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert not _calls.wants_gradient([x, wanted])


CALLS = {
    "multimask_gather": lambda: make_gather(make_plan()),
    "multimask_scatter": lambda: make_scatter(make_plan(), fill="BTD", noise=0.1),
    "multimask_targets": make_targets,
}


@pytest.mark.parametrize("op", CALLS)
def test_the_result_is_the_ops(kernels, op):
    """Bitwise, by the dispatcher and past it; and who watches sees every op."""
    call = CALLS[op]()
    with torch.no_grad():
        past = call()
    with torch.no_grad(), Seen() as seen:
        by = call()
    assert torch.equal(past.nan_to_num(), by.nan_to_num())
    assert f"pyeff::{op}_forward" in seen.names
    wanted = call.require_grad(call.tensors)()
    assert wanted.grad_fn is not None
    assert torch.equal(past.nan_to_num(), wanted.detach().nan_to_num())


def test_read_and_tickets_too(kernels):
    read = make_read("gru", "rms")
    ticket = pyeff.Ticket.from_blocks(torch.rand(4, 2) < 0.5, (64, 32), 16)
    dtype = next(iter(read.tensors.values())).dtype
    x, weight = torch.randn(5, 32, dtype=dtype), torch.randn(64, 32, dtype=dtype)
    values = ticket.gather(weight)
    for call, op in ((read, "read_forward"), (lambda: pyeff.ops.ticket_linear(x, values, ticket), "ticket_forward")):
        with torch.no_grad():
            past = call()
        with torch.no_grad(), Seen() as seen:
            assert torch.equal(past, call())
        assert f"pyeff::{op}" in seen.names


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["negative", "zero"])
def test_lazy_tensors_are_what_they_stand_for(kernels, kind):
    plan = make_plan()
    x = torch.randn(plan.batch, plan.tokens, 8)
    ticket = pyeff.Ticket.from_blocks(torch.ones(2, 1, dtype=torch.bool), (16, 8), 8)
    values = torch.randn(2, 8, 8)
    gru = [torch.randn(12, 8), torch.randn(12, 4)]
    calls = (
        lambda t: pyeff.ops.multimask_gather(t, plan),
        lambda t: pyeff.ops.multimask_targets([t, x]),
        lambda t: pyeff.ops.ticket_linear(t, values, ticket),
        lambda t: pyeff.ops.read_recurrence([t, x], *gru),
    )
    with torch.no_grad():
        for call in calls:
            lazy = lazy_ones(x)[kind]
            found, expected = call(lazy), call(lazy.clone() if kind == "zero" else lazy.resolve_neg())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_averages_of_lazy_tensors(native):
    for kind in ("negative", "zero"):
        average, x = [torch.ones(5)], torch.randn(5)
        lazy = lazy_ones(x)[kind]
        pyeff.ops.ema_update_(average, [lazy], 0.5)
        torch.testing.assert_close(average[0], 0.5 + 0.5 * (-x if kind == "negative" else 0 * x))
        assert average[0]._version == 1
