"""torch's own encoder layers, which without gradients read weights instead of calling their layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyeff.nn import TicketLinear

# The switches of torch that stand for "the weights may be read": of a layer, and of a stack of them.
_SWITCHES = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def refresh(owner: nn.Module) -> None:
    """Sees to it that an encoder layer calls its layers while one of them is a ticket, and is as it was otherwise.

    Args:
        owner (Module): any; a torch.nn.TransformerEncoderLayer or torch.nn.TransformerEncoder is changed in place.
    """
    for kind, name in _SWITCHES:
        if not isinstance(owner, kind) or not hasattr(owner, name):
            continue
        layer: Any = owner
        sparse = any(isinstance(m, TicketLinear) for m in owner.modules())
        before = f"_{name}_before_tickets"
        if sparse and not hasattr(layer, before):
            setattr(layer, before, getattr(layer, name))
            setattr(layer, name, type(getattr(layer, name))(0))
        elif not sparse and hasattr(layer, before):
            setattr(layer, name, getattr(layer, before))
            delattr(layer, before)
