"""The tables of a result. Nothing in them is typed."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

OPENING, CLOSING = "<!-- multimask-reuse:{name} -->", "<!-- /multimask-reuse -->"
MARKED = re.compile(r"^<!-- multimask-reuse:(\w+) -->\n(.*?)^<!-- /multimask-reuse -->$", re.M | re.S)
# (seconds, share of right answers), means over seeds.
Curve = list[tuple[float, float]]


def curves(found: dict, kind: str) -> dict[tuple[int, str], Curve]:
    """Of every M and path, in their order."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found["trainings"]:
        if row["kind"] == kind:
            rows[row["masks"], row["path"]].append(row)
    result = {}
    for key in sorted(rows, key=lambda k: (k[0], k[1] != "fused")):
        moments = zip(*(row["moments"] for row in rows[key]), strict=True)
        each_step = sum(pace(row["moments"]) for row in rows[key]) / len(rows[key])
        result[key] = [
            (each[0]["step"] * each_step, sum(m["right"] / m["texts"] for m in each) / len(each)) for each in moments
        ]
    return result


def pace(moments: list[dict[str, Any]]) -> float:
    """Seconds of a step: the median of the stretches between probes, so that one that was held up does not count."""
    return statistics.median(
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(moments)
    )


def at(curve: Curve, seconds: float) -> float | None:
    """The accuracy at a time, in a line between probes; None after the last one."""
    for (t0, a0), (t1, a1) in itertools.pairwise(curve):
        if t0 <= seconds <= t1:
            return a0 + (a1 - a0) * (seconds - t0) / max(t1 - t0, 1e-9)
    return None


def reached(curve: Curve, accuracy: float) -> float | None:
    """The seconds until an accuracy is reached for the first time; None where it is not."""
    for (t0, a0), (t1, a1) in itertools.pairwise(curve):
        if a1 >= accuracy:
            return t0 if a0 >= accuracy else t0 + (t1 - t0) * (accuracy - a0) / (a1 - a0)
    return None


def kinds(found: dict) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in found["trainings"]))


def heading(found: dict, kind: str) -> str:
    """What was trained on what, in a sentence."""
    s, data = found["settings"][kind], found["data"][kind]
    seeds = len({row["seed"] for row in found["trainings"] if row["kind"] == kind})
    moments = [row["moments"] for row in found["trainings"] if row["kind"] == kind]
    begin = sum(m[0]["right"] / m[0]["texts"] for m in moments) / len(moments)
    error = math.sqrt(begin * (1 - begin) / data["test"])
    return (
        f"**{kind}**: {data['name']}, {data['samples']} samples of {s['tokens']} tokens; {s['layers']} layers of width "
        f"{s['width']}; {s['steps']} steps of {s['rows']} students that see {s['keep']:.0%} of the tokens. Linear "
        f"probe: {data['train']} labelled samples of {data['labels']} classes, right of {data['test']} others; before "
        f"any training {100 * begin:.1f} % (± {100 * error:.1f}, binomial), most frequent label "
        f"{100 * data['majority']:.1f} %. {seeds} seed{'s' * (seeds > 1)}."
    )


def place(found: dict) -> str:
    """Machine, versions and commit."""
    trained = found["trained"]
    machine, versions = trained["machine"], trained["versions"]
    told = "; other programs were running" if trained["shared"] else ""
    return (
        f"{machine['model']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}, "
        f"commit {trained['commit']}, {trained['date']}{told}"
    )


def passes(found: dict) -> str:
    """Accuracy and time at equal student passes."""
    lines = [place(found), ""]
    for kind in kinds(found):
        table = curves(found, kind)
        lines += [heading(found, kind), "", "| M | samples a step | fused: % | s | eager: % | s | time eager / fused |"]
        lines.append("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for masks in dict.fromkeys(m for m, _ in table):
            cells, times = [], {}
            for path in ("fused", "eager"):
                if (curve := table.get((masks, path))) is None:
                    cells += ["", ""]
                    continue
                times[path] = curve[-1][0]
                cells += [f"{100 * curve[-1][1]:.1f}", f"{curve[-1][0]:.1f}"]
            cells.append(f"{times['eager'] / times['fused']:.2f}x" if len(times) == 2 else "")
            lines.append(f"| {masks} | {found['settings'][kind]['rows'] // masks} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def time(found: dict) -> str:
    """Accuracy at equal time, and the time to equal accuracy."""
    lines = [place(found), ""]
    for kind in kinds(found):
        table = curves(found, kind)
        moment = min(curve[-1][0] for curve in table.values())
        goal = table.get((1, "eager"), next(iter(table.values())))[-1][1]
        lines += [
            f"**{kind}**: % right after {moment:.1f} s, and the seconds until {100 * goal:.1f} % are right, which is "
            "what one student of each sample by eager code ends with.", "",
            "| M | fused: % | eager: % | fused: s | eager: s |", "| ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for masks in dict.fromkeys(m for m, _ in table):
            shares, times = [], []
            for path in ("fused", "eager"):
                curve = table.get((masks, path), [])
                share, when = at(curve, moment), reached(curve, goal)
                shares.append("" if share is None else f"{100 * share:.1f}")
                times.append("" if not curve else "not reached" if when is None else f"{when:.1f}")
            lines.append(f"| {masks} | {' | '.join(shares + times)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def picture(found: dict) -> str:
    """The picture, which lies beside the pages."""
    every = " and ".join(found["data"][kind]["name"] for kind in kinds(found))
    return f"![Accuracy of a linear probe against pre-training time: {every}](figures/multimask_reuse.png)"


TABLES = {"passes": passes, "time": time, "picture": picture}


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
