"""Plans and what goes with them, in Triton: masks of blocks, the bias of distances, the moving average of parameters.

The masks are those of reference/block_mask.py bit for bit: integers, but for two products in float64 that count tokens
and centres. R = B M rows, T tokens, K slots, H heads.
"""

import triton
import triton.language as tl

from ._philox import CENTRES, SCORES, high_word, low_word, words

# A score is a word, and above that whether the token lies in a block.
_BITS = tl.constexpr(33)


@triton.jit
def _floor(length, share):
    """int(length * share), a product in float64; the share comes as its bits."""
    return (length.to(tl.float64) * share.to(tl.int64).to(tl.float64, bitcast=True)).to(tl.int64)


@triton.jit
def _word(w0, w1, w2, w3, j: tl.constexpr):
    word = w0
    if j == 1:
        word = w1
    elif j == 2:
        word = w2
    elif j == 3:
        word = w3
    return word


@triton.jit
def _scores(
    seed, sample_ids, t, b, m, length, share, grid_width, block_length, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The scores of tokens ``t`` [BLOCK_T], int64; -1 past the sample."""
    key = tl.load(seed)
    sample = b.to(tl.int64)
    if sample_ids is not None:
        sample = tl.load(sample_ids + b)
    c2, c3 = low_word(sample), high_word(sample)
    centres = tl.minimum(_floor(length, share), (1 << 31) - 5).to(tl.int32)
    below = block_length // 2
    above = block_length - 1 - below
    inside = tl.zeros([BLOCK_T], tl.int1)
    row_width = tl.maximum(grid_width, 1)
    y, x = t // row_width, t % row_width
    for group in range(tl.cdiv(centres, 4)):
        w0, w1, w2, w3 = words(
            key, tl.cast(group, tl.uint32), m.to(tl.uint32) + tl.full((), CENTRES, tl.uint32), c2, c3
        )
        for j in tl.static_range(4):
            centre = tl.umulhi(_word(w0, w1, w2, w3, j), length.to(tl.uint32)).to(tl.int32)
            if grid_width > 0:
                down, right = y - centre // row_width, x - centre % row_width
                hit = (down >= -below) & (down <= above) & (right >= -below) & (right <= above)
            else:
                hit = (t - centre >= -below) & (t - centre <= above)
            inside = inside | (hit & (group * 4 + j < centres))
    w0, w1, w2, w3 = words(key, (t // 4).to(tl.uint32), m.to(tl.uint32) + tl.full((), SCORES, tl.uint32), c2, c3)
    j = t % 4
    word = tl.where(j == 0, w0, tl.where(j == 1, w1, tl.where(j == 2, w2, w3))).to(tl.int64)
    return tl.where(t < length, word + (inside.to(tl.int64) << 32), -1)


@triton.jit
def _number_to_draw(lengths, keep, b, tokens, inverse):
    """(tokens of the sample, how many of them are drawn)."""
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), tokens)
    kept = tl.minimum(tl.maximum(_floor(length, keep), 0).to(tl.int32), length)
    return length, tl.where(inverse != 0, kept, length - kept)


@triton.jit(
    do_not_specialize=[
        "masks", "tokens", "slots", "grid_width", "block_length", "keep", "share", "inverse",
    ]
)  # fmt: skip
def block_mask(
    seed, sample_ids, lengths, ids_keep, keep_len, kept_slot, masks, tokens, slots, grid_width, block_length, keep,
    share, inverse, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A row of masks a program, which BLOCK_T holds.

    Args:
        seed: int64. sample_ids: [B] int64 or None. lengths: [B] int32. keep, share: the bits of float64 numbers.
        ids_keep: [R, K], keep_len: [R], kept_slot: [R, T], int32, out.

    The n-th largest score is found bit by bit. Grid: (R,).
    """
    r = tl.program_id(0)
    b, m = r // masks, r % masks
    t = tl.arange(0, BLOCK_T)
    length, drawn = _number_to_draw(lengths, keep, b, tokens, inverse)
    score = _scores(seed, sample_ids, t, b, m, length, share, grid_width, block_length, BLOCK_T)
    least = tl.zeros([], tl.int64)
    for bit in range(_BITS):
        higher = least | (tl.full([], 1, tl.int64) << tl.cast(_BITS - 1 - bit, tl.int64))
        least = tl.where(tl.sum((score >= higher).to(tl.int32), axis=0) >= drawn, higher, least)
    # Where none is drawn, no score reaches what all bits together are.
    larger = (score > least) & (drawn > 0)
    equal = score == least
    left = drawn - tl.sum(larger.to(tl.int32), axis=0)
    taken = larger | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
    kept = (taken == (inverse != 0)) & (t < length)
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    kept = kept & (slot < slots)
    ids = ids_keep + r.to(tl.int64) * slots
    tl.store(kept_slot + r.to(tl.int64) * tokens + t, tl.where(kept, slot, -1), mask=t < tokens)
    tl.store(ids + slot, t, mask=kept)
    count = tl.sum(kept.to(tl.int32), axis=0)
    tl.store(keep_len + r, count)
    for first in range(0, slots, BLOCK_T):
        k = first + t
        tl.store(ids + k, tl.zeros([BLOCK_T], tl.int32), mask=(k >= count) & (k < slots))


@triton.jit(do_not_specialize=["masks", "tokens", "grid_width", "block_length", "share"])
def score_tokens(
    seed, sample_ids, lengths, scores, masks, tokens, grid_width, block_length, share, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The scores [R, T] int64, for rows that no program holds. Grid: (R, ceil(T / BLOCK_T))."""
    r = tl.program_id(0)
    b, m = r // masks, r % masks
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), tokens)
    score = _scores(seed, sample_ids, t, b, m, length, share, grid_width, block_length, BLOCK_T)
    tl.store(scores + r.to(tl.int64) * tokens + t, score, mask=t < tokens)


@triton.jit
def _count_from(scores, least, tokens, BLOCK_T: tl.constexpr):
    """How many scores are at least that."""
    found = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        found += (tl.load(scores + t, mask=t < tokens, other=-1) >= least).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["masks", "tokens", "slots", "keep", "inverse"])
def select_tokens(
    lengths, scores, ids_keep, keep_len, kept_slot, masks, tokens, slots, keep, inverse, BLOCK_T: tl.constexpr
):  # fmt: skip
    """``block_mask`` from scores that are there. Grid: (R,)."""
    r = tl.program_id(0)
    length, drawn = _number_to_draw(lengths, keep, r // masks, tokens, inverse)
    scores += r.to(tl.int64) * tokens
    least = tl.zeros([], tl.int64)
    for bit in range(_BITS):
        higher = least | (tl.full([], 1, tl.int64) << tl.cast(_BITS - 1 - bit, tl.int64))
        least = tl.where(_count_from(scores, higher, tokens, BLOCK_T) >= drawn, higher, least)
    left = drawn - _count_from(scores, least + 1, tokens, BLOCK_T)
    count = tl.zeros([], tl.int32)
    ids = ids_keep + r.to(tl.int64) * slots
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        score = tl.load(scores + t, mask=t < tokens, other=-1)
        equal = score == least
        taken = ((score > least) & (drawn > 0)) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
        left -= tl.sum(equal.to(tl.int32), axis=0)
        kept = (taken == (inverse != 0)) & (t < length)
        slot = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        kept = kept & (slot < slots)
        tl.store(kept_slot + r.to(tl.int64) * tokens + t, tl.where(kept, slot, -1), mask=t < tokens)
        tl.store(ids + slot, t, mask=kept)
        count += tl.sum(kept.to(tl.int32), axis=0)
    tl.store(keep_len + r, count)
    for first in range(0, slots, BLOCK_T):
        k = first + tl.arange(0, BLOCK_T)
        tl.store(ids + k, tl.zeros([BLOCK_T], tl.int32), mask=(k >= count) & (k < slots))


@triton.jit
def _distances(ids_keep, keep_len, r, place, slots, prefix, area):
    """(|id_i - id_j| of places i K + j, zero for what has no place; whether j may not be attended to)."""
    i, j = place // slots, place % slots
    count = tl.load(keep_len + r)
    ids = ids_keep + r.to(tl.int64) * slots
    both = (i >= prefix) & (j >= prefix) & (i < count) & (j < count) & (place < area)
    gap = tl.load(ids + i, mask=both, other=0) - tl.load(ids + j, mask=both, other=0)
    return tl.abs(gap).to(tl.float32), (j >= count) & (count > 0)


@triton.jit(do_not_specialize=["slots", "heads", "each", "prefix"])
def relative_bias(
    ids_keep, keep_len, slopes, out, slots, heads, each, prefix, area, BLOCK: tl.constexpr
):  # fmt: skip
    """out[r, h, i, j] = -slopes[h] |id_i - id_j|; distances are made once for ``each`` heads.

    Args:
        ids_keep: [R, K], keep_len: [R] int32. slopes: [H] float32. out: [R, H, K, K]. area: K K.

    Grid: (ceil(K K / BLOCK), R, ceil(H / each)).
    """
    r = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance, forbidden = _distances(ids_keep, keep_len, r, place, slots, prefix, area)
    first = tl.program_id(2) * each
    for h in range(first, tl.minimum(first + each, heads)):
        bias = tl.where(forbidden, float("-inf"), -tl.load(slopes + h) * distance)
        to = out + (r.to(tl.int64) * heads + h) * area + place
        tl.store(to, bias.to(out.dtype.element_ty), mask=place < area)


@triton.jit(do_not_specialize=["slots", "heads", "each", "prefix"])
def relative_bias_backward(
    grad, ids_keep, keep_len, parts, slots, heads, each, prefix, area, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of -grad |id_i - id_j| over BLOCK places of a row, for ``each`` heads.

    Args:
        grad: [R, H, K, K]. parts: [R * ceil(K K / BLOCK), H] float32, out.

    Grid: as for ``relative_bias``.
    """
    r = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance, _ = _distances(ids_keep, keep_len, r, place, slots, prefix, area)
    part = r.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first = tl.program_id(2) * each
    for h in range(first, tl.minimum(first + each, heads)):
        at = grad + (r.to(tl.int64) * heads + h) * area + place
        # What has no distance has no gradient, whatever came there.
        g = tl.where(distance > 0.0, tl.load(at, mask=place < area, other=0.0).to(tl.float32), 0.0)
        tl.store(parts + part * heads + h, -tl.sum(g * distance, axis=0))


@triton.jit
def _mix(ema, param, copy, i, mask, keep, rest, COPY: tl.constexpr):
    mixed = keep * tl.load(ema + i, mask=mask).to(tl.float32) + rest * tl.load(param + i, mask=mask).to(tl.float32)
    tl.store(ema + i, mixed.to(ema.dtype.element_ty), mask=mask)
    if COPY is not None:
        tl.store(copy + i, mixed.to(COPY), mask=mask)


@triton.jit
def ema_update(
    table, decay, EMA: tl.constexpr, PARAM: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ema = decay ema + (1 - decay) param, for BLOCK numbers of one tensor a program, and a copy of it.

    Args:
        table: [programs, 4] int64: where the average, the parameter and the copy are, and how many numbers.
        decay: float64. COPY: the dtype of the copies, or None.

    Grid: (programs,).
    """
    line = table + tl.program_id(0).to(tl.int64) * 4
    ema = tl.load(line).to(tl.pointer_type(EMA))
    param = tl.load(line + 1).to(tl.pointer_type(PARAM))
    copy = ema
    if COPY is not None:
        copy = tl.load(line + 2).to(tl.pointer_type(COPY))
    count = tl.load(line + 3)
    if ALIGNED:
        ema, param, copy = tl.multiple_of(ema, 16), tl.multiple_of(param, 16), tl.multiple_of(copy, 16)
    wide = tl.load(decay)
    keep, rest = wide.to(tl.float32), (1.0 - wide).to(tl.float32)
    i = tl.arange(0, BLOCK)
    # Nearly all blocks are full, and those come in whole 16-byte pieces.
    if count == BLOCK:
        _mix(ema, param, copy, i, None, keep, rest, COPY)
    else:
        _mix(ema, param, copy, i, i < count, keep, rest, COPY)
