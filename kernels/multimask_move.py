"""Rows of tokens that change places, in Triton: gather, scatter with noise, and sums of rows over masks.

R = B M rows; row r is mask r % M of sample r / M. T tokens, K slots, D numbers a token. Sums are in float32, in the
order of the rows. No index leads out of a tensor: one out of range counts as not kept. Offsets of rows are int64.
"""

import triton
import triton.language as tl

from ._philox import NOISE, high_word, low_word, normal_pair, words

# Rows of a sum whose loads are on their way at once.
_AHEAD = tl.constexpr(8)


@triton.jit(do_not_specialize=["rows", "slots", "masks", "tokens"])
def gather(
    x, index, counts, out, rows, slots, masks, tokens, sample_stride, token_stride, width,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[r, k] = x[r / masks, index[r, k]], zero for slots from counts[r] on.

    Args:
        x: [*, T, D], strides sample_stride, token_stride, 1. index: [R, K] int32. counts: [R] int32.
        out: [R, K, D]. rows: R K.

    Grid: (ceil(R K / BLOCK_R) * ceil(D / BLOCK_C),).
    """
    across = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // across * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    r = row // slots
    at = tl.load(index + row, mask=live, other=-1)
    count = tl.load(counts + r, mask=live, other=0)
    taken = (row % slots < count) & (at >= 0) & (at < tokens)
    start = (r // masks).to(tl.int64) * sample_stride + at.to(tl.int64) * token_stride
    inside = (c < width)[None, :]
    value = tl.load(x + start[:, None] + c[None, :], mask=taken[:, None] & inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * width + c[None, :], value, mask=live[:, None] & inside)


@triton.jit(do_not_specialize=["count", "each", "masks", "tokens", "slots", "size"])
def sum_rows(
    grad, inverse, lengths, out, count, each, masks, tokens, slots, size, row_stride, token_stride, width,
    HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over rows, for each token: of what its slots hold, or of what stands in its place where it is hidden.

    Args:
        grad: [R, K, D], or [R, T, D] where HIDDEN. inverse: [R, T] int32. lengths: [B] int32.
        out: [parts, F, T, D]; group f of F sums rows f count and following, in parts of ``each``.
        size: F T D.

    Grid: (F * ceil(T / BLOCK_T) * ceil(D / BLOCK_C), parts).
    """
    across, down = tl.cdiv(width, BLOCK_C), tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    t = pid // across % down * BLOCK_T + tl.arange(0, BLOCK_T)
    group = pid // across // down
    begin = tl.program_id(1) * each
    stop = tl.minimum(begin + each, count)
    here, inside = t < tokens, (c < width)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(begin, stop, _AHEAD):
        for i in tl.static_range(_AHEAD):
            r = group * count + first + i
            exists = here & (first + i < stop)
            slot = tl.load(inverse + r.to(tl.int64) * tokens + t, mask=exists, other=0)
            if HIDDEN:
                length = tl.load(lengths + r // masks, mask=first + i < stop, other=0)
                taken = exists & (slot < 0) & (t < length)
                at = t
            else:
                taken = exists & (slot >= 0) & (slot < slots)
                at = slot
            start = r.to(tl.int64) * row_stride + at.to(tl.int64) * token_stride
            value = tl.load(grad + start[:, None] + c[None, :], mask=taken[:, None] & inside, other=0.0)
            total += value.to(tl.float32)
    to = tl.program_id(1).to(tl.int64) * size + (group.to(tl.int64) * tokens + t)[:, None] * width + c[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=here[:, None] & inside)


@triton.jit(do_not_specialize=["tokens", "slots", "masks", "std"])
def scatter(
    x, inverse, lengths, fill, seed, sample_ids, out, tokens, slots, masks, row_stride, slot_stride, fill_stride,
    fill_token_stride, width, std,
    NOISE_WANTED: tl.constexpr, FAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[r, t]: the token that was encoded; where it is hidden fill and noise; zero at padding.

    Args:
        x: [R, K, D]. inverse: [R, T] int32. lengths: [B] int32. fill: [1 or B, T, D] or None; its first stride is zero
            where all samples share it. seed: int64. sample_ids: [B] int64 or None. out: [R, T, D].

    One row a program: of those that are kept, no noise is computed. Grid: (R T,).
    """
    pid = tl.program_id(0)
    r, t = pid // tokens, pid % tokens
    b = r // masks
    slot = tl.load(inverse + pid)
    length = tl.load(lengths + b)
    lane = tl.arange(0, BLOCK_C)
    to = out + pid.to(tl.int64) * width
    if (slot >= 0) & (slot < slots):
        own = x + r.to(tl.int64) * row_stride + slot.to(tl.int64) * slot_stride
        for c0 in range(0, width, BLOCK_C):
            c = c0 + lane
            tl.store(to + c, tl.load(own + c, mask=c < width), mask=c < width)
    elif t < length:
        if NOISE_WANTED:
            key = tl.load(seed)
            sample = b.to(tl.int64)
            if sample_ids is not None:
                sample = tl.load(sample_ids + b)
            c1 = (r % masks + NOISE).to(tl.uint32)
            c2, c3 = low_word(sample), high_word(sample)
            first = t.to(tl.uint32) * tl.cdiv(width, 4).to(tl.uint32)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + lane
            value = tl.zeros([BLOCK_C], tl.float32)
            if fill is not None:
                at = fill + b.to(tl.int64) * fill_stride + t.to(tl.int64) * fill_token_stride
                value = tl.load(at + c, mask=c < width, other=0.0).to(tl.float32)
            if NOISE_WANTED:
                group = first + (c0 // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)
                w0, w1, w2, w3 = words(key, group, c1, c2, c3)
                n0, n1 = normal_pair(w0, w1, FAST)
                n2, n3 = normal_pair(w2, w3, FAST)
                value += std * tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK_C])
            tl.store(to + c, value.to(out.dtype.element_ty), mask=c < width)
    else:
        for c0 in range(0, width, BLOCK_C):
            c = c0 + lane
            tl.store(to + c, tl.zeros([BLOCK_C], out.dtype.element_ty), mask=c < width)


@triton.jit(do_not_specialize=["parts"])
def add(parted, to, parts, size, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of parts [parts, size] float32, in a fixed order. Grid: (ceil(size / BLOCK_N),)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        mask = (part < parts)[:, None] & (n < size)[None, :]
        total += tl.load(parted + part.to(tl.int64)[:, None] * size + n[None, :], mask=mask, other=0.0)
    tl.store(to + n, tl.sum(total, axis=0).to(to.dtype.element_ty), mask=n < size)
