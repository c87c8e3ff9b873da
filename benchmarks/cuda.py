"""Measuring on a CUDA device: time by events behind a flushed L2, calls as graphs, multiply-adds in registers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registry import Call

# A graph holds its own copy of nothing but launches; this many of them give a turn inputs that are not in the cache.
_MOST_GRAPHS = 8
_buffers: dict[int, Tensor] = {}


def l2_bytes() -> int:
    """The size of the current device's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def flush() -> None:
    """Overwrites the L2 cache of the current device, without waiting for it."""
    device = torch.cuda.current_device()
    if device not in _buffers:
        _buffers[device] = torch.empty(max(2 * l2_bytes(), 32 << 20), dtype=torch.uint8, device="cuda")
    _buffers[device].fill_(0)


def timer(calls: Sequence[Call], first: int, count: int) -> float:
    """Time between two events around ``count`` calls of a rotation, behind a flush.

    The device is busy with the flush while the first call is launched. What a longer turn has of launches that the
    device waits for is in its time, as it is for a user who makes one call after another.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    sets = len(calls)
    flush()
    start.record()
    for i in range(first, first + count):
        calls[i % sets]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, between two events."""
    return timer([lambda: (call(), ())[1]], 0, 1)


def capture(calls: Sequence[Call]) -> list[Call]:
    """The first calls of a rotation as graphs: each replay launches what the call launched, and nothing else.

    Raises:
        Exception: whatever the call does while it is captured that a graph cannot hold.
    """
    stream, graphs, pool = torch.cuda.Stream(), [], None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
        torch.cuda.synchronize()
        for call in calls[:_MOST_GRAPHS]:
            graph = torch.cuda.CUDAGraph()
            # One pool: they run one after another, and nobody reads their results.
            graph.capture_begin(*([] if pool is None else [pool]))
            try:
                call()
            except Exception:
                with contextlib.suppress(Exception):  # it says only that something has failed before
                    graph.capture_end()
                raise
            graph.capture_end()
            pool = graph.pool()
            graphs.append(graph)
    torch.cuda.current_stream().wait_stream(stream)

    def replay(graph: torch.cuda.CUDAGraph) -> Call:
        return lambda: (graph.replay(), ())[1]

    return [replay(graph) for graph in graphs]


def product_rate(dtype: torch.dtype, tf32: bool = False) -> tuple[Callable[[], float], str]:
    """What measures the FLOP/s of cuBLAS on random square matrices once, and how, in words."""
    n = 2048 if dtype == torch.float64 else 8192
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))

    def probe() -> float:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return 2.0 * n**3 / seconds(lambda: torch.mm(a, b))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return probe, f"cuBLAS, {n}^3{', TF32 allowed' if tf32 else ''}"


def fma_rate() -> tuple[Callable[[], float], str] | None:
    """What measures the FLOP/s of multiply-adds in registers in float32; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import fma

    programs = 16 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    out, iterations = torch.empty(programs * fma.BLOCK, device="cuda"), 64
    fma.run(out, 1)  # compiles

    def probe() -> float:
        return fma.flops(out, iterations) / seconds(lambda: fma.run(out, iterations))

    while fma.flops(out, iterations) / probe() < 2e-3:
        iterations *= 2
    return probe, "multiply-adds in registers"
