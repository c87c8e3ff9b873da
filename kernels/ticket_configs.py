"""Tile sizes of the ticket's Triton kernels, by architecture, width of a number and side of a block; see configs.py.

A product's kernel has one name for each height of its tile on the block's own side (BLOCK_M: 16, 32, 64, 128), since
what is best beside it differs: smaller blocks are higher tiles of tokens, so that the blocks' values are read less
often. Blocks of other sizes take the next height, larger ones several programs.
"""

from __future__ import annotations

import functools

from . import configs
from .configs import ARCHITECTURES, INTERPRETER, Config

HEIGHTS = (16, 32, 64, 128)


def _tile(name: str, n: int, m: int, k: int, num_warps: int, num_stages: int, maxnreg: int | None = None) -> Config:
    return Config(name, {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_K": k}, num_warps, num_stages, maxnreg)


def _both(n: int, m: int, k: int, num_warps: int, num_stages: int, few: int = 32) -> tuple[Config, ...]:
    """The tile for many tokens, and one for few."""
    return _tile("large", n, m, k, num_warps, num_stages), _tile("small", few, m, k, 4, 3)


def _strips(m: int) -> dict[int, tuple[Config, ...]]:
    """The longest strip that leaves room for its stages."""
    long, short = _tile("strip", 256, m, 64, 8, 3), _tile("strip", 128, m, 64, 4, 3)
    return {arch: (short if arch == 120 else long,) for arch in ARCHITECTURES}


# 16-bit operands, tokens by own side by depth. Stages are what shared memory holds: 163 KB (80), 227 KB (90, 100),
# 99 KB (120) a block.
_HALF: dict[str, dict[int, tuple[Config, ...]]] = {
    "ticket_multiply16": {
        80: _both(256, 16, 64, 8, 3),
        90: _both(256, 16, 64, 8, 3, 64),
        100: _both(256, 16, 64, 8, 3, 64),
        120: _both(128, 16, 64, 4, 3),
    },
    "ticket_multiply32": {
        80: _both(256, 32, 32, 8, 4),
        90: _both(256, 32, 64, 8, 3, 64),
        100: _both(128, 32, 64, 4, 4, 64),
        120: _both(128, 32, 64, 4, 3),
    },
    "ticket_multiply64": {
        80: _both(256, 64, 32, 8, 4),
        90: _both(256, 64, 64, 8, 4, 64),
        100: _both(128, 64, 64, 4, 4, 64),
        120: _both(128, 64, 64, 4, 3),
    },
    "ticket_multiply128": {
        80: _both(128, 128, 64, 8, 3),
        90: (
            _tile("large", 256, 128, 64, 8, 3),
            _tile("medium", 128, 128, 64, 8, 4),
            _tile("small", 64, 128, 64, 4, 3),
        ),
        100: _both(128, 128, 64, 8, 4, 64),
        120: _both(128, 128, 32, 8, 3),
    },
    # With gelu's error function the largest tile does not fit into registers.
    "ticket_multiply128_gelu": {
        80: _both(128, 128, 64, 8, 3),
        90: _both(128, 128, 64, 8, 4, 64),
        100: _both(128, 128, 64, 8, 4, 64),
        120: _both(128, 128, 32, 8, 3),
    },
    # The other side's strip by the own side by tokens.
    "ticket_outer16": _strips(16),
    "ticket_outer32": _strips(32),
    "ticket_outer64": _strips(64),
    "ticket_outer128": {
        80: (_tile("strip", 128, 128, 32, 8, 3),),
        90: (_tile("strip", 128, 128, 64, 8, 3),),
        100: (_tile("strip", 128, 128, 64, 8, 3),),
        120: (_tile("strip", 128, 128, 32, 8, 3),),
    },
}

# float32 is multiplied as such, by fused multiply-adds: accumulators are the limit, the same everywhere. No tile is
# higher than 64.
_FLOAT: dict[str, tuple[Config, ...]] = {
    "ticket_multiply16": (_tile("float", 64, 16, 16, 4, 2),),
    "ticket_multiply32": (_tile("float", 64, 32, 16, 4, 2),),
    "ticket_multiply64": (_tile("float", 64, 64, 16, 8, 2, 128), _tile("float-small", 32, 64, 16, 4, 2)),
    "ticket_outer16": (_tile("float", 64, 16, 16, 4, 2),),
    "ticket_outer32": (_tile("float", 64, 32, 16, 4, 2),),
    "ticket_outer64": (_tile("float", 64, 64, 16, 8, 2),),
}

# Rows that are not whole 16-byte pieces come number by number, through registers: small tiles, for all architectures.
_ODD: dict[str, tuple[Config, ...]] = {
    "ticket_multiply32": (_tile("odd", 32, 32, 32, 4, 1),),
    "ticket_outer32": (_tile("odd", 32, 32, 16, 4, 1),),
}

# Kernels without a product of tiles; the dtype hardly matters.
_SMALL: dict[str, Config] = {
    "ticket_few": Config("rows", {"BLOCK_M": 8, "BLOCK_STEP": 256}, 4, 1),
    "ticket_derive": Config("columns", {"BLOCK_N": 32, "BLOCK_M": 64}, 4, 1),
    "ticket_add": Config("columns", {"BLOCK_M": 8, "BLOCK_N": 128}, 4, 1),
}

_INTERPRETED: dict[str, tuple[Config, ...]] = {
    f"ticket_{kernel}{height}": (_tile("interpreter", n, height, 32, 1, 1),)
    for kernel, n in (("multiply", 16), ("outer", 32))
    for height in HEIGHTS
} | {
    "ticket_multiply128_gelu": (_tile("interpreter", 16, 128, 32, 1, 1),),
    "ticket_few": (Config("interpreter", {"BLOCK_M": 64, "BLOCK_STEP": 32}, 1, 1),),
    "ticket_derive": (Config("interpreter", {"BLOCK_N": 32, "BLOCK_M": 64}, 1, 1),),
    "ticket_add": (Config("interpreter", {"BLOCK_M": 8, "BLOCK_N": 4096}, 1, 1),),
}

KERNELS = (*_HALF, *_SMALL)


def height(side: int, itemsize: int, regular: bool, most: int = HEIGHTS[-1]) -> int:
    """BLOCK_M for a block with this own side, at most ``most``."""
    if not regular:
        return 32
    most = min(most, 64) if itemsize == 4 else most
    return next(h for h in HEIGHTS if h >= min(side, most))


def choices(kernel: str, arch: int, itemsize: int, regular: bool = True) -> tuple[Config, ...]:
    """The configurations of a kernel, from the largest tiles to the smallest, by the name ``kernel/name``.

    Args:
        kernel (str): one of ``KERNELS``; its number is a :func:`height`.
        arch (int): one of ``ARCHITECTURES``, or ``INTERPRETER``.
        itemsize (int): bytes of a number, 2 or 4.
        regular (bool): all rows, and those of the blocks, are whole 16-byte pieces.
    """
    return _choices(kernel, arch, itemsize, regular, configs.every_counts())


@functools.cache
def _choices(kernel: str, arch: int, itemsize: int, regular: bool, every: bool) -> tuple[Config, ...]:
    if arch == INTERPRETER and kernel in _INTERPRETED:
        found = _INTERPRETED[kernel]
    elif kernel in _SMALL:
        found = (_SMALL[kernel],)
    elif not regular:
        found = _ODD[kernel]
    else:
        found = _FLOAT[kernel] if itemsize == 4 else _HALF[kernel][arch]
    return configs.named(kernel, found, arch, every)
