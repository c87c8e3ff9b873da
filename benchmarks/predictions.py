"""Predictions: the GPU kernels by the model, against the floor, as tables. None of it was ever timed.

A prediction is computed where it is shown and is stored in no result. What it rests on is listed under it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model, multimask_plan, plans, read_plan, ticket_plan
from .gpus import CARDS, Card
from .model import Prediction
from .plans import Family
from .registry import FORWARD, TRAINING, matches
from .report import Table, fill_marked, seconds

ROOT = Path(__file__).resolve().parent.parent
# By the name of a row, or one of a row's operations.
FAMILIES = {"read": read_plan.FAMILY, "ticket": ticket_plan.FAMILY} | {
    f"multimask/{op}": family for op, family in multimask_plan.FAMILIES.items()
}
BACKENDS = ("triton", "cuda")
MARKED = re.compile(r"(<!-- predict:(\w+)([^>]*?) -->\n).*?(<!-- /predict -->)", re.S)
HEADING = "PREDICTION, not a measurement"
# The rate of L2 is the assumption that the predictions hang on most: how much they change if it is twice as high.
_L2_FACTOR = 2.0


@dataclass(frozen=True)
class Row:
    """One call on one card: its floor and, by backend, the kernels' predictions; with L2 twice as fast in ``faster``.

    Times are in seconds. ``absent`` has the backends without a prediction, and why.
    """

    family: Family
    shape: Any
    card: Card
    floor: float
    kernels: dict[str, list[Prediction]]
    faster: dict[str, float]
    absent: dict[str, str]

    @property
    def mode(self) -> str:
        return TRAINING if self.shape.training else FORWARD

    @property
    def label(self) -> str:
        return self.shape.label

    def seconds(self, backend: str) -> float:
        return model.total(self.kernels[backend])

    def over_floor(self, backend: str) -> float:
        return self.seconds(backend) / self.floor

    def longest(self, backend: str) -> Prediction:
        """The kernel that takes most of the time."""
        return max(self.kernels[backend], key=lambda prediction: prediction.seconds)


def row(family: Family, shape: Any, card: Card) -> Row:
    """The predictions for one call."""
    faster_card = dataclasses.replace(card, l2=card.l2 * _L2_FACTOR)
    kernels, faster, absent = {}, {}, {}
    for backend in BACKENDS:
        try:
            plan = family.plan(backend, shape, card)
        except plans.NoPlan as reason:
            absent[backend] = str(reason)
            continue
        kernels[backend] = family.predict(shape, plan, card)
        faster[backend] = model.total(family.predict(shape, plan, faster_card))
    return Row(family, shape, card, family.floor(shape, card), kernels, faster, absent)


def families(op: str | None) -> list[Family]:
    """The family of a row (``"read"``) or an operation (``"read_recurrence"``); all for None.

    Raises:
        ValueError: there are no predictions for it.
    """
    found = [family for stem, family in FAMILIES.items() if op in (None, stem.partition("/")[0], family.op)]
    if not found:
        rows = dict.fromkeys(stem.partition("/")[0] for stem in FAMILIES)
        raise ValueError(f"there are no predictions for {op!r}, only for {', '.join(rows)}")
    return found


def rows(card: Card, match: str = "", op: str | None = None) -> list[Row]:
    """The rows of an operation whose label, dtype and mode have every word of ``match``."""
    return [
        row(family, shape, card)
        for family in families(op)
        for shape in family.shapes()
        if matches(match, family.op, shape.label, shape.dtype, TRAINING if shape.training else FORWARD)
    ]


def tables(found: list[Row]) -> list[Table]:
    """One table for each dtype and mode."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for one in found:
        groups.setdefault((one.family.op, one.shape.dtype, one.mode), []).append(one)
    header = ["case", "floor"]
    for backend in BACKENDS:
        header += [backend, "xfloor", "L2 x2", "longest kernel"]
    result = []
    for (op, dtype, mode), group in groups.items():
        first = group[0]
        title = f"{HEADING}: {op}  {first.card.name}  {dtype}  {mode}  {first.shape.sizes}"
        result.append(Table(title, header, [[one.label, seconds(one.floor), *_cells(one)] for one in group]))
    return result


