"""Philox4x32 with 7 rounds in Triton, and normal numbers from its words; the definition is in reference/_philox.py."""

import triton
import triton.language as tl

# What the second word of the counter says beside the number of a mask.
NOISE, CENTRES, SCORES = tl.constexpr(0), tl.constexpr(1 << 30), tl.constexpr(2 << 30)

_A, _B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_STEP_A, _STEP_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(7)


@triton.jit
def low_word(number):
    """The lower 32 bits of an int64."""
    return (number & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def high_word(number):
    return ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def words(seed, c0, c1, c2, c3):
    """Four uint32 words for each counter c0 (any shape) beside three scalars, under the 64 bits of a seed."""
    k0, k1 = low_word(seed), high_word(seed)
    a, b = tl.full((), _A, tl.uint32), tl.full((), _B, tl.uint32)
    step_a, step_b = tl.full((), _STEP_A, tl.uint32), tl.full((), _STEP_B, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(c0, a), c0 * a
        high1, low1 = tl.umulhi(c2, b), c2 * b
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + step_a
        k1 = k1 + step_b
    return c0, c1, c2, c3


@triton.jit
def normal_pair(a, b, FAST: tl.constexpr):
    """Two normal numbers, float32, of two words: by Box and Muller.

    FAST is for numbers that are rounded to 16 bits: by the special function units, with 23 bits of the angle.
    """
    # 23 bits in the mantissa of a number from 1 to 2: 23 bits and a half of the last come out, exactly.
    unit = ((a >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    if FAST:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [unit], dtype=tl.float32, is_pure=True, pack=1
        )
        # By 2 ln 2; an approximation may come out above zero.
        radius = tl.sqrt(tl.maximum(log2 * -1.3862943611198906, 0.0))
        # Half a turn less is the opposite sign.
        angle = (((b >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5) * 6.283185307179586
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        radius = -radius
    else:
        radius = tl.sqrt_rn(-2.0 * tl.log(unit))
        # 2^-24 of a turn.
        cosine, sine = _cos_sin((b >> 8).to(tl.int32).to(tl.float32) * 3.7450702829239286e-07)
    return radius * cosine, radius * sine


@triton.jit
def _cos_sin(angle):
    """Of 0 to 2 pi: a multiple of pi / 2 taken out in three parts, whose products are exact, then polynomials."""
    turn = (angle * 0.6366197723675814 + 0.5).to(tl.int32)
    quarter = turn.to(tl.float32)
    x = angle - quarter * 1.5703125
    x = x - quarter * 4.837512969970703125e-4
    x = x - quarter * 7.54978995489188216e-8
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (
        4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    )  # fmt: skip
    odd = (turn & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where(((turn + 1) & 2) == 2, -first, first),
        tl.where((turn & 2) == 2, -second, second),
    )
