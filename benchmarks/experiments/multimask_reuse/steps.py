"""What a whole pre-training step takes, at the three shapes of the paper: encoder, decoder, optimizer and all.

    python -m benchmarks.experiments.multimask_reuse.steps --out benchmarks/results/multimask_steps.json \\
        --into docs/multimask.md

The same Pretrainer on the same batch with the fused ops, with the paper's eager code in their place, and with that
under torch.compile. They take turns, step by step; a ratio is of steps in the same turn. Encoder and decoder are most
of a step and the same code for all: what is to be seen here is the rest of it. It takes about ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyeff.recipes import multimask

from ... import memory
from ...compiled import compiled
from ...results import spread
from ..ticket_density.store import place
from . import eager

PATHS = ("fused", "eager", "compiled")
# Samples, tokens, and the encoder: of the size of ViT-B/16 and BERT-base, at random.
SHAPES = {"image": (8, 196), "audio": (2, 1000), "text": (4, 512)}
ENCODER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MARKED = re.compile(r"<!-- multimask-steps -->.*?<!-- /multimask-steps -->", re.DOTALL)


def build(kind: str, tokens: int, encoder: dict[str, int]) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = encoder | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "image":
        side = 16 * round(tokens**0.5)
        return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=side), add_pooling_layer=False)
    config = transformers.BertConfig(**sizes, max_position_embeddings=tokens)
    return transformers.BertModel(config, add_pooling_layer=False)


def batch_of(kind: str, batch: int, tokens: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    if kind == "image":
        side = 16 * round(tokens**0.5)
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=drawn)}
    return {"input_ids": torch.randint(1000, 30000, (batch, tokens), generator=drawn)}


@contextlib.contextmanager
def on(path: str, wrapped: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within it a trainer's step goes by one of ``PATHS``."""
    if path == "fused":
        yield
    else:
        with eager.in_place_of_ops(wrapped if path == "compiled" else None):
            yield


def measure(kind: str, turns: int, encoder: dict[str, int], tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Steps by all paths in turn, after two that are not counted; and one more of each for its peak."""
    batch, tokens = SHAPES[kind]
    inputs = batch_of(kind, batch, tokens)
    wrapped = functools.cache(lambda function: compiled(function, "cpu", fullgraph=False))
    trainers = {
        path: multimask.Pretrainer(build(kind, tokens, encoder), preset=kind, batch_size=batch, steps=turns + 8)
        for path in PATHS
    }
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    gc.collect()
    with memory.freed_pages_kept():
        for turn in range(-2, turns):
            for path in PATHS[turn % 3 :] + PATHS[: turn % 3]:
                with on(path, wrapped):
                    begun = time.perf_counter()
                    trainers[path].step(inputs)
                    taken = time.perf_counter() - begun
                if turn >= 0:
                    seconds[path].append(taken)
                tell(f"{kind}: {'warm-up' if turn < 0 else f'turn {turn + 1} of {turns}'}, {path} {taken:.2f} s")
    peaks, methods = {}, set()
    for path in PATHS:
        with on(path, wrapped):
            peaks[path], method = memory.peak(functools.partial(trainers[path].step, inputs), "cpu")
        methods.add(method)
    masks = trainers["fused"].settings.masks
    return {
        "kind": kind, "batch": batch, "tokens": tokens, "masks": masks, "seconds": seconds, "peak_bytes": peaks,
        "peak": memory.METHODS[methods.pop()],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    at = found["measured"]
    head = (
        f"{at['machine']['model']}, {at['machine']['cores']} cores, {at['machine']['threads']} threads, torch "
        f"{at['versions']['torch']}, commit {at['commit']}, {at['date']}"
    )
    lines = [
        head, "", "| shape | step, fused | eager | compiled | eager / fused | compiled / fused | peak of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for row in found["rows"]:
        times = row["seconds"]
        cells = [f"{statistics.median(times[path]):.2f} s" for path in PATHS]
        for path in PATHS[1:]:
            ratios = [a / b for a, b in zip(times[path], times["fused"], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f}x ± {100 * spread(ratios):.1f} %")
        peaks = " / ".join(f"{row['peak_bytes'][path] / 2**20:.0f}" for path in PATHS)
        shape = f"{row['kind']}: B={row['batch']}, T={row['tokens']}, M={row['masks']}"
        lines.append(f"| {shape} | {' | '.join(cells)} | {peaks} MiB |")
    turns = len(found["rows"][0]["seconds"]["fused"])
    return "\n".join([*lines, "", f"Medians of {turns} turns; ratios within a turn, with their interquartile range."])


def write_into(found: dict[str, Any], page: Path) -> int:
    """Fills the place of a page; returns how many there are."""
    filled = f"<!-- multimask-steps -->\n\n{table(found)}\n\n<!-- /multimask-steps -->"
    text, places = MARKED.subn(lambda match: filled, page.read_text())
    page.write_text(text)
    return places


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where the result goes, after each shape")
    parser.add_argument("--into", type=Path, action="append", default=[], help="pages whose place is filled")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--only-report", action="store_true", help="fill the pages from --out, and measure nothing")
    given = parser.parse_args(arguments)
    if given.only_report:
        found = json.loads(given.out.read_text())
    else:
        found = {"schema": 1, "measured": place(), "rows": []}
        for kind in SHAPES:
            found["rows"].append(measure(kind, given.turns, ENCODER))
            gc.collect()
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))
    for page in given.into:
        write_into(found, page)


if __name__ == "__main__":
    main()
