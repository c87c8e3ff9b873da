"""The students' loss where tokens are hidden, in Triton: with the derivative, and the moments of what is compared.

A program has some tokens of a sample and goes through the masks: the target is read once, predictions only where they
are hidden, and what is derived from them is written in the same pass. What programs add up goes to a place of its own
each, and ``finish`` adds that in a fixed order. R = B M rows of T tokens, D numbers each; sums in float32, those of the
moments in float64. Offsets of rows are int64.
"""

import triton
import triton.language as tl

L2, SMOOTH_L1, L1, COSINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# The square of the length below which a vector has no direction.
_LEAST = tl.constexpr(1e-16)


@triton.jit
def _value(d, beta, KIND: tl.constexpr):
    if KIND == L2:
        value = d * d
    elif KIND == L1:
        value = tl.abs(d)
    else:
        size = tl.abs(d)
        value = tl.where(size < beta, 0.5 * d * d / beta, size - 0.5 * beta)
    return value


@triton.jit
def _slope(d, beta, KIND: tl.constexpr):
    """By comparisons that keep zero and NaN."""
    if KIND == L2:
        slope = 2.0 * d
    else:
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
        if KIND == SMOOTH_L1:
            slope = tl.where(tl.abs(d) < beta, d / beta, slope)
    return slope


@triton.jit
def _factor(scale, count):
    """``scale``, over the number of hidden tokens if that is there."""
    if count is not None:
        scale = scale / tl.load(count).to(tl.float32)
    return scale


@triton.jit
def _upstream(grad, row, mask, PLACES: tl.constexpr):
    """The gradient from above of tokens ``row`` [B, 1]: one for all, or one each."""
    if grad is None:
        above = 1.0
    elif PLACES:
        above = tl.load(grad + row, mask=mask, other=0.0)
    else:
        above = tl.load(grad)
    return above