def _cells(one: Row) -> Iterator[str]:
    for backend in BACKENDS:
        if backend in one.absent:
            yield from ("-",) * 4
            continue
        longest = one.longest(backend)
        yield seconds(one.seconds(backend))
        yield f"{one.over_floor(backend):.2f}"
        yield seconds(one.faster[backend])
        yield f"{longest.kernel} ({longest.bound})"


def details(found: list[Row]) -> list[Table]:
    """One table for each row and backend, with every kernel and every term of its time."""
    result = []
    for one in found:
        for backend, kernels in one.kernels.items():
            terms = list(kernels[0].terms)
            lines = [
                [p.kernel, seconds(p.seconds), f"{p.waves:.2f}", seconds(p.launch)]
                + [seconds(p.terms[term]) if p.terms[term] else "-" for term in terms]
                for p in kernels
            ]
            title = f"{HEADING}: {one.family.op} {one.label}  {one.card.name}  {one.shape.dtype} {one.mode}  {backend}"
            result.append(Table(title, ["kernel", "time", "waves", "launch", *terms], lines))
    return result


def notes(found: list[Row]) -> list[str]:
    """What the predictions rest on, and which backends have none."""
    lines = [
        "Nothing in these tables was timed. time: the largest of the terms of each kernel, plus launches, summed up.",
        f"xfloor: over the floor of {', '.join(dict.fromkeys(one.family.page for one in found))} at this card's rates; "
        "L2 x2: the time with twice the rate of L2.",
    ]
    absent = {backend: reason for one in found for backend, reason in one.absent.items()}
    lines += [f"{backend}: no prediction: {reason}" for backend, reason in absent.items()]
    card = found[0].card
    for family in FAMILIES.values():
        shapes = [one.shape for one in found if one.family is family]
        lines += family.notes(shapes, card) if shapes else []
    lines += model.assumptions([p for one in found for kernels in one.kernels.values() for p in kernels], card)
    return lines + plans.sources(card)


def text(found: list[Row], every: bool = False) -> str:
    """For a terminal."""
    shown = [*tables(found), *(details(found) if every else [])]
    return "\n\n".join([*(table.text() for table in shown), "\n".join(f"- {line}" for line in notes(found))])


def markdown(found: list[Row]) -> str:
    """For a document."""
    blocks = [table.markdown() for table in tables(found)]
    return "\n\n".join([*blocks, "\n".join(f"- {line}" for line in notes(found))])


def plain(found: list[Row]) -> dict[str, Any]:
    """For JSON. It says in itself that it is no result."""
    return {
        "kind": HEADING,
        "card": dataclasses.asdict(found[0].card),
        "notes": notes(found),
        "rows": [
            {
                "op": one.family.op,
                "mode": one.mode,
                "shape": dataclasses.asdict(one.shape),
                "floor_seconds": one.floor,
                "absent": one.absent,
                "backends": {
                    backend: {
                        "seconds": one.seconds(backend),
                        "seconds_with_l2_twice_as_fast": one.faster[backend],
                        "kernels": [{**dataclasses.asdict(p), "seconds": p.seconds, "bound": p.bound} for p in kernels],
                    }
                    for backend, kernels in one.kernels.items()
                },
            }
            for one in found
        ],
    }


def save(found: list[Row], path: str | Path) -> None:
    """Writes the predictions as JSON.

    Raises:
        ValueError: among the results, which are measured.
    """
    path = Path(path)
    if path.resolve().parent == ROOT / "benchmarks" / "results":
        raise ValueError(f"{path} is where results are kept, and this is a prediction")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(found), indent=1) + "\n")


def card(name: str) -> Card:
    """A card by its name.

    Raises:
        ValueError: none is called so.
    """
    if name not in CARDS:
        raise ValueError(f"no card is called {name!r}, expected one of {', '.join(CARDS)}")
    return CARDS[name]


def write_into(path: str | Path) -> int:
    """Fills the places ``<!-- predict:CARD WORDS -->`` to ``<!-- /predict -->`` of a Markdown file; how many."""
    return fill_marked(path, MARKED, lambda found: markdown(rows(card(found[2]), found[3])))
