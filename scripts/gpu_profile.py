"""One forward and one backward at a large size, for Nsight Compute: only these are between profiler start and stop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyeff
from benchmarks import read, read_rivals


def read_calls(options: argparse.Namespace, dtype: torch.dtype) -> list[Callable[[], object]]:
    sets = read.make(2, 0, tokens=options.tokens, cell=options.cell, dtype=dtype, device="cuda", training=True)
    return read_rivals.fused_by(options.backend, sets)


def ticket_calls(options: argparse.Namespace, dtype: torch.dtype) -> list[Callable[[], object]]:
    """The widening layer of a BERT of 768, with the gelu that follows it."""
    torch.manual_seed(0)
    out, width, block = 3072, 768, options.block
    made = pyeff.Ticket.from_blocks(
        torch.rand(-(-out // block), -(-width // block)) < options.density, (out, width), block
    )
    shapes = ((options.tokens, width), (made.nnz, block, block), (out,))
    leaves = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    grad_out, made = torch.randn(options.tokens, out, device="cuda", dtype=dtype), made.to("cuda")

    def call() -> object:
        with pyeff.backend(options.backend):
            y = pyeff.ops.ticket_linear(leaves[0], leaves[1], made, leaves[2], activation="gelu")
            return torch.autograd.grad(y, leaves, grad_out)

    return [call]


def multimask_calls(options: argparse.Namespace, dtype: torch.dtype) -> list[Callable[[], object]]:
    """What of a step with images is not an encoder: 16 masks of 196 tokens of 768, ten layers of the teacher."""
    torch.manual_seed(0)
    tokens, width, masks = 196, 768, 16
    batch = max(1, options.tokens // (tokens * masks))
    layers = [torch.randn(batch, tokens, width, device="cuda", dtype=dtype) for _ in range(10)]
    x = torch.randn(batch, tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    drawn = {"keep": 0.2, "adjust": 0.07, "length": 3, "seed": torch.tensor(0, device="cuda"), "device": "cuda"}

    def call() -> object:
        with pyeff.backend(options.backend):
            plan = pyeff.ops.block_mask(batch, masks, (14, 14), **drawn)
            target = pyeff.ops.multimask_targets(layers, post_norm="layer")
            pred = pyeff.ops.multimask_scatter(pyeff.ops.multimask_gather(x, plan), plan, seed=drawn["seed"])
            loss, _ = pyeff.ops.multimask_loss(pred, target, plan, statistics=True)
            return torch.autograd.grad(loss, x)

    return [call]


CALLS = {"read": read_calls, "ticket": ticket_calls, "multimask": multimask_calls}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(CALLS), default="read")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="gru", help="of read")
    parser.add_argument("--block", type=int, default=32, help="of ticket")
    parser.add_argument("--density", type=float, default=0.3, help="of ticket")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args(arguments)
    calls = CALLS[options.op](options, getattr(torch, options.dtype))
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
