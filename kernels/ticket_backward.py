"""The ticket's gradients in Triton beside dx (which is ``ticket_forward.multiply``): g, the bias', and the blocks'.

g = grad * act'(saved), dW = g^T x on living blocks, db = sum g. No atomics: every partial sum has its place, and a
second kernel adds them up in their order. Letters and rules as in ticket_forward.py.
"""

import triton
import triton.language as tl

from ._ticket_tile import NONE, dot, entry_of, group_of, locate, look_up, slope


@triton.jit(do_not_specialize=["tokens", "tokens_each", "grad_stride"])
def derive(
    grad, saved, g, sums, tokens, tokens_each, width, grad_stride,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """g = grad * act'(saved), and its sums over parts of the tokens.

    Args:
        grad: [N, width] T, rows grad_stride apart. saved: [N, width] T, or None without an activation.
        g: [N, width] T, out, or None. sums: [parts, width] float32 or T, out, or None.
        tokens_each: a part's tokens, a multiple of BLOCK_N.

    Grid: (ceil(width / BLOCK_M), parts).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    start = part * tokens_each
    stop = tl.minimum(start + tokens_each, tokens)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n < stop)[:, None] & (m < width)[None, :]
        row = n.to(tl.int64)[:, None]
        value = tl.load(grad + row * grad_stride + m[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row * width + m[None, :]
        if ACTIVATION != NONE:
            value = slope(value, tl.load(saved + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        if g is not None:
            tl.store(g + at, value.to(g.dtype.element_ty), mask=mask)
        total += value
    if sums is not None:
        to = sums + part.to(tl.int64) * width + m
        tl.store(to, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=m < width)


@triton.jit(
    do_not_specialize=[
        "tokens", "tokens_each", "size", "groups", "others", "blocks", "start_at", "other_at", "slot_at", "order_at",
    ]
)  # fmt: skip
def outer_blocks(
    own, other, index, to, tokens, tokens_each, size, groups, others, blocks, start_at, other_at, slot_at, order_at,
    own_stride, other_stride, own_width, other_width,
    COLUMNS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PIECE: tl.constexpr, RUN: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a strip of blocks of one row (column) over a part of the tokens.

    Args:
        own: g [N, out] T (COLUMNS: x [N, in]), rows own_stride apart. other: x (COLUMNS: g), likewise.
        to: [parts, nnz, bo, bi] float32 or T, out; ``size`` numbers a part.
        tokens_each: a part's tokens, a multiple of BLOCK_K.
        The rest as in ``ticket_forward.multiply``. A strip is BLOCK_N / PIECE blocks, neighbours or not, or a part of
            one; its blocks share what they need of ``own``.

    What lies past the edge of W comes out as zero. Strips past a group's last block end at once.
    Grid: (groups * ceil(OWN / BLOCK_M) * most strips of a group, parts).
    """
    parts: tl.constexpr = (OWN + BLOCK_M - 1) // BLOCK_M
    joined: tl.constexpr = BLOCK_N // PIECE if BLOCK_N > PIECE else 1
    steps: tl.constexpr = PIECE // BLOCK_N if PIECE > BLOCK_N else 1
    pid = tl.program_id(0)
    at = pid % (groups * parts)
    strip = pid // (groups * parts)
    group, begin, end = group_of(index, at // parts, groups, blocks, start_at, order_at)
    if begin + strip // steps * joined < end:
        m = at % parts * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tl.arange(0, BLOCK_N)
        entry, within = entry_of(strip, begin, j, PIECE, BLOCK_N)
        other_group, slot = look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS)
        place, stored = locate(other_group, slot, within, COLUMNS, OWN, OTHER, RUN)
        inside = (entry < end) & (within < OTHER)
        column = group * OWN + m
        part = tl.program_id(1)
        start = part * tokens_each
        stop = tl.minimum(start + tokens_each, tokens)
        has_place = inside
        if not WHOLE:
            has_place = inside & (place < other_width)
        has_column = (m < OWN) & (column < own_width)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for n0 in range(start, stop, BLOCK_K):
            n = n0 + tl.arange(0, BLOCK_K)
            live = n < stop
            row = n.to(tl.int64)
            # Transposed as it is loaded: only so it goes to shared memory by itself on every architecture.
            pointers = other + (row * other_stride)[None, :] + place[:, None]
            left = tl.load(pointers, mask=has_place[:, None] & live[None, :], other=0.0)
            pointers = own + (row * own_stride)[:, None] + column[None, :]
            right = tl.load(pointers, mask=live[:, None] & has_column[None, :], other=0.0)
            acc = dot(left, right, acc)
        own_step: tl.constexpr = 1 if COLUMNS else OTHER
        pointers = to + part.to(tl.int64) * size + stored[:, None] + (m * own_step)[None, :]
        real = has_place[:, None] & has_column[None, :]
        tl.store(pointers, acc.to(to.dtype.element_ty), mask=real)
        # What was not loaded was zero, but zero times NaN is none: a block's padding has no gradient.
        padding = inside[:, None] & (m < OWN)[None, :] & (real == 0)
        tl.store(pointers, tl.zeros([BLOCK_N, BLOCK_M], to.dtype.element_ty), mask=padding)


@triton.jit(do_not_specialize=["parts", "size"])
def add_parts(parted, to, parts, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """to[j] = the sum of parted[:, j], always in the same order.

    Args:
        parted: [parts, size] float32. to: [size] T, out.

    Grid: (ceil(size / BLOCK_N),).
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for m0 in range(0, parts, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < parts)[:, None] & (j < size)[None, :]
        acc += tl.sum(tl.load(parted + m.to(tl.int64)[:, None] * size + j[None, :], mask=mask, other=0.0), axis=0)
    tl.store(to + j, acc.to(to.dtype.element_ty), mask=j < size)
