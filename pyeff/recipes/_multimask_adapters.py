"""I-JEPA, V-JEPA, MAE and iBOT on the ops of the multimask family: their helpers and losses, as their users know them.

JEPA's code lists masks: P tensors [B, K] of token indices, and stacks rows mask by mask, row p*B + b. The ops stack
them sample by sample, row b*P + p; what is given and returned here has JEPA's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pyeff import ops
from pyeff.plans import MaskPlan


def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """The tokens that each mask lists, as I-JEPA's and V-JEPA's helper of this name gives them.

    One gather for all masks from one copy of ``x``; the gradient of a token is one sum over the masks, in their order.

    Args:
        x (Tensor): [B, T, D].
        masks (sequence of Tensor): P tensors [B, K] of integers, tokens in any order, each at most once in a row. K may
            differ between masks with ``concat=False``.
        concat (bool): one tensor, or a list of P, which are then views of one gathered tensor (a copy less).

    Returns:
        Tensor or list of Tensor: [P*B, K, D], row p*B + b; or P tensors [B, K, D].

    Raises:
        ValueError: masks that do not fit; on a CPU also a token that is not there, or twice in a row.

    Source: Assran et al., 2023, arXiv 2301.08243; Bardes et al., 2024, arXiv 2404.08471, and their code.

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> x = torch.arange(6.0).view(2, 3, 1)
        >>> masks = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 0], [0, 2]])]
        >>> multimask.apply_masks(x, masks).flatten(1).tolist()
        [[0.0, 1.0], [4.0, 5.0], [2.0, 0.0], [3.0, 5.0]]
    """
    sizes = _check_masks("apply_masks", x, masks)
    if concat and len(set(sizes)) > 1:
        raise ValueError(f"apply_masks: masks keep {sizes} tokens, expected as many in each, or concat=False")
    kept = ops.multimask_gather(x, listed(masks, x.shape[1]))
    kept = kept.unflatten(0, (x.shape[0], len(masks)))
    if concat:
        return kept.transpose(0, 1).flatten(0, 1)
    return [each[:, :size] for each, size in zip(kept.unbind(1), sizes, strict=True)]


def repeat_interleave_batch(x: Tensor, B: int, repeat: int) -> Tensor:
    """Each batch of B rows ``repeat`` times in a row, as I-JEPA's helper of this name does, in one copy.

    Args:
        x (Tensor): [N*B, ...].
        B (int): rows of a batch.
        repeat (int): how often.

    Returns:
        Tensor: [N*repeat*B, ...].

    Raises:
        ValueError: B does not divide the rows.

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> multimask.repeat_interleave_batch(torch.arange(4), 2, 2).tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
    """
    if B < 1 or repeat < 1 or x.shape[0] % B:
        raise ValueError(
            f"repeat_interleave_batch: x has {x.shape[0]} rows, B is {B} and repeat {repeat}, expected a multiple of B"
        )
    count = x.shape[0] // B
    return x.view(count, 1, B, *x.shape[1:]).expand(-1, repeat, *(-1,) * x.dim()).flatten(0, 2)


def ijepa_loss(
    pred: Tensor, target: Tensor, masks: Sequence[Tensor], *, contexts: int = 1, beta: float = 1.0, norm: bool = True
) -> Tensor:
    """I-JEPA's loss from what the target encoder gave: layer norm, the predicted blocks, smooth L1, mean.

    The same as ``smooth_l1_loss(pred, repeat_interleave_batch(apply_masks(layer_norm(target), masks), B, contexts))``,
    with targets repeated for no context, and the gradient of ``pred`` written in the forward pass.

    Args:
        pred (Tensor): [P*contexts*B, K, D], the predictor's output in its own order: row (p*contexts + c)*B + b.
        target (Tensor): [B, T, D], the target encoder's output. No gradient.
        masks (sequence of Tensor): P tensors [B, K], the blocks to be predicted.
        contexts (int): context masks of each sample.
        beta (float): of smooth L1.
        norm (bool): layer norm of the targets over channels, without affine map.

    Returns:
        Tensor: a number.

    Raises:
        ValueError: shapes that do not fit.

    Source: Assran et al., 2023, arXiv 2301.08243, and its code.

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> masks = [torch.randperm(9)[:4].expand(2, 4) for _ in range(3)]
        >>> pred = torch.randn(3 * 2, 4, 8, requires_grad=True)
        >>> multimask.ijepa_loss(pred, torch.randn(2, 9, 8), masks).backward()
    """
    if isinstance(contexts, bool) or not isinstance(contexts, int) or contexts < 1:
        came = repr(contexts) if isinstance(contexts, (int, float)) else f"a {type(contexts).__name__}"
        raise ValueError(f"ijepa_loss: contexts is {came}, expected how many context masks each sample has")
    sizes = _check_masks("ijepa_loss", target, masks)
    (batch, _, width), count = target.shape, len(masks)
    if tuple(pred.shape) != (count * contexts * batch, sizes[0], width) or len(set(sizes)) > 1:
        raise ValueError(
            f"ijepa_loss: pred has shape {list(pred.shape)}, expected {[count * contexts * batch, sizes[0], width]} "
            f"for {count} masks of one size, {contexts} contexts and {batch} samples"
        )
    wanted = cast(Tensor, apply_masks(_normed(target, norm), masks))
    if contexts > 1:
        pred = pred.unflatten(0, (count, contexts, batch)).transpose(1, 2).flatten(0, 2)
    return _all(pred, wanted, kind="smooth_l1" if beta else "l1", beta=beta)


def vjepa_loss(
    preds: Sequence[Tensor], target: Tensor, masks: Sequence[Tensor], *, loss_exp: float = 1.0, norm: bool = True
) -> Tensor:
    """V-JEPA's loss: the mean over masks of mean(\\|pred - target\\|^loss_exp) / loss_exp, targets layer-normed.

    Args:
        preds (sequence of Tensor): P tensors [B, K_p, D].
        target (Tensor): [B, T, D], the target encoder's output. No gradient.
        masks (sequence of Tensor): P tensors [B, K_p], the tokens to be predicted.
        loss_exp (float): 1 or 2.
        norm (bool): layer norm of the targets over channels, without affine map.

    Returns:
        Tensor: a number.

    Raises:
        ValueError: shapes that do not fit, or another exponent.

    Source: Bardes et al., 2024, arXiv 2404.08471, and its code.

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> masks = [torch.randperm(9)[:k].expand(2, k) for k in (4, 7)]
        >>> preds = [torch.randn(2, k, 8, requires_grad=True) for k in (4, 7)]
        >>> multimask.vjepa_loss(preds, torch.randn(2, 9, 8), masks).backward()
    """
    if loss_exp not in (1, 2):
        raise ValueError(f"vjepa_loss: loss_exp is {loss_exp!r}, expected 1 or 2")
    sizes = _check_masks("vjepa_loss", target, masks)
    batch, _, width = target.shape
    expected = [(batch, size, width) for size in sizes]
    if [tuple(p.shape) for p in preds] != expected:
        raise ValueError(f"vjepa_loss: preds have shapes {[list(p.shape) for p in preds]}, expected {expected}")
    wanted = apply_masks(_normed(target, norm), masks, concat=False)
    kind = "l1" if loss_exp == 1 else "l2"
    scale = 1 / (loss_exp * len(masks))
    return torch.stack([_all(p, h, kind=kind, scale=scale) for p, h in zip(preds, wanted, strict=True)]).sum()


def mae_loss(
    pred: Tensor, target: Tensor, mask: Tensor | MaskPlan, *, norm_pix_loss: bool = False, eps: float = 1e-6
) -> Tensor:
    """MAE's loss: the mean square over removed patches, of patches that were normed one by one if wanted.

    Args:
        pred (Tensor): [B, T, C] (with a plan: [B*M, T, C]), without the class token.
        target (Tensor): [B, T, C], the patches. No gradient.
        mask (Tensor or MaskPlan): [B, T], not zero where a patch was removed.
        norm_pix_loss (bool): each patch less its mean, over its (unbiased) deviation. Default: as MAE's code, not.
        eps (float): added to the variance.

    Returns:
        Tensor: a number; NaN where nothing was removed.

    Raises:
        ValueError: shapes that do not fit.

    Source: He et al., 2022, arXiv 2111.06377, and its code (``forward_loss``).

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> pred, patches = torch.randn(2, 9, 12, requires_grad=True), torch.rand(2, 9, 12)
        >>> multimask.mae_loss(pred, patches, torch.rand(2, 9) < 0.75).backward()
    """
    plan = _masked("mae_loss", target, mask)
    if norm_pix_loss:
        width = target.shape[-1]
        # The op's variance is biased: what differs is a factor of the result, and one of eps.
        share = (width - 1) / width
        total = target.new_zeros(target.shape, dtype=torch.promote_types(target.dtype, torch.float32))
        ops.multimask_accumulate_(total, target, weight=math.sqrt(share), norm="layer", eps=max(eps * share, 1e-30))
        target = total
    return cast(Tensor, ops.multimask_loss(pred, target.detach(), plan, scale=1.0, reduction="mean"))


def mae_decoder_input(
    x: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor | MaskPlan,
    *,
    pos_embed: Tensor | None = None,
    prefix: int = 1,
) -> Tensor:
    """What MAE's decoder sees: encoded patches in their places, the mask token in the others.

    The same as repeating the mask token, concatenating and unshuffling with ``ids_restore``, in one pass.

    Args:
        x (Tensor): [B, prefix + K, D] (with a plan: [B*M, prefix + K, D]), encoded, class token first.
        mask_token (Tensor): [D], or [1, 1, D]. Differentiable.
        ids_restore (Tensor or MaskPlan): [B, T] integers, for each patch its place in the shuffled sequence, whose
            first K were kept.
        pos_embed (Tensor, optional): [prefix + T, D] or [1, prefix + T, D], added to all.
        prefix (int): tokens before the patches.

    Returns:
        Tensor: [B, prefix + T, D] (with a plan: B*M rows).

    Raises:
        ValueError: shapes that do not fit.

    Source: He et al., 2022, arXiv 2111.06377, and its code (``forward_decoder``).

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> x = torch.arange(1.0, 4.0).view(1, 3, 1)  # class token, two patches
        >>> multimask.mae_decoder_input(x, torch.zeros(1, 1, 1), torch.tensor([[2, 0, 3, 1]])).flatten().tolist()
        [1.0, 0.0, 2.0, 0.0, 3.0]
    """
    if isinstance(ids_restore, MaskPlan):
        plan = ids_restore
    else:
        if ids_restore.dim() != 2 or ids_restore.is_floating_point() or len(ids_restore) != len(x):
            raise ValueError(
                f"mae_decoder_input: ids_restore is {ids_restore.dtype} {list(ids_restore.shape)}, expected integers "
                f"[{x.shape[0]}, T]"
            )
        plan = restored(ids_restore, x.shape[1] - prefix)
    if prefix:
        plan = plan.with_prefix(prefix)
    token = mask_token.reshape(-1)
    out = ops.multimask_scatter(x, plan, fill=token.to(x.dtype), noise_std=0.0)
    if pos_embed is None:
        return out
    if tuple(pos_embed.shape) not in (out.shape[1:], (1, *out.shape[1:])):
        raise ValueError(
            f"mae_decoder_input: pos_embed has shape {list(pos_embed.shape)}, expected [1, {out.shape[1]}, "
            f"{out.shape[2]}]: the {prefix} tokens of the prefix and {out.shape[1] - prefix} patches"
        )
    return out + pos_embed


def ibot_loss(pred: Tensor, target: Tensor, mask: Tensor | MaskPlan) -> Tensor:
    """An iBOT-style loss of hidden tokens: 1 - cos(student, teacher), a mean over each student's tokens, then over all.

    iBOT itself compares distributions over prototypes; its averaging is this one. A student from whom nothing is hidden
    counts as zero.

    Args:
        pred (Tensor): [B, T, D] (with a plan: [B*M, T, D]), the students' tokens.
        target (Tensor): [B, T, D], the teacher's.
        mask (Tensor or MaskPlan): [B, T], not zero where a token is hidden.

    Returns:
        Tensor: a number.

    Raises:
        ValueError: shapes that do not fit.

    Source: Zhou et al., 2022, arXiv 2111.07832, for the averaging.

    Example:
        >>> import torch
        >>> from pyeff.recipes import multimask
        >>> pred = torch.randn(2, 9, 8, requires_grad=True)
        >>> multimask.ibot_loss(pred, torch.randn(2, 9, 8), torch.rand(2, 9) < 0.5).backward()
    """
    plan = _masked("ibot_loss", target, mask)
    each = cast(Tensor, ops.multimask_loss(pred, target.detach(), plan, kind="cosine", scale=1.0, reduction="none"))
    count = plan.hidden().flatten(0, 1).sum(1).clamp(min=1)
    return (each.sum(1) / count).mean()


def listed(masks: Sequence[Tensor], tokens: int) -> MaskPlan:
    """The plan of JEPA's lists of tokens, in the order in which they are listed."""
    width = max(m.shape[1] for m in masks)
    ids = torch.stack([torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in masks], 1)
    batch = ids.shape[0]
    rows = ids.flatten(0, 1)
    # Made where the masks are: nothing waits for a device.
    counts = torch.stack([m.new_full((batch,), m.shape[1], dtype=torch.int32) for m in masks], 1).flatten()
    slot = torch.arange(width, dtype=torch.int32, device=ids.device).expand(len(rows), width)
    # One place more, for what does not count.
    where = torch.where(slot < counts[:, None], rows, tokens).long()
    inverse = torch.full((len(rows), tokens + 1), -1, dtype=torch.int32, device=ids.device)
    inverse = inverse.scatter(1, where, slot)[:, :tokens].contiguous()
    lengths = _full((batch,), tokens, ids.device)
    return MaskPlan(rows.to(torch.int32).contiguous(), counts, inverse, lengths)


