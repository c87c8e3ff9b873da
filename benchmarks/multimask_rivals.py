"""Who computes the ops of the multimask family: ours, the definition, the path of the paper, and other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyeff import ops, reference
from pyeff.ops import _multimask_kernels as kernels

from . import multimask_others as others
from . import multimask_paper as paper
from . import ours
from .compiled import compiled
from .multimask_others import with_grads
from .registry import Call, Contender, Unavailable

if TYPE_CHECKING:
    from .multimask import Inputs, Setting

DECAY, NOISE, SEED = 0.9999, 0.01, 1
# How many of the averages are held against the oracle.
COMPARED = 12
Forward = Callable[..., Sequence[Tensor]]


def _averages(s: Inputs) -> list[Tensor]:
    """A contender's own, since calls change them."""
    return [t.clone() for t in s.ema]


def by(where: Any, s: Inputs, wrap: Callable[[Callable], Callable] = lambda f: f, averages: list | None = None) -> Call:
    """A call of ``s.op`` as ``where`` (``pyeff.ops`` or ``pyeff.reference``) has it."""
    return {
        "multimask_targets": _targets, "multimask_gather": _gather, "multimask_scatter": _scatter,
        "multimask_loss": _loss, "multimask_relative_bias": _bias, "block_mask": _mask, "ema_update_": _ema,
        "multimask_step": _step,
    }[s.op](where, s, wrap, averages)  # fmt: skip


def _targets(where, s: Inputs, wrap, averages) -> Call:
    function = wrap(where.multimask_targets)
    options = {"norm": "instance", "post_norm": s.setting.post_norm}
    return lambda: (function(s.layers, **options),)


def _gather(where, s: Inputs, wrap, averages) -> Call:
    function = wrap(where.multimask_gather)
    return lambda: with_grads(s, (function(s.x, s.plan),), s.x)


def _scatter(where, s: Inputs, wrap, averages) -> Call:
    function = wrap(where.multimask_scatter)
    return lambda: with_grads(s, (function(s.x, s.plan, noise_std=NOISE, seed=SEED),), s.x)


def _loss(where, s: Inputs, wrap, averages) -> Call:
    def both(pred: Tensor, target: Tensor, plan: Any) -> Sequence[Tensor]:
        if not s.moments:
            return (where.multimask_loss(pred, target, plan),)
        loss, moments = where.multimask_loss(pred, target, plan, statistics=True)
        return (loss, *where.multimask_spread(moments))

    function = wrap(both)

    def call() -> Sequence[Tensor]:
        loss, *spreads = function(s.pred, s.target, s.plan)
        return (*with_grads(s, (loss,), s.pred), *spreads)

    return call


def _bias(where, s: Inputs, wrap, averages) -> Call:
    to = s.tensors["grad"].dtype if "grad" in s.tensors else torch.float32
    function = wrap(where.multimask_relative_bias)
    return lambda: with_grads(s, (function(s.plan, s.slopes, s.scale, dtype=to),), s.scale)


def _mask(where, s: Inputs, wrap, averages) -> Call:
    setting = s.setting

    def draw() -> Tensor:
        return where.block_mask(setting.batch, setting.masks, setting.shape, **setting.drawing, seed=SEED).keep_len

    function = wrap(draw)
    return lambda: (function(),)


def _ema(where, s: Inputs, wrap, averages) -> Call:
    averages = _averages(s) if averages is None else averages
    copies = None if s.copies is None else [torch.empty_like(t, dtype=s.copies) for t in averages]
    function = wrap(where.ema_update_)

    def call() -> Sequence[Tensor]:
        function(averages, s.params, DECAY, copies=copies)
        return averages[:COMPARED]

    return call


def _step(where, s: Inputs, wrap, averages) -> Call:
    averages = _averages(s) if averages is None else averages
    setting = s.setting

    def forward(x: Tensor, layers: list[Tensor], pred: Tensor, seed: Tensor) -> Sequence[Tensor]:
        plan = where.block_mask(setting.batch, setting.masks, setting.shape, **setting.drawing, seed=seed)
        target = where.multimask_targets(layers, norm="instance", post_norm=setting.post_norm)
        kept = where.multimask_gather(x, plan)
        decoded = where.multimask_scatter(kept, plan, noise_std=NOISE, seed=seed)
        loss, moments = where.multimask_loss(pred, target, plan, statistics=True)
        return (loss, decoded, target, plan.keep_len, *where.multimask_spread(moments))

    function, average, seed = wrap(forward), wrap(where.ema_update_), torch.tensor(SEED, device=s.x.device)

    def call() -> Sequence[Tensor]:
        loss, decoded, target, kept, *spreads = function(s.x, s.layers, s.pred, seed)
        grads = torch.autograd.grad([loss, decoded], [s.pred, s.x], [None, s.grad])
        average(averages, s.params, DECAY)
        return (target, kept, *averages[:COMPARED], loss, *spreads, *grads)

    return call


