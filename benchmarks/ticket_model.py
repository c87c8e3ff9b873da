"""The ticket's GPU kernels on paper: what each of them moves and computes, for ``model`` to turn into predicted times.

N tokens, a weight [out, in] of which the share rho of the blocks [b, b] is alive at random, s bytes a number.
``ticket_plan`` says which kernels a backend launches for a call, and how each of them is cut; here is what such a
launch does. A pass over the weight goes along its rows of blocks (y, the blocks' gradient) or along its columns (dx,
the blocks' gradient); its `own` side is the one that has programs for each of its groups, its `other` side the one
along which these meet blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import model
from .gpus import Card
from .model import Prediction, Work
from .registry import FORWARD, TRAINING
from .report import seconds
from .roofline import floor_seconds as least_seconds

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Seconds until a block has found its place in the index, one load after another, and has its first operands; and until
# its outputs are out. Assumption, from latencies of a few hundred nanoseconds for L2.
START = 1.5e-6
# Seconds of a step of a sum at the least: a barrier, and products of which each waits for the one before. Assumption.
STEP = 0.1e-6
# Seconds of a step whose loads nothing hides. Assumption, as above.
LOAD = 0.6e-6
_START_NOTE = f"a block's start and end take {START * 1e6:g} us, a step of its sum {STEP * 1e6:g} us at the least"
_LOAD_NOTE = f"a block's start and end take {START * 1e6:g} us, a step that waits for its loads {LOAD * 1e6:g} us"
_RANDOM_NOTE = "blocks are alive at random, one as likely as another"


class Side(NamedTuple):
    """A pass along rows or columns of blocks: groups, and blocks that a full one would have; numbers on either side."""

    groups: int
    others: int
    own_width: int
    other_width: int


@dataclass(frozen=True)
class Shape:
    """A call without an activation: forward, or with ``training`` forward and all gradients, the bias' included."""

    tokens: int
    block: int
    density: float
    dtype: str
    training: bool = False
    out: int = 3072
    width: int = 768

    @property
    def s(self) -> int:
        return SIZES[self.dtype]

    @property
    def label(self) -> str:
        return f"b{self.block} {self.density:g} {self.tokens}"

    @property
    def sizes(self) -> str:
        """What all calls of a table have in common."""
        return f"{self.out}x{self.width}"

    @property
    def blocks(self) -> int:
        """Of the weight, those that are alive."""
        rows, columns = self.side(False)[:2]
        return max(round(rows * columns * self.density), 1)

    @property
    def values(self) -> int:
        """Numbers of the living blocks."""
        return self.blocks * self.block**2

    def side(self, columns: bool) -> Side:
        down, across = math.ceil(self.out / self.block), math.ceil(self.width / self.block)
        return Side(across, down, self.width, self.out) if columns else Side(down, across, self.out, self.width)


@dataclass(frozen=True)
class Step:
    """One launch: how it cuts its work, and what of it fits an SM.

    Args:
        kernel (str): one of ``WORKS``.
        rows, columns, depth (int): a tile of a product: tokens (of ``outer`` numbers of the other side) by numbers of
            the own side, and how many of those that are summed over make a step.
        threads (int), blocks_per_sm (int), instruction (str): by the resource report; no instruction in float32.
        along_columns (bool): of blocks.
        splits (int): parts that a sum over tokens is cut into; of ``resident`` blocks that share the groups of a tile.
        size (int): of ``add``: the numbers that come out.
        side_by_side (int): what works at the same time in a block: of ``few`` steps of a sum, of ``resident`` groups.
    """

    kernel: str
    rows: int
    columns: int
    depth: int
    threads: int
    blocks_per_sm: int
    instruction: str = ""
    along_columns: bool = False
    splits: int = 1
    size: int = 0
    side_by_side: int = 1


@functools.lru_cache(maxsize=4096)
def expected_steps(others: int, density: float, joined: int) -> float:
    """The mean of ceil(n / joined) where each of ``others`` blocks is alive with this probability."""
    if density >= 1:
        return math.ceil(others / joined)
    total = 0.0
    for n in range(1, others + 1):
        ways = math.lgamma(others + 1) - math.lgamma(n + 1) - math.lgamma(others - n + 1)
        chance = math.exp(ways + n * math.log(density) + (others - n) * math.log1p(-density))
        total += chance * math.ceil(n / joined)
    return total


