"""``pyeff prune``: a real encoder as a ticket, with what it keeps and what it gains on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

METHODS = ("one_shot", "block_imp", "projection", "random")
TASKS = ("", "docstrings")


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face name or folder of an encoder; else a small one.")] = "",
    density: Annotated[float, typer.Option(help="The share of the weights that is left.", min=0.0, max=1.0)] = 0.3,
    block: Annotated[str, typer.Option(help="Rows and columns of a block: 32, or 16x32.")] = "32",
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; the two in the middle train.")] = "",
    scope: Annotated[str, typer.Option(help="Rank globally: global or scaled; or each layer: layer.")] = "scaled",
    floor: Annotated[float, typer.Option(help="The share of every layer that is left in any case.", min=0.0)] = 0.0,
    regroup: Annotated[bool, typer.Option("--regroup", help="Order hidden units first, so that blocks fill.")] = False,
    task: Annotated[str, typer.Option(help="Train on this: docstrings, those of the standard library.")] = "",
    data: Annotated[str, typer.Option(help="Or on this dataset of Hugging Face, or folder.")] = "",
    data_config: Annotated[str, typer.Option(help="Its configuration, as sst2 of nyu-mll/glue.")] = "",
    text_column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Its column of labels.")] = "label",
    rounds: Annotated[int, typer.Option(help="Rounds of pruning; 0: a tenth of the weights each.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Training steps of a round, and of the ticket.", min=1)] = 160,
    batch: Annotated[int, typer.Option(help="Texts a step.", min=1)] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens a text, at most.", min=4)] = 64,
    lr: Annotated[float, typer.Option(help="AdamW's peak rate for the encoder.", min=0)] = 2e-4,
    choose: Annotated[str, typer.Option(help="Leave dense what a ticket does not speed up: inference, training.")] = "",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Query, key and value as one layer, activations in the kernels.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for ticket, configuration, tokenizer, report.")] = Path(
        "out/ticket"
    ),
    seed: Annotated[int, typer.Option(help="Of head, batches, dropout and random blocks.")] = 0,
) -> None:
    """Prune an encoder to living blocks, and measure it beside the dense one."""
    missing = [name for name in ("transformers", "safetensors") if not importlib.util.find_spec(name)]
    if missing:
        typer.echo(f"pyeff prune needs {', '.join(missing)}: pip install 'pyeff[cli,hf]'", err=True)
        raise typer.Exit(1)
    from pyeff.cli import _prune

    try:
        _expect("method", method, ("", *METHODS))
        _expect("task", task, TASKS)
        _expect("choose", choose, ("", "inference", "training"))
        if task and data:
            raise ValueError("--task and --data exclude each other")
        options = _prune.Options(
            model=model, density=density, block=_block(block), method=method, scope=scope, floor=floor, regroup=regroup,
            docstrings=bool(task), dataset=(data, data_config or None, text_column, label_column) if data else None,
            rounds=rounds or None, steps=steps, batch=batch, max_length=max_length, lr=lr, choose=choose or "all",
            fuse=fuse, seed=seed,
        )  # fmt: skip
        _prune.run(options, out)
    except (RuntimeError, ValueError, OSError) as error:
        typer.echo(f"pyeff prune: {error}", err=True)
        raise typer.Exit(1) from error


def _expect(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"--{name} is {value!r}, expected one of {', '.join(filter(None, known))}")


def _block(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--block is {text!r}, expected a positive number, or two as 16x32")
    return int(parts[0]), int(parts[-1])
