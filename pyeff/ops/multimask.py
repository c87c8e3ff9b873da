"""Gather and scatter for many masks of one sample as ops: schema, checks, fake kernels and autograd.

``pyeff::multimask_gather`` and ``pyeff::multimask_scatter`` check and choose a backend. The ``reference`` is
differentiated by PyTorch; the kernels sit behind ``..._forward`` and ``..._backward``. Each is the other's derivative
but for sums: what several students were given is summed over them, in the order of the masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import check_tensor, checked_number, plain, refuse_tangents, transform_of, wants_gradient
from pyeff.ops._multimask_checks import (
    check_floating,
    check_plan,
    check_sample_ids,
    check_seed,
    checked_seed,
)
from pyeff.plans import MaskPlan

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define("multimask_gather(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor inverse, *, str backend='') -> Tensor")
_lib.define(
    "multimask_gather_forward(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor inverse, str backend) -> Tensor"
)
_lib.define("multimask_gather_backward(Tensor grad, Tensor inverse, SymInt batch, str backend) -> Tensor")
_lib.define(
    "multimask_scatter(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, Tensor seed, "
    "Tensor? fill=None, *, float noise_std=0.01, Tensor? sample_ids=None, str backend='') -> Tensor"
)
_lib.define(
    "multimask_scatter_forward(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, "
    "Tensor? fill, Tensor seed, Tensor? sample_ids, float noise_std, str backend) -> Tensor"
)
_lib.define(
    "multimask_scatter_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, "
    "SymInt fills, bool[] needs, str backend) -> (Tensor dx, Tensor dfill)"
)


def multimask_gather(x: Tensor, plan: MaskPlan) -> Tensor:
    """The tokens that each student keeps, from one copy of the sample.

    The same as repeating every sample M times and indexing, without the copies. The gradient of a token is the sum
    over the students that kept it, in the order of the masks.

    Args:
        x (Tensor): [B, T, D], of any strides.
        plan (MaskPlan): of B samples of T tokens.

    Returns:
        Tensor: [B*M, K, D], row b*M + m for mask m of sample b; zero in slots past what a row keeps.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    float64, float32, bfloat16 and float16. Source: Baevski et al., "Efficient Self-supervised Learning with
    Contextualized Target Representations for Vision, Speech and Language", 2022, arXiv 2212.07525, section 3.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.ops.block_mask(2, 8, (14, 14), keep=0.2, adjust=0.07, length=3)
        >>> x = torch.randn(2, 196, 64, requires_grad=True)
        >>> kept = pyeff.ops.multimask_gather(x, plan)
        >>> kept.shape
        torch.Size([16, 39, 64])
        >>> kept.sum().backward()
    """
    check_plan("multimask_gather", plan)
    check_floating("multimask_gather", x=x)
    # Rows that can be shared out among other samples would be, and nobody would see it.
    if x.dim() == 3 and x.shape[1] == plan.tokens and x.shape[0] != plan.batch:
        raise ValueError(
            f"multimask_gather: x has shape {list(x.shape)}, expected [{plan.batch}, {plan.tokens}, D]: the plan is of "
            f"{plan.batch} samples with {plan.masks} masks each"
        )
    index, backend = (plan.ids_keep, plan.keep_len, plan.inverse), backends.current()
    if plain((x, *index)):
        return _gather(x, *index, backend=backend, past=True)
    return torch.ops.pyeff.multimask_gather(x, *index, backend=backend)


def _check_index(op: str, like: Tensor, ids_keep: Tensor, keep_len: Tensor, inverse: Tensor) -> None:
    """The parts of a plan against each other."""
    if ids_keep.dim() != 2 or inverse.dim() != 2:
        raise ValueError(
            f"{op}: ids_keep has shape {list(ids_keep.shape)}, inverse {list(inverse.shape)}, expected [R, K], [R, T]"
        )
    count = ids_keep.shape[0]
    check_tensor(op, "ids_keep", ids_keep, tuple(ids_keep.shape), like, torch.int32, "the index of a plan is")
    check_tensor(op, "keep_len", keep_len, (count,), like, torch.int32, "the index of a plan is")
    check_tensor(op, "inverse", inverse, (count, inverse.shape[1]), like, torch.int32, "the index of a plan is")


def _gather(x, ids_keep, keep_len, inverse, *, backend="", past=False):
    """``past``: past the dispatcher, as far as autograd lets it."""
    op = "multimask_gather"
    check_floating(op, x=x)
    _check_index(op, x, ids_keep, keep_len, inverse)
    rows, tokens = inverse.shape
    if x.dim() != 3 or x.shape[1] != tokens or x.shape[0] < 1 or rows % x.shape[0]:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [B, {tokens}, D] with a B that divides {rows}")
    check_tensor(op, "x", x, tuple(x.shape), x)
    chosen = kernels.choose(op, x, x.shape[-1], backend, transform_of([x]))
    if chosen == "reference":
        return reference.multimask.gather(x, ids_keep, keep_len)
    forward = _gather_kernels if past and not wants_gradient((x,)) else torch.ops.pyeff.multimask_gather_forward
    return forward(x, ids_keep, keep_len, inverse, chosen)


def _gather_kernels(x, ids_keep, keep_len, inverse, backend):
    refuse_tangents("multimask_gather", backend, [x])
    out = kernels.empty_gather(x, ids_keep)
    if x.numel() == 0:
        return out.zero_()
    if out.numel() > 0:
        kernels.call(backend, "gather", kernels.rows(x), ids_keep.contiguous(), keep_len.contiguous(), out)
    return out


def _gather_fake(x, ids_keep, keep_len, inverse, backend):
    return kernels.empty_gather(x, ids_keep)


def _gather_setup(ctx, inputs, output) -> None:
    x, _, _, inverse, backend = inputs
    ctx.save_for_backward(inverse)
    ctx.batch, ctx.backend = x.shape[0], backend


def _gather_derivative(ctx, grad):
    (inverse,) = ctx.saved_tensors
    return torch.ops.pyeff.multimask_gather_backward(grad, inverse, ctx.batch, ctx.backend), None, None, None, None


def _gather_backward_kernels(grad, inverse, batch, backend):
    refuse_tangents("multimask_gather", backend, [grad])
    dx = grad.new_empty((batch, inverse.shape[1], grad.shape[-1]))
    if dx.numel() > 0:
        kernels.call(backend, "gather_backward", kernels.rows(grad), inverse.contiguous(), dx)
    return dx


def _gather_backward_fake(grad, inverse, batch, backend):
    return grad.new_empty((batch, inverse.shape[1], grad.shape[-1]))


_register.composite(_lib, "multimask_gather", _gather)
_register.kernels(_lib, "multimask_gather_forward", _gather_kernels, _gather_fake, _gather_derivative, _gather_setup)
_register.kernels(_lib, "multimask_gather_backward", _gather_backward_kernels, _gather_backward_fake)
_register.no_double_backward(_lib, "multimask_gather_backward", "multimask_gather")


def multimask_scatter(
    x: Tensor,
    plan: MaskPlan,
    *,
    fill: Tensor | None = None,
    noise_std: float = 0.01,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The decoder's input: what was encoded in its places, and noise (and what fills them) in the hidden ones.

    The noise is Philox4x32-7 keyed by (seed, sample, mask, position): it depends neither on the size of the batch nor
    on the place in it, if ``sample_ids`` say which sample it is.

    Args:
        x (Tensor): [B*M, K, D], the encoded tokens, of any strides; slots past what a row keeps are not read.
        plan (MaskPlan): the plan by which they were gathered.
        fill (Tensor, optional): [D], [T, D] or [B, T, D], what stands in hidden places under the noise: a mask token,
            positions, or both. Differentiable. Default: zero.
        noise_std (float): the standard deviation of the noise; 0 for none.
        seed (int or Tensor): an int64 tensor of one number on the device of ``x`` may change between replays of a
            graph.
        sample_ids (Tensor, optional): [B] int64, names of the samples. Default: 0 to B - 1.

    Returns:
        Tensor: [B*M, T, D]; zero at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a ``noise_std`` that is negative or no
            number.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    Noise and fill are added in at least float32 and rounded once. Source: Baevski et al., 2022, arXiv 2212.07525,
    section 3.2: "fill in the masked tokens with Gaussian noise"; Philox: Salmon et al., SC 2011.

    Example:
        >>> import torch, pyeff
        >>> plan = pyeff.ops.block_mask(2, 8, (100,), keep=0.5, adjust=0.05, length=5)
        >>> encoded = torch.randn(16, plan.width, 64, requires_grad=True)
        >>> pyeff.ops.multimask_scatter(encoded, plan, seed=1).shape
        torch.Size([16, 100, 64])
    """
    op = "multimask_scatter"
    check_plan(op, plan)
    check_floating(op, x=x)
    if fill is not None:
        check_floating(op, fill=fill)
        if fill.dim() < 3:
            if fill.dim() == 0 or tuple(fill.shape) != (plan.tokens, x.shape[-1])[-fill.dim() :]:
                raise ValueError(
                    f"{op}: fill has shape {list(fill.shape)}, expected [{x.shape[-1]}], "
                    f"[{plan.tokens}, {x.shape[-1]}] or [{plan.batch}, {plan.tokens}, {x.shape[-1]}]"
                )
            fill = fill.expand(1, plan.tokens, x.shape[-1])
    check_sample_ids(op, sample_ids, plan.batch, x)
    tensors = (
        x, plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths, checked_seed(op, seed, x.device), fill,
    )  # fmt: skip
    options: dict[str, Any] = {
        "noise_std": checked_number(op, "noise_std", noise_std), "sample_ids": sample_ids,
        "backend": backends.current(),
    }  # fmt: skip
    if plain((*tensors, sample_ids)):
        return _scatter(*tensors, **options, past=True)
    return torch.ops.pyeff.multimask_scatter(*tensors, **options)


