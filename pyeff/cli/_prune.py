"""What ``pyeff prune`` does: load, train, prune, measure, save, tell."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyeff import _machine
from pyeff.cli import _prune_task
from pyeff.demo.variants import Settings, load
from pyeff.recipes import _ticket_measure, ticket

MIB = 2**20
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of the command, checked where only their combination can be."""

    model: str
    density: float
    block: tuple[int, int]
    method: str
    scope: str
    floor: float
    regroup: bool
    docstrings: bool
    dataset: tuple[str, str | None, str, str] | None
    rounds: int | None
    steps: int
    batch: int
    max_length: int
    lr: float
    choose: str
    fuse: bool
    seed: int

    @property
    def trains(self) -> bool:
        """Whether there is a task."""
        return self.docstrings or self.dataset is not None


def run(options: Options, out: Path) -> dict[str, Any]:
    """Everything; returns what is written as report.json.

    Raises:
        RuntimeError, ValueError: model or text cannot be had, or options that exclude each other.
    """
    start = time.perf_counter()
    method = options.method or ("block_imp" if options.trains else "one_shot")
    if method in ("block_imp", "projection") and not options.trains:
        raise ValueError(f"--method {method} trains, expected --task or --data")
    if options.rounds is not None and method not in ("block_imp", "projection"):
        raise ValueError(
            f"--rounds is {options.rounds} with --method {method}, expected block_imp or projection with it"
        )
    console = Console()
    console.width = min(console.width, WIDTH)
    settings = Settings(
        model=options.model or None, steps=options.steps, batch=options.batch, max_length=options.max_length,
        lr_full=options.lr, seed=options.seed,
    )  # fmt: skip
    corpus = _prune_task.corpus(options.docstrings, options.dataset, options.seed) if options.trains else None
    with console.status("Loading the model"):
        tokenizer, model = load(settings, len(corpus.labels) if corpus else 2)
    task = _prune_task.Task(corpus, tokenizer, settings) if corpus else None
    report: dict[str, Any] = {"method": method, "options": dataclasses.asdict(options), "machine": _machine.describe()}
    report["model"] = options.model or "all-MiniLM-L6-v2"
    dense = copy.deepcopy(model)
    if task:
        console.print(task.title(), highlight=False)
    if options.regroup and method != "projection":
        report["regrouped"] = _regroup(model, options, console)
    pruning = _prune_model(model, task, method, options, console, report)
    if task:
        with _progress(console) as bar:
            report["ticket_accuracy"] = task.train(model, bar, "training the ticket")
    _measure(model, dense, pruning, options, console, report)
    report["pruning"] = pruning.to_dict()
    report["minutes"] = (time.perf_counter() - start) / 60
    _save(model, tokenizer, report, out)
    _tell(report, console, out)
    return report


def _regroup(model: Any, options: Options, console: Console) -> dict[str, Any]:
    with console.status("Ordering hidden units"):
        return ticket.regroup(model, options.block, density=options.density).retained


def _prune_model(
    model: Any, task: _prune_task.Task | None, method: str, options: Options, console: Console, report: dict
) -> ticket.Pruning:
    # The head is the classifier's own and no part of the encoder; an encoder that is averaged never asks its pooler.
    common: dict[str, Any] = {
        "density": options.density, "scope": options.scope, "floor": options.floor, "exclude": _without(model),
    }  # fmt: skip
    if task is None:
        return ticket.prune(model, block=options.block, method=method, seed=options.seed, **common)
    with _progress(console) as bar:
        accuracies: list[float] = []

        def train(network: Any) -> float:
            accuracies.append(task.train(network, bar, f"round {len(accuracies) + 1}"))
            return accuracies[-1]

        if method == "projection":
            found = ticket.prune(model, train, method="imp", rounds=options.rounds, **common)
            if options.regroup:
                report["regrouped"] = _regroup(model, options, console)
            rounds = found.rounds
            found = ticket.blockify(
                model, options.block, density=options.density, scope=options.scope, floor=options.floor
            )
            found = dataclasses.replace(found, rounds=rounds)
        else:
            rounds_given = options.rounds if method == "block_imp" else None
            found = ticket.prune(
                model, train, block=options.block, method=method, rounds=rounds_given, seed=options.seed, **common
            )
    report["rounds"] = [{"density": r["density"], "accuracy_before": r["returned"]} for r in found.rounds]
    return found


