"""What a whole pre-training step takes, encoder, decoder, optimizer and all, for the paper's samples, tokens and masks.

    python -m benchmarks.experiments.multimask_reuse.steps --out benchmarks/results/multimask_steps.json \\
        --into docs/multimask.md

The same Pretrainer on the same batch with the fused ops, and with the paper's eager code in their place. They take
turns, step by step; a ratio is of steps in the same turn, of time and of what the processor's cores spent on it.
Encoder and decoder are most of a step and the same code for both: what is to be seen here is the rest of it. It takes
some minutes.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyeff.recipes import multimask

from ... import memory
from ..ticket_density.store import place
from . import eager

PATHS = ("fused", "eager")
# Samples and tokens; and the encoder, which is random, of the depth of the paper's and the width of ViT-Ti: at that of
# ViT-B a step takes half a minute on two cores, of which the operations are a hundredth.
SHAPES = {"image": (8, 196), "audio": (2, 1000), "text": (4, 512)}
ENCODER = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
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


def on(path: str) -> contextlib.AbstractContextManager[None]:
    """Within it a trainer's step goes by one of ``PATHS``."""
    return eager.in_place_of_ops() if path == "eager" else contextlib.nullcontext()


def measure(kind: str, turns: int, encoder: dict[str, int], tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Steps by all paths in turn, after two that are not counted; and one more of each for its peak."""
    batch, tokens = SHAPES[kind]
    inputs = batch_of(kind, batch, tokens)
    trainers = {
        path: multimask.Pretrainer(build(kind, tokens, encoder), preset=kind, batch_size=batch, steps=turns + 8)
        for path in PATHS
    }
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    spent: dict[str, list[float]] = {path: [] for path in PATHS}
    gc.collect()
    with memory.freed_pages_kept():
        for turn in range(-2, turns):
            for path in PATHS if turn % 2 else PATHS[::-1]:
                with on(path):
                    begun, used = time.perf_counter(), time.process_time()
                    trainers[path].step(inputs)
                    taken, used = time.perf_counter() - begun, time.process_time() - used
                if turn >= 0:
                    seconds[path].append(taken)
                    spent[path].append(used)
                tell(f"{kind}: {'warm-up' if turn < 0 else f'turn {turn + 1} of {turns}'}, {path} {taken:.2f} s")
    peaks, methods = {}, set()
    for trainer in trainers.values():  # what the last step has left would be given back within the next
        trainer.optimizer.zero_grad(set_to_none=True)
    for path in PATHS:
        with on(path):
            peaks[path], method = memory.peak(functools.partial(trainers[path].step, inputs), "cpu")
        methods.add(method)
    masks = trainers["fused"].settings.masks
    return {
        "kind": kind, "batch": batch, "tokens": tokens, "masks": masks, "seconds": seconds, "spent": spent,
        "peak_bytes": peaks, "peak": memory.METHODS[methods.pop()],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    at = found["measured"]
    head = (
        f"{at['machine']['model']}, {at['machine']['cores']} cores, {at['machine']['threads']} threads, torch "
        f"{at['versions']['torch']}, commit {at['commit']}, {at['date']}"
    )
    lines = [
        head, "",
        "| shape | step, fused | eager | eager: gain in time | in processor time | peak, fused / eager |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for row in found["rows"]:
        cells = [f"{statistics.median(row['seconds'][path]):.2f} s" for path in PATHS]
        for times in (row["seconds"], row["spent"]):
            ratios = [a / b for a, b in zip(times["eager"], times["fused"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells.append(f"{statistics.median(ratios):.3f}x ({low:.3f} to {high:.3f})")
        peaks = " / ".join(f"{row['peak_bytes'][path] / 2**20:.0f}" for path in PATHS)
        shape = f"{row['kind']}: B={row['batch']}, T={row['tokens']}, M={row['masks']}"
        lines.append(f"| {shape} | {' | '.join(cells)} | {peaks} MiB |")
    turns = len(found["rows"][0]["seconds"]["fused"])
    return "\n".join([*lines, "", f"Medians of {turns} turns; ratios within a turn, with their quartiles."])


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
    if given.only_report and not given.out:
        parser.error("--only-report wants --out, the result that is there")
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
        if not write_into(found, page):
            parser.error(f"{page} has no place for the table: <!-- multimask-steps --> to <!-- /multimask-steps -->")


if __name__ == "__main__":
    main()
