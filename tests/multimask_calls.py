"""Calls of the multimask family: plans and tensors with traps in them, and the three-way check of a call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import pyeff
from pyeff import MaskPlan
from pyeff.reference import _philox
from pyeff.reference.multimask import wide
from tests import helpers, places

OPS = tuple(f"multimask_{what}" for what in ("gather", "scatter", "targets", "loss", "relative_bias"))
NORMS, KINDS, REDUCTIONS = pyeff.reference.multimask.NORMS, pyeff.reference.multimask.KINDS, ("sum", "mean", "none")


def normal(*size: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Numbers that are the same on every device, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") * scale + offset


def make_plan(
    batch: int = 2, masks: int = 3, tokens: int = 13, *, keep: float = 0.4, ragged: bool = True,
    lengths: Sequence[int] | None = None, width: int | None = None, seed: int = 0,
) -> MaskPlan:  # fmt: skip
    """A random plan on torch's default device.

    Ragged: each row keeps a number of its own, one of them nothing and one everything, and all samples but the first
    have padding. Otherwise each row keeps ``int(tokens * keep)`` of all tokens.
    """
    generator, device = torch.Generator().manual_seed(seed), torch.get_default_device()
    score = torch.rand(batch, masks, tokens, generator=generator, device="cpu")
    share = torch.full((batch * masks, 1), keep)
    if ragged:
        share = 2 * keep * torch.rand(batch * masks, 1, generator=generator, device="cpu")
        if batch * masks > 2:
            share[1], share[2] = 0, 1
        if lengths is None:
            lengths = [tokens, *torch.randint(tokens // 2, tokens + 1, (batch,), generator=generator).tolist()][:batch]
    rank = score.flatten(0, 1).argsort(1).argsort(1)
    hidden = (rank >= (tokens * share).int()).view_as(score).to(device)
    return MaskPlan.from_mask(hidden, None if lengths is None else torch.tensor(lengths, device=device), width=width)


@dataclasses.dataclass
class Call:
    """One call of an op of the family; ``tensors`` holds what can be differentiated, by name."""

    op: str
    tensors: dict[str, Tensor]
    plan: MaskPlan | None
    options: dict[str, object]

    def __call__(self, function: Callable[..., Tensor] | None = None) -> Tensor:
        function = getattr(pyeff.ops, self.op) if function is None else function
        given = list(self.tensors.values())
        if self.what == "targets":
            return function(given, **self.options)
        if self.what == "relative_bias":
            return function(self.plan, *given, **self.options)
        if self.what == "loss":
            return function(*given, self.plan, **self.options)
        more = {"fill": given[1]} if len(given) > 1 else {}
        return function(given[0], self.plan, **more, **self.options)

    @property
    def what(self) -> str:
        return self.op.removeprefix("multimask_")

    @property
    def definition(self) -> Callable[..., Tensor]:
        return getattr(pyeff.reference, self.op)

    @property
    def first(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        return dataclasses.replace(self, tensors={name: change(t) for name, t in self.tensors.items()})

    def to(self, dtype: torch.dtype) -> Call:
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def but(self, **changed: object) -> Call:
        """The call with other tensors or options; a tensor that is None is taken away."""
        mine = {n: t for n, t in changed.items() if n in self.tensors or (isinstance(t, Tensor) and n == "fill")}
        tensors, options = {**self.tensors, **mine}, {n: v for n, v in changed.items() if n not in mine}
        options = {**self.options, **options}
        return dataclasses.replace(
            self, tensors={n: t for n, t in tensors.items() if t is not None}, options=options
        )  # fmt: skip

    def require_grad(self, names: Iterable[str]) -> Call:
        names = set(names)
        assert names <= set(self.tensors), names
        leaves = {name: t.detach().requires_grad_(name in names) for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=leaves)


def _laid(tensors: dict[str, Tensor], dtype: torch.dtype, strides: str) -> dict[str, Tensor]:
    device = torch.get_default_device()
    return {name: helpers.lay_out(t.to(device, dtype), strides) for name, t in tensors.items()}


def _widest(dtype: torch.dtype | None) -> torch.dtype:
    return dtype or places.here().dtypes[0]


def valid(plan: MaskPlan) -> Tensor:
    """[B, T] bool, True for what is no padding."""
    return torch.arange(plan.tokens, device=plan.lengths.device) < plan.lengths[:, None]


def make_gather(
    plan: MaskPlan | None = None, width: int = 9, *, dtype: torch.dtype | None = None, strides: str = "contiguous",
    traps: bool = True, seed: int = 0, **sizes,
) -> Call:  # fmt: skip
    """With ``traps`` x is NaN where nobody keeps it."""
    plan = make_plan(seed=seed, **sizes) if plan is None else plan
    x = normal(plan.batch, plan.tokens, width, seed=seed)
    if traps:
        kept = (plan.inverse >= 0).view(plan.batch, plan.masks, plan.tokens).any(1)
        x = x.masked_fill(~kept[..., None].cpu(), math.nan)
    if strides == "expanded":
        x = x.nan_to_num()  # one row for all
    return Call("multimask_gather", _laid({"x": x}, _widest(dtype), strides), plan, {})


def make_scatter(
    plan: MaskPlan | None = None, width: int = 9, *, fill: str = "", noise: float = 0.0, traps: bool = True,
    dtype: torch.dtype | None = None, strides: str = "contiguous", seed: int = 0, **sizes,
) -> Call:  # fmt: skip
    """``fill`` names its dimensions: "D", "TD", "BTD" or none. With ``traps`` x is NaN past what a row keeps, and the
    fill where no row that it is for hides the token."""
    plan = make_plan(seed=seed, **sizes) if plan is None else plan
    tensors = {"x": normal(plan.rows, plan.width, width, seed=seed)}
    if fill:
        sizes_of = {"B": plan.batch, "T": plan.tokens, "D": width}
        tensors["fill"] = normal(*(sizes_of[letter] for letter in fill), seed=seed + 1)
    if traps and strides != "expanded":
        tensors["x"].masked_fill_(~plan.slots()[..., None].cpu(), math.nan)
        hidden = plan.hidden().any(1)
        if fill == "BTD":
            tensors["fill"].masked_fill_(~hidden[..., None].cpu(), math.nan)
        elif fill == "TD":
            tensors["fill"].masked_fill_(~hidden.any(0)[:, None].cpu(), math.nan)
    return Call(
        "multimask_scatter", _laid(tensors, _widest(dtype), strides), plan, {"noise_std": noise, "seed": seed + 5}
    )


def make_targets(
    batch: int = 3, tokens: int = 13, width: int = 9, layers: int = 3, *, lengths: Sequence[int] | str | None = "some",
    norm: str = "instance", post_norm: str = "none", mean: float = 0.25, deviation: float = 1.5, eps: float = 1e-5,
    dtype: torch.dtype | None = None, strides: str = "contiguous", seed: int = 0,
) -> Call:  # fmt: skip
    """Layers are NaN in padding; by default all samples but the first have some."""
    if lengths == "some":
        lengths = [tokens, *(max(tokens - 2 - 3 * i, min(tokens, 2)) for i in range(batch - 1))]
    options: dict[str, object] = {"norm": norm, "post_norm": post_norm, "eps": eps}
    given = {
        f"layer{i}": normal(batch, tokens, width, seed=seed + i, scale=deviation, offset=mean) for i in range(layers)
    }
    if lengths is not None:
        padding = torch.arange(tokens, device="cpu") >= torch.tensor(lengths, device="cpu")[:, None]
        if strides != "expanded":
            given = {name: t.masked_fill(padding[..., None], math.nan) for name, t in given.items()}
        options["lengths"] = torch.tensor(lengths, device=torch.get_default_device())
    return Call("multimask_targets", _laid(given, _widest(dtype), strides), None, options)


def make_loss(
    plan: MaskPlan | None = None, width: int = 9, *, kind: str = "l2", beta: float = 0.0, scale: float | None = None,
    reduction: str = "sum", dtype: torch.dtype | None = None, strides: str = "contiguous", traps: bool = True,
    seed: int = 0, **sizes,
) -> Call:  # fmt: skip
    """With ``traps`` predictions are NaN where they do not count, targets where they count for nobody."""
    plan = make_plan(seed=seed, **sizes) if plan is None else plan
    hidden = plan.hidden().cpu()
    pred = normal(plan.rows, plan.tokens, width, seed=seed)
    target = normal(plan.batch, plan.tokens, width, seed=seed + 1, offset=0.25)
    if traps and strides != "expanded":
        pred.masked_fill_(~hidden.flatten(0, 1)[..., None], math.nan)
        target.masked_fill_(~hidden.any(1)[..., None], math.nan)
    dtype = _widest(dtype)
    tensors = _laid({"pred": pred}, dtype, strides) | _laid({"target": target}, wide(dtype), strides)
    return Call("multimask_loss", tensors, plan, {"kind": kind, "beta": beta, "scale": scale, "reduction": reduction})


def make_bias(
    plan: MaskPlan | None = None, heads: int = 3, *, scale: bool = True, to: torch.dtype | None = None,
    dtype: torch.dtype | None = None, seed: int = 0, **sizes,
) -> Call:  # fmt: skip
    plan = make_plan(seed=seed, **sizes) if plan is None else plan
    tensors = {"slopes": normal(heads, seed=seed).abs() + 0.1}
    if scale:
        tensors["scale"] = normal(heads, seed=seed + 1, offset=1.0)
    return Call(
        "multimask_relative_bias", _laid(tensors, _widest(dtype), "contiguous"), plan, {"dtype": to} if to else {}
    )


MAKERS = {
    "multimask_gather": make_gather, "multimask_scatter": lambda **more: make_scatter(fill="BTD", **more),
    "multimask_targets": make_targets, "multimask_loss": make_loss, "multimask_relative_bias": make_bias,
}  # fmt: skip


def random_grad(call: Call, seed: int = 99) -> Tensor:
    """A gradient of the call's output, in its dtype; NaN where the output is the same whatever the inputs are."""
    with torch.no_grad():
        out = call(call.definition)
    grad = normal(*out.shape, seed=seed).to(out)
    if out.dim() == 0:
        return grad + 2
    if call.what == "gather":
        return grad.masked_fill(~call.plan.slots()[..., None], math.nan)
    if call.what == "scatter":
        kept = call.plan.inverse >= 0
        return grad.masked_fill(~(kept | call.plan.hidden().flatten(0, 1))[..., None], math.nan)
    if call.what == "targets" and "lengths" in call.options:
        padding = torch.arange(out.shape[1], device=out.device) >= call.options["lengths"][:, None]
        return grad.masked_fill(padding[..., None], math.nan)
    if call.what == "loss":
        return grad.masked_fill(~call.plan.hidden().flatten(0, 1), math.nan)
    return grad


