"""Models in which a layer or a weight stands in more than one place, and what else hangs on a layer."""

from __future__ import annotations

import pytest
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


def test_files_of_a_layer_in_two_places(tmp_path):
    pytest.importorskip("safetensors")
    model, x = shared(), torch.randn(3, 16)
    dense = {name: list(t.shape) for name, t in model.state_dict().items()}
    ticket.prune(model, density=0.5, block=8, include=".")
    expected = model(x)
    assert {name: list(t.shape) for name, t in ticket.dense_state_dict(model).items()} == dense
    twin = shared()
    twin.load_state_dict(ticket.dense_state_dict(model))
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-6)
    path = tmp_path / "model.safetensors"
    ticket.save(model, path)
    other = shared()
    ticket.prune(other, density=0.25, block=4, include=".")
    apart = shared()
    apart[2][0] = nn.Linear(16, 16)
    for target in (twin, other, apart):
        ticket.load(target, path)
        assert torch.equal(target(x), expected)
        assert (target[0] is target[2][0]) == (target is not apart)
    smaller = ticket.select(apart, 0.25, include="^0$")
    with pytest.raises(ValueError, match=r"install: 2\.0 and 0 are one layer with two tickets"):
        ticket.install(other, smaller | {"2.0": other[0].ticket})
    ticket.install(apart, smaller)
    ticket.save(apart, path)
    with pytest.raises(ValueError, match=r"2\.0 and 0 are one layer, expected one ticket for both"):
        ticket.load(twin, path)
    assert torch.equal(twin(x), expected)


def test_a_fused_activation_of_a_shared_feed_forward_layer_is_read_again(tmp_path):
    pytest.importorskip("safetensors")

    def build(share):
        torch.manual_seed(0)
        first, second = (nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        return nn.Sequential(first, nn.Sequential(first if share else second))

    model, x = build(True), torch.randn(3, 16)
    ticket.prune(model, density=0.5, block=8, include=".")
    expected = model(x)
    assert ticket.fuse_activations(model) == ["0.0"]
    path = tmp_path / "model.safetensors"
    ticket.save(model, path)
    for share in (True, False):
        found = ticket.load(build(share), path)
        assert found[0][0].activation == "gelu"
        torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-6)


def test_masks_of_a_layer_in_two_places():
    model, x = shared(), torch.randn(3, 16)
    ticket.mask(model, {"0": torch.rand(16, 16) < 0.5})
    twin = shared()
    ticket.load_masked(twin, model.state_dict())
    assert torch.equal(twin(x), model(x))
    pruning = ticket.blockify(model, 8, density=0.5)
    assert list(pruning.layers) == ["0"]
    assert model[0] is model[2][0]
    assert model[0].ticket.nnz == 2


def test_a_shared_layer_goes_by_any_of_its_names():
    model = shared()
    ticket.install(model, {"2.0": ticket.select(model, 0.5, 8, include=".")["0"]})
    assert model[0] is model[2][0]
    assert model[0].ticket.nnz == 2


def test_a_weight_of_two_modules_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Embedding(16, 16))
    found, calls = ticket.select(model, 0.5, 8), []
    for other, message in ((2, "weight of 0 is 2.weight too"), (3, "weight of 0 is 3.weight too")):
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Embedding(16, 16))
        model[other].weight = model[0].weight
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=f"install: the {message}, expected one that no other module has"):
            ticket.install(model, found, optimizers=[optimizer])
        with pytest.raises(ValueError, match=f"prune: the {message}"):
            ticket.prune(model, calls.append, density=0.5, block=8)
        assert not calls
        assert type(model[0]) is type(model[2]) is nn.Linear
        ticket.prune(model, calls.append, density=0.5, method="imp")  # masks leave it shared
        assert model[0].weight_orig is getattr(model[other], "weight_orig" if other == 2 else "weight")
        calls.clear()


def test_hooks_go_with_the_layer_and_come_back():
    model, calls = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
        model[0].register_full_backward_pre_hook(lambda *_: calls.append("back")),
        model[0].register_full_backward_hook(lambda *_: calls.append("done")),
    ]
    x = torch.randn(3, 16, requires_grad=True)

    def heard():
        calls.clear()
        model(x).sum().backward()
        return calls

    everything = heard().copy()
    assert sorted(everything) == ["after", "back", "before", "done"]
    ticket.prune(model, density=0.5, block=8)
    assert heard() == everything
    ticket.fuse_activations(model)
    ticket.to_dense(model)
    assert heard() == everything
    ticket.mask(model, {"0": torch.rand(16, 16) < 0.5})
    ticket.blockify(model, 8)
    assert heard() == everything
    for handle in handles:
        handle.remove()
    assert not heard()
