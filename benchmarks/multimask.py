"""The multimask family's cases: the paper's image, audio and text encoders, each op by itself, and a whole step.

The floor of each is the least that it must read and write: per element of [B*M, T, D], with q the share that is kept,
p the hidden one, s bytes of the dtype and targets in float32,

    targets             K s / M + 4 / M          layers read once, targets written
    gather, both ways   2 s q + 2 s / M          x read once, its gradient written once
    scatter, both ways  s + 3 s q                x read, all written; of the gradient what is kept, and x's written
    loss, both ways     s p + s + 4 / M          predictions at hidden tokens, the gradient, targets
    averages            8 + s a parameter        read and written in float32, the parameter read (a copy: s more)

A step is masks, targets, gather, scatter, loss, backward through all of it, and averages of a base encoder's
parameters: everything in it that is neither encoder nor decoder, which stand still: what they would give is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyeff import MaskPlan, reference

from . import multimask_rivals as rivals
from .registry import FORWARD, TRAINING, Case, Selection, register

WIDTH, HEADS, DECAY, NOISE = 768, 12, 0.9999, 0.01
DTYPES = (torch.float32, torch.bfloat16)
LOSS, TARGETS, GATHER, SCATTER = "multimask_loss", "multimask_targets", "multimask_gather", "multimask_scatter"
BIAS, MASK, EMA, STEP = "multimask_relative_bias", "block_mask", "ema_update_", "multimask_step"


@dataclass(frozen=True)
class Setting:
    """One of the paper's encoders: sizes, how targets are normed, how masks are drawn."""

    batch: int
    masks: int
    layers: int
    shape: tuple[int, ...]
    keep: float
    adjust: float
    length: int
    inverse: bool
    post_norm: str = "none"
    width: int = WIDTH

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.batch * self.masks

    @property
    def kept(self) -> int:
        return int(self.tokens * self.keep)

    @property
    def drawing(self) -> dict[str, object]:
        return {"keep": self.keep, "adjust": self.adjust, "length": self.length, "inverse": self.inverse}

    def plan(self, seed: int, device: str = "cpu") -> MaskPlan:
        return reference.block_mask(self.batch, self.masks, self.shape, **self.drawing, seed=seed, device=device)


SETTINGS = {
    "image": Setting(8, 16, 10, (14, 14), 0.2, 0.07, 3, True, "layer"),
    "audio": Setting(2, 8, 8, (1000,), 0.5, 0.05, 5, False),
    "text": Setting(4, 8, 12, (512,), 0.52, 0.0, 1, False),
}


@dataclass
class Inputs:
    """One input set; what an op does not take is absent. Gradients are for :attr:`leaves`, by :attr:`grad`."""

    setting: Setting
    op: str
    moments: bool = False
    plan: MaskPlan | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Tensor] = field(default_factory=list)
    ema: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    copies: torch.dtype | None = None

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def known(self) -> list[Tensor]:
        plan = self.plan
        index = [plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths] if plan else []
        return [*self.tensors.values(), *self.layers, *self.ema, *self.params, *index]


