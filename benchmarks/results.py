"""Results: what a run found, as data and as JSON. Tables and plots are made from these and from nothing else."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1

# TIMED has samples; ABSENT could not run here; the other two are errors.
TIMED, ABSENT, WRONG, FAILED = "timed", "absent", "wrong", "failed"


def spread(samples: list[float]) -> float:
    """The interquartile range over the median."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / statistics.median(samples)


@dataclass
class Measured:
    """What a contender did with a case.

    Args:
        name, about, role (str): the contender's.
        status (str): ``"timed"``, ``"absent"`` (could not run; ``reason`` says why), ``"wrong"`` (its result is not the
            oracle's, so it was not timed) or ``"failed"`` (it raised).
        samples (list of float): seconds a call, one for each turn in the alternation.
        calls_per_sample (int): how many calls in a row each sample is the mean of.
        peak_bytes, saved_bytes (int): see ``memory``.
        error (float): the largest relative error (in norm) of an output, against the oracle in float64.
        graph_samples (list of float), graph_calls_per_sample (int): the same for the calls as CUDA graphs; nothing on a
            CPU.
        graph_reason (str): why there is no graph of it.
    """

    name: str
    about: str
    role: str
    status: str
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    calls_per_sample: int = 1
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None
    graph_samples: list[float] = field(default_factory=list)
    graph_calls_per_sample: int = 1
    graph_reason: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def graph_median(self) -> float | None:
        return statistics.median(self.graph_samples) if self.graph_samples else None

    @property
    def best(self) -> float:
        """The smaller of the medians, as calls and as a graph."""
        return min(self.median, self.graph_median or self.median)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        return spread(self.samples)


@dataclass
class Row:
    """One case with everybody's result. ``ceilings`` are those around it: ``{dtype: FLOP/s, "copy": bytes/s}``."""

    op: str
    group: str
    point: str
    axis: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    flops: float
    bytes: float
    input_sets: int
    ceilings: dict[str, float]
    floor_seconds: float
    contenders: list[Measured]

    @property
    def label(self) -> str:
        return f"{self.group} {self.point}".strip()

    @property
    def section(self) -> str:
        """The first word of a group of several: it has tables of its own."""
        first, _, rest = self.group.partition(" ")
        return first if rest else ""

    @property
    def short_label(self) -> str:
        """The label in a table of its section."""
        return self.label.removeprefix(self.section).strip()

    def timed(self) -> list[Measured]:
        return [c for c in self.contenders if c.status == TIMED]

    def fused(self) -> Measured | None:
        return next((c for c in self.timed() if c.role == "fused"), None)

    def reference(self) -> Measured | None:
        return next((c for c in self.timed() if c.role == "reference"), None)

    def best_other(self) -> Measured | None:
        """The fastest of those that are not ours."""
        return min((c for c in self.timed() if c.role in ("rival", "reference")), key=lambda c: c.median, default=None)

    def gain(self) -> float | None:
        """How many times faster than the best of the others; below one where that one wins."""
        ours, other = self.fused(), self.best_other()
        return other.median / ours.median if ours and other else None

    def graph_gain(self) -> float | None:
        """The gain over the fastest of the others where all are graphs."""
        ours = self.fused()
        others = [c.graph_median for c in self.timed() if c.role in ("rival", "reference") and c.graph_median]
        return min(others) / ours.graph_median if ours and ours.graph_median and others else None

    def over_floor(self, contender: Measured) -> float:
        return contender.median / self.floor_seconds

    def of_peak(self, contender: Measured) -> float:
        """The share of the arithmetic peak that the least arithmetic ran at."""
        return self.flops / contender.median / self.ceilings[self.dtype]


@dataclass
class Run:
    """A whole run, as it is written to JSON."""

    date: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    ceilings: dict[str, Any]
    memory_method: str
    rows: list[Row]
    schema: int = SCHEMA

    def errors(self) -> list[tuple[Row, Measured]]:
        """The contenders that were wrong or raised."""
        return [(row, c) for row in self.rows for c in row.contenders if c.status in (WRONG, FAILED)]


def save(run: Run, path: str | Path) -> None:
    """Writes a run as JSON, every raw sample included; the file's folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(run), indent=1)
    # A list or object without others inside goes on one line: samples are many and short.
    flat = re.sub(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text)
    path.write_text(flat + "\n")


def load(path: str | Path) -> Run:
    """Reads what :func:`save` wrote.

    Raises:
        ValueError: it is not such a file, or one of another schema.
    """
    try:
        data = json.loads(Path(path).read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {data.get('schema')!r}, expected {SCHEMA}")
        rows = [
            Row(**{**row, "contenders": [Measured(**contender) for contender in row["contenders"]]})
            for row in data.pop("rows")
        ]
        return Run(**data, rows=rows)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of pyeff bench: {error}") from error
