"""Following a stack of layers as it runs, by hooks, without keeping anything between calls."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyeff.recipes._stacks import Stack


class Session(Protocol):
    """What one call of a stack goes through."""

    def layer(self, index: int, output: Tensor) -> None:
        """A layer returned ``output``."""

    def close(self, output: Tensor) -> Tensor | None:
        """The stack returns ``output``: what to return instead, or None to leave it."""


class Local(threading.local):
    """Per-thread attributes. A copy starts empty, so that a hooked model can be copied."""

    def __reduce__(self):
        return (type(self), ())


class Watcher:
    """Hooks on a stack: opens a session when the stack is called, feeds it the layer outputs and lets it change the
    result.

    A session lives from the opener's entry to the closer's return, in the thread that runs it. Layers that run outside,
    as when activation checkpointing computes them again, are ignored.

    Args:
        stack (Stack): what to follow.
        begin (callable): ``begin(args, kwargs)`` of the opener's call returns a :class:`Session`, or None to stay out.
        layers (sequence of int): the layers whose outputs count.
        first_input (callable, optional): called as ``first_input(session, tensor)`` with the first layer's input.

    Attributes:
        active (bool): False opens no session.
    """

    def __init__(
        self,
        stack: Stack,
        begin: Callable[[tuple, dict], Any],
        layers: Sequence[int],
        first_input: Callable[[Any, Tensor], None] | None = None,
    ) -> None:
        self.stack, self._begin, self._first_input, self._local = stack, begin, first_input, Local()
        self.active = True
        self._handles = [stack.opener.register_forward_pre_hook(self._open, with_kwargs=True)]
        if first_input is not None:
            self._handles.append(stack.layers[0].register_forward_pre_hook(self._enter, with_kwargs=True))
        for i in layers:
            self._handles.append(stack.layers[i].register_forward_hook(functools.partial(self._layer, i)))
        # Called also when the call raises, so that no session outlives it.
        self._handles.append(stack.closer.register_forward_hook(self._close, always_call=True))
        if stack.closer is not stack.opener and stack.opener is not stack.layers[0]:
            self._handles.append(stack.opener.register_forward_hook(self._leave, always_call=True))

    @property
    def session(self) -> Any:
        """The :class:`Session` that is open in this thread."""
        return getattr(self._local, "session", None)

    def remove(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._local = Local()

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._local.session = None
        if self.active:
            self._local.session = self._begin(args, kwargs)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.session is not None and self._first_input is not None:
            self._first_input(self.session, first_tensor((*args, *kwargs.values()), "the first layer's input"))

    def _layer(self, index: int, module: nn.Module, args: tuple, output: Any) -> None:
        if self.session is not None:
            self.session.layer(index, first_tensor(output, f"the output of {self.stack.name}[{index}]"))

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        session, self._local.session = self.session, None
        if output is None:  # the call raised
            return None
        if session is None and self._recomputed():
            raise RuntimeError(
                f"{self.stack.name}: the last layer's output is corrected, and activation checkpointing computes it "
                "again without the other layers; name a module outside of the checkpoint with output="
            )
        if session is None:
            return None
        result = session.close(first_tensor(output, f"the output of {type(module).__name__}"))
        return None if result is None else replace_first(output, result)

    def _recomputed(self) -> bool:
        """Whether the last of some listed layers runs on its own during a backward pass."""
        alone = self.stack.opener is self.stack.layers[0] and self.stack.closer is self.stack.layers[-1]
        return alone and self.active and torch._C._current_graph_task_id() != -1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._local.session = None


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    if isinstance(output, (tuple, list)):
        return enumerate(output)
    if dataclasses.is_dataclass(output):
        return ((f.name, getattr(output, f.name)) for f in dataclasses.fields(output))
    return ()


def first_tensor(output: Any, what: str) -> Tensor:
    """The first floating-point tensor of a module's output: a tensor, tuple, list, mapping or dataclass.

    Raises:
        ValueError: there is none; ``what`` names it.
    """
    if isinstance(output, Tensor):
        return output
    for _, item in _items(output):
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise ValueError(f"{what} is a {type(output).__name__} without a tensor, expected a tensor or a tuple that has one")


def replace_first(output: Any, new: Tensor) -> Any:
    """``output`` with ``new`` in the place of its first tensor, and as its last hidden state where it lists them."""
    if isinstance(output, Tensor):
        return new
    key, old = next((k, v) for k, v in _items(output) if isinstance(v, Tensor) and v.is_floating_point())
    if isinstance(output, tuple):
        items = [*output[:key], new, *output[key + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    indexed = isinstance(output, (list, Mapping))
    assign: Any = type(output).__setitem__ if indexed else setattr
    assign(output, key, new)
    states = getattr(output, "hidden_states", None)
    if isinstance(states, tuple) and states and states[-1] is old:
        assign(output, "hidden_states", (*states[:-1], new))
    return output


class Freeze:
    """Parameters set to ``requires_grad=False``, and how they were before.

    Args:
        parameters (iterable of Parameter): to freeze.
        keep (iterable of Parameter): those of them that shall train.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], keep: Iterable[nn.Parameter] = ()) -> None:
        trained = {id(p) for p in keep}
        self._before = [(p, p.requires_grad) for p in parameters]
        for p, _ in self._before:
            p.requires_grad_(id(p) in trained)

    def restore(self) -> None:
        """Every parameter's ``requires_grad`` as it was."""
        for p, flag in self._before:
            p.requires_grad_(flag)
