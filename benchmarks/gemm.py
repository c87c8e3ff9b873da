"""The shared matrix kernel: a linear layer at the sizes of a base encoder, against torch's own and oneDNN's.

Sizes are tokens x in x out. Every input set has its own weights: in a network, another layer's were used last. Packing
a weight happens once for each and is not timed, neither ours nor oneDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import backends

from .compiled import compiled
from .registry import FORWARD, Call, Case, Contender, Selection, Unavailable, register

SIZES = ((64, 768, 768), (4096, 768, 768), (4096, 768, 3072), (4096, 3072, 768))
QUICK_SIZES = SIZES[:2]


@dataclass
class Inputs:
    """x [N, in] and weight [out, in]."""

    x: Tensor
    weight: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.x, self.weight]


def fused(sets: Sequence[Inputs]) -> list[Call]:
    """The native op over ``csrc/cpu/gemm.h``."""
    reason = backends.load_library()
    if sets[0].x.device.type != "cpu":
        reason = "the shared matrix kernel is for the CPU"
    if not reason and not hasattr(torch.ops.pyeff_cpu, "linear"):
        reason = "the compiled library has no linear"
    if reason:
        raise Unavailable(reason)
    linear, pack = torch.ops.pyeff_cpu.linear, torch.ops.pyeff_cpu.linear_pack

    def one(s: Inputs) -> Call:
        packed, out = pack(s.weight), s.weight.shape[0]
        return lambda: (linear(s.x, packed, out),)

    return [one(s) for s in sets]


def eager(sets: Sequence[Inputs]) -> list[Call]:
    return [functools.partial(lambda s: (F.linear(s.x, s.weight),), s) for s in sets]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@functools.cache
def _compiled_linear(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Callable[..., Tensor]:
    return compiled(_linear, device)


def compiled_reference(sets: Sequence[Inputs]) -> list[Call]:
    run = _compiled_linear(sets[0].x.dtype, (*sets[0].x.shape, sets[0].weight.shape[0]), sets[0].x.device.type)
    return [functools.partial(lambda s: (run(s.x, s.weight),), s) for s in sets]


def onednn(sets: Sequence[Inputs]) -> list[Call]:
    x = sets[0].x
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise Unavailable("oneDNN's prepacked products are for the CPU, in a torch built with oneDNN")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable(f"oneDNN has no prepacked product in {x.dtype}")
    product = torch.ops.mkldnn._linear_pointwise.default

    def one(s: Inputs) -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(s.weight, s.x.shape[0])
        return lambda: (product(s.x, packed, None, "none", [], ""),)

    return [one(s) for s in sets]


CONTENDERS = (
    Contender("fused", "the shared matrix kernel (csrc/cpu/gemm.h), packed weights", "fused", fused),
    Contender("F.linear", "torch.nn.functional.linear (MKL in float32)", "reference", eager),
    Contender("compiled", "the same under torch.compile", "rival", compiled_reference),
    Contender("oneDNN", "oneDNN with prepacked weights", "rival", onednn),
)


def case(tokens: int, width: int, out: int, dtype: torch.dtype, device: str) -> Case:
    """One product x W^T."""

    def make(count: int, seed: int) -> list[Inputs]:
        random = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=random).to(device, dtype)

        return [Inputs(normal(tokens, width), normal(out, width)) for _ in range(count)]

    numbers = tokens * width + width * out + tokens * out
    return Case(
        op="linear",
        group="",
        point=f"{tokens}x{width}x{out}",
        axis="tokens x in x out",
        shape={"N": tokens, "in": width, "out": out},
        dtype=dtype,
        device=device,
        mode=FORWARD,
        flops=2.0 * tokens * width * out,
        bytes=float(numbers * dtype.itemsize),
        reduction=width,
        make=make,
        set_bytes=(tokens * width + width * out) * dtype.itemsize,
        tensors=Inputs.tensors,
        oracle=lambda s: [F.linear(s.x.double(), s.weight.double())],
        contenders=CONTENDERS,
    )


@register("gemm")
def cases(select: Selection) -> Iterator[Case]:
    """The cases of a selection: by dtype, then by size."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width, out in QUICK_SIZES if select.size == "quick" else SIZES:
            yield case(tokens, width, out, dtype, select.device)
