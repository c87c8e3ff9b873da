"""Activations behind tickets as part of their kernels, and back."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn import TicketLinear

# A linear layer, and what the owner of both calls on its output right behind it: BERT, RoBERTa, ViT and their like;
# DistilBERT; ALBERT; BART, OPT, CLIP and others; torch.nn.TransformerEncoderLayer.
_PAIRS = (
    ("dense", "intermediate_act_fn"),
    ("lin1", "activation"),
    ("ffn", "activation"),
    ("fc1", "activation_fn"),
    ("linear1", "activation"),
)


class Applied(nn.Module):
    """In the place of an activation that the layer before it has applied: nothing.

    Args:
        original (callable): what stood here.
    """

    def __init__(self, original: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple, so that it is no child

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def fuse_activations(model: nn.Module, only: Sequence[str] | None = None) -> list[str]:
    """ReLU and GELU (by the error function) right behind a ticket as a part of its kernel.

    Args:
        model (Module): changed in place; its own code stays. Of Hugging Face's encoders and of
            torch.nn.TransformerEncoderLayer the feed-forward layers, and neighbours in a torch.nn.Sequential. A ticket
            that stands in several places stays: not in all of them the activation is behind it.
        only (sequence of str, optional): the paths of the tickets to change. Default: all.

    Returns:
        list of str: the paths of the tickets that have their activation now.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        >>> _ = ticket.prune(model, density=0.5, block=8)
        >>> ticket.fuse_activations(model)
        ['0']
        >>> model[0].activation, ticket.split_activations(model)
        ('gelu', ['0'])
    """
    fused = []
    places = collections.Counter(id(child) for m in model.modules() for child in m._modules.values())
    for path, owner in list(model.named_modules()):
        for name, behind in _neighbours(owner):
            layer, activation = getattr(owner, name), getattr(owner, behind)
            where, kind = f"{path}.{name}" if path else name, _kind(activation)
            if not isinstance(layer, TicketLinear) or layer.activation or not kind or places[id(layer)] > 1:
                continue
            if only is None or where in only:
                layer.activation = kind
                _put(owner, behind, Applied(activation))
                fused.append(where)
    return fused


def split_activations(model: nn.Module) -> list[str]:
    """Takes apart what :func:`fuse_activations` has put together.

    Args:
        model (Module): changed in place.

    Returns:
        list of str: the paths of the tickets that had their activation.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> ticket.split_activations(torch.nn.Linear(4, 4))
        []
    """
    split = []
    for where, layer, owner, behind in list(applied(model)):
        layer.activation = None
        _put(owner, behind, getattr(owner, behind).original[0])
        split.append(where)
    return split


def applied(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module, str]]:
    """(path of the ticket, the ticket, the owner, the activation's name) for all that is fused."""
    for path, owner in model.named_modules():
        for name, behind in _neighbours(owner):
            if isinstance(getattr(owner, behind), Applied):
                yield f"{path}.{name}" if path else name, getattr(owner, name), owner, behind


def _neighbours(owner: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(owner, nn.Sequential):
        names = list(owner._modules)
        yield from itertools.pairwise(names)
        return
    yield from ((a, b) for a, b in _PAIRS if hasattr(owner, a) and hasattr(owner, b))


def _kind(activation: Any) -> str | None:
    """What the kernels call it, if they compute it."""
    if activation in (F.gelu, torch._C._nn.gelu) or (type(activation) is nn.GELU and activation.approximate == "none"):
        return "gelu"
    if type(activation).__name__ == "GELUActivation" and getattr(activation, "act", None) is F.gelu:
        return "gelu"
    return "relu" if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU else None


def _put(owner: nn.Module, name: str, value: Any) -> None:
    if isinstance(owner, nn.Sequential):
        owner._modules[name] = value
        return
    delattr(owner, name)
    setattr(owner, name, value)
