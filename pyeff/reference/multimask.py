"""One teacher for many masked students, by its definition: gather, scatter, targets, loss, and a bias of distances."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff.plans import MaskPlan
from pyeff.plans.mask import checked_lengths
from pyeff.reference import _philox

NORMS = ("none", "instance", "layer", "batch")
KINDS = ("l2", "smooth_l1", "l1", "cosine")
REDUCTIONS = ("sum", "mean", "none")
# Below this length a vector has no direction; that of torch.nn.functional.cosine_similarity.
COSINE_EPS = 1e-8


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def as_seed(op: str, seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as an int64 number on a device; those that are there already may change between replays of a graph."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), integer_seed(op, seed), dtype=torch.int64, device=device)


def integer_seed(op: str, seed: object) -> int:
    """A seed that is no tensor as an int: whatever counts as an index, such as NumPy's integers; a bool does not.

    Raises:
        ValueError: it is no integer, or one of more than 64 bits.
    """
    try:
        if isinstance(seed, bool):
            raise TypeError
        # To be asked for its index would fix the number of a compiled graph, which is then made anew for every seed.
        number = seed if isinstance(seed, (int, torch.SymInt)) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{op}: seed is a {type(seed).__name__}, expected an integer or an int64 tensor") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: seed is {number}, expected an integer of 64 bits")
    return number  # type: ignore[return-value]


def multimask_gather(x: Tensor, plan: MaskPlan) -> Tensor:
    """The kept tokens of each row; see :func:`pyeff.ops.multimask_gather` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.tensor([[[True, False], [False, True]]]))
        >>> pyeff.reference.multimask_gather(torch.tensor([[[1.0], [2.0]]]), plan).flatten().tolist()
        [2.0, 1.0]
    """
    return gather(x, plan.ids_keep, plan.keep_len)


def gather(x: Tensor, ids_keep: Tensor, keep_len: Tensor) -> Tensor:
    rows, width = ids_keep.shape
    sample = torch.arange(rows, device=x.device) // (rows // x.shape[0])
    slots = torch.arange(width, device=x.device) < keep_len[:, None]
    if x.shape[1] == 0:  # nothing is kept, but slots point somewhere
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
    return torch.where(slots[..., None], x[sample[:, None], ids_keep.long()], 0)


def multimask_scatter(
    x: Tensor,
    plan: MaskPlan,
    *,
    fill: Tensor | None = None,
    noise_std: float = 0.01,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Encoded tokens in their places, noise in the hidden ones; see :func:`pyeff.ops.multimask_scatter`.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.tensor([[[True, False], [False, True]]]))
        >>> pyeff.reference.multimask_scatter(torch.ones(2, 1, 1), plan, noise_std=0.0).flatten().tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    if fill is not None:
        fill = fill.expand(plan.tokens, x.shape[-1]) if fill.dim() == 1 else fill
        fill = fill[None] if fill.dim() == 2 else fill
    return scatter(
        x, plan.inverse, plan.lengths, fill, as_seed("multimask_scatter", seed, x.device), sample_ids, noise_std
    )


def scatter(
    x: Tensor,
    inverse: Tensor,
    lengths: Tensor,
    fill: Tensor | None,
    seed: Tensor,
    sample_ids: Tensor | None,
    std: float,
) -> Tensor:
    (rows, tokens), batch, width = inverse.shape, lengths.shape[0], x.shape[-1]
    valid = (torch.arange(tokens, device=x.device) < lengths[:, None])[:, None, :, None]
    between = torch.zeros((), dtype=wide(x.dtype), device=x.device)
    if fill is not None:
        between = fill.to(between.dtype)[:, None]
    if std:
        ids = torch.arange(batch, device=x.device) if sample_ids is None else sample_ids
        between = between + std * _philox.normals(seed, ids, rows // batch, tokens, width).to(between.dtype)
    between = torch.where(valid, between, 0).to(x.dtype).expand(batch, rows // batch, tokens, width)
    if x.shape[1] == 0:  # nothing is kept, and there is no slot to look at
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
    own = x[torch.arange(rows, device=x.device)[:, None], inverse.long().clamp(min=0)]
    return torch.where(inverse[..., None] >= 0, own, between.reshape(rows, tokens, width))


def multimask_targets(
    layers: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    norm: str = "instance",
    post_norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """The mean of normalised layers; see :func:`pyeff.ops.multimask_targets` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> pyeff.reference.multimask_targets([torch.randn(2, 5, 8), torch.randn(2, 5, 8)], norm="layer").shape
        torch.Size([2, 5, 8])
    """
    first = layers[0]
    lengths = checked_lengths("multimask_targets", lengths, first.shape[0], first.shape[1], first.device)
    return targets(layers, lengths, norm, post_norm, eps)


def targets(layers: Sequence[Tensor], lengths: Tensor, norm: str, post_norm: str, eps: float) -> Tensor:
    total = normalised(layers[0], lengths, norm, eps)
    for layer in layers[1:]:
        total = total + normalised(layer, lengths, norm, eps)
    return normalised(total / len(layers), lengths, post_norm, eps)


def multimask_accumulate_(
    total: Tensor,
    layer: Tensor,
    *,
    weight: float,
    lengths: Tensor | None = None,
    norm: str = "instance",
    eps: float = 1e-5,
) -> None:
    """Adds one normalised layer to a sum; see :func:`pyeff.ops.multimask_accumulate_` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> total = torch.zeros(2, 5, 8)
        >>> pyeff.reference.multimask_accumulate_(total, torch.randn(2, 5, 8), weight=1.0)
    """
    lengths = checked_lengths("multimask_accumulate_", lengths, layer.shape[0], layer.shape[1], layer.device)
    with torch.no_grad():
        total.add_(normalised(layer, lengths, norm, eps), alpha=weight)


def normalised(y: Tensor, lengths: Tensor, norm: str, eps: float) -> Tensor:
    """[B, T, D] less its mean, over its deviation, over the tokens of a sample, of all samples, or over channels.

    Biased variance, no affine map, in at least float32; zero at padding, whatever is there.
    """
    valid = (torch.arange(y.shape[1], device=y.device) < lengths[:, None])[..., None]
    y = torch.where(valid, y.to(wide(y.dtype)), 0)
    if norm == "none":
        return y
    if norm == "layer":
        centred = y - y.mean(-1, keepdim=True)
        return torch.where(valid, centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), 0)
    over = 1 if norm == "instance" else (0, 1)
    count = valid.sum(over, keepdim=True).clamp(min=1)
    # The mean first and squares of what is left: a large mean would drown them otherwise.
    centred = torch.where(valid, y - y.sum(over, keepdim=True) / count, 0)
    return torch.where(valid, centred * torch.rsqrt(centred.square().sum(over, keepdim=True) / count + eps), 0)


def multimask_loss(
    pred: Tensor,
    target: Tensor,
    plan: MaskPlan,
    *,
    kind: str = "l2",
    beta: float = 0.0,
    scale: float | None = None,
    reduction: str = "sum",
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The students' loss where tokens are hidden from them; see :func:`pyeff.ops.multimask_loss` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.tensor([[[True, False], [False, True]]]))
        >>> pred, target = torch.ones(2, 2, 4), torch.zeros(1, 2, 4)
        >>> pyeff.reference.multimask_loss(pred, target, plan, scale=1.0).item()
        8.0
    """
    scale = max(pred.shape[-1], 1) ** -0.5 if scale is None else scale
    out = loss(pred, target, plan.inverse, plan.lengths, kind, beta, scale, reduction)
    if not statistics:
        return out
    with torch.no_grad():
        return out, moments(pred, target, plan.inverse, plan.lengths)


