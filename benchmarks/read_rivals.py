"""Everybody who computes READ: ours, the definition, and the others, each set up as well as we know how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyeff import ops, reference
from pyeff.ops import _read_kernels as kernels

from . import ours, read_folded
from .compiled import compiled, open_tokens
from .registry import Call, Contender, Unavailable

if TYPE_CHECKING:
    from .read import Inputs

_EAGER = "the definition (pyeff.reference)"
_COMPILED = "the definition, unrolled, under torch.compile"
_FOLDED = "norm folded into the weights, unrolled, backward by hand, both under torch.compile"
_ONEDNN = "norm folded, oneDNN products with prepacked weights, step under torch.compile"
_TORCH_NN = "torch.nn.RNN/GRU/LSTM over the stacked, normalised states"
_CUDNN = f"{_TORCH_NN} (cuDNN where it has the dtype)"
_NAIVE = "all states concatenated and normalised in float32, then a loop over cells"


def with_grads(inputs: Inputs, function: Callable[[], Tensor], weights: Sequence[Tensor] | None = None) -> Call:
    """A call that returns the output, and the gradients of the weights where there is a backward."""
    if inputs.grad_out is None:
        return lambda: (function(),)
    wanted = inputs.weights if weights is None else list(weights)

    def call() -> Sequence[Tensor]:
        out = function()
        return (out, *torch.autograd.grad(out, wanted, inputs.grad_out))

    return call


def _keywords(inputs: Inputs) -> dict:
    return {"norm_weight": inputs.weights[4], "cell": inputs.cell, "eps": inputs.eps}


def fused_by(name: str, sets: Sequence[Inputs]) -> list[Call]:
    """Our op by one of the GPU's backends."""
    return ours.by_name("read_recurrence", name, sets[0].weights[0], _ours(sets))


def _ours(sets: Sequence[Inputs], recompute: bool = False) -> list[Call]:
    def one(s: Inputs) -> Call:
        keywords = _keywords(s)
        return with_grads(s, lambda: ops.read_recurrence(s.phi, *s.weights[:4], **keywords, recompute=recompute))

    return [one(s) for s in sets]


def fused(sets: Sequence[Inputs], recompute: bool = False) -> list[Call]:
    """Our op, by the backend that ``auto`` takes; absent where that is the reference."""
    ours.need_kernels("read_recurrence", sets[0].weights[0])
    return _ours(sets, recompute)


def eager(sets: Sequence[Inputs]) -> list[Call]:
    def one(s: Inputs) -> Call:
        keywords = _keywords(s)
        return with_grads(s, lambda: reference.read_recurrence(s.phi, *s.weights[:4], **keywords))

    return [one(s) for s in sets]


def _definition(phi: list[Tensor], weights: list[Tensor], cell: str, eps: float) -> Tensor:
    return reference.read_recurrence(phi, *weights[:4], norm_weight=weights[4], cell=cell, eps=eps)


@functools.cache
def _compiled_definition(cell: str, dtype: torch.dtype, training: bool, device: str) -> Callable[..., Tensor]:
    return compiled(_definition, device)


def compiled_reference(sets: Sequence[Inputs]) -> list[Call]:
    weight = sets[0].weights[0]
    run = _compiled_definition(sets[0].cell, weight.dtype, sets[0].grad_out is not None, weight.device.type)

    def one(s: Inputs) -> Call:
        open_tokens(s.phi)
        return with_grads(s, lambda: run(s.phi, s.weights, s.cell, s.eps))

    return [one(s) for s in sets]


def folded(sets: Sequence[Inputs]) -> list[Call]:
    cell, dtype, training = sets[0].cell, sets[0].weights[0].dtype, sets[0].grad_out is not None
    device = sets[0].weights[0].device.type
    run, _ = read_folded.compiled_pair(cell, dtype, training, device)  # raises Unavailable here, not in the first call

    def one(s: Inputs) -> Call:
        open_tokens(s.phi)
        if training:
            open_tokens([s.grad_out])  # type: ignore[list-item]
            return with_grads(s, lambda: read_folded.Folded.apply(s.cell, s.eps, *s.weights, *s.phi))
        return lambda: run(s.phi, *s.weights, s.cell, s.eps, False)

    return [one(s) for s in sets]


def _onednn_step(
    cell: str, a: Tensor, b: Tensor, b_ih: Tensor, phi: Tensor, h: Tensor, c: Tensor, total: Tensor, eps: float
) -> tuple[Tensor, ...]:
    scaled = a.float() * read_folded.rstd(phi, eps) + b_ih.float()
    h_next, c_next, _ = read_folded.cell_forward(cell, scaled, b.float(), h.float(), c)
    return h_next.to(phi.dtype), c_next, total + h_next


