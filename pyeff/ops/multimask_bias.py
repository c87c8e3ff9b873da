"""The bias of attention by relative positions, for students that see parts of a sequence, as an op."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import check_tensor, refuse_tangents, transform_of
from pyeff.ops._multimask_checks import DTYPES, check_floating, check_plan
from pyeff.plans import MaskPlan
from pyeff.reference.multimask import wide

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "multimask_relative_bias(Tensor ids_keep, Tensor keep_len, Tensor slopes, *, int prefix=0, ScalarType? dtype=None, "
    "str backend='') -> Tensor"
)
_lib.define(
    "multimask_relative_bias_forward(Tensor ids_keep, Tensor keep_len, Tensor slopes, int prefix, ScalarType dtype, "
    "str backend) -> Tensor"
)
_lib.define(
    "multimask_relative_bias_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor slopes, int prefix, "
    "str backend) -> Tensor"
)


def multimask_relative_bias(
    plan: MaskPlan, slopes: Tensor, scale: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``-slope_h scale_h |i - j|`` between kept tokens i and j, at their places in the whole sequence.

    The same as gathering rows and columns of a bias [T, T] for each student, which is never made.

    Args:
        plan (MaskPlan): the students; tokens of its prefix have no distance to any.
        slopes (Tensor): [H], one for each head. Differentiable.
        scale (Tensor, optional): [H] or one number, a learned factor. Differentiable. Default: 1.
        dtype (torch.dtype, optional): of the result. Default: that of ``slopes``.

    Returns:
        Tensor: [B*M, H, K, K], to be added to the scores or given to scaled_dot_product_attention as ``attn_mask``;
        -inf for slots past what a row keeps, as keys. (A row that keeps nothing has zeros.)

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    Source: Press et al., "Train Short, Test Long" (ALiBi), 2022, arXiv 2108.12409, with the learned scale of Baevski et
    al., 2022, arXiv 2212.07525, section 3.2.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.ops.block_mask(1, 8, (100,), keep=0.5, adjust=0.05, length=5)
        >>> scale = torch.ones(12, requires_grad=True)
        >>> slopes = 2.0 ** -torch.arange(1, 13)
        >>> bias = pyeff.ops.multimask_relative_bias(plan, slopes, scale)
        >>> bias.shape
        torch.Size([8, 12, 50, 50])
    """
    op = "multimask_relative_bias"
    check_plan(op, plan)
    check_floating(op, slopes=slopes)
    if scale is not None:
        check_floating(op, scale=scale)
        if slopes.dim() != 1 or tuple(scale.shape) not in ((), (1,), tuple(slopes.shape)):
            raise ValueError(
                f"{op}: scale has shape {list(scale.shape)} and slopes {list(slopes.shape)}, expected [H] of both"
            )
        check_tensor(op, "scale", scale, tuple(scale.shape), slopes, scale.dtype, "slopes")
        slopes = slopes * scale
    return torch.ops.pyeff.multimask_relative_bias(
        plan.ids_keep, plan.keep_len, slopes, prefix=plan.prefix, dtype=dtype, backend=backends.current()
    )


def _bias(ids_keep, keep_len, slopes, *, prefix=0, dtype=None, backend=""):
    op = "multimask_relative_bias"
    check_floating(op, slopes=slopes)
    if slopes.dim() != 1 or slopes.shape[0] < 1:
        raise ValueError(f"{op}: slopes has shape {list(slopes.shape)}, expected [H]")
    dtype = slopes.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check_tensor(op, "slopes", slopes, tuple(slopes.shape), slopes)
    if ids_keep.dim() != 2:
        raise ValueError(f"{op}: ids_keep has shape {list(ids_keep.shape)}, expected [R, K]")
    check_tensor(op, "ids_keep", ids_keep, tuple(ids_keep.shape), slopes, torch.int32, "the index of a plan is")
    check_tensor(op, "keep_len", keep_len, (ids_keep.shape[0],), slopes, torch.int32, "the index of a plan is")
    if prefix < 0:
        raise ValueError(f"{op}: prefix is {prefix}, expected at least 0")
    slopes = slopes.to(wide(slopes.dtype))
    like = slopes.new_empty(0, dtype=dtype)
    chosen = kernels.choose(op, like, ids_keep.shape[1], backend, transform_of([slopes]))
    # In float64 or not at all: the kernels have one number type for what is computed.
    if chosen != "reference" and (slopes.dtype == torch.float64) != (dtype == torch.float64):
        if (backend or backends.current()) != "auto":
            raise RuntimeError(
                f"{op}: backend {chosen!r} was asked for and cannot serve: slopes are {slopes.dtype} for a bias in "
                f"{dtype}, and the {chosen} kernels take float64 for both or for neither"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.multimask.relative_bias(ids_keep, keep_len, slopes, prefix, dtype)
    return torch.ops.pyeff.multimask_relative_bias_forward(ids_keep, keep_len, slopes, prefix, dtype, chosen)


def _forward(ids_keep, keep_len, slopes, prefix, dtype, backend):
    refuse_tangents("multimask_relative_bias", backend, [slopes])
    out = kernels.empty_bias(ids_keep, slopes, dtype)
    if out.numel() > 0:
        index = ids_keep.contiguous(), keep_len.contiguous()
        kernels.call(backend, "relative_bias", *index, slopes.contiguous(), prefix, out)
    return out


def _forward_fake(ids_keep, keep_len, slopes, prefix, dtype, backend):
    return kernels.empty_bias(ids_keep, slopes, dtype)


def _setup(ctx, inputs, output) -> None:
    ids_keep, keep_len, slopes, ctx.prefix, _, ctx.backend = inputs
    ctx.save_for_backward(ids_keep, keep_len, slopes)


def _derivative(ctx, grad):
    dslopes = torch.ops.pyeff.multimask_relative_bias_backward(grad, *ctx.saved_tensors, ctx.prefix, ctx.backend)
    return None, None, dslopes, None, None, None


def _backward(grad, ids_keep, keep_len, slopes, prefix, backend):
    refuse_tangents("multimask_relative_bias", backend, [grad])
    dslopes = slopes.new_empty(slopes.shape)
    if grad.numel() == 0:
        return dslopes.zero_()
    index = ids_keep.contiguous(), keep_len.contiguous()
    kernels.call(backend, "relative_bias_backward", grad.contiguous(), *index, prefix, dslopes)
    return dslopes


def _backward_fake(grad, ids_keep, keep_len, slopes, prefix, backend):
    return slopes.new_empty(slopes.shape)


_register.composite(_lib, "multimask_relative_bias", _bias)
_register.kernels(_lib, "multimask_relative_bias_forward", _forward, _forward_fake, _derivative, _setup)
_register.kernels(_lib, "multimask_relative_bias_backward", _backward, _backward_fake)
_register.no_double_backward(_lib, "multimask_relative_bias_backward", "multimask_relative_bias")
