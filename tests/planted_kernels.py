"""Triton kernels that each fail one gate, and some that pass them all: what the resource gates are tested on."""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.aot import Case
from benchmarks.gpus import ARCHITECTURES


@triton.jit
def product(
    a, b, c, tokens, inner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IEEE: tl.constexpr
):  # fmt: skip
    """c = a b^T for a[tokens, inner], b[BLOCK_N, inner]: the usual loop over tiles."""
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(a + m[:, None] * inner + k[None, :], mask=(m < tokens)[:, None], other=0.0)
        y = tl.load(b + n[:, None] * inner + k[None, :])
        total = tl.dot(x, y.T, total, input_precision="ieee" if IEEE else "tf32")
    tl.store(c + m[:, None] * BLOCK_N + n[None, :], total, mask=(m < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def double(x, tokens, BLOCK: tl.constexpr):
    """x = 2 x: nothing for a tensor core."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < tokens), mask=i < tokens)


@triton.jit
def undefined(x, BLOCK: tl.constexpr):
    """Does not compile: a load of more elements than the pointer block has."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.arange(0, 2 * BLOCK))


EVEN = [["tt.divisibility", 16]]


def _product(name, arch, type, bm, bn, bk, warps, stages, matrix, ieee=False):
    signature = {"a": f"*{type}", "b": f"*{type}", "c": "*fp32", "tokens": "i32", "inner": "i32"}
    constants = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "IEEE": ieee}
    signature |= dict.fromkeys(constants, "constexpr")
    attrs = {(i,): EVEN for i in range(5)}
    options = {"num_warps": warps, "num_stages": stages}
    return Case(f"{name} {type}", arch, product, signature, constants, attrs, options, matrix)


def aot_cases():
    for arch in ARCHITECTURES:
        yield from _cases(arch)


def _cases(arch):
    yield _product("good/64x64", arch, "bf16", 64, 64, 64, 4, 2, True)
    yield _product("good/64x64", arch, "fp32", 64, 64, 32, 4, 2, False, ieee=True)
    yield _product("spills/256x256", arch, "bf16", 256, 256, 64, 4, 2, True)
    yield _product("spills/64x64", arch, "bf16", 64, 64, 64, 4, 2, True)
    yield _product("shared/256x128", arch, "bf16", 256, 128, 128, 8, 4, True)
    yield _product("tf32/64x64", arch, "fp32", 64, 64, 32, 4, 2, False)
    options = {"num_warps": 4, "num_stages": 1}
    blocks, signature = {"BLOCK": 256}, {"x": "*bf16", "tokens": "i32", "BLOCK": "constexpr"}
    yield Case("no_matrix/256", arch, double, signature, blocks, {(0,): EVEN}, options, True)
    yield Case("broken/256", arch, undefined, {"x": "*fp32", "BLOCK": "constexpr"}, blocks, {}, options, False)
