"""Small calls of the kernels, for compute-sanitizer: every option and dtype, sizes that no tile divides.

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


# shape, block, density, tokens, activation, dtype: each size of blocks with tiles of its own, few tokens and many, a
# size that is nobody's, no block at all.
TICKET = [
    *(((96 + odd, 160 - odd), (b, b), 0.4, tokens, activation, dtype)
      for b, odd, tokens, activation, dtype in (
          (8, 3, 70, "gelu", torch.bfloat16), (16, 0, 150, "relu", torch.bfloat16), (16, 5, 33, None, torch.float16),
          (32, 0, 131, "gelu", torch.bfloat16), (32, 7, 65, "relu", torch.float32), (32, 0, 3, "gelu", torch.bfloat16),
          (16, 0, 520, None, torch.bfloat16), (32, 0, 520, "gelu", torch.bfloat16),
          (64, 0, 129, None, torch.bfloat16), (64, 9, 64, "gelu", torch.float16), (128, 0, 40, "relu", torch.bfloat16),
      )),
    ((50, 70), (16, 32), 0.5, 20, "gelu", torch.bfloat16),
    ((20, 9), (3, 5), 0.5, 17, "relu", torch.float32),
    ((64, 64), (32, 32), 0.0, 5, None, torch.bfloat16),
]  # fmt: skip


def ticket(device: str, shape, block, density: float, tokens: int, activation: str | None, dtype: torch.dtype):
    """The output and every gradient."""
    grid = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    made = pyeff.Ticket.from_blocks(torch.rand(grid) < density, shape, block)
    given = [torch.randn(tokens, shape[1]), made.gather(torch.randn(shape) / shape[1] ** 0.5), torch.randn(shape[0])]
    x, values, bias = leaves = [t.to(dtype).to(device).requires_grad_() for t in given]
    out = pyeff.ops.ticket_linear(x, values, made.to(device), bias, activation=activation)
    grad_out = torch.randn(tokens, shape[0]).to(dtype).to(device)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, grad_out))]


CALLS = {"read": (read, READ), "ticket": (ticket, TICKET)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(CALLS), action="append", help="these alone; may be repeated")
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with pyeff.backend(options.backend):
        for op in options.op or CALLS:
            call, cases = CALLS[op]
            for case in cases:
                if torch.float16 in case and options.backend == "cpu":
                    continue
                wrong = not all(t.isfinite().all() for t in call(options.device, *case))
                print(op, *case, "NOT FINITE" if wrong else "done", flush=True)
                if wrong:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
