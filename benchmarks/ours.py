"""Our own contenders, for every operation: by the backend that ``auto`` takes, or by one of the GPU's by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff import backends

from .registry import Call, Unavailable


def need_kernels(op: str, like: Tensor) -> None:
    """Raises Unavailable where nothing but the reference would serve ``op`` on tensors like this one."""
    kernels = [name for name in backends.OPS[op] if name != "reference"]
    reasons = [backends.refusal(op, name, like.device, like.dtype) for name in kernels]
    if all(reasons):
        raise Unavailable("; ".join(f"{name}: {reason}" for name, reason in zip(kernels, reasons, strict=True)))
    if backends.choose(op, like.device, like.dtype) == "reference":
        raise Unavailable("the reference was chosen (PYEFF_BACKEND or pyeff.backend)")


def by_name(op: str, name: str, like: Tensor, calls: Sequence[Call]) -> list[Call]:
    """The calls with a backend in force.

    Raises:
        Unavailable: it cannot serve ``op`` on tensors like this one.
    """
    if reason := backends.refusal(op, name, like.device, like.dtype):
        raise Unavailable(reason)

    def one(call: Call) -> Call:
        def named() -> Sequence[Tensor]:
            with backends.backend(name):
                return call()

        return named

    return [one(call) for call in calls]


def gpu_order(op: str, dtype: torch.dtype, preferred: Sequence[str]) -> tuple[str, ...]:
    """The GPU's backends, first the one that ``auto`` takes on this machine's device (or would, without a device)."""
    order = tuple(name for name in backends.OPS[op] if backends.DEVICE.get(name) == "cuda")
    if not torch.cuda.is_available():
        return order
    device = torch.device("cuda", torch.cuda.current_device())
    return tuple(sorted(preferred or order, key=lambda name: bool(backends.refusal(op, name, device, dtype))))
