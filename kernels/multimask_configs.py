"""Blocks of the multimask family's Triton kernels; see configs.py.

All of them move more than they compute: a thread has 16 bytes of a 16-bit tensor in hand, and blocks are small enough
for an SM to hold several, so that enough is on its way. The dtype hardly matters, the architecture neither.
"""

from __future__ import annotations

import functools

from . import configs
from .configs import INTERPRETER, Config

# Tokens that a program of ``whole`` holds, and the channels beside them.
WHOLE = (256, 512, 1024)
# Channels of a token that a program of ``rows`` holds.
ROW = 1024
# Tokens of a mask that one program holds.
MASK = (256, 1024)

_CONFIGS: dict[str, Config] = {
    "multimask_gather": Config("rows", {"BLOCK_R": 8, "BLOCK_C": 256}, 8, 1),
    "multimask_sum": Config("rows", {"BLOCK_T": 4, "BLOCK_C": 256}, 4, 1),
    "multimask_scatter": Config("row", {"BLOCK_C": 256}, 2, 1),
    "multimask_add": Config("columns", {"BLOCK_P": 64, "BLOCK_N": 64}, 8, 1),
    "multimask_add_few": Config("columns", {"BLOCK_P": 512, "BLOCK_N": 16}, 8, 1),
    "multimask_whole256": Config("sample", {"BLOCK_T": 256, "BLOCK_C": 32}, 8, 1),
    "multimask_whole512": Config("sample", {"BLOCK_T": 512, "BLOCK_C": 32}, 16, 1),
    "multimask_whole1024": Config("sample", {"BLOCK_T": 1024, "BLOCK_C": 16}, 16, 1),
    "multimask_statistics": Config("columns", {"BLOCK_T": 64, "BLOCK_C": 64}, 8, 1),
    "multimask_apply": Config("tile", {"BLOCK_T": 8, "BLOCK_C": 256}, 8, 1),
    "multimask_rows": Config("tokens", {"BLOCK_T": 2, "BLOCK_C": ROW}, 8, 1),
    "multimask_loss": Config("tile", {"BLOCK_T": 4, "BLOCK_C": 256, "AHEAD": 4}, 4, 1, 112),
    "multimask_moments": Config("tile", {"BLOCK_T": 4, "BLOCK_C": 128, "AHEAD": 8}, 4, 1, 160),
    "multimask_cosine": Config("tokens", {"BLOCK_T": 2, "BLOCK_C": 1024}, 8, 1),
    "multimask_finish": Config("columns", {"BLOCK_P": 1024, "BLOCK_G": 64, "BLOCK_N": 32}, 8, 1),
    "multimask_rescale": Config("numbers", {"BLOCK": 4096}, 8, 1),
    "multimask_bias": Config("places", {"BLOCK": 2048}, 8, 1),
    "multimask_mask256": Config("row", {"BLOCK_T": 256}, 2, 1),
    "multimask_mask1024": Config("row", {"BLOCK_T": 1024}, 4, 1),
    "multimask_ema": Config("numbers", {"BLOCK": 4096}, 8, 1),
}

# Few programs, each of them as large as tests of what several do allow.
_INTERPRETED: dict[str, dict[str, int]] = {
    "multimask_gather": {"BLOCK_R": 64, "BLOCK_C": 32},
    "multimask_sum": {"BLOCK_T": 16, "BLOCK_C": 32},
    "multimask_scatter": {"BLOCK_C": 32},
    "multimask_statistics": {"BLOCK_T": 64, "BLOCK_C": 32},
    "multimask_apply": {"BLOCK_T": 64, "BLOCK_C": 32},
    "multimask_rows": {"BLOCK_T": 16, "BLOCK_C": 64},
    "multimask_loss": {"BLOCK_T": 16, "BLOCK_C": 32, "AHEAD": 2},
    "multimask_moments": {"BLOCK_T": 16, "BLOCK_C": 32, "AHEAD": 2},
    "multimask_cosine": {"BLOCK_T": 16, "BLOCK_C": 32},
    "multimask_bias": {"BLOCK": 512},
    "multimask_ema": {"BLOCK": 512},
}

KERNELS = tuple(_CONFIGS)


def config(kernel: str, arch: int) -> Config:
    """The configuration of a kernel, by the name ``kernel/name``.

    Raises:
        RuntimeError: it is excluded on this architecture.
    """
    return _config(kernel, arch, configs.every_counts())


@functools.cache
def _config(kernel: str, arch: int, every: bool) -> Config:
    found = _CONFIGS[kernel]
    if arch == INTERPRETER and kernel in _INTERPRETED:
        found = found._replace(blocks=_INTERPRETED[kernel])
    allowed = configs.named(kernel, (found,), arch, every)
    if not allowed:
        raise RuntimeError(f"every configuration of {kernel} is excluded on sm_{arch}")
    return allowed[0]
