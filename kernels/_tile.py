"""What READ's Triton kernels share: the rows of the layers, the cells' functions, and one step of a product."""

import triton
import triton.language as tl

# A layer's line in the device table: address of phi, rows of the inner leading dimension, stride of the outer one and
# of the inner one in elements, address of its gradient (0: not wanted).
ENTRY = tl.constexpr(5)

# A cell by the number of its gates.
RNN, GRU, LSTM = tl.constexpr(1), tl.constexpr(3), tl.constexpr(4)
# CENTRED is the layer norm of float32 layers, which is computed another way.
NONE, RMS, LAYER, CENTRED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 operands are multiplied as such and not as tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def layer_rows(table, layer, n, PHI: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr):
    """Where a layer's data starts, and the offsets of its rows ``n`` [B] in elements, int64.

    ALIGNED promises that all rows of all layers start at multiples of 16 bytes, FLAT that one stride leads from each
    row to the next. Addresses come from a table on the device: any number of layers is one launch, a captured graph
    needs no list on the host, and no address is part of a compilation's key.
    """
    entry = table + layer * ENTRY
    base = tl.load(entry).to(tl.pointer_type(PHI))
    inner_stride = tl.load(entry + 3)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        inner_stride = tl.multiple_of(inner_stride, 8)
    if FLAT:
        offset = n.to(tl.int64) * inner_stride
    else:
        inner = tl.load(entry + 1).to(tl.int32)
        outer_stride = tl.load(entry + 2)
        if ALIGNED:
            outer_stride = tl.multiple_of(outer_stride, 8)
        offset = (n // inner).to(tl.int64) * outer_stride + (n % inner).to(tl.int64) * inner_stride
    return base, offset


@triton.jit
def load_columns(pointers, column, width, EVEN: tl.constexpr):
    """A tile whose columns past ``width`` are zero; EVEN: there are none."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(column < width)[None, :], other=0.0)


@triton.jit
def load_rows(pointers, row, height, EVEN: tl.constexpr):
    """A tile whose rows past ``height`` are zero; EVEN: there are none."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(row < height)[:, None], other=0.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By exp(-2|x|), which cannot overflow; NaN stays NaN. The interpreter has no libdevice."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def x_gate_row(k, rank, CELL: tl.constexpr):
    """The row of w_ih that belongs to column ``k`` of the saved gate gradients.

    The GRU's are stored as (n, r, z, r n): what reaches the candidate from x is the first, what reaches it from h the
    last, and either set of three is contiguous. The other cells' are stored as the weights are.
    """
    row = k
    if CELL == GRU:
        row = tl.where(k < rank, k + 2 * rank, k - rank)
    return row


@triton.jit
def gates_product(
    base, offset, weight, unit, gate, colsum, width, eps, acc0, acc1, acc2, acc3,
    G: tl.constexpr, NORM: tl.constexpr, EVEN_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc_g + rstd (phi - mean) W_g^T for the gates g < G, with the norm's statistics from the same tiles of phi.

    Rows of phi are at ``base + offset`` [BLOCK_N], the columns are the rows ``g gate + unit`` of ``weight``. Returns
    the four sums (those past G as they came), rstd [BLOCK_N] and the mean.

    The layer norm of 16-bit numbers takes the mean out behind the product, by the weights' row sums, and the variance
    from sums that are shifted by the row's first element. In float32 that would cancel too many digits: CENTRED reads
    the rows twice and centres them before the product.
    """
    columns = tl.arange(0, BLOCK_K)
    rows = base + offset[:, None]
    weights = weight + unit[None, :] * width
    step = gate * width
    mean = tl.zeros([BLOCK_N], tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    linear = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    if NORM == CENTRED:
        for k0 in range(0, width, BLOCK_K):
            k = k0 + columns
            mean += tl.sum(load_columns(rows + k[None, :], k, width, EVEN_WIDTH).to(tl.float32), axis=1)
        mean = mean / width
    elif NORM == LAYER:
        shift = tl.load(base + offset).to(tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + columns
        x = load_columns(rows + k[None, :], k, width, EVEN_WIDTH)
        if NORM == RMS:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        elif NORM == LAYER:
            wide = x.to(tl.float32) - shift[:, None]
            if not EVEN_WIDTH:
                wide = tl.where((k < width)[None, :], wide, 0.0)
            linear += tl.sum(wide, axis=1)
            square += tl.sum(wide * wide, axis=1)
        elif NORM == CENTRED:
            x = x.to(tl.float32) - mean[:, None]
            if not EVEN_WIDTH:
                x = tl.where((k < width)[None, :], x, 0.0)
            square += tl.sum(x * x, axis=1)
        x = x.to(weight.dtype.element_ty)
        at = weights + k[:, None]
        acc0 = dot(x, load_rows(at, k, width, EVEN_WIDTH), acc0)
        if G > 1:
            acc1 = dot(x, load_rows(at + step, k, width, EVEN_WIDTH), acc1)
            acc2 = dot(x, load_rows(at + 2 * step, k, width, EVEN_WIDTH), acc2)
        if G > 3:
            acc3 = dot(x, load_rows(at + 3 * step, k, width, EVEN_WIDTH), acc3)
    rstd = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM != NONE:
        variance = square / width
        if NORM == LAYER:
            linear = linear / width
            mean = shift + linear
            variance = variance - linear * linear
            # By comparisons, which keep NaN; an infinite sum of squares is no difference of two infinities.
            variance = tl.where(variance < 0.0, 0.0, variance)
            variance = tl.where(square == float("inf"), square, variance)
        rstd = 1.0 / tl.sqrt_rn(variance + eps)
        dead = rstd == 0.0
        fill = tl.zeros([BLOCK_N], tl.float32)
        if tl.max(dead.to(tl.int32), axis=0) > 0:
            # Finite numbers whose squares overflow are normalised to nothing, whatever became of their product; an
            # infinite one makes NaN, as in the definition. Only such a tile looks at its rows again.
            finite = tl.full([BLOCK_N], 1, tl.int32)
            for k0 in range(0, width, BLOCK_K):
                k = k0 + columns
                x = load_columns(rows + k[None, :], k, width, EVEN_WIDTH).to(tl.float32)
                finite = tl.minimum(finite, tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1))
            fill = tl.where(finite > 0, 0.0, float("nan"))
        acc0 = scale_rows(acc0, rstd, mean, dead, fill, colsum, unit, NORM)
        if G > 1:
            acc1 = scale_rows(acc1, rstd, mean, dead, fill, colsum, unit + gate, NORM)
            acc2 = scale_rows(acc2, rstd, mean, dead, fill, colsum, unit + 2 * gate, NORM)
        if G > 3:
            acc3 = scale_rows(acc3, rstd, mean, dead, fill, colsum, unit + 3 * gate, NORM)
    return acc0, acc1, acc2, acc3, rstd, mean


@triton.jit
def scale_rows(acc, rstd, mean, dead, fill, colsum, column, NORM: tl.constexpr):
    """rstd (acc - mean colsum), and ``fill`` in the rows that have no scale."""
    if NORM == LAYER:
        acc = acc - mean[:, None] * tl.load(colsum + column)[None, :]
    return tl.where(dead[:, None], fill[:, None], acc * rstd[:, None])
