"""The workflows: an operation put to work on a real model.

``from pyeff.recipes import multimask, read, ticket``. Each recipe loads on first use, and imports transformers and
safetensors only where it needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyeff.recipes import multimask, read, ticket

__all__ = ["multimask", "read", "ticket"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"pyeff.recipes.{name}")
    raise AttributeError(f"module 'pyeff.recipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
