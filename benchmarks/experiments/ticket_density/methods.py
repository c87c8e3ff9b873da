"""The masks: which weights, or which blocks of them, a method leaves alive."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.plans import Ticket

KINDS = ("dense", "imp", "project", "oneshot", "random")
METHODS = ("dense", "imp", "imp-32", "random-32", "project-32", "oneshot-32", "imp-16", "project-16", "imp-8")

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
        side = self.method.partition("-")[2]
        return int(side) if side else None

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
    kind, dash, side = method.partition("-")
    fits = {"dense": not dash, "imp": not dash or side.isdecimal()}.get(kind, side.isdecimal())
    if kind not in KINDS or not fits or (side.isdecimal() and int(side) < 1):
        raise ValueError(f"there is no method {method!r}, expected such as {', '.join(METHODS)}")


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
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, TicketLinear)) and ".layer." in f".{name}"
    }


def choose(scores: Mapping[str, Tensor], density: float, allowed: Mapping[str, Tensor] | None = None) -> Masks:
    """The best of all layers together: bool, of the same shapes; only what is ``allowed``. Ties: the first."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    if allowed is not None:
        flat[~torch.cat([allowed[name].flatten() for name in scores])] = -math.inf
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[torch.argsort(flat, descending=True, stable=True)[: round(density * flat.numel())]] = True
    parts = keep.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def to_blocks(weight: Tensor, block: int) -> Tensor:
    """[out, in] as [R, C, block, block].

    Raises:
        ValueError: a side of the weight is no multiple of the block.
    """
    rows, columns = (side // block for side in weight.shape)
    if (rows * block, columns * block) != tuple(weight.shape):
        raise ValueError(f"a weight {list(weight.shape)} is no multiple of blocks of {block}")
    return weight.view(rows, block, columns, block).transpose(1, 2)


def magnitude(weight: Tensor, block: int | None) -> Tensor:
    """|w|, or its mean in each block."""
    return weight.abs() if block is None else to_blocks(weight.abs(), block).mean((-2, -1))


def to_elements(mask: Tensor, block: int | None) -> Tensor:
    """A mask of blocks as one of weights."""
    return mask if block is None else mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def by_magnitude(job: Job, weights: Mapping[str, Tensor], allowed: Masks | None) -> Masks:
    """IMP's round, and one-shot pruning: the largest of the trained weights among what still lives."""
    return choose({name: magnitude(w, job.block) for name, w in weights.items()}, job.density, allowed)


def projected(job: Job, pretrained: Mapping[str, Tensor], survivors: Masks) -> Masks:
    """The blocks in which most of the pretrained magnitude of a mask of weights survives."""
    return choose({name: magnitude(w * survivors[name], job.block) for name, w in pretrained.items()}, job.density)


def drawn(job: Job, pretrained: Mapping[str, Tensor]) -> Masks:
    """Blocks by lot; the lots of a smaller density are among those of a larger one."""
    seed = int.from_bytes(hashlib.sha256(f"{job.method} {job.seed}".encode()).digest()[:6], "big")
    generator = torch.Generator().manual_seed(seed)
    lots = {
        name: torch.rand(to_blocks(w, job.block or 1).shape[:2], generator=generator) for name, w in pretrained.items()
    }
    return choose(lots, job.density)


def facts(job: Job, masks: Masks, pretrained: Mapping[str, Tensor]) -> dict[str, float]:
    """The density reached, and the share of the pretrained magnitude that is kept."""
    alive = {name: to_elements(mask, job.block) for name, mask in masks.items()}
    total = sum(float(w.abs().sum(dtype=torch.float64)) for w in pretrained.values())
    kept = sum(float(w[alive[name]].abs().sum(dtype=torch.float64)) for name, w in pretrained.items())
    elements = sum(w.numel() for w in pretrained.values())
    return {"reached": sum(int(m.sum()) for m in alive.values()) / elements, "retained": kept / total}


def tickets(job: Job, masks: Masks) -> Iterator[tuple[str, Ticket]]:
    """A mask of blocks as tickets, by layer."""
    for name, mask in masks.items():
        side = job.block or 1
        yield name, Ticket.from_blocks(mask, (mask.shape[0] * side, mask.shape[1] * side), side)
