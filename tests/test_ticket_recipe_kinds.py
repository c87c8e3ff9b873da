"""The ticket recipe on encoders, decoders and both, of many makers: regrouped, pruned, fused, and dense again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyeff.nn import TicketLinear
from pyeff.recipes import ticket
from tests.ticket_models import KINDS, build

# What there is to fuse and to regroup: attentions, activations, kinds of hidden units.
FUSED = {
    "distilbert": (2, 2), "electra": (2, 2), "albert": (1, 1), "mpnet": (2, 2), "bart": (4, 4), "opt": (2, 2),
    "vit": (2, 2), "t5": (4, 0), "llama": (2, 0),
}  # fmt: skip
INNER = {"distilbert", "electra", "mpnet"}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_models(kind):
    model, kwargs = build(kind)
    found = ticket.targets(model)
    assert not any("embed" in path or "lm_head" in path for path in found)
    with torch.no_grad():
        before = model(**kwargs).last_hidden_state
        if kind != "t5":  # whose feed-forward layers have a name of their own
            kinds = {name.rpartition(".")[2] for name in ticket.regroup(model, 4).retained}
            assert kinds == {"feed-forward"} | ({"query and key", "value and output"} if kind in INNER else set())
            torch.testing.assert_close(model(**kwargs).last_hidden_state, before, rtol=1e-4, atol=1e-5)
        pruning = ticket.prune(model, density=0.5, block=8)
        assert pruning.layers.keys() == found.keys()
        assert abs(pruning.density - 0.5) < 0.02
        pruned = model(**kwargs).last_hidden_state
        assert not torch.allclose(pruned, before, atol=1e-3)
        assert (len(ticket.fuse_qkv(model)), len(ticket.fuse_activations(model))) == FUSED[kind]
        torch.testing.assert_close(model(**kwargs).last_hidden_state, pruned, rtol=1e-4, atol=1e-5)
        ticket.to_dense(model)
        torch.testing.assert_close(model(**kwargs).last_hidden_state, pruned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_torchs_encoder_calls_its_tickets_without_gradients(fused, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    dense = copy.deepcopy(model)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    ticket.prune(model, density=0.5, block=8)
    expected = ticket.to_dense(copy.deepcopy(model))
    if fused:
        ticket.fuse_activations(model)
    calls = []
    for m in model.modules():
        if isinstance(m, TicketLinear):
            # Not a hook, since hooks alone keep torch from its short cut.
            m.forward = lambda x, m=m: calls.append(1) or TicketLinear.forward(m, x)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=mask)
        assert len(calls) == 4
        living = ~mask  # what is padding is zero in torch's nested tensors, and anything elsewhere
        torch.testing.assert_close(found[living], expected(x, src_key_padding_mask=mask)[living], rtol=1e-5, atol=1e-6)
    ticket.to_dense(model)
    for ours, theirs in ((model, dense), (expected, dense)):
        switches = [(m.activation_relu_or_gelu, sorted(vars(m))) for m in ours.layers]
        assert switches == [(m.activation_relu_or_gelu, sorted(vars(m))) for m in theirs.layers]
        assert (ours.use_nested_tensor, sorted(vars(ours))) == (theirs.use_nested_tensor, sorted(vars(theirs)))
