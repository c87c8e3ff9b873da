"""The machine's ceilings: arithmetic by dtype and copy bandwidth, measured between the cases.

A shared machine is fast in one minute and slow in the next, so a ceiling is sampled right before and right after each
case, and a case is held against the median of these samples.

On the CPU the arithmetic peak is a loop of multiply-adds in registers on all threads (``pyeff_cpu::fma_loop``). Without
the compiled library it is the best matrix product seen (of MKL's and oneDNN's), which is lower: then a time "over
floor" is rather a time over the best product, and every report says so. On a GPU it is cuBLAS's product in the dtype
on random numbers, and in float32 multiply-adds in registers, where no matrix unit computes exactly; cuBLAS's rates in
the other dtypes stand beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import cuda
from .registry import dtype_name

COPY = "copy"
_SAMPLES_AROUND = 2  # on each side of a case
_SAMPLE_SECONDS = 0.02
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
# cuBLAS's rates on a GPU: kind, dtype, whether TF32 is allowed.
_PRODUCTS = (
    ("cuBLAS bfloat16", torch.bfloat16, False), ("cuBLAS float16", torch.float16, False),
    ("cuBLAS float32", torch.float32, False), ("cuBLAS tf32", torch.float32, True),
)  # fmt: skip


@dataclass
class Sample:
    """One measurement: ``kind`` is a dtype's name (then FLOP/s) or ``"copy"`` (bytes/s, read and written)."""

    kind: str
    seconds_since_start: float
    value: float


@dataclass
class Ceilings:
    """Measures and keeps samples.

    Args:
        probes (dict): kind -> a function that measures once and returns a rate.
        sources (dict): kind -> how it is measured, in words.
    """

    probes: dict[str, Callable[[], float]]
    sources: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def sample(self, dtype: str) -> dict[str, list[float]]:
        """Measures the peak of ``dtype`` and the copy bandwidth now, a few times each, in alternation."""
        found: dict[str, list[float]] = {dtype: [], COPY: []}
        for _ in range(_SAMPLES_AROUND):
            for kind, values in found.items():
                values.append(self.probes[kind]())
                self.samples.append(Sample(kind, time.monotonic() - self._start, values[-1]))
        return found

    def sample_once(self, kind: str, probe: Callable[[], float], source: str) -> None:
        """Measures what no floor stands on, for the record."""
        self.sources[kind] = source
        for _ in range(2 * _SAMPLES_AROUND):
            self.samples.append(Sample(kind, time.monotonic() - self._start, probe()))

    @staticmethod
    def around(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, float]:
        """The medians of the samples on both sides of a case."""
        return {kind: statistics.median(before[kind] + after[kind]) for kind in before}


def floor_seconds(flops: float, bytes: float, flop_rate: float, byte_rate: float) -> float:
    """The least time of an operation: its arithmetic at the peak or its traffic at the copy bandwidth, the larger."""
    return max(flops / flop_rate, bytes / byte_rate)


def measure(device: str, dtypes: list[torch.dtype]) -> Ceilings:
    """The ceilings of a device, ready to be sampled; everything is warm when this returns."""
    probes: dict[str, Callable[[], float]] = {}
    sources: dict[str, str] = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        probes[name], sources[name] = _cuda_peak(dtype) if device == "cuda" else _cpu_peak(dtype)
    probes[COPY], sources[COPY] = _copy(device)
    for probe in probes.values():
        probe()
    ceilings = Ceilings(probes, sources)
    if device == "cuda":
        for kind, dtype, tf32 in _PRODUCTS:
            probe, source = cuda.product_rate(dtype, tf32)
            probe()
            ceilings.sample_once(kind, probe, source)
    return ceilings


def _library() -> str:
    """An empty string where the compiled library is there, else the reason."""
    from pyeff import backends

    reason = backends.load_library()
    if not reason and not hasattr(torch.ops.pyeff_cpu, "fma_loop"):
        return "the compiled library has no fma_loop"
    return reason


def _cpu_peak(dtype: torch.dtype) -> tuple[Callable[[], float], str]:
    reason = _library()
    if reason:
        return _best_product(dtype, f"best matrix product seen, since {reason}")
    name = dtype_name(dtype)
    loop, iterations = torch.ops.pyeff_cpu.fma_loop, 10_000

    def probe() -> float:
        start = time.perf_counter()
        flops = loop(name, iterations)
        return flops / (time.perf_counter() - start)

    while _seconds(probe) < _SAMPLE_SECONDS:
        iterations *= 2
    return probe, "multiply-adds in registers, all threads"


def _best_product(dtype: torch.dtype, source: str) -> tuple[Callable[[], float], str]:
    n, best = 1024, 0.0
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    products = [lambda: torch.mm(a, b)]
    if torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))

    def probe() -> float:
        nonlocal best
        for product in products:
            best = max(best, 2.0 * n**3 / _seconds(product))
        return best

    return probe, source


def _cuda_peak(dtype: torch.dtype) -> tuple[Callable[[], float], str]:
    in_registers = cuda.fma_rate() if dtype == torch.float32 else None
    return in_registers or cuda.product_rate(dtype)


def _copy(device: str) -> tuple[Callable[[], float], str]:
    size = _COPY_BYTES[device]
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    if device == "cuda":
        return lambda: 2.0 * size / cuda.seconds(lambda: target.copy_(source)), f"copy of {size >> 20} MiB"
    if not _library() and hasattr(torch.ops.pyeff_cpu, "stream_copy"):
        stream = torch.ops.pyeff_cpu.stream_copy
        return lambda: 2.0 * size / _seconds(lambda: stream(target, source)), f"streaming copy of {size >> 20} MiB"
    return lambda: 2.0 * size / _seconds(lambda: target.copy_(source)), f"torch's copy of {size >> 20} MiB"


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
