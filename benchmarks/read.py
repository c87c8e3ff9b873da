"""READ's cases: the recurrence over depth at the sizes of a base encoder, all cells, against everything that computes
it.

12 layers of 768, rank 256, RMS norm, mean over the layers, no gradient for the layer outputs (the backbone is frozen)
and one for every weight. ``flops`` and ``bytes`` are the least that this takes, for a token and layer (g gates):

    forward    2 g r (d + r)     d numbers read                 (in training 2 r more: h written, and read again)
    backward   2 g r (d + 2r)    d numbers read

and the weights once in each direction, their gradients once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeff import reference

from . import read_rivals
from .registry import FORWARD, TRAINING, Case, Selection, register

LAYERS, WIDTH, RANK, EPS = 12, 768, 256, 1e-6
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
TOKENS = {"quick": (16, 512), "default": (1, 16, 64, 512, 2048), "full": (1, 16, 64, 512, 2048, 32768)}
GPU_TOKENS = {"quick": (64, 8192, 32768), "default": (64, 1024, 8192, 32768), "full": (1, 64, 1024, 8192, 32768)}
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = {
    "quick": (torch.bfloat16, torch.float32), "default": (torch.bfloat16, torch.float32),
    "full": (torch.bfloat16, torch.float16, torch.float32),
}  # fmt: skip
CELLS = {"quick": ("gru",), "default": ("rnn", "gru", "lstm"), "full": ("rnn", "gru", "lstm")}
_ORACLE_TOKENS = 2048


@dataclass
class Inputs:
    """One input set: phi L x [N, d]; weights w_ih, w_hh, b_ih, b_hh, gamma; grad_out [N, r] in training."""

    phi: list[Tensor]
    weights: list[Tensor]
    grad_out: Tensor | None
    cell: str
    eps: float = EPS

    def tensors(self) -> list[Tensor]:
        return [*self.phi, *self.weights, *([] if self.grad_out is None else [self.grad_out])]


def make(
    count: int, seed: int, *, tokens: int, cell: str, dtype: torch.dtype, device: str, training: bool,
    layers: int = LAYERS, width: int = WIDTH, rank: int = RANK,
) -> list[Inputs]:  # fmt: skip
    """``count`` sets with their own layer outputs; the weights stay in place, as they do in a model."""
    random = torch.Generator(device).manual_seed(seed)
    rows = GATES[cell] * rank

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, device=device) * scale).to(dtype)

    weights = [
        normal(rows, width, scale=width**-0.5),
        normal(rows, rank, scale=rank**-0.5),
        normal(rows, scale=0.1),
        normal(rows, scale=0.1),
        1 + normal(width, scale=0.1),
    ]
    for w in weights:
        w.requires_grad_(training)
    return [
        Inputs(
            phi=[normal(tokens, width, scale=2.0) for _ in range(layers)],
            weights=weights,
            grad_out=normal(tokens, rank) if training else None,
            cell=cell,
        )
        for _ in range(count)
    ]


def oracle(inputs: Inputs) -> list[Tensor]:
    """The definition in float64, over chunks of tokens: they are independent, and weight gradients add up."""
    weights = [w.detach().double().requires_grad_(w.requires_grad) for w in inputs.weights]
    *rest, gamma = weights
    outputs, grads = [], [torch.zeros_like(w) for w in weights]
    for start in range(0, inputs.phi[0].shape[0], _ORACLE_TOKENS):
        chunk = slice(start, start + _ORACLE_TOKENS)
        phi = [p[chunk].double() for p in inputs.phi]
        out = reference.read_recurrence(phi, *rest, norm_weight=gamma, cell=inputs.cell, eps=inputs.eps)
        outputs.append(out.detach())
        if inputs.grad_out is not None:
            parts = torch.autograd.grad(out, weights, inputs.grad_out[chunk].double())
            grads = [total + part for total, part in zip(grads, parts, strict=True)]
    return [torch.cat(outputs), *(grads if inputs.grad_out is not None else [])]


def work(
    tokens: int, cell: str, itemsize: int, training: bool, layers: int, width: int, rank: int
) -> tuple[float, float]:
    """The least FLOPs and the least bytes of a case."""
    g, token_layers = GATES[cell], tokens * layers
    weights = (g * rank * (width + rank + 2) + width) * itemsize
    flops, numbers, passes = 2 * g * rank * (width + rank), width, 1
    if training:
        flops, numbers, passes = flops + 2 * g * rank * (width + 2 * rank), 2 * width + 2 * rank, 3
    out = tokens * rank * itemsize * (2 if training else 1)
    return float(flops * token_layers), float(numbers * itemsize * token_layers + passes * weights + out)


def case(
    tokens: int,
    cell: str,
    dtype: torch.dtype,
    device: str,
    mode: str,
    layers: int = LAYERS,
    width: int = WIDTH,
    rank: int = RANK,
) -> Case:
    """One case; the sizes of the layers are arguments for the tests."""
    training = mode == TRAINING
    flops, least_bytes = work(tokens, cell, dtype.itemsize, training, layers, width, rank)

    def sets(count: int, seed: int) -> list[Inputs]:
        return make(
            count, seed, tokens=tokens, cell=cell, dtype=dtype, device=device, training=training,
            layers=layers, width=width, rank=rank,
        )  # fmt: skip

    return Case(
        op="read_recurrence",
        group=cell,
        point=str(tokens),
        axis="tokens",
        shape={"N": tokens, "L": layers, "d": width, "r": rank},
        dtype=dtype,
        device=device,
        mode=mode,
        flops=flops,
        bytes=least_bytes,
        # Every gate sums d + r products and passes its error on through the layers; gradients then sum over tokens.
        reduction=layers * (width + rank) + (tokens * layers if training else 0),
        make=sets,
        set_bytes=tokens * layers * width * dtype.itemsize,
        tensors=Inputs.tensors,
        oracle=oracle,
        contenders=read_rivals.contenders(
            device, dtype, cell, training, tokens * layers * width * 4.0, tokens * layers * rank * 4.0, rank
        ),
    )


@register("read")
def cases(select: Selection) -> Iterator[Case]:
    """The cases of a selection: by mode and dtype, then by cell and tokens."""
    tokens = TOKENS if select.device == "cpu" else GPU_TOKENS
    dtypes = DTYPES if select.device == "cpu" else GPU_DTYPES[select.size]
    modes = [(mode, dtype) for mode in (FORWARD, TRAINING) for dtype in dtypes]
    if select.device == "cuda":
        # By importance, where there may not be time for all.
        modes.sort(key=lambda pair: dtypes.index(pair[1]))
    for mode, dtype in modes:
        for cell in CELLS[select.size]:
            for n in tokens[select.size]:
                yield case(n, cell, dtype, select.device, mode)
