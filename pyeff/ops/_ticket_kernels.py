"""The ticket's kernels as the op sees them: their outputs, how each backend is called, and which one a GPU prefers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from pyeff import backends
from pyeff.ops import _gpu_choice
from pyeff.ops._gpu_choice import Rule
from pyeff.reference.ticket import ACTIVATIONS

_HALVES = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, *_HALVES)

# The first line that applies decides. The size is the longer side of a block; the number of tokens is in no line, since
# a choice that depended on it would compile a graph again for each.
GPU_CHOICE = (
    Rule((90,), _HALVES, (16, 32, 64), "cuda", "prediction: tokens stay in shared memory, a third to a half less time"),
    Rule((), _ALL, (), "triton", "prediction: the same traffic, and the compiler's own matrix pipeline"),
)


def prefer(device: torch.device, dtype: torch.dtype, values_shape: Sequence[int]) -> tuple[str, ...]:
    """The GPU's backends in the order in which they are tried; empty for tensors that are elsewhere."""
    return _gpu_choice.prefer(GPU_CHOICE, device, dtype, max(values_shape[1:]))


def grid(values: Tensor, out: int, width: int) -> tuple[int, int]:
    """(R, C): the rows and columns of blocks."""
    return -(-out // values.shape[1]), -(-width // values.shape[2])


def check_positions(values: Tensor, index: Tensor, out: int, width: int) -> None:
    """Raises ValueError where an index leads outside of its weight.

    For the reference; the kernels look for themselves. Only where the numbers are at hand: not while a graph is traced,
    and not on a GPU, which would have to be waited for.
    """
    plain = type(index) is Tensor and not is_functorch_wrapped_tensor(index) and index.device.type == "cpu"
    if not plain or torch.compiler.is_compiling():
        return
    nnz, (rows, columns) = values.shape[0], grid(values, out, width)
    start, column = index[: rows + 1].long(), index[rows + 1 : rows + 1 + nnz]
    rises = start[0] == 0 and start[-1] == nnz and bool((start.diff() >= 0).all())
    if not rises or (nnz and not 0 <= int(column.min()) <= int(column.max()) < columns):
        raise ValueError(
            f"ticket_linear: index has a position out of range, expected one of {nnz} blocks in {rows} x {columns}"
        )


def empty_forward(x: Tensor, values: Tensor, out: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Outputs of ticket_forward: y, and z before the activation (of size zero where it is not kept)."""
    shape = (*x.shape[:-1], out)
    return values.new_empty(shape), values.new_empty(shape if keep else (0,))


def empty_backward(
    grad: Tensor, x: Tensor, values: Tensor, bias: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of ticket_backward: the gradients of x, values and bias, of size zero where not needed."""
    return (
        values.new_empty(x.shape if needs[0] else (0,)),
        values.new_empty(values.shape if needs[1] else (0,)),
        values.new_empty((grad.shape[-1],) if bias and needs[2] else (0,)),
    )


def forward(
    backend: str,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    activation: str,
    outputs: Sequence[Tensor],
) -> None:
    """Fills the outputs by the kernels of one backend."""
    operands = (_rows(x), values.contiguous(), index.contiguous(), bias if bias is None else bias.contiguous())
    y, z = _flat(outputs[0]), _flat(outputs[1])
    if backend == "triton":
        backends.triton_kernels("ticket").forward(*operands, activation, y, z)
    else:
        _native(backend).ticket_forward(*operands, ACTIVATIONS.index(activation), y, z)


def backward(
    backend: str,
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    saved: Tensor,
    activation: str,
    outputs: Sequence[Tensor],
) -> None:
    """Fills the gradients by the kernels of one backend."""
    operands = (_rows(grad), _rows(x), values.contiguous(), index.contiguous(), _flat(saved.contiguous()))
    dx, dvalues, dbias = outputs
    if backend == "triton":
        backends.triton_kernels("ticket").backward(*operands, activation, _flat(dx), dvalues, dbias)
    else:
        _native(backend).ticket_backward(*operands, ACTIVATIONS.index(activation), _flat(dx), dvalues, dbias)


def _native(backend: str):
    backends.load_library()  # a graph of another process calls this before anything has chosen a backend
    return torch.ops.pyeff_cuda if backend == "cuda" else torch.ops.pyeff_cpu


def _flat(t: Tensor) -> Tensor:
    """[*, width] as [N, width]; what is of size zero stays as it is."""
    return t.view(-1, t.shape[-1]) if t.numel() else t


def _rows(t: Tensor) -> Tensor:
    """[*, width] as [N, width] whose rows are contiguous; in place wherever its strides allow it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
