"""What the ticket's Triton kernels share: where the blocks of a row or column are, and the activations.

A pass over W goes along rows of blocks (y = x W^T) or along columns of blocks (dx = g W). Its `own` side is the one
that has a program each: bo numbers of a row of blocks, bi of a column. Its `other` side is the one it sums over.
"""

import triton
import triton.language as tl

from ._tile import dot

NONE, RELU, GELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)

__all__ = ["GELU", "NONE", "RELU", "activate", "dot", "entry_of", "group_of", "locate", "look_up", "slope"]


@triton.jit
def entry_of(step, begin, k, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """What a step of BLOCK numbers meets: (the entries, one or [BLOCK]; the numbers in their blocks [BLOCK])."""
    joined: tl.constexpr = BLOCK // PIECE
    steps: tl.constexpr = PIECE // BLOCK
    if joined > 1:
        entry = begin + step * joined + k // PIECE
        within = k % PIECE
    elif steps > 1:
        entry = begin + step // steps
        within = step % steps * BLOCK + k
    else:
        entry = begin + step
        within = k
    return entry, within


@triton.jit
def group_of(index, at, groups, blocks, start_at, order_at):
    """The group whose turn it is, and its entries: (group, first, end).

    Nobody has looked into an index on the device. What is out of range is taken for the nearest that is not, here and
    in ``look_up``, so that no index leads out of the tensors.
    """
    group = tl.load(index + order_at + at)
    group = tl.minimum(tl.maximum(group, 0), groups - 1)
    begin = tl.minimum(tl.maximum(tl.load(index + start_at + group), 0), blocks)
    end = tl.minimum(tl.maximum(tl.load(index + start_at + group + 1), 0), blocks)
    return group, begin, end


@triton.jit
def look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS: tl.constexpr):
    """The other coordinate of entries, and where they are stored; 0 for those from ``end`` on.

    ``index`` is that of the ticket: at ``other_at`` the other coordinates, at ``slot_at`` the stored blocks of COLUMNS.
    Along rows an entry is where it is stored.
    """
    exists = entry < end
    other = tl.load(index + other_at + entry, mask=exists, other=0)
    other = tl.minimum(tl.maximum(other, 0), others - 1)
    slot = entry
    if COLUMNS:
        slot = tl.load(index + slot_at + entry, mask=exists, other=0)
        slot = tl.minimum(tl.maximum(slot, 0), blocks - 1)
    return other, slot


@triton.jit
def locate(other, slot, within, COLUMNS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, RUN: tl.constexpr):
    """Where numbers of blocks are: (their places on the other side, those of (own 0, number) in the values, int64).

    RUN neighbours lie side by side, aligned; 1 where that is not known.
    """
    place = other * OTHER + within
    step: tl.constexpr = OWN if COLUMNS else 1
    stored = slot.to(tl.int64) * (OWN * OTHER) + within * step
    if RUN > 1:
        place = tl.max_contiguous(tl.multiple_of(place, RUN), RUN)
        if not COLUMNS:
            stored = tl.max_contiguous(tl.multiple_of(stored, RUN), RUN)
    return place, stored


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """By comparisons and products, which keep NaN."""
    if ACTIVATION == RELU:
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * _ROOT_HALF))
    return z


@triton.jit
def slope(grad, saved, ACTIVATION: tl.constexpr):
    """grad times the activation's derivative, from what the forward saved: y for relu, z for gelu."""
    if ACTIVATION == RELU:
        grad = tl.where(saved <= 0.0, 0.0, grad)
    elif ACTIVATION == GELU:
        density = tl.exp(-0.5 * saved * saved) * _ROOT_TWO_PI
        # Infinity, which float16 makes of large numbers, times a density of zero would be NaN.
        term = tl.where(density == 0.0, 0.0, saved * density)
        grad = grad * (0.5 * (1.0 + tl.erf(saved * _ROOT_HALF)) + term)
    return grad
