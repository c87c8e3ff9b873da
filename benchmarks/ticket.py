"""Tickets' cases: the two linear layers of a base encoder's feed-forward block, over blocks, densities and tokens.

``up`` is the weight [3072, 768], ``down`` [768, 3072]; bias, no activation. With a share rho of the weight alive, the
least that a layer takes is, in each of its three products (the output, and in training the gradients of x and of the
living blocks), ``2 N in out rho`` FLOPs, and

    forward    N in + N out + rho in out        numbers read or written once
    backward   2 N in + N out + 2 rho in out    more: the gradient, x and the values read, two gradients written

Every input set has weights and a ticket of its own: in a network, another layer's were used last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyeff import Ticket

from . import ticket_rivals
from .registry import FORWARD, TRAINING, Case, Selection, register

SHAPES = {"up": (3072, 768), "down": (768, 3072)}
BLOCKS = (8, 16, 32, 64, 128)
DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
TOKENS = (1, 16, 128, 512, 4096)
GPU_TOKENS = (1, 16, 128, 1024, 4096, 32768)
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.bfloat16, torch.float32)
# The definition takes seconds beyond this, and is nobody's rival.
_MOST_FOR_THE_DEFINITION = {"quick": 128, "default": 128, "full": 512}
Point = tuple[str, int, float, int]  # shape's name, block, density, tokens


@dataclass
class Inputs:
    """One input set: x [N, in], values [nnz, b, b], bias [out]; grad_out [N, out] in training."""

    x: Tensor
    values: Tensor
    bias: Tensor
    ticket: Ticket
    grad_out: Tensor | None
    _weight: list[Tensor] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """The same weight, dense [out, in]; made when it is first asked for."""
        if not self._weight:
            trains = self.values.requires_grad
            self._weight.append(self.ticket.scatter(self.values.detach()).requires_grad_(trains))
        return self._weight[0]

    def tensors(self) -> list[Tensor]:
        given = [self.x, self.values, self.bias, self.ticket.index, *self._weight]
        return given if self.grad_out is None else [*given, self.grad_out]


def make_ticket(shape: tuple[int, int], block: int, density: float, random: torch.Generator, device: str) -> Ticket:
    """A ticket with as many random blocks as the density asks for, and at least one."""
    grid = (-(-shape[0] // block), -(-shape[1] // block))
    count = max(1, round(density * grid[0] * grid[1]))
    alive = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    alive[torch.randperm(alive.numel(), generator=random)[:count]] = True
    return Ticket.from_blocks(alive.view(grid).to(device), shape, block)


def make(
    count: int, seed: int, *, shape: tuple[int, int], block: int, density: float, tokens: int, dtype: torch.dtype,
    device: str, training: bool,
) -> list[Inputs]:  # fmt: skip
    """``count`` sets that share nothing."""
    places, random = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    out, width = shape

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        drawn = (torch.randn(*size, generator=random, device=device) * scale).to(dtype)
        return drawn.requires_grad_(training)

    def one() -> Inputs:
        ticket = make_ticket(shape, block, density, places, device)
        values = normal(ticket.nnz, block, block, scale=(density * width) ** -0.5)
        grad_out = normal(tokens, out).detach() if training else None
        return Inputs(normal(tokens, width), values, normal(out, scale=0.1), ticket, grad_out)

    return [one() for _ in range(count)]


def oracle(inputs: Inputs) -> list[Tensor]:
    """The dense layer in float64, and of its weight's gradient what is in living blocks."""
    x, bias = (t.detach().double().requires_grad_(t.requires_grad) for t in (inputs.x, inputs.bias))
    weight = inputs.ticket.scatter(inputs.values.detach().double()).requires_grad_(inputs.values.requires_grad)
    out = torch.nn.functional.linear(x, weight, bias)
    if inputs.grad_out is None:
        return [out]
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), inputs.grad_out.double())
    return [out.detach(), dx, inputs.ticket.gather(dweight), dbias]


