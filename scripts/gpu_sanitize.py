"""Small calls of the kernels, for compute-sanitizer: every cell, norm and dtype, sizes that no tile divides.

Numbers are drawn on the CPU and copied, so that nearly every kernel that the sanitizer watches is one of ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyeff
from pyeff.reference.read import GATES

# cell, norm, dtype, tokens, layers, width, rank: each cell and norm once in each kind of dtype, then what has paths of
# its own: the rank that is kept on chip, the first beyond it, one of everything.
READ = [
    *((cell, norm, dtype, 131, 2, 72, 40) for (cell, norm), dtype in zip(
        itertools.product(GATES, ("rms", "layer", "none")), itertools.cycle((torch.bfloat16, torch.float32))
    )),
    ("gru", "layer", torch.float16, 70, 2, 72, 40),
    ("gru", "rms", torch.bfloat16, 20, 2, 64, 256),
    ("gru", "rms", torch.bfloat16, 20, 2, 64, 264),
    ("lstm", "layer", torch.float32, 1, 1, 1, 1),
]  # fmt: skip


def read(device: str, cell: str, norm: str, dtype: torch.dtype, tokens: int, layers: int, width: int, rank: int):
    """The output and every gradient, with the gates saved and computed again."""
    rows = GATES[cell] * rank
    shapes = {"w_ih": (rows, width), "w_hh": (rows, rank), "b_ih": (rows,), "b_hh": (rows,), "h0": (tokens, rank)}
    shapes |= {"c0": (tokens, rank)} if cell == "lstm" else {}
    shapes |= {"norm_weight": (width,)} if norm != "none" else {}
    shapes |= {"norm_bias": (width,)} if norm == "layer" else {}
    given = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).to(device) for name, shape in shapes.items()}
    phi = [torch.randn(tokens, width).to(dtype).to(device) for _ in range(layers)]
    leaves = [t.requires_grad_() for t in (*given.values(), *phi)]
    grad_out = torch.randn(tokens, rank).to(dtype).to(device)
    found = []
    for recompute in (False, True):
        out = pyeff.ops.read_recurrence(phi, **given, cell=cell, norm=norm, recompute=recompute)
        found += [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    return [t.cpu() for t in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("read",), default="read")
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with pyeff.backend(options.backend):
        for case in READ:
            if case[2] == torch.float16 and options.backend == "cpu":
                continue
            wrong = not all(t.isfinite().all() for t in read(options.device, *case))
            print(*case, "NOT FINITE" if wrong else "done", flush=True)
            if wrong:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
