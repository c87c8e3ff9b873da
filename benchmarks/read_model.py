"""READ's GPU kernels on paper: what each of them moves and computes, for ``model`` to turn into predicted times.

Letters as in docs/read.md: N tokens, L layers, width d, rank r, g gates, s bytes a number. ``read_plan`` says which
kernels a backend launches for a call, and how each of them is cut; here is what such a launch does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import model
from .gpus import Card
from .model import Prediction, Work

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What is saved, and the gradients of the gates' sums, in columns of r.
SAVED = {"rnn": 0, "gru": 4, "lstm": 4}
GRADIENTS = {"rnn": 1, "gru": 4, "lstm": 4}
# Sigmoid and tanh are an exponential and a reciprocal each.
_SPECIAL = {"rnn": 2, "gru": 6, "lstm": 10}
_SPECIAL_BACK = {"rnn": 0, "gru": 0, "lstm": 2}
# Multiply-adds and the like of one unit's gates, and of its gradients: counted from the definition, loosely.
_ELEMENTWISE = {"rnn": 4, "gru": 14, "lstm": 18}
_ELEMENTWISE_BACK = {"rnn": 6, "gru": 26, "lstm": 34}
# Seconds of one step of the recurrence that nothing hides: a barrier, the first operands from L2, a chain of products,
# the gates. Assumption, from latencies of a few hundred nanoseconds for L2 and some tens for the rest.
STEP = 1.0e-6
_STEP_NOTE = f"a step that nothing hides takes {STEP * 1e6:g} us"


@dataclass(frozen=True)
class Shape:
    """A call: forward, or with ``training`` forward and backward of the weights, all gates saved; phi is frozen."""

    tokens: int
    cell: str
    dtype: str
    training: bool = False
    layers: int = 12
    width: int = 768
    rank: int = 256

    @property
    def s(self) -> int:
        return SIZES[self.dtype]

    @property
    def g(self) -> int:
        return GATES[self.cell]

    @property
    def rows(self) -> int:
        """g r, the rows of the weights."""
        return self.g * self.rank

    @property
    def label(self) -> str:
        return f"{self.cell} {self.tokens}"

    @property
    def sizes(self) -> str:
        """What all calls of a table have in common."""
        return f"L={self.layers} d={self.width} r={self.rank}"


@dataclass(frozen=True)
class Step:
    """One launch: how it cuts its work, and what of it fits an SM.

    Args:
        kernel (str): one of ``WORKS``.
        tokens (int): that it serves: all of the call's, or one turn's.
        blocks (int): of the grid.
        rows, columns (int): of the output that a block makes at once: tokens by gates' rows or units (of one gate); for
            ``outer`` and ``outer_state``, rows of the weight by its columns.
        threads (int), blocks_per_sm (int), instruction (str): of the kernel, by the resource report; no instruction in
            float32.
        resident (bool): R stays on the chip instead of coming from L2 for every tile and layer.
        side_by_side (int): blocks that share a tile of tokens, each with its part of the units.
        splits (int): parts that a sum over tokens and layers is cut into.
    """

    kernel: str
    tokens: int
    blocks: int
    rows: int
    columns: int
    threads: int
    blocks_per_sm: int
    instruction: str = ""
    resident: bool = False
    side_by_side: int = 1
    splits: int = 1


class Builder:
    """The amounts of one launch, for a shape and a card."""

    def __init__(self, shape: Shape, step: Step, card: Card) -> None:
        self.shape, self.step, self.card = shape, step, card
        self.s, self.rank, self.width, self.gate_rows = shape.s, shape.rank, shape.width, shape.rows
        self.token_layers = step.tokens * shape.layers
        self.units = self.token_layers * shape.rank
        self.tiles = math.ceil(step.tokens / step.rows)
        self.pre = self.units * shape.g * shape.s
        self.da = self.units * GRADIENTS[shape.cell] * shape.s
        self.saved = self.units * SAVED[shape.cell] * shape.s

    def work(self, *, products: float = 0.0, fma: float = 0.0, notes: tuple[str, ...] = (), **amounts: float) -> Work:
        """A Work of this launch; ``products`` are FLOPs of matrix products, on the unit that the dtype has them on."""
        ieee = self.shape.dtype == "float32"
        return Work(
            self.step.kernel,
            self.step.blocks,
            self.step.blocks_per_sm,
            tensor_flops=0.0 if ieee else products,
            fma_flops=fma + (products if ieee else 0.0),
            instruction=self.step.instruction,
            notes=notes,
            **amounts,
        )

    def away(self, amount: float) -> float:
        """Bytes of device memory for what the next kernel reads."""
        return model.away(amount, self.card)

    def tile_bytes(self, columns: int, depth: float) -> float:
        """Shared memory traffic of one output tile."""
        step = self.step
        return model.tile_bytes(step.rows, columns, depth, self.s, step.threads, step.instruction)

    def state_weights(self) -> float:
        """Bytes of R that the blocks read from L2."""
        loads = self.step.blocks / self.step.side_by_side if self.step.resident else self.tiles * self.shape.layers
        return float(loads * self.gate_rows * self.rank * self.s)

    def turns(self) -> int:
        """Tiles that a block (or those side by side) takes one after another."""
        return math.ceil(self.tiles * self.step.side_by_side / self.step.blocks)

    def recurrence(self) -> dict[str, float]:
        """One block's steps, tile after tile, layer after layer, one group of units after another; and how uneven."""
        groups = math.ceil(self.rank / (self.step.columns * self.step.side_by_side))
        uneven = self.turns() * self.step.blocks / (self.tiles * self.step.side_by_side)
        return {"chain": STEP * self.turns() * self.shape.layers * groups, "uneven": uneven}


