"""From unstructured tickets to blocks: masks of torch, projection, regrouping."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pyeff
from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_grouping as grouping
from pyeff.recipes import ticket
from tests.ticket_models import build, classifier, inputs, mlp


def masked(model, share=0.5, seed=0):
    """Random masks on every linear layer that is pruned."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.rand(layer.weight.shape, generator=generator) < share
        for name, layer in ticket.targets(model).items()
    }
    ticket.mask(model, found)
    return found


def test_masks_in_and_out():
    model = mlp()
    with pytest.raises(ValueError, match=r"source has none of 4 tensors named \*\.weight_mask"):
        ticket.masks(model)
    found = masked(model)
    for source in (model, model.state_dict()):
        again = ticket.masks(source)
        assert all(torch.equal(again[name], m) for name, m in found.items())
    weight = model[0].weight_orig.detach().clone()
    other = {"0": torch.zeros(48, 32, dtype=torch.bool)}
    ticket.mask(model, other)  # in the place of the one that is there
    assert torch.equal(model[0].weight_orig, weight)
    assert not model[0].weight.any()
    torch_prune.remove(model[2], "weight")  # torch takes its own masks off again
    assert type(model[2].weight) is nn.Parameter


def test_state_dicts_of_torchs_pruning_load():
    source = classifier("bert")
    masked(source)
    target = classifier("bert")
    with torch.no_grad():
        for p in target.parameters():
            p.add_(1)
    ticket.load_masked(target, source.state_dict())
    for name in ticket.masks(source):
        assert torch.equal(target.get_submodule(name).weight, source.get_submodule(name).weight)
    assert torch.equal(target(**inputs()).logits, source(**inputs()).logits)
    without = {name: t for name, t in source.state_dict().items() if not name.endswith("query.weight_orig")}
    with pytest.raises(ValueError, match=r"has no .*query\.weight_orig"):
        ticket.load_masked(classifier("bert"), without)


def test_bad_masks_change_nothing():
    model = mlp()
    good = torch.ones(48, 32, dtype=torch.bool)
    for masks, message in [
        ({"0": good, "1": good}, "1 is a GELU, expected a torch.nn.Linear"),
        ({"0": good, "9": good}, "9 is a NoneType"),
        ({"0": good.float()}, r"torch.float32 \[48, 32\], expected a bool tensor \[48, 32\]"),
        ({"0": good.T}, r"bool \[32, 48\], expected a bool tensor \[48, 32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.mask(model, masks)
        assert not hasattr(model[0], "weight_mask")


def test_projection_ranks_by_surviving_magnitude_and_refills():
    torch.manual_seed(0)
    weight, mask = torch.randn(32, 48), torch.rand(32, 48) < 0.3
    found = ticket.project(mask, weight, block=8, density=0.25)
    surviving = (weight.abs() * mask).view(4, 8, 6, 8).sum((1, 3))
    alive = found.ticket.blocks()
    assert int(alive.sum()) == 6
    assert surviving[alive].min() > surviving[~alive].max()
    assert torch.equal(found.values, found.ticket.gather(weight))  # refilled, also where the mask is False
    assert found.survivors == pytest.approx(float(surviving[alive].sum() / surviving.sum()))
    whole = weight.abs().view(4, 8, 6, 8).sum((1, 3))
    assert found.retained == pytest.approx(float(whole[alive].sum() / whole.sum()))
    assert found.density == 0.25
    assert ticket.project(mask, weight, 8).density == pytest.approx(float(mask.float().mean()), abs=0.05)
    assert ticket.project(mask, weight, 1, density=0.2).survivors > found.survivors


def test_projection_of_several_layers_ranks_them_together():
    masks = {"a": torch.ones(16, 16, dtype=torch.bool), "b": torch.ones(16, 16, dtype=torch.bool)}
    weights = {"a": torch.full((16, 16), 2.0), "b": torch.ones(16, 16)}
    found = ticket.project(masks, weights, 8, density=0.5)
    assert (found["a"].density, found["b"].density) == (1.0, 0.0)
    each = ticket.project(masks, weights, 8, density=0.5, scope="layer")
    assert (each["a"].density, each["b"].density) == (0.5, 0.5)


def test_projection_errors():
    weight, mask = torch.randn(8, 8), torch.ones(8, 8, dtype=torch.bool)
    for arguments, message in [
        ((mask.float(), weight, 4), "mask is torch.float32"),
        ((mask, weight[1:], 4), r"weight has shape \[7, 8\], expected \[8, 8\] as mask"),
        (({"a": mask}, {"b": weight}, 4), r"mask has \['a'\]"),
        ((mask, weight, -1), "block is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.project(*arguments)
    with pytest.raises(ValueError, match="density is 2"):
        ticket.project(mask, weight, 4, density=2)


def test_blockify_a_model():
    model = classifier("bert")
    dense = {name: layer.weight.detach().clone() for name, layer in ticket.targets(model).items()}
    found = masked(model, 0.4)
    expected = ticket.project(found, dense, 8)
    pruning = ticket.blockify(model, 8)
    for name, projection in expected.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, TicketLinear)
        assert layer.ticket == projection.ticket
        assert torch.equal(layer.values, projection.values)
        assert pruning.layers[name].retained == pytest.approx(projection.retained, abs=1e-6)
    assert pruning.method == "projection"
    assert abs(pruning.density - 0.4) < 0.02
    with pytest.raises(ValueError, match="source has none"):
        ticket.blockify(classifier("bert"))


@pytest.mark.parametrize("block", [4, 8, 16], ids=lambda b: f"block{b}")
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_regrouping_keeps_what_the_model_computes(kind, block):
    model = classifier(kind)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():  # nothing may hide behind zero biases
            p.add_(torch.randn_like(p) * 0.1)
    before = model(**inputs()).logits
    weights = {name: layer.weight.detach().clone() for name, layer in ticket.targets(model).items()}
    parameters = dict(model.named_parameters())
    found = ticket.regroup(model, block, density=0.3)
    torch.testing.assert_close(model(**inputs()).logits, before, rtol=1e-10, atol=1e-10)
    assert dict(model.named_parameters()) == parameters
    assert all(after >= start - 1e-12 for start, after in found.retained.values())
    assert any(after > start + 1e-3 for start, after in found.retained.values())
    # Heads are of 8: in blocks of 4 their inner dimensions move, in blocks of 16 the heads.
    kinds = {name.rpartition(".")[2] for name in found.retained}
    inner = {4: {"query and key", "value and output"}, 8: set(), 16: {"heads"}}[block]
    assert kinds == {"feed-forward"} | inner
    for name, order in found.orders.items():
        rows = weights[name].index_select(0, order)
        moved = model.get_submodule(name).weight
        assert torch.equal(moved.sort(1).values, rows.sort(1).values), name


def test_regrouping_finds_planted_blocks():
    torch.manual_seed(0)
    block, groups = 8, 8
    pattern = (torch.rand(groups, 4) < 0.3).repeat_interleave(block, 0).repeat_interleave(block, 1).float()
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
    shuffle = torch.randperm(64)
    with torch.no_grad():
        model.fc1.weight.copy_((pattern * torch.randn(64, 32))[shuffle])
        model.fc2.weight.copy_((pattern.T * torch.randn(32, 64))[:, shuffle])
    share = float(pattern.mean())
    before, after = ticket.regroup(model, block, density=share).retained["feed-forward"]
    assert before < 0.7
    assert after > 0.99


class FeedForward(nn.Module):
    """What some encoders have: something between the two layers that knows the hidden units by their place."""

    def __init__(self, between):
        super().__init__()
        self.fc1, self.between, self.fc2 = nn.Linear(32, 64), between, nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x).relu()))


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm(64), nn.BatchNorm1d(64, affine=False), nn.GroupNorm(4, 64, affine=False), nn.PReLU(64),
        nn.Sequential(nn.LayerNorm(64)),
    ],
    ids=lambda between: type(between).__name__,
)  # fmt: skip
def test_units_that_something_else_knows_by_place_stay(between):
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(between), FeedForward(nn.LayerNorm(64, elementwise_affine=False))).eval()
    with torch.no_grad():
        for t in (*between.parameters(), *between.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5)
    x = torch.randn(5, 32)
    before = model(x)
    found = ticket.regroup(model, 8)
    assert list(found.retained) == ["1.feed-forward"]  # there, nothing has a number for a unit
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="and nothing else of their width"):
        ticket.regroup(model[0], 8)


