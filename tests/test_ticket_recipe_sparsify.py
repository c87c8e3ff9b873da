"""pyeff.recipes.ticket.sparsify on models that are not plain, and the times of whole models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_measure as measure
from pyeff.recipes import ticket
from tests.ticket_models import classifier, inputs, mlp


@pytest.fixture
def faster(monkeypatch):
    """Says how many seconds (dense, ticket) take, whatever layer it is."""

    def say(dense, sparse):
        times = {"dense": (dense, dense), "ticket": (sparse, sparse)}
        monkeypatch.setattr(measure, "compare", lambda layers, given: times)

    say(2.0, 1.0)
    return say


def test_every_module_stays_in_its_mode(faster):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 16)).train()
    model[1].eval()  # frozen
    before = model[1].running_mean.clone()
    ticket.sparsify(model, torch.randn(4, 16), density=0.5, block=8)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert torch.equal(model[1].running_mean, before)


def test_a_model_that_stays_dense_is_saved(tmp_path, faster):
    """Nothing was faster as a ticket: the file has the model as it is, for one that was pruned, too."""
    pytest.importorskip("safetensors")
    faster(1.0, 2.0)
    model, fresh, pruned = classifier("bert"), classifier("bert"), classifier("bert")
    found = ticket.sparsify(model, inputs(), density=0.5, block=8)
    assert {row.chosen for row in found.layers.values()} == {"dense"}
    ticket.save(model, tmp_path / "a")
    ticket.prune(pruned, density=0.5, block=8)
    ticket.fuse_qkv(pruned)
    for target in (fresh, pruned):
        with torch.no_grad():
            target.classifier.weight.zero_()
        assert ticket.load(target, tmp_path / "a") is target
        assert not ticket.tickets(target)
        assert torch.equal(target(**inputs()).logits, model(**inputs()).logits)


def fused():
    model = classifier("bert")
    ticket.prune(model, density=0.5, block=8)
    ticket.fuse_qkv(model)
    ticket.fuse_activations(model)
    return model


@pytest.mark.parametrize("fuse", [False, True])
def test_what_is_fused_stays_fused_with_its_parameters(faster, fuse):
    model = fused()
    expected, parameters, names = model(**inputs()).logits, dict(model.named_parameters()), list(model.state_dict())
    found = ticket.sparsify(model, inputs(), fuse=fuse)
    assert any(name.endswith("attention.self.query") for name in found.layers)  # measured apart
    assert list(model.state_dict()) == names
    kept = {name for name, p in model.named_parameters() if p is parameters[name]}
    assert kept == set(names) & parameters.keys()
    assert torch.equal(model(**inputs()).logits, expected)
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.ticket_qkv.values.zero_()
        assert torch.equal(attention.query(torch.ones(3, 32))[0], attention.ticket_qkv.bias[:32])


@pytest.mark.parametrize(
    "options", [{"density": -1}, {"density": 0.5, "scope": "nah"}, {"density": 0.5, "floor": 0.9},
                {"density": 0.5, "block": 0}, {"density": 0.5, "include": "nothing"}],
    ids=str,
)  # fmt: skip
def test_bad_options_leave_a_fused_model_alone(options):
    model = fused()
    before, parameters = list(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"density|scope|floor|block|include"):
        ticket.sparsify(model, inputs(), **options)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before]
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_fused_layers_that_are_slower_come_apart(faster):
    model = fused()
    expected = model(**inputs()).logits
    faster(1.0, 2.0)
    ticket.sparsify(model, inputs())
    assert not ticket.tickets(model)
    torch.testing.assert_close(model(**inputs()).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_ticket_that_the_sample_does_not_reach_stays(faster):
    faster(1.0, 2.0)
    model = classifier("bert")
    ticket.prune(model, density=0.5, block=8)
    pooler = model.bert.pooler.dense
    found = ticket.sparsify(model, lambda m: m.bert.encoder(torch.randn(2, 7, 32)))
    row = found.layers["bert.pooler.dense"]
    assert (row.tokens, row.chosen, row.density) == (0, "ticket", pooler.density)
    assert model.bert.pooler.dense is pooler
    assert list(ticket.tickets(model)) == ["bert.pooler.dense"]


def test_whole_models_take_turns_forward_in_evaluation_and_step_in_training(monkeypatch):
    seen = []

    def race(contenders, device):
        for run in contenders.values():
            run()
        return {name: float(len(seen)) for name in contenders}

    class Watched(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.inner, self.frozen = name, mlp(), nn.Dropout().eval()

        def forward(self, x):
            seen.append((self.name, self.training, self.frozen.training, torch.is_grad_enabled()))
            return self.inner(x)

    monkeypatch.setattr(measure, "race", race)
    models = {name: Watched(name) for name in ("dense", "ticket")}
    found = measure.compare_models(models, torch.randn(3, 32), torch.device("cpu"))
    assert found == {"dense": (2.0, 4.0), "ticket": (2.0, 4.0)}  # one race of both for each of the two
    assert seen == [
        ("dense", False, False, False), ("ticket", False, False, False),
        ("dense", True, True, True), ("ticket", True, True, True),
    ]  # fmt: skip
    assert all(m.training and not m.frozen.training for m in models.values())
    assert isinstance(models["dense"].inner[0], nn.Linear)
    assert not isinstance(models["dense"].inner[0], TicketLinear)