def make(
    count: int, seed: int, *, op: str, setting: Setting, dtype: torch.dtype, device: str, moments: bool = False,
    training: bool = True, blocks: int = 12,
) -> list[Inputs]:  # fmt: skip
    """``count`` sets that share only parameters and their averages, which no cache holds."""
    random = torch.Generator(device).manual_seed(seed)
    s = setting

    def normal(*size: int, to: torch.dtype = dtype, leaf: bool = False, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(*size, generator=random, device=device, dtype=torch.float32).add_(mean).to(to)
        return drawn.requires_grad_(leaf and training)

    def parameters() -> tuple[list[Tensor], list[Tensor]]:
        shapes = [p for _ in range(blocks) for p in _of_a_block(s.width)]
        return [normal(*p, to=torch.float32) for p in shapes], [normal(*p) for p in shapes]

    averages = parameters() if op in (EMA, STEP) else ([], [])

    def one(i: int) -> Inputs:
        found = Inputs(s, op, moments)
        given = found.tensors
        if op not in (TARGETS, MASK, EMA):
            found.plan = s.plan(seed + i, device)
        whole, kept, sample = (s.rows, s.tokens, s.width), (s.rows, s.kept, s.width), (s.batch, s.tokens, s.width)
        if op in (GATHER, STEP):
            given["x"] = normal(*sample, leaf=True)
        if op == SCATTER:
            given["x"] = normal(*kept, leaf=True)
        if op in (TARGETS, STEP):
            found.layers = [normal(*sample, mean=0.25).detach() for _ in range(s.layers)]
        if op in (LOSS, STEP):
            given["pred"] = normal(*whole, leaf=True)
        if op == LOSS:
            given["target"] = normal(*sample, to=torch.float32, mean=0.25)
        if op == BIAS:
            given["slopes"] = 2.0 ** -torch.arange(1, HEADS + 1, device=device, dtype=torch.float32)
            given["scale"] = (1 + 0.1 * normal(HEADS, to=torch.float32)).detach().requires_grad_(training)
        if training and op in (GATHER, SCATTER, STEP, BIAS):
            size = {GATHER: kept, BIAS: (s.rows, HEADS, s.kept, s.kept)}.get(op, whole)
            given["grad"] = normal(*size)
        found.ema, found.params = averages
        found.copies = dtype if op == EMA and dtype != torch.float32 else None
        return found

    return [one(i) for i in range(count)]


def _of_a_block(width: int) -> list[tuple[int, ...]]:
    """The parameters of one block of a transformer."""
    linear = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [*(size for out, inner in linear for size in ((out, inner), (out,))), *[(width,)] * 4]


def oracle(inputs: Inputs) -> list[Tensor]:
    """The definition in float64, as :func:`comparable` has it."""
    s, op = inputs.setting, inputs.op
    if op == MASK:
        return [_counts(s)]
    wide = Inputs(s, op, inputs.moments, inputs.plan)
    wide.tensors = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.tensors.items()}
    wide.layers = [t.double() for t in inputs.layers]
    if op in (EMA, STEP):
        some = slice(0, rivals.COMPARED)
        wide.ema, wide.params = ([t.double() for t in given[some]] for given in (inputs.ema, inputs.params))
    if op == STEP:
        target = reference.multimask_targets(wide.layers, post_norm=s.post_norm)
        reference.ema_update_(wide.ema, wide.params, DECAY)
        return [target, _counts(s).to(target.device), *wide.ema]
    with torch.enable_grad():
        outputs = rivals.by(reference, wide)()
    return list(comparable(inputs, [t.detach() for t in outputs]))


def _counts(s: Setting) -> Tensor:
    """[R] float64: how many tokens each row keeps."""
    return torch.full((s.rows,), float(s.kept), dtype=torch.float64)


