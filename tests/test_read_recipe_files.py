"""Files of pyeff.recipes.read: what loads, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from pyeff.recipes import _files, read
from tests.test_read_recipe_attachment import make, randomise

safetensors_torch = pytest.importorskip("safetensors.torch")


def untouched(model):
    hooks = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "read_adapter") for m in model.modules())
    return not hooks and all(p.requires_grad for p in model.parameters())


@pytest.fixture
def saved(tmp_path):
    """A path with an adapter in it, its tensors and its configuration."""
    path = tmp_path / "adapter.safetensors"
    with read.attach(make(), 8) as attachment:
        attachment.save(path)
        return path, attachment.state_dict(), attachment.config


def write(path, tensors, config):
    safetensors_torch.save_file(tensors, path, {"pyeff": config if isinstance(config, str) else json.dumps(config)})


def test_files_that_do_not_fit_change_nothing(tmp_path):
    model, path = make(), tmp_path / "adapter.safetensors"
    with read.attach(model, 8) as attachment:
        attachment.save(path)
    for kwargs, message in [
        ({"rank": 4}, "rank is 8 in the file, expected 4"),
        ({"cell": "rnn"}, "cell is 'gru' in the file, expected 'rnn'"),
        ({"layers": [1]}, "stacks is"),
        ({"train": ("head",)}, "train is"),
        ({"scale": 2.0}, "scale is 1.0 in the file, expected 2.0"),
    ]:
        with read.attach(model, **{"rank": 8} | kwargs) as other:
            before = {name: t.clone() for name, t in other.state_dict().items()}
            with pytest.raises(ValueError, match=message):
                other.load(path)
            assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    with read.attach(model, 8) as attachment:
        before = {name: t.clone() for name, t in attachment.state_dict().items()}
        tensors = {name: torch.ones_like(t) for name, t in before.items()}
        metadata = {"pyeff": json.dumps(attachment.config)}
        tensors["adapter.weight_hh_l0"] = torch.ones(3, 3)
        safetensors_torch.save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"adapter.weight_hh_l0 has shape \[3, 3\], expected \[24, 8\]"):
            attachment.load(path)
        tensors["other"] = tensors.pop("adapter.weight_hh_l0")
        safetensors_torch.save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"adapter\.weight_hh_l0 is missing; other was not expected"):
            attachment.load(path)
        safetensors_torch.save_file(tensors, path)
        with pytest.raises(ValueError, match="no pyeff configuration"):
            attachment.load(path)
        assert all(torch.equal(before[name], t) for name, t in attachment.state_dict().items())


def test_loading_casts_floating_point_and_nothing_else(tmp_path):
    model, path = make(), tmp_path / "adapter.safetensors"
    model.head.register_buffer("seen", torch.tensor(3))
    with read.attach(model, 8, train=("head",)) as attachment:
        randomise(attachment)
        attachment.save(path)
        saved = {name: t.clone() for name, t in attachment.state_dict().items()}
    for dtype in (torch.float64, torch.bfloat16):
        with read.attach(model, 8, train=("head",), dtype=dtype) as other:
            other.load(path)
            assert other.adapter.weight_ih_l0.dtype == dtype
            assert all(torch.equal(t, saved[name].to(t.dtype)) for name, t in other.state_dict().items())
    model.head.seen = torch.tensor(0.0)
    with read.attach(model, 8, train=("head",)) as other:
        randomise(other, seed=4)
        before = {name: t.clone() for name, t in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"train\.head\.seen has dtype torch\.int64, expected torch\.float32"):
            other.load(path)
        assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_broken_files_are_value_errors(saved):
    path, _, _ = saved
    whole, model = path.read_bytes(), make()
    for broken in (b"", b"not a safetensors file at all", whole[:-8], whole[:40]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read, expected a safetensors file"):
            read.from_file(model, path)
        assert untouched(model)
        with read.attach(model, 8) as attachment, pytest.raises(ValueError, match="cannot be read"):
            attachment.load(path)
    with pytest.raises(FileNotFoundError):
        read.from_file(model, path.with_name("missing"))
    assert untouched(model)


@pytest.mark.parametrize("name", ["rank", "cell", "stacks", "train", "tasks", "joiner"])
def test_a_configuration_without_a_key_is_a_value_error(saved, name):
    path, tensors, config = saved
    model = make()
    write(path, tensors, {key: value for key, value in config.items() if key != name})
    with pytest.raises(ValueError, match=f"has a configuration without {name}"):
        read.from_file(model, path)
    assert untouched(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, expected 1"),
        ({"version": None}, "has version None, expected 1"),
        ({"recipe": "other"}, "is of the recipe 'other', expected 'read'"),
        ({"stacks": [3]}, r"a configuration with stacks \[3\]"),
        ({"stacks": {"adapter": {"of": 3}}}, "a configuration with stack {'of': 3}"),
        ({"train": 3}, "a configuration with train 3"),
        ({"tasks": 3}, "a configuration with tasks 3"),
        ("[1]", "has a list as its configuration"),
        ("{", "has a configuration that is no JSON"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_a_value_error(saved, change, message):
    path, tensors, config = saved
    model = make()
    write(path, tensors, change if isinstance(change, str) else config | change)
    with pytest.raises(ValueError, match=message):
        read.from_file(model, path)
    assert untouched(model)


def test_any_failure_of_loading_leaves_the_model_as_it_was(saved, monkeypatch):
    path, _, _ = saved
    model = make()
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*args, error=error):
            raise error("on the way")

        monkeypatch.setattr(_files, "load", fail)
        with pytest.raises(error, match="on the way"):
            read.from_file(model, path)
        assert untouched(model)