def steps(shape: Shape, columns: bool, depth: int) -> float:
    """Steps of ``depth`` numbers in which the mean group passes its blocks; one is whole blocks, or a part of one."""
    piece = 1 << (shape.block - 1).bit_length()
    per_block = max(piece // depth, 1)
    return per_block * expected_steps(shape.side(columns).others, shape.density, max(depth // piece, 1))


class Builder:
    """The amounts of one launch, for a shape and a card."""

    def __init__(self, shape: Shape, step: Step, card: Card) -> None:
        self.shape, self.step, self.card, self.s = shape, step, card, shape.s
        self.side = shape.side(step.along_columns)
        # Programs down a block, and what they have of it.
        self.parts = math.ceil(shape.block / step.columns)
        self.own = min(shape.block, step.columns)
        # Numbers of the other side in the blocks of the mean group.
        self.length = shape.blocks * shape.block / self.side.groups

    def work(self, blocks: float, products: float = 0.0, fma: float = 0.0, **more) -> Work:
        """A Work of this launch; ``products`` are FLOPs of matrix products, on the unit that the dtype has them on."""
        ieee = self.shape.dtype == "float32"
        return Work(
            self.step.kernel,
            max(round(blocks), 1),
            self.step.blocks_per_sm,
            tensor_flops=0.0 if ieee else products,
            fma_flops=fma + (products if ieee else 0.0),
            instruction=self.step.instruction,
            **more,
        )


def product(b: Builder) -> Work:
    """A tile of tokens by a row (column) of blocks: the tokens' numbers under it, and the blocks, by shared memory."""
    step, shape = b.step, b.shape
    count = steps(shape, step.along_columns, step.depth)
    blocks = math.ceil(shape.tokens / step.rows) * b.side.groups * b.parts
    written = shape.tokens * b.side.own_width * b.s
    return b.work(
        blocks,
        products=2.0 * blocks * step.rows * step.columns * count * step.depth,
        hbm_bytes=shape.tokens * b.side.other_width * b.s + shape.values * b.s + written,
        l2_bytes=blocks * (step.rows + b.own) * b.length * b.s + written,
        shared_bytes=blocks
        * model.tile_bytes(step.rows, step.columns, count * step.depth, b.s, step.threads, step.instruction),
        chain=START + count * STEP,
        notes=(_START_NOTE, _RANDOM_NOTE, "tokens and values come from memory once, every further time from L2"),
    )


def resident(b: Builder) -> Work:
    """A tile of tokens stays in shared memory, all of its width; groups pass it, whose blocks come from L2."""
    step, shape = b.step, b.shape
    count = steps(shape, step.along_columns, step.depth)
    tiles = math.ceil(shape.tokens / step.rows)
    blocks, written = tiles * step.splits, shape.tokens * b.side.own_width * b.s
    loaded = blocks * step.rows * b.side.other_width * b.s
    groups = math.ceil(b.side.groups / step.splits / step.side_by_side)
    # A group's products read the tokens' numbers once and its blocks for each 64 tokens; these were written once.
    depth = tiles * b.side.groups * b.length * b.s
    return b.work(
        blocks,
        products=2.0 * tiles * step.rows * b.side.groups * step.columns * b.length,
        hbm_bytes=shape.tokens * b.side.other_width * b.s + shape.values * b.s + written,
        l2_bytes=loaded + tiles * shape.values * b.s + written,
        shared_bytes=loaded + depth * (step.rows + step.columns * (1 + step.rows / 64)),
        chain=START + groups * count * STEP,
        notes=(_START_NOTE, _RANDOM_NOTE, "tokens and values come from memory once, every further time from L2"),
    )


def few(b: Builder) -> Work:
    """A row (column) of blocks, or part of one, by some tokens at a time, on multiply-add units."""
    step, shape = b.step, b.shape
    count = steps(shape, step.along_columns, step.depth)
    turns = math.ceil(shape.tokens / step.rows)
    blocks = turns * b.side.groups * b.parts
    written = shape.tokens * b.side.own_width * b.s
    return Work(
        step.kernel,
        blocks,
        step.blocks_per_sm,
        hbm_bytes=shape.tokens * b.side.other_width * b.s + shape.values * b.s + written,
        l2_bytes=blocks * (b.own + step.rows) * b.length * b.s + written,
        fma_flops=2.0 * blocks * step.columns * count * step.depth * (step.rows + 1),
        chain=START + math.ceil(count / step.side_by_side) * LOAD,
        notes=(_LOAD_NOTE, _RANDOM_NOTE),
    )


def strips(shape: Shape, step: Step) -> float:
    """Strips of blocks that have one, over all groups, and their parts down a block."""
    parts = math.ceil(shape.block / step.columns)
    return shape.side(step.along_columns).groups * parts * steps(shape, step.along_columns, step.rows)


def outer(b: Builder) -> Work:
    """The blocks' gradient: strips of blocks that share the own side's numbers, over parts of the tokens."""
    step, shape, side = b.step, b.shape, b.side
    live = strips(shape, step)
    each = math.ceil(shape.tokens / step.splits / step.depth) * step.depth
    operands = (side.own_width + side.other_width) * shape.tokens * b.s
    # The strips pass a part's tokens together as far as they run at once; others find them in L2 or come again.
    again = math.ceil(live / (b.card.sms * step.blocks_per_sm))
    in_cache = model.away(operands / step.splits, b.card) == 0
    written = shape.values * (4.0 * step.splits if step.splits > 1 else b.s)
    return b.work(
        live * step.splits,
        products=2.0 * live * step.rows * step.columns * each * step.splits,
        hbm_bytes=operands * (1 if in_cache else again) + written,
        l2_bytes=(side.groups * b.parts * b.length + live * b.own) * shape.tokens * b.s + written,
        shared_bytes=live
        * step.splits
        * model.tile_bytes(step.rows, step.columns, each, b.s, step.threads, step.instruction),
        chain=START + each / step.depth * STEP,
        notes=(_START_NOTE, _RANDOM_NOTE, "strips that run at once pass the tokens together"),
    )


def derive(b: Builder) -> Work:
    """The sums of the gradient over parts of the tokens, for the bias."""
    numbers = 1.0 * b.shape.tokens * b.shape.out
    blocks = math.ceil(b.shape.out / b.step.columns) * b.step.splits
    amount = numbers * b.s + 4.0 * b.step.splits * b.shape.out
    return Work("derive", blocks, b.step.blocks_per_sm, hbm_bytes=amount, l2_bytes=amount, fma_flops=numbers)


def add(b: Builder) -> Work:
    """Parts of a sum added up in their order; they come from L2 where they fit."""
    parts, to = 4.0 * b.step.splits * b.step.size, 1.0 * b.step.size * b.s
    blocks = math.ceil(b.step.size / b.step.columns)
    hbm = model.away(parts, b.card) + to
    return Work("add", blocks, b.step.blocks_per_sm, hbm_bytes=hbm, l2_bytes=parts + to, fma_flops=parts / 4)


WORKS = {"product": product, "resident": resident, "few": few, "outer": outer, "derive": derive, "add": add}


def works(shape: Shape, plan: Sequence[Step], card: Card) -> list[Work]:
    """What the launches of a call do, in their order."""
    return [WORKS[step.kernel](Builder(shape, step, card)) for step in plan]


def predict(shape: Shape, plan: Sequence[Step], card: Card) -> list[Prediction]:
    """A prediction for each launch of a call."""
    return [model.predict(work, card) for work in works(shape, plan, card)]


def least(shape: Shape) -> tuple[float, float]:
    """(FLOPs, bytes) that the call cannot do without.

    Forward: 2 N in out rho, and s (N in + N out + rho in out). The gradients take as many FLOPs each, for x and for the
    blocks; they read the output's gradient and x, write that of x, read the blocks once more and write their gradient.
    """
    values = min(shape.density, 1.0) * shape.out * shape.width
    flops, sides = 2.0 * shape.tokens * values, 1.0 * shape.tokens * (shape.width + shape.out)
    moved = sides + values
    if shape.training:
        flops, moved = 3 * flops, moved + sides + shape.tokens * shape.width + 2 * values
    return flops, moved * shape.s


def floor_seconds(shape: Shape, card: Card) -> float:
    """The least time: the call's arithmetic at the card's rate for its dtype, or its traffic at the copy bandwidth."""
    flops, moved = least(shape)
    return least_seconds(flops, moved, card.fma if shape.dtype == "float32" else card.tensor, card.copy)


def notes(shapes: Sequence[Shape], card: Card) -> list[str]:
    """What the same calls take if every block is alive and a library multiplies: the card's rate for large products."""
    found = {}
    for shape in shapes:
        rate = card.fma if shape.dtype == "float32" else card.tensor
        dense = (6.0 if shape.training else 2.0) * shape.tokens * shape.out * shape.width / rate
        if shape.tokens >= 1024:
            found[shape.dtype, shape.training, shape.tokens] = f"{shape.tokens} tokens {seconds(dense)}"
    lines = []
    for dtype, training in dict.fromkeys(key[:2] for key in found):
        times = ", ".join(text for key, text in found.items() if key[:2] == (dtype, training))
        mode = TRAINING if training else FORWARD
        lines.append(f"a dense product at the card's rate, {dtype} {mode}: {times}")
    return lines
