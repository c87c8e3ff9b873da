"""READ's kernels as the op sees them: their outputs, how each backend is called, and which one a GPU prefers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff import backends
from pyeff.ops import _gpu_choice
from pyeff.ops._gpu_choice import Rule
from pyeff.reference.read import GATES, NORMS, REDUCTIONS

# What the backward needs of a step beside h: nothing (1 - h^2), (r, z, n, R_n h + b), (i, f, g, o).
SAVED_GATES = {"rnn": 0, "gru": 4, "lstm": 4}
# How much the forward keeps: nothing, the states, or the states and the gates.
SAVE_NOTHING, SAVE_STATES, SAVE_GATES = 0, 1, 2

Options = tuple[str, str, float, str]
Operands = Sequence["Tensor | None"]


_HALVES = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, *_HALVES)

# The first line that applies decides. Tokens and layers are in none of them: a choice that depended on the number of
# tokens would compile a graph again for each.
GPU_CHOICE = (
    Rule((90,), _HALVES, (64, 128, 256), "cuda", "prediction: R stays in the shared memory of a cluster"),
    Rule((), _ALL, (), "triton", "prediction: the same traffic, and the compiler's own matrix pipeline"),
)


def prefer(device: torch.device, dtype: torch.dtype, cell: str, rank: int) -> tuple[str, ...]:
    """The GPU's backends in the order in which they are tried; empty for tensors that are elsewhere."""
    return _gpu_choice.prefer(GPU_CHOICE, device, dtype, rank)


def empty_forward(phi, w_ih, w_hh, cell, norm, save) -> tuple[Tensor, ...]:
    """Outputs of read_forward: out, c_last, h, c, gates, stats; what a call does not have is of size zero."""
    lead, rank, layers, lstm = phi[0].shape[:-1], w_hh.shape[1], len(phi), cell == "lstm"

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = w_ih.dtype) -> Tensor:
        return w_ih.new_empty(shape if wanted else (0,), dtype=dtype)

    kept, wide = save >= SAVE_STATES, torch.promote_types(w_ih.dtype, torch.float32)
    return (
        empty(True, *lead, rank),
        empty(lstm, *lead, rank),
        empty(kept, layers, *lead, rank),
        empty(kept and lstm, layers, *lead, rank),
        empty(save == SAVE_GATES and SAVED_GATES[cell] > 0, layers, *lead, SAVED_GATES[cell] * rank),
        empty(kept and norm != "none", 2 if norm == "layer" else 1, layers, *lead, dtype=wide),
    )


def empty_backward(phi, w_ih, w_hh, needs_phi, needs) -> tuple[Tensor, ...]:
    """Outputs of read_backward: the gradients in the order of read_forward's tensors, of size zero where not needed."""
    lead, width, rank, gates = phi[0].shape[:-1], phi[0].shape[-1], w_hh.shape[1], w_hh.shape[0]
    state = (*lead, rank)
    shapes = ((gates, width), (gates, rank), (gates,), (gates,), (width,), (width,), state, state)
    dphi = w_ih.new_empty((sum(needs_phi), *lead, width) if any(needs_phi) else (0,))
    return dphi, *(w_ih.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def forward(backend: str, phi: list[Tensor], rest: Operands, options: Options, outputs: Sequence[Tensor]) -> None:
    """Fills the outputs by the kernels of one backend."""
    phi, rest = _operands(backend, phi, rest)
    if backend == "triton":
        backends.triton_kernels("read").forward(phi, *rest, *options, *outputs)
    else:
        _native(backend).read_forward(phi, *rest, *_codes(*options), *outputs)


def backward(
    backend: str,
    grads: Operands,
    phi: list[Tensor],
    rest: Operands,
    saved: Sequence[Tensor],
    options: Options,
    needs_phi: list[bool],
    outputs: Sequence[Tensor],
) -> None:
    """Fills the gradients by the kernels of one backend."""
    phi, rest = _operands(backend, phi, rest)
    grads = [g if g is None else g.contiguous() for g in grads]
    layers, absent = iter(outputs[0]), outputs[0].new_empty(0)
    dphi = [next(layers) if need else absent for need in needs_phi]
    if backend == "triton":
        backends.triton_kernels("read").backward(*grads, phi, *rest, *saved, *options, dphi, *outputs[1:])
    else:
        _native(backend).read_backward(*grads, phi, *rest, *saved, *_codes(*options), dphi, *outputs[1:])


def _native(backend: str):
    backends.load_library()  # a graph of another process calls this before anything has chosen a backend
    return torch.ops.pyeff_cuda if backend == "cuda" else torch.ops.pyeff_cpu


def _operands(backend: str, phi: list[Tensor], rest: Operands) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the kernels take: phi in place wherever its strides allow it, everything else contiguous."""
    if backend == "cpu":
        phi = [t if t.dim() <= 9 else t.contiguous() for t in phi]
    else:
        phi = [t if two_strides(t) else t.contiguous() for t in phi]
    return phi, [t if t is None else t.contiguous() for t in rest]


def two_strides(t: Tensor) -> bool:
    """Whether the rows of [*, d] are contiguous and lie at outer * i + inner * j: sequences in a batch, and slices."""
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        return False
    folded: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    return len(folded) <= 2


def _codes(cell: str, norm: str, eps: float, reduce: str) -> tuple[int, int, float, int]:
    return tuple(GATES).index(cell), NORMS.index(norm), eps, REDUCTIONS.index(reduce)
