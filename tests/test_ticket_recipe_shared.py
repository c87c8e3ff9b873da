"""Models in which a layer or a weight stands in more than one place, and what else hangs on a layer."""

from __future__ import annotations

import torch
from torch import nn

from pyeff.recipes import ticket


def shared():
    """One linear layer in two places, once with an activation behind it."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    return nn.Sequential(layer, nn.GELU(), nn.Sequential(layer), nn.Identity())


def test_an_activation_behind_one_of_two_places_stays():
    model = shared()
    flat = nn.Sequential(model[0], nn.GELU(), model[0], nn.Identity())
    x = torch.randn(3, 16)
    for m in (model, flat):
        ticket.prune(m, density=0.5, block=8, include=".")
        before = m(x)
        assert ticket.fuse_activations(m) == []
        assert torch.equal(m(x), before)