def _each(sets: Sequence[Inputs], make: Callable[..., Call]) -> list[Call]:
    """The calls of all sets; averages are one list for all, as the parameters are."""
    shared = _averages(sets[0]) if sets[0].ema else None
    return [make(s, shared) for s in sets]


def _like(s: Inputs) -> Tensor:
    """A tensor of the dtype that the ops compute in."""
    given = [*s.layers, *(s.tensors[n] for n in ("x", "pred", "grad") if n in s.tensors), *s.params]
    return given[0] if given else torch.empty(0)


def _op(s: Inputs) -> str:
    return "multimask_loss" if s.op == "multimask_step" else s.op


def fused(sets: Sequence[Inputs]) -> list[Call]:
    """Our ops, by the backend that ``auto`` takes; absent where that is the reference."""
    ours.need_kernels(_op(sets[0]), _like(sets[0]))
    return _each(sets, lambda s, averages: by(ops, s, averages=averages))


def fused_by(name: str, sets: Sequence[Inputs]) -> list[Call]:
    """Our ops by one of the GPU's backends."""
    calls = _each(sets, lambda s, averages: by(ops, s, averages=averages))
    return ours.by_name(_op(sets[0]), name, _like(sets[0]), calls)


def definition(sets: Sequence[Inputs]) -> list[Call]:
    return _each(sets, lambda s, averages: by(reference, s, averages=averages))


class _Once:
    """Compiles each function of a call when the first set asks for it, and gives the others the same."""

    def __init__(self, device: str, whole: bool) -> None:
        self.device, self.whole, self.found, self.asked = device, whole, [], 0

    def of_next_set(self) -> _Once:
        self.asked = 0
        return self

    def __call__(self, function: Callable) -> Callable:
        if self.asked == len(self.found):
            self.found.append(compiled(function, self.device, fullgraph=self.whole))
        self.asked += 1
        return self.found[self.asked - 1]


def compiled_definition(sets: Sequence[Inputs]) -> list[Call]:
    once = _Once(_like(sets[0]).device.type, True)
    return _each(sets, lambda s, averages: by(reference, s, once.of_next_set(), averages))


def by_paper(sets: Sequence[Inputs], wrap: Callable[[Callable], Callable] = lambda f: f) -> list[Call]:
    return _each(sets, lambda s, averages: _paper(s, wrap, averages))


def compiled_paper(sets: Sequence[Inputs]) -> list[Call]:
    """What depends on the number of hidden tokens breaks the graph; the rest is compiled."""
    once = _Once(_like(sets[0]).device.type, False)
    return _each(sets, lambda s, averages: _paper(s, once.of_next_set(), averages))


def _paper(s: Inputs, wrap: Callable[[Callable], Callable], averages: list | None) -> Call:
    setting, op, scale = s.setting, s.op, s.setting.width**-0.5
    masks = paper.Masks.of_plan(s.plan) if s.plan else None

    def draw() -> Tensor:
        return paper.block_mask(setting.batch, setting.masks, setting.shape, **setting.drawing)

    def spreads(x: Tensor, y: Tensor) -> list[Tensor]:
        return [paper.spread(y), paper.spread(x.detach())] if s.moments else []

    if op == "block_mask":
        return lambda: (~draw(),)
    if op == "multimask_targets":
        function = wrap(paper.targets)
        return lambda: (function(s.layers, "instance", setting.post_norm),)
    if op == "multimask_gather":
        function = wrap(paper.gather)
        return lambda: with_grads(s, (function(s.x, setting.masks, masks.keep),), s.x)
    if op == "multimask_scatter":
        function = wrap(paper.scatter)
        return lambda: with_grads(s, (function(s.x, masks.restore, NOISE),), s.x)
    if op == "multimask_relative_bias":
        function, to = wrap(paper.relative_bias), s.grad.dtype
        sizes = setting.batch, setting.masks, masks.keep, setting.tokens
        return lambda: with_grads(s, (function(s.slopes, s.scale, *sizes).to(to),), s.scale)
    if op == "multimask_loss":

        def one(pred: Tensor, target: Tensor, hidden: Tensor) -> Sequence[Tensor]:
            loss, x, y = paper.loss(pred, target, setting.masks, hidden, scale)
            return (loss, *spreads(x, y))

        function = wrap(one)

        def call() -> Sequence[Tensor]:
            loss, *more = function(s.pred, s.target, masks.hidden)
            return (*with_grads(s, (loss,), s.pred), *more)

        return call
    average = wrap(paper.ema_update_)
    if op == "ema_update_":
        copies = None if s.copies is None else [torch.empty_like(t, dtype=s.copies) for t in averages]

        def update() -> Sequence[Tensor]:
            average(averages, s.params, DECAY)
            if copies is not None:
                torch._foreach_copy_(copies, averages)
            return averages[:COMPARED]

        return update

    def forward(x: Tensor, layers: list[Tensor], pred: Tensor, hidden: Tensor) -> Sequence[Tensor]:
        drawn = paper.Masks.of(hidden, setting.kept)
        target = paper.targets(layers, "instance", setting.post_norm)
        kept = paper.gather(x, setting.masks, drawn.keep)
        decoded = paper.scatter(kept, drawn.restore, NOISE)
        loss, a, b = paper.loss(pred, target, setting.masks, hidden, scale)
        return (loss, decoded, target, (~hidden).sum(1), *spreads(a, b))

    function = wrap(forward)

    def step() -> Sequence[Tensor]:
        loss, decoded, target, kept, *more = function(s.x, s.layers, s.pred, draw())
        grads = torch.autograd.grad([loss, decoded], [s.pred, s.x], [None, s.grad])
        average(averages, s.params, DECAY)
        return (target, kept, *averages[:COMPARED], loss, *more, *grads)

    return step


