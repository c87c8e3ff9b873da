"""The tables of a result. Nothing in them is typed."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .methods import KINDS
from .train import from_hex

MIB = 2**20
OPENING, CLOSING = "<!-- ticket-density:{name} -->", "<!-- /ticket-density -->"
MARKED = re.compile(r"^<!-- ticket-density:(\w+) -->\n(.*?)^<!-- /ticket-density -->$", re.M | re.S)
WORDS = {"imp": "IMP", "project": "projection of IMP", "oneshot": "one shot", "random": "random"}
Points = dict[str, dict[float, list[dict[str, Any]]]]


def title(method: str) -> str:
    """A method in words."""
    kind, *rest = method.split("-")
    if kind == "dense":
        return "dense"
    words = f"{WORDS[kind]}, {f'blocks of {rest[0]}' if rest else 'single weights'}"
    return f"{words}, {rest[1]}" if rest[1:] else words


def points(found: dict) -> Points:
    """The trainings by method and density, those of several seeds together; methods of a kind beside each other."""
    table: Points = defaultdict(lambda: defaultdict(list))
    for row in sorted(found["trainings"], key=lambda row: order(row["method"])):
        table[row["method"]][row["density"]].append(row)
    return table


def order(method: str) -> tuple[int, str, int]:
    """Kinds as listed, single weights before blocks, global before scaled, large blocks before small ones."""
    kind, *rest = method.split("-")
    return KINDS.index(kind), "" if not rest else "global" if len(rest) == 1 else rest[1], -int(rest[0] if rest else 0)


def share(rows: list[dict]) -> float:
    """The share of right answers over all seeds."""
    return sum(r["right"] for r in rows) / sum(r["texts"] for r in rows)


def binomial(p: float, texts: int) -> float:
    """The standard error of a share of ``texts`` answers. Seeds share the test set, so they do not make it smaller."""
    return math.sqrt(p * (1 - p) / texts)


def differs(rows: list[dict], dense: list[dict]) -> bool:
    """Whether the right answers are fewer than the dense model's by over two standard errors of paired differences.

    The pairs are the texts; of several seeds, those that both have, the mean over seeds is compared.
    """
    by_seed = {row["seed"]: row for row in dense}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not pairs:
        return False
    bits = [[from_hex(r["answers"], r["texts"]) for r in pair] for pair in pairs]
    texts = pairs[0][0]["texts"]
    gaps = [statistics.mean(int(a[i]) - int(b[i]) for a, b in bits) for i in range(texts)]
    error = statistics.pstdev(gaps) / math.sqrt(texts)
    return statistics.mean(gaps) < -2 * error


def accuracy(found: dict) -> str:
    """Test accuracy as a Markdown table: a row a method, a column a density."""
    table, corpus, settings = points(found), found["corpus"], found["settings"]
    dense = table.pop("dense")[1.0]
    p, texts = share(dense), dense[0]["texts"]
    seeds = {row["seed"] for row in found["trainings"]}
    told = f"means of up to {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    above = (
        f"{found['model']} on {corpus['name']}, {corpus['classes']} classes: {corpus['train']} texts to learn from, "
        f"each training {settings['steps']} steps of {settings['batch']} texts in {settings['dtype']}, {told}. Right "
        f"of {texts} texts, in %: dense {100 * p:.1f}, ± {100 * binomial(p, texts):.1f} (binomial); always the most "
        f"frequent label {100 * corpus['majority']:.1f}."
    )
    below = "\\* fewer than dense by over two standard errors of the difference, text by text."
    return by_density(
        table, lambda rows: f"{100 * share(rows):.1f}" + ("\\*" if differs(rows, dense) else ""), above, below
    )


def kept(found: dict) -> str:
    """What the masks keep, as such a table."""
    table = points(found)
    table.pop("dense")
    above = "The share of the pretrained magnitude that is kept, in %, and behind it the density of the emptiest layer."
    below = "" if "project" not in {m.partition("-")[0] for m in table} else _projected(table)
    return by_density(
        table, lambda rows: f"{100 * rows[0]['retained']:.0f} ({100 * rows[0]['least']:.0f})", above, below
    )


def _projected(table: Points) -> str:
    """How much of what IMP of single weights had kept is kept by its projections."""
    told = [
        f"{title(method)}: "
        + ", ".join(f"{100 * rows[d][0]['survivors']:.0f} at {d:g}" for d in sorted(rows, reverse=True))
        for method, rows in table.items()
        if method.startswith("project")
    ]
    return f"Of the magnitude that IMP of single weights had kept, in %: {'; '.join(told)}."


def by_density(table: Points, cell: Callable[[list[dict]], str], above: str, below: str) -> str:
    """A row a method, a column a density."""
    columns = sorted({d for rows in table.values() for d in rows}, reverse=True)
    lines = [f"| density | {' | '.join(f'{d:g}' for d in columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for method, rows in table.items():
        lines.append(f"| {title(method)} | {' | '.join(cell(rows[d]) if d in rows else '' for d in columns)} |")
    return "\n".join([above, "", *lines, *(["", below] if below else [])])


def medians(row: dict, call: str) -> tuple[float, float]:
    """(dense, ticket), in seconds."""
    return statistics.median(row[call]["dense"]), statistics.median(row[call]["ticket"])


def speed(found: dict) -> str:
    """Time and memory as a Markdown table: a row a ticket, dense and ticket in each cell."""
    if not found["times"]:
        return "Nothing was timed."
    settings, first, timed = found["settings"], found["times"][0], found["timed"]
    told = "other programs were running" if timed["shared"] else "nothing else was running"
    table = points(found)
    lines = [
        f"{timed['machine']['model']}, {first['threads']} thread{'s' * (first['threads'] != 1)}; {told}. Medians of "
        f"{len(first['step']['dense'])}, in turns; dense / ticket. The dense model is right in "
        f"{100 * share(table['dense'][1.0]):.1f} %.",
        "",
        f"| ticket | density | right | dtype | step, {settings['batch']} x {settings['max_length']} tokens | inference "
        "| one text | state | peak |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(found["times"], key=lambda row: (*order(row["method"]), -row["density"])):
        cells = [title(row["method"]), f"{row['density']:g}"]
        trained = table[row["method"]].get(row["density"])
        cells += [f"{100 * share(trained):.1f}" if trained else "", row["dtype"]]
        for call, digits in CALLS:
            a, b = medians(row, call)
            cells.append(f"{1000 * a:.{digits}f} / {1000 * b:.{digits}f} ms ({a / b:.2f}x)")
        sizes = row["bytes"]["dense"]["pruned"], row["bytes"]["ticket"]["pruned"]
        for a, b in (sizes, (row["peak_bytes"]["dense"], row["peak_bytes"]["ticket"])):
            cells.append(f"{a / MIB:.0f} / {b / MIB:.0f} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "state: weights with their index, gradients and Adam's moments of the pruned layers. peak: of a training step, "
        "the whole model counted, in a process of its own."
    )
    return "\n".join([*lines, "", note])


# Digits behind the point of milliseconds.
CALLS = (("step", 0), ("inference", 0), ("one_text", 1))
TABLES = {"accuracy": accuracy, "kept": kept, "speed": speed}


def write_into(found: dict, page: Path) -> int:
    """Fills the places of a Markdown file that ask for a table of the result; returns how many there are.

    Raises:
        ValueError: a place asks for something else.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"{page} asks for {match[1]!r}, expected one of {', '.join(TABLES)}")
        return f"{OPENING.format(name=match[1])}\n\n{TABLES[match[1]](found)}\n\n{CLOSING}"

    text, places = MARKED.subn(fill, page.read_text())
    page.write_text(text)
    return places
