"""One forward and one backward at a large size, for Nsight Compute: only these are between profiler start and stop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import read, read_rivals


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("read",), default="read")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="gru")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    sets = read.make(2, 0, tokens=options.tokens, cell=options.cell, dtype=dtype, device="cuda", training=True)
    calls = read_rivals.fused_by(options.backend, sets)
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
