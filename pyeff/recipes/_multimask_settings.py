"""What a pre-training is made with: presets, checks, and the numbers that are functions of the step."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from collections.abc import Mapping
from typing import Any

from pyeff.reference.multimask import KINDS, NORMS

# Baevski et al., 2022, arXiv 2212.07525, tables of appendix A: masks, layers, norms, kinds of masks, loss and averages.
_COMMON: dict[str, Any] = {
    "masks": 8, "inverse": True, "norm": "instance", "post_norm": "none", "target": "auto", "noise_std": 0.01,
    "positions": False, "loss": "l2", "beta": 0.0, "scale": None, "cls_loss": 0.0, "betas": (0.9, 0.98), "eps": 1e-6,
    "weight_decay": 0.01, "clip": 1.0, "steps": 100_000, "warmup": None, "batch_size": 16, "accumulate": 1,
    "amp": None, "teacher_dtype": None, "seed": 0, "max_length": None, "decoder_width": None,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "image": {
        "modality": "image", "masks": 16, "top_k_layers": 10, "post_norm": "layer", "keep": 0.2, "adjust": 0.07,
        "length": 3, "ema_decay": 0.9998, "ema_end": 0.99999, "ema_steps": 100_000, "lr": 1e-3, "weight_decay": 0.05,
        "clip": 4.0, "decoder_layers": 6, "decoder_kernel": 3, "decoder_groups": 16,
    },
    "audio": {
        "modality": "text", "top_k_layers": 8, "keep": 0.5, "adjust": 0.05, "length": 5, "inverse": False,
        "ema_decay": 0.999, "ema_end": 0.99999, "ema_steps": 75_000, "lr": 7.5e-4, "decoder_layers": 4,
        "decoder_kernel": 7, "decoder_groups": 16,
    },
    "text": {
        "modality": "text", "top_k_layers": 12, "keep": 0.52, "adjust": 0.0, "length": 1, "scale": 1.0,
        "ema_decay": 0.9999, "ema_end": 0.99999, "ema_steps": 100_000, "lr": 2e-4, "decoder_layers": 5,
        "decoder_kernel": 9, "decoder_groups": 1,
    },
}  # fmt: skip
_INTEGERS = (
    "masks", "length", "top_k_layers", "decoder_width", "decoder_layers", "decoder_kernel", "decoder_groups",
    "ema_steps", "steps", "warmup", "batch_size", "accumulate", "seed", "max_length",
)  # fmt: skip
AMP = (None, "bf16", "fp16")
TARGETS = ("auto", "ffn", "layer")
MODALITIES = ("auto", "text", "image")
# What another machine may do otherwise, and the same numbers come out up to their rounding.
LAYOUT = ("batch_size", "accumulate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a pre-training depend on, but for model, data, and what the caller made."""

    modality: str
    masks: int
    keep: float
    adjust: float
    length: int
    inverse: bool
    top_k_layers: int
    norm: str
    post_norm: str
    target: str
    noise_std: float
    positions: bool
    decoder_width: int
    decoder_layers: int
    decoder_kernel: int
    decoder_groups: int
    loss: str
    beta: float
    scale: float
    cls_loss: float
    ema_decay: float
    ema_end: float
    ema_steps: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup: int
    steps: int
    clip: float | None
    batch_size: int
    accumulate: int
    amp: str | None
    teacher_dtype: str | None
    seed: int
    max_length: int | None

    def as_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def decay(self, step: int) -> float:
        """Of the teacher after the ``step``-th update, counted from 1: linear up to ``ema_end``."""
        left = 1 - min(step / self.ema_steps, 1.0)
        return self.ema_end - (self.ema_end - self.ema_decay) * left

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step, counted from 0: up in a line, down with a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def resolve(preset: str | None, given: Mapping[str, Any], modality: str, layers: int, width: int) -> Settings:
    """The settings of a preset (by default that of the modality), changed by what was given (not None).

    Args:
        preset (str, optional): one of ``PRESETS``.
        given (mapping): arguments; those that are None are the preset's.
        modality (str): of the model.
        layers (int): that the model has.
        width (int): of the model; groups of the preset's decoder are made fewer where they would not divide it.

    Raises:
        ValueError: an unknown preset or option, or a value that is out of range; it names all three.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(map(repr, PRESETS))}")
    base = PRESETS[preset or modality]
    if base["modality"] != modality:
        raise ValueError(f"preset is {preset!r}, expected one for {modality}: that is what the model reads")
    values = {**_COMMON, **base, "top_k_layers": min(base["top_k_layers"], layers)}
    values |= {name: value for name, value in given.items() if value is not None}
    # Those of NumPy, too: files and seeds are made of what Python writes.
    values |= {name: _plain(values[name]) for name in _INTEGERS}
    if given.get("decoder_groups") is None:
        values["decoder_groups"] = math.gcd(values["decoder_groups"], width, values["decoder_width"] or width)
    if given.get("ema_decay") is not None and given.get("ema_end") is None:
        values["ema_end"] = max(values["ema_end"], values["ema_decay"])
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(Settings)}):
        raise ValueError(f"{unknown[0]} is no option of a pre-training")
    if values["warmup"] is None:
        values["warmup"] = values["steps"] // 20 if isinstance(values["steps"], int) else 0
    if values["scale"] is None:
        values["scale"] = 1.0 if values["loss"] == "cosine" else width**-0.5
    values["decoder_width"] = values["decoder_width"] or width
    # 0 stands for none in an argument where None stands for the preset's.
    values["clip"] = values["clip"] or None
    values["betas"] = tuple(values["betas"])
    settings = Settings(**values)
    _check(settings, layers)
    return settings


def _plain(value: Any) -> Any:
    """What counts as an index as an int, all else as it is."""
    try:
        return value if value is None or isinstance(value, (bool, int)) else operator.index(value)
    except TypeError:
        return value


def _check(s: Settings, layers: int) -> None:
    top = f"1 to {layers}, the layers of the model"
    for name, low, high, expected in (
        ("masks", 1, 2**30, "at least 1"), ("length", 1, 2**30, "at least 1"), ("top_k_layers", 1, layers, top),
        ("decoder_layers", 1, 2**30, "at least 1"), ("decoder_kernel", 1, 2**30, "at least 1"),
        ("decoder_groups", 1, 2**30, "at least 1"), ("decoder_width", 1, 2**30, "at least 1"),
        ("ema_steps", 1, 2**62, "at least 1"),
        ("steps", 1, 2**62, "at least 1"), ("warmup", 0, s.steps, f"0 to steps, {s.steps}"),
        ("batch_size", 1, 2**30, "at least 1"), ("accumulate", 1, s.batch_size, f"1 to batch_size, {s.batch_size}"),
        ("seed", -(2**63), 2**63 - 1, "64 bits"), ("max_length", 1, 2**30, "at least 1, or None"),
    ):  # fmt: skip
        if name == "max_length" and s.max_length is None:
            continue
        value = getattr(s, name)
        if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= operator.index(value) <= high:
            raise ValueError(f"{name} is {value!r}, expected an integer, {expected}")
    infinity = math.inf
    for name, least, most in (
        ("keep", 0, 1), ("adjust", -infinity, infinity), ("noise_std", 0, infinity), ("beta", 0, infinity),
        ("cls_loss", 0, infinity), ("ema_decay", 0, 1), ("ema_end", 0, 1), ("lr", 0, infinity), ("eps", 0, infinity),
        ("weight_decay", 0, infinity), ("clip", 0, infinity), ("scale", 0, infinity),
    ):  # fmt: skip
        value = getattr(s, name)
        if value is None and name == "clip":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, expected a number from {least} to {most}")
        if abs(value) == infinity:
            raise ValueError(f"{name} is {value!r}, expected a finite number")
    for name, options in (
        ("norm", NORMS), ("post_norm", NORMS), ("loss", KINDS), ("target", TARGETS), ("amp", AMP),
        ("teacher_dtype", AMP),
    ):  # fmt: skip
        if getattr(s, name) not in options:
            raise ValueError(f"{name} is {getattr(s, name)!r}, expected one of {', '.join(map(repr, options))}")
    if s.beta and s.loss != "smooth_l1":
        raise ValueError(f"beta is {s.beta} for loss {s.loss!r}, expected 0, or 'smooth_l1'")
    if s.cls_loss and s.modality != "image":
        raise ValueError(f"cls_loss is {s.cls_loss} for {s.modality}, expected 0: only images have a class token")
    if s.ema_end < s.ema_decay:
        raise ValueError(f"ema_end is {s.ema_end}, expected at least ema_decay, {s.ema_decay}")
    if not s.keep < 1:
        raise ValueError(f"keep is {s.keep}, expected less than 1: nothing would be hidden")
    if len(s.betas) != 2 or not all(0 <= beta < 1 for beta in s.betas):
        raise ValueError(f"betas is {s.betas!r}, expected two numbers from 0 to below 1")


def key(seed: int, *what: int | str) -> int:
    """63 bits that are a function of a seed and of what they are for."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
