"""READ's forward in Triton: the norm folded into the weights, the input products, the recurrence over the layers.

Source: Nguyen et al., 2023, arXiv 2305.15348, section 3; the folded norm is explained in docs/read.md. T is the dtype
of the weights and states, g the cell's gates (1, 3, 4), d the width, r the rank, N the tokens and L the layers.

Every sum is in float32 and in a fixed order; what is stored as T is rounded once. Rows past the last token repeat it
and are not stored. Offsets of rows are int64: tokens times a stride can pass 2^31.
"""

import triton
import triton.language as tl

from ._tile import (
    ENTRY,
    GRU,
    LAYER,
    LSTM,
    RNN,
    dot,
    gates_product,
    layer_rows,
    load_columns,
    load_rows,
    sigmoid,
    tanh,
)


@triton.jit
def _describe(table, lines, start, layers):
    for i in tl.static_range(len(lines) // 5):
        for j in tl.static_range(5):
            value = (lines[5 * i + j] - (1 << 62)) >> 1
            tl.store(table + (start + i) * ENTRY + j, value, mask=start + i < layers)


@triton.jit(do_not_specialize=["start", "layers"])
def describe(table, lines, start, layers):
    """Writes lines ``start`` and following of the table of the layers; see :func:`fold`. Grid: (1,)."""
    _describe(table, lines, start, layers)


@triton.jit(do_not_specialize=["layers"])
def fold(
    table, lines, w_ih, norm_weight, norm_bias, b_ih, b_hh, folded, bias, colsum, layers, rows, width,
    CELL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Folds the norm's weight and the biases into the input weights, and writes the table of the layers.

    Args:
        table: [L, 5] int64, out; see ENTRY.
        lines: tuple of 5 numbers for each layer, as ``_launch.encode`` makes them; lines past L are ignored, so that
            one compilation serves several L.
        w_ih: [g r, d] T; norm_weight, norm_bias [d] T, b_ih, b_hh [g r] T, or None.
        folded: [g r, d] T, out: w_ih * norm_weight, rounded; or None.
        bias: [g r] float32, out: b_ih + w_ih norm_bias, and b_hh except for the GRU's candidate; or None.
        colsum: [g r] float32, out: the sums of the folded weights' rows as rounded; or None.

    Grid: (ceil(g r / BLOCK_ROWS),).
    """
    pid = tl.program_id(0)
    if pid == 0:
        _describe(table, lines, 0, layers)
    row = pid * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    start = row.to(tl.int64) * width
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    shift = tl.zeros([BLOCK_ROWS], tl.float32)
    if folded is not None or norm_bias is not None or colsum is not None:
        for k0 in range(0, width, BLOCK_WIDTH):
            k = k0 + tl.arange(0, BLOCK_WIDTH)
            at = start[:, None] + k[None, :]
            mask = inside[:, None] & (k < width)[None, :]
            weight = tl.load(w_ih + at, mask=mask, other=0.0).to(tl.float32)
            if norm_bias is not None:
                beta = tl.load(norm_bias + k, mask=k < width, other=0.0).to(tl.float32)
                shift += tl.sum(weight * beta[None, :], axis=1)
            if norm_weight is not None:
                weight = weight * tl.load(norm_weight + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
            rounded = weight.to(w_ih.dtype.element_ty)
            if folded is not None:
                tl.store(folded + at, rounded, mask=mask)
            total += tl.sum(rounded.to(tl.float32), axis=1)
    if colsum is not None:
        tl.store(colsum + row, total, mask=inside)
    if bias is not None:
        if b_ih is not None:
            shift += tl.load(b_ih + row, mask=inside, other=0.0).to(tl.float32)
        if b_hh is not None:
            joins = inside
            if CELL == GRU:
                # r multiplies the candidate's R h + b_hh, so that this bias stays with it.
                joins = inside & (row < rows // 3 * 2)
            shift += tl.load(b_hh + row, mask=joins, other=0.0).to(tl.float32)
        tl.store(bias + row, shift, mask=inside)


@triton.jit(do_not_specialize=["first", "count", "tokens", "layers", "tiles", "pre_first", "room"])
def project(
    table, weight, bias, colsum, pre, stats, first, count, tokens, layers, tiles, rows, width, pre_first, room,
    pre_stride, eps,
    NORM: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pre[l, n, :] = weight norm(phi_l[n]) + bias for tokens first .. first + count of all layers.

    Args:
        table: [L, 5] int64, the layers; phi's elements are of type PHI, their width d.
        weight: [rows, d] T, with the norm's weight folded in; bias, colsum [rows] float32 (colsum or None).
        pre: [L, room, pre_stride] T, out: of each row ``rows`` numbers; its first token is ``pre_first``.
        stats: [1 or 2, L, N] float32, out: 1/sqrt(mean square + eps), and the mean for the layer norm; or None.

    The programs of one tile of tokens are neighbours, so that phi comes from memory once and from L2 after that.
    Grid: (ceil(rows / BLOCK_M) * tiles * L,), tiles = ceil(count / BLOCK_N).
    """
    columns = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    column = pid % columns
    tile = pid // columns
    layer = tile // tiles
    n = first + (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < first + count
    n = tl.minimum(n, first + count - 1)
    base, offset = layer_rows(table, layer, n, PHI, ALIGNED, FLAT)
    m = column * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc, _1, _2, _3, rstd, mean = gates_product(
        base, offset, weight, tl.minimum(m, rows - 1), rows, colsum, width, eps, acc, acc, acc, acc,
        RNN, NORM, EVEN_WIDTH, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc += tl.load(bias + m, mask=m < rows, other=0.0)[None, :]
    at = (layer.to(tl.int64) * room + (n - pre_first)) * pre_stride
    to = pre + at[:, None] + m[None, :]
    tl.store(to, acc.to(pre.dtype.element_ty), mask=live[:, None] & (m < rows)[None, :])
    if stats is not None:
        at = layer.to(tl.int64) * tokens + n
        tl.store(stats + at, rstd, mask=live & (column == 0))
        if NORM >= LAYER:
            tl.store(stats + layers.to(tl.int64) * tokens + at, mean, mask=live & (column == 0))


@triton.jit
def _state_product(
    before, row, w_hh, unit, rank, depth, acc0, acc1, acc2, acc3,
    G: tl.constexpr, EVEN_RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc_g + h R_g^T for the gates g < G: rows ``row`` [B] of the state before, columns ``unit`` of each gate."""
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        h = load_columns(before + row[:, None] + k[None, :], k, rank, EVEN_RANK)
        at = w_hh + unit.to(tl.int64)[None, :] * rank + k[:, None]
        step = rank.to(tl.int64) * rank
        acc0 = dot(h, load_rows(at, k, rank, EVEN_RANK), acc0)
        if G > 1:
            acc1 = dot(h, load_rows(at + step, k, rank, EVEN_RANK), acc1)
            acc2 = dot(h, load_rows(at + 2 * step, k, rank, EVEN_RANK), acc2)
        if G > 3:
            acc3 = dot(h, load_rows(at + 3 * step, k, rank, EVEN_RANK), acc3)
    return acc0, acc1, acc2, acc3


@triton.jit
def _save(gates, rank, a, b, c, d, inside):
    kind = gates.dtype.element_ty
    tl.store(gates, a.to(kind), mask=inside)
    tl.store(gates + rank, b.to(kind), mask=inside)
    tl.store(gates + 2 * rank, c.to(kind), mask=inside)
    tl.store(gates + 3 * rank, d.to(kind), mask=inside)


@triton.jit(do_not_specialize=["first", "count", "tokens", "layers", "tiles", "slots", "c_slots", "pre_first", "room"])
def recur(
    pre, w_hh, b_hh, h0, c0, h, c, total, out, c_last, table, weight, bias, colsum, stats,
    first, count, tokens, layers, tiles, rank, width, slots, c_slots, pre_first, room, pre_stride, eps,
    CELL: tl.constexpr, FUSED: tl.constexpr, REPLAY: tl.constexpr, SAVE_GATES: tl.constexpr, MEAN: tl.constexpr,
    NORM: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    EVEN_RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The recurrence of a tile of tokens over all layers: h_l = cell(pre_l, h_{l-1}).

    Args:
        pre: [L, room, pre_stride] T, the projected inputs of tokens from ``pre_first`` on, each row its gates' first
            g r numbers; with SAVE_GATES the gates as the backward wants them replace them (GRU r, z, n, R_n h + b_hn;
            LSTM i, f, g, o; pre_stride is then 4 r). None with FUSED, unless gates are saved.
        w_hh: [g r, r] T; b_hh [g r] T, read for the GRU's candidate only, or None; h0, c0 [N, r] T or None.
        h: [slots, N, r] T, out: layer l's states at slot l mod slots. c: [c_slots, N, r] T, likewise, for the LSTM.
        total: [N, r] float32, scratch: the running sum of the states (MEAN). May be ``out`` itself.
        out: [N, r] T, out: the mean of the states, or the last. c_last: [N, r] T, out, or None.
        table, weight, bias, colsum, stats: as for :func:`project`; FUSED computes the inputs here and needs them.

    FUSED is one kernel for all of the forward: nothing of a layer but its states leaves the chip. It suits the RNN,
    whose one gate fits one accumulator as wide as the state, when there are tiles of tokens for all multiprocessors.
    REPLAY computes the gates of one layer again, from the saved states: its programs are tiles * L.

    A program writes a tile of h and reads it again, transposed over its threads, as the operand of the next layer: a
    barrier lies between, which orders the block's own global writes before its own later reads. No other program
    touches these tokens.

    Grid: (tiles,), with REPLAY (tiles * L,); tiles = ceil(count / BLOCK_N).
    """
    pid = tl.program_id(0)
    begin = 0
    end = layers
    if REPLAY:
        begin = pid // tiles
        end = begin + 1
        pid = pid % tiles
    n = first + pid * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < first + count
    n = tl.minimum(n, first + count - 1)
    row = n.to(tl.int64) * rank
    row_pre = (n - pre_first).to(tl.int64) * pre_stride
    step = tl.cast(tokens, tl.int64) * rank
    step_pre = tl.cast(room, tl.int64) * pre_stride
    units = tl.arange(0, BLOCK_U)
    for layer in range(begin, end):
        before = h + tl.maximum(layer - 1, 0) % slots * step
        depth = tl.where(layer > 0, rank, 0)
        if h0 is not None:
            before = tl.where(layer > 0, before, h0)
            depth = tl.where(layer > 0, depth, rank)
        if FUSED:
            base, offset = layer_rows(table, layer, n, PHI, ALIGNED, FLAT)
        for u0 in range(0, rank, BLOCK_U):
            u = u0 + units
            unit = tl.minimum(u, rank - 1)
            inside = live[:, None] & (u < rank)[None, :]
            at = row[:, None] + u[None, :]
            if pre is not None:
                gates = pre + layer * step_pre + row_pre[:, None] + u[None, :]
            zero = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
            acc0, acc1, acc2, acc3, x2 = zero, zero, zero, zero, zero
            if FUSED:
                acc0, acc1, acc2, acc3, rstd, mean = gates_product(
                    base, offset, weight, unit, rank, colsum, width, eps, acc0, acc1, acc2, acc3,
                    CELL, NORM, EVEN_WIDTH, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc0 += tl.load(bias + unit)[None, :]
                if CELL >= GRU:
                    acc1 += tl.load(bias + rank + unit)[None, :]
                    acc2 += tl.load(bias + 2 * rank + unit)[None, :]
                if CELL == LSTM:
                    acc3 += tl.load(bias + 3 * rank + unit)[None, :]
                if stats is not None:
                    of = tl.cast(layer, tl.int64) * tokens + n
                    tl.store(stats + of, rstd, mask=live & (u0 == 0))
                    if NORM >= LAYER:
                        tl.store(stats + layers.to(tl.int64) * tokens + of, mean, mask=live & (u0 == 0))
            else:
                # The accumulators start from the inputs, so that these are on their way while the product's first
                # operands are.
                acc0 = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
                if CELL >= GRU:
                    acc1 = tl.load(gates + rank, mask=inside, other=0.0).to(tl.float32)
                    acc2 = tl.load(gates + 2 * rank, mask=inside, other=0.0).to(tl.float32)
                if CELL == LSTM:
                    acc3 = tl.load(gates + 3 * rank, mask=inside, other=0.0).to(tl.float32)
            if CELL == GRU:
                # r multiplies the candidate's state part alone.
                x2, acc2 = acc2, zero
                if b_hh is not None:
                    acc2 += tl.load(b_hh + 2 * rank + unit).to(tl.float32)[None, :]
            acc0, acc1, acc2, acc3 = _state_product(
                before, row, w_hh, unit, rank, depth, acc0, acc1, acc2, acc3, CELL, EVEN_RANK, BLOCK_K
            )
            if SAVE_GATES:
                # The gates replace the inputs: every thread has read its own by then.
                tl.debug_barrier()
            if CELL == RNN:
                new = tanh(acc0)
            elif CELL == GRU:
                acc0 = sigmoid(acc0)
                x2 = tanh(x2 + acc0 * acc2)
                acc1 = sigmoid(acc1)
                if SAVE_GATES:
                    _save(gates, rank, acc0, acc1, x2, acc2, inside)
                state = tl.load(before + at, mask=inside & (depth > 0), other=0.0).to(tl.float32)
                new = x2 + acc1 * (state - x2)
            else:
                acc0 = sigmoid(acc0)
                acc1 = sigmoid(acc1)
                acc2 = tanh(acc2)
                acc3 = sigmoid(acc3)
                if SAVE_GATES:
                    _save(gates, rank, acc0, acc1, acc2, acc3, inside)
                if not REPLAY:
                    c_before = c + tl.maximum(layer - 1, 0) % c_slots * step
                    has = layer > 0
                    if c0 is not None:
                        c_before = tl.where(has, c_before, c0)
                        has = layer >= 0
                    state = tl.load(c_before + at, mask=inside & has, other=0.0).to(tl.float32)
                    state = acc1 * state + acc0 * acc2
                    new = acc3 * tanh(state)
                    tl.store(c + layer % c_slots * step + at, state.to(c.dtype.element_ty), mask=inside)
                    if c_last is not None:
                        tl.store(c_last + at, state.to(c.dtype.element_ty), mask=inside & (layer == layers - 1))
            if not REPLAY:
                tl.store(h + layer % slots * step + at, new.to(h.dtype.element_ty), mask=inside)
                last = inside & (layer == layers - 1)
                if MEAN:
                    new += tl.load(total + at, mask=inside & (layer > 0), other=0.0)
                    tl.store(total + at, new, mask=inside & (layer < layers - 1))
                    new = new / layers
                tl.store(out + at, new.to(out.dtype.element_ty), mask=last)
        tl.debug_barrier()
