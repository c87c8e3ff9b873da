"""The masks: which weights, or which blocks of them, a method leaves alive. All by pyeff.recipes.ticket."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyeff.plans import Ticket
from pyeff.recipes import ticket

KINDS = ("dense", "imp", "project", "oneshot", "random")
SCOPES = ("global", "scaled", "layer")
# In the order of the work: what a run that is short of time gets to first.
METHODS = (
    "imp", "imp-32-scaled", "random-32", "project-32-scaled", "oneshot-32-scaled", "oneshot-32", "imp-16-scaled",
    "imp-8-scaled", "project-16-scaled", "imp-32",
)  # fmt: skip
# The pooler takes no part in the answers.
LEFT_OUT = "pooler"

# By layer, bool: [out, in] for single weights, [R, C] for blocks.
Masks = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        method (str): see the package.
        density (float): the share of the weights that lives; 1 for ``dense``.
        seed (int): of the head, the order of the batches, the dropout and the lots.
    """

    method: str
    density: float
    seed: int

    @property
    def kind(self) -> str:
        return self.method.partition("-")[0]

    @property
    def block(self) -> int | None:
        """The side of a block; None where single weights live or die."""
        parts = self.method.split("-")
        return int(parts[1]) if len(parts) > 1 else None

    @property
    def scope(self) -> str:
        """How blocks of different layers compare."""
        return self.method.split("-")[2] if self.method.count("-") == 2 else "global"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.density:g}-seed{self.seed}" if self.kind != "dense" else f"dense-seed{self.seed}"

    def before(self, step: float) -> Job | None:
        """The training whose weights choose this one's mask."""
        if self.kind == "oneshot" or (self.kind == "imp" and self.density > 1 - 1.5 * step):
            return Job("dense", 1.0, self.seed)
        if self.kind == "imp":
            return Job(self.method, round(self.density + step, 6), self.seed)
        return None


def check_method(method: str) -> None:
    """Raises ValueError unless it is one that there is."""
    kind, *rest = method.split("-")
    whole = not rest and kind in ("dense", "imp")
    blocks = kind in KINDS[1:] and rest and rest[0].isdecimal() and int(rest[0]) > 0
    scoped = len(rest) < 2 or (len(rest) == 2 and rest[1] in SCOPES and kind != "random")
    if not whole and not (blocks and scoped):
        raise ValueError(f"there is no method {method!r}, expected such as dense, {', '.join(METHODS)}")


def jobs(methods: list[str], densities: list[float], step: float, seeds: list[int]) -> list[Job]:
    """Every training, in the order of the work: seed by seed, method by method, the densest first.

    Args:
        methods (list of str): the dense training comes first in any case.
        densities (list of float): what the other methods than IMP are trained at, and IMP down to the lowest.
        step (float): the share of the original weights that a round of IMP takes away.
        seeds (list of int): one after another.

    Raises:
        ValueError: an unknown method; a density that is no result of rounds; a projection without what it projects.
    """
    for method in methods:
        check_method(method)
    if not 0 < step < 1 or not densities or not all(0 < d < 1 for d in densities):
        raise ValueError(f"densities {densities} with rounds of {step}, expected numbers between 0 and 1")
    rounds = [round(1 - i * step, 6) for i in range(1, math.ceil(1 / step)) if 1 - i * step >= min(densities) - 1e-6]
    if any(m.startswith("imp") for m in methods) and not {round(d, 6) for d in densities} <= set(rounds):
        raise ValueError(f"densities {densities} are not those of rounds of {step}: {rounds}")
    if any(m.startswith("project") for m in methods) and "imp" not in methods:
        raise ValueError("a projection needs the method 'imp' beside it")
    wanted = sorted(densities, reverse=True)
    # A projection follows what it projects.
    ordered = ["imp"] * ("imp" in methods) + [m for m in methods if m not in ("dense", "imp")]
    found = []
    for seed in seeds:
        found.append(Job("dense", 1.0, seed))
        for method in ordered:
            found += [Job(method, d, seed) for d in (rounds if method.startswith("imp") else wanted)]
    return found


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """What is pruned of a classifier, by its path: all linear layers within the encoder's layers, tickets or not."""
    return dict(ticket.targets(model, exclude=LEFT_OUT))


def choose(
    job: Job, model: nn.Module, weights: Mapping[str, Tensor] | None = None, survivors: Masks | None = None
) -> Masks:
    """The masks of a job.

    Args:
        job (Job): which.
        model (Module): the pretrained classifier; it stays as it is.
        weights (mapping, optional): by layer, the trained weights that a round of IMP and one-shot pruning rank. What
            is dead already is zero in them and the first to stay so.
        survivors (dict of Tensor, optional): what a projection projects.
    """
    if job.kind == "project":
        assert survivors is not None
        pretrained = {name: layer.weight.detach() for name, layer in layers(model).items()}
        found = ticket.project(survivors, pretrained, job.block, density=job.density, scope=job.scope)  # type: ignore[call-overload]
        return {name: p.ticket.blocks() for name, p in found.items()}
    model = copy.deepcopy(model)
    if job.kind == "random":
        ticket.prune(model, density=job.density, block=job.block, method="random", seed=job.seed, exclude=LEFT_OUT)
        return {name: t.blocks() for name, t in ticket.tickets(model).items()}
    assert weights is not None
    with torch.no_grad():
        for name, layer in layers(model).items():
            layer.weight.copy_(weights[name])
    if job.block is None:
        # One round; the training that it asks for is over.
        options = {"density": job.density, "method": "imp", "rounds": 1, "rewind": False, "exclude": LEFT_OUT}
        ticket.prune(model, lambda model: None, **options)
        return ticket.masks(model)
    found = ticket.select(model, job.density, job.block, scope=job.scope, exclude=LEFT_OUT)
    return {name: t.blocks() for name, t in found.items()}


def tickets(job: Job, masks: Masks) -> dict[str, Ticket]:
    """Masks of blocks as tickets."""
    side = job.block or 1
    return {
        name: Ticket.from_blocks(mask, (mask.shape[0] * side, mask.shape[1] * side), side)
        for name, mask in masks.items()
    }


def to_elements(mask: Tensor, block: int | None) -> Tensor:
    """A mask of blocks as one of weights."""
    return mask if block is None else mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def facts(job: Job, masks: Masks, pretrained: Mapping[str, Tensor], survivors: Masks | None) -> dict[str, float]:
    """What a mask keeps.

    Returns:
        dict: ``reached``, the density; ``least``, that of the emptiest layer; ``retained``, the share of the pretrained
        magnitude that is kept; of a projection ``survivors``, the share of what IMP had kept of it.
    """
    alive = {name: to_elements(mask, job.block) for name, mask in masks.items()}
    magnitude = {name: w.abs() for name, w in pretrained.items()}
    shares = [int(m.sum()) / m.numel() for m in alive.values()]
    sizes = [m.numel() for m in alive.values()]
    found = {
        "reached": sum(a * b for a, b in zip(shares, sizes, strict=True)) / sum(sizes),
        "least": min(shares),
        "retained": _total(magnitude, alive) / _total(magnitude),
    }
    if survivors is not None:
        both = {name: mask & alive[name] for name, mask in survivors.items()}
        found["survivors"] = _total(magnitude, both) / _total(magnitude, survivors)
    return {name: round(value, 6) for name, value in found.items()}


def _total(magnitude: Mapping[str, Tensor], where: Masks | None = None) -> float:
    parts = (m if where is None else m[where[name]] for name, m in magnitude.items())
    return sum(float(part.sum(dtype=torch.float64)) for part in parts)