def _hidden(inverse: Tensor, lengths: Tensor) -> Tensor:
    """[B, M, T, 1] bool."""
    tokens, batch = inverse.shape[1], lengths.shape[0]
    at = torch.arange(tokens, device=inverse.device)
    return ((inverse.view(batch, inverse.shape[0] // batch, tokens) < 0) & (at < lengths[:, None, None]))[..., None]


def loss(
    pred: Tensor, target: Tensor, inverse: Tensor, lengths: Tensor, kind: str, beta: float, scale: float, reduction: str
) -> Tensor:
    hidden, dtype = _hidden(inverse, lengths), wide(pred.dtype)
    batch, masks, tokens, _ = hidden.shape
    x = torch.where(hidden, pred.view(batch, masks, tokens, pred.shape[-1]).to(dtype), 0)
    y = torch.where(hidden, target[:, None].to(dtype), 0)
    if kind == "cosine":
        dot, xx, yy = ((a * b).sum(-1) for a, b in ((x, y), (x, x), (y, y)))
        each = 1 - dot / (xx.clamp(min=COSINE_EPS**2).sqrt() * yy.clamp(min=COSINE_EPS**2).sqrt())
        each, elements = torch.where(hidden[..., 0], each, 0), 1
    else:
        each, elements = _distance(x - y, kind, beta).sum(-1), pred.shape[-1]
    if reduction == "none":
        return each.view(batch * masks, tokens) * scale
    total = each.sum() * scale
    return total / (hidden.sum() * elements) if reduction == "mean" else total


def _distance(d: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "l2":
        return d.square()
    if kind == "l1" or beta == 0:
        return d.abs()
    return torch.where(d.abs() < beta, 0.5 * d.square() / beta, d.abs() - 0.5 * beta)


def moments(pred: Tensor, target: Tensor, inverse: Tensor, lengths: Tensor) -> Tensor:
    """[1 + 4 D] float64: the count of hidden tokens; sums and sums of squares of the targets, then of predictions."""
    hidden = _hidden(inverse, lengths)
    batch, masks, tokens, _ = hidden.shape
    y = torch.where(hidden, target[:, None].double(), 0)
    x = torch.where(hidden, pred.view(batch, masks, tokens, pred.shape[-1]).double(), 0)
    sums = [t.sum((0, 1, 2)) for t in (y, y.square(), x, x.square())]
    return torch.cat([hidden.sum().double()[None], *sums])


def multimask_spread(moments: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """How far targets and predictions are from having collapsed; see :func:`pyeff.ops.multimask_spread`.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.ones(4, 2, 10, dtype=torch.bool))
        >>> pred, target = torch.zeros(8, 10, 3), torch.randn(4, 10, 3)
        >>> loss, moments = pyeff.reference.multimask_loss(pred, target, plan, statistics=True)
        >>> bool(pyeff.reference.multimask_spread(moments)[1] < 0.01)
        True
    """
    count, width = moments[0], (moments.shape[0] - 1) // 4
    sums = moments[1:].view(2, 2, width)
    variance = (sums[:, 1] - sums[:, 0].square() / count).clamp(min=0) / (count - 1)
    spread = (variance + eps).sqrt().mean(-1)
    return spread[0], spread[1]


def multimask_relative_bias(
    plan: MaskPlan, slopes: Tensor, scale: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """A bias of attention by distances in the whole sequence; see :func:`pyeff.ops.multimask_relative_bias`.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.tensor([[[False, True, False]]]))
        >>> pyeff.reference.multimask_relative_bias(plan, torch.tensor([0.5])).flatten().tolist()
        [-0.0, -1.0, -1.0, -0.0]
    """
    slopes = slopes if scale is None else slopes * scale
    return relative_bias(plan.ids_keep, plan.keep_len, slopes, plan.prefix, dtype or slopes.dtype)


def relative_bias(ids_keep: Tensor, keep_len: Tensor, slopes: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    at, count = torch.arange(ids_keep.shape[1], device=ids_keep.device), keep_len[:, None]
    ids = ids_keep.to(wide(slopes.dtype))
    counts = (at >= prefix) & (at < count)
    distance = torch.where(counts[:, :, None] & counts[:, None, :], (ids[:, :, None] - ids[:, None, :]).abs(), 0)
    bias = -slopes.to(ids.dtype)[:, None, None] * distance[:, None]
    # A row that keeps nothing attends to nothing that counts; were all of it forbidden, it would be NaN.
    forbidden = (at >= count) & (count > 0)
    return torch.where(forbidden[:, None, None], float("-inf"), bias).to(dtype)
