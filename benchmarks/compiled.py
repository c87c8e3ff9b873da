"""torch.compile for contenders: one graph for a method and setting, with the number of tokens left open."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .registry import Unavailable


def compiled(function: Callable[..., Any], device: str = "cpu", fullgraph: bool = True) -> Callable[..., Any]:
    """``torch.compile(fullgraph=...)`` of a private copy of ``function``.

    Dynamo keeps its graphs by code object and gives up after eight for one; a copy for each cell, dtype and mode keeps
    the benchmark from running into that and falling back to eager unseen.

    Raises:
        Unavailable: there is no compiler that Inductor could use for ``device``.
    """
    reason = unavailable_reason(device)
    if reason:
        raise Unavailable(reason)
    if isinstance(function, types.FunctionType):
        copy = types.FunctionType(
            function.__code__.replace(co_name=function.__name__),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        function = copy
    return torch.compile(function, fullgraph=fullgraph)


def unavailable_reason(device: str = "cpu") -> str:
    """Why Inductor cannot compile for the device here; an empty string where it can."""
    if device == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton for a GPU: it is not installed"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # Inductor has several classes for it, none of them public
        return f"torch.compile has no C++ compiler: {str(error).splitlines()[0][:120]}"
    return ""


def open_tokens(tensors: Iterable[Tensor]) -> None:
    """Tells Dynamo that the first dimension varies, so that a new number of tokens compiles nothing (one is its own
    case).

    The mark stays on the tensors, which the contenders share, and one may have a reason to specialise: a hint, not a
    demand.
    """
    for t in tensors:
        if t.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(t, 0)