def test_regrouping_helps_a_mask_to_become_blocks():
    model = classifier("bert")
    masked(model, 0.3)
    alone = ticket.blockify(copy.deepcopy(model), 8).retained
    before = model(**inputs()).logits
    ticket.regroup(model, 8)
    torch.testing.assert_close(model(**inputs()).logits, before, rtol=1e-4, atol=1e-6)
    assert ticket.blockify(model, 8).retained > alone


def test_regrouping_of_gated_layers():
    model, kwargs = build("llama")
    model = model.double()
    before = model(**kwargs).last_hidden_state
    found = ticket.regroup(model, 8)
    assert {name.rpartition(".")[2] for name in found.retained} == {"feed-forward"}
    torch.testing.assert_close(model(**kwargs).last_hidden_state, before, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_regrouped():
    for model, block in [(mlp(), 8), (classifier("bert"), 7)]:
        with pytest.raises(ValueError, match="nothing in the"):
            ticket.regroup(model, block)
    pruned = classifier("bert")
    ticket.prune(pruned, density=0.5, block=8)
    with pytest.raises(ValueError, match="nothing in the"):
        ticket.regroup(pruned, 8)


def test_an_order_is_never_worse_than_the_one_at_hand():
    torch.manual_seed(0)
    profile = torch.rand(24, 6) ** 4
    order, before, after = grouping.order(profile, 4, 0.3)
    assert after > before
    again, start, end = grouping.order(profile[order], 4, 0.3)
    assert start == pytest.approx(after)
    assert end >= start
    assert torch.equal(order.sort().values, torch.arange(24))
    assert grouping.order(torch.zeros(8, 3), 4, 0.5)[1:] == (1.0, 1.0)
    assert len(again) == 24


def test_a_density_of_everything_keeps_everything():
    torch.manual_seed(0)
    weight = torch.randn(20, 12)
    found = ticket.project(torch.ones(20, 12, dtype=torch.bool), weight, (8, 5))
    assert found.density == found.retained == 1
    assert torch.equal(found.ticket.scatter(found.values), weight)
    assert isinstance(found.ticket, pyeff.Ticket)