def comparable(inputs: Inputs, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What everybody must agree on: all but random numbers."""
    op = inputs.op
    if op == MASK:
        (mask,) = outputs
        return [mask.sum(1).double() if mask.dtype == torch.bool else mask.double()]
    if op == GATHER:
        # Some have a dimension of samples and one of students.
        return [outputs[0] if outputs[0].dim() == 3 else outputs[0].flatten(0, 1), *outputs[1:]]
    if op == SCATTER:
        hidden = inputs.plan.hidden().flatten(0, 1)[..., None]
        return [outputs[0].masked_fill(hidden, 0), *outputs[1:]]
    if op == EMA:
        return list(outputs[: rivals.COMPARED])
    if op == STEP:
        # Each contender draws masks and noise of its own; loss and gradients are compared one op at a time.
        target, kept, *averages = outputs[: 2 + rivals.COMPARED]
        return [target, kept.double(), *averages]

    return list(outputs)


def work(
    op: str, s: Setting, itemsize: int, training: bool, moments: bool = False, parameters: int = 0
) -> tuple[float, float]:
    """The least FLOPs and the least bytes of a case."""
    sample, kept, whole = (float(n * s.width) for n in (s.batch * s.tokens, s.rows * s.kept, s.rows * s.tokens))
    hidden, ways = whole - kept, 2 if training else 1
    if op == TARGETS:
        return 5.0 * s.layers * sample, sample * (s.layers * itemsize + 4)
    if op == GATHER:
        return (kept if training else 0.0), ways * (kept + sample) * itemsize
    if op == SCATTER:
        return 2.0 * hidden, (whole + kept + (2 * kept if training else 0)) * itemsize
    if op == LOSS:
        flops = (3.0 + training + 6 * moments) * hidden
        return flops, (hidden + (whole if training else 0)) * itemsize + 4 * sample
    if op == BIAS:
        pairs = float(s.rows * HEADS * s.kept**2)
        return 2.0 * ways * pairs, ways * pairs * itemsize
    if op == MASK:
        return 0.0, 4.0 * s.rows * (s.kept + 1 + s.tokens)
    if op == EMA:
        copies = itemsize if itemsize < 4 else 0
        return 3.0 * parameters, float(parameters * (8 + itemsize + copies))
    parts = [
        work(part, s, itemsize, part != TARGETS, part == LOSS) for part in (TARGETS, GATHER, SCATTER, LOSS, MASK)
    ]  # fmt: skip
    parts.append((3.0 * parameters, float(parameters * (8 + itemsize))))
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def case(
    op: str, name: str, dtype: torch.dtype, device: str, mode: str, *, setting: Setting | None = None,
    moments: bool = False, blocks: int = 12, everybody: bool = True,
) -> Case:  # fmt: skip
    """One case; without ``everybody`` some rivals that take long to compile are left out."""
    s, training = setting or SETTINGS[name], mode == TRAINING
    parameters = blocks * sum(math.prod(size) for size in _of_a_block(s.width)) if op in (EMA, STEP) else 0
    flops, least = work(op, s, dtype.itemsize, training, moments, parameters)

    def sets(count: int, seed: int) -> list[Inputs]:
        return make(
            count, seed, op=op, setting=s, dtype=dtype, device=device, moments=moments, training=training,
            blocks=blocks,
        )  # fmt: skip

    terms = {TARGETS: s.tokens, LOSS: s.rows * s.tokens * s.width, BIAS: s.rows * s.kept**2, GATHER: s.masks}
    return Case(
        op=op,
        group=name,
        point="moments" if moments and op == LOSS else f"{dtype.itemsize * 8} bits" if op == EMA else f"M{s.masks}",
        axis="case",
        shape={"B": s.batch, "T": s.tokens, "M": s.masks, "K": s.kept, "D": s.width},
        dtype=dtype,
        device=device,
        mode=mode,
        flops=flops,
        bytes=least,
        reduction=terms.get(op, s.tokens),
        make=sets,
        set_bytes=_set_bytes(op, s, dtype.itemsize, least / (2 if training else 1), parameters),
        tensors=Inputs.known,
        oracle=oracle,
        contenders=rivals.contenders(op, s, dtype, device, training, everybody),
        comparable=comparable,
    )


def _set_bytes(op: str, s: Setting, itemsize: int, least: float, parameters: int) -> int:
    """What a set has of its own, and a call reads: not parameters and averages, which all sets share."""
    if op == STEP:
        return (s.batch * s.tokens * (1 + s.layers) + 2 * s.rows * s.tokens) * s.width * itemsize
    return max(1, round(least) - 8 * parameters)


Point = tuple[str, str, torch.dtype, str, bool]  # op, setting, dtype, mode, moments


def points(select: Selection) -> list[Point]:
    """What is measured, in the order of the tables."""
    full, wide = select.size == "full", DTYPES[0]
    both: Sequence[str] = tuple(SETTINGS)
    if select.size == "quick":
        trained = [(op, "image", wide, TRAINING, op == LOSS) for op in (GATHER, SCATTER, LOSS, STEP)]
        return [(TARGETS, "image", wide, FORWARD, False), *trained, (MASK, "image", wide, FORWARD, False)]
    found: list[Point] = []
    for dtype in DTYPES:
        some = both if full or dtype == wide else both[:1]
        found += [(TARGETS, name, dtype, FORWARD, False) for name in both]
        for op in (GATHER, SCATTER):
            found += [(op, name, dtype, FORWARD, False) for name in (both if full else both[:1])]
            found += [(op, name, dtype, TRAINING, False) for name in some]
        found += [(LOSS, name, dtype, TRAINING, False) for name in (both if full else both[:1])]
        found += [(LOSS, name, dtype, TRAINING, True) for name in both]
        found += [(BIAS, name, dtype, TRAINING, False) for name in (("audio", "text") if full else ("audio",))]
        found += [(EMA, "base", dtype, FORWARD, False)]
        found += [(STEP, name, dtype, TRAINING, True) for name in some]
    found += [(MASK, name, wide, FORWARD, False) for name in both]
    order = (TARGETS, GATHER, SCATTER, LOSS, BIAS, MASK, EMA, STEP)
    found.sort(key=lambda p: (order.index(p[0]), p[3], DTYPES.index(p[2])))
    return found


@register("multimask")
def cases(select: Selection) -> Iterator[Case]:
    """The cases of a selection: by op, mode and dtype, then by encoder."""
    for op, name, dtype, mode, moments in points(select):
        setting = SETTINGS["image"] if name == "base" else SETTINGS[name]
        everybody = select.size == "full" or (select.size == "default" and name in ("image", "base"))
        yield case(
            op, name, dtype, select.device, mode, setting=setting, moments=moments,
            everybody=everybody or (select.size == "default" and op == STEP),
        )  # fmt: skip


__all__ = ["SETTINGS", "Inputs", "Setting", "case", "cases", "comparable", "make", "oracle", "points", "work"]