def lerp(sets: Sequence[Inputs]) -> list[Call]:
    """torch's one function for it, which takes averages and parameters of one dtype."""
    if sets[0].copies is not None:
        raise Unavailable("torch._foreach_lerp_ takes averages and parameters of one dtype")

    def one(s: Inputs, averages: list[Tensor]) -> Call:
        def call() -> Sequence[Tensor]:
            torch._foreach_lerp_(averages, s.params, 1 - DECAY)
            return averages[:COMPARED]

        return call

    return _each(sets, one)


_ABOUT = "pyeff.ops"
_OTHERS: dict[str, tuple[tuple[str, str, Callable[[Sequence[Any]], list[Call]]], ...]] = {
    "multimask_gather": (
        ("I-JEPA", "I-JEPA's apply_masks, one gather for each mask", others.ijepa),
        ("index_sel", "torch.index_select of all samples' tokens as one table", others.index_select),
        ("embedding", "the same by torch.nn.functional.embedding", others.embedding),
        ("nested", "index_select into a jagged torch.nested tensor, padded", others.nested),
        ("xformers", "xformers.ops.index_select_cat", others.xformers),
        ("FBGEMM", "torch.ops.fbgemm.jagged_index_select", others.fbgemm),
    ),
    "multimask_loss": (("I-JEPA", "I-JEPA's repeat_interleave_batch and gathers at hidden tokens", others.ijepa_loss),),
    "ema_update_": (("lerp", "torch._foreach_lerp_", lerp),),
}


def contenders(
    op: str, s: Setting, dtype: torch.dtype, device: str, training: bool, everybody: bool
) -> tuple[Contender, ...]:
    """Everybody for a case. The estimates are of the memory that a call takes, rounded up."""
    whole, sample = (8.0 * n * s.tokens * s.width for n in (s.rows, s.batch))
    needed = {"multimask_targets": 4 * sample, "multimask_relative_bias": 4.0 * 12 * s.rows * s.tokens**2 * 3}
    needed = {**needed, "block_mask": 1e8, "ema_update_": 2e9}.get(op, 6 * whole)
    found = list(_own(op, dtype, device, needed))
    found.append(Contender("eager", "the definition (pyeff.reference)", "reference", definition, needed))
    if op != "block_mask" or everybody:
        found.append(Contender("compiled", "the same under torch.compile", "rival", compiled_definition, needed))
    found.append(Contender("paper", "the eager code path of data2vec 2.0", "rival", by_paper, 2 * needed))
    if everybody and op != "block_mask":
        about = "the same under torch.compile, where boolean indexing lets it"
        found.append(Contender("paper c", about, "rival", compiled_paper, 2 * needed))
    found += [Contender(name, about, "rival", prepare, needed) for name, about, prepare in _OTHERS.get(op, ())]
    return tuple(found)


def _own(op: str, dtype: torch.dtype, device: str, needed: float) -> list[Contender]:
    if device == "cpu":
        return [Contender("fused", _ABOUT, "fused", fused, needed)]
    named = "multimask_loss" if op == "multimask_step" else op
    here = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    first, *rest = ours.gpu_order(named, dtype, kernels.prefer(here, dtype, 768))
    return [
        Contender(name, f"{_ABOUT} by its {name} kernels", role, functools.partial(fused_by, name), needed)
        for role, names in (("fused", [first]), ("variant", rest))
        for name in names
    ]