def _scatter(
    x, ids_keep, keep_len, inverse, lengths, seed, fill=None, *, noise_std=0.01, sample_ids=None, backend="", past=False
):  # fmt: skip
    op = "multimask_scatter"
    check_floating(op, x=x)
    _check_index(op, x, ids_keep, keep_len, inverse)
    (rows, slots), tokens, batch = ids_keep.shape, inverse.shape[1], lengths.numel()
    check_tensor(op, "lengths", lengths, (batch,), x, torch.int32, "the index of a plan is")
    if batch < 1 or rows % batch:
        raise ValueError(f"{op}: lengths has {batch} samples, expected a number that divides the {rows} rows")
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [{rows}, {slots}, D]")
    check_tensor(op, "x", x, (rows, slots, x.shape[-1]), x)
    if fill is not None:
        first = 1 if fill.dim() == 3 and fill.shape[0] == 1 else batch
        check_tensor(op, "fill", fill, (first, tokens, x.shape[-1]), x, as_what="x")
    if not 0 <= noise_std < float("inf"):
        raise ValueError(f"{op}: noise_std is {noise_std}, expected a finite number of at least 0")
    if tokens * -(-x.shape[-1] // 4) >= 2**32:
        raise ValueError(f"{op}: x has shape {list(x.shape)} for {tokens} tokens, expected T * D below 2^34")
    check_seed(op, seed, x)
    check_sample_ids(op, sample_ids, batch, x)
    chosen = kernels.choose(op, x, x.shape[-1], backend, transform_of([x, fill]))
    if chosen == "reference":
        return reference.multimask.scatter(x, inverse, lengths, fill, seed, sample_ids, noise_std)
    forward = _scatter_kernels if past and not wants_gradient((x, fill)) else torch.ops.pyeff.multimask_scatter_forward
    return forward(x, ids_keep, keep_len, inverse, lengths, fill, seed, sample_ids, noise_std, chosen)


def _scatter_kernels(x, ids_keep, keep_len, inverse, lengths, fill, seed, sample_ids, noise_std, backend):
    refuse_tangents("multimask_scatter", backend, [x, fill])
    out = kernels.empty_scatter(x, inverse)
    if out.numel() > 0:
        kernels.call(
            backend, "scatter", kernels.rows(x), inverse.contiguous(), lengths.contiguous(),
            fill if fill is None else kernels.rows(fill), seed,
            sample_ids if sample_ids is None else sample_ids.contiguous(), noise_std, out,
        )  # fmt: skip
    return out


def _scatter_fake(x, ids_keep, keep_len, inverse, lengths, fill, seed, sample_ids, noise_std, backend):
    return kernels.empty_scatter(x, inverse)


def _scatter_setup(ctx, inputs, output) -> None:
    _, ids_keep, keep_len, inverse, lengths, fill, _, _, _, backend = inputs
    ctx.save_for_backward(ids_keep, keep_len, inverse, lengths)
    ctx.fills, ctx.backend = 0 if fill is None else fill.shape[0], backend


def _scatter_derivative(ctx, grad):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[5]]
    dx, dfill = torch.ops.pyeff.multimask_scatter_backward(grad, *ctx.saved_tensors, ctx.fills, needs, ctx.backend)
    return (dx if needs[0] else None, *(None,) * 4, dfill if needs[1] else None, *(None,) * 4)


def _scatter_backward_kernels(grad, ids_keep, keep_len, inverse, lengths, fills, needs, backend):
    refuse_tangents("multimask_scatter", backend, [grad])
    outputs = kernels.empty_scatter_backward(grad, ids_keep, fills, needs)
    if grad.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    index = (t.contiguous() for t in (ids_keep, keep_len, inverse, lengths))
    kernels.call(backend, "scatter_backward", kernels.rows(grad), *index, *outputs)
    return outputs


def _scatter_backward_fake(grad, ids_keep, keep_len, inverse, lengths, fills, needs, backend):
    return kernels.empty_scatter_backward(grad, ids_keep, fills, needs)


_register.composite(_lib, "multimask_scatter", _scatter)
_register.kernels(
    _lib, "multimask_scatter_forward", _scatter_kernels, _scatter_fake, _scatter_derivative, _scatter_setup
)
_register.kernels(_lib, "multimask_scatter_backward", _scatter_backward_kernels, _scatter_backward_fake)
_register.no_double_backward(_lib, "multimask_scatter_backward", "multimask_scatter")
