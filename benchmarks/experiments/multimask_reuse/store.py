"""The result on disk, written after every training."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from ..ticket_density.store import place
from .data import Task
from .train import Settings

SCHEMA = 1


class Store:
    """The result of one experiment.

    Args:
        path (Path): the JSON; trainings that are in it already stay.
        settings (dict of Settings): by modality; must be those of the JSON.

    Attributes:
        found (dict): the result.

    Raises:
        ValueError: the JSON is something else, or of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Settings]) -> None:
        self.path = path
        own = {kind: dataclasses.asdict(s) for kind, s in settings.items()}
        if path.exists():
            self.found = load(path)
            for kind, mine in own.items():
                theirs = self.found["settings"].setdefault(kind, mine)
                differ = [
                    f"{name} {theirs.get(name)!r}, not {mine[name]!r}"
                    for name in mine
                    if theirs.get(name) != mine[name]
                ]
                if differ:
                    raise ValueError(f"{path} is a result of {kind} with {', '.join(differ)}: use another file")
        else:
            self.found = {"schema": SCHEMA, "settings": own, "data": {}, "trainings": []}

    def describe(self, task: Task, shared: bool) -> None:
        """Writes down what the trainings to come belong to."""
        self.found |= {"trained": place() | {"shared": shared}}
        self.found["data"][task.kind] = task.facts()

    def has(self, kind: str, masks: int, path: str, seed: int) -> bool:
        return any(
            (r["kind"], r["masks"], r["path"], r["seed"]) == (kind, masks, path, seed) for r in self.found["trainings"]
        )

    def keep(self, row: dict[str, Any]) -> None:
        """Takes a training into the result, and writes it, whole or not at all."""
        self.found["trainings"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.found, indent=1)
        # A list or object without others inside goes on one line.
        flat = re.sub(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(flat + "\n")
        os.replace(fresh, self.path)


def load(path: Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(Path(path).read_text())
        if found.get("schema") != SCHEMA or not {"settings", "data", "trainings"} <= set(found):
            raise ValueError(f"{path} is no result of this experiment")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of this experiment: {error}") from error
    return found