def fold(b: Builder) -> Work:
    """wf = w_ih * gamma, and the bias."""
    numbers = b.gate_rows * b.width
    return b.work(hbm_bytes=2.0 * numbers * b.s, l2_bytes=2.0 * numbers * b.s, fma=4.0 * numbers)


_ONCE = ("phi and the weights come from memory once, every further time from L2",)


def project(b: Builder) -> Work:
    """pre = rstd (wf phi) + bias for all layers; the statistics from the rows that a block reads anyway."""
    across = math.ceil(b.gate_rows / b.step.columns)
    tiles = b.shape.layers * b.tiles * across
    phi, weight = b.token_layers * b.width * b.s, b.gate_rows * b.width * b.s
    return b.work(
        hbm_bytes=phi + weight + b.away(b.pre),
        l2_bytes=tiles * (b.step.rows + b.step.columns) * b.width * b.s + b.pre,
        shared_bytes=tiles * b.tile_bytes(b.step.columns, b.width),
        sfu_ops=1.0 * tiles * b.step.rows,
        products=2.0 * b.token_layers * b.gate_rows * b.width,
        fma=2.0 * b.token_layers * b.width * across,
        notes=_ONCE,
    )


def statistics(b: Builder) -> Work:
    """The norm's statistics by themselves."""
    phi = 1.0 * b.token_layers * b.width
    return b.work(hbm_bytes=phi * b.s, l2_bytes=phi * b.s, fma=2.0 * phi, sfu_ops=1.0 * b.token_layers)


def recur(b: Builder) -> Work:
    """h_l = cell(pre_l, R h_{l-1}) for a tile of tokens, layer after layer."""
    return _recur(b, b.away(b.pre), b.pre, 0.0, 0)


def fused(b: Builder) -> Work:
    """The projection and the recurrence in one: pre stays on the chip, W comes from L2 for every tile and layer."""
    phi = b.token_layers * b.width * b.s
    weights = b.tiles * b.shape.layers * b.gate_rows * b.width * b.s
    return _recur(b, phi, phi + weights, 2.0 * b.token_layers * b.gate_rows * b.width, b.width)


def _recur(b: Builder, hbm: float, l2: float, products: float, depth: int) -> Work:
    states = b.units * b.s * (2 if b.shape.cell == "lstm" else 1)
    written = states + b.saved if b.shape.training else 0
    tiles = b.tiles * b.shape.layers * math.ceil(b.rank / b.step.columns)
    # With R on the chip the product reads it where it lies: nothing is written to shared memory but the state.
    shared = tiles * b.tile_bytes(b.step.columns * b.shape.g, b.rank + depth)
    return b.work(
        hbm_bytes=hbm + written + b.step.tokens * b.rank * b.s,
        l2_bytes=l2 + 2.0 * states + (b.saved if b.shape.training else 0) + b.state_weights(),
        shared_bytes=shared,
        sfu_ops=float(_SPECIAL[b.shape.cell] * b.units),
        products=products + 2.0 * b.units * b.gate_rows,
        fma=float(2 * _ELEMENTWISE[b.shape.cell] * b.units),
        notes=(_STEP_NOTE, *(_ONCE if depth else ())),
        **b.recurrence(),
    )


