"""Training a classifier under a mask, with masked dense weights or with the blocks alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyeff.demo import data, train, variants
from pyeff.recipes import ticket

from . import methods
from .methods import Job, Masks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THROUGH = ("masked", "ticket")
# How many steps of the two ways to train are held against each other.
CHECKED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a result depends on beside methods, densities and seeds.

    Attributes:
        steps (int), batch (int), max_length (int): training steps, texts a step, tokens a text at most.
        lr_encoder, lr_head (float): AdamW's peak rates; those that the demo found best for the dense model.
        warmup (int): steps of linear warm-up; the rate falls linearly to zero at the last step.
        dtype (str): ``"float32"``, or ``"bfloat16"`` by autocast, with float32 weights, gradients and moments.
        through (str): how masks of blocks are trained, ``"masked"`` or ``"ticket"``.
        round (float): the share of the original weights that a round of IMP takes away.
        classes (int): packages to tell apart.
    """

    steps: int = 60
    batch: int = 32
    max_length: int = 64
    lr_encoder: float = 2e-4
    lr_head: float = 2e-2
    warmup: int = 10
    dtype: str = "bfloat16"
    through: str = "masked"
    round: float = 0.1
    classes: int = 16

    def demo(self, seed: int) -> variants.Settings:
        """The same as the demo's settings."""
        return variants.Settings(
            steps=self.steps, batch=self.batch, max_length=self.max_length, lr_full=self.lr_encoder,
            lr_head=self.lr_head, warmup=self.warmup, seed=seed,
        )  # fmt: skip


class Trained(variants.Variant):
    """A classifier in training, all of it, under a mask.

    Args:
        model (Module): where it starts; copied.
        settings (Settings): rates and sizes.
        job (Job): whose mask it is, and the seed.
        masks (dict of Tensor): by layer; empty for the dense model.
        through (str, optional): ``"masked"`` or ``"ticket"``. Default: that of the settings.
        dtype (str, optional): of the products. Default: that of the settings.
        fused (bool): query, key and value of a ticket as one layer.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, job: Job, masks: Masks,
        *, through: str | None = None, dtype: str | None = None, fused: bool = False,
    ) -> None:  # fmt: skip
        self.autocast = DTYPES[dtype or settings.dtype]
        self.by_ticket = (through or settings.through) == "ticket" and job.block is not None
        if self.by_ticket:
            model = copy.deepcopy(model)
            ticket.install(model, methods.tickets(job, masks))
            if fused:
                ticket.fuse_qkv(model)
        super().__init__("full", model, settings.demo(job.seed))
        for group in self.optimizer.param_groups:
            group["fused"] = True  # one pass over weights, gradients and moments, to nobody's disadvantage
        # The loss is formed in float32 also where products are not.
        self.model.register_forward_hook(lambda module, inputs, output: output.float())
        if not self.by_ticket:
            for name, mask in masks.items():
                restrict(self.model.get_submodule(name).weight, methods.to_elements(mask, job.block))

    def running(self) -> contextlib.AbstractContextManager:
        """Entered anew for each step: autocast keeps its copies of the weights until it is left."""
        return torch.autocast("cpu", self.autocast, enabled=self.autocast != torch.float32)

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        """The pruned layers' weights as they are now, dense."""
        return {name: self.model.get_submodule(name).weight.detach() for name in names}

    @torch.no_grad()
    def answers(self, batches: train.Batches) -> list[bool]:
        """Which texts of the test set get the right answer, in a fixed order."""
        self.model.eval()
        right: list[bool] = []
        for batch in batches.testing():
            with self.running():
                found = self.model(batch["input_ids"], batch["attention_mask"]).argmax(1)
            right += (found == batch["labels"]).tolist()
        return right


def restrict(weight: nn.Parameter, mask: Tensor) -> None:
    """Sets a weight to zero where the mask is, for good.

    AdamW moves every element by its own gradients and shrinks it: what is zero and gets none stays zero, and the others
    go as if it were not there.
    """
    factor = mask.to(weight.dtype)
    with torch.no_grad():
        weight.mul_(factor)
    weight.register_hook(lambda gradient: gradient * factor)


class Bench:
    """The text and the models to begin with.

    Args:
        settings (Settings): as named.
        corpus (Corpus, optional): text at hand. Default: the standard library's docstrings.
    """

    def __init__(self, settings: Settings, corpus: data.Corpus | None = None) -> None:
        self.settings = settings
        self.corpus = corpus or data.standard_library(settings.classes)
        self._seed: int | None = None

    def at(self, seed: int) -> tuple[variants.Classifier, train.Batches]:
        """The pretrained classifier, whose head is the seed's, and the batches. It is not to be changed."""
        if seed != self._seed:
            settings = self.settings.demo(seed)
            tokenizer, self._model = variants.load(settings, len(self.corpus.labels))
            self._batches, self._seed = train.Batches(self.corpus, tokenizer, settings), seed
        return self._model, self._batches

    def pretrained(self, seed: int) -> dict[str, Tensor]:
        """The weights that a mask chooses among, by layer."""
        return {name: layer.weight.detach() for name, layer in methods.layers(self.at(seed)[0]).items()}

    def fit(self, job: Job, masks: Masks, progress: Callable[[int], None] = lambda step: None):
        """One training: the trained model, and what is to be kept of it."""
        model, batches = self.at(job.seed)
        start = time.perf_counter()
        trained = Trained(model, self.settings, job, masks)
        training, losses = batches.training(), []
        for index in range(self.settings.steps):
            losses.append(trained.step(next(training), index, self.settings.steps))
            progress(index + 1)
        answers = trained.answers(batches)
        return trained, {
            **dataclasses.asdict(job),
            "through": "ticket" if trained.by_ticket else "masked",
            "right": sum(answers),
            "texts": len(answers),
            "answers": to_hex(answers),
            "losses": [round(loss, 4) for loss in losses],
            "seconds": round(time.perf_counter() - start, 1),
        }

    def agreement(self, job: Job, masks: Masks) -> dict[str, float | int | str]:
        """The losses of the two ways to train a mask of blocks, in float32, dropout included.

        Raises:
            RuntimeError: they are further apart than rounding explains.
        """
        model, batches = self.at(job.seed)
        losses = {}
        for through in THROUGH:
            trained = Trained(model, self.settings, job, masks, through=through, dtype="float32")
            training = batches.training()
            losses[through] = [trained.step(next(training), i, self.settings.steps) for i in range(CHECKED_STEPS)]
        gap = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        allowed = train.loss_allowance(losses["masked"], self.settings.batch * self.settings.max_length)
        if not gap <= allowed:
            raise RuntimeError(
                f"{job.name}: the losses {losses['ticket']} of TicketLinear are {gap:.1e} from {losses['masked']}, the "
                f"masked dense weights', where rounding explains {allowed:.1e}"
            )
        return {"job": job.name, "steps": CHECKED_STEPS, "gap": gap, "allowed": allowed}


def to_hex(answers: list[bool]) -> str:
    """Bits as hexadecimal digits, the first answer in the highest bit."""
    return f"{int(''.join('01'[a] for a in answers), 2):0{-(-len(answers) // 4)}x}"


def from_hex(digits: str, count: int) -> list[bool]:
    """What :func:`to_hex` wrote of ``count`` answers."""
    return [bit == "1" for bit in f"{int(digits, 16):0{count}b}"]
