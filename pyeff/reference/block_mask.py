"""Masks of blocks, by their definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff.plans import MaskPlan
from pyeff.plans.mask import _positions, checked_lengths
from pyeff.reference import _philox
from pyeff.reference.multimask import as_seed


def block_mask(
    B: int,
    M: int,
    shape: Sequence[int],
    *,
    keep: float,
    adjust: float = 0.0,
    length: int,
    inverse: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> MaskPlan:
    """Masks of blocks for B samples and M students; see :func:`pyeff.ops.block_mask` for the arguments.

    Example:
        >>> import pyeff
        >>> plan = pyeff.reference.block_mask(2, 4, (14, 14), keep=0.2, adjust=0.07, length=3)
        >>> plan.rows, plan.width, plan.keep_len.unique().tolist()
        (8, 39, [39])
    """
    device = torch.device(device or "cpu")
    tokens = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    lengths = checked_lengths("block_mask", lengths, B, tokens, device)
    width = len(shape) - 1 and shape[1]
    kept = draw(
        as_seed("block_mask", seed, device), sample_ids, lengths, M, tokens, width, keep,
        share(keep, adjust, length, inverse, len(shape)), length, inverse,
    )  # fmt: skip
    return MaskPlan(*_positions(kept, max(int(tokens * keep), 1)), lengths)


def share(keep: float, adjust: float, length: int, inverse: bool, dimensions: int) -> float:
    """Centres of blocks for each token: blocks of ``length`` in each dimension, if they did not overlap."""
    return ((keep if inverse else 1 - keep) + adjust) / length**dimensions


def draw(
    seed: Tensor, sample_ids: Tensor | None, lengths: Tensor, masks: int, tokens: int, width: int,
    keep: float, share: float, length: int, inverse: bool,
) -> Tensor:  # fmt: skip
    """[R, tokens] bool, True for what is kept. ``width`` is that of a grid, 0 for a sequence."""
    device, batch = lengths.device, lengths.shape[0]
    ids = torch.arange(batch, device=device) if sample_ids is None else sample_ids
    size = lengths.double()[:, None]
    kept = (size * keep).long()
    drawn = kept if inverse else lengths[:, None].long() - kept
    most = max(int(tokens * share), 0)
    block = torch.zeros(batch, masks, tokens, dtype=torch.bool, device=device)
    if most:
        words = torch.stack(_philox.of_sample(seed, ids, masks, -(-most // 4), _philox.CENTRES), -1)
        centre = (words.flatten(2)[..., :most] * lengths.long()[:, None, None]) >> 32
        counts = torch.arange(most, device=device) < (size * share).long()[:, None]
        block = _dilated(centre, counts.expand_as(centre), tokens, width, length)
    words = torch.stack(_philox.of_sample(seed, ids, masks, -(-tokens // 4), _philox.SCORES), -1)
    valid = (torch.arange(tokens, device=device) < lengths[:, None])[:, None]
    score = torch.where(valid, words.flatten(2)[..., :tokens] + (block.long() << 32), -1)
    # Among equals the first.
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    first = (torch.arange(tokens, device=device) < drawn[:, None]).expand_as(order)
    taken = torch.zeros_like(block).scatter(2, order, first)
    return ((taken if inverse else ~taken) & valid).flatten(0, 1)


def _dilated(centre: Tensor, counts: Tensor, tokens: int, width: int, length: int) -> Tensor:
    """[B, M, tokens] bool, True within the blocks around those centres that count."""
    low = torch.arange(length, device=centre.device) - length // 2
    if width:
        y = (centre[..., None, None] // width + low[:, None]).clamp(0, tokens // width - 1)
        x = (centre[..., None, None] % width + low).clamp(0, width - 1)
        at = (y * width + x).flatten(3)
    else:
        at = (centre[..., None] + low).clamp(0, tokens - 1)
    # What does not count lies one place past the end.
    at = torch.where(counts[..., None], at, tokens).flatten(2)
    block = torch.zeros(*at.shape[:2], tokens + 1, dtype=torch.bool, device=centre.device)
    return block.scatter(2, at, True)[..., :tokens]