def restored(ids_restore: Tensor, kept: int) -> MaskPlan:
    """The plan of MAE's shuffle: the patches whose places come first are those that are kept."""
    batch, tokens = ids_restore.shape
    if not 0 < kept <= tokens:
        raise ValueError(f"mae_decoder_input: x has {kept} patches, expected 1 to the {tokens} of ids_restore")
    inverse, device = torch.where(ids_restore < kept, ids_restore, -1).to(torch.int32), ids_restore.device
    ids = ids_restore.argsort(1)[:, :kept].to(torch.int32).contiguous()
    return MaskPlan(ids, _full((batch,), kept, device), inverse, _full((batch,), tokens, device))


def _full(shape: tuple[int, ...], value: int, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device=device)


def _check_masks(op: str, x: Tensor, masks: Sequence[Tensor]) -> list[int]:
    """How many tokens each mask lists."""
    if not isinstance(masks, Sequence) or not masks:
        raise ValueError(f"{op}: masks is {type(masks).__name__}, expected a list of tensors [B, K]")
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [B, T, D]")
    for i, mask in enumerate(masks):
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(x) and mask.shape[1] > 0
        if not fits or mask.dtype not in (torch.int32, torch.int64) or mask.device != x.device:
            came = f"{mask.dtype} {list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"{op}: masks[{i}] is {came}, expected integers [{len(x)}, K] on {x.device}")
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            given = mask.sort(1).values
            if int(given[:, 0].min()) < 0 or int(given[:, -1].max()) >= x.shape[1]:
                raise ValueError(f"{op}: masks[{i}] has tokens outside of 0 to {x.shape[1] - 1}")
            if bool((given[:, 1:] == given[:, :-1]).any()):
                raise ValueError(f"{op}: masks[{i}] has a token twice in a row, expected each at most once")
    return [mask.shape[1] for mask in masks]


