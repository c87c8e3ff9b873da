"""Tile sizes of the Triton kernels, by architecture and by the width of a number.

A kernel has one configuration for each class of size, from the largest tiles to the smallest; ``choose`` takes the
first that gives every multiprocessor a program, or the last. There is no autotuner: nothing is timed at import or in a
call, a call's result does not depend on what ran before it, and the number of tokens is part of no key. Each of them is
compiled ahead of time for its architectures and held to gates: no spills, shared memory within the limit, and matrix
instructions where 16-bit operands are multiplied. One that fails a gate on an architecture is listed in excluded.py,
and is not chosen there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .excluded import EXCLUDED

ARCHITECTURES = (80, 90, 100, 120)
# What stands for an architecture where Triton's interpreter runs: tiles as small as its products allow.
INTERPRETER = 0


class Config(NamedTuple):
    """How one kernel is compiled: its blocks by the names of its parameters, warps, and stages of its pipelines.

    Left to itself, ptxas spills a few bytes where that lets one more block onto a multiprocessor. ``maxnreg``,
    registers of a thread, keeps it from trying for more blocks than these allow.
    """

    name: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """What a launch is told beside arguments and blocks."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def _tile(name: str, n: int, m: int, k: int, num_warps: int, num_stages: int, columns: str = "BLOCK_M") -> Config:
    return Config(name, {"BLOCK_N": n, columns: m, "BLOCK_K": k}, num_warps, num_stages)


def _units(name: str, n: int, u: int, k: int, num_warps: int, num_stages: int) -> Config:
    return _tile(name, n, u, k, num_warps, num_stages, "BLOCK_U")


