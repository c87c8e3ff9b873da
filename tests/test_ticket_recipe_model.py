"""Tickets in a model: fused attention, installing under an optimizer, measuring, files, and the dense model again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyeff
from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_measure as measure
from pyeff.recipes import ticket
from tests.ticket_models import classifier, inputs, mlp


def pruned(kind="bert", density=0.5, block=8):
    model = classifier(kind)
    ticket.prune(model, density=density, block=block)
    return model


def gradients(model):
    model.zero_grad()
    model(**inputs()).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_fused_attention_is_the_same_and_comes_apart_again(kind):
    model = pruned(kind)
    before, plain = model(**inputs()).logits, gradients(model)
    state, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    paths = ticket.fuse_qkv(model)
    assert len(paths) == 2
    calls = []
    attention = model.get_submodule(paths[0])
    attention.ticket_qkv.register_forward_hook(lambda *_: calls.append(1))
    assert attention.ticket_qkv.out_features == 96
    torch.testing.assert_close(model(**inputs()).logits, before, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1  # one product where there were three
    assert attention.query.shared.last is None  # nothing is kept behind the call
    fused = gradients(model)
    whole = fused[f"{paths[0]}.ticket_qkv.bias"]
    parts = [plain[f"{paths[0]}.{name}.bias"] for name in ("query", "key", "value")]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-6)
    assert ticket.fuse_qkv(model) == []
    assert ticket.split_qkv(model) == paths
    assert sorted(model.state_dict()) == sorted(names)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())


def test_fused_models_copy_pickle_compile_and_train():
    model = pruned()
    ticket.fuse_qkv(model)
    expected = model(**inputs()).logits
    model(**inputs()).logits.sum().backward()  # a graph that a copy must not meet
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs()).logits, expected)
        with torch.no_grad():
            other.bert.encoder.layer[0].attention.self.ticket_qkv.values.zero_()
        assert not torch.equal(other(**inputs()).logits, expected)
    assert torch.equal(model(**inputs()).logits, expected)
    attention = model.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 7, 32)
    compiled = torch.compile(lambda x: attention.query(x) + attention.key(x) * attention.value(x), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    eager = attention.query(x) + attention.key(x) * attention.value(x)
    torch.testing.assert_close(compiled(x), eager, rtol=1e-5, atol=1e-6)


def test_parts_of_a_fused_attention_may_be_asked_in_any_order():
    model = pruned()
    attention = model.bert.encoder.layer[0].attention.self
    names = ("query", "key", "value")
    parts = {name: copy.deepcopy(getattr(attention, name)) for name in names}
    ticket.fuse_qkv(model)
    x, y = torch.randn(3, 32), torch.randn(3, 32)
    for name, given in [("value", x), ("query", y), ("value", y), ("key", x), ("key", x), ("query", x), ("value", x)]:
        torch.testing.assert_close(getattr(attention, name)(given), parts[name](given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_activation_checkpointing(fused):
    model = pruned().train()
    expected = gradients(model)
    if fused:
        ticket.fuse_qkv(model)
        ticket.fuse_activations(model)
    # transformers 5 has a new name for it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found = gradients(model)
    if fused:
        ticket.split_qkv(model)
        assert found["bert.pooler.dense.bias"] is not None
        expected = {name: grad for name, grad in expected.items() if "attention.self" not in name}
    assert expected.keys() <= found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_fused_activations_are_the_same_and_come_apart_again(kind):
    model = pruned(kind)
    before, names = model(**inputs()).logits, list(model.state_dict())
    original = [m.intermediate_act_fn for m in model.modules() if hasattr(m, "intermediate_act_fn")]
    paths = ticket.fuse_activations(model)
    assert [path.rpartition(".")[0].rpartition(".")[2] for path in paths] == ["intermediate"] * 2
    assert model.get_submodule(paths[0]).activation == "gelu"
    torch.testing.assert_close(model(**inputs()).logits, before, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(model)
    assert ticket.fuse_activations(model) == []
    for other in (model, twin):
        assert ticket.split_activations(other) == paths
        assert list(other.state_dict()) == names
        torch.testing.assert_close(other(**inputs()).logits, before, rtol=1e-5, atol=1e-6)
    assert [m.intermediate_act_fn for m in model.modules() if hasattr(m, "intermediate_act_fn")] == original


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activations_of_torchs_own_layers(activation):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True), 2)
    ticket.prune(model, density=0.5, block=8)
    x = torch.randn(2, 5, 16)
    before, functions = model(x), [layer.activation for layer in model.layers]
    assert ticket.fuse_activations(model) == ["layers.0.linear1", "layers.1.linear1"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert len(ticket.split_activations(model)) == 2
    assert [layer.activation for layer in model.layers] == functions
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), before, rtol=1e-5, atol=1e-6)


def test_other_activations_stay():
    model = nn.Sequential(
        nn.Linear(16, 16), nn.GELU("tanh"), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.SiLU()
    )
    ticket.prune(model, density=0.5, block=8)
    assert ticket.fuse_activations(model, only=["0"]) == []
    assert ticket.fuse_activations(model) == ["2"]


def test_attentions_that_cannot_be_fused_stay():
    model = pruned(block=32)  # query, key and value of one block each
    assert len(ticket.fuse_qkv(model)) == 2
    model = classifier("bert")
    ticket.prune(model, density=0.5, block=8, include="query|key")
    assert ticket.fuse_qkv(model) == []
    model = classifier("bert")
    ticket.prune(model, density=0.5, block=(5, 8))  # a block would be cut
    assert ticket.fuse_qkv(model) == []
    assert ticket.split_qkv(model) == []
    model = pruned()
    assert len(ticket.fuse_qkv(model, only=["bert.encoder.layer.1.attention.self"])) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_files(tmp_path, fused):
    pytest.importorskip("safetensors")
    model = pruned()
    if fused:
        ticket.fuse_qkv(model)
        ticket.fuse_activations(model)
    path = tmp_path / "model.safetensors"
    ticket.save(model, path)
    fresh, other = classifier("bert"), pruned(density=0.2, block=16)
    with torch.no_grad():
        fresh.classifier.weight.zero_()
    for target in (fresh, other):
        assert ticket.load(target, path) is target
        assert torch.equal(target(**inputs()).logits, model(**inputs()).logits)
        assert target.state_dict().keys() == model.state_dict().keys()
    dense = classifier("bert")
    dense.load_state_dict(ticket.dense_state_dict(model))
    torch.testing.assert_close(dense(**inputs()).logits, model(**inputs()).logits, rtol=1e-5, atol=1e-6)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    path, broken = tmp_path / "model.safetensors", tmp_path / "broken.safetensors"
    ticket.save(pruned(), path)
    masked = mlp()
    ticket.mask(masked, {"0": masked[0].weight > 0})
    with pytest.raises(ValueError, match="0 has a mask of elements, expected tickets of blocks"):
        ticket.save(masked, broken)
    model = mlp()
    with pytest.raises(ValueError, match=r"does not fit: 0.bias is missing"):
        ticket.load(model, path)
    assert type(model[0]) is nn.Linear
    broken.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        ticket.load(model, broken)
    save_file({"0.bias": torch.zeros(3)}, broken)
    with pytest.raises(ValueError, match="no pyeff configuration"):
        ticket.load(model, broken)
    save_file({"0.bias": torch.zeros(3)}, broken, {"pyeff": '{"recipe": "read", "version": 1}'})
    with pytest.raises(ValueError, match="is of the recipe 'read', version 1, expected 'ticket'"):
        ticket.load(model, broken)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("index"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, broken, metadata)
    with pytest.raises(ValueError, match="broken configuration: Ticket: index"):
        ticket.load(classifier("bert"), broken)


def test_back_to_dense_layers():
    model = pruned()
    expected = model(**inputs()).logits
    ticket.fuse_qkv(model)
    assert ticket.to_dense(model) is model
    assert not any(isinstance(m, TicketLinear) for m in model.modules())
    torch.testing.assert_close(model(**inputs()).logits, expected, rtol=1e-5, atol=1e-6)
    alone = TicketLinear(pyeff.Ticket.from_blocks(torch.eye(2, dtype=torch.bool), (16, 16), 8), activation="relu")
    x = torch.randn(3, 16)
    torch.testing.assert_close(ticket.to_dense(alone)(x), alone(x), rtol=1e-5, atol=1e-6)


def test_masks_change_under_an_optimizer():
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (model, twin))
    x = torch.randn(6, 32)

    def step(m, o):
        o.zero_grad()
        m(x).square().mean().backward()
        for name, t in ticket.tickets(model).items():  # the twin: a dense layer whose dead blocks get no gradient
            if m is twin:
                m.get_submodule(name).weight.grad.mul_(t.mask())
        o.step()

    for density in (0.9, 0.7, 0.5):
        step(model, optimizer)
        step(twin, reference)
        ticket.install(model, ticket.select(model, density, 8), optimizers=[optimizer])
        for name, t in ticket.tickets(model).items():
            layer, dense = model.get_submodule(name), twin.get_submodule(name)
            with torch.no_grad():
                dense.weight.mul_(t.mask())
            for key in ("exp_avg", "exp_avg_sq"):
                moment = reference.state[dense.weight][key].mul_(t.mask())
                torch.testing.assert_close(optimizer.state[layer.values][key], t.gather(moment), rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(layer.weight, dense.weight, rtol=1e-5, atol=1e-7)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_gradual_pruning_of_a_training():
    model, x = mlp(), torch.randn(6, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gradual = ticket.Gradual(model, optimizer, density=0.2, begin=1, end=7, every=3, block=8)
    densities = []
    for _ in range(10):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if gradual.step():
            found = ticket.tickets(model).values()
            densities.append(sum(t.mask().sum().item() for t in found) / sum(t.mask().numel() for t in found))
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    shares = [1 - (1 - (i + 1) / 3) ** 3 for i in range(3)]
    assert densities == pytest.approx([1 - 0.8 * share for share in shares], abs=0.03)
    again = ticket.Gradual(model, [optimizer], density=0.2, end=5, block=8)
    again.load_state_dict(gradual.state_dict())
    assert again.steps == 10
    for options, message in [
        ({"end": -1}, "end is -1, expected an integer of at least 0"),
        ({"end": 5, "every": 0}, "every is 0, expected an integer of at least 1"),
        ({"end": 5, "schedule": "one_shot"}, "schedule is 'one_shot', expected 'cubic' or 'imp'"),
        ({"end": 5, "block": 0}, "block is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.Gradual(model, optimizer, **options)


def test_blocks_that_live_again_take_given_weights():
    model = mlp()
    ticket.prune(model, density=0.3, block=8)
    old = model[0].ticket
    grown = ticket.select(model, 0.6, 8, grow=True, score=lambda name, layer: torch.rand(layer.weight.shape))
    fill = torch.full((48, 32), 7.0)
    ticket.install(model, grown, weights={"0": fill})
    new = model[0].ticket
    fresh = new.mask() & ~old.mask()
    assert bool(fresh.any())
    assert bool((model[0].weight[fresh] == 7).all())
    assert not bool((model[0].weight[new.mask() & old.mask()] == 7).any())


def test_bad_installations_change_nothing():
    model, good = mlp(), pyeff.Ticket.from_mask(torch.ones(48, 32, dtype=torch.bool), 8)
    for tickets, weights, message in [
        ({"0": good, "1": good}, {}, "1 is a GELU, expected a torch.nn.Linear or TicketLinear"),
        ({"0": good, "nothing": good}, {}, "nothing is a NoneType"),
        (
            {"0": good, "2": good},
            {},
            r"the ticket of 2 is Ticket\(shape=\(48, 32\).*expected a pyeff.Ticket of \[36, 48",
        ),
        ({"0": good}, {"0": torch.zeros(3, 3)}, r"the weight of 0 has shape \[3, 3\], expected \[48, 32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.install(model, tickets, weights=weights)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_sparsify_keeps_what_is_faster(monkeypatch, mode):
    seconds = {"dense": (2.0, 1.0), "ticket": (1.0, 2.0)}  # a ticket is faster forward, and slower in training
    monkeypatch.setattr(measure, "compare", lambda layers, given: seconds)
    model = classifier("bert")
    before = copy.deepcopy(model)
    seen = []
    found = ticket.sparsify(
        model, inputs(), density=0.5, block=8, mode=mode, fuse=True, progress=lambda name, i, n: seen.append((i, n))
    )
    assert seen == [(i, 13) for i in range(13)]
    assert {row.chosen for row in found.layers.values()} == {"ticket" if mode == "inference" else "dense"}
    assert {row.tokens for name, row in found.layers.items() if "pooler" not in name} == {14}
    total = found.total()
    if mode == "inference":
        assert len(ticket.tickets(model)) == 2 * 4 + 1
        assert total["density"] == pytest.approx(0.5, abs=0.02)
        assert total["forward"] == 13
        assert total["dense_forward"] == 26
        assert total["training_bytes"] < 0.6 * total["dense_training_bytes"]
    else:
        assert torch.equal(model(**inputs()).logits, before(**inputs()).logits)  # dense layers are not pruned
        assert total["bytes"] == total["dense_bytes"]
    assert found.to_dict()["total"] == total
    pytest.importorskip("rich")
    assert found.table().row_count == 14


def test_sparsify_measures_what_is_there():
    model = pruned()
    expected = model(**inputs()).logits
    found = ticket.sparsify(model, inputs())
    assert len(found.layers) == 13
    for row in found.layers.values():
        assert min(*row.dense, *row.ticket) > 0
        assert row.chosen == ("ticket" if row.ticket[0] < row.dense[0] else "dense")
        assert row.retained == 1.0
    torch.testing.assert_close(model(**inputs()).logits, expected, rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in model.parameters())


def test_sparsify_leaves_what_the_sample_does_not_reach():
    model = classifier("bert")
    found = ticket.sparsify(model, lambda m: m.bert.encoder(torch.randn(2, 7, 32)), density=0.5, block=8)
    row = found.layers["bert.pooler.dense"]
    assert (row.tokens, row.chosen) == (0, "dense")


def test_bad_calls_of_sparsify():
    given = pyeff.Ticket.from_mask(torch.ones(48, 32, dtype=torch.bool), 8)
    for options, message in [
        ({}, "neither density nor tickets were given"),
        ({"tickets": {}}, "neither density nor tickets were given"),
        ({"density": 0.5, "tickets": {"0": given}}, "density and tickets were both given"),
        ({"density": 0.5, "mode": "speed"}, "mode is 'speed', expected one of 'inference', 'training', 'all'"),
        ({"density": -1}, "density is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ticket.sparsify(mlp(), torch.randn(3, 32), **options)
