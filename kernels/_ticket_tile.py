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

__all__ = ["GELU", "NONE", "RELU", "activate", "dot", "locate", "slope"]


@triton.jit
def locate(
    index, entry, end, within, other_at, slot_at,
    COLUMNS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, RUN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Numbers ``within`` of the blocks ``entry``: (their places on the other side, in the values, whether they exist).

    Args:
        index: [*] int32, of a ticket: at ``other_at`` the other coordinate of each entry, at ``slot_at`` the stored
            block (COLUMNS; along rows an entry is where it is stored).
        entry: which block, a number, or [B] if JOINED is more than 1, where those from ``end`` on do not exist.
        within: [B], the number in the block, from 0 to OTHER; those from OTHER on do not exist.
        RUN: so many neighbours lie side by side, aligned; 1 where that is not known.

    The place in the values is that of (own 0, within), int64.
    """
    inside = within < OTHER
    slot = entry
    if JOINED > 1:
        inside = inside & (entry < end)
        other = tl.load(index + other_at + entry, mask=entry < end, other=0)
        if COLUMNS:
            slot = tl.load(index + slot_at + entry, mask=entry < end, other=0)
    else:
        other = tl.load(index + other_at + entry)
        if COLUMNS:
            slot = tl.load(index + slot_at + entry)
    place = other * OTHER + within
    step: tl.constexpr = OWN if COLUMNS else 1
    stored = slot.to(tl.int64) * (OWN * OTHER) + within * step
    if RUN > 1:
        place = tl.max_contiguous(tl.multiple_of(place, RUN), RUN)
        if not COLUMNS:
            stored = tl.max_contiguous(tl.multiple_of(stored, RUN), RUN)
    return place, stored, inside


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
        grad = grad * (0.5 * (1.0 + tl.erf(saved * _ROOT_HALF)) + saved * density)
    return grad
