"""Ctrl-C between two steps of a training, where what is in memory can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Within it, an interrupt (SIGINT) in the middle of a step is raised at its end; a second one at once.

    Only where Python's own handler is in place, and in the main thread, which alone may set another.

    Attributes:
        inside (bool): whether a step has begun and not ended.
    """

    def __init__(self) -> None:
        self.inside = False
        self._asked = self._set = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._set = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._set:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._set:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: Any) -> None:
        # Workers that load data end by the same Ctrl-C: who waits for them must not wait on.
        if not self.inside or self._asked:
            raise KeyboardInterrupt
        self._asked = True

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step; one that fails stays begun."""
        self.inside = True
        yield
        self.inside = False
        if self._asked:
            raise KeyboardInterrupt