@triton.jit(
    do_not_specialize=[
        "masks", "tokens", "tiles", "last", "each", "beta", "scale",
    ]
)  # fmt: skip
def distance(
    pred, target, inverse, lengths, count, grad, losses, dpred, dtarget, moments, counts, masks, tokens, tiles, last,
    each, pred_row, pred_token, target_sample, target_token, width, beta, scale,
    KIND: tl.constexpr, PLACES: tl.constexpr, AHEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Losses that are sums over channels, of some channels each program.

    Args:
        pred: [R, T, D] T. target: [B, T, D] float32. inverse: [R, T], lengths: [B] int32. count: int64 or None.
        grad: what comes from above, float32: one number or PLACES [R, T]; None stands for 1.
        losses: float32, out, or None: [groups, parts] of the sum, or with PLACES [parts, R, T] of each token, times the
            factor.
        dpred: [R, T, D] T, out, or None. dtarget: [B, T, D] float32, out, or None.
        moments: [groups, 4, D] float64, counts: [groups] int32, out, or None.
        tiles: of a sample. last: of all samples. each: of a group.
        AHEAD: masks whose predictions are on their way at once.

    Grid: (groups * parts,), parts = ceil(D / BLOCK_C).
    """
    across = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    part, group = pid % across, pid // across
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < width)[None, :]
    factor = _factor(scale, count)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if moments is not None:
        sum_y = tl.zeros([BLOCK_C], tl.float64)
        sum_yy = tl.zeros([BLOCK_C], tl.float64)
        sum_x = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
        sum_xx = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
        number = tl.zeros([BLOCK_T], tl.int32)
    for tile in range(group * each, tl.minimum(group * each + each, last)):
        b = tile // tiles
        t = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        here = t < tokens
        alive = here & (t < tl.load(lengths + b))
        own = (b.to(tl.int64) * target_sample + t.to(tl.int64) * target_token)[:, None] + c[None, :]
        y = tl.load(target + own, mask=alive[:, None] & inside, other=0.0)
        back = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        times = tl.zeros([BLOCK_T], tl.int32)
        for first in range(0, masks, AHEAD):
            for i in tl.static_range(AHEAD):
                exists = here & (first + i < masks)
                r = (b * masks + first + i).to(tl.int64)
                row = r * tokens + t
                slot = tl.load(inverse + row, mask=exists, other=0)
                hidden = exists & alive & (slot < 0)
                mask = hidden[:, None] & inside
                at = (r * pred_row + t.to(tl.int64) * pred_token)[:, None] + c[None, :]
                x = tl.load(pred + at, mask=mask, other=0.0).to(tl.float32)
                d = tl.where(mask, x - y, 0.0)
                if losses is not None:
                    value = _value(d, beta, KIND)
                    if PLACES:
                        # Parts lie as far apart as there are tokens in all rows.
                        to = losses + part.to(tl.int64) * (last // tiles) * masks * tokens + row
                        tl.store(to, tl.sum(value, axis=1) * factor, mask=exists)
                    else:
                        total += value
                if dpred is not None or dtarget is not None:
                    above = factor * _upstream(grad, row[:, None], hidden[:, None], PLACES)
                    slope = tl.where(mask, _slope(d, beta, KIND) * above, 0.0)
                    if dpred is not None:
                        to = dpred + row[:, None] * width + c[None, :]
                        tl.store(to, slope.to(dpred.dtype.element_ty), mask=exists[:, None] & inside)
                    back -= slope
                if moments is not None:
                    times += hidden.to(tl.int32)
                    wide = x.to(tl.float64)
                    sum_x += wide
                    sum_xx += wide * wide
        if dtarget is not None:
            to = dtarget + (b.to(tl.int64) * tokens + t)[:, None] * width + c[None, :]
            tl.store(to, back, mask=here[:, None] & inside)
        if moments is not None:
            number += times
            wide = tl.where((times > 0)[:, None], y, 0.0).to(tl.float64)
            weighted = wide * times[:, None].to(tl.float64)
            sum_y += tl.sum(weighted, axis=0)
            sum_yy += tl.sum(weighted * wide, axis=0)
    if losses is not None and not PLACES:
        tl.store(losses + pid, tl.sum(tl.sum(total, axis=1), axis=0))
    if moments is not None:
        to = moments + group.to(tl.int64) * 4 * width + c
        tl.store(to, sum_y, mask=c < width)
        tl.store(to + width, sum_yy, mask=c < width)
        tl.store(to + 2 * width, tl.sum(sum_x, axis=0), mask=c < width)
        tl.store(to + 3 * width, tl.sum(sum_xx, axis=0), mask=c < width)
        if part == 0:
            tl.store(counts + group, tl.sum(number, axis=0))


@triton.jit(do_not_specialize=["masks", "tokens", "scale"])
def cosine(
    pred, target, inverse, lengths, count, grad, losses, dpred, dtarget, masks, tokens, pred_row, pred_token,
    target_sample, target_token, width, scale,
    PLACES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """1 - x y / (|x| |y|). Arguments as for ``distance``; losses: a part for each program, or with PLACES [R, T].

    Grid: (B * ceil(T / BLOCK_T),).
    """
    down = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    b = pid // down
    t = pid % down * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < tokens
    alive = here & (t < tl.load(lengths + b))
    factor = _factor(scale, count)
    own = target + (b.to(tl.int64) * target_sample + t.to(tl.int64) * target_token)[:, None]
    yy = tl.zeros([BLOCK_T], tl.float32)
    back = (b.to(tl.int64) * tokens + t)[:, None] * width
    for c0 in range(0, width, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        y = tl.load(own + c, mask=alive[:, None] & (c < width), other=0.0)
        yy += tl.sum(y * y, axis=1)
        if dtarget is not None:
            tl.store(dtarget + back + c, tl.zeros([BLOCK_T, BLOCK_C], tl.float32), mask=here[:, None] & (c < width))
    total = tl.zeros([BLOCK_T], tl.float32)
    for m in range(masks):
        r = (b * masks + m).to(tl.int64)
        row = r * tokens + t
        hidden = alive & (tl.load(inverse + row, mask=here, other=0) < 0)
        other = pred + (r * pred_row + t.to(tl.int64) * pred_token)[:, None]
        xx = tl.zeros([BLOCK_T], tl.float32)
        xy = tl.zeros([BLOCK_T], tl.float32)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)[None, :]
            mask = hidden[:, None] & (c < width)
            x = tl.load(other + c, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(own + c, mask=mask, other=0.0)
            xx += tl.sum(x * x, axis=1)
            xy += tl.sum(x * y, axis=1)
        # By comparisons, which keep NaN.
        long_x, long_y = tl.where(xx < _LEAST, _LEAST, xx), tl.where(yy < _LEAST, _LEAST, yy)
        lengths_product = tl.sqrt_rn(long_x) * tl.sqrt_rn(long_y)
        if losses is not None:
            value = tl.where(hidden, 1.0 - xy / lengths_product, 0.0)
            if PLACES:
                tl.store(losses + row, value * factor, mask=here)
            else:
                total += value
        if dpred is not None or dtarget is not None:
            above = -factor * _upstream(grad, row, hidden, PLACES) / lengths_product
            of_x = tl.where(xx < _LEAST, 0.0, xy / long_x)[:, None]
            of_y = tl.where(yy < _LEAST, 0.0, xy / long_y)[:, None]
            for c0 in range(0, width, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)[None, :]
                mask = hidden[:, None] & (c < width)
                x = tl.load(other + c, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(own + c, mask=mask, other=0.0)
                if dpred is not None:
                    slope = tl.where(mask, (y - x * of_x) * above[:, None], 0.0)
                    to = dpred + row[:, None] * width + c
                    tl.store(to, slope.to(dpred.dtype.element_ty), mask=here[:, None] & (c < width))
                if dtarget is not None:
                    # Its own numbers, from the mask before.
                    tl.debug_barrier()
                    before = tl.load(dtarget + back + c, mask=mask, other=0.0)
                    tl.store(dtarget + back + c, before + (x - y * of_y) * above[:, None], mask=mask)
    if losses is not None and not PLACES:
        tl.store(losses + pid, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["parts", "groups", "size", "scale"])
def finish(
    losses, moments, counts, count, loss, out, parts, groups, size, scale,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loss from ``parts`` sums, and the moments [1 + size] from those of ``groups``, each where it is given.

    Grid: (ceil(size / BLOCK_N) or 1,).
    """
    pid = tl.program_id(0)
    if losses is not None:  # noqa: SIM102 (known as this is compiled, unlike the next)
        if pid == 0:
            total = tl.zeros([BLOCK_P], tl.float64)
            for first in range(0, parts, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                total += tl.load(losses + p, mask=p < parts, other=0.0).to(tl.float64)
            tl.store(loss, tl.sum(total, axis=0).to(tl.float32) * _factor(scale, count))
    if moments is not None:
        n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = tl.zeros([BLOCK_G, BLOCK_N], tl.float64)
        for first in range(0, groups, BLOCK_G):
            g = first + tl.arange(0, BLOCK_G)
            mask = (g < groups)[:, None] & (n < size)[None, :]
            sums += tl.load(moments + g.to(tl.int64)[:, None] * size + n[None, :], mask=mask, other=0.0)
        tl.store(out + 1 + n, tl.sum(sums, axis=0), mask=n < size)
        if pid == 0:
            number = tl.zeros([BLOCK_P], tl.int64)
            for first in range(0, groups, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                number += tl.load(counts + p, mask=p < groups, other=0).to(tl.int64)
            tl.store(out, tl.sum(number, axis=0).to(tl.float64))


@triton.jit
def rescale(t, factor, size, BLOCK: tl.constexpr):
    """t *= factor; nothing is written where that is one. Grid: (ceil(size / BLOCK),)."""
    by = tl.load(factor)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(t + i, mask=i < size).to(tl.float32) * by
        tl.store(t + i, value.to(t.dtype.element_ty), mask=i < size)
