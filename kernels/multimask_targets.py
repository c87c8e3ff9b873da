"""Teacher targets in Triton: the mean of normalised layers [B, T, D], and its derivative.

The layers come by a tuple of numbers, four for each: address, strides of a sample and of a token, address of the
layer's gradient. A variance is taken about the mean, and about what rounding left of it. Sums are in float32 and in a
fixed order. Offsets of rows are int64.
"""

import triton
import triton.language as tl

LINE = tl.constexpr(4)
NONE, INSTANCE, LAYER, BATCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _number(lines, k, j: tl.constexpr):
    """Number j of line k; see ``_launch.encode``."""
    value = lines[j]
    for i in tl.static_range(1, len(lines) // LINE):
        value = tl.where(k == i, lines[LINE * i + j], value)
    return (value - (1 << 62)) >> 1


@triton.jit
def _tokens_of(lines, k, b, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Where sample b of layer k starts, and how far its tokens are apart."""
    base = _number(lines, k, 0).to(tl.pointer_type(KIND))
    sample, token = _number(lines, k, 1), _number(lines, k, 2)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        # As multiples of 8: a promise about what a function returned would be lost where that is inlined.
        sample, token = (sample >> 3) * 8, (token >> 3) * 8
    return base + tl.cast(b, tl.int64) * sample, token


@triton.jit
def _length(lengths, b, tokens):
    return tl.minimum(tl.maximum(tl.load(lengths + b), 0), tokens)


@triton.jit
def _tile(base, token, t, c, mask):
    return tl.load(base + (t.to(tl.int64) * token)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(out, total, weight, t, c, length, tokens, width, ACCUMULATE: tl.constexpr):
    """weight * total to a tile of ``out`` [T, D]; added to what is there, but for padding, if ACCUMULATE."""
    to = out + t.to(tl.int64)[:, None] * width + c[None, :]
    inside = (t < tokens)[:, None] & (c < width)[None, :]
    if ACCUMULATE:
        inside = inside & (t < length)[:, None]
        tl.store(to, tl.load(to, mask=inside) + weight * total, mask=inside)
    else:
        tl.store(to, weight * total, mask=inside)


@triton.jit(do_not_specialize=["layers", "tokens", "eps", "weight"])
def whole(
    lines, lengths, out, layers, tokens, width, eps, weight,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Instance norm where BLOCK_T holds all tokens of a sample: each layer is read once.

    Args:
        lengths: [B] int32. out: [B, T, D] float32. layers: K.

    Grid: (B * ceil(D / BLOCK_C),).
    """
    across = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    b = pid // across
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    length = _length(lengths, b, tokens)
    live = (t < length)[:, None] & (c < width)[None, :]
    share = 1.0 / tl.maximum(length, 1).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.range(0, layers, num_stages=STAGES):
        base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
        y = _tile(base, token, t, c, live)
        y = tl.where(live, y - (tl.sum(y, axis=0) * share)[None, :], 0.0)
        left = tl.sum(y, axis=0) * share
        variance = tl.maximum(tl.sum(y * y, axis=0) * share - left * left, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += (y - left[None, :]) * (1.0 / tl.sqrt_rn(variance + eps))[None, :]
    total = tl.where(live, total, 0.0)
    _put(out + b.to(tl.int64) * tokens * width, total, weight, t, c, length, tokens, width, ACCUMULATE)


@triton.jit(do_not_specialize=["groups", "each", "tokens", "eps"])
def statistics(
    lines, lengths, means, scales, groups, each, tokens, width, eps,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of the channels of groups of ``each`` samples, tile after tile (Chan et al.).

    Args:
        means, scales: [K, groups, D] float32, out.

    Grid: (K * groups * ceil(D / BLOCK_C),).
    """
    across = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    line = pid // across
    k, group = line // groups, line % groups
    inside = (c < width)[None, :]
    seen = tl.zeros([], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_C], tl.float32)
    for b in range(group * each, group * each + each):
        base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
        length = _length(lengths, b, tokens)
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            live = (t < length)[:, None] & inside
            count = tl.minimum(length - t0, BLOCK_T).to(tl.float32)
            y = _tile(base, token, t, c, live)
            own = tl.sum(y, axis=0) / count
            y = tl.where(live, y - own[None, :], 0.0)
            left = tl.sum(y, axis=0) / count
            gap = own - mean + left
            both = seen + count
            mean += gap * (count / both)
            square += tl.sum(y * y, axis=0) - left * left * count + gap * gap * (seen * count / both)
            seen = both
    variance = tl.maximum(square / tl.maximum(seen, 1.0), 0.0, propagate_nan=tl.PropagateNan.ALL)
    to = line.to(tl.int64) * width + c
    tl.store(means + to, mean, mask=c < width)
    tl.store(scales + to, 1.0 / tl.sqrt_rn(variance + eps), mask=c < width)


@triton.jit(do_not_specialize=["layers", "groups", "tokens", "weight"])
def apply(
    lines, lengths, means, scales, out, layers, groups, tokens, width, weight,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of layers by statistics that are there; as they are where ``means`` is None.

    Args:
        means, scales: [K, groups, D] float32, groups 1 or B, or None. out: [B, T, D] float32.

    Grid: (B * ceil(T / BLOCK_T) * ceil(D / BLOCK_C),).
    """
    across, down = tl.cdiv(width, BLOCK_C), tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    t = pid // across % down * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // across // down
    length = _length(lengths, b, tokens)
    live = (t < length)[:, None] & (c < width)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.range(0, layers, num_stages=STAGES):
        base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
        y = _tile(base, token, t, c, live)
        if means is not None:
            at = (k * groups + tl.minimum(b, groups - 1)).to(tl.int64) * width + c
            mean = tl.load(means + at, mask=c < width, other=0.0)
            y = (y - mean[None, :]) * tl.load(scales + at, mask=c < width, other=0.0)[None, :]
        total += y
    total = tl.where(live, total, 0.0)
    _put(out + b.to(tl.int64) * tokens * width, total, weight, t, c, length, tokens, width, ACCUMULATE)


@triton.jit
def _row_statistics(base, token, t, alive, width, eps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and scale of tokens, chunk after chunk."""
    mean = tl.zeros([BLOCK_T], tl.float32)
    square = tl.zeros([BLOCK_T], tl.float32)
    for c0 in range(0, width, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        live = alive[:, None] & (c < width)[None, :]
        count = tl.minimum(width - c0, BLOCK_C).to(tl.float32)
        y = _tile(base, token, t, c, live)
        own = tl.sum(y, axis=1) / count
        y = tl.where(live, y - own[:, None], 0.0)
        left = tl.sum(y, axis=1) / count
        gap = own - mean + left
        both = c0 + count
        mean += gap * (count / both)
        square += tl.sum(y * y, axis=1) - left * left * count + gap * gap * (c0 * count / both)
    variance = tl.maximum(square / width, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit(do_not_specialize=["layers", "tokens", "eps", "weight"])
def rows(
    lines, lengths, out, layers, tokens, width, eps, weight,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Layer norm. WHOLE: BLOCK_C holds all channels; else there is one layer, which is read twice.

    Grid: (B * ceil(T / BLOCK_T),).
    """
    down = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    b = pid // down
    t = pid % down * BLOCK_T + tl.arange(0, BLOCK_T)
    length = _length(lengths, b, tokens)
    alive = t < length
    to = out + b.to(tl.int64) * tokens * width
    if WHOLE:
        c = tl.arange(0, BLOCK_C)
        live = alive[:, None] & (c < width)[None, :]
        share = 1.0 / width
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for k in tl.range(0, layers, num_stages=STAGES):
            base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
            y = _tile(base, token, t, c, live)
            y = tl.where(live, y - (tl.sum(y, axis=1) * share)[:, None], 0.0)
            left = tl.sum(y, axis=1) * share
            variance = tl.maximum(tl.sum(y * y, axis=1) * share - left * left, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += (y - left[:, None]) * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
        _put(to, tl.where(live, total, 0.0), weight, t, c, length, tokens, width, ACCUMULATE)
    else:
        base, token = _tokens_of(lines, 0, b, KIND, ALIGNED)
        mean, scale = _row_statistics(base, token, t, alive, width, eps, BLOCK_T, BLOCK_C)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            live = alive[:, None] & (c < width)[None, :]
            y = (_tile(base, token, t, c, live) - mean[:, None]) * scale[:, None]
            _put(to, tl.where(live, y, 0.0), weight, t, c, length, tokens, width, ACCUMULATE)


@triton.jit(do_not_specialize=["groups", "each", "tokens"])
def gradient_means(
    lines, grad, lengths, means, scales, first, second, groups, each, tokens, grad_sample, grad_token, width,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The means of g and of g times the normalised layer, over the same groups as ``statistics``.

    Args:
        grad: [B, T, D] float32. first, second: [K, groups, D] float32, out.

    Grid: (K * groups * ceil(D / BLOCK_C),).
    """
    across = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    line = pid // across
    k, group = line // groups, line % groups
    at = line.to(tl.int64) * width + c
    mean = tl.load(means + at, mask=c < width, other=0.0)
    scale = tl.load(scales + at, mask=c < width, other=0.0)
    seen = tl.zeros([], tl.float32)
    own = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for b in range(group * each, group * each + each):
        base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
        length = _length(lengths, b, tokens)
        above = grad + tl.cast(b, tl.int64) * grad_sample
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            live = (t < length)[:, None] & (c < width)[None, :]
            g = _tile(above, grad_token, t, c, live)
            own += g
            y = (_tile(base, token, t, c, live) - mean[None, :]) * scale[None, :]
            product += tl.where(live, g * y, 0.0)
        seen += length.to(tl.float32)
    seen = tl.maximum(seen, 1.0)
    tl.store(first + at, tl.sum(own, axis=0) / seen, mask=c < width)
    tl.store(second + at, tl.sum(product, axis=0) / seen, mask=c < width)


@triton.jit(do_not_specialize=["layers", "groups", "tokens", "weight"])
def apply_gradient(
    lines, grad, lengths, means, scales, first, second, layers, groups, tokens, grad_sample, grad_token, width, weight,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The layers' gradients, by sums that are there: weight rstd (g - mean g - y mean(g y)), y the normalised layer.

    Grid: (B * ceil(T / BLOCK_T) * ceil(D / BLOCK_C),).
    """
    across, down = tl.cdiv(width, BLOCK_C), tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    t = pid // across % down * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // across // down
    length = _length(lengths, b, tokens)
    inside = (t < tokens)[:, None] & (c < width)[None, :]
    live = inside & (t < length)[:, None]
    g = _tile(grad + b.to(tl.int64) * grad_sample, grad_token, t, c, live)
    for k in range(layers):
        value = g
        if means is not None:
            base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
            at = (k * groups + tl.minimum(b, groups - 1)).to(tl.int64) * width + c
            mean = tl.load(means + at, mask=c < width, other=0.0)[None, :]
            scale = tl.load(scales + at, mask=c < width, other=0.0)[None, :]
            y = (_tile(base, token, t, c, live) - mean) * scale
            value = g - tl.load(first + at, mask=c < width, other=0.0)[None, :]
            value = (value - y * tl.load(second + at, mask=c < width, other=0.0)[None, :]) * scale
        _put_gradient(lines, k, b, weight * value, live, inside, t, c, tokens, width, KIND, ALIGNED)


@triton.jit
def _put_gradient(lines, k, b, value, live, inside, t, c, tokens, width, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    out = _number(lines, k, 3).to(tl.pointer_type(KIND))
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    to = out + (b.to(tl.int64) * tokens + t)[:, None] * width + c[None, :]
    tl.store(to, tl.where(live, value, 0.0).to(KIND), mask=inside)


@triton.jit(do_not_specialize=["layers", "tokens", "eps", "weight"])
def rows_gradient(
    lines, grad, lengths, layers, tokens, grad_sample, grad_token, width, eps, weight,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for layer norm, whose sums go over channels. Grid: (B * ceil(T / BLOCK_T),)."""
    down = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    b = pid // down
    t = pid % down * BLOCK_T + tl.arange(0, BLOCK_T)
    alive = t < _length(lengths, b, tokens)
    above = grad + b.to(tl.int64) * grad_sample
    for k in range(layers):
        base, token = _tokens_of(lines, k, b, KIND, ALIGNED)
        mean, scale = _row_statistics(base, token, t, alive, width, eps, BLOCK_T, BLOCK_C)
        own = tl.zeros([BLOCK_T], tl.float32)
        product = tl.zeros([BLOCK_T], tl.float32)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            live = alive[:, None] & (c < width)[None, :]
            g = _tile(above, grad_token, t, c, live)
            y = (_tile(base, token, t, c, live) - mean[:, None]) * scale[:, None]
            own += tl.sum(g, axis=1)
            product += tl.sum(tl.where(live, g * y, 0.0), axis=1)
        own, product = (own / width)[:, None], (product / width)[:, None]
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            live = alive[:, None] & (c < width)[None, :]
            g = _tile(above, grad_token, t, c, live)
            y = (_tile(base, token, t, c, live) - mean[:, None]) * scale[:, None]
            inside = (t < tokens)[:, None] & (c < width)[None, :]
            value = weight * (g - own - y * product) * scale[:, None]
            _put_gradient(lines, k, b, value, live, inside, t, c, tokens, width, KIND, ALIGNED)
