"""What an encoder's correction is to a decoder: cross-attention probabilities, and the joiners that use them."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.read import linear_like

# The names that encoder-decoder models give to their cross-attention.
CROSS_ATTENTION = r"EncDecAttention|encoder_attn|cross_?att(n|ention)|encoder_decoder_attention"
_IMPLEMENTATION = "pyeff_read"


class CrossJoiner(nn.Module):
    """``x_j = phi_j + P e_j``. P starts random: with U at zero too, neither would ever get a gradient.

    Args:
        decoder_width (int), encoder_width (int): P is [decoder_width, encoder_width], without bias.
    """

    def __init__(self, decoder_width: int, encoder_width: int, **like: Any) -> None:
        super().__init__()
        self.projection = nn.Linear(encoder_width, decoder_width, bias=False, **like)

    def forward(self, phi: Tensor, e: Tensor) -> Tensor:
        return phi + linear_like(self.projection, e).to(phi.dtype)


class FFNJoiner(nn.Module):
    """``x_j = phi_j + W2 gelu(W1 [phi_j; e_j] + b1) + b2``.

    Args:
        decoder_width (int), encoder_width (int): of phi_j and e_j.
        hidden (int): the rows of W1.
    """

    def __init__(self, decoder_width: int, encoder_width: int, hidden: int, **like: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(decoder_width + encoder_width, hidden, **like)
        self.outer = nn.Linear(hidden, decoder_width, **like)

    def forward(self, phi: Tensor, e: Tensor) -> Tensor:
        x = F.gelu(linear_like(self.inner, torch.cat([phi, e.to(phi.dtype)], -1)))
        return phi + linear_like(self.outer, x).to(phi.dtype)


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention, the mean over the heads, in at least float32.

    Args:
        query (Tensor): [B, H, T, e]. key (Tensor): [B, H or fewer, S, e].
        mask (Tensor, optional): bool (True = attend) or additive, broadcast to [B, H, T, S]; or [B, S] with 0 for
            padding.
        scaling (float, optional): of the scores. Default: e^-0.5.
        position_bias (Tensor, optional): added to the scores.

    Returns:
        Tensor: [B, T, S].
    """
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).transpose(2, 3)
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if position_bias is not None:
            scores = scores + position_bias
        if mask is not None:
            if mask.dim() == 2:
                mask = mask[:, None, None, :].bool()
            hidden = torch.finfo(wide).min
            scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).mean(1)


class CrossCapture:
    """Takes the cross-attention probabilities of decoder layers, and leaves what the model computes bit for bit alone.

    Fused attention returns no probabilities, and a switch of the whole model to the eager one would change its rounding
    and cost its memory. So the cross-attention modules alone get a copy of their configuration that names an attention
    function of ours: it calls the model's own with the same arguments, and computes the probabilities beside it from
    the same queries, keys (cached ones included) and mask.

    Args:
        layers (sequence of Module): decoder layers.
        sink (callable): called with the probabilities [B, T, S] of each cross-attention that runs, or with a function
            that computes them once the layer has returned; returns False, without an argument, where nobody wants them.
        pattern (str): regular expression for the name of a cross-attention module in a layer.

    Raises:
        ValueError: a layer has no such module.
    """

    def __init__(self, layers: Sequence[nn.Module], sink: Callable[..., Any], pattern: str = CROSS_ATTENTION) -> None:
        self.sink = sink
        self._originals: list[tuple[nn.Module, Any]] = []
        _register()
        try:
            for i, layer in enumerate(layers):
                self._wrap(i, layer, re.compile(pattern))
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Gives the modules their configuration back."""
        for module, config in self._originals:
            module.config = config
            del module._read_capture
        self._originals.clear()

    def config_of(self, module: nn.Module) -> Any:
        """The configuration that the module had."""
        return next(config for m, config in self._originals if m is module)

    def _wrap(self, index: int, layer: nn.Module, pattern: re.Pattern) -> None:
        before = len(self._originals)
        for name, found in layer.named_modules():
            if not pattern.fullmatch(name.rpartition(".")[2]):
                continue
            for module in found.modules():
                if hasattr(getattr(module, "config", None), "_attn_implementation") and not hasattr(
                    module, "_read_capture"
                ):
                    self._originals.append((module, module.config))
                    module.config = copy.copy(module.config)
                    module.config._attn_implementation_internal = _IMPLEMENTATION
                    module._read_capture = self
        if len(self._originals) == before:
            raise ValueError(
                f"no cross-attention in decoder layer {index} ({type(layer).__name__}): looked for a module named as "
                f"{pattern.pattern} whose configuration chooses its attention; use joiner=None, or cross_attention="
            )


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _attention)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    capture: Any = module._read_capture
    result = _original(module, capture.config_of(module))(module, query, key, value, mask, **kwargs)
    if capture.sink():
        if mask is not None and not isinstance(mask, Tensor):
            raise RuntimeError(
                f"the cross-attention mask is a {type(mask).__name__}, expected a tensor; use joiner=None"
            )
        bias = kwargs.get("position_bias")
        later = functools.partial(
            attention_probabilities, query, key, mask, scaling=kwargs.get("scaling"), position_bias=bias
        )
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, bias))
        # A call that autograd records may be in a checkpoint, which allows no tensor that its rerun does not save too.
        capture.sink(later if recorded else later())
    return result


def _original(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that the module would have called: its file's own eager one, or a registered one."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names:
            eager = names.get("eager_attention_forward")
            return names["ALL_ATTENTION_FUNCTIONS"].get_interface(config._attn_implementation, eager)
    raise RuntimeError(f"{type(module).__name__} does not use transformers' attention interface; use joiner=None")
