"""pyeff: fused kernels for reusing large networks.

``pyeff.ops`` holds the operations, ``pyeff.reference`` their definitions in plain PyTorch, ``pyeff.nn`` the modules
and ``pyeff.recipes`` the workflows on real models. ``pyeff.info()`` says which implementation of each operation runs on
this machine, and why the others do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Importing pyeff registers its operations: torch.ops.pyeff.* is there as soon as pyeff is.
from pyeff import ops, reference
from pyeff._version import __version__
from pyeff.backends import backend, info
from pyeff.plans import MaskPlan, Ticket

if TYPE_CHECKING:
    from pyeff import nn, recipes

# Load on first use: who only calls operations does not wait for them.
_LAZY = ("nn", "recipes")

__all__ = ["MaskPlan", "Ticket", "__version__", "backend", "info", "nn", "ops", "recipes", "reference"]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"pyeff.{name}")
    raise AttributeError(f"module 'pyeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
