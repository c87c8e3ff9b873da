"""What the tests of every operation on a CUDA device share: graphs of a step, its launches, memory that is free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import DeviceType

Step = Callable[[], list[torch.Tensor]]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """The graph of a step and the memory of its results; after the warm-up on another stream that torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def launched(step: Step) -> list[str]:
    """The names of the kernels that a step launches."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the suite's own kernels; the fixture puts it back
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    if not events:
        pytest.skip("torch's profiler sees no kernel here")
    return events


def fill_free_memory(pattern: int) -> None:
    """Leaves ``pattern`` in what torch's allocator hands out next: one large block, and many small ones."""
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), pattern, dtype=torch.uint8) for size in (256 << 20, *(1 << 19,) * 64)]
    torch.cuda.synchronize()
    del blocks


def need_memory(free: float) -> None:
    """Skips the test where the device has not so many bytes left."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < free:
        pytest.skip(f"needs {free / 1e9:.0f} GB of free device memory")
