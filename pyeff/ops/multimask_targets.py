"""Teacher targets as ops: the mean of normalised layers at once, or layer by layer.

``pyeff::multimask_targets`` checks and chooses a backend; the kernels sit behind ``..._forward`` and ``..._backward``.
``pyeff::multimask_accumulate_`` adds one layer to a sum in place, so that no layer has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import check_tensor, checked_number, plain, refuse_tangents, transform_of, wants_gradient
from pyeff.ops._multimask_checks import check_eps, check_floating, check_option
from pyeff.plans.mask import checked_lengths
from pyeff.reference.multimask import NORMS, wide

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "multimask_targets(Tensor[] layers, Tensor lengths, *, str norm='instance', str post_norm='none', "
    "float eps=1e-5, str backend='') -> Tensor"
)
_lib.define(
    "multimask_targets_forward(Tensor[] layers, Tensor lengths, str norm, str post_norm, float eps, str backend) "
    "-> Tensor"
)
_lib.define(
    "multimask_targets_backward(Tensor grad, Tensor[] layers, Tensor lengths, str norm, str post_norm, float eps, "
    "str backend) -> Tensor[]"
)
_lib.define(
    "multimask_accumulate_(Tensor(a!) total, Tensor layer, Tensor lengths, *, float weight, str norm='instance', "
    "float eps=1e-5, str backend='') -> ()"
)
_lib.define(
    "multimask_accumulate_kernels(Tensor(a!) total, Tensor layer, Tensor lengths, float weight, str norm, float eps, "
    "str backend) -> ()"
)


def multimask_targets(
    layers: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    norm: str = "instance",
    post_norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """What the students predict: the mean over the teacher's top layers, each of them normalised.

    Each layer is read once or, where a sample does not fit on the chip, twice; no normalised layer is ever written.

    Args:
        layers (sequence of Tensor): K tensors [B, T, D] of one dtype, each of any strides.
        lengths (Tensor, optional): [B] integers, the tokens that are no padding. Default: all.
        norm (str): of each layer: ``"instance"`` (over the tokens of a sample, for each channel), ``"layer"`` (over
            channels, for each token), ``"batch"`` (over all tokens of all samples, for each channel) or ``"none"``.
        post_norm (str): the same, of the mean.
        eps (float): added to the variances, which are biased; there is no affine map.

    Returns:
        Tensor: [B, T, D], float32 (float64 for float64); zero at padding, where the layers may hold anything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an unknown norm.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    Variances are taken about the mean, so that a large mean costs no digits. Source: Baevski et al., 2022, arXiv
    2212.07525, section 3.1; "instance, then average" as in data2vec, arXiv 2202.03555.

    Example:
        >>> import torch, pyeff
        >>> layers = [torch.randn(2, 196, 64) for _ in range(4)]
        >>> pyeff.ops.multimask_targets(layers, post_norm="layer").shape
        torch.Size([2, 196, 64])
    """
    op = "multimask_targets"
    layers = list(layers)
    _check_layers(op, layers)
    check_option(op, "norm", norm, NORMS)
    check_option(op, "post_norm", post_norm, NORMS)
    eps = checked_number(op, "eps", eps)
    lengths = checked_lengths(op, lengths, layers[0].shape[0], layers[0].shape[1], layers[0].device)
    options: dict[str, Any] = {"norm": norm, "post_norm": post_norm, "eps": eps, "backend": backends.current()}
    if plain((*layers, lengths)):
        return _targets(layers, lengths, **options, past=True)
    return torch.ops.pyeff.multimask_targets(layers, lengths, **options)


def _check_layers(op: str, layers: Sequence[Tensor]) -> None:
    if not layers:
        raise ValueError(f"{op}: layers is empty, expected at least one tensor [B, T, D]")
    for i, layer in enumerate(layers):
        check_floating(op, **{f"layers[{i}]": layer})
        if layers[0].dim() != 3:
            raise ValueError(f"{op}: layers[0] has shape {list(layer.shape)}, expected [B, T, D]")
        check_tensor(op, f"layers[{i}]", layer, tuple(layers[0].shape), layers[0], as_what="layers[0]")


def _check(op: str, layers: Sequence[Tensor], lengths: Tensor, norm: str, post_norm: str, eps: float) -> None:
    _check_layers(op, layers)
    check_option(op, "norm", norm, NORMS)
    check_option(op, "post_norm", post_norm, NORMS)
    check_eps(op, eps)
    check_tensor(op, "lengths", lengths, (layers[0].shape[0],), layers[0], torch.int32, "lengths are")


def _targets(layers, lengths, *, norm="instance", post_norm="none", eps=1e-5, backend="", past=False):
    op = "multimask_targets"
    _check(op, layers, lengths, norm, post_norm, eps)
    chosen = kernels.choose(op, layers[0], layers[0].shape[-1], backend, transform_of(list(layers)))
    if chosen == "reference":
        return reference.multimask.targets(layers, lengths, norm, post_norm, eps)
    forward = _forward if past and not wants_gradient(layers) else torch.ops.pyeff.multimask_targets_forward
    return forward(layers, lengths, norm, post_norm, eps, chosen)


def _forward(layers, lengths, norm, post_norm, eps, backend):
    refuse_tangents("multimask_targets", backend, list(layers))
    out = kernels.empty_targets(layers)
    if out.numel() > 0:
        rows = [kernels.rows(t) for t in layers]
        norms = NORMS.index(norm), NORMS.index(post_norm)
        kernels.call(backend, "targets", rows, lengths.contiguous(), *norms, eps, 1 / len(layers), False, out)
    return out


def _forward_fake(layers, lengths, norm, post_norm, eps, backend):
    return kernels.empty_targets(layers)


def _setup(ctx, inputs, output) -> None:
    layers, lengths, *ctx.options = inputs
    ctx.save_for_backward(lengths, *layers)


def _derivative(ctx, grad):
    lengths, *layers = ctx.saved_tensors
    grads = torch.ops.pyeff.multimask_targets_backward(grad, layers, lengths, *ctx.options)
    return list(grads), None, None, None, None, None


def _backward(grad, layers, lengths, norm, post_norm, eps, backend):
    refuse_tangents("multimask_targets", backend, [grad, *layers])
    outputs = _backward_fake(grad, layers, lengths, norm, post_norm, eps, backend)
    if grad.numel() > 0:
        rows = [kernels.rows(t) for t in layers]
        norms = NORMS.index(norm), NORMS.index(post_norm)
        kernels.call(backend, "targets_backward", kernels.rows(grad), rows, lengths.contiguous(), *norms, eps, outputs)
    return outputs


def _backward_fake(grad, layers, lengths, norm, post_norm, eps, backend):
    return [t.new_empty(t.shape) for t in layers]


_register.composite(_lib, "multimask_targets", _targets)
_register.kernels(_lib, "multimask_targets_forward", _forward, _forward_fake, _derivative, _setup)
_register.kernels(_lib, "multimask_targets_backward", _backward, _backward_fake)
_register.no_double_backward(_lib, "multimask_targets_backward", "multimask_targets")


def multimask_accumulate_(
    total: Tensor,
    layer: Tensor,
    *,
    weight: float,
    lengths: Tensor | None = None,
    norm: str = "instance",
    eps: float = 1e-5,
) -> None:
    """``total += weight * norm(layer)`` in place: targets while the teacher runs, without keeping its layers.

    With ``weight = 1 / K`` for each of K layers, ``multimask_targets([total], norm=post_norm)`` is what
    ``multimask_targets(layers, norm=norm, post_norm=post_norm)`` is, up to the order of sums. Not differentiated.

    Args:
        total (Tensor): [B, T, D] float32 (float64 for float64 layers), contiguous; changed.
        layer (Tensor): [B, T, D], of any strides.
        weight (float): what the normalised layer counts.
        lengths (Tensor, optional): as for :func:`multimask_targets`; padding of ``total`` stays as it is.
        norm (str), eps (float): as for :func:`multimask_targets`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown norm, or a ``total`` that overlaps
            ``layer`` or wants a gradient.
        RuntimeError: a backend was named that cannot serve the call.

    Example:
        >>> import torch, pyeff
        >>> total = torch.zeros(2, 196, 64)
        >>> for layer in (torch.randn(2, 196, 64) for _ in range(4)):
        ...     pyeff.ops.multimask_accumulate_(total, layer, weight=1 / 4)
        >>> targets = pyeff.ops.multimask_targets([total], norm="layer")
    """
    op = "multimask_accumulate_"
    check_floating(op, total=total, layer=layer)
    if layer.dim() != 3:
        raise ValueError(f"{op}: layer has shape {list(layer.shape)}, expected [B, T, D]")
    check_option(op, "norm", norm, NORMS)
    weight, eps = checked_number(op, "weight", weight), checked_number(op, "eps", eps)
    lengths = checked_lengths(op, lengths, layer.shape[0], layer.shape[1], layer.device)
    torch.ops.pyeff.multimask_accumulate_(
        total, layer, lengths, weight=weight, norm=norm, eps=eps, backend=backends.current()
    )


def _accumulate(total, layer, lengths, *, weight, norm="instance", eps=1e-5, backend=""):
    op = "multimask_accumulate_"
    _check(op, [layer], lengths, norm, "none", eps)
    check_tensor(op, "total", total, tuple(layer.shape), layer, wide(layer.dtype), "a sum of such layers is")
    if not total.is_contiguous() or total.requires_grad:
        raise ValueError(f"{op}: total is not contiguous or requires a gradient, expected a contiguous buffer")
    if _overlap(total, layer):
        raise ValueError(f"{op}: total shares memory with layer, expected tensors that do not overlap")
    if not abs(weight) < float("inf"):
        raise ValueError(f"{op}: weight is {weight}, expected a finite number")
    with torch.no_grad():
        layer = layer.detach()
        chosen = kernels.choose(op, layer, layer.shape[-1], backend, transform_of([layer, total]))
        if chosen == "reference":
            total.add_(reference.multimask.normalised(layer, lengths, norm, eps), alpha=weight)
        else:
            torch.ops.pyeff.multimask_accumulate_kernels(total, layer, lengths, weight, norm, eps, chosen)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share elements; not known of a tracer's."""
    if torch.compiler.is_compiling() or type(a) is not Tensor or a.numel() == 0 or b.numel() == 0:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    ends = [t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    # In bytes: the same storage may be seen in two dtypes.
    (a0, a1), (b0, b1) = (
        (t.storage_offset() * t.element_size(), (end + 1) * t.element_size())
        for t, end in zip((a, b), ends, strict=True)
    )
    return a0 < b1 and b0 < a1


def _accumulate_kernels(total, layer, lengths, weight, norm, eps, backend):
    if total.numel() > 0:
        layers, norms = [kernels.rows(layer)], (NORMS.index(norm), 0)
        kernels.call(backend, "targets", layers, lengths.contiguous(), *norms, eps, weight, True, total)
        torch.autograd.graph.increment_version(total)


_register.composite(_lib, "multimask_accumulate_", _accumulate)
_register.kernels(_lib, "multimask_accumulate_kernels", _accumulate_kernels, lambda *arguments: None)
