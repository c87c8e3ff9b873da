"""What is trained by default, and what a quick look is."""

from __future__ import annotations

import dataclasses

from .train import Settings

MASKS = (1, 4, 8, 16)
# Labelled digits of each class for the probe.
SHOTS = 10
CLASSES = 16
DEFAULT = {
    "text": Settings(
        rows=64, steps=1000, moments=5, width=64, layers=2, heads=4, tokens=32, keep=0.5, adjust=0.0, length=1, top=2,
        decoder_width=64, decoder_layers=2, decoder_kernel=5, decoder_groups=8, lr=1e-3, warmup=40, ema_decay=0.99,
        ema_end=0.999, ema_steps=1000, norm="layer", positions=False, least=10,
    ),
    "image": Settings(
        rows=64, steps=1000, moments=5, width=64, layers=3, heads=4, tokens=64, keep=0.2, adjust=0.07, length=2, top=3,
        decoder_width=64, decoder_layers=3, decoder_kernel=3, decoder_groups=8, lr=1e-3, warmup=40, ema_decay=0.99,
        ema_end=0.997, ema_steps=1000,
    ),
}  # fmt: skip


def quick(settings: Settings) -> Settings:
    """Whether all of it runs; nothing is learnt."""
    return dataclasses.replace(settings, rows=16, steps=4, moments=2, warmup=2, ema_steps=4, width=32, layers=2, top=2)