def _masked(op: str, target: Tensor, mask: Tensor | MaskPlan) -> MaskPlan:
    if isinstance(mask, MaskPlan):
        return mask
    if target.dim() != 3 or tuple(mask.shape) != tuple(target.shape[:2]):
        raise ValueError(
            f"{op}: mask has shape {list(mask.shape)} and target {list(target.shape)}, expected [B, T], [B, T, D]"
        )
    hidden = mask if mask.dtype == torch.bool else mask != 0
    # As many slots as tokens: how many are kept would have to be waited for.
    return MaskPlan.from_mask(hidden[:, None], width=max(mask.shape[1], 1))


def _normed(target: Tensor, norm: bool) -> Tensor:
    return ops.multimask_targets([target.detach()], norm="layer") if norm else target.detach()


def _all(pred: Tensor, target: Tensor, *, kind: str, beta: float = 0.0, scale: float = 1.0) -> Tensor:
    """The mean loss of [N*C, K, D] against [N, K, D], every token of which counts."""
    (rows, tokens, _), device = pred.shape, pred.device
    plan = MaskPlan(
        _full((rows, 1), 0, device), _full((rows,), 0, device), _full((rows, tokens), -1, device),
        _full((len(target),), tokens, device),
    )  # fmt: skip
    return cast(Tensor, ops.multimask_loss(pred, target, plan, kind=kind, beta=beta, scale=scale, reduction="mean"))
