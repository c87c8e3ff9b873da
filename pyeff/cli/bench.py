"""``pyeff bench``: every operation against its definition, its floor and the best of the others, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Optional

import typer

_DEVICES = ("auto", "cpu", "cuda")


def bench(
    op: Annotated[Optional[str], typer.Argument(help="Row (read, ticket, multimask, gemm) or op; none: all.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes, about a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The largest sizes too; takes long and needs memory.")] = False,
    match: Annotated[str, typer.Option(help="Only cases with all these words, such as 'gru 64 float32'.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a device.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.", min=0)] = 0,
    listing: Annotated[bool, typer.Option("--list", help="Print the cases and contenders and leave.")] = False,
    from_file: Annotated[Optional[Path], typer.Option("--from", help="Show this result, run nothing.")] = None,  # noqa: UP045
    json: Annotated[Optional[Path], typer.Option(help="Write the result here; a folder gets DEVICE.json.")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="Write a picture here (png, svg, pdf).")] = None,  # noqa: UP045
    every: Annotated[bool, typer.Option("--details", help="Every contender of every case.")] = False,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Print the table.")] = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    into: Annotated[Optional[Path], typer.Option(help="Fill the marked places of this Markdown file.")] = None,  # noqa: UP045
    predict: Annotated[Optional[str], typer.Option(help="Predict the GPU kernels on this card.")] = None,  # noqa: UP045
) -> None:
    """Times the fused operations against eager, compiled and everything else that is installed."""
    if predict:
        for name, given in (("--device", device != "auto"), ("--quick", quick), ("--full", full), ("--from", from_file),
                            ("--plot", plot), ("--list", listing), ("--threads", threads)):  # fmt: skip
            if given:
                raise typer.BadParameter(f"{name} does not go with --predict, which runs nothing")
        _predict(op, predict, match, every, json, into, "markdown" if markdown else "text" if table else "")
        return
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    if device not in _DEVICES:
        raise typer.BadParameter(f"--device is {device!r}, expected one of {', '.join(_DEVICES)}")
    size = "quick" if quick else "full" if full else "default"
    results, report = module("results"), module("report")
    try:
        if from_file:
            run = _shown(results.load(from_file), op, match)
        else:
            select = module("registry").Selection(size=size, device=_device(device), match=match)
            if listing:
                _list(op, select)
                return
            run = _run(op, select, threads)
    except BrokenPipeError:  # whoever reads the list has seen enough
        raise
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if json:
        name = module("machine").slug(run.machine.get("gpu"))
        results.save(run, json / f"{name}.json" if json.is_dir() else json)
    if markdown:
        typer.echo(report.markdown(run))
    elif table:
        typer.echo(report.text(run, every))
    if into:
        typer.echo(f"{into}: {report.write_into(run, into)} places filled", err=True)
    if plot:
        module("plot").save(run, plot)
    if run.errors():
        raise typer.Exit(1)


def module(name: str) -> ModuleType:
    """A module of the benchmarks: ``pyeff.benchmarks`` where pyeff is installed, ``benchmarks`` in a checkout."""
    import pyeff

    if importlib.util.find_spec("pyeff.benchmarks"):
        return importlib.import_module(f"pyeff.benchmarks.{name}")
    checkout = Path(pyeff.__file__).parents[1]
    if not (checkout / "benchmarks" / "registry.py").exists():
        raise ImportError("this installation of pyeff has no benchmarks")
    if str(checkout) not in sys.path:
        # At the end: it must not hide anything that is installed.
        sys.path.append(str(checkout))
    return importlib.import_module(f"benchmarks.{name}")


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _predict(
    op: str | None, card: str, match: str, every: bool, json: Path | None, into: Path | None, form: str
) -> None:
    """Shows what the model says; it is kept apart from results in every way."""
    predictions = module("predictions")
    try:
        found = predictions.rows(predictions.card(card), match, op)
        if not found:
            raise ValueError(f"no case has all of {match!r}")
        if json:
            predictions.save(found, json)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if form:
        typer.echo(predictions.markdown(found) if form == "markdown" else predictions.text(found, every))
    if into:
        typer.echo(f"{into}: {predictions.write_into(into)} places filled", err=True)


def _shown(run: Any, op: str | None, match: str) -> Any:
    """A stored result with the rows that the arguments ask for."""
    registry = module("registry")
    ops = registry.operations(op)
    run.rows = [r for r in run.rows if r.op in ops and registry.matches(match, r.op, r.label, r.dtype, r.mode)]
    run.settings["left_out"] = [name for name in run.settings.get("left_out", []) if name.split()[0] in ops]
    if not run.rows:
        raise ValueError("the stored result has no such case")
    return run


def _list(op: str | None, select: Any) -> None:
    registry = module("registry")
    for case in registry.cases(op, select):
        names = " ".join(contender.name for contender in case.contenders)
        typer.echo(f"{case.op} {case.label}  {registry.dtype_name(case.dtype)} {case.mode}: {names}")


def _run(op: str | None, select: Any, threads: int) -> Any:
    import torch

    if select.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device")
    if threads:
        torch.set_num_threads(threads)
    cases = module("registry").cases(op, select)
    if not cases:
        raise ValueError(f"no case has all of {select.match!r}")
    with _progress() as progress:
        return module("runner").run(cases, select, progress=progress)


def _progress() -> Any:
    """A context that yields a runner's Progress, drawn on the error stream so that the output can be piped."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    report, base = module("report"), module("runner").Progress
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=2,  # drawing takes a core's time away from what is measured
    )

    class Drawn(base):  # type: ignore[misc, valid-type]
        def begin(self, cases: int) -> None:
            self.task = bar.add_task("ceilings", total=cases)

        def step(self, case: Any, contender: str, doing: str) -> None:
            bar.update(self.task, description=f"{case.label} {case.mode}: {contender} {doing}"[:48].ljust(48))

        def finish(self, row: Any) -> None:
            ours, other = row.fused(), row.best_other()
            best = f"{other.name} {report.seconds(other.median)}" if other else "nobody"
            text = f"fused {report.seconds(ours.median)}" if ours else "fused absent"
            bar.console.print(
                f"{row.op} {row.label} {row.dtype} {row.mode}: {text}, best other {best}", highlight=False
            )
            bar.advance(self.task)

    @contextlib.contextmanager
    def shown():
        with bar:
            yield Drawn()

    return shown()
