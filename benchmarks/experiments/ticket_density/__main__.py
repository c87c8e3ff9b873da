"""``python -m benchmarks.experiments.ticket_density``: see the package."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from . import methods, plot, report, store, times
from .methods import Job, Masks
from .train import DTYPES, THROUGH, Bench, Settings

TIMED = ("imp-32-scaled", "imp-16-scaled", "imp-8-scaled")


class Run:
    """The trainings of an experiment, one after another.

    Args:
        bench (Bench), kept (Store): text and models, and where results go.
        progress (callable): gets the job and how many of its steps are done.
        frozen (bool): nothing is to be trained; what cannot be had without is an error.
    """

    def __init__(self, bench: Bench, kept: store.Store, progress=lambda job, step: None, frozen: bool = False) -> None:
        self.bench, self.kept, self.progress, self.frozen = bench, kept, progress, frozen
        self.step = bench.settings.round

    def masks(self, job: Job) -> Masks:
        """The masks of a job; what they depend on is trained again where it has gone."""
        if job.kind == "dense":
            return {}
        found = self.kept.read(f"{job.name}.masks")
        if found is None:
            before = job.before(self.step)
            weights = self.weights(before) if before is not None else None
            found = methods.choose(job, self.bench.at(job.seed)[0], weights, self.projected(job))
            self.kept.write(f"{job.name}.masks", found)
        return found

    def projected(self, job: Job) -> Masks | None:
        """The masks of single weights that a job makes blocks of, if it does."""
        return self.masks(dataclasses.replace(job, method="imp")) if job.kind == "project" else None

    def weights(self, job: Job) -> dict[str, Tensor]:
        """What a job's training made of the pruned layers."""
        found = self.kept.read(f"{job.name}.weights")
        if found is None:
            self.train(job)
            found = self.kept.read(f"{job.name}.weights")
            assert found is not None
        return found

    def train(self, job: Job) -> None:
        """Trains a job and writes down what it gave.

        Raises:
            RuntimeError: nothing is to be trained.
        """
        if self.frozen:
            raise RuntimeError(f"what {job.name} left is not in {self.kept.state}: name its folder by --state")
        masks, pretrained = self.masks(job), self.bench.pretrained(job.seed)
        trained, row = self.bench.fit(job, masks, lambda step: self.progress(job, step))
        if masks:
            row |= methods.facts(job, masks, pretrained, self.projected(job))
        if job.kind in ("dense", "imp"):
            self.kept.write(f"{job.name}.weights", trained.weights(list(pretrained)))
        self.kept.keep(job, row)
        before = job.before(self.step)
        if before is not None and before.kind == "imp":
            self.kept.drop(f"{before.name}.weights")

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if not self.kept.has(job)]


def options() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="ticket_density", description="Accuracy of tickets against their density.")
    parser.add_argument("--out", type=Path, default=Path("out/ticket_density.json"), help="the result")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no training that would not fit")
    parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), metavar="METHOD")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.9, 0.7, 0.5, 0.3, 0.2, 0.1], metavar="D")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    for field in dataclasses.fields(Settings):
        choices = {"dtype": list(DTYPES), "through": list(THROUGH)}.get(field.name)
        value = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, choices=choices, help=f"default: {value}")
    parser.add_argument("--state", type=Path, default=Path("build/ticket_density"), help="masks for later trainings")
    parser.add_argument("--no-times", action="store_true", help="no measurement of time and memory at the end")
    parser.add_argument("--only-times", action="store_true", help="measure time and memory anew and train nothing")
    parser.add_argument("--time-methods", nargs="+", default=list(TIMED), metavar="METHOD", help="all with blocks")
    parser.add_argument("--time-dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=times.REPEATS, help="timed calls of each")
    parser.add_argument("--quiet-machine", action="store_true", help="nothing else runs here: mark no time as shared")
    parser.add_argument("--only-report", action="store_true", help="only picture and table, of the result as it is")
    parser.add_argument("--plot", type=Path, help="the picture; default: beside the result")
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files with places for the tables")
    return parser


def main(arguments: list[str] | None = None, *, corpus=None) -> int:
    """Runs what is asked for; ``corpus`` is text at hand, for the tests."""
    given = options().parse_args(arguments)
    console = Console()
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        if given.only_report:
            return show(store.load(given.out), given, console)
        settings = Settings(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Settings)})
        planned = methods.jobs(given.methods, given.densities, settings.round, given.seeds)
        kept = store.Store(given.out, settings, given.state)
        bench = Bench(settings, corpus)
        run = Run(bench, kept, frozen=given.only_times)
        if not given.only_times:
            kept.describe(bench)
            work(run, planned, given.minutes, console)
        if not given.no_times:
            measure(run, planned, given, console)
        return show(kept.found, given, console)
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]{error}[/]", highlight=False)
        return 1


def work(run: Run, planned: list[Job], minutes: float, console: Console) -> None:
    """Trains what is missing, while the time lasts."""
    start, steps = time.perf_counter(), run.bench.settings.steps
    columns = (TextColumn("{task.fields[now]}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        every = progress.add_task("", total=len(planned), now="trainings")
        one = progress.add_task("", total=steps, now="")
        run.progress = lambda job, step: progress.update(one, completed=step, now=job.name)
        todo, spent = run.missing(planned), []
        progress.update(every, completed=len(planned) - len(todo))
        for job in todo:
            begun = time.perf_counter()
            if spent and begun - start + statistics.mean(spent[-5:]) > 60 * minutes:
                console.print(f"The time is over with {len(run.missing(planned))} of {len(planned)} trainings to go.")
                break
            run.train(job)
            spent.append(time.perf_counter() - begun)
            progress.advance(every)
            row = run.kept.found["trainings"][-1]
            console.print(f"{job.name}: {100 * row['right'] / row['texts']:.1f} % in {row['seconds']:.0f} s")


def measure(run: Run, planned: list[Job], given: argparse.Namespace, console: Console) -> None:
    """Holds the two ways to train against each other, and times the tickets that were trained."""
    seed = given.seeds[0]
    done = {job.name: job for job in planned if run.kept.has(job) and job.seed == seed and job.block}
    chosen = [
        job for job in done.values() if job.method in given.time_methods and job.density in given.densities
    ]  # fmt: skip
    if not chosen:
        return
    with console.status("") as status:
        run.kept.found |= {"timed": store.place() | {"shared": not given.quiet_machine}, "checks": [], "times": []}
        for method in dict.fromkeys(job.method for job in chosen):
            job = min((j for j in chosen if j.method == method), key=lambda j: j.density)
            status.update(f"TicketLinear against masked dense weights: {job.name}")
            run.kept.found["checks"].append(run.bench.agreement(job, run.masks(job)))
            run.kept.save()
        for dtype in given.time_dtypes:
            for job in chosen:
                status.update(f"Time and memory of {job.name}, {dtype}")
                row = times.measure(run.bench, job, run.masks(job), dtype, given.repeats, run.kept.state)
                run.kept.found["times"].append(row)
                run.kept.save()


def show(found: dict, given: argparse.Namespace, console: Console) -> int:
    """Picture and tables."""
    if not found["trainings"]:
        raise ValueError("there is no training to show yet")
    plot.save(found, given.plot or given.out.with_suffix(".png"))
    for page in given.into:
        if not report.write_into(found, page):
            raise ValueError(f"{page} has no place for a table: a line {report.OPENING.format(name='accuracy')}")
    console.print(report.accuracy(found), markup=False, highlight=False, soft_wrap=True)
    if found["times"]:
        console.print(report.speed(found), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
