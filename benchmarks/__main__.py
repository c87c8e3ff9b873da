"""The benchmarks without the command line's packages: ``python -m benchmarks``, for a bare machine.

``pyeff bench`` is the way in where typer and rich are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from . import machine, registry, report, results, runner


class Lines(runner.Progress):
    """One line for each case that is done, on the error stream."""

    def finish(self, row: results.Row) -> None:
        timed = ", ".join(f"{c.name} {report.seconds(c.best)}" for c in row.timed())
        print(f"{row.op} {row.label} {row.dtype} {row.mode}: {timed or 'nobody'}", file=sys.stderr, flush=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", help="a row or an operation; all where none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size", choices=("quick", "default", "full"), default="default")
    parser.add_argument("--match", default="", help="only cases with all these words")
    parser.add_argument("--budget", type=float, default=0.0, help="begin no case after so many seconds; 0: no limit")
    parser.add_argument("--json", type=Path, help="write the result here after each case; a folder gets DEVICE.json")
    parser.add_argument("--with", dest="contenders", default="", help="only these contenders, with commas between")
    parser.add_argument("--from", dest="stored", type=Path, help="show this result and run nothing")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache and measure nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = options().parse_args(arguments)
    if given.stored:
        print(report.text(results.load(given.stored)))
        return 0
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    select = registry.Selection(given.size, device, given.match)
    try:
        cases = registry.cases(given.op, select)
    except ValueError as error:
        options().error(str(error))
    if not cases:
        options().error(f"no case has all of {given.match!r}")
    if wanted := set(filter(None, given.contenders.split(","))):
        cases = [dataclasses.replace(c, contenders=tuple(k for k in c.contenders if k.name in wanted)) for c in cases]
    if given.compile_only:
        runner.compile_only(cases)
        return 0
    path = given.json
    if path and path.is_dir():
        path /= machine.slug(machine.gpu() if device == "cuda" else None) + ".json"
    settings = dataclasses.replace(runner.Settings.of(given.size), budget_seconds=given.budget)

    def keep(run: results.Run) -> None:
        if path:
            results.save(run, path)

    found = runner.run(cases, select, settings=settings, progress=Lines(), checkpoint=keep)
    print(report.text(found))
    return 1 if found.errors() or not found.rows else 0


if __name__ == "__main__":
    sys.exit(main())
