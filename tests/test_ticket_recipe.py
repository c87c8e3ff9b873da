"""pyeff.recipes.ticket.prune and what goes with it: what is pruned, by which rule, to which weights it rewinds."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pyeff
from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_select as selection
from pyeff.recipes import ticket
from tests.ticket_models import classifier, inputs, mlp

LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def train(model, steps=3, seed=0):
    """A few steps on random numbers, enough to move every weight."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs()).logits.square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_papers_layers_are_pruned(kind):
    model = classifier(kind)
    found = list(ticket.targets(model))
    for layer in range(2):
        for name in LINEAR:
            assert sum(f"layer.{layer}." in path and path.endswith(name) for path in found) in (1, 2), name
    assert len(found) == 2 * 6 + (kind == "bert")
    assert any("pooler" in path for path in found) == (kind == "bert")
    assert not any("embedding" in path or "classifier" in path for path in found)


def test_targets_by_expression():
    model = classifier("bert")
    assert len(ticket.targets(model, include="query|key")) == 4
    assert list(ticket.targets(model, include="classifier")) == ["classifier"]
    assert not any("pooler" in path for path in ticket.targets(model, exclude=["pooler", "layer.0"]))
    assert len(ticket.targets(model, exclude=["pooler", r"layer\.0"])) == 6
    assert len(ticket.targets(model, stack="bert.encoder.layer")) == 13
    for options, message in [
        ({"include": "nothing"}, "include 'nothing' matches no layer"),
        ({"exclude": "classifier"}, "exclude 'classifier' matches no layer"),
        ({"include": "("}, r"include is '\(', expected regular expressions"),
        ({"exclude": "."}, "no linear layer of the BertForSequenceClassification is left"),
        ({"include": "query", "stack": "bert.encoder.layer"}, "stack was given with include"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.targets(model, **options)


def test_layers_that_are_shared_are_replaced_everywhere():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Sequential(shared))
    ticket.prune(model, density=0.5, block=8)
    assert model[0] is model[1][0]
    assert isinstance(model[0], TicketLinear)


@pytest.mark.parametrize("block", [8, (4, 16), (5, 7)], ids=str)
def test_one_shot_keeps_the_best_blocks_of_all_layers(block):
    model = mlp()
    dense = {name: layer.weight.detach().clone() for name, layer in ticket.targets(model).items()}
    pruning = ticket.prune(model, density=0.4, block=block, method="one_shot")
    means = {name: selection.block_means(weight.abs(), selection.pair(block)) for name, weight in dense.items()}
    alive = {name: t.blocks() for name, t in ticket.tickets(model).items()}
    kept = torch.cat([means[name][alive[name]] for name in means])
    dropped = torch.cat([means[name][~alive[name]] for name in means])
    assert kept.min() > dropped.max()
    assert abs(pruning.density - 0.4) < 0.05
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, torch.where(layer.ticket.mask(), weight, 0))
        share = float(weight[layer.ticket.mask()].abs().sum() / weight.abs().sum())
        assert abs(pruning.layers[name].retained - share) < 1e-5
    whole = sum(float(w.abs().sum()) for w in dense.values())
    left = sum(float(model.get_submodule(name).weight.detach().abs().sum()) for name in dense)
    assert abs(pruning.retained - left / whole) < 1e-5


def test_scopes_and_floor():
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # a layer of small weights
    densities = {}
    for scope in ("global", "scaled", "layer"):
        pruning = ticket.prune(copy.deepcopy(model), density=0.4, block=8, scope=scope)
        densities[scope] = pruning.layers["0"].density
        assert abs(pruning.density - 0.4) < 0.02
    assert densities["global"] == 0
    assert 0.2 < densities["scaled"] < 0.6
    assert abs(densities["layer"] - 0.4) < 0.02
    pruning = ticket.prune(copy.deepcopy(model), density=0.4, block=8, floor=0.25)
    assert pruning.layers["0"].density == 0.25
    assert abs(pruning.density - 0.4) < 0.02


