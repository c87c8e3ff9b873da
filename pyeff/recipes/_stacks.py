"""Where the layers of a model are: the stacks of alike modules that a recipe works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Stack:
    """Layers that run one after another, and the modules whose calls enclose them.

    Attributes:
        name (str): the path of the layers in the model, for messages.
        layers (list of Module): in their order.
        opener (Module): entered before the first layer.
        closer (Module): returns after the last layer; its first output tensor is the stack's output.
        width (int, optional): the width of the layer outputs, where it could be told.
    """

    name: str
    layers: list[nn.Module]
    opener: nn.Module
    closer: nn.Module
    width: int | None = None

    @property
    def home(self) -> nn.Module:
        """The module that parameters of this stack are registered on: the closer, or the first module inside it that is
        not a container (one more child would change what a Sequential computes)."""
        return next((m for m in self.closer.modules() if not isinstance(m, _CONTAINERS)), self.closer)


@dataclass
class _Candidate:
    path: str
    owner: nn.Module
    layers: nn.ModuleList

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.layers.parameters())

    def __str__(self) -> str:
        kinds = sorted({type(m).__name__ for m in self.layers})
        return f"{self.path or 'the list itself'} ({len(self.layers)} x {' or '.join(kinds)})"


def resolve(model: nn.Module, target: str | nn.Module, argument: str) -> nn.Module:
    """The module that ``target`` names: a path, the unique end of one, or the module itself.

    Raises:
        ValueError: there is none, or several.
    """
    if isinstance(target, nn.Module):
        return target
    modules = dict(model.named_modules())
    if target in modules:
        return modules[target]
    found = [name for name in modules if name.endswith("." + target)]
    if len(found) != 1:
        came = f"several modules ({', '.join(found)})" if found else "no module of the model"
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{argument}: {target!r} names {came}, expected one; the model's children are {children}")
    return modules[found[0]]


def find_stacks(
    model: nn.Module | Sequence[nn.Module],
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    output: str | nn.Module | None = None,
) -> dict[str, Stack]:
    """The stacks of a model.

    A list, ModuleList or Sequential is its own stack. Elsewhere the stack is the outermost ModuleList whose modules
    share a class and that holds the most parameters; an encoder-decoder of Hugging Face has one in each half. The stack
    is called through the module that owns the list.

    Args:
        model (Module or sequence of Module): where to search.
        stack (str, Module or mapping, optional): the layers' ModuleList or Sequential, or a module around it; by path
            or itself. A mapping with ``"encoder"`` and ``"decoder"`` names both halves.
        output (str or Module, optional): the module that returns the stack's output, if not the owner of the layers.

    Returns:
        dict: ``{"adapter": Stack}``, or ``{"encoder": Stack, "decoder": Stack}``.

    Raises:
        ValueError: nothing fits, or several lists do.
    """
    if isinstance(model, nn.ModuleList | nn.Sequential) or not isinstance(model, nn.Module):
        if stack is not None:
            raise ValueError("stack was given with a list of modules, expected None: the modules are the layers")
        return {"adapter": _listed(model, output)}
    if isinstance(stack, Mapping):
        if set(stack) != {"encoder", "decoder"}:
            raise ValueError(f"stack has the keys {sorted(stack)}, expected 'encoder' and 'decoder'")
        halves = {key: resolve(model, value, "stack") for key, value in stack.items()}
    else:
        halves = {"adapter": resolve(model, stack, "stack")} if stack is not None else _halves(model)
    if output is not None and len(halves) > 1:
        raise ValueError("output was given with an encoder-decoder, expected None or one stack")
    paths = {id(m): name for name, m in model.named_modules()}
    stacks = {}
    for label, half in halves.items():
        if id(half) not in paths:
            raise ValueError(f"stack: the {type(half).__name__} is not a module of the model")
        found = _single(model, half, paths[id(half)])
        if output is not None:
            found.closer = resolve(model, output, "output")
        stacks[label] = found
    return stacks


def _halves(model: nn.Module) -> dict[str, nn.Module]:
    """Encoder and decoder where the model has both, else the model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        try:
            halves: Any = model
            encoder, decoder = halves.get_encoder(), halves.get_decoder()
        except (AttributeError, NotImplementedError):
            return {"adapter": model}
        if encoder is not None and decoder is not None:
            inside = {id(m) for m in decoder.modules()}.isdisjoint(id(m) for m in _layer_modules(encoder))
            if encoder is not decoder and inside:
                return {"encoder": encoder, "decoder": decoder}
    return {"adapter": model}