def comparable(inputs: Inputs, outputs: Sequence[Tensor]) -> list[Tensor]:
    """A dense contender's gradient of the weight is dense: of it, the living blocks."""
    return [inputs.ticket.gather(t) if i == 2 and t.dim() == 2 else t for i, t in enumerate(outputs)]


def work(tokens: int, shape: tuple[int, int], alive: int, itemsize: int, training: bool) -> tuple[float, float]:
    """The least FLOPs and the least bytes of a case with ``alive`` living elements."""
    out, width = shape
    flops, numbers = 2.0 * tokens * alive, tokens * (width + out) + alive
    if training:
        flops, numbers = 3 * flops, numbers + tokens * (2 * width + out) + 2 * alive
    return flops, float(numbers * itemsize)


def case(
    name: str, shape: tuple[int, int], block: int, density: float, tokens: int, dtype: torch.dtype, device: str,
    mode: str, most_for_the_definition: int = 128,
) -> Case:  # fmt: skip
    """One case; ``density`` is rounded to whole blocks."""
    training, (out, width) = mode == TRAINING, shape
    blocks = -(-out // block) * -(-width // block)
    alive = round(max(1, round(density * blocks)) / blocks * out * width)
    flops, least_bytes = work(tokens, shape, alive, dtype.itemsize, training)

    def sets(count: int, seed: int) -> list[Inputs]:
        return make(
            count, seed, shape=shape, block=block, density=density, tokens=tokens, dtype=dtype, device=device,
            training=training,
        )  # fmt: skip

    terms = round(density * width)
    return Case(
        op="ticket_linear",
        group=f"{name} b{block} {tokens}",
        point=f"{density:g}",
        axis="density",
        shape={"in": width, "out": out, "b": block, "N": tokens},
        dtype=dtype,
        device=device,
        mode=mode,
        flops=flops,
        bytes=least_bytes,
        reduction=max(terms, round(density * out), tokens) if training else terms,
        make=sets,
        set_bytes=(tokens * width + alive) * dtype.itemsize,
        tensors=Inputs.tensors,
        oracle=oracle,
        contenders=ticket_rivals.contenders(
            device, dtype, block, alive, tokens, shape, training, tokens <= most_for_the_definition
        ),
        comparable=comparable,
    )


def points(size: str, tokens: Sequence[int], mode: str) -> list[Point]:
    """What is measured, in the order of the tables: panels of one shape, block and number of tokens."""
    few, many = tokens[0], tokens[-2] if size == "quick" else tokens[-1]
    if size == "full":
        return [(n, b, d, t) for n in SHAPES for b in BLOCKS for t in tokens for d in DENSITIES]
    if size == "quick":
        return [("up", 32, 0.3, t) for t in ((few, many) if mode == FORWARD else (many,))]
    shown = (few, 128, many) if mode == FORWARD else (128, many)
    densities = (0.1, 0.3, 0.5, 0.7, 0.9)
    found = [("up", 32, d, t) for t in shown for d in densities]
    found += [("up", b, 0.3, t) for b in BLOCKS if b != 32 for t in (shown if b == 16 else shown[-1:])]
    found += [("down", 32, 0.3, t) for t in tokens if mode == FORWARD or t >= 128]
    return found


@register("ticket")
def cases(select: Selection) -> Iterator[Case]:
    """The cases of a selection: by mode and dtype, then by shape, block, tokens and density."""
    tokens = TOKENS if select.device == "cpu" else GPU_TOKENS
    dtypes = DTYPES if select.device == "cpu" else GPU_DTYPES
    modes = [(mode, dtype) for mode in (FORWARD, TRAINING) for dtype in dtypes]
    if select.device == "cuda":
        # By importance, where there may not be time for all.
        modes.sort(key=lambda pair: dtypes.index(pair[1]))
    for mode, dtype in modes:
        for name, block, density, n in points(select.size, tokens, mode):
            yield case(
                name, SHAPES[name], block, density, n, dtype, select.device, mode,
                _MOST_FOR_THE_DEFINITION[select.size],
            )  # fmt: skip
