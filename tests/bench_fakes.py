"""Made-up contenders, clocks and ceilings, so that the benchmark's mechanics are tested without a real time."""

from __future__ import annotations

import torch

from benchmarks import roofline, runner
from benchmarks.registry import FORWARD, Case, Contender, Selection, Unavailable

SETTINGS = runner.Settings(seconds_per_case=1.0, min_turns=3, max_turns=20, sample_seconds=0.0)


class Clock:
    """A timer that runs the calls and charges each contender its own price; ``log`` is the order of the turns."""

    def __init__(self, prices):
        self.prices, self.log = prices, []

    def __call__(self, calls, first, count):
        for i in range(first, first + count):
            calls[i % len(calls)]()
        self.log.append((calls[0].owner, first, count))
        return self.prices[calls[0].owner] * count


class Owned:
    """A call that knows whose it is."""

    def __init__(self, owner, function):
        self.owner, self.function = owner, function

    def __call__(self):
        return self.function()


def contender(name, role, function, **keywords):
    def prepare(sets):
        return [Owned(name, lambda s=s: function(s)) for s in sets]

    return Contender(name, f"about {name}", role, prepare, **keywords)


def square(x):
    return (x * x,)


def absent(sets):
    raise Unavailable("it is not installed")


def fake_case(
    *contenders, point="7", group="toy", mode=FORWARD, dtype=torch.float32, op="toy_op", axis="size", device="cpu"
):
    return Case(
        op=op, group=group, point=point, axis=axis, shape={"N": 7, "d": 3}, dtype=dtype, device=device, mode=mode,
        flops=1e9, bytes=1e9, reduction=1,
        make=lambda count, seed: [torch.arange(1.0, 8.0).to(dtype) + i for i in range(count)],
        set_bytes=1 << 24, tensors=lambda x: [x], oracle=lambda x: [x.double() ** 2], contenders=contenders,
    )  # fmt: skip


def ceilings():
    return roofline.Ceilings({"float32": lambda: 2e9, "bfloat16": lambda: 4e9, "copy": lambda: 1e10}, {
        "float32": "made up", "bfloat16": "made up", "copy": "made up"})  # fmt: skip


def graphs(calls):
    """Stands for the capture of CUDA graphs: the first calls of a rotation, as ``NAME graph`` on the clock."""
    return [Owned(f"{call.owner} graph", call.function) for call in calls[:2]]


def run(*cases, prices=None, settings=SETTINGS, progress=None, **more):
    prices = prices or {"fused": 0.6, "reference": 1.2, "rival": 0.9}
    clock = Clock(prices)
    found = runner.run(
        list(cases), Selection("quick"), settings=settings, ceilings=ceilings(), timer=clock, progress=progress, **more
    )
    return found, clock


FUSED = contender("fused", "fused", square)
REFERENCE = contender("reference", "reference", square)
RIVAL = contender("rival", "rival", lambda x: (x**2,))


def status(row):
    return {c.name: c.status for c in row.contenders}
