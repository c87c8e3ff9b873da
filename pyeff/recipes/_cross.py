"""What an encoder's correction is to a decoder: cross-attention probabilities, and the joiners that use them."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.read import linear_like
from pyeff.recipes._hooks import Local

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

    Cross-attention that chooses for itself (T5 before transformers 5) is asked for its probabilities instead, which are
    then taken out of what it returns.

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
        self._handles: list[Any] = []
        self._local = Local()
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
        for handle in self._handles:
            handle.remove()
        self._originals.clear()
        self._handles.clear()

    def config_of(self, module: nn.Module) -> Any:
        """The configuration that the module had."""
        return next(config for m, config in self._originals if m is module)

    def _wrap(self, index: int, layer: nn.Module, pattern: re.Pattern) -> None:
        found = [m for name, m in layer.named_modules() if pattern.fullmatch(name.rpartition(".")[2])]
        choosing = [m for outer in found for m in outer.modules() if _interface(m) is not None]
        asked = [m for m in found if "output_attentions" in inspect.signature(m.forward).parameters]
        if choosing:
            for module in dict.fromkeys(choosing):
                self._originals.append((module, module.config))
                module.config = copy.copy(module.config)
                module.config._attn_implementation_internal = _IMPLEMENTATION
                module._read_capture = self
        elif asked:
            self._handles.append(asked[0].register_forward_pre_hook(self._ask, with_kwargs=True))
            self._handles.append(asked[0].register_forward_hook(self._take))
        else:
            raise ValueError(
                f"no cross-attention in decoder layer {index} ({type(layer).__name__}): looked for a module named as "
                f"{pattern.pattern} that gives its probabilities; use joiner=None, or cross_attention="
            )

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._local.ours = self.sink() and not kwargs.get("output_attentions")
        return (args, {**kwargs, "output_attentions": True}) if self._local.ours else None

    def _take(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not self.sink():
            return None
        # Position biases have the same shape; the probabilities come after them.
        at = max((i for i, t in enumerate(output) if isinstance(t, Tensor) and t.dim() == 4), default=None)
        if at is None:
            return None
        self.sink(functools.partial(torch.mean, output[at], 1))
        if not self._local.ours:
            return None
        return output[:at] if at == len(output) - 1 else (*output[:at], None, *output[at + 1 :])


def _register() -> None:
    from transformers import modeling_utils

    # Older releases have one mapping for all models instead of a class.
    if hasattr(modeling_utils, "AttentionInterface"):
        modeling_utils.AttentionInterface.register(_IMPLEMENTATION, _attention)
    else:
        modeling_utils.ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = _attention


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


def _interface(module: nn.Module) -> dict[str, Any] | None:
    """The names of the file that makes this module's configuration choose its attention; None if nothing does."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return None
    files = (vars(sys.modules[kind.__module__]) for kind in type(module).__mro__)
    return next((names for names in files if "ALL_ATTENTION_FUNCTIONS" in names), None)


def _original(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that the module would have called: a registered one, or its file's own eager one."""
    names: Any = _interface(module)
    chosen = config._attn_implementation
    return names["eager_attention_forward"] if chosen in (None, "eager") else names["ALL_ATTENTION_FUNCTIONS"][chosen]
