"""The training of ``pyeff prune``: the demo's text and batches, with a fresh optimizer and schedule each time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress

from pyeff.demo import data, train
from pyeff.demo.variants import Settings


def corpus(docstrings: bool, dataset: tuple[str, str | None, str, str] | None, seed: int) -> data.Corpus:
    """The standard library's docstrings, or a dataset of Hugging Face.

    Raises:
        RuntimeError, ValueError: it cannot be had.
    """
    return data.standard_library() if docstrings or dataset is None else data.hugging_face(*dataset, seed=seed)


class Task:
    """Text to learn from and to test on.

    Args:
        corpus (Corpus): the text.
        tokenizer: of Hugging Face.
        settings (Settings): steps, batches, rates and seed.
    """

    def __init__(self, corpus: data.Corpus, tokenizer: Any, settings: Settings) -> None:
        self.corpus, self.settings = corpus, settings
        self.batches = train.Batches(corpus, tokenizer, settings)

    def title(self) -> str:
        """What it is, in one line."""
        c = self.corpus
        return (
            f"[bold]{c.name}[/]: {len(c.train)} texts to learn from, {len(c.test)} to test on, {len(c.labels)} classes "
            f"(always the most frequent: {100 * c.majority():.1f} %)"
        )

    def train(self, model: Any, bar: Progress, title: str) -> float:
        """Trains all of a classifier with linear warm-up and decay; returns its test accuracy.

        Raises:
            RuntimeError: the loss is not finite.
        """
        settings = self.settings
        groups = [(model.encoder, settings.lr_full), (model.head, settings.lr_head)]
        peaks = [rate for _, rate in groups]
        optimizer = torch.optim.AdamW(
            [{"params": list(part.parameters()), "lr": rate} for part, rate in groups], weight_decay=0.01
        )
        torch.manual_seed(settings.seed)
        row = bar.add_task(title, total=settings.steps, now="")
        model.train()
        for step, batch in zip(range(settings.steps), self.batches.training(), strict=False):
            warm, left = (step + 1) / settings.warmup, settings.steps - step
            rate = min(warm, left / max(settings.steps - settings.warmup, 1), 1.0)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            loss = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"the loss of step {step + 1} is {loss.item()}, expected a finite number: lower --lr"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(row, advance=1, now=f"loss {loss.item():.2f}")
        bar.update(row, now="testing")
        accuracy = self.accuracy(model)
        bar.update(row, now=f"{100 * accuracy:.1f} %")
        return accuracy

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """The share of right answers."""
        model.eval()
        right = total = 0
        for batch in self.batches.testing():
            answers = model(batch["input_ids"], batch["attention_mask"]).argmax(1)
            right += int((answers == batch["labels"]).sum())
            total += len(answers)
        return right / total
