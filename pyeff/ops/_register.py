"""How an op's inner halves are registered: the kernels for each device, a fake, and the formula of the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def composite(lib: torch.library.Library, name: str, function: Callable[..., Any]) -> None:
    """An op that checks, casts and chooses, and is made of others."""
    lib.impl(name, function, "CompositeImplicitAutograd")
    # vmap decomposes no op of Python's by itself.
    lib.impl(name, function, "FuncTorchBatched")


def kernels(
    lib: torch.library.Library,
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
) -> None:
    """An op that runs kernels of the backend that it is told."""
    for device in ("CPU", "CUDA"):
        lib.impl(name, function, device)
    torch.library.register_fake(f"pyeff::{name}", fake, lib=lib)
    if backward is not None:
        torch.library.register_autograd(f"pyeff::{name}", backward, setup_context=setup, lib=lib)


def no_double_backward(lib: torch.library.Library, name: str, op: str) -> None:
    """Lets a derivative of the derivative ``pyeff::name`` fail by name."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{op}: double backward is not supported (create_graph=True); use backend 'reference'")

    torch.library.register_autograd(f"pyeff::{name}", refuse, lib=lib)
