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
