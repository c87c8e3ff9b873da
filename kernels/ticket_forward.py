"""The ticket's products with W in Triton: y = act(x W^T + b) along rows of blocks, dx = g W along columns of blocks.

Either is a sum over the living blocks of a row (column); the blocks are multiplied where they lie, transposed as they
are loaded. Sums are in float32 and in a fixed order; what is stored as T is rounded once. Rows of tokens past the last
repeat it and are not stored. Offsets of rows and of stored blocks are int64. docs/ticket.md has the mathematics.
"""

import triton
import triton.language as tl

from ._ticket_tile import activate, dot, entry_of, group_of, locate, look_up


@triton.jit(do_not_specialize=["tokens", "groups", "others", "blocks", "start_at", "other_at", "slot_at", "order_at"])
def multiply(
    x, values, index, bias, y, z, tokens, groups, others, blocks, start_at, other_at, slot_at, order_at,
    x_stride, width, out,
    COLUMNS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PIECE: tl.constexpr, RUN: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of tokens by (a part of) one row or column of blocks.

    Args:
        x: [N, width] T, rows x_stride apart. values: [nnz, bo, bi] T. index: int32, of the ticket.
        bias: [out] T or None. y, z: [N, out] T, out: the result, and what the activation was taken of (or None).
        groups: rows of blocks (COLUMNS: columns). others: the other way round. blocks: nnz.
        start_at, other_at, slot_at, order_at: where the parts of the index begin: the entries of each group, their
            other coordinates, their slots, and the groups with the fullest first.
        PIECE: OTHER rounded up to a power of two. A step of the sum takes BLOCK_K / PIECE blocks at once, neighbours
            or not, or a part of one. RUN: see ``locate``.
        WHOLE: no block reaches past ``width``. EVEN: nor is one rounded up, and a step takes no more than one.

    The groups of one tile of tokens are neighbours: x comes from memory once and from L2 after that.
    Grid: (groups * ceil(OWN / BLOCK_M) * ceil(N / BLOCK_N),).
    """
    parts: tl.constexpr = (OWN + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    at = pid % (groups * parts)
    group, begin, end = group_of(index, at // parts, groups, blocks, start_at, order_at)
    tile = pid // (groups * parts) * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    live = local < tokens - tile
    local = tl.minimum(local, tokens - 1 - tile)
    rows = x + tile.to(tl.int64) * x_stride + (local.to(tl.int64) * x_stride)[:, None]
    m = at % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    own_step: tl.constexpr = 1 if COLUMNS else OTHER
    weights = values + (m * own_step)[None, :]
    k = tl.arange(0, BLOCK_K)
    joined: tl.constexpr = BLOCK_K // PIECE if BLOCK_K > PIECE else 1
    steps: tl.constexpr = PIECE // BLOCK_K if PIECE > BLOCK_K else 1
    entry, within = entry_of(0, begin, k, PIECE, BLOCK_K)
    other, slot = look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(tl.cdiv(end - begin, joined) * steps):
        place, stored = locate(other, slot, within, COLUMNS, OWN, OTHER, RUN)
        inside = (entry < end) & (within < OTHER)
        # The next step's index is looked up a step ahead, so that the loads below wait for none.
        entry, within = entry_of(step + 1, begin, k, PIECE, BLOCK_K)
        other, slot = look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS)
        if EVEN:
            left = tl.load(rows + place[None, :])
            right = tl.load(weights + stored[:, None])
        else:
            if not WHOLE:
                inside = inside & (place < width)
            left = tl.load(rows + place[None, :], mask=inside[None, :], other=0.0)
            right = tl.load(weights + stored[:, None], mask=inside[:, None] & (m < OWN)[None, :], other=0.0)
        acc = dot(left, right, acc)
    column = group * OWN + m
    exists = (m < OWN) & (column < out)
    if bias is not None:
        acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    # A tile's start is a 64-bit scalar, so that its numbers' offsets, of which there are many, need 32 bits only.
    start = tile.to(tl.int64) * out
    to = (local * out)[:, None] + column[None, :]
    mask = live[:, None] & exists[None, :]
    if z is not None:
        tl.store(z + start + to, acc.to(z.dtype.element_ty), mask=mask)
    tl.store(y + start + to, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "groups", "others", "blocks", "start_at", "other_at", "slot_at", "order_at"])
def multiply_few(
    x, values, index, bias, y, z, tokens, groups, others, blocks, start_at, other_at, slot_at, order_at,
    x_stride, width, out,
    COLUMNS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PIECE: tl.constexpr, RUN: tl.constexpr,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    """The same for fewer tokens than a product on tensor cores needs: four at a time, in products and one sum at the
    end.

    Arguments as for ``multiply``; a step takes BLOCK_STEP numbers of the other side.
    Grid: (groups * ceil(OWN / BLOCK_M) * ceil(N / 4),).
    """
    parts: tl.constexpr = (OWN + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    at = pid % (groups * parts)
    group, begin, end = group_of(index, at // parts, groups, blocks, start_at, order_at)
    n = pid // (groups * parts) * 4
    m = at % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    own_step: tl.constexpr = 1 if COLUMNS else OTHER
    weights = values + (m * own_step)[:, None]
    x += n.to(tl.int64) * x_stride
    k = tl.arange(0, BLOCK_STEP)
    joined: tl.constexpr = BLOCK_STEP // PIECE if BLOCK_STEP > PIECE else 1
    steps: tl.constexpr = PIECE // BLOCK_STEP if PIECE > BLOCK_STEP else 1
    entry, within = entry_of(0, begin, k, PIECE, BLOCK_STEP)
    other, slot = look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS)
    acc0 = tl.zeros([BLOCK_M, BLOCK_STEP], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for step in range(tl.cdiv(end - begin, joined) * steps):
        place, stored = locate(other, slot, within, COLUMNS, OWN, OTHER, RUN)
        inside = (entry < end) & (within < OTHER)
        # The next step's index is looked up a step ahead, so that the loads below wait for none.
        entry, within = entry_of(step + 1, begin, k, PIECE, BLOCK_STEP)
        other, slot = look_up(index, entry, end, others, blocks, other_at, slot_at, COLUMNS)
        if not WHOLE:
            inside = inside & (place < width)
        weight = tl.load(weights + stored[None, :], mask=(m < OWN)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc0 += weight * _row(x, 0, place, inside, n, tokens, x_stride)
        acc1 += weight * _row(x, 1, place, inside, n, tokens, x_stride)
        acc2 += weight * _row(x, 2, place, inside, n, tokens, x_stride)
        acc3 += weight * _row(x, 3, place, inside, n, tokens, x_stride)
    column = group * OWN + m
    exists = (m < OWN) & (column < out)
    shift = tl.zeros([BLOCK_M], tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    _emit(tl.sum(acc0, axis=1) + shift, y, z, n, column, exists & (n < tokens), out, ACTIVATION)
    _emit(tl.sum(acc1, axis=1) + shift, y, z, n + 1, column, exists & (n + 1 < tokens), out, ACTIVATION)
    _emit(tl.sum(acc2, axis=1) + shift, y, z, n + 2, column, exists & (n + 2 < tokens), out, ACTIVATION)
    _emit(tl.sum(acc3, axis=1) + shift, y, z, n + 3, column, exists & (n + 3 < tokens), out, ACTIVATION)


@triton.jit
def _row(x, i, place, inside, n, tokens, x_stride):
    """Numbers of token n + i, zero where there is none; [1, B]."""
    of = tl.cast(x_stride, tl.int64) * i
    return tl.load(x + of + place, mask=inside & (n + i < tokens), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _emit(total, y, z, n, column, mask, out, ACTIVATION: tl.constexpr):
    to = n.to(tl.int64) * out + column
    if z is not None:
        tl.store(z + to, total.to(z.dtype.element_ty), mask=mask)
    tl.store(y + to, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=mask)
