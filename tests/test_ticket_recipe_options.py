"""What the ticket recipe refuses, and when: before anything was trained or changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyeff.recipes import _ticket_select as selection
from pyeff.recipes import ticket
from tests.ticket_models import mlp


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["one_shot", "imp"])
def test_numbers_that_have_no_order_are_refused(bad, method):
    def spoilt(name, layer):
        worth = torch.ones(layer.out_features, layer.in_features)
        worth[3, 5] = bad
        return worth

    word = "NaN" if math.isnan(bad) else "infinity"
    for score, message in [(spoilt, f"score gives {word} for 0"), (None, f"the weight of 0 has {word}")]:
        model = mlp()
        if score is None:
            with torch.no_grad():
                model[0].weight[3, 5] = bad
        with pytest.raises(ValueError, match=f"{message}, expected finite numbers"):
            ticket.prune(model, lambda m: None, density=0.5, block=8, method=method, score=score)
        assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="weight has NaN or infinity"):
        ticket.project(torch.ones(8, 8, dtype=torch.bool), torch.full((8, 8), bad), 4, density=0.5)


@pytest.mark.parametrize("sizes", [1, 4])
def test_what_may_not_survive_does_not_whatever_it_is_worth(sizes):
    scores = torch.full((40,), -math.inf)
    scores[:4] = torch.arange(4.0)
    allowed = torch.arange(40) % 2 == 0
    found = selection._keep(scores, torch.full((40,), sizes), allowed, 10 * sizes)
    assert not bool((found & ~allowed).any())
    assert int(found.sum()) == 10
    assert found[[0, 2]].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "nah"}, "scope is 'nah', expected one of 'global'"),
        ({"floor": 0.9}, "floor is 0.9, expected a number from 0 to the density 0.5"),
        ({"block": 0}, "block is 0"),
        ({"score": 3}, "score is a int, expected a callable"),
        ({"score": lambda name, layer: layer.weight, "method": "random"}, "score was given with method 'random'"),
        ({"include": "nothing"}, "include 'nothing' matches no layer"),
        ({"head": ["nonsense"]}, "nonsense"),
        ({"rewind": {}}, "rewind has no 0.weight"),
        ({"rewind": {"0.bias": torch.zeros(3)}}, r"rewind has shape \[3\] for 0.bias, expected a tensor \[48\]"),
        ({"rewind": {"2.weight": torch.zeros(3, 3)}}, r"rewind has shape \[3, 3\] for 2.weight, expected a tensor"),
        ({"rewind": {"2.weight": "x"}}, "rewind has a str for 2.weight, expected a tensor"),
        ({"rewind": {"2.weight": torch.zeros(3)}, "head": ["nonsense"]}, "nonsense"),
    ],
)
@pytest.mark.parametrize("method", ["block_imp", "imp"])
def test_bad_options_are_refused_before_training(options, message, method):
    model, calls = mlp(), []
    if options.get("rewind"):
        options = options | {"rewind": dict(model.state_dict()) | options["rewind"]}
    with pytest.raises(ValueError, match=message):
        ticket.prune(model, calls.append, **{"density": 0.5, "block": 8, "method": method} | options)
    assert not calls
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "weight_mask")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": mlp().state_dict()}, "rewind was given without train"),
        ({"head": ["2"]}, "head was given without train"),
    ],
)
def test_options_that_need_training(options, message):
    with pytest.raises(ValueError, match=message):
        ticket.prune(mlp(), density=0.5, block=8, **options)


@pytest.mark.parametrize("method", ["block_imp", "imp"])
def test_a_head_stays_trained_whatever_the_rest_goes_back_to(method):
    model, other = mlp(), {name: t + 1 for name, t in mlp().state_dict().items()}

    def step(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(7)

    before = mlp()
    ticket.prune(
        model, step, density=0.5, block=8, method=method, rounds=1, rewind=other | {"gone": 3}, head=["2"], exclude="2"
    )
    weight = model[0].weight.detach()
    assert torch.equal(weight, other["0.weight"] * (weight != 0))
    assert torch.equal(model[0].bias, other["0.bias"])
    assert torch.equal(model[2].weight, before[2].weight + 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "nah"}, "scope is 'nah'"),
        ({"floor": 0.9}, "floor is 0.9"),
        ({"include": "nothing"}, "include 'nothing' matches no layer"),
    ],
)
def test_gradual_refuses_before_the_first_step(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ticket.Gradual(model, torch.optim.SGD(model.parameters()), density=0.5, end=3, block=8, **options)