def _outer(name: str, m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config(name, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


def _up_to(maxnreg: int, config: Config) -> Config:
    return config._replace(maxnreg=maxnreg)


_RECUR_SMALL = _up_to(168, _units("small", 16, 64, 64, 4, 3))
_LSTM_SMALL = _up_to(128, _units("small", 16, 32, 64, 4, 3))
_RECUR = {
    80: (_units("large", 128, 32, 64, 8, 3), _units("medium", 64, 32, 64, 4, 3), _RECUR_SMALL),
    90: (_units("large", 128, 64, 64, 8, 3), _units("medium", 64, 64, 64, 4, 3), _RECUR_SMALL),
}
# Four gates: four accumulators, or four gates' gradients at once.
_RECUR_LSTM = {
    80: (_units("large", 128, 32, 64, 8, 3), _units("medium", 64, 32, 32, 4, 4), _LSTM_SMALL),
    120: (_up_to(255, _units("large", 64, 32, 32, 4, 4)), _units("medium", 32, 32, 64, 4, 3), _LSTM_SMALL),
    100: (_units("large", 128, 32, 64, 8, 3), _up_to(255, _units("medium", 64, 32, 32, 4, 4)), _LSTM_SMALL),
}

# 16-bit operands. Stages are what shared memory holds: 163 KB (80), 227 KB (90, 100), 99 KB (120) a block.
_HALF: dict[str, dict[int, tuple[Config, ...]]] = {
    "project": {
        80: (_tile("large", 128, 128, 64, 8, 3), _tile("small", 32, 64, 64, 4, 3)),
        90: (_tile("large", 128, 256, 64, 8, 3), _tile("small", 64, 64, 64, 4, 3)),
        100: (_tile("large", 128, 128, 64, 8, 4), _up_to(128, _tile("small", 64, 64, 64, 4, 3))),
        120: (_tile("large", 128, 128, 32, 8, 3), _tile("small", 32, 64, 64, 4, 3)),
    },
    # float32 rows beside 16-bit weights: twice the bytes of a stage, and the rounded tile once more.
    "project_wide": {
        80: (_tile("large", 128, 64, 64, 8, 2), _tile("small", 32, 64, 64, 4, 3)),
        90: (_tile("large", 128, 128, 64, 8, 3), _tile("small", 64, 64, 64, 4, 3)),
        100: (_tile("large", 128, 64, 64, 8, 3), _tile("small", 64, 64, 64, 4, 3)),
        120: (_tile("large", 64, 64, 64, 4, 2), _tile("small", 32, 64, 64, 4, 2)),
    },
    "recur": {80: _RECUR[80], 90: _RECUR[90], 100: _RECUR[80], 120: _RECUR[80]},
    "recur_lstm": dict.fromkeys(ARCHITECTURES, _RECUR_LSTM[80]) | _RECUR_LSTM,
    "fused": {
        80: (_units("large", 128, 128, 32, 8, 4),),
        90: (_units("large", 128, 128, 64, 8, 3),),
        100: (_units("large", 64, 128, 64, 8, 3),),
        120: (_units("large", 64, 128, 32, 8, 4),),
    },
    "reverse": {
        80: _RECUR[80],
        90: (_units("large", 128, 64, 64, 8, 3), _units("medium", 64, 64, 32, 4, 4), _RECUR_SMALL),
        100: _RECUR[80],
        120: _RECUR[80],
    },
    "reverse_lstm": dict.fromkeys(ARCHITECTURES, _RECUR_LSTM[80]) | _RECUR_LSTM,
    "outer": {
        80: (_outer("large", 128, 128, 32, 8, 3), _outer("small", 64, 64, 32, 4, 3)),
        90: (_outer("large", 128, 128, 64, 8, 3), _outer("small", 64, 64, 64, 4, 3)),
        100: (_outer("large", 128, 128, 64, 8, 3), _outer("small", 64, 64, 64, 4, 3)),
        120: (_outer("large", 128, 128, 32, 8, 3), _outer("small", 64, 64, 32, 4, 3)),
    },
    "layer_gradient": {
        80: (_tile("large", 128, 128, 64, 8, 3), _tile("small", 32, 64, 64, 4, 3)),
        90: (_tile("large", 128, 128, 64, 8, 3), _tile("small", 64, 64, 64, 4, 3)),
        100: (_tile("large", 128, 128, 64, 8, 3), _tile("small", 64, 64, 64, 4, 3)),
        120: (_tile("large", 128, 64, 64, 8, 3), _tile("small", 32, 64, 64, 4, 3)),
    },
    # The layer norm's: one more sum, and a mean.
    "layer_gradient_mean": dict.fromkeys(
        ARCHITECTURES, (_tile("large", 128, 64, 64, 8, 3), _tile("small", 32, 64, 64, 4, 3))
    ),
}

# Rows that are not whole 16-byte pieces come number by number, through registers: small tiles, for all architectures.
_ODD: dict[str, tuple[Config, ...]] = {
    "project": (_tile("odd", 32, 32, 32, 4, 1),),
    "recur": (_units("odd", 16, 32, 32, 8, 1), _units("odd-small", 16, 16, 16, 2, 1)),
    "reverse": (_units("odd", 16, 16, 32, 4, 1),),
    "outer": (_outer("odd", 32, 32, 16, 4, 1),),
    "layer_gradient": (_tile("odd", 16, 32, 32, 4, 1),),
}

# float32 is multiplied as such, by fused multiply-adds: accumulators are the limit, the same everywhere.
_FLOAT: dict[str, tuple[Config, ...]] = {
    "project": (_tile("float", 64, 64, 16, 8, 2), _tile("float-small", 64, 32, 16, 4, 2)),
    "recur": (
        _up_to(128, _units("float", 32, 32, 16, 8, 2)),
        _up_to(168, _units("float-small", 32, 16, 16, 4, 2)),
    ),
    "reverse": (_up_to(255, _units("float", 32, 64, 16, 4, 2)), _up_to(168, _units("float-small", 16, 32, 16, 4, 2))),
    "outer": (_up_to(128, _outer("float", 64, 64, 16, 8, 2)), _outer("float-small", 64, 32, 16, 4, 2)),
    "layer_gradient": (_tile("float", 32, 64, 16, 8, 2), _tile("float-small", 32, 32, 16, 4, 2)),
}

# Small kernels between the products; the dtype hardly matters.
_SMALL: dict[str, Config] = {
    "fold": Config("rows", {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 256}, 4, 1),
    "describe": Config("table", {}, 1, 1),
    "reduce_weight": Config("tile", {"BLOCK_M": 16, "BLOCK_N": 64}, 8, 1),
    "reduce_norm": Config("columns", {"BLOCK_M": 16, "BLOCK_N": 64}, 4, 1),
    "reduce_bias": Config("columns", {"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1),
}

_INTERPRETED: dict[str, tuple[Config, ...]] = {
    "project": (_tile("interpreter", 16, 64, 32, 1, 1),),
    "recur": (_units("interpreter", 16, 32, 32, 1, 1),),
    "fused": (_units("interpreter", 16, 32, 32, 1, 1),),
    "reverse": (_units("interpreter", 16, 32, 32, 1, 1),),
    "outer": (_outer("interpreter", 64, 64, 16, 1, 1),),
    "layer_gradient": (_tile("interpreter", 16, 64, 32, 1, 1),),
}

KERNELS = (*_HALF, *_SMALL)


def configs(kernel: str, arch: int, itemsize: int, regular: bool = True) -> tuple[Config, ...]:
    """The configurations of a kernel, from the largest tiles to the smallest, by the name ``kernel/name``.

    Args:
        kernel (str): one of ``KERNELS``.
        arch (int): one of ``ARCHITECTURES``, or ``INTERPRETER``.
        itemsize (int): bytes of a weight's number, 2 or 4.
        regular (bool): all rows are whole 16-byte pieces.
    """
    return _configs(kernel, arch, itemsize, regular, _every)


@functools.cache
def _configs(kernel: str, arch: int, itemsize: int, regular: bool, every: bool) -> tuple[Config, ...]:
    own = kernel.removesuffix("_lstm").removesuffix("_mean").removesuffix("_wide")
    if kernel in _SMALL:
        found: tuple[Config, ...] = (_SMALL[kernel],)
    elif arch == INTERPRETER:
        found = _INTERPRETED[own]
    elif not regular and own in _ODD:
        found = _ODD[own]
    else:
        found = _FLOAT.get(own, ()) if itemsize == 4 else _HALF[kernel][arch]
    return named(kernel, found, arch, every)


def named(kernel: str, found: Sequence[Config], arch: int, every: bool) -> tuple[Config, ...]:
    """A kernel's configurations under their full names, without those that are excluded unless ``every`` counts."""
    full = (config._replace(name=f"{kernel}/{config.name}") for config in found)
    return tuple(config for config in full if every or arch not in EXCLUDED.get(config.name, {}))


_every = False


def every_counts() -> bool:
    """Whether excluded ones count; see :func:`with_excluded`."""
    return _every


@contextlib.contextmanager
def with_excluded() -> Iterator[None]:
    """Inside, those that are excluded count, too: for the gates, which have to see that they still fail."""
    global _every
    before, _every = _every, True
    try:
        yield
    finally:
        _every = before


def choose(found: tuple[Config, ...], programs: Callable[[dict[str, int]], int], wanted: int) -> Config:
    """The first configuration that has at least ``wanted`` programs, counted from its blocks; or the last."""
    return next((config for config in found if programs(config.blocks) >= wanted), found[-1])


def supported(major: int, minor: int) -> int:
    """The architecture whose configurations serve a device of this capability: the largest that is not newer.

    8.6 and 8.9 have the shared memory of 12.0, 99 KB a block, and so its tiles.
    """
    capability = 10 * major + minor
    if capability in (86, 89):
        return 120
    return max((arch for arch in ARCHITECTURES if arch <= capability), default=ARCHITECTURES[0])
