"""Microbenchmark of the CPU kernels without torch and its dispatcher: what a kernel reaches of the arithmetic peak.

    PYTHONPATH=build/dev python -m benchmarks.kernels --isa avx512 --threads 2 --match read

It needs the development module ``pyeff_dev`` (``make install`` builds it) and is a tool for whoever works on a kernel;
``pyeff bench`` is what users see. The peak (multiply-adds in registers) is measured around each kernel, in alternation.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
DTYPES = ("float64", "float32", "bfloat16")


class Kernel(NamedTuple):
    """One kernel at one size: its operations (two for each multiply-add), and what makes inputs and returns a call."""

    label: str
    flops: float
    prepare: Callable[[], Callable[[], object]]


def numbers(rng: Any, dtype: str, *shape: int, scale: float = 1.0) -> Any:
    """Random numbers in (-scale, scale) as the module takes them: bfloat16 as the upper halves of float32."""
    x = (scale * rng.uniform(-1, 1, shape)).astype("float64" if dtype == "float64" else "float32")
    return (x.view("uint32") >> 16).astype("uint16") if dtype == "bfloat16" else x


def products(dev: Any, rng: Any, dtype: str, isa: str, threads: int) -> Iterator[Kernel]:
    def linear(rows: int, inner: int, out: int) -> Callable[[], object]:
        layer = dev.Linear(numbers(rng, dtype, out, inner), isa=isa, threads=threads)
        x, y = numbers(rng, dtype, rows, inner), numbers(rng, dtype, rows, out)
        return lambda: layer(x, out=y)

    def dot(rows: int, inner: int, out: int) -> Callable[[], object]:
        x, w = numbers(rng, dtype, rows, inner), numbers(rng, dtype, out, inner)
        return lambda: dev.dot(x, w, isa=isa)

    for size in ((64, 768, 768), (4096, 768, 768), (4096, 768, 3072)):
        flops = 2.0 * math.prod(size)
        yield Kernel(f"linear {'x'.join(map(str, size))}", flops, functools.partial(linear, *size))
    if threads == 1:  # it has no threads of its own
        yield Kernel("dot 4x768x768", 2.0 * 4 * 768 * 768, functools.partial(dot, 4, 768, 768))


def recurrences(dev: Any, rng: Any, dtype: str, isa: str, threads: int) -> Iterator[Kernel]:
    layers, width, rank = 12, 768, 256

    def make(cell: str, tokens: int) -> tuple[Any, list[Any]]:
        rows = GATES[cell] * rank
        weights = [numbers(rng, dtype, rows, k, scale=k**-0.5) for k in (width, rank)]
        read = dev.Read(*weights, cell=cell, isa=isa, threads=threads)
        return read, [numbers(rng, dtype, tokens, width) for _ in range(layers)]

    def forward(cell: str, tokens: int) -> Callable[[], object]:
        read, phi = make(cell, tokens)
        return lambda: read.forward(phi)

    def backward(cell: str, tokens: int) -> Callable[[], object]:
        read, phi = make(cell, tokens)
        saved, grad = read.forward(phi, save=True, save_gates=True), numbers(rng, dtype, tokens, rank)
        return lambda: read.backward(phi, saved, grad_out=grad, wanted=["dw_ih", "dw_hh"])

    for cell, gates in GATES.items():
        for tokens in (1, 64, 1024):
            of_sums = 2.0 * layers * tokens * gates * rank
            for call, inner in ((forward, width + rank), (backward, width + 2 * rank)):
                label = f"read {cell} {tokens} {call.__name__}"
                yield Kernel(label, of_sums * inner, functools.partial(call, cell, tokens))


def seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure(kernel: Kernel, peak: Callable[[], float], turns: int) -> tuple[float, float]:
    """The median time of a call, and the median of the peak around it."""
    run = kernel.prepare()
    run()
    calls = max(1, int(0.01 / seconds(run, 1)))
    times, peaks = [], []
    for _ in range(turns):
        peaks.append(peak())
        times.append(seconds(run, calls))
    return statistics.median(times), statistics.median(peaks)


def main(arguments: list[str] | None = None) -> int:
    try:
        import numpy as np
        import pyeff_dev as dev
    except ImportError as error:
        print(f"benchmarks.kernels: {error}; `make install` builds pyeff_dev into build/dev", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(description="Times the CPU kernels without the dispatcher.")
    parser.add_argument("--isa", choices=dev.isa_usable(), default=dev.isa_usable()[-1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--match", default="", help="only the kernels whose names contain this")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args(arguments)

    def peak() -> float:
        start = time.perf_counter()
        flops = dev.fma_loop(options.dtype, 200_000, isa=options.isa, threads=options.threads)
        return flops / (time.perf_counter() - start)

    print(f"{options.dtype}, {options.isa}, threads: {options.threads}")
    print(f"{'kernel':<28}{'ms':>10}{'GFLOP/s':>10}{'of peak':>9}")
    rng = np.random.default_rng(0)
    for kernels in (products, recurrences):
        for kernel in kernels(dev, rng, options.dtype, options.isa, options.threads):
            if options.match not in kernel.label:
                continue
            took, ceiling = measure(kernel, peak, max(1, options.turns))
            rate = kernel.flops / took
            print(f"{kernel.label:<28}{took * 1e3:>10.3f}{rate / 1e9:>10.1f}{rate / ceiling:>9.0%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