def reverse(b: Builder) -> Work:
    """dh = grad + carry + da_{l+1} R, then the gates' gradients da, from the last layer to the first."""
    states = b.units * b.s * (3 if b.shape.cell == "lstm" else 1)
    tiles = b.tiles * b.shape.layers * math.ceil(b.rank / b.step.columns)
    return b.work(
        hbm_bytes=b.saved + states + b.away(b.da) + b.step.tokens * b.rank * b.s,
        l2_bytes=b.saved + states + 2.0 * b.da + b.state_weights(),
        shared_bytes=tiles * b.tile_bytes(b.step.columns, b.gate_rows),
        sfu_ops=float(_SPECIAL_BACK[b.shape.cell] * b.units),
        products=2.0 * b.units * b.gate_rows,
        fma=float(2 * _ELEMENTWISE_BACK[b.shape.cell] * b.units),
        notes=(_STEP_NOTE,),
        **b.recurrence(),
    )


def outer(b: Builder) -> Work:
    """S = sum (rstd da)^T phi, split over tokens and layers."""
    return _outer(b, b.width, b.token_layers * b.width * b.s)


def outer_state(b: Builder) -> Work:
    """dR = sum da^T h, likewise."""
    return _outer(b, b.rank, b.units * b.s)


def _outer(b: Builder, columns: int, right: float) -> Work:
    tiles = math.ceil(b.gate_rows / b.step.rows) * math.ceil(columns / b.step.columns)
    partials = 4.0 * b.step.splits * b.gate_rows * columns
    return b.work(
        hbm_bytes=right + b.away(b.da) + partials,
        l2_bytes=tiles * (b.step.rows + b.step.columns) * b.token_layers * b.s + partials,
        shared_bytes=tiles * b.tile_bytes(b.step.columns, b.token_layers),
        products=2.0 * b.token_layers * b.gate_rows * columns,
        fma=2.0 * tiles * b.step.rows * b.token_layers,
        notes=("the blocks pass the tokens together, so that operands come from memory once",),
    )


def reduce(b: Builder) -> Work:
    """The partial sums added up in their order, and the weights' gradients made of them; ``columns`` of each row."""
    numbers = 1.0 * b.gate_rows * b.step.columns
    amount = 4.0 * b.step.splits * numbers + 2.0 * numbers * b.s
    return b.work(hbm_bytes=amount, l2_bytes=amount, fma=(b.step.splits + 4.0) * numbers)


def small(b: Builder) -> Work:
    """A launch that moves next to nothing: sums of the biases, of the norm's weight."""
    return b.work(l2_bytes=4.0 * b.gate_rows * b.tiles)


WORKS = {
    "fold": fold,
    "statistics": statistics,
    "project": project,
    "recur": recur,
    "fused": fused,
    "reverse": reverse,
    "outer": outer,
    "outer_state": outer_state,
    "reduce": reduce,
    "small": small,
}


def works(shape: Shape, plan: Sequence[Step], card: Card) -> list[Work]:
    """What the launches of a call do, in their order."""
    return [WORKS[step.kernel](Builder(shape, step, card)) for step in plan]


def predict(shape: Shape, plan: Sequence[Step], card: Card) -> list[Prediction]:
    """A prediction for each launch of a call."""
    return [model.predict(work, card) for work in works(shape, plan, card)]


def floor_seconds(shape: Shape, card: Card) -> float:
    """The least time: the call's arithmetic at the card's rate for its dtype, or its traffic at the copy bandwidth."""
    from .read import work
    from .roofline import floor_seconds as least

    flops, bytes = work(shape.tokens, shape.cell, shape.s, shape.training, shape.layers, shape.width, shape.rank)
    return least(flops, bytes, card.fma if shape.dtype == "float32" else card.tensor, card.copy)
