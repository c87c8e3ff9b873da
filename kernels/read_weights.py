"""READ's weight gradients in Triton: long products over tokens and layers in fixed splits, then sums in fixed order.

With S = sum (da)^T ((phi - mean) rstd) over tokens and layers, and db = sum da:
dW = S gamma + db beta^T, dgamma = colsum(W S), dbeta = W^T db; and dR = sum (da_h)^T h_{l-1}. No atomics: every
partial sum has its place, and a second kernel adds them up in their order. Letters and rules as in read_backward.py.
"""

import triton
import triton.language as tl

from ._tile import GRU, LAYER, NONE, RNN, dot, layer_rows, x_gate_row


@triton.jit(
    do_not_specialize=[
        "add", "first", "count", "tokens", "layers", "room", "first_layer", "parts", "layers_each", "tokens_each",
    ]
)  # fmt: skip
def outer(
    da, table, stats, h, h0, partial, add,
    first, count, tokens, layers, room, first_layer, parts, layers_each, tokens_each, rank, width,
    CELL: tl.constexpr, STATE: tl.constexpr, NORM: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One split's share of S, or with STATE of dR, over tokens first .. first + count.

    Args:
        da: [L, room, 4 r (RNN: r)] T, from ``reverse``.
        table, stats: the layers and their statistics; h [L, N, r] T and h0 [N, r] T (or None): the states, with STATE.
        partial: [splits, g r, width] float32, out, or added to where ``add`` is not 0. Rows are in da's order.
        width: the columns, d or (STATE) r.
        first_layer: the first layer that counts: 1 for states without h0.
        parts, layers_each, tokens_each: split s has layers_each layers from first_layer + s // parts layers_each on
            and tokens_each tokens (a multiple of BLOCK_K) from first + s % parts tokens_each on.

    phi is normalised as it is read, not da scaled by rstd: its numbers are then of size one, and float16 holds them.
    Grid: (ceil(g r / BLOCK_M) * ceil(width / BLOCK_N), splits).
    """
    columns = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    m = pid // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    j = pid % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    wide: tl.constexpr = 1 if CELL == RNN else 4
    segment: tl.constexpr = 1 if (CELL == GRU and STATE) else 0
    begin = first_layer + split // parts * layers_each
    end = tl.minimum(begin + layers_each, layers)
    start = first + split % parts * tokens_each
    stop = tl.minimum(start + tokens_each, first + count)
    inside_m = m < CELL * rank
    inside_j = j < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for layer in range(begin, end):
        if STATE:
            base = h + tl.maximum(layer - 1, 0) * (tl.cast(tokens, tl.int64) * rank)
            if h0 is not None:
                base = tl.where(layer > 0, base, h0)
        left_base = da + tl.cast(layer, tl.int64) * room * (wide * rank) + segment * rank
        for n0 in range(start, stop, BLOCK_K):
            n = n0 + tl.arange(0, BLOCK_K)
            live = n < stop
            at = (n - first).to(tl.int64)[:, None] * (wide * rank) + m[None, :]
            left = tl.load(left_base + at, mask=live[:, None] & inside_m[None, :], other=0.0)
            mask = live[:, None] & inside_j[None, :]
            if STATE:
                right = tl.load(base + n.to(tl.int64)[:, None] * rank + j[None, :], mask=mask, other=0.0)
            else:
                address, offset = layer_rows(table, layer, n, PHI, ALIGNED, FLAT)
                right = tl.load(address + offset[:, None] + j[None, :], mask=mask, other=0.0)
                if NORM != NONE:
                    of = tl.cast(layer, tl.int64) * tokens + n
                    x = right.to(tl.float32)
                    if NORM >= LAYER:
                        x -= tl.load(stats + tl.cast(layers, tl.int64) * tokens + of, mask=live, other=0.0)[:, None]
                    right = x * tl.load(stats + of, mask=live, other=0.0)[:, None]
                right = right.to(left.dtype)
            acc = dot(tl.trans(left), right, acc)
    to = partial + (tl.cast(split, tl.int64) * (CELL * rank) + m)[:, None] * width + j[None, :]
    mask = inside_m[:, None] & inside_j[None, :]
    acc += tl.load(to, mask=mask & (add != 0), other=0.0)
    tl.store(to, acc, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def reduce_weight(
    partial, db, weight, norm_weight, norm_bias, dw, dgamma_tiles, dbeta_tiles, splits, rank, width,
    CELL: tl.constexpr, ROWS_OF_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up the splits in their order, and takes what follows from the sum.

    Args:
        partial: [splits, g r, width] float32 from ``outer``, or None where only dbeta is wanted.
        db: [4 r (RNN: r)] float32, from ``reduce_bias``, for the norm's bias; or None.
        weight: [g r, width] T, as given; norm_weight, norm_bias [width] T or None.
        dw: [g r, width] T, out, or None.
        dgamma_tiles, dbeta_tiles: [tiles of rows, width] float32, out, or None.
        ROWS_OF_X: rows come in the order of ``x_gate_row``; they come in the weights' own otherwise.

    Grid: (ceil(g r / BLOCK_M), ceil(width / BLOCK_N)).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < CELL * rank)[:, None] & (j < width)[None, :]
    size = tl.cast(rank, tl.int64) * CELL * width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if partial is not None:
        pointers = partial + m.to(tl.int64)[:, None] * width + j[None, :]
        for split in range(splits):
            acc += tl.load(pointers + split * size, mask=mask, other=0.0)
    row = m
    if ROWS_OF_X:
        row = x_gate_row(m, rank, CELL)
    at = row.to(tl.int64)[:, None] * width + j[None, :]
    sums = tl.zeros([BLOCK_M], tl.float32)
    if db is not None:
        sums = tl.load(db + m, mask=m < CELL * rank, other=0.0)
    if dw is not None:
        value = acc
        if norm_weight is not None:
            value = value * tl.load(norm_weight + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            value += sums[:, None] * tl.load(norm_bias + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
        tl.store(dw + at, value.to(dw.dtype.element_ty), mask=mask)
    if dgamma_tiles is not None or dbeta_tiles is not None:
        given = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        to = tl.program_id(0).to(tl.int64) * width + j
        if dgamma_tiles is not None:
            tl.store(dgamma_tiles + to, tl.sum(given * acc, axis=0), mask=j < width)
        if dbeta_tiles is not None:
            tl.store(dbeta_tiles + to, tl.sum(given * sums[:, None], axis=0), mask=j < width)


@triton.jit
def _column_sums(tiles, j, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    acc = tl.zeros([BLOCK_N], tl.float32)
    for m0 in range(0, rows, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < rows)[:, None] & (j < width)[None, :]
        acc += tl.sum(tl.load(tiles + m.to(tl.int64)[:, None] * width + j[None, :], mask=mask, other=0.0), axis=0)
    return acc


@triton.jit(do_not_specialize=["rows"])
def reduce_norm(dgamma_tiles, dbeta_tiles, dgamma, dbeta, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dgamma and dbeta [width] T, each None where not wanted, from the tiles [rows, width] of ``reduce_weight``.

    Grid: (ceil(width / BLOCK_N),).
    """
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dgamma is not None:
        sums = _column_sums(dgamma_tiles, j, rows, width, BLOCK_M, BLOCK_N)
        tl.store(dgamma + j, sums.to(dgamma.dtype.element_ty), mask=j < width)
    if dbeta is not None:
        sums = _column_sums(dbeta_tiles, j, rows, width, BLOCK_M, BLOCK_N)
        tl.store(dbeta + j, sums.to(dbeta.dtype.element_ty), mask=j < width)


@triton.jit(do_not_specialize=["rows"])
def reduce_bias(
    bias_sums, db, db_ih, db_hh, rows, rank, CELL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The biases' gradients from the sums over tiles of tokens that ``reverse`` left.

    Args:
        bias_sums: [rows, 4 r (RNN: r)] float32. db: [4 r (RNN: r)] float32, out: their sum, in da's order.
        db_ih, db_hh: [g r] T, out, or None.

    Grid: (ceil(4 r / BLOCK_N),), for the RNN ceil(r / BLOCK_N).
    """
    wide: tl.constexpr = 1 if CELL == RNN else 4
    segment: tl.constexpr = 1 if CELL == GRU else 0
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = _column_sums(bias_sums, j, rows, wide * rank, BLOCK_M, BLOCK_N)
    tl.store(db + j, sums, mask=j < wide * rank)
    if db_ih is not None:
        tl.store(db_ih + x_gate_row(j, rank, CELL), sums.to(db_ih.dtype.element_ty), mask=j < CELL * rank)
    if db_hh is not None:
        own = (j >= segment * rank) & (j < (segment + CELL) * rank)
        tl.store(db_hh + (j - segment * rank), sums.to(db_hh.dtype.element_ty), mask=own)