def _layer_modules(module: nn.Module) -> Iterator[nn.Module]:
    for candidate in _candidates(module, ""):
        yield from candidate.layers


def _share_class(modules: nn.ModuleList) -> bool:
    """Whether the modules have a class in common that says more than nn.Module."""
    common = set.intersection(*(set(type(m).__mro__) for m in modules))
    return any(issubclass(kind, nn.Module) and kind is not nn.Module for kind in common)


def _candidates(module: nn.Module, path: str) -> Iterator[_Candidate]:
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child) and _share_class(child):
            yield _Candidate(here, module, child)
        else:
            yield from _candidates(child, here)


def _single(model: nn.Module, module: nn.Module, path: str) -> Stack:
    if isinstance(module, nn.Sequential):
        return Stack(path, list(module), module, module, _width(model, path, module[-1]))
    if isinstance(module, nn.ModuleList):
        owner_path, _, _ = path.rpartition(".")
        best = _Candidate(path, model.get_submodule(owner_path), module)
    else:
        found = sorted(_candidates(module, path), key=lambda c: c.parameters, reverse=True)
        if not found or not found[0].parameters:
            raise ValueError(
                f"no stack of layers in {path or type(model).__name__}: looked for a ModuleList whose modules share a "
                "class; name the layers with stack=, or pass them as a list"
            )
        best, rivals = found[0], [c for c in found[1:] if len(c.layers) == len(found[0].layers) and c.parameters]
        if rivals and len(best.layers) > 1:
            listed = ", ".join(map(str, [best, *rivals]))
            raise ValueError(f"several stacks of layers are as long: {listed}; name one with stack=")
    return Stack(best.path, list(best.layers), best.owner, _closer(best), _width(model, best.path, best.layers[-1]))


def _closer(found: _Candidate) -> nn.Module:
    """The owner of the layers; or its final norm if the owner also pools, so that the pooler sees corrected states."""
    children = [(name, child) for name, child in found.owner._modules.items() if child is not None]
    layers = next(i for i, (_, child) in enumerate(children) if child is found.layers)
    after = children[layers + 1 :]
    pools = [i for i, (name, _) in enumerate(after) if "pool" in name.lower()]
    norms = [module for name, module in after[: pools[0]] if "norm" in name.lower()] if pools else []
    return norms[-1] if norms else found.owner


def _listed(modules: Sequence[nn.Module] | nn.ModuleList | nn.Sequential, output: str | nn.Module | None) -> Stack:
    layers = list(modules)
    if not layers:
        raise ValueError("the list of modules is empty, expected at least one layer")
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ValueError(f"the list's item {i} is a {type(layer).__name__}, expected a torch.nn.Module")
    if len({id(m) for m in layers}) != len(layers):
        raise ValueError("the list has a module twice, expected each once; pass the model that calls it instead")
    if isinstance(output, str):
        raise ValueError(f"output is {output!r}, expected a module as the layers came as a list")
    whole = modules if isinstance(modules, nn.Sequential) else None
    return Stack("layers", layers, whole or layers[0], output or whole or layers[-1], _guess_width(layers[-1]))


def _width(model: nn.Module, path: str, last: nn.Module) -> int | None:
    """``hidden_size`` of the nearest configuration around the layers, or what the last layer's own modules say."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        size = getattr(getattr(model.get_submodule(".".join(parts[:end])), "config", None), "hidden_size", None)
        if isinstance(size, int):
            return size
    return _guess_width(last)


def _guess_width(layer: nn.Module) -> int | None:
    for module in reversed(list(layer.modules())):
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return module.normalized_shape[-1]
        if isinstance(module, nn.Linear):
            return module.out_features
    return None
