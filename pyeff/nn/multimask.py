"""The students of one teacher: what they see, what they predict, and what they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyeff import ops
from pyeff.nn._multimask_convolution import ConvDecoder1d, ConvDecoder2d
from pyeff.nn._multimask_ema import EMATeacher
from pyeff.nn._multimask_encoder import LayerStack, RelativeBias, key_mask, slopes_of
from pyeff.nn._multimask_targets import MultimaskTargets, TargetRecorder
from pyeff.nn._multimask_watch import CollapseWatch
from pyeff.plans import MaskPlan
from pyeff.reference.multimask import KINDS

__all__ = [
    "CollapseWatch",
    "ConvDecoder1d",
    "ConvDecoder2d",
    "EMATeacher",
    "LayerStack",
    "LossParts",
    "MultimaskLoss",
    "MultimaskStudent",
    "MultimaskTargets",
    "RelativeBias",
    "TargetRecorder",
    "key_mask",
    "slopes_of",
]


class MultimaskStudent(nn.Module):
    """Masked students of a batch: gather, encode, put back, decode; every sample is embedded once for all its masks.

    The encoder is called as ``encoder(tokens, attn_mask)`` with tokens [R, K, D] and returns [R, K, D']. ``attn_mask``
    is what scaled_dot_product_attention takes: None where all rows are full and there is no bias; else bool
    [R, 1, 1, K], True for keys that count; or, with ``bias``, floating [R, H, K, K] to be added to the scores, -inf for
    keys that do not count. :class:`LayerStack` makes such an encoder of Hugging Face's layers. The decoder is called as
    ``decoder(x)`` with [R, T, D'], or ``decoder(x, lengths=...)`` with int32 [R] if its attribute ``takes_lengths`` is
    true and there may be padding.

    Args:
        encoder (Module or callable): as above.
        decoder (Module or callable, optional): as above; None returns its input.
        prefix (int): leading tokens of ``x`` that every student sees and that are never predicted, such as a class
            token.
        noise_std (float): of the noise in hidden places.
        bias (RelativeBias, optional): a bias of attention by distance.
        bridge (Module, optional): applied to what was encoded before it is put back, as where a decoder is narrower.

    Raises:
        ValueError: ``encoder`` cannot be called, or ``prefix`` or ``noise_std`` is out of range.

    Source: Baevski et al., 2022, arXiv 2212.07525, sections 3.1 and 3.2.

    Example:
        >>> import torch, pyeff
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> def encoder(tokens, attn_mask):  # all rows are full here
        ...     return layer(tokens)
        >>> student = pyeff.nn.MultimaskStudent(encoder, pyeff.nn.ConvDecoder1d(32, hidden=16, groups=4, layers=2))
        >>> plan = pyeff.ops.block_mask(2, 4, (20,), keep=0.5, adjust=0.05, length=5, seed=1)
        >>> student(torch.randn(2, 20, 32), plan, seed=1).shape
        torch.Size([8, 20, 32])
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any = None,
        *,
        prefix: int = 0,
        noise_std: float = 0.01,
        bias: RelativeBias | None = None,
        bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not callable(encoder) or not (decoder is None or callable(decoder)):
            raise ValueError("MultimaskStudent: encoder or decoder cannot be called, expected modules or functions")
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(f"MultimaskStudent: prefix is {prefix!r}, expected an integer of at least 0")
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"MultimaskStudent: noise_std is {noise_std!r}, expected a finite number of at least 0")
        self.encoder, self.decoder, self.bias, self.bridge = encoder, decoder, bias, bridge
        self.prefix, self.noise_std = prefix, noise_std

    def forward(
        self,
        x: Tensor,
        plan: MaskPlan,
        *,
        seed: int | Tensor = 0,
        sample_ids: Tensor | None = None,
        positions: Tensor | None = None,
        ragged: bool | None = None,
        with_prefix: bool = False,
    ) -> Any:
        """What each student predicts for every token.

        Args:
            x (Tensor): [B, prefix + T, D], embedded tokens, with positions already added.
            plan (MaskPlan): of B samples of T tokens (without the prefix).
            seed (int or Tensor), sample_ids (Tensor, optional): of the noise, as for
                :func:`pyeff.ops.multimask_scatter`.
            positions (Tensor, optional): [D'], [T, D'] or [B, T, D'], what stands in hidden places under the noise:
                positions, a mask token, or their sum.
            ragged (bool, optional): whether rows may keep fewer than K tokens, or samples have padding. Default: looked
                up on the CPU; True elsewhere, where it would have to be waited for, and while compiling.
            with_prefix (bool): also return the encoded prefix [B*M, prefix, D'].

        Returns:
            Tensor or (Tensor, Tensor): [B*M, T, D''], row b*M + m for mask m of sample b.

        Raises:
            ValueError: shapes that do not fit.
        """
        if not isinstance(plan, MaskPlan) or plan.prefix:
            raise ValueError("MultimaskStudent: plan is no pyeff.MaskPlan without prefix, expected one of T tokens")
        if x.dim() != 3 or x.shape[0] != plan.batch or x.shape[1] != self.prefix + plan.tokens:
            raise ValueError(
                f"MultimaskStudent: x has shape {list(x.shape)}, expected [{plan.batch}, {self.prefix + plan.tokens}, "
                f"D] for {self.prefix} prefix tokens and the {plan.tokens} of plan"
            )
        if ragged is None:
            ragged = is_ragged(plan)
        seen = plan.with_prefix(self.prefix) if self.prefix else plan
        tokens = ops.multimask_gather(x, seen)
        attn_mask: Tensor | None = None
        if self.bias is not None:
            attn_mask = self.bias(seen, dtype=tokens.dtype)
        elif ragged:
            attn_mask = key_mask(seen)
        encoded = self.encoder(tokens, attn_mask)
        if not isinstance(encoded, Tensor) or encoded.shape[:2] != tokens.shape[:2]:
            shown = list(encoded.shape) if isinstance(encoded, Tensor) else f"a {type(encoded).__name__}"
            raise ValueError(f"MultimaskStudent: encoder gave {shown}, expected {[*tokens.shape[:2], 'D']}")
        own = encoded[:, self.prefix :]
        if self.bridge is not None:
            own = self.bridge(own)
        if positions is not None:
            positions = positions.to(own.dtype)
        out = ops.multimask_scatter(
            own, plan, fill=positions, noise_std=self.noise_std, seed=seed, sample_ids=sample_ids
        )
        if self.decoder is not None:
            if ragged and getattr(self.decoder, "takes_lengths", False):
                out = self.decoder(out, lengths=plan.lengths.repeat_interleave(plan.masks))
            else:
                out = self.decoder(out)
        return (out, encoded[:, : self.prefix]) if with_prefix else out

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, noise_std={self.noise_std}"


def is_ragged(plan: MaskPlan) -> bool:
    """Whether rows may keep fewer tokens than they have slots for, or samples may have padding."""
    if plan.keep_len.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return int(plan.keep_len.min()) < plan.width or int(plan.lengths.min()) < plan.tokens


@dataclass
class LossParts:
    """What :class:`MultimaskLoss` gives.

    Attributes:
        loss (Tensor): to be differentiated.
        count (Tensor): [] int64, hidden tokens over all students: what a sum is to be divided by.
        cls (Tensor or None): the class token's part, before its weight; detached.
        moments (Tensor or None): for :class:`CollapseWatch`.

    Example:
        >>> import torch, pyeff
        >>> parts = pyeff.nn.LossParts(loss=torch.tensor(6.0), count=torch.tensor(3))
        >>> float(parts.loss / parts.count)
        2.0
    """

    loss: Tensor
    count: Tensor
    cls: Tensor | None = None
    moments: Tensor | None = None


class MultimaskLoss(nn.Module):
    """The students' loss over hidden tokens, and that of the class token against the mean of the targets over T.

    ``loss = masked + cls_weight * cls``, where ``cls`` is the mean over students of the same distance, summed over
    channels. For ``reduction="sum"`` it counts once for each hidden token, so that the sum over ``count`` is the mean
    of both.

    Args:
        kind (str), beta (float), scale (float, optional): as for :func:`pyeff.ops.multimask_loss`.
        reduction (str): ``"sum"`` or ``"mean"`` (over hidden elements; of the class token over channels too).
        cls_weight (float): 0 for no loss of a class token.

    Raises:
        ValueError: an option that is unknown or out of range.

    Source: Baevski et al., 2022, arXiv 2212.07525, section 3.3; the class token's loss is section 4.1.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.ops.block_mask(2, 4, (20,), keep=0.5, adjust=0.05, length=5)
        >>> pred, target = torch.randn(8, 20, 16, requires_grad=True), torch.randn(2, 20, 16)
        >>> parts = pyeff.nn.MultimaskLoss(cls_weight=0.01)(pred, target, plan, cls=torch.randn(8, 16))
        >>> (parts.loss / parts.count).backward()
    """

    def __init__(
        self,
        kind: str = "l2",
        *,
        beta: float = 0.0,
        scale: float | None = None,
        reduction: str = "sum",
        cls_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"MultimaskLoss: kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"MultimaskLoss: reduction is {reduction!r}, expected 'sum' or 'mean'")
        if not 0 <= cls_weight < float("inf"):
            raise ValueError(f"MultimaskLoss: cls_weight is {cls_weight!r}, expected a finite number of at least 0")
        self.kind, self.beta, self.scale, self.reduction, self.cls_weight = kind, beta, scale, reduction, cls_weight

    def forward(
        self, pred: Tensor, target: Tensor, plan: MaskPlan, *, cls: Tensor | None = None, statistics: bool = False
    ) -> LossParts:
        """The loss of a batch.

        Args:
            pred (Tensor): [B*M, T, D].
            target (Tensor): [B, T, D].
            plan (MaskPlan): what is hidden.
            cls (Tensor, optional): [B*M, D], predictions of the class token; needed with ``cls_weight``.
            statistics (bool): with moments, for :class:`CollapseWatch`.

        Returns:
            LossParts: the loss, the count of hidden tokens, the class token's part, and moments.

        Raises:
            ValueError: shapes that do not fit, or ``cls`` without a weight, or a weight without it.
        """
        if (cls is None) != (self.cls_weight == 0):
            raise ValueError(
                f"MultimaskLoss: cls_weight is {self.cls_weight} and cls {'missing' if cls is None else 'given'}, "
                "expected both or none"
            )
        found: Any = ops.multimask_loss(
            pred, target, plan, kind=self.kind, beta=self.beta, scale=self.scale, reduction=self.reduction,
            statistics=statistics,
        )  # fmt: skip
        loss, moments = found if statistics else (found, None)
        count = plan.count()
        if cls is None:
            return LossParts(loss, count, None, moments)
        part = self._cls(cls, target, plan)
        weighed = part * self.cls_weight
        loss = loss + (weighed * count if self.reduction == "sum" else weighed)
        return LossParts(loss, count, part.detach(), moments)

    def _cls(self, cls: Tensor, target: Tensor, plan: MaskPlan) -> Tensor:
        """The mean over students of their class token's distance from the mean target of their sample."""
        width = target.shape[-1]
        if tuple(cls.shape) != (plan.rows, width):
            raise ValueError(f"MultimaskLoss: cls has shape {list(cls.shape)}, expected [{plan.rows}, {width}]")
        # Targets are zero at padding.
        mean = target.sum(1, keepdim=True) / plan.lengths.clamp(min=1)[:, None, None]
        # Every student's token is one that is hidden from it, in a sequence of that token alone.
        alone = MaskPlan(
            plan.keep_len.new_zeros((plan.rows, 1)), plan.keep_len.new_zeros(plan.rows),
            plan.keep_len.new_full((plan.rows, 1), -1), plan.lengths.new_ones(plan.batch),
        )  # fmt: skip
        total = cast(
            Tensor,
            ops.multimask_loss(cls[:, None], mean, alone, kind=self.kind, beta=self.beta, scale=self.scale),
        )
        elements = plan.rows * (width if self.reduction == "mean" and self.kind != "cosine" else 1)
        return total / elements

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, reduction={self.reduction!r}, cls_weight={self.cls_weight}"
