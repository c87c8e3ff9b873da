"""Trained parts in safetensors files, with the configuration that they belong to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_KEY = "pyeff"


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes ``tensors``, with ``config`` as JSON in the file's metadata."""
    from safetensors.torch import save_file

    # Copies, since safetensors refuses tensors that share memory.
    owned = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(owned, os.fspath(path), metadata={_KEY: json.dumps(config, sort_keys=True)})


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    """What safetensors has against a file, as a ValueError; a file that cannot be opened stays an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read, expected a safetensors file: {error}") from error


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration in a file's metadata.

    Raises:
        ValueError: the file is no safetensors file, or has none.
    """
    from safetensors import safe_open

    with _readable(path), safe_open(os.fspath(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if _KEY not in metadata:
        raise ValueError(
            f"{os.fspath(path)} has no pyeff configuration in its metadata, expected a file saved by a recipe"
        )
    try:
        config = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} has a configuration that is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{os.fspath(path)} has a {type(config).__name__} as its configuration, expected an object")
    return config


def load(path: str | os.PathLike, into: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Copies a file's tensors into ``into``, once configuration, names and shapes were found to fit.

    Floating-point numbers are cast to the dtype that they are loaded into; any other dtype must be the same.

    Raises:
        ValueError: the file cannot be read, or they do not fit; the message says where, and nothing was written.
    """
    from safetensors.torch import load_file

    theirs, mine = read_config(path), json.loads(json.dumps(config))
    wrong = [
        f"{key} is {theirs.get(key)!r} in the file, expected {mine.get(key)!r}"
        for key in sorted({*theirs, *mine})
        if theirs.get(key) != mine.get(key)
    ]
    if wrong:
        raise ValueError(f"{os.fspath(path)} does not fit: {'; '.join(wrong)}")
    with _readable(path):
        tensors = load_file(os.fspath(path))
    wrong = [f"{name} is missing" for name in sorted(into.keys() - tensors.keys())]
    wrong += [f"{name} was not expected" for name in sorted(tensors.keys() - into.keys())]
    wrong += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(t.shape)}"
        for name, t in sorted(into.items())
        if name in tensors and tensors[name].shape != t.shape
    ]
    wrong += [
        f"{name} has dtype {tensors[name].dtype}, expected {t.dtype}"
        for name, t in sorted(into.items())
        if name in tensors
        and tensors[name].dtype != t.dtype
        and not (tensors[name].is_floating_point() and t.is_floating_point())
    ]
    if wrong:
        raise ValueError(f"{os.fspath(path)} does not fit: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, t in into.items():
            t.copy_(tensors[name])
