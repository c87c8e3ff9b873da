"""The demo from beginning to end, with progress on the terminal."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyeff import _machine
from pyeff.demo import data, measure, report, train
from pyeff.demo.variants import TITLES, Settings, Variant, fused_backend, load

SHORT = {"full": "full", "reference": "definition", "fused": "fused", "head": "head"}


def demo(
    settings: Settings,
    out: Path,
    *,
    minutes: float,
    classes: int = 16,
    dataset: tuple[str, str | None, str, str] | None = None,
    corpus: data.Corpus | None = None,
    validate: bool = False,
    width: int = 80,
) -> dict:
    """Runs everything and writes the picture to ``out``, with ``.json`` and ``.safetensors`` beside it.

    Args:
        settings (Settings): of the training.
        out (Path): the picture.
        minutes (float): for everything; the steps are cut to what fits.
        classes (int): packages of the standard library.
        dataset (tuple, optional): name, configuration, text column, label column. Default: the standard library.
        corpus (Corpus, optional): text at hand instead.
        validate (bool): learn from a part of the training texts and test on the rest; for choosing settings.
        width (int): columns of the terminal to use at most.

    Returns:
        dict: what is written as JSON.

    Raises:
        RuntimeError, ValueError: text or model cannot be had.
    """
    start = time.perf_counter()
    console = Console()
    console.width = min(console.width, width)
    if corpus is None:
        with console.status("Collecting text"):
            corpus = data.hugging_face(*dataset, seed=settings.seed) if dataset else data.standard_library(classes)
    if validate:
        corpus = data.validation(corpus)
    console.print(
        f"[bold]{corpus.name}[/]: {len(corpus.train)} texts to learn from, {len(corpus.test)} to test on, "
        f"{len(corpus.labels)} classes (always the most frequent: {100 * corpus.majority():.1f} %)",
        highlight=False,
    )
    with console.status("Loading the model"):
        tokenizer, model = load(settings, len(corpus.labels))
        batches = train.Batches(corpus, tokenizer, settings)
    backend, reason = fused_backend()
    keys = [key for key in TITLES if key != "fused" or backend]
    if reason:
        console.print(f"[yellow]READ runs by its definition only[/]: {reason}", highlight=False)
    results: dict[str, Any] = {
        "corpus": {"name": corpus.name, "labels": corpus.labels, "train": len(corpus.train), "test": len(corpus.test)},
        "majority": corpus.majority(),
        "model": settings.model or "all-MiniLM-L6-v2",
        "settings": dataclasses.asdict(settings),
        "machine": _machine.describe(),
        "variants": {key: {} for key in keys},
    }
    with console.status("Measuring memory") as status:
        for key in keys:
            status.update(f"Measuring memory, in a process of its own: {TITLES[key]}")
            results["variants"][key] |= measure.memory(key, len(corpus.labels), settings)
    variants = {key: Variant(key, model, settings) for key in keys}
    read = [variants[key] for key in ("reference", "fused") if key in variants]
    with console.status("Timing READ's part of a step"):
        for key, seconds in measure.read_alone(read, batches.training()).items():
            results["variants"][key]["read_seconds"] = seconds
    # What is left for training, less a reserve for the reloaded adapter and the picture.
    budget = 60 * minutes - (time.perf_counter() - start) - 10
    curves = _train(console, list(variants.values()), batches, settings, budget)
    for key, curve in curves.items():
        results["variants"][key] |= dataclasses.asdict(curve) | {
            "accuracy": curve.accuracies[-1][2],
            "step_seconds": curve.step_seconds(),
            "trainable": variants[key].trainable,
        }
    results["steps"] = len(curves["full"].losses)
    out.parent.mkdir(parents=True, exist_ok=True)
    adapter = out.with_suffix(".safetensors")
    saved = read[-1]
    saved.attachment.save(adapter)
    with console.status("Reloading the adapter in a fresh model"):
        fresh = Variant(saved.key, load(settings, len(corpus.labels))[1], settings)
        fresh.attachment.load(adapter)
        results["reloaded_accuracy"] = fresh.accuracy(batches.testing())
    if backend:
        results["loss_gap"] = train.loss_gap(curves)
        layers = len(read[-1].attachment.config["stacks"]["adapter"]["layers"])
        terms = settings.batch * settings.max_length * layers  # a weight's gradient sums over tokens and layers
        results["loss_allowed"] = train.loss_allowance(curves["reference"].losses, terms)
    results["minutes"] = (time.perf_counter() - start) / 60
    report.picture(results, out)
    report.write_json(results, out.with_suffix(".json"))
    _tell(console, results, out, adapter)
    return results


def _train(
    console: Console, variants: list[Variant], batches, settings: Settings, budget: float
) -> dict[str, train.Curve]:
    columns = (
        TextColumn("Training"),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.steps, now="")

        def show(doing: str, done: int, steps: int, curves: dict[str, train.Curve]) -> None:
            losses = " ".join(f"{SHORT[key]} {c.losses[-1]:.2f}" for key, c in curves.items() if c.losses)
            progress.update(task, completed=done, total=steps, now=doing if doing.startswith("testing") else losses)

        return train.run(variants, batches, settings, budget=budget, progress=show)


def _tell(console: Console, results: dict, out: Path, adapter: Path) -> None:
    """The end of the run: the table and what follows from it."""
    console.print(report.summary(results))
    rows = results["variants"]
    console.print(
        "[dim]test: accuracy. step: median; the variants take turns. READ part: the adapter's forward and backward "
        "alone, on such batches. peak: of a step on texts of full length, over the loaded model, in a process of its "
        "own. saved: what autograd keeps for its backward.[/]",
        highlight=False,
    )
    if "fused" in rows:
        same = results["loss_gap"] <= results["loss_allowed"]
        verdict = "[green]the same losses[/]" if same else "[bold red]the losses DIFFER[/]"
        console.print(
            f"READ fused against its definition: {verdict} (at most {results['loss_gap']:.1e} apart in "
            f"{results['steps']} steps, allowed {results['loss_allowed']:.1e}); its part is "
            f"{rows['reference']['read_seconds'] / rows['fused']['read_seconds']:.1f} times as fast.",
            highlight=False,
        )
    key = "fused" if "fused" in rows else "reference"
    before, after = rows[key]["accuracy"], results["reloaded_accuracy"]
    console.print(
        f"Reloaded from {adapter} into a fresh model: {100 * after:.1f} % "
        + ("[green](the same)[/]" if before == after else f"[bold red](was {100 * before:.1f} %)[/]")
        + f", {adapter.stat().st_size / report.MIB:.1f} MiB.",
        highlight=False,
    )
    console.print(
        f"Picture {out}, results {out.with_suffix('.json')}, {results['minutes']:.1f} minutes.", highlight=False
    )
