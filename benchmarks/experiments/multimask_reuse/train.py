"""One pre-training, stopped now and then to see what its teacher's features are worth."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes import multimask

from . import eager
from .data import LEAST, Task

PATHS = ("fused", "eager")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all trainings of one modality.

    Attributes:
        rows (int): students of a step, B * M.
        steps (int): of each training.
        moments (int): probes in a training, evenly apart, beside the one before it.
        width, layers, heads (int): of the encoder.
        tokens (int): of a sample.
        keep, adjust (float), length (int): of the masks.
        top (int): layers that the targets are made of.
        decoder_width, decoder_layers, decoder_kernel, decoder_groups (int): of the decoder.
        lr (float): of AdamW after ``warmup`` steps; constant, so that every moment is one of a training of any length.
        ema_decay, ema_end (float), ema_steps (int): of the teacher.
        norm (str, optional): of each layer in the targets. Default: the preset's.
        positions (bool): whether the encoder has position embeddings, which are trained; without, they are zero.
        least (int): occurrences below which word pieces are one and the same unknown piece; text only.
        seed (int): of everything.
    """

    rows: int
    steps: int
    moments: int
    width: int
    layers: int
    heads: int
    tokens: int
    keep: float
    adjust: float
    length: int
    top: int
    decoder_width: int
    decoder_layers: int
    decoder_kernel: int
    decoder_groups: int
    lr: float
    warmup: int
    ema_decay: float
    ema_end: float
    ema_steps: int
    norm: str | None = None
    positions: bool = True
    least: int = LEAST
    seed: int = 0


def build(task: Task, settings: Settings) -> nn.Module:
    """A small encoder of Hugging Face with random weights, the same for every training."""
    import transformers

    torch.manual_seed(settings.seed)
    sizes: dict[str, Any] = {
        "hidden_size": settings.width, "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "intermediate_size": 4 * settings.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if task.kind == "image":
        side = task.unlabelled["pixel_values"].shape[-1]
        config: Any = transformers.ViTConfig(**sizes, image_size=side, patch_size=1, num_channels=1)
        return transformers.ViTModel(config, add_pooling_layer=False)
    config = transformers.BertConfig(
        **sizes, vocab_size=task.vocabulary, max_position_embeddings=settings.tokens, pad_token_id=0
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    if not settings.positions:
        nn.init.zeros_(model.embeddings.position_embeddings.weight).requires_grad_(False)
    return model


def pretrainer(task: Task, settings: Settings, masks: int) -> multimask.Pretrainer:
    s = settings
    return multimask.Pretrainer(
        build(task, s), preset=task.kind, masks=masks, keep=s.keep, adjust=s.adjust, length=s.length,
        top_k_layers=s.top, norm=s.norm, decoder_width=s.decoder_width, decoder_layers=s.decoder_layers,
        decoder_kernel=s.decoder_kernel, decoder_groups=s.decoder_groups, ema_decay=s.ema_decay, ema_end=s.ema_end,
        ema_steps=s.ema_steps, lr=s.lr, schedule=lambda step: min((step + 1) / s.warmup, 1.0),
        batch_size=s.rows // masks, steps=s.steps, warmup=s.warmup, seed=s.seed,
    )  # fmt: skip


def run(
    task: Task, settings: Settings, masks: int, path: str, progress: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """One training: ``masks`` students of a sample, by the fused ops or the eager path.

    Time is that of the steps alone, batches included and probes left out.

    Returns:
        dict: with a row for each probe: steps, seconds, right answers, loss since the last one, spreads.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}, expected one of {', '.join(PATHS)}")
    trainer = pretrainer(task, settings, masks)
    batch, order = settings.rows // masks, torch.Generator().manual_seed(settings.seed)
    moments = [round(settings.steps * (i + 1) / settings.moments) for i in range(settings.moments)]
    found = [{"step": 0, "seconds": 0.0, **probe(trainer.teacher, task)}]
    seconds, queue = 0.0, torch.empty(0, dtype=torch.int64)
    torch.manual_seed(settings.seed)
    with eager.in_place_of_ops() if path == "eager" else contextlib.nullcontext():
        for step in range(1, settings.steps + 1):
            begun = time.perf_counter()
            while len(queue) < batch:
                queue = torch.cat([queue, torch.randperm(task.samples, generator=order)])
            trainer.step(task.batch(queue[:batch]))
            queue = queue[batch:]
            seconds += time.perf_counter() - begun
            progress(step)
            if step in moments:
                told = trainer.metrics()
                shown = {name: told[name] for name in ("loss", "target_spread", "prediction_spread")}
                found.append({"step": step, "seconds": round(seconds, 3), **shown, **probe(trainer.teacher, task)})
    return {"kind": task.kind, "masks": masks, "path": path, "seed": settings.seed, "batch": batch, "moments": found}


@torch.no_grad()
def features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over tokens of the last states, of all samples, in float64."""
    given = {name: t for name, t in inputs.items() if name != "labels"}
    count, rows = len(inputs["labels"]), []
    training = model.training
    model.eval()
    for start in range(0, count, 256):
        part = {name: t[start : start + 256] for name, t in given.items()}
        states = model(**part).last_hidden_state
        if "attention_mask" in part:
            valid = part["attention_mask"][..., None].to(states.dtype)
            rows.append((states * valid).sum(1) / valid.sum(1))
        else:
            rows.append(states[:, 1:].mean(1))
    model.train(training)
    return torch.cat(rows).double()


def probe(model: nn.Module, task: Task) -> dict[str, int]:
    """Right answers on the test set of a linear classifier on frozen features."""
    x, y = features(model, task.train), task.train["labels"]
    z, answers = features(model, task.test), task.test["labels"]
    return {"right": int((ridge(x, y, z, task.labels) == answers).sum()), "texts": len(answers)}


def ridge(x: Tensor, y: Tensor, z: Tensor, classes: int) -> Tensor:
    """Classes of ``z`` by ridge regression on one-hot labels, its strength by leave-one-out error: nothing is drawn."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / deviation, (z - mean) / deviation
    onehot = torch.nn.functional.one_hot(y, classes).double()
    centre = onehot.mean(0)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best: tuple[float, Tensor] | None = None
    for strength in torch.logspace(-2, 5, 22, dtype=torch.float64):
        shrink = s.square() / (s.square() + strength)
        fitted = u @ (shrink[:, None] * (u.T @ (onehot - centre)))
        # What each answer would be had its own sample not been there.
        leverage = (u.square() * shrink).sum(1, keepdim=True)
        left = ((onehot - centre - fitted) / (1 - leverage).clamp(min=1e-9)).square().mean()
        if best is None or float(left) < best[0]:
            weights = v.T @ ((s / (s.square() + strength))[:, None] * (u.T @ (onehot - centre)))
            best = float(left), weights
    assert best is not None
    return (z @ best[1] + centre).argmax(1)
