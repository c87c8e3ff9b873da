"""Pruned models in files: tickets in safetensors, and as the dense weights of the model that was pruned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.nn._ticket_fused import Projection, unstack
from pyeff.plans import Ticket
from pyeff.recipes import _files
from pyeff.recipes._ticket_activations import applied, fuse_activations, split_activations
from pyeff.recipes._ticket_install import install
from pyeff.recipes._ticket_masks import _MASK
from pyeff.recipes._ticket_qkv import CHILD, fuse_qkv, split_qkv
from pyeff.recipes._ticket_targets import replace

_VERSION = 1


def _parts(model: nn.Module) -> tuple[dict[str, TicketLinear], dict[str, str]]:
    """Every ticket by the path that it has when nothing is fused, and the fused attentions with their layer's path.

    What stands in several places has several paths, as in the state dict.
    """
    layers: dict[str, TicketLinear] = {}
    fused: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = {name: m for name, m in module.named_children() if isinstance(m, Projection)}
        if parts:
            shared = next(iter(parts.values())).shared
            split = unstack(shared.layer, shared.sizes)
            prefix = f"{path}." if path else ""
            fused[path] = prefix + CHILD
            layers |= {prefix + name: split[part.part] for name, part in parts.items()}
        elif isinstance(module, TicketLinear) and path.rpartition(".")[2] != CHILD:
            layers[path] = module
    return layers, fused


def _plain(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, TicketLinear], list[str]]:
    """The state dict as if nothing was fused, without the tickets' entries; the tickets; the fused attentions."""
    layers, fused = _parts(model)
    hidden = tuple(f"{path}." for path in (*layers, *fused.values()))
    rest = {name: t for name, t in model.state_dict().items() if not hidden or not name.startswith(hidden)}
    return rest, layers, list(fused)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before pruning, with zeros where no block lives.

    Args:
        model (Module): with tickets, fused or not; it stays as it is.

    Returns:
        dict of Tensor: for ``load_state_dict`` of a model that was never pruned.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> pruned, fresh = (torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(2))
        >>> _ = ticket.prune(pruned, density=0.5, block=8)
        >>> fresh.load_state_dict(ticket.dense_state_dict(pruned))
        <All keys matched successfully>
    """
    state, layers, _ = _plain(model)
    for path, layer in layers.items():
        state[f"{path}.weight"] = layer.weight.detach()
        if layer.bias is not None:
            state[f"{path}.bias"] = layer.bias.detach()
    return state


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a pruned model as safetensors: living blocks, their index, and all else that the model has.

    Args:
        model (Module): with tickets, or with none, as :func:`sparsify` leaves a model of which every layer is faster
            dense: all of it is then written as it is. It stays as it is. Fused attentions are written as three layers.
        path (path): the file.

    Raises:
        ValueError: the model has masks of elements and no ticket.

    Example:
        >>> import tempfile, torch
        >>> from pyeff.recipes import ticket
        >>> pruned, fresh = (torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(2))
        >>> _ = ticket.prune(pruned, density=0.5, block=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ticket.save(pruned, f"{folder}/model.safetensors")
        ...     fresh = ticket.load(fresh, f"{folder}/model.safetensors")
        >>> torch.equal(fresh[0].values, pruned[0].values)
        True
    """
    state, layers, fused = _plain(model)
    masked = [name.removesuffix(_MASK) for name in state if name.endswith(_MASK)]
    if masked and not layers:
        raise ValueError(f"save: {masked[0]} has a mask of elements, expected tickets of blocks: see blockify")
    config: dict[str, Any] = {"recipe": "ticket", "version": _VERSION, "fused": sorted(fused), "layers": {}}
    behind = {id(layer) for _, layer, *_ in applied(model)}
    config["activations"] = sorted(name for name, layer in layers.items() if id(layer) in behind)
    for name, layer in layers.items():
        config["layers"][name] = {
            "shape": [layer.out_features, layer.in_features],
            "block": list(layer.block),
            "activation": layer.activation,
        }
        state |= {f"{name}.{key}": t for key, t in layer.state_dict().items()}
    _files.save(path, state, config)


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Reads what :func:`save` wrote into a model of the same architecture, pruned or not.

    Args:
        model (Module): changed in place: its layers become tickets where the file has one, and dense elsewhere.
        path (path): the file.

    Returns:
        Module: the model. See :func:`save` for an example.

    Raises:
        ValueError: the file is broken, not of this recipe, or does not fit; the model is then as it was.
        OSError: the file cannot be opened.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> ticket.load(torch.nn.Linear(4, 4), "nowhere.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No such file or directory: nowhere.safetensors
    """
    from safetensors.torch import load_file

    config, where = _files.read_config(path), os.fspath(path)
    if config.get("recipe") != "ticket" or config.get("version") != _VERSION:
        came = f"the recipe {config.get('recipe')!r}, version {config.get('version')!r}"
        raise ValueError(f"{where} is of {came}, expected 'ticket', version {_VERSION}")
    with _files._readable(path):
        state = load_file(where)
    found = _tickets(config, state, where)
    _check(model, state, found, where)
    split_qkv(model)
    split_activations(model)
    kept = {id(module) for name, module in model.named_modules(remove_duplicate=False) if name in found}
    for module in list(model.modules()):
        if isinstance(module, TicketLinear) and id(module) not in kept:
            replace(model, module, module.to_linear())
    install(model, found)
    for name in found:
        own = None if name in config["activations"] else config["layers"][name]["activation"]
        layer: Any = model.get_submodule(name)
        layer.activation = own
    model.load_state_dict(state)
    fuse_qkv(model, config["fused"])
    fuse_activations(model, config["activations"])
    return model


def _tickets(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> dict[str, Ticket]:
    found = {}
    try:
        for name, layer in config["layers"].items():
            found[name] = Ticket(state[f"{name}.index"], layer["shape"], layer["block"])
            expected = [found[name].nnz, *found[name].block]
            if list(state[f"{name}.values"].shape) != expected:
                raise ValueError(f"{name}.values has shape {list(state[f'{name}.values'].shape)}, expected {expected}")
            if layer["activation"] not in (None, "relu", "gelu") or not all(
                isinstance(config[key], list) for key in ("fused", "activations")
            ):
                raise ValueError(f"{name} has the activation {layer['activation']!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} has a broken configuration: {error}, expected what save writes") from error
    return found


def _check(model: nn.Module, state: Mapping[str, Tensor], found: Mapping[str, Ticket], where: str) -> None:
    """Raises ValueError unless the model will take every tensor of the file, and no more."""
    mine = dense_state_dict(model)
    blocks = {f"{layer}.{name}" for layer in found for name in ("values", "index")}
    theirs = {name: list(t.shape) for name, t in state.items() if name not in blocks}
    theirs |= {f"{layer}.weight": list(ticket.shape) for layer, ticket in found.items()}
    wrong = [f"{name} is missing" for name in sorted(mine.keys() - theirs.keys())]
    wrong += [f"{name} was not expected" for name in sorted(theirs.keys() - mine.keys())]
    wrong += [
        f"{name} has shape {theirs[name]}, expected {list(t.shape)}"
        for name, t in sorted(mine.items()) if name in theirs and theirs[name] != list(t.shape)
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{where} does not fit: {'; '.join(wrong[:6])}")
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for name in found:
        if name in modules and not isinstance(modules[name], nn.Linear | TicketLinear | Projection):
            came = type(modules[name]).__name__
            raise ValueError(f"{where} does not fit: {name} is a {came}, expected a linear layer")
        other = first.setdefault(id(modules.get(name, found[name])), name)
        if found[name] != found[other]:
            raise ValueError(f"{where} does not fit: {name} and {other} are one layer, expected one ticket for both")
