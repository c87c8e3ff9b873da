"""ticket_linear called with one or two arguments changed at random: it raises, or gives what the reference gives."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import given

import pyeff
from pyeff import Ticket
from tests import helpers, places
from tests.test_read_fuzz import TENSOR_CHANGES, harmless
from tests.ticket_calls import ACTIVATIONS, TENSORS, TicketCall, make_call, make_ticket, sizes

OPERATION = "ticket_linear"
TICKETS = {
    "another of this shape": lambda: make_ticket((12, 14), 4, seed=5),
    "transposed": lambda: make_ticket((14, 12), 4),
    "smaller blocks": lambda: make_ticket((12, 14), 2),
    "a narrower weight": lambda: make_ticket((12, 13), 4),
    "on the meta device": lambda: make_ticket((12, 14), 4).to("meta"),
    "None": lambda: None,
    "its index": lambda: make_ticket((12, 14), 4).index,
}


@st.composite
def mutations(draw):
    call = make_call(
        (12, 14), 4, draw(st.sampled_from([0.0, 0.5, 1.0])), lead=draw(st.sampled_from([(), (1,), (4,), (2, 3)])),
        bias=draw(st.booleans()), activation=draw(st.sampled_from(ACTIVATIONS)), traps=False,
    )  # fmt: skip
    tensors, ticket, activation, done = dict(call.tensors), call.ticket, call.activation, []
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["tensor", "tensor", "tensor", "ticket", "activation"]))
        if what == "tensor":
            name, change = draw(st.sampled_from(sorted(tensors))), draw(st.sampled_from(sorted(TENSOR_CHANGES)))
            if isinstance(tensors[name], torch.Tensor):
                try:
                    tensors[name] = TENSOR_CHANGES[change](tensors[name])
                except (RuntimeError, TypeError, IndexError):
                    continue  # the change itself is impossible for what an earlier one left
                done.append((name, change))
        elif what == "ticket":
            change = draw(st.sampled_from(sorted(TICKETS)))
            ticket = TICKETS[change]()
            done.append(("ticket", change))
        else:
            activation = draw(st.sampled_from([*ACTIVATIONS, "tanh", "", 0]))
            done.append(("activation", activation))
    return TicketCall(tensors, ticket, activation), done


def fits(change: tuple[str, object]) -> bool:
    """Whether a change leaves a call valid by itself."""
    name, to = change
    return to in ACTIVATIONS if name == "activation" else name != "ticket" and harmless(to)


def assert_names_what_is_wrong(error, done) -> None:
    """One line of ours, or the schema's, with an argument in it; nothing from inside of the library."""
    text = str(error)
    assert "ticket_linear" in text, (done, text)
    named = any(name in text for name in (*TENSORS, "ticket is", "index", "activation"))
    assert named or "cannot serve: the tensors are" in text, (done, text)
    for inside in ("csrc/", "pyeff_cpu", "ticket_forward"):
        assert inside not in text, (done, text)


@given(mutated=mutations(), training=st.booleans(), autocast=st.booleans())
def test_fuzz(native, mutated, training, autocast):
    call, done = mutated
    if training:
        call.tensors = {
            n: t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for n, t in call.tensors.items()
        }
    refusal = None
    with torch.autocast(places.here().device, torch.bfloat16, enabled=autocast):
        try:
            out = call()
        except (ValueError, RuntimeError) as error:
            refusal = error
    if refusal is not None:
        hypothesis.note(f"{done}: {refusal}")
        assert not all(map(fits, done)), (done, refusal)
        assert_names_what_is_wrong(refusal, done)
        return
    # It passed the checks, so it is a valid call, and the reference knows the answer.
    assert isinstance(call.ticket, Ticket), done
    call = call.but()
    assert all(isinstance(t, torch.Tensor) for t in call.tensors.values()), done
    dtype = call.tensors["values"].dtype
    assert out.dtype == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype), done
    assert out.device == call.tensors["values"].device, done
    assert out.shape == call.out_shape, done
    if out.device.type == "meta":
        return
    # What autocast casts is the oracle's input: all three are asked about the same numbers.
    rounded, names = call.to(out.dtype), [n for n, t in call.tensors.items() if t.requires_grad]
    grad_out = torch.ones_like(out)
    found = {"out": out.detach()}
    if names:
        found |= dict(zip(names, torch.autograd.grad(out, [call.tensors[n] for n in names], grad_out), strict=True))
    same = helpers.gradients(rounded, TENSORS[: len(call.tensors)], grad_out, pyeff.reference.ticket_linear)
    truth = helpers.gradients(
        rounded.to(torch.float64), TENSORS[: len(call.tensors)], grad_out, pyeff.reference.ticket_linear
    )
    scales, _ = sizes(rounded, grad_out)
    for name, value in found.items():
        assert name == "out" or value.dtype == call.tensors[name].dtype, (name, done)
        if value.dtype.itemsize < out.dtype.itemsize:  # float8 under autocast: the gradient is rounded to that, too
            slack = torch.finfo(value.dtype).eps * truth[name].abs().max().item()
            assert helpers.error(value, truth[name]) <= slack, (name, done)
            continue
        helpers.assert_three_way(
            f"{name} {done}", value.to(out.dtype), same[name], truth[name], call.terms(name), scales[name]
        )
