"""``python -m benchmarks.experiments.multimask_reuse``: see the package."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import data, plot, report, store
from .settings import CLASSES, DEFAULT, MASKS, SHOTS, quick
from .train import PATHS, Settings, run


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="multimask_reuse", description="What sharing a teacher's pass is worth.")
    parser.add_argument("--out", type=Path, default=Path("out/multimask_reuse.json"), help="the result")
    parser.add_argument("--kinds", nargs="+", default=list(DEFAULT), choices=list(DEFAULT))
    parser.add_argument("--masks", nargs="+", type=int, default=list(MASKS), metavar="M", help="students of a sample")
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--steps", type=int, help="of each training; default: as the settings say")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; nothing is learnt")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no training after that")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--quiet-machine", action="store_true", help="nothing else runs here: mark no time as shared")
    parser.add_argument("--only-report", action="store_true", help="only picture and tables, of the result as it is")
    parser.add_argument("--plot", type=Path, help="the picture; default: beside the result")
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files with places for the tables")
    return parser


def main(arguments: list[str] | None = None, *, tasks: Mapping[str, data.Task] | None = None) -> int:
    """Runs what is asked for; ``tasks`` is data at hand, for the tests."""
    given = options().parse_args(arguments)
    console = Console()
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        if given.only_report:
            return show(store.load(given.out), given, console)
        settings = {kind: DEFAULT[kind] for kind in given.kinds}
        if given.quick:
            settings = {kind: quick(s) for kind, s in settings.items()}
        if given.steps:
            settings = {kind: dataclasses.replace(s, steps=given.steps) for kind, s in settings.items()}
        for kind, s in settings.items():
            if bad := [m for m in given.masks if m < 1 or s.rows % m]:
                raise ValueError(f"masks has {bad[0]}, expected a number that divides the {s.rows} students of {kind}")
        kept = store.Store(given.out, settings)
        if tasks is None:
            with console.status("reading the data"):
                tasks = {kind: task(kind, settings[kind]) for kind in given.kinds}
        work(kept, settings, tasks, given, console)
        return show(kept.found, given, console)
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]{error}[/]", highlight=False)
        return 1


def task(kind: str, settings: Settings) -> data.Task:
    """The data of a modality; which of it is the test set does not depend on the seed of a training."""
    if kind == "image":
        return data.digits(SHOTS, seed=0)
    return data.docstrings(settings.tokens, CLASSES, least=settings.least)


def work(
    kept: store.Store, settings: dict[str, Settings], tasks: Mapping[str, data.Task], given: argparse.Namespace,
    console: Console,
) -> None:  # fmt: skip
    """Trains what is missing. The two paths take turns at going first."""
    start = time.perf_counter()
    jobs = [
        (kind, masks, path, seed)
        for kind in given.kinds
        for seed in given.seeds
        for i, masks in enumerate(given.masks)
        for path in (given.paths if i % 2 else given.paths[::-1])
    ]
    columns = (TextColumn("{task.fields[now]}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        every, one = progress.add_task("", total=len(jobs), now="trainings"), progress.add_task("", total=1, now="")
        for kind, masks, path, seed in jobs:
            if kept.has(kind, masks, path, seed):
                progress.advance(every)
                continue
            if time.perf_counter() - start > 60 * given.minutes:
                console.print("The time is over; the same command goes on from here.")
                break
            s = dataclasses.replace(settings[kind], seed=seed)
            progress.update(one, total=s.steps, completed=0, now=f"{kind} M={masks} {path}")
            kept.describe(tasks[kind], not given.quiet_machine)
            row = run(tasks[kind], s, masks, path, lambda step: progress.update(one, completed=step))
            kept.keep(row)
            progress.advance(every)
            told = ", ".join(f"{100 * m['right'] / m['texts']:.1f} % at {m['seconds']:.0f} s" for m in row["moments"])
            console.print(f"{kind} M={masks} {path}: {told}", highlight=False)


def show(found: dict, given: argparse.Namespace, console: Console) -> int:
    """Picture and tables."""
    if not found["trainings"]:
        raise ValueError("there is no training to show yet")
    plot.save(found, given.plot or given.out.with_suffix(".png"))
    for page in given.into:
        if not report.write_into(found, page):
            raise ValueError(f"{page} has no place for a table: a line {report.OPENING.format(name='passes')}")
    for table in (report.passes, report.time):
        console.print(table(found), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
