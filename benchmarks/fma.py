"""A loop of multiply-adds in registers by Triton: a GPU's arithmetic peak in float32, outside of its matrix units."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLL, _WARPS = 2048, 16, 4


@triton.jit
def _loop(out, iterations, a, b, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    # 16 numbers a thread: as many independent chains, so that no multiply-add waits for the one before it.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 7).to(tl.float32)
    for _ in range(iterations):
        for _ in tl.static_range(UNROLL):
            x = x * a + b
    tl.store(out + at, x)


def run(out: Tensor, iterations: int, a: float = 0.5, b: float = 1.0) -> None:
    """Fills ``out`` (a multiple of BLOCK float32 numbers) with (i mod 7) after UNROLL * iterations of x <- a x + b."""
    _loop[(out.numel() // BLOCK,)](out, iterations, a, b, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=_WARPS)


def flops(out: Tensor, iterations: int) -> float:
    """The arithmetic of a run; a multiply-add is two operations."""
    return 2.0 * out.numel() * UNROLL * iterations
