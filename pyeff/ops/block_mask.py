"""Masks of blocks as an op: drawn where they are used, exactly as many tokens as asked for, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff import backends
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import check_tensor
from pyeff.ops._multimask_checks import check_sample_ids, check_seed, checked_seed
from pyeff.plans import MaskPlan
from pyeff.plans.mask import _positions, checked_lengths
from pyeff.reference.block_mask import draw, share

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "block_mask(Tensor seed, Tensor? sample_ids, Tensor lengths, SymInt masks, SymInt tokens, SymInt grid_width, "
    "float keep, float share, SymInt length, bool inverse, SymInt slots, *, str backend='') "
    "-> (Tensor ids_keep, Tensor keep_len, Tensor inverse)"
)
_lib.define(
    "block_mask_kernels(Tensor seed, Tensor? sample_ids, Tensor lengths, SymInt masks, SymInt tokens, "
    "SymInt grid_width, float keep, float share, SymInt length, bool inverse, SymInt slots, str backend) "
    "-> (Tensor ids_keep, Tensor keep_len, Tensor inverse)"
)


def block_mask(
    B: int,
    M: int,
    shape: Sequence[int],
    *,
    keep: float,
    adjust: float = 0.0,
    length: int,
    inverse: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> MaskPlan:
    """Random masks of blocks: M for each of B samples, of which each keeps exactly ``int(tokens * keep)``.

    ``int(tokens * (fraction + adjust) / length^dimensions)`` centres are drawn with replacement and widened to blocks
    of ``length`` in each dimension, cut off at the borders; then tokens are dropped or added at random until the number
    is right. ``fraction`` is ``keep``, or ``1 - keep`` where blocks are of what is hidden. All of it is a function of
    (seed, sample, mask), whatever the batch, the device or the backend.

    Args:
        B (int), M (int): samples, and students of each.
        shape (sequence of int): (T,) or (H, W).
        keep (float): the share that a student sees, 0 to 1.
        adjust (float): a share of more centres, for what is lost where blocks overlap. Single tokens need none; the
            paper takes .05 for audio, .07 for images.
        length (int): of a block in each dimension, below 2^30; 1 draws single tokens.
        inverse (bool): whether blocks are of what is kept (inverse block masking), or of what is hidden.
        seed (int or Tensor): an int64 tensor of one number on ``device`` may change between replays of a graph.
        sample_ids (Tensor, optional): [B] int64, names of the samples. Default: 0 to B - 1.
        lengths (Tensor, optional): [B] integers, tokens of each sample that are no padding, for a shape (T,).
        device (device, optional): where the plan is to be. Default: that of ``lengths``, ``sample_ids`` or a ``seed``
            that is a tensor, else the CPU.

    Returns:
        MaskPlan: of B*M rows, each with ``max(int(tokens * keep), 1)`` slots.

    Raises:
        ValueError: a number out of range, or tensors that do not fit.
        RuntimeError: a backend was named that cannot serve the call.

    Source: Baevski et al., 2022, arXiv 2212.07525, section 3.2, "inverse block masking".

    Example:
        >>> import pyeff
        >>> plan = pyeff.ops.block_mask(2, 16, (14, 14), keep=0.2, adjust=0.07, length=3, seed=1)
        >>> plan.rows, plan.width
        (32, 39)
    """
    op = "block_mask"
    numbers = {"B": B, "M": M, "length": length}
    sizes = tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else ()
    if len(sizes) not in (1, 2):
        raise ValueError(f"{op}: shape is {shape!r}, expected (T,) or (H, W)")
    for name, n in (*numbers.items(), *(("shape", n) for n in sizes)):
        if not _is_integer(n) or n < 1:
            raise ValueError(f"{op}: {name} is {n!r}, expected integers of at least 1")
    for name, value, limit in (("keep", keep, 1.0), ("adjust", adjust, float("inf"))):
        if not isinstance(value, (int, float)) or not (0 <= value <= limit if name == "keep" else abs(value) < limit):
            raise ValueError(f"{op}: {name} is {value!r}, expected a finite number{' from 0 to 1' * (name == 'keep')}")
    tokens = sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1]
    if tokens >= 2**30 or M >= 2**30:
        raise ValueError(f"{op}: shape is {shape!r} and M {M}, expected less than 2^30 tokens and masks")
    if length >= 2**30:
        raise ValueError(f"{op}: length is {length}, expected less than 2^30")
    if lengths is not None and len(sizes) == 2:
        raise ValueError(f"{op}: lengths was given for a shape {shape!r}, expected none but for (T,)")
    if device is None:
        device = next((t.device for t in (lengths, sample_ids, seed) if isinstance(t, Tensor)), "cpu")
    device = _indexed(torch.device(device))
    lengths = checked_lengths(op, lengths, B, tokens, device)
    check_sample_ids(op, sample_ids, B, lengths)
    ids_keep, keep_len, kept_slot = torch.ops.pyeff.block_mask(
        checked_seed(op, seed, device), sample_ids, lengths, M, tokens, sizes[1] if len(sizes) == 2 else 0,
        float(keep), share(keep, adjust, length, inverse, len(sizes)), length, bool(inverse),
        torch.sym_max(torch.sym_int(tokens * keep), 1), backend=backends.current(),
    )  # fmt: skip
    return MaskPlan(ids_keep, keep_len, kept_slot, lengths)


def _is_integer(n: object) -> bool:
    """Numbers of a tracer among them, which must not be asked for their value."""
    if isinstance(n, (int, torch.SymInt)):
        return not isinstance(n, bool)
    return hasattr(n, "__index__")


def _indexed(device: torch.device) -> torch.device:
    """ "cuda" as the device that it stands for, which tensors name."""
    return torch.empty(0, device=device).device if device.type == "cuda" and device.index is None else device


def _block_mask(
    seed, sample_ids, lengths, masks, tokens, grid_width, keep, share, length, inverse, slots, *, backend=""
):  # fmt: skip
    op = "block_mask"
    batch = lengths.numel()
    check_tensor(op, "lengths", lengths, (batch,), lengths, torch.int32, "lengths are")
    check_seed(op, seed, lengths)
    check_sample_ids(op, sample_ids, batch, lengths)
    # One by one: which of them is the least is no business of a graph's guards.
    if (
        any(n < 1 for n in (batch, masks, tokens, length, slots))
        or grid_width < 0
        or (grid_width and tokens % grid_width)
    ):
        raise ValueError(f"{op}: sizes {(batch, masks, tokens, grid_width, length, slots)} do not fit each other")
    if length >= 2**30:
        raise ValueError(f"{op}: length is {length}, expected less than 2^30")
    if max(masks, tokens) >= 2**30 or not 0 <= keep <= 1 or not abs(share) < float("inf"):
        raise ValueError(f"{op}: keep is {keep} and share {share}, expected 0 to 1 and a finite number")
    like = lengths.new_empty(0, dtype=torch.float32)
    chosen = kernels.choose(op, like, tokens, backend, "")
    arguments = seed, sample_ids, lengths, masks, tokens, grid_width, keep, share, length, inverse
    if chosen == "reference":
        return _positions(draw(*arguments), slots)
    return torch.ops.pyeff.block_mask_kernels(*arguments, slots, chosen)


def _kernels(
    seed, sample_ids, lengths, masks, tokens, grid_width, keep, share, length, inverse, slots, backend
):  # fmt: skip
    outputs = kernels.empty_plan(lengths, masks, tokens, slots)
    kernels.call(
        backend, "block_mask", seed, sample_ids, lengths.contiguous(), masks, grid_width, keep, share, length, inverse,
        *outputs,
    )  # fmt: skip
    return outputs


def _fake(seed, sample_ids, lengths, masks, tokens, grid_width, keep, share, length, inverse, slots, backend):
    return kernels.empty_plan(lengths, masks, tokens, slots)


_register.composite(_lib, "block_mask", _block_mask)
_register.kernels(_lib, "block_mask_kernels", _kernels, _fake)
