"""pyeff: fused kernels for reusing large networks.

``pyeff.ops`` holds the operations, ``pyeff.reference`` their definitions in plain PyTorch, ``pyeff.nn`` the modules and
``pyeff.recipes`` the workflows on real models. ``pyeff.info()`` says which implementation of each operation runs on this
machine, and why the others do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pyeff._version import __version__

if TYPE_CHECKING:
    from pyeff import nn, ops, recipes, reference  # noqa: F401
    from pyeff.backends import backend, info

# All but the version loads on first use, torch included: ``pyeff --help`` answers at once.
_SUBMODULES = ("nn", "ops", "recipes", "reference")

__all__ = ["__version__", "backend", "info", *_SUBMODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"pyeff.{name}")
    if name in ("backend", "info"):
        return getattr(importlib.import_module("pyeff.backends"), name)
    raise AttributeError(f"module 'pyeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
