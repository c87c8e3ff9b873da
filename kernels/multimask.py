"""The multimask family in Triton: the launches. The kernels are in multimask_move.py, multimask_targets.py,
multimask_loss.py and multimask_plan.py, their blocks in multimask_configs.py.

Called by pyeff/ops, which has checked its user's arguments and allocated the outputs; the arguments are those of the
other backends' kernels. Nothing here waits for the device or reads a number from it, and all scratch comes from torch's
allocator: a call can be captured in a CUDA graph.

R = B M rows, r = b M + m; T tokens, K slots, D numbers a token, H heads. An output without elements is not wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _launch, multimask_configs, multimask_loss, multimask_move, multimask_plan
from . import _multimask_targets as _targets
from ._launch import cdiv, given, launch
from ._multimask_ema import ema_update
from .configs import ARCHITECTURES, INTERPRETER, Config

__all__ = [
    "block_mask", "ema_update", "gather", "gather_backward", "loss", "loss_backward", "relative_bias",
    "relative_bias_backward", "rescale", "scatter", "scatter_backward", "targets", "targets_backward",
]  # fmt: skip

targets, targets_backward = _targets.targets, _targets.targets_backward

# Programs for each multiprocessor that keep its memory busy.
_BUSY = 8
# Rows that a part of a sum is worth.
_PART_ROWS = 16
_COSINE, _SMOOTH_L1, _L1 = multimask_loss.COSINE.value, multimask_loss.SMOOTH_L1.value, multimask_loss.L1.value


def config(kernel: str, t: Tensor) -> Config:
    """The configuration of a kernel on the device of a tensor."""
    return multimask_configs.config(f"multimask_{kernel}", _launch.machine(t.device).arch)


def _check_index(*tensors: Tensor) -> None:
    if any(t.numel() >= 1 << 31 for t in tensors):
        raise ValueError("an index of a plan has 2^31 numbers or more, the Triton kernels count them by 32 bits")


def gather(x: Tensor, ids_keep: Tensor, keep_len: Tensor, out: Tensor) -> None:
    """out[r, k] = x[r / M, ids_keep[r, k]], zero for slots from keep_len[r] on.

    Args:
        x: [B, T, D]. ids_keep: [R, K], keep_len: [R], int32. out: [R, K, D], of the dtype of x, out.
    """
    with _launch.on(x.device):
        _gather(x, ids_keep, keep_len, out)


def _gather(x: Tensor, index: Tensor, counts: Tensor, out: Tensor) -> None:
    _check_index(index)
    chosen, rows, width = config("gather", x), index.numel(), x.shape[2]
    grid = cdiv(rows, chosen.blocks["BLOCK_R"]) * cdiv(width, chosen.blocks["BLOCK_C"])
    launch(
        multimask_move.gather, (grid,), chosen, x, index, counts, out, rows, index.shape[1],
        index.shape[0] // x.shape[0], x.shape[1], x.stride(0), x.stride(1), width,
    )  # fmt: skip


def gather_backward(grad: Tensor, inverse: Tensor, dx: Tensor) -> None:
    """dx[b, t], the sum of grad[r, inverse[r, t]] over the masks of sample b in their order.

    Args:
        grad: [R, K, D]. inverse: [R, T] int32. dx: [B, T, D], of the dtype of grad, out.
    """
    with _launch.on(grad.device):
        _sum_rows(grad, inverse, None, grad.shape[0] // dx.shape[0], dx)


def _sum_rows(grad: Tensor, inverse: Tensor, lengths: Tensor | None, masks: int, out: Tensor) -> None:
    """Sums of slots, or with ``lengths`` of hidden tokens, over the rows of each group of ``out`` [F, T, D]."""
    _check_index(inverse)
    chosen, (groups, tokens, width) = config("sum", grad), out.shape
    grid = groups * cdiv(tokens, chosen.blocks["BLOCK_T"]) * cdiv(width, chosen.blocks["BLOCK_C"])
    count = inverse.shape[0] // groups
    wanted = _launch.machine(grad.device).multiprocessors * _BUSY
    parts = max(min(wanted // grid, count // _PART_ROWS), 1)
    each = cdiv(count, parts)
    parts = cdiv(count, each)
    to = out if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)
    launch(
        multimask_move.sum_rows, (grid, parts), chosen, grad, inverse, lengths, to, count, each, masks, tokens,
        grad.shape[1], out.numel(), grad.stride(0), grad.stride(1), width, HIDDEN=lengths is not None,
    )  # fmt: skip
    if parts > 1:
        _add(to, out)


def _add(parted: Tensor, to: Tensor) -> None:
    # Few sums are sums of many parts.
    chosen = config("add_few" if to.numel() < 64 else "add", to)
    grid = (cdiv(to.numel(), chosen.blocks["BLOCK_N"]),)
    launch(multimask_move.add, grid, chosen, parted, to, parted.shape[0], to.numel())


def scatter(
    x: Tensor, inverse: Tensor, lengths: Tensor, fill: Tensor | None, seed: Tensor, sample_ids: Tensor | None,
    noise_std: float, out: Tensor,
) -> None:  # fmt: skip
    """out[r, t]: x[r, inverse[r, t]]; where that is hidden, fill and noise; zero at padding.

    Args:
        x: [R, K, D]. inverse: [R, T], lengths: [B], int32. fill: [1 or B, T, D] or None. seed: int64, one number.
        sample_ids: [B] int64 or None. out: [R, T, D], of the dtype of x, out.
    """
    _check_index(inverse)
    noise, chosen = noise_std > 0, config("scatter", x)
    fast = x.element_size() == 2 and _launch.machine(x.device).arch != INTERPRETER
    strides = (0, 0) if fill is None else (fill.stride(0) if fill.shape[0] > 1 else 0, fill.stride(1))
    with _launch.on(x.device):
        launch(
            multimask_move.scatter, (inverse.numel(),), chosen, x, inverse, lengths, fill, seed if noise else None,
            sample_ids if noise else None, out, inverse.shape[1], x.shape[1], inverse.shape[0] // lengths.shape[0],
            x.stride(0), x.stride(1), *strides, x.shape[2], float(noise_std), NOISE_WANTED=noise, FAST=noise and fast,
        )  # fmt: skip


def scatter_backward(
    grad: Tensor, ids_keep: Tensor, keep_len: Tensor, inverse: Tensor, lengths: Tensor, dx: Tensor, dfill: Tensor
) -> None:
    """dx = grad[r, ids_keep]; dfill, the sum over rows (of a sample, or all) where tokens are hidden.

    Args:
        grad: [R, T, D]. ids_keep: [R, K], keep_len: [R], inverse: [R, T], lengths: [B], int32.
        dx: [R, K, D], dfill: [1 or B, T, D], of the dtype of grad, out.
    """
    with _launch.on(grad.device):
        if dx.numel():
            _gather(grad, ids_keep, keep_len, dx)
        if dfill.numel():
            _sum_rows(grad, inverse, lengths, inverse.shape[0] // lengths.shape[0], dfill)


def loss(
    pred: Tensor, target: Tensor, inverse: Tensor, lengths: Tensor, count: Tensor | None, kind: int, beta: float,
    scale: float, total: Tensor, dpred: Tensor, moments: Tensor,
) -> None:  # fmt: skip
    """The loss where tokens are hidden, its derivative, and the moments of what is compared.

    Args:
        pred: [R, T, D]. target: [B, T, D] float32. inverse: [R, T], lengths: [B], int32.
        count: int64, one number that the scale is divided by, or None.
        kind: 0 l2, 1 smooth_l1 (of ``beta``), 2 l1, 3 cosine.
        total: [] or [R, T] float32, out. dpred: as pred, out: zero where nothing is hidden.
        moments: [1 + 4 D] float64, out: the count of hidden tokens; sums and sums of squares of targets, predictions.
    """
    with _launch.on(pred.device):
        _Comparison(pred, target, inverse, lengths, count, kind, beta, scale).forward(total, dpred, moments)


def loss_backward(
    grad: Tensor, pred: Tensor, target: Tensor, inverse: Tensor, lengths: Tensor, count: Tensor | None, kind: int,
    beta: float, scale: float, dpred: Tensor, dtarget: Tensor,
) -> None:  # fmt: skip
    """The gradients of ``loss`` for a gradient [] or [R, T] float32 from above; the other arguments as there.

    Args:
        dpred: as pred, dtarget: as target, out.
    """
    with _launch.on(pred.device):
        comparison = _Comparison(pred, target, inverse, lengths, count, kind, beta, scale)
        comparison.run(grad, None, given(dpred), given(dtarget), None, places=grad.dim() > 0)


class _Comparison:
    """One call's tensors and options."""

    def __init__(
        self, pred: Tensor, target: Tensor, inverse: Tensor, lengths: Tensor, count: Tensor | None, kind: int,
        beta: float, scale: float,
    ) -> None:  # fmt: skip
        _check_index(inverse)
        self.pred, self.target, self.inverse, self.lengths, self.count = pred, target, inverse, lengths, count
        self.kind = _L1 if kind == _SMOOTH_L1 and beta == 0 else kind
        self.beta, self.scale = float(beta), float(scale)

    def forward(self, total: Tensor, dpred: Tensor, moments: Tensor) -> None:
        into, places = given(dpred), total.dim() > 0
        if self.kind == _COSINE and moments.numel():
            # Rarely wanted together: the predictions are read once more.
            self._finish(None, None, total, self._distances(None, None, None, None, True, False)[1], moments)
        losses, sums = self.run(None, total, into, None, moments if self.kind != _COSINE else None, places=places)
        if not places or sums is not None:
            self._finish(None if places else losses, self.count, total, sums, moments)

    def run(
        self, grad: Tensor | None, total: Tensor | None, dpred: Tensor | None, dtarget: Tensor | None,
        moments: Tensor | None, *, places: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """Compares; (the parts of the sum, those of the moments), each where it is asked for."""
        if self.kind != _COSINE:
            return self._distances(grad, total, dpred, dtarget, given(moments) is not None, places)
        chosen, (batch, tokens, width) = config("cosine", self.pred), self.target.shape
        grid = batch * cdiv(tokens, chosen.blocks["BLOCK_T"])
        losses = total
        if total is not None and not places:
            losses = total.new_empty(grid)
        launch(
            multimask_loss.cosine, (grid,), chosen, self.pred, self.target, self.inverse, self.lengths, self.count,
            grad, losses, dpred, dtarget, self.pred.shape[0] // batch, tokens, *self._strides(), width, self.scale,
            PLACES=places,
        )  # fmt: skip
        return losses, None

    def _strides(self) -> tuple[int, int, int, int]:
        return (*self.pred.stride()[:2], *self.target.stride()[:2])

    def _distances(
        self, grad: Tensor | None, total: Tensor | None, dpred: Tensor | None, dtarget: Tensor | None, moments: bool,
        places: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
        chosen = config("moments" if moments else "loss", self.pred)
        batch, tokens, width = self.target.shape
        tiles, across = cdiv(tokens, chosen.blocks["BLOCK_T"]), cdiv(width, chosen.blocks["BLOCK_C"])
        # As many programs as keep the device busy, so that there are few sums to add up.
        most = max(_launch.machine(self.pred.device).multiprocessors * _BUSY // across, 1)
        each = cdiv(batch * tiles, most)
        groups = cdiv(batch * tiles, each)
        losses, sums = total, None
        if total is not None and not places:
            losses = total.new_empty(groups * across)
        elif total is not None and across > 1:
            losses = total.new_empty(across, *total.shape)
        if moments:
            sums = self.target.new_empty(groups, 4 * width, dtype=torch.float64), self.inverse.new_empty(groups)
        kind = _L1 if self.kind == _COSINE else self.kind
        launch(
            multimask_loss.distance, (groups * across,), chosen, self.pred, self.target, self.inverse, self.lengths,
            self.count, grad, losses, dpred, dtarget, *(sums or (None, None)), self.pred.shape[0] // batch, tokens,
            tiles, batch * tiles, each, *self._strides(), width, self.beta, self.scale, KIND=kind, PLACES=places,
        )  # fmt: skip
        if places and total is not None and losses is not None and losses is not total:
            _add(losses, total)
        return losses, sums

    def _finish(
        self, losses: Tensor | None, count: Tensor | None, total: Tensor, sums: tuple[Tensor, Tensor] | None,
        moments: Tensor,
    ) -> None:  # fmt: skip
        chosen = config("finish", self.pred)
        groups, size = sums[0].shape if sums else (0, 0)
        launch(
            multimask_loss.finish, (max(cdiv(size, chosen.blocks["BLOCK_N"]), 1),), chosen, losses,
            *(sums or (None, None)), count if losses is not None else None, total, moments if sums else None,
            0 if losses is None else losses.numel(), groups, size, self.scale,
        )  # fmt: skip


def rescale(t: Tensor, factor: Tensor) -> None:
    """t *= factor, a float32 number on the device; nothing is written where it is one."""
    chosen = config("rescale", t)
    with _launch.on(t.device):
        grid = (cdiv(t.numel(), chosen.blocks["BLOCK"]),)
        launch(multimask_loss.rescale, grid, chosen, t, factor, t.numel())


def relative_bias(ids_keep: Tensor, keep_len: Tensor, slopes: Tensor, prefix: int, out: Tensor) -> None:
    """out[r, h, i, j] = -slopes[h] |id_i - id_j|, zero within the prefix, -inf for slots j past what a row keeps.

    Args:
        ids_keep: [R, K], keep_len: [R], int32. slopes: [H] float32. out: [R, H, K, K], out.
    """
    with _launch.on(out.device):
        for rows, grid, arguments in _places(ids_keep, keep_len, out.shape[1], prefix, out):
            launch(
                multimask_plan.relative_bias, grid, config("bias", out), ids_keep[rows], keep_len[rows], slopes,
                out[rows], *arguments,
            )  # fmt: skip


def relative_bias_backward(grad: Tensor, ids_keep: Tensor, keep_len: Tensor, prefix: int, dslopes: Tensor) -> None:
    """dslopes[h], the sum of -grad[r, h, i, j] |id_i - id_j|.

    Args:
        grad: [R, H, K, K], contiguous. ids_keep: [R, K], keep_len: [R], int32. dslopes: [H] float32, out.
    """
    (rows, slots), heads = ids_keep.shape, dslopes.shape[0]
    across = cdiv(slots * slots, config("bias", grad).blocks["BLOCK"])
    parts = dslopes.new_empty(rows * across, heads)
    with _launch.on(grad.device):
        for some, grid, arguments in _places(ids_keep, keep_len, heads, prefix, grad):
            launch(
                multimask_plan.relative_bias_backward, grid, config("bias", grad), grad[some], ids_keep[some],
                keep_len[some], parts[some.start * across : some.stop * across], *arguments,
            )  # fmt: skip
        _add(parts, dslopes)


def _places(
    ids_keep: Tensor, keep_len: Tensor, heads: int, prefix: int, like: Tensor
) -> Iterator[tuple[slice, tuple[int, int, int], tuple[int, ...]]]:
    """Rows, grid and numbers of each launch; more rows than a grid has take several."""
    (rows, slots), area = ids_keep.shape, ids_keep.shape[1] ** 2
    if area >= 1 << 31:
        raise ValueError(f"ids_keep has {slots} slots, the Triton kernels count pairs of them by 32 bits")
    across, most = cdiv(area, config("bias", like).blocks["BLOCK"]), (1 << 16) - 1
    wanted = _launch.machine(like.device).multiprocessors * _BUSY
    each = cdiv(heads, max(min(wanted // (across * rows), heads), 1))
    for first in range(0, rows, most):
        some = slice(first, min(first + most, rows))
        yield some, (across, some.stop - first, cdiv(heads, each)), (slots, heads, each, prefix, area)


def block_mask(
    seed: Tensor, sample_ids: Tensor | None, lengths: Tensor, masks: int, grid_width: int, keep: float, share: float,
    length: int, inverse: bool, ids_keep: Tensor, keep_len: Tensor, kept_slot: Tensor,
) -> None:  # fmt: skip
    """Masks of blocks, as reference/block_mask.py draws them.

    Args:
        seed: int64, one number. sample_ids: [B] int64 or None. lengths: [B] int32.
        ids_keep: [R, K], keep_len: [R], kept_slot: [R, T], int32, out.
    """
    _check_index(kept_slot, ids_keep)
    rows, tokens = kept_slot.shape
    # Twice as long, a block has all tokens as well.
    numbers = masks, tokens, ids_keep.shape[1], grid_width, min(length, 2 * tokens + 1)
    kept, centres = _bits(keep), _bits(share)
    with _launch.on(lengths.device):
        size = next((size for size in multimask_configs.MASK if size >= tokens), 0)
        if size:
            launch(
                multimask_plan.block_mask, (rows,), config(f"mask{size}", lengths), seed, sample_ids, lengths, ids_keep,
                keep_len, kept_slot, *numbers, kept, centres, int(inverse),
            )  # fmt: skip
            return
        chosen = config("mask1024", lengths)
        scores = lengths.new_empty((rows, tokens), dtype=torch.int64)
        launch(
            multimask_plan.score_tokens, (rows, cdiv(tokens, chosen.blocks["BLOCK_T"])), chosen, seed, sample_ids,
            lengths, scores, masks, tokens, *numbers[3:], centres,
        )  # fmt: skip
        launch(
            multimask_plan.select_tokens, (rows,), chosen, lengths, scores, ids_keep, keep_len, kept_slot, *numbers[:3],
            kept, int(inverse),
        )  # fmt: skip


def _bits(number: float) -> int:
    """A float64 number as an integer of 64 bits: Triton would make it float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def aot_cases(archs: Sequence[int] = ARCHITECTURES) -> Iterator[Any]:
    """Every kernel in every configuration, as calls would compile it; see _multimask_cases.py."""
    from . import _multimask_cases

    return _multimask_cases.aot_cases(archs)
