"""The loss of many masked students against one target as an op, with the moments that watch for collapse.

``pyeff::multimask_loss`` checks and chooses a backend; the kernels sit behind ``..._forward`` and ``..._backward``.
Where only the predictions want a gradient, the forward pass writes it as it reads them, for a derivative of 1 from
above; the backward pass then has nothing to do, or has to multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from pyeff import backends, reference
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import check_tensor, checked_number, refuse_tangents, transform_of
from pyeff.ops._multimask_checks import check_floating, check_option, check_plan
from pyeff.plans import MaskPlan
from pyeff.reference.multimask import KINDS, REDUCTIONS, wide

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "multimask_loss(Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor keep_len, *, str kind='l2', "
    "float beta=0.0, float? scale=None, str reduction='sum', bool statistics=False, str backend='') "
    "-> (Tensor loss, Tensor moments)"
)
_lib.define(
    "multimask_loss_forward(Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor? count, str kind, "
    "float beta, float scale, str reduction, bool statistics, bool keep, str backend) "
    "-> (Tensor loss, Tensor dpred, Tensor moments)"
)
_lib.define(
    "multimask_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor? count, "
    "str kind, float beta, float scale, bool[] needs, str backend) -> (Tensor dpred, Tensor dtarget)"
)
_lib.define("multimask_rescale_(Tensor(a!) t, Tensor factor, str backend) -> ()")


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
    """The students' loss over the tokens that are hidden from them, against targets that are there once.

    With d = pred - target, each hidden element counts d^2 (``"l2"``), \\|d\\| (``"l1"``), or d^2 / (2 beta) where
    \\|d\\| < beta and \\|d\\| - beta / 2 elsewhere (``"smooth_l1"``); each hidden token counts 1 - cos(pred, target)
    (``"cosine"``). Values at other tokens never matter.

    Args:
        pred (Tensor): [B*M, T, D], of any strides.
        target (Tensor): [B, T, D] of any floating dtype; taken as float32 (float64 for float64 predictions).
        plan (MaskPlan): what is hidden.
        kind (str): ``"l2"``, ``"smooth_l1"``, ``"l1"`` or ``"cosine"``.
        beta (float): of smooth L1; 0 makes it L1.
        scale (float, optional): a factor of the whole. Default: 1 / sqrt(D).
        reduction (str): ``"sum"``; ``"mean"`` over hidden elements (tokens for cosine), NaN where nothing is hidden;
            ``"none"`` for [B*M, T], summed over channels.
        statistics (bool): also return moments, for :func:`multimask_spread`.

    Returns:
        Tensor or (Tensor, Tensor): the loss, float32 (float64 for float64), a number or [B*M, T] with zero where
        nothing is hidden; and the moments [1 + 4D] float64: the count of hidden tokens, then for each channel the sums
        and the sums of squares of the targets and of the predictions. Moments of several processes add up.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown option, a ``beta`` that is
            negative or belongs to no kind, or a number that is none.
        RuntimeError: a backend was named that cannot serve the call; a double backward through the kernels; or, on a
            GPU, a gradient used after a second backward has scaled it in place without ``retain_graph``.

    No tensor of [B*M, T, D] is made but the gradient. It is written in the forward pass for a derivative of one: a
    factor of the loss is cheapest as ``scale``. Source: Baevski et al., 2022, arXiv 2212.07525, section 3.3.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.ops.block_mask(2, 8, (14, 14), keep=0.2, adjust=0.07, length=3)
        >>> pred, target = torch.randn(16, 196, 64, requires_grad=True), torch.randn(2, 196, 64)
        >>> loss, moments = pyeff.ops.multimask_loss(pred, target, plan, reduction="mean", statistics=True)
        >>> loss.backward()
        >>> int(moments[0]) == int(plan.count())
        True
    """
    op = "multimask_loss"
    check_plan(op, plan)
    check_floating(op, pred=pred, target=target)
    # Here, too: what is of another type than the schema's does not come to the op's own checks.
    check_option(op, "kind", kind, KINDS)
    check_option(op, "reduction", reduction, REDUCTIONS)
    beta = checked_number(op, "beta", beta)
    scale = None if scale is None else checked_number(op, "scale", scale)
    fits = pred.shape[:2] == plan.inverse.shape and target.shape[:1] == plan.lengths.shape
    if pred.dim() == target.dim() == 3 and not fits:
        raise ValueError(
            f"{op}: pred has shape {list(pred.shape)} and target {list(target.shape)}, expected [B*M, T, D], [B, T, D] "
            f"with the plan's B {plan.batch}, M {plan.masks}, T {plan.tokens}"
        )
    loss, moments = torch.ops.pyeff.multimask_loss(
        pred, target, plan.inverse, plan.lengths, plan.keep_len, kind=kind, beta=beta, scale=scale,
        reduction=reduction, statistics=bool(statistics), backend=backends.current(),
    )  # fmt: skip
    return (loss, moments) if statistics else loss


def multimask_spread(moments: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """How far targets and predictions are from having collapsed: ``mean_d sqrt(var_d + eps)`` over hidden tokens.

    Args:
        moments (Tensor): [1 + 4D] float64, of :func:`multimask_loss`; of several processes or steps, their sum.
        eps (float): added to the (unbiased) variances.

    Returns:
        (Tensor, Tensor): of targets and of predictions, float64 numbers on the device of ``moments``.

    Raises:
        ValueError: ``moments`` is no such tensor.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.MaskPlan.from_mask(torch.ones(4, 2, 100, dtype=torch.bool))
        >>> pred, target = torch.zeros(8, 100, 3), torch.randn(4, 100, 3)
        >>> _, moments = pyeff.ops.multimask_loss(pred, target, plan, statistics=True)
        >>> spread, collapsed = pyeff.ops.multimask_spread(moments)
        >>> bool(spread > 0.8), bool(collapsed < 0.01)
        (True, True)
    """
    if not isinstance(moments, Tensor) or moments.dtype != torch.float64 or moments.dim() != 1 or len(moments) % 4 != 1:
        what = (
            f"{moments.dtype} {list(moments.shape)}" if isinstance(moments, Tensor) else f"a {type(moments).__name__}"
        )
        raise ValueError(f"multimask_spread: moments is {what}, expected float64 [1 + 4 D]")
    return reference.multimask_spread(moments, eps=eps)


def _check(op, pred, target, inverse, lengths, keep_len, kind, beta, reduction, scale):
    check_floating(op, pred=pred, target=target)
    check_option(op, "kind", kind, KINDS)
    check_option(op, "reduction", reduction, REDUCTIONS)
    if not 0 <= beta < float("inf") or (beta and kind != "smooth_l1"):
        raise ValueError(f"{op}: beta is {beta} for kind {kind!r}, expected 0, or a positive number for 'smooth_l1'")
    if scale is not None and not abs(scale) < float("inf"):
        raise ValueError(f"{op}: scale is {scale}, expected a finite number")
    if pred.dim() != 3 or target.dim() != 3 or target.shape[0] < 1 or pred.shape[0] % target.shape[0]:
        raise ValueError(
            f"{op}: pred has shape {list(pred.shape)} and target {list(target.shape)}, expected [B*M, T, D], [B, T, D]"
        )
    (rows, tokens, width), batch = pred.shape, target.shape[0]
    check_tensor(op, "pred", pred, (rows, tokens, width), pred)
    check_tensor(op, "target", target, (batch, tokens, width), pred, target.dtype)
    check_tensor(op, "inverse", inverse, (rows, tokens), pred, torch.int32, "the index of a plan is")
    check_tensor(op, "lengths", lengths, (batch,), pred, torch.int32, "the index of a plan is")
    check_tensor(op, "keep_len", keep_len, (rows,), pred, torch.int32, "the index of a plan is")


def _loss(
    pred, target, inverse, lengths, keep_len, *, kind="l2", beta=0.0, scale=None, reduction="sum", statistics=False,
    backend="",
):  # fmt: skip
    op = "multimask_loss"
    _check(op, pred, target, inverse, lengths, keep_len, kind, beta, reduction, scale)
    width = pred.shape[-1]
    scale = max(width, 1) ** -0.5 if scale is None else scale
    chosen = kernels.choose(op, pred, width, backend, transform_of([pred, target]))
    if chosen == "reference":
        loss = reference.multimask.loss(pred, target, inverse, lengths, kind, beta, scale, reduction)
        if not statistics:
            return loss, pred.new_empty(0, dtype=torch.float64)
        return loss, reference.multimask.moments(pred.detach(), target.detach(), inverse, lengths)
    target = target.to(wide(pred.dtype))
    count = None
    if reduction == "mean":
        count = (inverse.shape[0] // lengths.shape[0]) * lengths.sum() - keep_len.sum()
        scale = scale if kind == "cosine" else scale / max(width, 1)
    graph = torch.is_grad_enabled() and pred.requires_grad and not target.requires_grad
    # A derivative of one would underflow in float16 before a scaler's factor lifts it. A graph that is compiled once
    # cannot look at what comes from above.
    keep = graph and reduction != "none" and pred.dtype != torch.float16 and not torch.compiler.is_compiling()
    loss, _, moments = torch.ops.pyeff.multimask_loss_forward(
        pred, target, inverse, lengths, count, kind, beta, scale, reduction, statistics, keep, chosen
    )
    return loss, moments


def _forward(pred, target, inverse, lengths, count, kind, beta, scale, reduction, statistics, keep, backend):
    refuse_tangents("multimask_loss", backend, [pred, target])
    outputs = kernels.empty_loss(pred, reduction, statistics, keep)
    if pred.numel() == 0:
        nothing = tuple(t.zero_() for t in outputs)
        return nothing if count is None else (nothing[0] / 0, *nothing[1:])
    kernels.call(
        backend, "loss", kernels.rows(pred), kernels.rows(target), inverse.contiguous(), lengths.contiguous(), count,
        KINDS.index(kind), beta, scale, *outputs,
    )  # fmt: skip
    return outputs


def _forward_fake(pred, target, inverse, lengths, count, kind, beta, scale, reduction, statistics, keep, backend):
    return kernels.empty_loss(pred, reduction, statistics, keep)


def _setup(ctx, inputs, output) -> None:
    pred, target, inverse, lengths, count, kind, beta, scale, _, _, keep, backend = inputs
    _, dpred, moments = output
    ctx.save_for_backward(pred, target, inverse, lengths, count, dpred if keep else None)
    ctx.mark_non_differentiable(dpred, moments)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.backend = (kind, beta, scale), backend


def _derivative(ctx, grad, *unused):
    nothing = (None,) * 12
    if grad is None:
        return nothing
    pred, target, inverse, lengths, count, dpred = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    # Traced, there is no number to look at; and what is given away here may be changed, which nobody may ask for again.
    plain = type(grad) is Tensor and not torch.is_grad_enabled()
    # One of several at once (is_grads_batched) is as little a number.
    plain = plain and not is_legacy_batchedtensor(grad)
    if dpred is not None and plain and not torch._C._autograd._get_current_graph_task_keep_graph():
        if grad.device.type != "cpu":
            # The factor is read on the device; where it is one, nothing is written.
            torch.ops.pyeff.multimask_rescale_(dpred, grad, ctx.backend)
            return (dpred, *nothing[1:])
        if grad.item() == 1:
            return (dpred, *nothing[1:])
    dpred, dtarget = torch.ops.pyeff.multimask_loss_backward(
        grad, pred, target, inverse, lengths, count, *ctx.options, needs, ctx.backend
    )
    return (dpred if needs[0] else None, dtarget if needs[1] else None, *nothing[2:])


def _backward(grad, pred, target, inverse, lengths, count, kind, beta, scale, needs, backend):
    refuse_tangents("multimask_loss", backend, [grad, pred, target])
    outputs = kernels.empty_loss_backward(pred, target, needs)
    if pred.numel() > 0:
        kernels.call(
            backend, "loss_backward", grad.contiguous(), kernels.rows(pred), kernels.rows(target), inverse.contiguous(),
            lengths.contiguous(), count, KINDS.index(kind), beta, scale, *outputs,
        )  # fmt: skip
    return outputs


def _backward_fake(grad, pred, target, inverse, lengths, count, kind, beta, scale, needs, backend):
    return kernels.empty_loss_backward(pred, target, needs)


def _rescale(t, factor, backend):
    if t.numel() > 0:
        kernels.call(backend, "rescale", t, factor)
        torch.autograd.graph.increment_version(t)


_register.composite(_lib, "multimask_loss", _loss)
_register.kernels(_lib, "multimask_loss_forward", _forward, _forward_fake, _derivative, _setup)
_register.kernels(_lib, "multimask_loss_backward", _backward, _backward_fake)
_register.no_double_backward(_lib, "multimask_loss_backward", "multimask_loss")
_register.kernels(_lib, "multimask_rescale_", _rescale, lambda *arguments: None)
