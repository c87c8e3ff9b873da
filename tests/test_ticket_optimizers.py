"""TicketLinear and optimizers: every one of torch trains it, and goes on where the ticket changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyeff
from pyeff.nn._ticket_carry import check_optimizers
from tests.test_ticket_nn import draw, layer_for, ticket_for

OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9}, "Adam": {}, "AdamW": {}, "Adamax": {}, "NAdam": {}, "RAdam": {},
    "Adadelta": {}, "Adagrad": {}, "ASGD": {}, "RMSprop": {"momentum": 0.5}, "Rprop": {}, "Adafactor": {},
    "LBFGS": {"max_iter": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name):
    layer = layer_for(dtype=torch.float32)
    x, goal = draw(16, 29, dtype=torch.float32), draw(16, 37, dtype=torch.float32, seed=5)
    optimizer = getattr(torch.optim, name)(layer.parameters(), **OPTIMIZERS[name])

    def loss():
        optimizer.zero_grad()
        value = F.mse_loss(layer(x), goal)
        value.backward()
        return value

    first = loss().item()
    for _ in range(10):
        optimizer.step(loss)
    assert loss().item() < first


@pytest.mark.parametrize("block", [(8, 16), (4, 4)], ids=["same block", "another block"])
def test_set_ticket_carries_moments(block):
    layer = layer_for(dtype=torch.float32, share=0.6)
    optimizer = torch.optim.AdamW(layer.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        layer(draw(4, 29, dtype=torch.float32, seed=seed)).square().sum().backward()
        optimizer.step()
    old, parameter = layer.ticket, layer.values
    dense = {key: old.scatter(optimizer.state[parameter][key]) for key in ("exp_avg", "exp_avg_sq")}
    weight, fill = layer.weight.detach(), draw(37, 29, dtype=torch.float32, seed=9)
    new = ticket_for(block=block, share=0.5, seed=7)
    assert bool((new.mask() & ~old.mask()).any())
    assert bool((new.mask() & old.mask()).any())
    layer.set_ticket(new, fill, optimizers=[optimizer])
    assert layer.values is parameter
    assert layer.ticket == new
    for key, moment in dense.items():
        assert torch.equal(optimizer.state[parameter][key], new.gather(moment)), key
    assert optimizer.state[parameter]["step"] == 3
    expected = torch.where(old.mask(), weight, fill)
    assert torch.equal(layer.weight, torch.where(new.mask(), expected, 0))
    layer(draw(4, 29, dtype=torch.float32)).sum().backward()
    optimizer.step()
    layer.set_ticket(old, fill, rewind=True)
    assert torch.equal(layer.weight, torch.where(old.mask(), fill, 0))


def test_factored_moments_follow_their_blocks():
    layer = layer_for(share=0.7, dtype=torch.float32)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(draw(4, 29, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    old, row = layer.ticket, optimizer.state[layer.values]["row_var"].clone()
    keep = old.blocks()
    keep[0] = False
    layer.set_ticket(pyeff.Ticket.from_blocks(keep, old.shape, old.block), optimizers=[optimizer])
    assert torch.equal(optimizer.state[layer.values]["row_var"], row[int(old.row_start[1]) :])
    layer.set_ticket(ticket_for(block=8), optimizers=[optimizer])
    assert layer.values not in optimizer.state
    layer(draw(4, 29, dtype=torch.float32)).square().sum().backward()
    optimizer.step()


def trained(name):
    layer = layer_for(dtype=torch.float32, share=0.6)
    optimizer = getattr(torch.optim, name)(layer.parameters(), **OPTIMIZERS[name])
    for seed in range(3):
        step(layer, optimizer, seed)
    return layer, optimizer


def step(layer, optimizer, seed=0):
    def loss():
        optimizer.zero_grad()
        value = layer(draw(4, 29, dtype=torch.float32, seed=seed)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("Adafactor", "LBFGS")])
@pytest.mark.parametrize("block", [(8, 16), (4, 4)], ids=["same block", "another block"])
def test_every_state_is_carried(name, block):
    layer, optimizer = trained(name)
    old, state = layer.ticket, dict(optimizer.state[layer.values])
    new = ticket_for(block=block, share=0.5, seed=7)
    layer.set_ticket(new, optimizers=[optimizer])
    assert set(optimizer.state[layer.values]) == set(state)
    for key, was in state.items():
        found = optimizer.state[layer.values][key]
        if isinstance(was, torch.Tensor) and was.dim():
            # Within the weight: what lies past its end never counts.
            assert found.shape == layer.values.shape
            assert torch.equal(new.scatter(found), torch.where(new.mask(), old.scatter(was), 0)), key
        else:
            assert found is was, key
    before = layer.values.detach().clone()
    for seed in range(3):
        step(layer, optimizer, seed)
    assert layer.values.isfinite().all()
    assert not torch.equal(layer.values, before)


class Pooled(torch.optim.SGD):
    """One that keeps its parameters in a list of its own."""

    def __init__(self, params):
        super().__init__(params)
        self.all = [p for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("make", [torch.optim.LBFGS, Pooled])
def test_an_optimizer_whose_state_is_of_all_parameters_is_refused(make):
    layer, linear = layer_for(dtype=torch.float32), nn.Linear(3, 3)
    optimizer = make(layer.parameters())
    ticket, values, index = ticket_for(share=0.9, seed=3), layer.values.detach().clone(), layer.index
    message = f"set_ticket: optimizers has {make.__name__}, .*, expected those with a state for each parameter"
    for optimizers in ([optimizer], [torch.optim.SGD(layer.parameters()), optimizer]):
        with pytest.raises(ValueError, match=message):
            layer.set_ticket(ticket, optimizers=iter(optimizers))
        assert layer.index is index
        assert torch.equal(layer.values, values)
    with pytest.raises(ValueError, match=r"install: optimizers has a Linear, expected a torch\.optim\.Optimizer"):
        check_optimizers("install", [linear])


def test_any_number_of_optimizers_once():
    layer, optimizer = trained("AdamW")
    layer.set_ticket(ticket_for(share=0.9, seed=3), optimizers=iter([optimizer]))
    assert optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape


def test_an_optimizer_after_another_ticket_was_loaded():
    """It goes on with the state that belongs to the ticket, or with none."""
    layer, optimizer = trained("AdamW")
    other = layer_for(dtype=torch.float32, share=0.9, seed=3)
    its = torch.optim.AdamW(other.parameters())
    step(other, its)
    layer.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(its.state_dict()))  # it shares what it is given
    step(layer, optimizer, 1)
    step(other, its, 1)
    assert torch.equal(layer.values, other.values)
    layer.load_state_dict(layer_for(dtype=torch.float32, share=0.3, seed=4).state_dict())
    optimizer.state.pop(layer.values)
    step(layer, optimizer)