def test_schedules():
    near = pytest.approx
    assert selection.densities(0.7, "imp", None) == near([0.9, 0.8, 0.7])
    assert selection.densities(0.3, "imp", None) == near([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert selection.densities(0.4, "imp", 3) == near([0.8, 0.6, 0.4])
    assert selection.densities(0.2, "cubic", 2) == near([1 - 0.8 * 0.875, 0.2])
    assert selection.densities(0.2, "one_shot", None) == [0.2]
    assert selection.densities(1, "imp", None) == [1.0]


def test_block_imp_rewinds_the_backbone_and_not_the_head():
    model = classifier("bert")
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    seen = []

    def note(model):
        seen.append((pyeff.recipes.ticket.tickets(model), train(model)))
        return len(seen)

    rounds = []
    pruning = ticket.prune(
        model, note, density=0.6, block=8, rounds=3, after_round=lambda number, m: rounds.append(number)
    )
    assert rounds == [1, 2, 3]
    assert [r["returned"] for r in pruning.rounds] == [1, 2, 3]
    assert pruning.rounds[-1]["density"] == 0.6
    assert abs(pruning.density - 0.6) < 0.02
    assert [len(found) for found, _ in seen] == [0, 13, 13]
    final = ticket.tickets(model)
    for name, t in seen[1][0].items():  # blocks only die
        assert not bool((final[name].blocks() & ~t.blocks()).any())
    moved = []
    for name, value in ticket.dense_state_dict(model).items():
        layer = name.rpartition(".")[0]
        expected = before[name]
        if layer in final and name.endswith("weight"):
            expected = torch.where(final[layer].mask(), expected, 0)
        if torch.equal(value, expected):
            continue
        moved.append(name)
    assert sorted(moved) == ["classifier.bias", "classifier.weight"]


def test_without_rewinding_the_trained_weights_stay():
    model = classifier("bert")
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    ticket.prune(model, train, density=0.5, block=8, rounds=2, rewind=False)
    layer = model.bert.encoder.layer[0].output.dense
    assert not torch.equal(layer.weight, torch.where(layer.ticket.mask(), before, 0))


def test_rewinding_to_given_weights():
    model = classifier("bert")
    other = {name: t + 1 for name, t in classifier("bert").state_dict().items() if t.is_floating_point()}
    ticket.prune(model, train, density=0.5, block=8, rounds=1, rewind=other)
    layer = model.bert.encoder.layer[0].output.dense
    weight = other["bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(layer.weight, torch.where(layer.ticket.mask(), weight, 0))
    head = classifier("bert").classifier.bias
    assert not torch.equal(model.classifier.bias, other["classifier.bias"])  # the head stays as it was trained
    assert not torch.equal(model.classifier.bias, head)
    with pytest.raises(ValueError, match=r"rewind has no .*query\.weight"):
        ticket.prune(classifier("bert"), train, rewind={}, block=8)


def test_head_of_a_model_that_is_not_hugging_faces():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()

    before = copy.deepcopy(model)
    ticket.prune(model, step, density=0.9, block=8, head=["2"], exclude="2", rounds=1)
    assert not torch.equal(model[2].weight, before[2].weight)
    assert torch.equal(model[0].bias, before[0].bias)


def test_imp_masks_elements_as_in_the_paper():
    model = classifier("bert")
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    pruning = ticket.prune(model, train, density=0.7, method="imp", rounds=2)
    found = ticket.masks(model)
    assert len(found) == 13
    share = sum(int(m.sum()) for m in found.values()) / sum(m.numel() for m in found.values())
    assert abs(share - 0.7) < 1e-3
    assert abs(pruning.density - 0.7) < 1e-3
    assert pruning.layers["bert.pooler.dense"].block is None
    for name in found:
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight_orig, before[f"{name}.weight"])
        assert torch_prune.is_pruned(layer)
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    first = model.bert.encoder.layer[0].intermediate.dense.weight_orig.detach().clone()
    train(model)  # the ticket trains
    assert not torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight_orig, first)


@pytest.mark.parametrize("method", ["block_imp", "imp"])
def test_a_stopped_run_goes_on(tmp_path, method):
    pytest.importorskip("safetensors")

    class StoppedError(Exception):
        pass

    calls = []

    def step(model, stop_at=None):
        calls.append(1)
        if len(calls) == stop_at:
            raise StoppedError
        return train(model, seed=len(ticket.tickets(model)))

    options = {"density": 0.4, "block": 8, "rounds": 3, "method": method}
    whole = classifier("bert")
    expected = ticket.prune(whole, step, **options)
    calls.clear()
    path = tmp_path / "rounds.safetensors"
    with pytest.raises(StoppedError):
        ticket.prune(classifier("bert"), lambda model: step(model, 3), **options, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["rounds.safetensors"]
    calls.clear()
    model = classifier("bert")
    found = ticket.prune(model, step, **options, checkpoint=path)
    assert len(calls) == 1
    assert found.to_dict() == expected.to_dict()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in whole.state_dict().items())
    again = classifier("bert")
    assert ticket.prune(again, step, **options, checkpoint=path).density == expected.density
    assert len(calls) == 1  # all was done
    with pytest.raises(ValueError, match=r"is of a run with densities \[0.8.*, expected \[0.75"):
        ticket.prune(classifier("bert"), step, **{**options, "density": 0.25}, checkpoint=path)


def test_imp_takes_the_least_elements_of_all_layers():
    model = mlp()
    dense = {name: layer.weight.detach().clone() for name, layer in ticket.targets(model).items()}
    ticket.prune(model, lambda model: None, density=0.25, method="imp", rounds=1)
    found = ticket.masks(model)
    kept = torch.cat([dense[name][found[name]].abs() for name in dense])
    dropped = torch.cat([dense[name][~found[name]].abs() for name in dense])
    assert kept.min() > dropped.max()
    assert len(kept) == round(0.25 * (len(kept) + len(dropped)))


def test_random_blocks_depend_on_the_seed_alone():
    found = []
    for seed in (0, 0, 1):
        model = mlp()
        ticket.prune(model, density=0.5, block=8, method="random", seed=seed)
        found.append(ticket.tickets(model))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_scores_of_ones_own():
    model = mlp()

    def score(name, layer):
        worth = torch.zeros(layer.out_features, layer.in_features)
        worth[:8] = 1
        return worth

    ticket.prune(model, density=0.2, block=8, scope="layer", score=score)
    assert all(bool(t.blocks()[0].any()) for t in ticket.tickets(model).values())
    with pytest.raises(ValueError, match=r"score gives \[3\] for 0, expected a tensor"):
        ticket.prune(mlp(), density=0.2, block=8, score=lambda name, layer: torch.zeros(3))
    with pytest.raises(ValueError, match="score gives NaN for 0"):
        ticket.prune(mlp(), density=0.2, block=8, score=lambda name, layer: layer.weight.detach() * float("nan"))


def test_pruning_goes_on_from_a_ticket():
    model = mlp()
    ticket.prune(model, density=0.6, block=8)
    first = ticket.tickets(model)
    parameter = model[0].values
    ticket.prune(model, density=0.3, block=8)
    assert model[0].values is parameter
    for name, t in ticket.tickets(model).items():
        assert not bool((t.blocks() & ~first[name].blocks()).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density is 1.5, expected a number from 0 to 1"),
        ({"density": True}, "density is True"),
        ({"method": "movement"}, "method is 'movement', expected one of 'block_imp', 'imp'"),
        ({"train": 3}, "train is a int, expected a callable"),
        ({"method": "block_imp"}, "train is None with method 'block_imp'"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of 'imp', 'cubic', 'one_shot'"),
        ({"rounds": 0}, "rounds is 0, expected an integer of at least 1"),
        ({"rounds": 3}, "rounds is 3 with schedule 'one_shot'"),
        ({"scope": "model"}, "scope is 'model', expected one of 'global', 'scaled', 'layer'"),
        ({"floor": 0.9}, "floor is 0.9, expected a number from 0 to the density 0.3"),
        ({"block": 0}, "block is 0, expected one positive number"),
        ({"block": (8, 8, 8)}, r"block is \(8, 8, 8\), expected one positive number or \(bo, bi\)"),
    ],
)
def test_bad_options(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ticket.prune(model, **options)
    assert all(type(m) is nn.Linear for m in ticket.targets(model).values())


def test_kinds_of_masks_are_not_mixed():
    model = mlp()
    ticket.prune(model, density=0.5, block=8)
    with pytest.raises(ValueError, match="0 is a ticket of blocks"):
        ticket.prune(model, lambda m: None, method="imp")
    with pytest.raises(ValueError, match=r"block is \(16, 16\), expected \(8, 8\) as 0 has it"):
        ticket.prune(model, density=0.2, block=16)
    model = mlp()
    ticket.mask(model, {"0": torch.ones(48, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="0 has a mask of elements"):
        ticket.prune(model, density=0.2, block=8)


def test_results_as_numbers_and_as_a_table():
    pruning = ticket.prune(mlp(), density=0.5, block=8)
    facts = pruning.to_dict()
    assert facts["density"] == pruning.density
    assert set(facts["layers"]) == {"0", "2"}
    pytest.importorskip("rich")
    assert pruning.table().row_count == 3


def test_examples():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(pyeff.recipes.ticket, optionflags=flags)
    assert result.attempted
    assert not result.failed
