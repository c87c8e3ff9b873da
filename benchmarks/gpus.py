"""GPUs on paper: what an architecture allows a kernel, and what a card can do in a second.

The limits are those of NVIDIA's CUDA C++ programming guide, "Technical Specifications per Compute Capability", and the
granularities of allocation those of ``cuda_occupancy.h`` in the CUDA toolkit; the tests hold :func:`blocks_per_sm`
against that header.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB  # 32-bit registers of an SM; as many at most for one block
_REGISTERS_PER_WARP_STEP, _SHARED_STEP, _SUBPARTITIONS, _WARP = 256, 128, 4, 32
_RESERVED_SHARED = 1 * KIB  # of each block, for the system


@dataclass(frozen=True)
class Architecture:
    """The limits of one compute capability.

    Args:
        cc (int): compute capability, such as 90.
        threads_per_sm, blocks_per_sm (int): resident at once.
        shared_per_sm, shared_per_block (int): bytes; for one block what it gets by opting in.
        tensor_memory_columns (int): of an SM, for the accumulators of tcgen05; 0 where there is none.
        matrix (tuple of str): the matrix instructions (by their PTX name) that run at full rate, the best one first.
    """

    cc: int
    threads_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    tensor_memory_columns: int
    matrix: tuple[str, ...]


MMA, WGMMA, TCGEN05 = "mma.sync", "wgmma", "tcgen05.mma"
ARCHITECTURES = {
    a.cc: a
    for a in (
        Architecture(80, 2048, 32, 164 * KIB, 163 * KIB, 0, (MMA,)),
        Architecture(90, 2048, 32, 228 * KIB, 227 * KIB, 0, (WGMMA, MMA)),
        Architecture(100, 2048, 32, 228 * KIB, 227 * KIB, 512, (TCGEN05, MMA)),
        Architecture(120, 1536, 24, 100 * KIB, 99 * KIB, 0, (MMA,)),
    )
}


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def blocks_per_sm(cc: int, threads: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many blocks of a kernel an SM holds at once; 0 if it cannot be launched.

    Args:
        cc (int): compute capability.
        threads (int): of a block.
        registers (int): of a thread.
        shared (int): bytes of a block, static and dynamic.
        tensor_memory (int): columns of a block.

    Example:
        >>> from benchmarks import gpus
        >>> gpus.blocks_per_sm(90, threads=256, registers=128, shared=64 * 1024)
        2
    """
    a = ARCHITECTURES[cc]
    warps = _up(threads, _WARP) // _WARP
    if shared > a.shared_per_block or threads > 1024 or registers > 255:
        return 0
    limits = [a.blocks_per_sm, a.threads_per_sm // _WARP // warps]
    limits.append(a.shared_per_sm // _up(shared + _RESERVED_SHARED, _SHARED_STEP))
    if registers:
        a_warp = _up(registers * _WARP, _REGISTERS_PER_WARP_STEP)
        if a_warp * _up(warps, _SUBPARTITIONS) > REGISTERS:
            return 0
        limits.append(REGISTERS // _SUBPARTITIONS // a_warp * _SUBPARTITIONS // warps)
    if tensor_memory:
        limits.append(a.tensor_memory_columns // tensor_memory)
    return min(limits)


@dataclass(frozen=True)
class Card:
    """What a card does in a second, as far as a prediction needs it.

    Args:
        name (str): as in the tables.
        cc (int): compute capability.
        sms (int): streaming multiprocessors.
        clock (float): boost clock in Hz.
        copy (float): bytes/s of device memory, read and written, that a long copy reaches.
        l2 (float): bytes/s between the L2 cache and all SMs.
        l2_bytes (int): size of the L2 cache.
        tensor (float): FLOP/s of 16-bit products with float32 sums that a large matrix product reaches.
        fma (float): FLOP/s of float32 multiply-adds.
        sources (dict): field -> where the number comes from: ``measured``, a public figure, or an assumption.
    """

    name: str
    cc: int
    sms: int
    clock: float
    copy: float
    l2: float
    l2_bytes: int
    tensor: float
    fma: float
    sources: dict[str, str]

    @property
    def sfu(self) -> float:
        """Special functions (exp2, reciprocal, rsqrt) in a second: an SM has one unit for eight multiply-add lanes."""
        return self.fma / 2 / 8

    @property
    def shared(self) -> float:
        """Bytes/s of all shared memories: 128 a clock for each SM."""
        return 128 * self.clock * self.sms


# What was measured on the H200 over what its data sheet has (4.8 TB/s and 989 TFLOP/s). The other cards' public figures
# are taken times these, for want of a measurement.
COPY_SHARE, TENSOR_SHARE = 4.3 / 4.8, 790 / 989
_SCALED = "data sheet, times what an H200 reaches of its own"
_PUBLIC = {"sms": "data sheet", "clock": "data sheet", "fma": "data sheet", "copy": _SCALED, "tensor": _SCALED}
_GUESSED = {"l2": "assumption: no measurement behind it", "l2_bytes": "data sheet"}

CARDS = {
    card.name: card
    for card in (
        Card(
            "h200", 90, 132, 1.98e9, 4.3e12, 5.5e12, 50 * KIB * KIB, 790e12, 67e12,
            {**_PUBLIC, **_GUESSED, "copy": "measured: a copy", "tensor": "measured: bfloat16 products"},
        ),
        Card(
            "a100", 80, 108, 1.41e9, 2.039e12 * COPY_SHARE, 4.0e12, 40 * KIB * KIB, 312e12 * TENSOR_SHARE, 19.5e12,
            {**_PUBLIC, **_GUESSED},
        ),
        Card(
            "b200", 100, 148, 1.98e9, 8.0e12 * COPY_SHARE, 9.0e12, 126 * KIB * KIB, 2250e12 * TENSOR_SHARE, 75e12,
            {**_PUBLIC, **_GUESSED},
        ),
        # 838 TFLOP/s are with sparsity and sums in float16: a quarter of it dense with sums in float32.
        Card(
            "rtx5090", 120, 170, 2.41e9, 1.792e12 * COPY_SHARE, 5.0e12, 96 * KIB * KIB, 838e12 / 4 * TENSOR_SHARE,
            104.8e12, {**_PUBLIC, **_GUESSED},
        ),
    )
}  # fmt: skip
