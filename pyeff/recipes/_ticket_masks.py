"""Unstructured tickets, as torch.nn.utils.prune has them: ``weight_mask`` beside ``weight_orig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

_MASK, _ORIG = ".weight_mask", ".weight_orig"


def mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Masks linear layers as torch.nn.utils.prune does: ``weight_orig`` trains, ``weight_mask`` is a buffer.

    Args:
        model (Module): changed in place.
        masks (mapping): path of a torch.nn.Linear to a mask [out, in] of bool. A layer that has a mask gets this one in
            its place; its ``weight_orig`` stays.

    Raises:
        ValueError: a path names no linear layer, or a mask does not fit it; nothing is changed then.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> ticket.mask(model, {"0": torch.eye(4, dtype=torch.bool)})
        >>> sorted(name for name, _ in model[0].named_parameters()), int(model[0].weight.count_nonzero())
        (['bias', 'weight_orig'], 4)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, m in masks.items():
        module = modules.get(name)
        if type(module) is not nn.Linear:
            raise ValueError(f"mask: {name} is a {type(module).__name__}, expected a torch.nn.Linear of the model")
        shape = [module.out_features, module.in_features]
        if not isinstance(m, Tensor) or m.dtype != torch.bool or list(m.shape) != shape:
            came = f"{m.dtype} {list(m.shape)}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
            raise ValueError(f"mask: the mask of {name} is {came}, expected a bool tensor {shape}")
    for name, m in masks.items():
        module = modules[name]
        if not hasattr(module, "weight_mask"):
            torch_prune.custom_from_mask(module, "weight", m)
        else:
            module.weight_mask.copy_(m)
        refresh(module)


def masks(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a model that torch.nn.utils.prune has pruned, or of its state dict.

    Args:
        source (Module or mapping): the model, or a state dict with ``weight_mask`` entries.

    Returns:
        dict of Tensor: path of the layer to its mask [out, in], of bool.

    Raises:
        ValueError: there is no mask.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
        >>> ticket.masks(model)["0"].sum()
        tensor(8)
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    found = {name.removesuffix(_MASK): t != 0 for name, t in state.items() if name.endswith(_MASK)}
    if not found:
        raise ValueError(f"masks: source has none of {len(state)} tensors named *{_MASK}, expected at least one")
    return found


def load_masked(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a state dict of ``weight_orig`` and ``weight_mask`` into a model that has no masks yet.

    Args:
        model (Module): of the architecture that the state dict is of; changed in place.
        state_dict (mapping): as a model has it that torch.nn.utils.prune has pruned.

    Raises:
        ValueError: there is no mask in it, or a mask does not fit the model.
        RuntimeError: other names or shapes differ, as of ``load_state_dict``.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> pruned, fresh = (torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
        >>> _ = torch.nn.utils.prune.l1_unstructured(pruned[0], "weight", amount=0.5)
        >>> ticket.load_masked(fresh, pruned.state_dict())
        >>> torch.equal(fresh[0].weight, pruned[0].weight)
        True
    """
    found = masks(state_dict)
    without = [name for name in found if name + _ORIG not in state_dict]
    if without:
        raise ValueError(f"load_masked: state_dict has no {without[0]}{_ORIG}, expected one beside each mask")
    mask(model, found)
    model.load_state_dict(dict(state_dict))
    for name in found:
        refresh(model.get_submodule(name))


def refresh(module: Any) -> None:
    """``weight`` as it is now; torch computes it anew with the next call. Detached, so that the model can be copied."""
    module.weight = (module.weight_orig * module.weight_mask).detach()


def unmask(module: nn.Linear, weight: Tensor | None = None) -> None:
    """Takes the mask off a layer: its weight is then that of its survivors, or ``weight``."""
    torch_prune.remove(module, "weight")
    if weight is not None:
        with torch.no_grad():
            module.weight.copy_(weight)
