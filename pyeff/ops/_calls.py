"""What every op asks of its tensors: shape and kind, autocast's dtype, and what is being done to the call."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKeySet,
    _dispatch_keys,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import TransformType, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad


def unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are tensors and nothing else, in a call that nothing watches: no compiler, profiler, mode or
    transform."""
    return (
        not torch.compiler.is_compiling()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and _get_tracing_state() is None
        and peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


@functools.cache
def _ordinary(keys: int) -> bool:
    """Whether a tensor of these dispatch keys is its memory; no lazy negative, zero, batch or the like."""
    names = str(DispatchKeySet.from_raw_repr(keys)).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
    known = ("ADInplaceOrView", *(kind + device for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")))
    return all(name in known for name in names)


def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an op may be called as the function behind it, if no derivative is wanted as its kernels' function.

    The dispatcher's way to Python and back takes as long as a small kernel; what it is there for is all that this asks.
    """
    return unwatched(tensors) and all(t is None or _ordinary(_dispatch_keys(t).raw_repr()) for t in tensors)


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def checked_number(op: str, name: str, value: object) -> float:
    """A number of Python's, NumPy's or a tracer's as a float.

    Raises:
        ValueError: it is something else. A tensor is, too: its value would have to be waited for.
    """
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # must not be asked for its value
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        came = repr(value) if isinstance(value, (str, bool)) else f"a {type(value).__name__}"
        raise ValueError(f"{op}: {name} is {came}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is too large for a float, expected a number") from None


def check_tensor(
    op: str,
    name: str,
    t: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
    as_what: str = "w_ih",
) -> None:
    """Raises ValueError unless ``t`` has this shape, the dtype (or ``dtype``) and device of ``like``, and is dense."""
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected {list(shape)}")
    if t.dtype != (dtype or like.dtype):
        raise ValueError(f"{op}: {name} is {t.dtype}, expected {dtype or like.dtype} as {as_what}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {like.device} as {as_what}")
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} has layout {t.layout}, expected torch.strided (a dense tensor)")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device; None where it is off."""
    # torch knows no autocast for some devices (meta) and raises when asked.
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Floating-point tensors in autocast's dtype; float64 is left alone."""
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def transform_of(tensors: list[Tensor | None]) -> str:
    """What only the reference can follow: a derivative in forward mode, or torch.func's transforms; or nothing.

    torch would run the kernels on the values alone, and give derivatives of zero without a word.
    """
    transform = peek_interpreter_stack()
    # Asking every tensor costs some microseconds. Where there is no dual level, no tensor has a tangent; but a graph
    # that torch.compile traces enters its level unseen by forward_ad, with tensors of a subclass.
    plain = type(tensors[0]) in (Tensor, torch.nn.Parameter)
    if plain and transform is None and getattr(forward_ad, "_current_level", 0) < 0:
        return ""
    given = [t for t in tensors if t is not None]
    if transform is not None and any(is_functorch_wrapped_tensor(t) for t in given):
        forward = transform.key() == TransformType.Jvp
        return "forward-mode differentiation" if forward else "a transform of torch.func (grad, vmap)"
    # There is one level, 0: nested ones are those of torch.func.
    dual = any(t.is_floating_point() and forward_ad.unpack_dual(t, level=0).tangent is not None for t in given)
    return "forward-mode differentiation" if dual else ""


def refuse_tangents(op: str, backend: str, tensors: list[Tensor | None]) -> None:
    """A graph compiled for tensors without tangents calls the kernels with whatever it is given later."""
    if transform := transform_of(tensors):
        raise RuntimeError(f"{op}: {transform} is not supported by the {backend} kernels")
