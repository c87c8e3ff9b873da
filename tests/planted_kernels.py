"""Triton kernels that each fail one gate, and some that pass them all: what the resource gates are tested on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    a, b, c, tokens, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IEEE: tl.constexpr
):  # fmt: skip
    """c = a b^T for a[tokens, inner], b[BN, inner]: the usual loop over tiles."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * inner + k[None, :], mask=(m < tokens)[:, None], other=0.0)
        y = tl.load(b + n[:, None] * inner + k[None, :])
        total = tl.dot(x, y.T, total, input_precision="ieee" if IEEE else "tf32")
    tl.store(c + m[:, None] * BN + n[None, :], total, mask=(m < tokens)[:, None])


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


def _product(name, type, bm, bn, bk, warps, stages, expects, ieee=False):
    pointers = {"a": f"*{type}", "b": f"*{type}", "c": "*fp32", "tokens": "i32", "inner": "i32"}
    constants = {"BM": bm, "BN": bn, "BK": bk, "IEEE": ieee}
    return name, product, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants, warps, stages, expects


def aot_cases():
    yield _product("good/64x64", "bf16", 64, 64, 64, 4, 2, True)
    yield _product("ieee/64x64", "fp32", 64, 64, 32, 4, 2, False, ieee=True)
    yield _product("spills/256x256", "bf16", 256, 256, 64, 4, 2, True)
    yield _product("spills/64x64", "bf16", 64, 64, 64, 4, 2, True)
    yield _product("shared/256x128", "bf16", 256, 128, 128, 8, 4, True)
    yield _product("tf32/64x64", "fp32", 64, 64, 32, 4, 2, False)
    elements = {"x": "*bf16", "tokens": "i32", "BLOCK": "constexpr"}
    yield "no_matrix/256", double, elements, {"BLOCK": 256}, 4, 1, True
    yield "does_not_compile/256", undefined, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 256}, 4, 1, False
