"""Query, key and value of an attention as one ticket of three times the rows, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyeff.nn import TicketLinear
from pyeff.nn._ticket_fused import Projection, Projections, stack, unstack

CHILD = "ticket_qkv"
# What the projections of one attention are called: BERT, RoBERTa and their like; DistilBERT; OPT, BART and many others;
# MPNet and T5.
NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
# Attentions that ask another sequence for keys and values: fused, they would compute all three for each.
_CROSS = ("encoder_attn", "EncDecAttention", "crossattention")


def fuse_qkv(model: nn.Module, only: Sequence[str] | None = None) -> list[str]:
    """Query, key and value of every self-attention as one layer: one product where there were three.

    The model's own code stays: what stands in the place of ``query``, ``key`` and ``value`` shares one TicketLinear,
    which is a child ``ticket_qkv`` of the attention, and gives each its rows. Build the optimizer after this.

    Args:
        model (Module): changed in place. Attentions whose three layers are tickets of one block and input width, with
            rows that are a multiple of the block, are fused; others, and those that attend to another sequence, stay.
        only (sequence of str, optional): the paths of the attentions to fuse. Default: all.

    Returns:
        list of str: the paths of the attentions that were fused.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.query, self.key, self.value = (torch.nn.Linear(16, 16) for _ in range(3))
        ...     def forward(self, x):
        ...         return self.query(x) + self.key(x) * self.value(x)
        >>> model = torch.nn.Sequential(Attention())
        >>> _ = ticket.prune(model, density=0.5, block=8, include=".")
        >>> ticket.fuse_qkv(model)
        ['0']
        >>> model[0].ticket_qkv.out_features, ticket.split_qkv(model)
        (48, ['0'])
    """
    fused = []
    for path, attention in list(model.named_modules()):
        names = next((names for names in NAMES if all(_is_ticket(attention, name) for name in names)), None)
        if only is not None and path not in only:
            continue
        crosses = "cross" in type(attention).__name__.lower() or any(part in _CROSS for part in path.split("."))
        if names is None or crosses:
            continue
        parts = [getattr(attention, name) for name in names]
        if len({id(p) for p in parts}) < 3:
            continue
        try:
            layer = stack(parts)
        except ValueError:
            continue
        shared = Projections(layer, [part.out_features for part in parts])
        attention.add_module(CHILD, layer)
        for i, name in enumerate(names):
            setattr(attention, name, Projection(shared, i).train(attention.training))
        fused.append(path)
    return fused


def split_qkv(model: nn.Module) -> list[str]:
    """Takes apart what :func:`fuse_qkv` has put together.

    Args:
        model (Module): changed in place.

    Returns:
        list of str: the paths of the attentions that were fused. See :func:`fuse_qkv` for an example.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> ticket.split_qkv(torch.nn.Linear(4, 4))
        []
    """
    split = []
    for path, attention in list(model.named_modules()):
        parts = {name: m for name, m in attention.named_children() if isinstance(m, Projection)}
        if not parts:
            continue
        shared = next(iter(parts.values())).shared
        layers = unstack(shared.layer, shared.sizes)
        delattr(attention, CHILD)
        for name, part in parts.items():
            setattr(attention, name, layers[part.part])
        split.append(path)
    return split


def _is_ticket(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), TicketLinear)