@functools.cache
def _compiled_step(cell: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    return compiled(_onednn_step)


def onednn(sets: Sequence[Inputs]) -> list[Call]:
    """Weights are folded and packed once. A token count is only a hint to the packing."""
    first = sets[0]
    if first.grad_out is not None:
        raise Unavailable("forward only: products with prepacked weights have no backward")
    if first.phi[0].device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise Unavailable("oneDNN's prepacked products are for the CPU, in a torch built with oneDNN")
    w_ih, w_hh, b_ih, b_hh, gamma = first.weights
    tokens, rank, layers = first.phi[0].shape[0], w_hh.shape[1], len(first.phi)
    packed_ih = torch.ops.mkldnn._reorder_linear_weight((w_ih * gamma).contiguous(), tokens)
    packed_hh = torch.ops.mkldnn._reorder_linear_weight(w_hh.contiguous(), tokens)
    product = torch.ops.mkldnn._linear_pointwise.default
    step = _compiled_step(first.cell, w_ih.dtype)

    def one(s: Inputs) -> Call:
        def call() -> Sequence[Tensor]:
            h = torch.zeros(tokens, rank, dtype=w_ih.dtype)
            c = total = torch.zeros(tokens, rank)
            for phi in s.phi:
                a = product(phi, packed_ih, None, "none", [], "")
                b = product(h, packed_hh, b_hh, "none", [], "")
                h, c, total = step(s.cell, a, b, b_ih, phi, h, c, total, s.eps)
            return ((total / layers).to(h.dtype),)

        return call

    return [one(s) for s in sets]


def torch_nn(sets: Sequence[Inputs]) -> list[Call]:
    w_ih, w_hh, b_ih, b_hh, gamma = sets[0].weights
    module = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[sets[0].cell](
        w_ih.shape[1], w_hh.shape[1]
    )
    module = module.to(w_ih.device, w_ih.dtype)
    parameters = list(module.parameters())
    for parameter, value in zip(parameters, (w_ih, w_hh, b_ih, b_hh), strict=True):
        # The same memory, so that it counts as a parameter and not as something saved.
        parameter.data = value.detach()
        parameter.requires_grad_(value.requires_grad)
    module.flatten_parameters()  # cuDNN wants them in one piece, and copies them in every call where they are not

    def one(s: Inputs) -> Call:
        def function() -> Tensor:
            x = torch.nn.functional.rms_norm(torch.stack(s.phi), (w_ih.shape[1],), gamma, s.eps)
            return module(x)[0].mean(0)

        return with_grads(s, function, [*parameters, gamma])

    return [one(s) for s in sets]


def naive(sets: Sequence[Inputs]) -> list[Call]:
    def one(s: Inputs) -> Call:
        w_ih, w_hh, b_ih, b_hh, gamma = s.weights

        def function() -> Tensor:
            wide = torch.stack(s.phi).float()
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + s.eps) * gamma.float()).to(w_ih.dtype)
            h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
            states = []
            for x_i in x:
                if s.cell == "lstm":
                    h, c = torch._VF.lstm_cell(x_i, (h, c), w_ih, w_hh, b_ih, b_hh)  # type: ignore[attr-defined]
                else:
                    cell = torch._VF.gru_cell if s.cell == "gru" else torch._VF.rnn_tanh_cell  # type: ignore[attr-defined]
                    h = cell(x_i, h, w_ih, w_hh, b_ih, b_hh)
                states.append(h)
            return torch.stack(states).mean(0)

        return with_grads(s, function)

    return [one(s) for s in sets]


def gpu_order(dtype: torch.dtype, cell: str, rank: int) -> tuple[str, ...]:
    """The GPU's backends, first the one that ``auto`` takes on this machine's device (or would, without a device)."""
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return ours.gpu_order("read_recurrence", dtype, kernels.prefer(device, dtype, cell, rank))


def contenders(
    device: str, dtype: torch.dtype, cell: str, training: bool, wide: float, narrow: float, rank: int
) -> tuple[Contender, ...]:
    """Everybody for a case. ``wide`` and ``narrow`` are the bytes of [L, N, d] and [L, N, r] in float32, for estimates.

    The estimates are of the memory that a call takes, rounded up, of the cell that takes most (LSTM). On a GPU ours is
    there by each of its backends; the one that ``auto`` takes has the role ``"fused"``.
    """
    keep = 1.0 if training else 0.25
    if device == "cuda":
        first, *rest = gpu_order(dtype, cell, rank)
        own = [
            Contender(name, f"pyeff.ops.read_recurrence by its {name} kernels", role, partial, 7 * narrow * keep)
            for role, names in (("fused", [first]), ("variant", rest))
            for name in names
            for partial in [functools.partial(fused_by, name)]
        ]
    else:
        own = [Contender("fused", "pyeff.ops.read_recurrence", "fused", fused, 7 * narrow * keep)]
    if training:
        again = functools.partial(fused, recompute=True)
        about = "ours, gates computed again in the backward"
        own.append(Contender("recompute", about, "variant", again, 4 * narrow))
    others = [
        Contender("eager", _EAGER, "reference", eager, (4 * wide + 16 * narrow) * keep),
        Contender("compiled", _COMPILED, "rival", compiled_reference, (3 * wide + 12 * narrow) * keep),
        Contender("folded", _FOLDED, "rival", folded, 8 * narrow),
    ]
    if device == "cpu":
        others.append(Contender("oneDNN", _ONEDNN, "rival", onednn, narrow))
    half = 1.0 if training else 0.6
    torch_nn_is = _CUDNN if device == "cuda" else _TORCH_NN
    others += [
        Contender("torch.nn", torch_nn_is, "rival", torch_nn, (3 * wide + 16 * narrow) * half),
        Contender("naive", _NAIVE, "rival", naive, (5 * wide + 16 * narrow) * half),
    ]
    return tuple(own + others)
