"""What the ops of the multimask family ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff.ops._calls import check_tensor
from pyeff.plans import MaskPlan
from pyeff.reference.multimask import integer_seed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_plan(op: str, plan: object) -> None:
    """Raises ValueError unless it is one."""
    if not isinstance(plan, MaskPlan):
        raise ValueError(f"{op}: plan is a {type(plan).__name__}, expected a pyeff.MaskPlan")


def check_floating(op: str, **tensors: object) -> None:
    """Raises ValueError unless all of them are tensors of numbers that the kernels know."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} is a {type(t).__name__}, expected a tensor")
        if t.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def check_option(op: str, name: str, value: object, options: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the options."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, options))}")


def check_eps(op: str, eps: float) -> None:
    """Raises ValueError unless the number keeps a division from zero."""
    if not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}, expected a finite number above 0")


def checked_seed(op: str, seed: object, device: torch.device) -> Tensor:
    """A seed as an int64 tensor of one number on ``device``.

    Raises:
        ValueError: it is neither an integer of 64 bits nor such a tensor.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"{op}: seed is {seed.dtype} {list(seed.shape)} on {seed.device}, expected one int64 on {device}"
            )
        return seed.reshape(())
    return torch.full((), integer_seed(op, seed), dtype=torch.int64, device=device)


def check_seed(op: str, seed: Tensor, like: Tensor) -> None:
    """Raises ValueError unless this is one int64 on the device of ``like``."""
    if seed.numel() != 1:
        raise ValueError(f"{op}: seed has shape {list(seed.shape)}, expected one number")
    check_tensor(op, "seed", seed, tuple(seed.shape), like, torch.int64, "a seed is")


def check_sample_ids(op: str, sample_ids: object, batch: int, like: Tensor) -> None:
    """Raises ValueError unless these are int64 names of the samples, or None."""
    if sample_ids is None:
        return
    if (
        not isinstance(sample_ids, Tensor)
        or sample_ids.dtype != torch.int64
        or tuple(sample_ids.shape) != (batch,)
        or sample_ids.device != like.device
    ):
        what = (
            f"{sample_ids.dtype} {list(sample_ids.shape)} on {sample_ids.device}"
            if isinstance(sample_ids, Tensor)
            else f"a {type(sample_ids).__name__}"
        )
        raise ValueError(f"{op}: sample_ids is {what}, expected int64 [{batch}] on {like.device}")
