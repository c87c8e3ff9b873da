"""What encodes the students' tokens: attention masks of ragged rows, a bias by distance, stacks of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import ops
from pyeff.plans import MaskPlan

# Where models of Hugging Face keep their layers, and the norm that follows them.
_LAYERS = ("encoder.layer", "encoder.layers", "transformer.layer", "layers", "layer")
_NORMS = ("layernorm", "final_layernorm", "encoder.layer_norm", "encoder.layernorm")
# What gives an MLP's output before the residual is added to it.
_MLPS = ("mlp", "output.dense", "ffn", "feed_forward")


def key_mask(plan: MaskPlan) -> Tensor:
    """Which keys students may attend to: those of tokens that they keep.

    Args:
        plan (MaskPlan): the students, with their prefix.

    Returns:
        Tensor: [B*M, 1, 1, K] bool. Of a row that keeps nothing all are True: its outputs count nowhere, and an
        attention to nothing would be NaN.

    Example:
        >>> import torch, pyeff
        >>> hidden = torch.tensor([[[False, True, False], [True, True, False]]])
        >>> pyeff.nn.key_mask(pyeff.MaskPlan.from_mask(hidden)).flatten(1).tolist()
        [[True, True], [True, False]]
    """
    return (plan.slots() | (plan.keep_len == 0)[:, None])[:, None, None]


def slopes_of(heads: int) -> list[float]:
    """ALiBi's slopes: a geometric series from ``2^(-8/heads)``; between powers of two, every other of the next one.

    Args:
        heads (int): how many.

    Returns:
        list of float: one for each head.

    Raises:
        ValueError: ``heads`` is not at least 1.

    Source: Press et al., 2022, arXiv 2108.12409, and its code for other numbers of heads.

    Example:
        >>> import pyeff
        >>> pyeff.nn.slopes_of(4)
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"slopes_of: heads is {heads!r}, expected an integer of at least 1")
    power = 2 ** int(math.log2(heads))
    own = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return own + between[: heads - power]


class RelativeBias(nn.Module):
    """A bias of attention by the distance of tokens in the whole sequence, with a learned factor for each head.

    Args:
        heads (int): H.
        scale (bool): whether there is the learned factor, which begins at 1 and counts as 0 where it is negative.
        slopes (iterable of float, optional): Default: :func:`slopes_of`.
        device: of slopes and factor.

    Attributes:
        slopes (Tensor): [H] float32, a buffer.
        scale (Parameter or None): [H].

    Raises:
        ValueError: ``heads`` is not at least 1, or ``slopes`` are not as many.

    Source: Press et al., 2022, arXiv 2108.12409; the factor: Baevski et al., 2022, arXiv 2212.07525, section 3.2.

    Example:
        >>> import pyeff
        >>> plan = pyeff.ops.block_mask(1, 8, (100,), keep=0.5, adjust=0.05, length=5)
        >>> pyeff.nn.RelativeBias(12)(plan).shape
        torch.Size([8, 12, 50, 50])
    """

    slopes: Tensor
    scale: nn.Parameter | None

    def __init__(
        self,
        heads: int,
        scale: bool = True,
        *,
        slopes: Iterable[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        values = slopes_of(heads) if slopes is None else [float(s) for s in slopes]
        if len(values) != heads:
            raise ValueError(f"RelativeBias: slopes has {len(values)} numbers, expected {heads}, one for each head")
        self.register_buffer("slopes", torch.tensor(values, dtype=torch.float32, device=device))
        self.register_parameter("scale", nn.Parameter(torch.ones(heads, device=device)) if scale else None)

    def forward(self, plan: MaskPlan, *, dtype: torch.dtype | None = None) -> Tensor:
        """[B*M, H, K, K], -inf for keys that do not count; ``dtype`` is that of the result."""
        scale = None if self.scale is None else self.scale.clamp(min=0)
        return ops.multimask_relative_bias(plan, self.slopes, scale, dtype=dtype)


class LayerStack(nn.Module):
    """Layers of Hugging Face's kind as an encoder for :class:`MultimaskStudent`, and for its teacher.

    A layer is called as ``layer(tokens, attention_mask)``. It is shared with the model it comes from, not copied.

    Args:
        layers (iterable of Module): in their order.
        norm (Module, optional): applied to the last output.

    Raises:
        ValueError: no layers.

    Example:
        >>> import torch, pyeff
        >>> class Layer(torch.nn.Linear):
        ...     def forward(self, tokens, attention_mask=None):
        ...         return tokens + super().forward(tokens)
        >>> stack = pyeff.nn.LayerStack([Layer(16, 16), Layer(16, 16)], norm=torch.nn.LayerNorm(16))
        >>> stack(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not len(self.layers):
            raise ValueError("LayerStack: layers is empty, expected at least one module")
        self.norm = norm

    @classmethod
    def of(cls, model: nn.Module) -> LayerStack:
        """The stack of an encoder: BERT, RoBERTa, DistilBERT, ViT and others that are built like them.

        Args:
            model (Module): of Hugging Face, with or without a head.

        Returns:
            LayerStack: its layers, and the final norm if it has one.

        Raises:
            ValueError: the layers are not where they are looked for.
        """
        base = getattr(model, "base_model", model)
        for path in _LAYERS:
            layers = _at(base, path)
            if isinstance(layers, (nn.ModuleList, nn.Sequential)) and len(layers):
                return cls(layers, next((n for n in (_at(base, p) for p in _NORMS) if n is not None), None))
        raise ValueError(
            f"LayerStack.of: {type(model).__name__} has no layers at {', '.join(_LAYERS)}; pass them to LayerStack"
        )

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[R, K, D] from [R, K, D]; ``attn_mask`` as scaled_dot_product_attention takes it."""
        mask = self._converted(attn_mask, tokens)
        for layer in self.layers:
            out = layer(tokens, mask)
            tokens = out if isinstance(out, Tensor) else out[0]
        return tokens if self.norm is None else self.norm(tokens)

    def mlps(self) -> list[nn.Module]:
        """For each layer the module whose output is its MLP's, before the residual is added.

        Raises:
            ValueError: a layer has none that is known.
        """
        found = []
        for i, layer in enumerate(self.layers):
            module = next((m for m in (_at(layer, path) for path in _MLPS) if m is not None), None)
            if module is None:
                raise ValueError(f"LayerStack.mlps: layer {i} ({type(layer).__name__}) has none of {', '.join(_MLPS)}")
            found.append(module)
        return found

    def _converted(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """The mask as the attention that the layers are configured for takes it."""
        if mask is None:
            return None
        config = next((c for m in self.modules() if (c := getattr(m, "config", None)) is not None), None)
        kind: Any = getattr(config, "_attn_implementation", "sdpa") or "sdpa"
        if kind not in ("sdpa", "eager"):
            raise ValueError(
                f"LayerStack: layers use the attention {kind!r}, which takes no mask [R, H, K, K], expected 'sdpa' or "
                "'eager' (attn_implementation=) where rows are ragged or have a bias"
            )
        if mask.dtype != torch.bool:
            return mask.to(tokens.dtype)
        if kind == "eager":  # it is added to the scores
            return torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, float("-inf"))
        return mask.expand(-1, 1, tokens.shape[1], -1)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
