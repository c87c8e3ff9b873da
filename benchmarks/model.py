"""A model of a GPU kernel on paper: what it moves and computes, and the least time that this can take.

A prediction is the largest of several terms, each an amount over a rate, plus the cost of a launch. It is never a
result: nothing here was timed. What is assumed beyond the card's own rates are the constants below, each with its
reason; a prediction lists those that it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .gpus import ARCHITECTURES, MMA, TCGEN05, WGMMA, Card

# Seconds from the end of a kernel to the start of the next one that depends on it, in a replayed CUDA graph.
# Assumption; a launch from Python costs the host several times that, which hides behind kernels that are longer.
LAUNCH = 2.0e-6
# Memory-bound kernels reach nine tenths of what a long copy does: ramp up, tail, and reads and writes that alternate.
MEMORY_SHARE = 0.9
L2_SHARE = 1.0
# An SM takes at most 64 bytes a clock from L2.
L2_BYTES_PER_CLOCK = 64
# What a kernel with a short K loop and an epilogue reaches of the rate of a large cuBLAS product. mma.sync cannot feed
# Hopper's and Blackwell's tensor cores fully: six tenths and four tenths of the best instruction's rate.
PRODUCT_SHARE = 0.8
INSTRUCTION_SHARE = {
    (80, MMA): 1.0,
    (90, WGMMA): 1.0,
    (90, MMA): 0.6,
    (100, TCGEN05): 1.0,
    (100, MMA): 0.4,
    (120, MMA): 1.0,
}
# float32 products on multiply-add units: shared memory is read for every few of them, and addresses are computed.
FMA_SHARE = 0.6
SFU_SHARE = 0.8
SHARED_SHARE = 0.8
# What one kernel writes and the next one reads stays in L2 if it takes no more than this part of it.
L2_PART = 0.5
ASSUMPTIONS = {
    "launch": f"{LAUNCH * 1e6:g} us a kernel, as in a replayed CUDA graph; nothing of the host's time",
    "memory": f"{MEMORY_SHARE:.0%} of the copy bandwidth",
    "l2": f"{L2_SHARE:.0%} of the L2 rate, and {L2_BYTES_PER_CLOCK} bytes a clock for an SM",
    "tensor": f"{PRODUCT_SHARE:.0%} of the rate of a large product; mma.sync 60% of that on sm_90, 40% on sm_100",
    "fma": f"{FMA_SHARE:.0%} of the multiply-add peak",
    "sfu": f"{SFU_SHARE:.0%} of the special function peak",
    "shared": f"{SHARED_SHARE:.0%} of 128 bytes a clock for an SM",
    "latency": "dependent steps of one block, at the latencies named with the kernel",
    "none": "kernels do not overlap, and a kernel's terms overlap fully: the largest is its time",
}


@dataclass(frozen=True)
class Work:
    """What one kernel does, over its whole grid.

    Args:
        kernel (str): its name.
        blocks (int): of the grid.
        blocks_per_sm (int): resident at once, by its resources.
        hbm_bytes, l2_bytes, shared_bytes (float): moved from and to device memory, between L2 and the SMs, and between
            shared memory and registers (or the tensor cores).
        tensor_flops, fma_flops (float): two for each multiply-add.
        sfu_ops (float): exponentials, reciprocals, roots.
        instruction (str): that of the tensor cores; empty without one.
        chain (float): seconds that one block needs for steps of which each waits for the one before.
        uneven (float): the work of the block that has most, over the mean.
        notes (tuple of str): what was assumed about it.
    """

    kernel: str
    blocks: int
    blocks_per_sm: int
    hbm_bytes: float = 0.0
    l2_bytes: float = 0.0
    shared_bytes: float = 0.0
    tensor_flops: float = 0.0
    fma_flops: float = 0.0
    sfu_ops: float = 0.0
    instruction: str = ""
    chain: float = 0.0
    uneven: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The time of one kernel, in seconds: ``terms`` by name, of which the largest counts, and the launch."""

    kernel: str
    terms: dict[str, float]
    launch: float
    waves: float
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> str:
        """The largest term, or ``"launch"`` where even that is smaller than the launch."""
        term = max(self.terms, key=lambda name: self.terms[name])
        return term if self.terms[term] > self.launch else "launch"

    @property
    def seconds(self) -> float:
        return self.launch + max(self.terms.values())