def oracle(call: Call, names: Iterable[str], grad_out: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients by the definition in float64; noise too, which the definition makes in float32."""
    std, call = call.options.get("noise_std", 0.0), call.to(torch.float64)
    if std:
        call = call.but(noise_std=0.0)
    found = results(call, names, None if grad_out is None else grad_out.double(), call.definition)
    if std:
        found["out"] = found["out"] + std * exact_normals(call) * call.plan.hidden().flatten(0, 1)[..., None]
    return found


def exact_normals(call: Call) -> Tensor:
    """[R, T, D] float64: the noise of a scatter over its deviation, with the logarithm and the cosine in float64."""
    plan, width = call.plan, call.first.shape[-1]
    ids = call.options.get("sample_ids", torch.arange(plan.batch))
    seed = torch.as_tensor(call.options["seed"])
    groups = -(-width // 4)
    w = _philox.of_sample(seed, ids, plan.masks, plan.tokens * groups, _philox.NOISE)
    found = []
    for a, b in (w[:2], w[2:]):
        radius = torch.sqrt(-2 * torch.log((a >> 9).double() * 2.0**-23 + 2.0**-24))
        angle = (b >> 8).double() * (2.0**-24 * 2 * math.pi)
        found += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(found, -1).view(plan.rows, plan.tokens, 4 * groups)[..., :width]


def results(call: Call, names: Iterable[str], grad_out: Tensor | None, function=None) -> dict[str, Tensor]:
    names = list(names)
    if names:
        return helpers.gradients(call, names, grad_out, function)
    with torch.no_grad():
        return {"out": call(function)}


def check_call(
    call: Call, names: Iterable[str] | None = None, *, grad_out: Tensor | None = None, function=None
) -> dict[str, Tensor]:
    """Output and gradients (of all tensors, if no names are given) of a call, three ways, on the backend in force."""
    names = list(call.tensors if names is None else names)
    grad_out = random_grad(call) if grad_out is None and names else grad_out
    found = results(call, names, grad_out, function)
    same, truth = results(call, names, grad_out, call.definition), oracle(call, names, grad_out)
    scales = sizes(call, grad_out)
    for name, t in found.items():
        a, b = t, same[name]
        if call.options.get("noise_std") and t.dtype == torch.float64:  # noise is made in float32
            a, b = a.float(), b.float()
        helpers.assert_three_way(f"{call.what}: {name}", a, b, truth[name], terms(call, name), scales.get(name, 0.0))
    return found


def terms(call: Call, name: str) -> int:
    """The length of the longest sum behind one element of the output or of a gradient."""
    plan, width = call.plan, call.first.shape[-1]
    if call.what == "gather":
        return 1 if name == "out" else plan.masks
    if call.what == "scatter":
        return plan.rows if name == "fill" else 1
    if call.what == "targets":
        batch, tokens, _ = call.first.shape
        over = {"none": 1, "instance": tokens, "layer": width, "batch": batch * tokens}
        return 2 * (over[call.options["norm"]] + len(call.tensors) + over[call.options["post_norm"]])
    if call.what == "loss":
        own = {"out": 1 if call.options["reduction"] == "none" else plan.rows * plan.tokens, "target": plan.masks}
        return own.get(name, 1) * (width if name == "out" else 1) + 2 * width * (call.options["kind"] == "cosine")
    return 1 if name == "out" else plan.rows * plan.width**2


def _largest(t: Tensor) -> float:
    t = t[t.isfinite()].abs()
    return t.max().item() if t.numel() else 0.0


def sizes(call: Call, grad_out: Tensor | None) -> dict[str, float]:
    """The size of the terms behind the output and the gradients, where sums may come out smaller: terms cancel."""
    call = call.to(torch.float64)
    grad_out = None if grad_out is None else grad_out.double()
    if call.what in ("gather", "scatter"):
        if grad_out is None:
            return {}
        # Linear: of squares of terms, a sum of squares.
        squares = results(call.but(**({"noise_std": 0.0} if call.what == "scatter" else {})), call.tensors,
                          grad_out.square(), call.definition)  # fmt: skip
        return {name: _largest(squares[name].sqrt()) for name in call.tensors}
    if call.what == "targets":
        return _sizes_of_targets(call, grad_out)
    if call.what == "loss":
        return _sizes_of_loss(call, grad_out)
    if grad_out is None:
        return {}
    ids = call.plan.ids_keep.double()
    distance = (ids[:, :, None] - ids[:, None, :]).abs()
    each = (grad_out * distance[:, None]).square().sum((0, 2, 3)).sqrt().max().item()
    factor = max(_largest(t) for t in call.tensors.values()) if len(call.tensors) > 1 else 1.0
    return dict.fromkeys(call.tensors, each * max(1.0, factor))


def _sizes_of_targets(call: Call, grad_out: Tensor | None) -> dict[str, float]:
    """A norm's output is a difference of numbers as large as y / deviation, and its derivative as 1 / deviation."""
    first, options = call.first, call.options
    lengths = options.get("lengths")
    if lengths is None:
        lengths = torch.full((first.shape[0],), first.shape[1], device=first.device)
    inside = (torch.arange(first.shape[1], device=first.device) < lengths[:, None])[..., None]

    def amplified(y: Tensor, norm: str) -> tuple[float, float]:
        if norm == "none":
            return _largest(y[inside.expand_as(y)]), 1.0
        over = {"instance": 1, "layer": -1, "batch": (0, 1)}[norm]
        count = inside.expand_as(y).sum(over, keepdim=True).clamp(min=1)
        y = torch.where(inside, y, 0)
        centred = torch.where(inside, y - y.sum(over, keepdim=True) / count, 0)
        rstd = torch.rsqrt(centred.square().sum(over, keepdim=True) / count + options["eps"])
        rstd = torch.where(inside, rstd, 0)
        return _largest(y * rstd), _largest(rstd)

    pairs = [amplified(t, options["norm"]) for t in call.tensors.values()]
    size, rstd = max(p[0] for p in pairs), max(p[1] for p in pairs)
    mean = pyeff.reference.multimask_targets(list(call.tensors.values()), **{**options, "post_norm": "none"})
    post_size, post = amplified(mean, options["post_norm"])
    found = {"out": max(size * post, post_size)}
    if grad_out is not None:
        above = _largest(grad_out) * post * (1 if options["post_norm"] == "none" else max(1.0, post_size))
        each = above / len(call.tensors) * rstd * (1 if options["norm"] == "none" else max(1.0, size))
        found |= dict.fromkeys(call.tensors, each)
    return found


def _sizes_of_loss(call: Call, grad_out: Tensor | None) -> dict[str, float]:
    plan, options, width = call.plan, call.options, call.first.shape[-1]
    factor = abs(width**-0.5 if options["scale"] is None else options["scale"])
    cosine, count = options["kind"] == "cosine", max(int(plan.count()), 1)
    if options["reduction"] == "mean":
        factor /= count * (1 if cosine else width)
    found = {"out": factor * (1 if options["reduction"] == "none" else count) if cosine else 0.0}
    if grad_out is not None:
        hidden = plan.hidden().flatten(0, 1)
        pairs = (call.tensors["pred"], call.tensors["target"].repeat_interleave(plan.masks, 0))
        if cosine:
            # Near the least length the direction of a vector is that of its rounding.
            each = (
                max((2 / t.square().sum(-1).sqrt()[hidden].clamp(min=1e-8)).max().item() for t in pairs)
                if hidden.any()
                else 0
            )
        else:
            each = 2 * max(1.0, *(_largest(t) for t in pairs))
        each *= factor * _largest(grad_out)
        found |= {"pred": each, "target": each * math.sqrt(plan.masks)}
    return found


def refusal(function: Callable[[], object]) -> str:
    """What a call is refused with; nothing where it is not."""
    try:
        function()
    except (ValueError, RuntimeError, IndexError) as error:
        return str(error)
    return ""
