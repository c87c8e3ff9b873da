"""Several projections as one layer: what they share is never what an earlier call left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyeff
from pyeff.nn import TicketLinear
from pyeff.nn._ticket_fused import Projection, Projections, stack


@pytest.fixture
def attention():
    torch.manual_seed(0)
    tickets = [pyeff.Ticket.from_blocks(torch.rand(2, 3) < 0.7, (16, 24), 8) for _ in range(3)]
    layer = stack([TicketLinear(ticket) for ticket in tickets])
    shared = Projections(layer, [16] * 3)
    return nn.ModuleDict({"layer": layer, **{name: Projection(shared, i) for i, name in enumerate("qkv")}})


def fresh(attention, part, x):
    return attention["layer"](x).split(16, -1)["qkv".index(part)]


def test_one_product_serves_all(attention):
    calls, x = [], torch.randn(5, 24)
    attention["layer"].register_forward_hook(lambda *args: calls.append(1))
    found = [attention[name](x) for name in "qkv"]
    assert len(calls) == 1
    assert attention["q"].shared.last is None
    for name, y in zip("qkv", found, strict=True):
        assert torch.equal(y, fresh(attention, name, x))
    with torch.inference_mode():
        calls.clear()
        x = x.clone()
        assert [attention[name](x).shape for name in "qkv"] == [(5, 16)] * 3
        assert len(calls) == 1


def test_gradients_that_were_off_are_on(attention):
    x = torch.randn(5, 24)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            attention["q"](x)
        assert attention["k"](x).requires_grad
        with off():
            assert not attention["v"](x).requires_grad
    attention.requires_grad_(False)
    attention["q"](x)
    assert attention["k"](x.requires_grad_()).requires_grad


def write_x(layer, x):
    x.add_(1)


def write_values(layer, x):
    layer.values.mul_(2)


def write_bias(layer, x):
    layer.bias.add_(1)


def step(layer, x):
    layer.values.grad = torch.ones_like(layer.values)
    torch.optim.AdamW([layer.values], lr=0.1).step()


def load(layer, x):
    layer.load_state_dict({name: t.flip(0) if name == "values" else t for name, t in layer.state_dict().items()})


def replace_bias(layer, x):
    layer.bias = nn.Parameter(layer.bias + 1)


def another_ticket(layer, x):
    layer.set_ticket(pyeff.Ticket.from_blocks(torch.eye(6, 3) > 0, (48, 24), 8))


@pytest.mark.parametrize("change", [write_x, write_values, write_bias, step, load, replace_bias, another_ticket])
def test_a_change_in_between_counts(attention, change):
    x = torch.randn(5, 24)
    before = attention["q"](x).detach().clone(), fresh(attention, "k", x)
    with torch.no_grad():
        change(attention["layer"], x)
    found = attention["k"](x)
    assert torch.equal(found, fresh(attention, "k", x))
    assert not torch.equal(found, before[1])


def test_modes_in_between_count(attention):
    x = torch.randn(5, 24)
    attention["q"](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention["k"](x).dtype == torch.bfloat16
    assert attention["v"](x).dtype == torch.float32


def test_other_parameters_for_one_call(attention):
    x = torch.randn(5, 24)
    with torch.no_grad():
        attention["q"](x)
        zeros = {f"layer.{name}": torch.zeros_like(p) for name, p in attention["layer"].named_parameters()}
        found = torch.func.functional_call(Call(attention), {f"of.{name}": t for name, t in zeros.items()}, (x,))
    assert not found.any()


class Call(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of["k"](x)


def test_what_is_no_input(attention):
    for x, message in (([1.0] * 24, "x is a list, expected a tensor"), (torch.zeros(()), r"x has shape \[\]")):
        with pytest.raises(ValueError, match=message):
            attention["q"](x)


def test_compiles_whole(attention):
    class All(Call):
        def forward(self, x):
            return self.of["q"](x) + self.of["k"](x) * self.of["v"](x)

    model, x = All(attention), torch.randn(5, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
