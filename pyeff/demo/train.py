"""The training run: all variants take turns, step by step, on the same batches.

Whatever slows the machine down for a while slows them all. Only the step itself is timed; the test set is answered
between steps, off the clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyeff.demo.data import Corpus, Example
from pyeff.demo.variants import Settings, Variant

# Batches are cut from this many texts sorted by length, so that little of a batch is padding.
WINDOW = 8
EVALUATION_BATCH = 64
# The first steps pay for allocations and for the kernels' first use: they train, but no time is read from them.
UNTIMED = 2
# Answering a batch of the test set, of a training step on as many texts: about this much over all variants.
ANSWERING = 0.6


@dataclasses.dataclass
class Curve:
    """What one variant did.

    Attributes:
        losses (list of float): of each step.
        seconds (list of float): of each step.
        accuracies (list of (int, float, float)): steps done, seconds of training till then, test accuracy.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)

    def step_seconds(self) -> float:
        """The median step, the first ones left out where there are others."""
        return statistics.median(self.seconds[UNTIMED:] or self.seconds)


class Batches:
    """Tokenised text in batches.

    Args:
        corpus (Corpus): the text.
        tokenizer: of Hugging Face.
        settings (Settings): batch size, length and seed.
    """

    def __init__(self, corpus: Corpus, tokenizer, settings: Settings) -> None:
        self.pad, self.settings = tokenizer.pad_token_id, settings
        self.train, self.test = (self._encode(side, tokenizer) for side in (corpus.train, corpus.test))

    def _encode(self, examples: list[Example], tokenizer) -> list[tuple[list[int], int]]:
        texts = [example.text for example in examples]
        ids = tokenizer(texts, truncation=True, max_length=self.settings.max_length)["input_ids"]
        return list(zip(ids, (example.label for example in examples), strict=True))

    def _batch(self, rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        table = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(table)
        for i, (ids, _) in enumerate(rows):
            table[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
        return {"input_ids": table, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}

    def training(self) -> Iterator[dict[str, Tensor]]:
        """Without end, in an order that only the seed decides."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        size = min(self.settings.batch, len(self.train))
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            cut = []
            for start in range(0, len(order), WINDOW * size):
                window = sorted(order[start : start + WINDOW * size], key=lambda i: len(self.train[i][0]))
                cut += [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
            for i in torch.randperm(len(cut), generator=generator).tolist():
                yield self._batch([self.train[j] for j in cut[i]])

    def testing(self) -> Iterator[dict[str, Tensor]]:
        """The test set once, by length."""
        rows = sorted(self.test, key=lambda row: len(row[0]))
        for start in range(0, len(rows), EVALUATION_BATCH):
            yield self._batch(rows[start : start + EVALUATION_BATCH])


def affordable(curves: dict[str, Curve], batches: Batches, settings: Settings, budget: float) -> int:
    """How many steps fit into ``budget`` seconds with their evaluations, judged by the steps so far; at most all."""
    a_round = sum(statistics.mean(curve.seconds[UNTIMED:] or curve.seconds) for curve in curves.values())
    evaluations = settings.evaluations * ANSWERING * a_round * len(batches.test) / settings.batch
    spent, done = sum(sum(curve.seconds) for curve in curves.values()), max(len(c.losses) for c in curves.values())
    return max(min(settings.steps, done + int((budget - spent - evaluations) / a_round)), done)


def run(
    variants: list[Variant],
    batches: Batches,
    settings: Settings,
    *,
    budget: float | None = None,
    progress: Callable[[str, int, int, dict[str, Curve]], None] = lambda *_: None,
) -> dict[str, Curve]:
    """Trains the variants in turns.

    Args:
        variants (list of Variant): what takes part.
        batches (Batches): the text.
        settings (Settings): steps and evaluations.
        budget (float, optional): seconds; the steps are cut during warm-up to what fits. Default: all steps.
        progress (callable): gets what is going on, rounds done, rounds in all, and the curves so far.

    Returns:
        dict of Curve, by the variants' keys.
    """
    curves = {variant.key: Curve() for variant in variants}
    training, steps = batches.training(), settings.steps
    decide = min(settings.warmup, steps) - 1
    for index in range(settings.steps):
        batch = next(training)
        for turn in range(len(variants)):
            variant = variants[(index + turn) % len(variants)]  # nobody always follows the same neighbour
            curve = curves[variant.key]
            start = time.perf_counter()
            loss = variant.step(batch, index, steps)
            curve.seconds.append(time.perf_counter() - start)
            curve.losses.append(loss)
            progress(variant.title, index, steps, curves)
        if index == decide and budget is not None:
            steps = affordable(curves, batches, settings, budget)
        last = index + 1 >= steps
        every = max(steps // settings.evaluations, 1)
        if last or ((index + 1) % every == 0 and index + 1 + every <= steps):
            for variant in variants:
                progress(f"testing {variant.title}", index + 1, steps, curves)
                accuracy = variant.accuracy(batches.testing())
                curve = curves[variant.key]
                curve.accuracies.append((index + 1, sum(curve.seconds), accuracy))
        progress("", index + 1, steps, curves)
        if last:
            break
    return curves


def loss_gap(curves: dict[str, Curve]) -> float:
    """The largest difference between the losses of READ's two variants at the same step."""
    pairs = zip(curves["reference"].losses, curves["fused"].losses, strict=True)
    return max(abs(a - b) for a, b in pairs)


def loss_allowance(losses: list[float], terms: int) -> float:
    """How far rounding alone takes the losses of two float32 runs apart that add in another order.

    A gradient of ``terms`` summands is wrong by ``eps (2 + 2 sqrt(terms))`` of itself, as in the tests' tolerance. So
    is each update, as AdamW does not depend on the gradient's scale, and with it how far the update moves the loss: in
    sum, that share of the first loss and of all its moves.
    """
    share = torch.finfo(torch.float32).eps * (2 + 2 * math.sqrt(terms))
    return share * (abs(losses[0]) + sum(abs(b - a) for a, b in itertools.pairwise(losses)))
