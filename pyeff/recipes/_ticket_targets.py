"""Which layers of a model are pruned, what of it is rewound, and layers put into each other's place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_fast_path
from pyeff.recipes._stacks import find_stacks, resolve

Prunable = nn.Linear | TicketLinear

# Where torch keeps the hooks on a module's calls and gradients.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def targets(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
) -> dict[str, Prunable]:
    """The layers that are pruned: every linear layer inside the model's stack of layers, and the pooler.

    In BERT and its like these are query, key, value and output of the attention, the intermediate and the output layer,
    and the pooler, as in the paper: no embedding, no norm, no bias, no head of a task. Of an encoder-decoder, both
    stacks.

    Args:
        model (Module): any model with a stack of layers.
        include (str or sequence of str, optional): regular expressions; linear layers anywhere in the model whose path
            one of them matches are pruned instead of the default ones.
        exclude (str or sequence of str): regular expressions; what one of them matches is not pruned.
        stack (str, Module or mapping, optional): where the layers are, as of :func:`pyeff.recipes.read.attach`.

    Returns:
        dict: path to torch.nn.Linear or TicketLinear, in the order of the model. A layer that is used in several places
        is there once.

    Raises:
        ValueError: nothing is left to prune, no stack was found, or an expression matches nothing.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        >>> list(ticket.targets(model, exclude="^2$"))
        ['0']
    """
    patterns, without = _patterns("include", include), _patterns("exclude", exclude)
    linear = {name: module for name, module in model.named_modules() if is_prunable(module)}
    if include is not None:
        if stack is not None:
            raise ValueError("targets: stack was given with include, expected one of the two")
        chosen = {name: m for name, m in linear.items() if any(p.search(name) for p in patterns)}
        _all_match("include", patterns, linear)
    else:
        inside = {id(m) for found in find_stacks(model, stack).values() for layer in found.layers
                  for m in layer.modules()}  # fmt: skip
        chosen = {name: m for name, m in linear.items() if id(m) in inside or "pooler" in name.split(".")}
    _all_match("exclude", without, chosen)
    chosen = {name: m for name, m in chosen.items() if not any(p.search(name) for p in without)}
    if not chosen:
        raise ValueError(f"targets: no linear layer of the {type(model).__name__} is left to prune")
    return chosen


def is_prunable(module: nn.Module) -> bool:
    """torch.nn.Linear itself or a ticket: what derives from Linear may be used by its weight, without a call."""
    return type(module) is nn.Linear or isinstance(module, TicketLinear)


def _patterns(name: str, given: str | Sequence[str] | None) -> list[re.Pattern]:
    listed = [given] if isinstance(given, str) else list(given or ())
    try:
        return [re.compile(pattern) for pattern in listed]
    except (re.error, TypeError) as error:
        raise ValueError(f"targets: {name} is {given!r}, expected regular expressions: {error}") from error


def _all_match(name: str, patterns: list[re.Pattern], paths: Mapping[str, Any]) -> None:
    for pattern in patterns:
        if not any(pattern.search(path) for path in paths):
            some = ", ".join(list(paths)[:4]) or "none"
            raise ValueError(
                f"targets: {name} {pattern.pattern!r} matches no layer, expected one of those such as {some}"
            )


def check_untied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Whether each layer's weight is its own.

    Raises:
        ValueError: another module has the same Parameter. As a ticket the layer would have numbers of its own, and the
            two would train apart.
    """
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            users.setdefault(id(p), []).append((module, f"{path}.{name}" if path else name))
    for path, layer in layers.items():
        if type(layer) is nn.Linear:
            weight = layer._parameters.get("weight", layer._parameters.get("weight_orig"))
            others = [name for module, name in users.get(id(weight), ()) if module is not layer]
            if others:
                raise ValueError(f"the weight of {path} is {others[0]} too, expected one that no other module has")


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` everywhere where ``old`` is a child. Hooks on calls and gradients go with it, handles of them too.

    Raises:
        ValueError: ``old`` is the model itself.
    """
    if old is model:
        raise ValueError(f"the model is a {type(model).__name__} alone, expected a model that contains it")
    for name in _HOOKS:
        # The very dict, since a handle removes its hook from that.
        vars(new)[name] = vars(old)[name]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    # Stacks of layers know of tickets only when these are there: hence after all.
    for parent in model.modules():
        _ticket_fast_path.refresh(parent)


def backbone(model: nn.Module, heads: Sequence[str | nn.Module] | None) -> dict[str, Tensor]:
    """Parameters and buffers that rewinding restores, by their path in the model.

    Of a Hugging Face model, or one inside the model, its base; of any other model all but ``heads``.
    """
    left_out: set[int] = set()
    if heads is not None:
        for head in heads:
            left_out |= {id(m) for m in resolve(model, head, "head").modules()}
        root = model
    else:
        root = next((m for m in model.modules() if hasattr(m, "base_model_prefix")), model)
        root = getattr(root, getattr(root, "base_model_prefix", ""), root) or root
    kept = {id(m) for m in root.modules()} - left_out
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if id(module) in kept:
            own = (*module._parameters.items(), *module._buffers.items())
            state |= {f"{path}.{name}" if path else name: t for name, t in own if t is not None}
    return state


def dense_weight(layer: Prunable) -> Tensor:
    """The weight [out, in] that a layer computes with, detached, with zeros where it is pruned."""
    if hasattr(layer, "weight_orig"):  # masked by torch.nn.utils.prune: its `weight` is that of the last call
        masked: Any = layer
        return (masked.weight_orig * masked.weight_mask).detach()
    return layer.weight.detach()


def element_scores(score: Callable[[str, Any], Tensor] | None, name: str, layer: Prunable) -> Tensor:
    """What each element of a weight is worth: its magnitude, or what the caller's function says.

    Raises:
        ValueError: the function gives another shape; a number is NaN or infinite, which no order can be made of.
    """
    shape = (layer.out_features, layer.in_features)
    found = dense_weight(layer).float().abs() if score is None else score(name, layer)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        came = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"score gives {came} for {name}, expected a tensor {list(shape)}")
    found = found.detach().float()
    if not bool(found.isfinite().all()):
        bad = "NaN" if bool(found.isnan().any()) else "infinity"
        whose = f"the weight of {name} has {bad}" if score is None else f"score gives {bad} for {name}"
        raise ValueError(f"{whose}, expected finite numbers")
    return found
