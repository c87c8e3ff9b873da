"""The kernels of the multimask family as its ops see them: outputs, how each backend is called, which a GPU prefers.

Every backend has the same functions with the same arguments: ``torch.ops.pyeff_cpu``, ``torch.ops.pyeff_cuda`` and the
module of Triton kernels. They fill the outputs, which come last, are contiguous, and are of size zero where not wanted.
All else has contiguous rows (the last dimension) and any other strides, but index tensors, which are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff import backends
from pyeff.ops import _gpu_choice
from pyeff.ops._gpu_choice import Rule
from pyeff.reference.multimask import wide

_ALL = (torch.float32, torch.bfloat16, torch.float16)

# The first line that applies decides. The size is the width of a token; nothing else may matter to the choice, or a
# graph would be compiled for each.
_BASIS = (
    "the host's time for a launch, which is not predicted; prediction: about the same for most operations, "
    "but the loss with moments takes Triton two thirds of the time"
)
GPU_CHOICE = (Rule((), _ALL, (), "cuda", _BASIS),)


def prefer(device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, ...]:
    """The GPU's backends in the order in which they are tried; empty for tensors that are elsewhere."""
    return _gpu_choice.prefer(GPU_CHOICE, device, dtype, width)


def choose(op: str, like: Tensor, width: int, requested: str, transform: str) -> str:
    """The backend for a call on tensors like this one."""
    return backends.choose(op, like.device, like.dtype, requested, transform, prefer(like.device, like.dtype, width))


def call(backend: str, name: str, *arguments: Any) -> None:
    """Runs one kernel of a backend."""
    if backend == "triton":
        getattr(backends.triton_kernels("multimask"), name)(*arguments)
        return
    backends.load_library()  # a graph of another process calls this before anything has chosen a backend
    getattr(torch.ops.pyeff_cuda if backend == "cuda" else torch.ops.pyeff_cpu, f"multimask_{name}")(*arguments)


def rows(t: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def empty_gather(x: Tensor, ids_keep: Tensor) -> Tensor:
    return x.new_empty((*ids_keep.shape, x.shape[-1]))


def empty_scatter(x: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty((*inverse.shape, x.shape[-1]))


def empty_scatter_backward(grad: Tensor, ids_keep: Tensor, fills: int, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of fill."""
    return (
        grad.new_empty((*ids_keep.shape, grad.shape[-1]) if needs[0] else (0,)),
        grad.new_empty((fills, *grad.shape[1:]) if needs[1] else (0,)),
    )


def empty_targets(layers: Sequence[Tensor]) -> Tensor:
    return layers[0].new_empty(layers[0].shape, dtype=wide(layers[0].dtype))


def empty_loss(pred: Tensor, reduction: str, statistics: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the gradient of pred (where it is kept), and the moments."""
    return (
        pred.new_empty(pred.shape[:-1] if reduction == "none" else (), dtype=wide(pred.dtype)),
        pred.new_empty(pred.shape if keep else (0,)),
        pred.new_empty(1 + 4 * pred.shape[-1] if statistics else 0, dtype=torch.float64),
    )


def empty_loss_backward(pred: Tensor, target: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of pred and of target."""
    return pred.new_empty(pred.shape if needs[0] else (0,)), target.new_empty(target.shape if needs[1] else (0,))


def empty_bias(ids_keep: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    (rows_, width), heads = ids_keep.shape, slopes.shape[0]
    return slopes.new_empty((rows_, heads, width, width), dtype=dtype)


def empty_plan(lengths: Tensor, masks: int, tokens: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep, keep_len, inverse."""
    count = lengths.shape[0] * masks
    return lengths.new_empty((count, slots)), lengths.new_empty(count), lengths.new_empty((count, tokens))