def away(amount: float, card: Card) -> float:
    """Bytes of device memory for what the next kernel reads: none if it stays in L2."""
    return 0.0 if amount <= L2_PART * card.l2_bytes else float(amount)


def tile_bytes(rows: int, columns: int, depth: float, size: int, threads: int, instruction: str) -> float:
    """Shared memory traffic of one tile of a product: operands written once, read by each warp that needs them."""
    warps = max(1, threads // 32)
    if instruction == WGMMA:
        # A warpgroup takes 64 rows and all columns from shared memory.
        down, across = max(1, warps // 4), 1
    else:
        down = 2 ** (int(math.log2(warps)) // 2)
        across = warps // down
    return (rows * (1 + across) + columns * (1 + down)) * depth * size


def predict(work: Work, card: Card) -> Prediction:
    """The prediction for one kernel on one card.

    What the SMs do themselves takes as long as on the SM with the most blocks; a grid of one block more than there are
    SMs takes twice as long.

    Raises:
        ValueError: the kernel has no block, none fits an SM, or its matrix instruction is none of the card's.
    """
    if work.blocks < 1 or work.blocks_per_sm < 1:
        raise ValueError(f"{work.kernel}: {work.blocks} blocks, {work.blocks_per_sm} on an SM, expected at least one")
    tensor_share = 1.0
    if work.tensor_flops:
        if work.instruction not in ARCHITECTURES[card.cc].matrix:
            raise ValueError(f"{work.kernel}: sm_{card.cc} has no {work.instruction or 'named matrix instruction'}")
        tensor_share = PRODUCT_SHARE * INSTRUCTION_SHARE[card.cc, work.instruction]
    uneven = work.uneven * math.ceil(work.blocks / card.sms) * card.sms / work.blocks
    waves = work.blocks / (card.sms * work.blocks_per_sm)
    sm_l2 = L2_BYTES_PER_CLOCK * card.clock * card.sms
    terms = {
        "memory": work.hbm_bytes / (card.copy * MEMORY_SHARE),
        "l2": max(work.l2_bytes / (card.l2 * L2_SHARE), work.l2_bytes * uneven / sm_l2),
        "shared": work.shared_bytes * uneven / (card.shared * SHARED_SHARE),
        "tensor": work.tensor_flops * uneven / (card.tensor * tensor_share),
        "fma": work.fma_flops * uneven / (card.fma * FMA_SHARE),
        "sfu": work.sfu_ops * uneven / (card.sfu * SFU_SHARE),
        "latency": math.ceil(waves) * work.chain,
    }
    return Prediction(work.kernel, terms, LAUNCH, waves, work.notes)


def total(predictions: Iterable[Prediction]) -> float:
    """Seconds for kernels that run one after another."""
    return sum(prediction.seconds for prediction in predictions)


def assumptions(predictions: Iterable[Prediction], card: Card) -> list[str]:
    """What these predictions rest on: the card's rates with their sources, shares of them, and the kernels' notes."""
    predictions = list(predictions)
    used = {prediction.bound for prediction in predictions} | {"launch", "none"}
    rates = {
        "copy": f"{card.copy / 1e12:.2f} TB/s",
        "l2": f"{card.l2 / 1e12:.1f} TB/s",
        "tensor": f"{card.tensor / 1e12:.0f} TFLOP/s",
        "fma": f"{card.fma / 1e12:.0f} TFLOP/s",
    }
    lines = [f"{card.name}: {name} {rate} ({card.sources[name]})" for name, rate in rates.items()]
    lines += [f"{name}: {text}" for name, text in ASSUMPTIONS.items() if name in used]
    return lines + sorted({f"{p.kernel}: {note}" for p in predictions for note in p.notes})