def _without(model: Any) -> list[str]:
    return [r"\bpooler\b"] if any("pooler" in name.split(".") for name in ticket.targets(model)) else []


def _measure(model: Any, dense: Any, pruning: ticket.Pruning, options: Options, console: Console, report: dict) -> None:
    """Times of each layer and of the whole, on random texts of full length."""
    ids = torch.randint(10, model.encoder.config.vocab_size, (options.batch, options.max_length))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _progress(console) as bar:
        row = bar.add_task("timing layers", total=None, now="")
        found = ticket.sparsify(
            model, sample, mode=options.choose, fuse=options.fuse,
            progress=lambda name, number, count: bar.update(row, completed=number, total=count, now=name),
        )  # fmt: skip
        bar.update(row, now="the whole model")
        whole = _ticket_measure.compare_models({"dense": dense, "ticket": model}, sample, torch.device("cpu"))
    # Measured were tickets that are there; what they have kept is known from the pruning.
    known = {name: dataclasses.replace(r, retained=pruning.layers[name].retained) for name, r in found.layers.items()}
    found = dataclasses.replace(found, layers=known)
    report["layers"], report["model_seconds"] = found.to_dict(), whole
    size = {
        name: sum(p.numel() * p.element_size() for p in m.parameters())
        for name, m in (("dense", dense), ("ticket", model))
    }
    index = sum(t.numel() * t.element_size() for t in (t.index for t in ticket.tickets(model).values()))
    report["model_bytes"] = {"dense": size["dense"], "ticket": size["ticket"] + index}
    # Weights, gradients and both of Adam's moments.
    report["training_bytes"] = {"dense": 4 * size["dense"], "ticket": 4 * size["ticket"] + index}
    report["table"] = found
    model.eval()


def _save(model: Any, tokenizer: Any, report: dict, out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    if ticket.tickets(model):
        ticket.save(model.encoder, out / "ticket.safetensors")
    if "ticket_accuracy" in report:
        save_file({n: t.contiguous() for n, t in model.head.state_dict().items()}, out / "head.safetensors")
    model.encoder.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    written = {name: value for name, value in report.items() if name != "table"}
    (out / "report.json").write_text(json.dumps(written, indent=2, default=str) + "\n")


def _tell(report: dict, console: Console, out: Path) -> None:
    console.print(report["table"].table())
    for number, row in enumerate(report.get("rounds", ()), 1):
        console.print(
            f"round {number}: {100 * row['accuracy_before']:.1f} % before pruning to {100 * row['density']:.0f} %",
            highlight=False,
        )
    if "ticket_accuracy" in report:
        console.print(f"the ticket, trained: [bold]{100 * report['ticket_accuracy']:.1f} %[/]", highlight=False)
    times, size, training = report["model_seconds"], report["model_bytes"], report["training_bytes"]
    console.print(f"left of the magnitude: {100 * report['pruning']['retained']:.1f} %", highlight=False)
    for i, name in enumerate(("forward", "forward and backward")):
        ours, dense = times["ticket"][i], times["dense"][i]
        console.print(
            f"{name} of the model: {1000 * ours:.0f} ms, dense {1000 * dense:.0f} ms: {dense / ours:.2f} times as fast",
            highlight=False,
        )
    console.print(
        f"weights of the model: {size['ticket'] / MIB:.1f} MiB, dense {size['dense'] / MIB:.1f}; with gradients and "
        f"Adam's moments {training['ticket'] / MIB:.1f} MiB, dense {training['dense'] / MIB:.1f}",
        highlight=False,
    )
    console.print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}", highlight=False)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=console, transient=True)
