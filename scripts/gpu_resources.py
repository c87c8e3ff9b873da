#!/usr/bin/env python3
"""What every GPU kernel takes of an SM, on every architecture, and whether it passes the gates. Needs no GPU.

What was compiled before is locked in benchmarks/locks. Triton's configurations are compiled here: those that changed
since, and one in eight of the others, to see that the lock is right. CUDA C++ is read from what the build kept, for the
architectures that it was built for. Prints the table and writes it to build/resources/ as JSON and Markdown. Exit
status 1 if a gate is not held, or if the lock does not agree.

    python scripts/gpu_resources.py             look
    python scripts/gpu_resources.py --all       compile all of Triton's configurations
    python scripts/gpu_resources.py --write     and write the lock of what changed, kernels/excluded.py, as the gates
                                                want it, and benchmarks/resource_table.py, which the predictions rest on
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gates, resources  # noqa: E402
from benchmarks.resources import Usage  # noqa: E402
from scripts import turn  # noqa: E402


def show(report: gates.Report, excluded: gates.Exclusions, every: bool) -> None:
    """Prints the tables; without ``every``, one line for each kernel: its best configuration."""
    allowed = [(name, arch) for name, reasons in excluded.items() for arch in reasons]
    usages = report.usages if every else best(report.usages)
    tables = resources.tables(usages, allowed)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for table in tables:
            print(table.text(), end="\n\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        drawn = Table(title=table.title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if i in (0, len(table.header) - 1) else "right", no_wrap=i == 0)
        for line in table.rows:
            drawn.add_row(*line)
        console.print(drawn, end="\n\n")


def best(usages: list[Usage]) -> list[Usage]:
    """Of each kernel on each architecture the configuration with the fewest problems, then the first that is listed."""
    found: dict[tuple[str, str, int], Usage] = {}
    for usage in usages:
        key = (usage.backend, usage.kernel, usage.arch)
        if key not in found or len(usage.problems()) < len(found[key].problems()):
            found[key] = usage
    return list(found.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release", help="where cmake built")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "resources", help="where the artefacts go")
    parser.add_argument("--write", action="store_true", help="write the lock and the two committed tables")
    parser.add_argument("--all", action="store_true", help="compile every Triton configuration, whatever the lock has")
    parser.add_argument("--every", action="store_true", help="print every configuration, not one a kernel")
    parser.add_argument("--only", choices=("triton", "cuda"), help="one backend alone")
    args = parser.parse_args(argv)

    report = gates.Report()
    excluded = gates.read_exclusions()
    if args.write and args.only:
        parser.error("--write needs both backends")
    if args.only != "cuda":
        gates.triton(report, excluded=excluded, turn=None if args.all else turn.current(), renew=args.write)
        if args.write:
            wanted = gates.exclusions(report.usages)
            gates.write_exclusions(wanted)
            report.failures = gates.triton_failures(report.usages, wanted)
            excluded = wanted
    if args.only != "triton":
        gates.cuda(report, args.build, renew=args.write)
    if args.write:
        gates.write_table(*gates.kept(report))
    show(report, excluded, args.every)
    files = gates.save(report, args.out, excluded)
    for line in report.skipped:
        print(f"SKIPPED: {line}")
    for line in report.failures:
        print(f"FAIL: {line}")
    count = len({usage.name for usage in report.usages})
    archs = sorted({usage.arch for usage in report.usages})
    verdict = f"{len(report.failures)} failures" if report.failures else "all gates hold"
    entries = sum(usage.backend == "triton" for usage in report.usages)
    print(f"{report.compiled} of {entries} programs of Triton compiled now, the others as they are locked")
    print(f"{count} kernels and configurations on {len(archs)} architectures: {verdict}; {', '.join(map(str, files))}")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
