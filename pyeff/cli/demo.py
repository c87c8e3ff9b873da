"""``pyeff demo``: READ on a real model and real text, by its definition, fused, and beside full fine-tuning."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from pyeff.cli.info import WIDTH


def demo(
    out: Annotated[Path, typer.Option(help="The picture; results and adapter are written beside it.")] = Path(
        "out/demo.png"
    ),
    minutes: Annotated[float, typer.Option(help="Time for everything; the steps are cut to fit.", min=0.1)] = 4.5,
    steps: Annotated[int, typer.Option(help="Training steps of each variant, at most.", min=1)] = 160,
    batch: Annotated[int, typer.Option(help="Texts a step.", min=1)] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens a text, at most.", min=4)] = 64,
    rank: Annotated[int, typer.Option(help="Width of READ's recurrent state.", min=1)] = 256,
    cell: Annotated[str, typer.Option(help="READ's cell: rnn, gru or lstm.")] = "gru",
    lr_read: Annotated[float | None, typer.Option(help="READ's peak rate, if not the default one.", min=0)] = None,
    lr_full: Annotated[float | None, typer.Option(help="The peak rate of full fine-tuning.", min=0)] = None,
    lr_head: Annotated[float | None, typer.Option(help="The peak rate of every head.", min=0)] = None,
    validate: Annotated[
        bool, typer.Option(help="Hold out training texts and test on them, to choose settings.")
    ] = False,
    classes: Annotated[int, typer.Option(help="Packages of the standard library to tell apart.", min=2)] = 16,
    model: Annotated[str, typer.Option(help="Hugging Face name or folder of another model.")] = "",
    dataset: Annotated[str, typer.Option(help="Hugging Face name of a dataset to use instead.")] = "",
    dataset_config: Annotated[str, typer.Option(help="Its configuration, as sst2 of nyu-mll/glue.")] = "",
    text_column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Its column of labels.")] = "label",
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 0,
) -> None:
    """Fine-tune a real encoder with READ, plain and fused, and in full beside it."""
    missing = [name for name in ("transformers", "safetensors", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        typer.echo(f"pyeff demo needs {', '.join(missing)}: pip install 'pyeff[demo]'", err=True)
        raise typer.Exit(1)
    from pyeff.demo import run
    from pyeff.demo.variants import Settings

    settings = Settings(
        model=model or None, steps=steps, batch=batch, max_length=max_length, rank=rank, cell=cell, seed=seed
    )
    rates: dict[str, Any] = {"lr_read": lr_read, "lr_full": lr_full, "lr_head": lr_head}
    settings = dataclasses.replace(settings, **{name: rate for name, rate in rates.items() if rate is not None})
    source = (dataset, dataset_config or None, text_column, label_column) if dataset else None
    try:
        run.demo(settings, out, minutes=minutes, classes=classes, dataset=source, validate=validate, width=WIDTH)
    except (RuntimeError, ValueError) as error:
        typer.echo(f"pyeff demo: {error}", err=True)
        raise typer.Exit(1) from error
