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
        at = w_hh + unit[None, :] * rank + k[:, None]
        step = rank * rank
        acc0 = dot(h, load_rows(at, k, rank, EVEN_RANK), acc0)
        if G > 1:
            acc1 = dot(h, load_rows(at + step, k, rank, EVEN_RANK), acc1)
            acc2 = dot(h, load_rows(at + 2 * step, k, rank, EVEN_RANK), acc2)
        if G > 3:
            acc3 = dot(h, load_rows(at + 3 * step, k, rank, EVEN_RANK), acc3)
    return acc0, acc1, acc2, acc3


@triton.jit(do_not_specialize=["first", "count", "tokens", "layers", "tiles", "slots", "c_slots", "pre_first", "room"])
def recur(
    pre, w_hh, b_hh, h0, c0, h, c, total, out, c_last, table, weight, bias, colsum, stats,
    first, count, tokens, layers, tiles, rank, width, slots, c_slots, pre_first, room, eps,
    CELL: tl.constexpr, FUSED: tl.constexpr, REPLAY: tl.constexpr, SAVE_GATES: tl.constexpr, MEAN: tl.constexpr,
    NORM: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    EVEN_RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The recurrence of a tile of tokens over all layers: h_l = cell(pre_l, h_{l-1}).

    Args:
        pre: [L, room, g r] T, the projected inputs of tokens from ``pre_first`` on; with SAVE_GATES [L, room, 4 r],
            where the gates as the backward wants them (GRU r, z, n, R_n h + b_hn; LSTM i, f, g, o) replace the inputs.
            None with FUSED.
        w_hh: [g r, r] T; b_hh [g r] T, read for the GRU's candidate only, or None; h0, c0 [N, r] T or None.
        h: [slots, N, r] T, out: layer l's states at slot l mod slots. c: [c_slots, N, r] T, likewise, for the LSTM.
        total: [N, r] float32, scratch: the running sum of the states, for MEAN where h does not keep them all; None
            elsewhere. May be ``out`` itself.
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
    # A tile's own start is a 64-bit scalar, so that its elements' offsets, of which there are many, need 32 bits only.
    tile = first + pid * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    live = local < first + count - tile
    clamped = tl.minimum(local, first + count - 1 - tile)
    row = local * rank
    wide: tl.constexpr = 4 if SAVE_GATES else CELL
    start = tl.cast(tile, tl.int64) * rank
    if total is not None:
        total += start
    if CELL == LSTM and not REPLAY:
        c += start
        if c0 is not None:
            c0 += start
    if pre is not None:
        pre += tl.cast(tile - pre_first, tl.int64) * (wide * rank)
    row_pre = row * wide
    step = tl.cast(tokens, tl.int64) * rank
    step_pre = tl.cast(room, tl.int64) * (wide * rank)
    units = tl.arange(0, BLOCK_U)
    kind = h.dtype.element_ty
    for layer in range(begin, end):
        before = h + (tl.maximum(layer - 1, 0) % slots * step + start)
        depth = tl.where(layer > 0, rank, 0)
        if h0 is not None:
            before = tl.where(layer > 0, before, h0 + start)
            depth = tl.where(layer > 0, depth, rank)
        if FUSED:
            base, offset = layer_rows(table, layer, tile + clamped, PHI, ALIGNED, FLAT)
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
                if stats is not None:
                    of = tl.cast(layer, tl.int64) * tokens + tile + local
                    tl.store(stats + of, rstd, mask=live)
                    if NORM >= LAYER:
                        tl.store(stats + (tl.cast(layers, tl.int64) * tokens + of), mean, mask=live)
                acc0 += tl.load(bias + unit)[None, :]
                if CELL >= GRU:
                    acc1 += tl.load(bias + rank + unit)[None, :]
                    acc2 += tl.load(bias + 2 * rank + unit)[None, :]
                if CELL == LSTM:
                    acc3 += tl.load(bias + 3 * rank + unit)[None, :]
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
                before, clamped * rank, w_hh, unit, rank, depth, acc0, acc1, acc2, acc3, CELL, EVEN_RANK, BLOCK_K
            )
            if SAVE_GATES:
                # The gates replace the inputs: every thread has read its own by then.
                tl.debug_barrier()
            # Each gate is stored as soon as it is known, so that no more than they must are in registers at once.
            if CELL == RNN:
                new = tanh(acc0)
            elif CELL == GRU:
                if SAVE_GATES:
                    tl.store(gates + 3 * rank, acc2.to(kind), mask=inside)
                acc0 = sigmoid(acc0)
                if SAVE_GATES:
                    tl.store(gates, acc0.to(kind), mask=inside)
                x2 = tanh(x2 + acc0 * acc2)
                if SAVE_GATES:
                    tl.store(gates + 2 * rank, x2.to(kind), mask=inside)
                acc1 = sigmoid(acc1)
                if SAVE_GATES:
                    tl.store(gates + rank, acc1.to(kind), mask=inside)
                state = tl.load(before + at, mask=inside & (depth > 0), other=0.0).to(tl.float32)
                new = x2 + acc1 * (state - x2)
            else:
                acc1 = sigmoid(acc1)
                if SAVE_GATES:
                    tl.store(gates + rank, acc1.to(kind), mask=inside)
                if not REPLAY:
                    c_before = c + tl.maximum(layer - 1, 0) % c_slots * step
                    has = layer > 0
                    if c0 is not None:
                        c_before = tl.where(has, c_before, c0)
                        has = layer >= 0
                    state = acc1 * tl.load(c_before + at, mask=inside & has, other=0.0).to(tl.float32)
                acc0 = sigmoid(acc0)
                if SAVE_GATES:
                    tl.store(gates, acc0.to(kind), mask=inside)
                acc2 = tanh(acc2)
                if SAVE_GATES:
                    tl.store(gates + 2 * rank, acc2.to(kind), mask=inside)
                acc3 = sigmoid(acc3)
                if SAVE_GATES:
                    tl.store(gates + 3 * rank, acc3.to(kind), mask=inside)
                if not REPLAY:
                    state += acc0 * acc2
                    new = acc3 * tanh(state)
                    # Where c is carried in place: threads that hold copies of a number have read it by then, too.
                    tl.debug_barrier()
                    tl.store(c + layer % c_slots * step + at, state.to(kind), mask=inside)
            if not REPLAY:
                # A mean is over the states as they are kept, like the definition's.
                state = new.to(kind)
                tl.store(h + (layer % slots * step + start) + at, state, mask=inside)
                if total is not None:
                    sums = tl.load(total + at, mask=inside & (layer > 0), other=0.0)
                    tl.store(total + at, sums + state.to(tl.float32), mask=inside)
        tl.debug_barrier()
    if not REPLAY:
        # Apart from the loop above, where the registers are taken.
        out += start
        if c_last is not None:
            c_last += start
        for u0 in range(0, rank, BLOCK_U):
            u = u0 + units
            inside = live[:, None] & (u < rank)[None, :]
            at = row[:, None] + u[None, :]
            if total is not None:
                mean = tl.load(total + at, mask=inside, other=0.0) / layers
                tl.store(out + at, mean.to(kind), mask=inside)
            elif MEAN:
                mean = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
                for group in range(0, layers, 4):
                    # Four loads at a time are on their way.
                    for i in tl.static_range(4):
                        of = h + (tl.cast(group + i, tl.int64) * step + start) + at
                        mean += tl.load(of, mask=inside & (group + i < layers), other=0.0).to(tl.float32)
                tl.store(out + at, (mean / layers).to(kind), mask=inside)
            else:
                of = h + ((layers - 1) % slots * step + start) + at
                tl.store(out + at, tl.load(of, mask=inside, other=0.0), mask=inside)
            if c_last is not None:
                tl.store(c_last + at, tl.load(c + (layers - 1) % c_slots * step + at, mask=inside), mask=inside)
