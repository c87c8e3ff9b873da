"""The multimask family's GPU kernels on paper: what each launch moves, for ``model`` to turn into predicted times.

B samples of T tokens of D numbers, M masks of each, of which a row keeps the share q; K teacher layers; s bytes a
number. Indices are counted where they are read more often than once. ``multimask_plan`` says which kernels a backend
launches for a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import model
from .gpus import Card
from .model import Prediction, Work
from .roofline import floor_seconds as least_seconds

SIZES = {"bfloat16": 2, "float32": 4}
# Seconds from a block's first load, of an index, to the last store that hangs on it. Assumption, as for tickets.
START = 1.5e-6
# Seconds of a step of a block that waits for all of its threads; of a loop that waits for its loads. Assumptions.
STEP, LOAD = 0.1e-6, 0.6e-6
# Instructions for a number of noise beside special functions: seven rounds for four numbers, and two transformations.
NOISE = 15.0
# Of a mask: the least score that is drawn is found bit by bit, 33 of them; centres before, places behind.
MASK_STEPS = 40
_START_NOTE = f"a block's start and end take {START * 1e6:g} us"
_STEP_NOTE = f"a step that waits for all threads of a block takes {STEP * 1e6:g} us"
_LOAD_NOTE = f"a further wait for loads takes {LOAD * 1e6:g} us"
_SHARED_NOTE = "shuffles take of shared memory what their numbers have, and lanes lie along tokens by 16 bytes"
_NOISE_NOTE = f"{NOISE:g} instructions for a number of noise"


@dataclass(frozen=True)
class Shape:
    """A call of one operation at one of the settings of the paper: forward, or forward and backward."""

    op: str
    name: str
    batch: int
    tokens: int
    masks: int
    layers: int
    kept: int
    dtype: str = "bfloat16"
    training: bool = False
    width: int = 768
    heads: int = 12
    parameters: int = 86_000_000

    @property
    def s(self) -> int:
        return SIZES[self.dtype]

    @property
    def label(self) -> str:
        return f"{self.name} {self.op.removeprefix('multimask_')}"

    @property
    def sizes(self) -> str:
        return f"D={self.width}"

    @property
    def post_norm(self) -> bool:
        """Whether targets are normalised once more, token by token."""
        return self.name == "image"

    @property
    def averaged(self) -> list[int]:
        """Numbers of each tensor of a moving average: of a vision transformer of twelve blocks, roughly."""
        square = self.width**2
        return [4 * square, 3 * square, 4 * square, square, self.width] * 12

    @property
    def tokens_of_samples(self) -> float:
        """Numbers of [B, T, D]."""
        return 1.0 * self.batch * self.tokens * self.width

    @property
    def tokens_of_rows(self) -> float:
        """Numbers of [R, T, D]."""
        return self.masks * self.tokens_of_samples

    @property
    def slots(self) -> float:
        """Numbers of [R, K, D]."""
        return self.tokens_of_rows * self.kept / self.tokens

    @property
    def pairs(self) -> float:
        """Numbers of [R, H, K, K]."""
        return 1.0 * self.batch * self.masks * self.heads * self.kept**2


def least(shape: Shape) -> float:
    """Bytes that the call cannot do without."""
    sample, rows, slots, s = shape.tokens_of_samples, shape.tokens_of_rows, shape.slots, shape.s
    hidden = rows - slots
    forward, backward = {
        "multimask_targets": (sample * (shape.layers * s + 4), 0.0),
        "multimask_gather": ((sample + slots) * s, (sample + slots) * s),
        "multimask_scatter": ((rows + slots) * s, 2 * slots * s),
        # With the derivative of the predictions and the moments, in the forward.
        "multimask_loss": (4 * sample + (hidden + rows) * s, 0.0),
        "multimask_relative_bias": (shape.pairs * s, shape.pairs * s),
        "block_mask": (4.0 * shape.batch * shape.masks * (shape.tokens + shape.kept), 0.0),
        "ema_update_": (12.0 * shape.parameters, 0.0),
    }[shape.op]
    return forward + (backward if shape.training else 0.0)


def floor_seconds(shape: Shape, card: Card) -> float:
    return least_seconds(0.0, least(shape), card.fma, card.copy)


@dataclass(frozen=True)
class Step:
    """One launch: its kernel, its blocks, and how many of these fit an SM."""

    kernel: str
    blocks: int
    blocks_per_sm: int
    groups: int = 1  # of ``finish``, ``add`` and their like: parts that are added up
    moments: bool = False
    rounds: int = 0  # times that a block waits for loads after the first ones
    steps: int = 0  # times that all threads of a block wait for each other
    shared: float = 0.0  # bytes of shared memory
    name: str = ""  # of the kernel, where the source has another one


def waits_of_sum(shape: Shape) -> int:
    """Of a thread that adds over masks: eight at a time, for their indices and then for what these say."""
    return math.ceil(shape.masks / 8) * 2


def work(shape: Shape, step: Step, card: Card) -> Work:
    """What a launch does."""
    sample, rows, slots, s = shape.tokens_of_samples, shape.tokens_of_rows, shape.slots, shape.s
    hidden, size = rows - slots, 4 * shape.width
    partial = 8.0 * step.groups * size if step.moments else 4.0 * step.blocks
    # Of the two-stage statistics: three numbers for each channel of a layer and a sample, of parts or of the whole.
    statistics = 12.0 * shape.layers * shape.batch * shape.width
    hbm, l2, more = 0.0, 0.0, {}
    if step.kernel == "gather":
        hbm, l2 = (sample + slots) * s, 2 * slots * s
    elif step.kernel == "gather from rows":
        hbm, l2 = 2 * slots * s, 2 * slots * s
    elif step.kernel == "sum":
        hbm, l2 = (sample + slots) * s, (sample + slots) * s
    elif step.kernel == "scatter":
        hbm, l2 = (rows + slots) * s, (rows + slots) * s
        more = {"fma_flops": 2 * NOISE * hidden, "sfu_ops": 2.0 * hidden}
    elif step.kernel == "targets":
        hbm = l2 = sample * (shape.layers * s + 4)
        more = {"fma_flops": 8.0 * shape.layers * sample}
    elif step.kernel == "part":
        l2 = shape.layers * sample * s + statistics * step.groups
        hbm = shape.layers * sample * s + model.away(statistics * step.groups, card)
        more = {"fma_flops": 4.0 * shape.layers * sample}
    elif step.kernel == "whole":
        l2 = statistics * (step.groups + 1)
        hbm = model.away(l2, card)
    elif step.kernel == "apply":
        # The layers come once more: from L2 if all of them fit. Every token reads its channels' statistics.
        hbm = model.away(shape.layers * sample * s, card) + 4 * sample
        l2 = shape.layers * sample * (s + 8) + 4 * sample
        more = {"fma_flops": 4.0 * shape.layers * sample}
    elif step.kernel == "layer norm":
        # In place, behind the targets: what these wrote, if that fits.
        hbm, l2 = model.away(4 * sample, card) + 4 * sample, 8 * sample
    elif step.kernel == "loss":
        hbm = 4 * sample + (hidden + rows) * s + model.away(partial, card)
        l2 = 4 * sample + (hidden + rows) * s + partial
        more = {"fma_flops": 12.0 * hidden}
    elif step.kernel == "finish":
        l2, hbm = partial, model.away(partial, card)
    elif step.kernel == "total":
        l2 = 8.0 * step.groups
    elif step.kernel in ("bias", "bias gradient"):
        hbm = l2 = shape.pairs * s
    elif step.kernel == "mask":
        hbm = l2 = least(shape)
    elif step.kernel == "average":
        hbm = l2 = 12.0 * shape.parameters
    else:
        hbm = l2 = 4.0 * step.groups * shape.heads
    told = {_START_NOTE: 1, _LOAD_NOTE: step.rounds, _STEP_NOTE: step.steps, _SHARED_NOTE: step.shared}
    told[_NOISE_NOTE] = step.kernel == "scatter"
    return Work(
        step.kernel, step.blocks, step.blocks_per_sm, hbm_bytes=hbm, l2_bytes=l2, shared_bytes=step.shared,
        chain=START + step.rounds * LOAD + step.steps * STEP,
        notes=tuple(note for note, true in told.items() if true), **more,
    )  # fmt: skip


def in_shared(shape: Shape, blocks: int, threads: int, columns: int, sums: int, passes: int) -> float:
    """Bytes of shared memory for layers of which a block has all tokens, so that they come from memory once.

    A layer passes through it several times. A sum over tokens begins with shuffles, which shared memory's lanes carry:
    each of the numbers in a thread's vector, as often as a warp with ``columns`` vectors of a token is halved.
    """
    halvings = int(math.log2(32 // columns))
    shuffled = 4.0 * blocks * threads * (16 // shape.s) * halvings * sums * shape.layers
    return passes * shape.layers * shape.tokens_of_samples * shape.s + shuffled


def predict(shape: Shape, plan: Sequence[Step], card: Card) -> list[Prediction]:
    """A prediction for each launch of a call."""
    return [model.predict(work(shape, step, card), card) for step in plan]


def notes(shapes: Sequence[Shape], card: Card) -> list[str]:
    """What the floors are in bytes."""
    moved = ", ".join(f"{one.label} {least(one) / 1e6:.1f} MB" for one in shapes)
    return [f"bytes at the floor: {moved}"]
