"""What the ticket's CPU kernels refuse by themselves, whoever calls them."""

from __future__ import annotations

import pytest
import torch

import pyeff
from tests import helpers


def call(**change):
    """The arguments of pyeff_cpu::ticket_forward and ticket_backward for one small ticket, some of them changed."""
    ticket = pyeff.Ticket.from_blocks(torch.tensor([[True, False], [True, True]]), (30, 20), (16, 10))
    x, grad, y = torch.randn(3, 20), torch.randn(3, 30), torch.empty(3, 30)
    given = {"x": x, "values": torch.randn(3, 16, 10), "index": ticket.index, "bias": torch.randn(30), "grad": grad}
    given |= {"saved": torch.empty(0), "y": y, "dx": torch.empty(3, 20), "activation": 0}
    given = {**given, **change}
    nothing = torch.empty(0)
    torch.ops.pyeff_cpu.ticket_forward(
        *(given[n] for n in ("x", "values", "index", "bias", "activation", "y")), nothing
    )
    torch.ops.pyeff_cpu.ticket_backward(
        *(given[n] for n in ("grad", "x", "values", "index", "saved", "activation", "dx")), nothing, nothing
    )


def test_a_right_call_passes():
    helpers.need("ticket_linear", "cpu")
    call()


def test_no_wrong_index_reaches_a_kernel():
    helpers.need("ticket_linear", "cpu")
    right = pyeff.Ticket.from_blocks(torch.tensor([[True, False], [True, True]]), (30, 20), (16, 10)).index
    for position in range(right.numel()):
        for wrong in (-1, 1, 2**30):
            index = right.clone()
            index[position] += wrong
            with pytest.raises(RuntimeError, match="index is not that of a ticket of 2 x 2 blocks"):
                call(index=index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(20, 3).t()}, "x has rows that are not contiguous"),
        ({"x": torch.randn(3, 20).double()}, "x is not on the CPU, or has another dtype than values"),
        ({"x": torch.randn(0, 20)}, "x is not a matrix, or is empty"),
        ({"values": torch.randn(4, 16, 10)}, "index has 19 elements, expected 22"),
        ({"values": torch.randn(3, 10, 16).transpose(1, 2)}, "values is not contiguous"),
        ({"index": torch.zeros(19)}, "index has another dtype"),
        ({"bias": torch.randn(29)}, "bias has 29 elements, expected 30"),
        ({"y": torch.empty(2, 30)}, "y has 60 elements, expected 90"),
        ({"grad": torch.randn(2, 30)}, r"grad is not \[3, 30\]"),
        ({"dx": torch.empty(3, 19)}, "dx has 57 elements, expected 60"),
        ({"activation": 3}, "activation is 3, expected 0, 1 or 2"),
        ({"activation": 2}, "saved has 0 elements, expected 90"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    helpers.need("ticket_linear", "cpu")
    with pytest.raises(RuntimeError, match=message):
        call(**change)
