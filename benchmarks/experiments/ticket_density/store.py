"""What is kept: results as JSON after every training, masks and weights that later trainings need beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import machine
from .methods import Job
from .train import Bench, Settings

SCHEMA = 1


class Store:
    """The result of one experiment, on disk whenever it changes.

    Args:
        path (Path): the JSON. What is in it already stays.
        settings (Settings): must be those of the JSON.
        state (Path): a folder for masks and weights; each combination of settings has its own within.

    Attributes:
        found (dict): the result.

    Raises:
        ValueError: the JSON is something else, or of other settings.
    """

    def __init__(self, path: Path, settings: Settings, state: Path) -> None:
        self.path, own = path, dataclasses.asdict(settings)
        if path.exists():
            self.found = load(path)
            differ = [name for name in own if own[name] != self.found["settings"].get(name)]
            if differ:
                told = ", ".join(f"{name} {self.found['settings'].get(name)!r}, not {own[name]!r}" for name in differ)
                raise ValueError(f"{path} is a result of {told}: use its settings or another file")
        else:
            self.found = {"schema": SCHEMA, "settings": own, "trainings": [], "checks": [], "times": []}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
        self.state = state / digest
        self.state.mkdir(parents=True, exist_ok=True)

    def describe(self, bench: Bench) -> None:
        """Writes down what the result belongs to."""
        corpus = bench.corpus
        self.found |= {
            "trained": place(),
            "model": "all-MiniLM-L6-v2",
            "corpus": {
                "name": corpus.name,
                "classes": len(corpus.labels),
                "train": len(corpus.train),
                "test": len(corpus.test),
                "majority": corpus.majority(),
            },
        }

    def has(self, job: Job) -> bool:
        return any(same(row, job) for row in self.found["trainings"])

    def keep(self, job: Job, row: dict[str, Any]) -> None:
        """Takes a training into the result; one of the same job is replaced."""
        rows = self.found["trainings"]
        rows[:] = [r for r in rows if not same(r, job)] + [row]
        self.save()

    def save(self) -> None:
        """Writes the JSON, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.found, indent=1)
        # A list or object without others inside goes on one line: losses are many and short.
        flat = re.sub(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(flat + "\n")
        os.replace(fresh, self.path)

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that :meth:`write` has left, if it has."""
        file = self.state / f"{name}.pt"
        return torch.load(file) if file.exists() else None

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        fresh = self.state / f"{name}.part"
        torch.save({key: t.clone() for key, t in tensors.items()}, fresh)
        os.replace(fresh, self.state / f"{name}.pt")

    def drop(self, name: str) -> None:
        (self.state / f"{name}.pt").unlink(missing_ok=True)


def place() -> dict[str, Any]:
    """When, by which commit and on what machine."""
    return {
        "date": machine.now(),
        "commit": machine.commit(),
        "machine": machine.cpu(),
        "versions": machine.versions(),
    }


def same(row: dict[str, Any], job: Job) -> bool:
    return (row["method"], row["density"], row["seed"]) == dataclasses.astuple(job)


def load(path: Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(Path(path).read_text())
        if found.get("schema") != SCHEMA or not {"settings", "trainings", "times"} <= set(found):
            raise ValueError(f"{path} is no result of this experiment")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of this experiment: {error}") from error
    return found
