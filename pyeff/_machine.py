"""Facts about this machine, for ``pyeff.info()``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch


def describe() -> dict[str, object]:
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
