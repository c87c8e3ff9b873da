"""Which of the GPU's two backends a call prefers: a table for each family, whose first line that applies decides."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """One line of the choice between the GPU's backends, and what it rests on."""

    capabilities: tuple[int, ...]  # 10 * major + minor; none: every one
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]  # the family's own: a rank, a block; none: every one
    backend: str
    basis: str


def prefer(rules: Sequence[Rule], device: torch.device, dtype: torch.dtype, size: int) -> tuple[str, ...]:
    """The GPU's backends in the order in which they are tried; empty for tensors that are elsewhere."""
    # Tensors may claim a device that is not there: those without data, of torch.export and fake modes.
    if device.type != "cuda" or not torch.cuda.is_available():
        return ()
    capability = _capability(device.index if device.index is not None else torch.cuda.current_device())
    for rule in rules:
        if (
            (not rule.capabilities or capability in rule.capabilities)
            and dtype in rule.dtypes
            and (not rule.sizes or size in rule.sizes)
        ):
            return (rule.backend, *(name for name in ("triton", "cuda") if name != rule.backend))
    return ("triton", "cuda")


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
