"""Random numbers that are a function of what they are for: Philox4x32 with 7 rounds, in plain PyTorch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: four words out of a counter of four words and a
key of two; seven rounds are the fewest of which no statistical test is known that they fail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 7
# What the second word of the counter says beside the number of a mask: what the words are for.
NOISE, CENTRES, SCORES = 0, 1 << 30, 2 << 30

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def words(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words below 2^32, as int64, for each counter (c0, c1, c2, c3) and the 64 bits of a seed."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def of_sample(
    seed: Tensor, sample_ids: Tensor, masks: int, count: int, purpose: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words [B, M, count] for each mask of each sample: the counters 0 to count - 1 of one purpose."""
    device = sample_ids.device
    c0 = torch.arange(count, device=device).expand(sample_ids.shape[0], masks, count)
    c1 = (torch.arange(masks, device=device) + purpose)[:, None].expand_as(c0)
    sample = sample_ids.long()[:, None, None].expand_as(c0)
    return words(seed, c0, c1, sample & _MASK, (sample >> 32) & _MASK)


def normals(seed: Tensor, sample_ids: Tensor, masks: int, tokens: int, width: int) -> Tensor:
    """[B, M, tokens, width] float32, standard normal: four of a row for each counter, by Box and Muller."""
    groups = -(-width // 4)
    w = of_sample(seed, sample_ids, masks, tokens * groups, NOISE)
    pairs = [value for i in (0, 2) for value in _box_muller(w[i], w[i + 1])]
    return torch.stack(pairs, -1).view(sample_ids.shape[0], masks, tokens, 4 * groups)[..., :width]


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # 23 bits and a half of the last: never 0, never 1.
    radius = torch.sqrt(-2.0 * torch.log((a >> 9).float() * 2.0**-23 + 2.0**-24))
    angle = (b >> 8).float() * (2.0**-24 * 2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of a product, which int64 would not hold: by halves of one factor."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
