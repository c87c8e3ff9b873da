"""READ's backward in Triton, along the tokens: the recurrence in reverse, and the gradients of the layers.

Source: Nguyen et al., 2023, arXiv 2305.15348, section 3. Letters and rules as in read_forward.py. The gradients of the
gates' sums are stored as T, the GRU's in four segments of r columns, (n, r, z, r n), see ``x_gate_row``; the other
cells' as their weights' rows. What is carried from layer to layer, and every sum, is float32.
"""

import triton
import triton.language as tl

from ._tile import ENTRY, GRU, LAYER, LSTM, NONE, RNN, dot, layer_rows, load_columns, tanh, x_gate_row


@triton.jit
def _emit(da, bias_sums, column, value, inside, end, step):
    """Stores one segment of the gates' gradients, and adds it to the sums over this program's tokens."""
    tl.store(da, value.to(da.dtype.element_ty), mask=inside)
    if bias_sums is not None:
        # Rows past the last token repeat it, and must not count.
        sums = tl.sum(tl.where(inside, value, 0.0), axis=0)
        sums += tl.load(bias_sums + column, mask=(column < end) & (step > 0), other=0.0)
        tl.store(bias_sums + column, sums, mask=column < end)


@triton.jit(do_not_specialize=["first", "count", "tokens", "layers", "room", "gates_first", "gates_room"])
def reverse(
    grad_out, grad_c, w_hh, h0, c0, h, c, gates, da, carry, bias_sums, dh0, dc0,
    first, count, tokens, layers, rank, room, gates_first, gates_room, share,
    CELL: tl.constexpr, MEAN: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the output's gradient to those of the gates' sums, for a tile of tokens, from the last layer to the first.

    Args:
        grad_out, grad_c: [N, r] T or None. w_hh: [g r, r] T. h0, c0: [N, r] T or None.
        h, c: [L, N, r] T, the saved states (c for the LSTM). gates: [L, gates_room, 4 r] T, the saved gates of tokens
            from ``gates_first`` on; None for the RNN.
        da: [L, room, 4 r (RNN: r)] T, out: the gradients of the gates' sums of tokens from ``first`` on.
        carry: [N, r] float32, scratch: z dh of the GRU, the gradient of c of the LSTM. None for the RNN.
        bias_sums: [tiles of all tokens, 4 r (RNN: r)] float32, out: da, unrounded, summed over layers and the tokens
            of a tile; or None.
        dh0, dc0: [N, r] T, out, or None.
        share: a layer's share of ``grad_out``: 1 / L for the mean; the last layer has all of it otherwise.

    A layer's da is stored and read again by the same program, see ``recur``. Grid: (ceil(count / BLOCK_N),).
    """
    pid = tl.program_id(0)
    # As in ``recur``: 64-bit starts, 32-bit offsets.
    tile = first + pid * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    live = local < first + count - tile
    local = tl.minimum(local, first + count - 1 - tile)
    wide: tl.constexpr = 1 if CELL == RNN else 4
    state_part: tl.constexpr = 1 if CELL == GRU else 0
    row = local * rank
    row_da = local * (wide * rank)
    start = tl.cast(tile, tl.int64) * rank
    h += start
    da += tl.cast(tile - first, tl.int64) * (wide * rank)
    if h0 is not None:
        h0 += start
    if grad_out is not None:
        grad_out += start
    if dh0 is not None:
        dh0 += start
    if CELL != RNN:
        gates += tl.cast(tile - gates_first, tl.int64) * (4 * rank)
        carry += start
    if CELL == LSTM:
        c += start
        if c0 is not None:
            c0 += start
        if grad_c is not None:
            grad_c += start
        if dc0 is not None:
            dc0 += start
    step = tl.cast(tokens, tl.int64) * rank
    step_da = tl.cast(room, tl.int64) * (wide * rank)
    step_gates = tl.cast(gates_room, tl.int64) * (4 * rank)
    if bias_sums is not None:
        bias_sums += (first // BLOCK_N + pid).to(tl.int64) * (wide * rank)
    units = tl.arange(0, BLOCK_U)
    steps = layers
    if dh0 is not None:
        steps = layers + 1  # the last one is the product alone
    if CELL == LSTM:
        for u0 in range(0, rank, BLOCK_U):
            u = u0 + units
            inside = live[:, None] & (u < rank)[None, :]
            at = row[:, None] + u[None, :]
            dc = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
            if grad_c is not None:
                dc = tl.load(grad_c + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(carry + at, dc, mask=inside)
        tl.debug_barrier()
    for i in range(steps):
        layer = layers - 1 - i
        depth = tl.where(i > 0, CELL * rank, 0)
        next_da = da + tl.minimum(layer + 1, layers - 1) * step_da + state_part * rank
        now = tl.maximum(layer, 0)
        to = da + now * step_da
        for u0 in range(0, rank, BLOCK_U):
            u = u0 + units
            real = (u < rank)[None, :]
            inside = live[:, None] & real
            at = row[:, None] + u[None, :]
            dh = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
            for k0 in range(0, depth, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                left = load_columns(next_da + row_da[:, None] + k[None, :], k, CELL * rank, EVEN_DEPTH)
                pointers = w_hh + k[:, None] * rank + u[None, :]
                right = tl.load(pointers, mask=(k < CELL * rank)[:, None] & (u < rank)[None, :], other=0.0)
                dh = dot(left, right, dh)
            if CELL == GRU:
                dh += tl.load(carry + at, mask=real & (i > 0), other=0.0)
            if layer >= 0:
                if grad_out is not None:
                    asked = real
                    if not MEAN:
                        asked = real & (i == 0)
                    dh += tl.load(grad_out + at, mask=asked, other=0.0).to(tl.float32) * share
                segment = to + row_da[:, None] + u[None, :]
                if CELL == RNN:
                    state = tl.load(h + layer * step + at, mask=real, other=0.0).to(tl.float32)
                    _emit(segment, bias_sums, u, dh * (1.0 - state * state), inside, rank, i)
                else:
                    # Each number is loaded where it is first used, between stores, which the compiler moves no load
                    # across: all at once would not fit the registers.
                    gate = gates + layer * step_gates + row_da[:, None] + u[None, :]
                    if CELL == GRU:
                        saved, given = h, h0
                    else:
                        saved, given = c, c0
                    before = saved + tl.maximum(layer - 1, 0) * step
                    has = layer > 0
                    if given is not None:
                        before = tl.where(layer > 0, before, given)
                        has = layer >= 0
                    if CELL == GRU:
                        z = tl.load(gate + rank, mask=real, other=0.0).to(tl.float32)
                        tl.debug_barrier()  # threads that hold copies of a number have read the old one
                        tl.store(carry + at, dh * z, mask=inside)
                        c_n = tl.load(gate + 2 * rank, mask=real, other=0.0).to(tl.float32)
                        state = tl.load(before + at, mask=real & has, other=0.0).to(tl.float32)
                        value = dh * (state - c_n) * z * (1.0 - z)
                        _emit(segment + 2 * rank, bias_sums, 2 * rank + u, value, inside, 3 * rank, i)
                        dn = dh * (1.0 - z) * (1.0 - c_n * c_n)
                        _emit(segment, bias_sums, u, dn, inside, rank, i)
                        r = tl.load(gate, mask=real, other=0.0).to(tl.float32)
                        _emit(segment + 3 * rank, bias_sums, 3 * rank + u, dn * r, inside, 4 * rank, i)
                        value = tl.load(gate + 3 * rank, mask=real, other=0.0).to(tl.float32)  # R_n h + b_hn
                        value = dn * value * r * (1.0 - r)
                        _emit(segment + rank, bias_sums, rank + u, value, inside, 2 * rank, i)
                    else:
                        tanh_c = tanh(tl.load(c + layer * step + at, mask=real, other=0.0).to(tl.float32))
                        o = tl.load(gate + 3 * rank, mask=real, other=0.0).to(tl.float32)
                        value = dh * tanh_c * o * (1.0 - o)
                        _emit(segment + 3 * rank, bias_sums, 3 * rank + u, value, inside, 4 * rank, i)
                        dc = dh * o * (1.0 - tanh_c * tanh_c)
                        dc += tl.load(carry + at, mask=real, other=0.0)
                        f = tl.load(gate + rank, mask=real, other=0.0).to(tl.float32)
                        tl.debug_barrier()  # threads that hold copies of a number have read the old one
                        tl.store(carry + at, dc * f, mask=inside)
                        state = tl.load(before + at, mask=real & has, other=0.0).to(tl.float32)
                        value = dc * state * f * (1.0 - f)
                        _emit(segment + rank, bias_sums, rank + u, value, inside, 2 * rank, i)
                        in_gate = tl.load(gate, mask=real, other=0.0).to(tl.float32)
                        g = tl.load(gate + 2 * rank, mask=real, other=0.0).to(tl.float32)
                        _emit(segment, bias_sums, u, dc * g * in_gate * (1.0 - in_gate), inside, rank, i)
                        value = dc * in_gate * (1.0 - g * g)
                        _emit(segment + 2 * rank, bias_sums, 2 * rank + u, value, inside, 3 * rank, i)
            elif dh0 is not None:
                tl.store(dh0 + at, dh.to(dh0.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    if dc0 is not None:
        for u0 in range(0, rank, BLOCK_U):
            u = u0 + units
            inside = live[:, None] & (u < rank)[None, :]
            at = row[:, None] + u[None, :]
            tl.store(dc0 + at, tl.load(carry + at, mask=inside, other=0.0).to(dc0.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "count", "tokens", "layers", "tiles", "room"])
def layer_gradient(
    table, da, weight, stats, first, count, tokens, layers, tiles, room, rank, width,
    CELL: tl.constexpr, NORM: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of each layer that wants one: u = da W gamma, then that of the norm, row by row.

    With xhat = (phi - mean) rstd: dphi = rstd (u - [mean(u)] - xhat mean(u xhat)), the bracket for the layer norm only.

    Args:
        table: [L, 5] int64: the layers, and where their gradients go: [N, d] T, contiguous.
        da: [L, room, 4 r (RNN: r)] T, from ``reverse``, of tokens from ``first`` on.
        weight: [g r, d] T, with the norm's weight folded in. stats: [1 or 2, L, N] float32, or None without a norm.

    u is stored where dphi will be and read again by the same program, after a barrier: a row's sums need all of it.
    Grid: (tiles * L,), tiles = ceil(count / BLOCK_N).
    """
    pid = tl.program_id(0)
    layer = pid // tiles
    address = tl.load(table + layer * ENTRY + 4)
    if address != 0:
        tile = first + pid % tiles * BLOCK_N
        local = tl.arange(0, BLOCK_N)
        live = local < first + count - tile
        local = tl.minimum(local, first + count - 1 - tile)
        wide: tl.constexpr = 1 if CELL == RNN else 4
        base, offset = layer_rows(table, layer, tile + local, PHI, ALIGNED, FLAT)
        kind = weight.dtype.element_ty
        to = address.to(tl.pointer_type(kind))
        if ALIGNED:
            to = tl.multiple_of(to, 16)
        to += tl.cast(tile, tl.int64) * width
        row = local * width
        da += (layer.to(tl.int64) * room + (tile - first)) * (wide * rank)
        row_da = local * (wide * rank)
        rstd = tl.full([BLOCK_N], 1.0, tl.float32)
        mean = tl.zeros([BLOCK_N], tl.float32)
        if NORM != NONE:
            at = layer.to(tl.int64) * tokens + tile + local
            rstd = tl.load(stats + at)
            if NORM >= LAYER:
                mean = tl.load(stats + layers.to(tl.int64) * tokens + at)
        sum_u = tl.zeros([BLOCK_N], tl.float32)
        sum_ux = tl.zeros([BLOCK_N], tl.float32)
        for m0 in range(0, width, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            inside = live[:, None] & (m < width)[None, :]
            u = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for k0 in range(0, CELL * rank, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                left = load_columns(da + row_da[:, None] + k[None, :], k, CELL * rank, EVEN_DEPTH)
                pointers = weight + x_gate_row(k, rank, CELL)[:, None] * width + m[None, :]
                right = tl.load(pointers, mask=(k < CELL * rank)[:, None] & (m < width)[None, :], other=0.0)
                u = dot(left, right, u)
            tl.store(to + row[:, None] + m[None, :], u.to(kind), mask=inside)
            if NORM != NONE:
                x = tl.load(base + offset[:, None] + m[None, :], mask=(m < width)[None, :], other=0.0).to(tl.float32)
                x = tl.where((m < width)[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
                sum_ux += tl.sum(u * x, axis=1)
                if NORM >= LAYER:
                    sum_u += tl.sum(u, axis=1)
        if NORM != NONE:
            tl.debug_barrier()
            sum_u = sum_u / width
            sum_ux = sum_ux / width
            for m0 in range(0, width, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                inside = live[:, None] & (m < width)[None, :]
                u = tl.load(to + row[:, None] + m[None, :], mask=inside, other=0.0).to(tl.float32)
                x = tl.load(base + offset[:, None] + m[None, :], mask=inside, other=0.0).to(tl.float32)
                x = (x - mean[:, None]) * rstd[:, None]
                u = (u - sum_u[:, None] - x * sum_ux[:, None]) * rstd[:, None]
                tl.store(to + row[:, None] + m[None, :], u.to(kind), mask=inside)
