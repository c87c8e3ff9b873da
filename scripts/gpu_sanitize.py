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


# dtype, samples, masks, tokens, width, layers, norm, norm after it, kind, reduction: each norm and kind, chunks by
# vectors and by numbers, slices of every width, statistics in two stages, tokens of a warp and of a block, layers of
# two launches.
MULTIMASK = [
    (torch.bfloat16, 2, 4, 50, 72, 3, "instance", "layer", "l2", "sum"),
    (torch.float32, 2, 3, 13, 9, 2, "layer", "batch", "smooth_l1", "none"),
    (torch.float16, 3, 2, 21, 33, 3, "batch", "none", "l1", "mean"),
    (torch.bfloat16, 1, 9, 1, 16, 33, "none", "layer", "cosine", "sum"),
    (torch.float32, 1, 2, 3, 1064, 2, "layer", "instance", "cosine", "none"),
    (torch.bfloat16, 2, 2, 300, 24, 2, "instance", "batch", "smooth_l1", "mean"),
    (torch.float32, 1, 1, 520, 20, 2, "instance", "none", "l2", "none"),
    (torch.bfloat16, 1, 2, 1030, 8, 2, "instance", "instance", "l1", "sum"),
]


def multimask(
    device: str, dtype: torch.dtype, batch: int, masks: int, tokens: int, width: int, layers: int, norm: str,
    post_norm: str, kind: str, reduction: str,
):  # fmt: skip
    """All operations of the family, as training calls them, and their gradients."""
    lengths = torch.tensor([tokens, *torch.randint(tokens + 1, (batch - 1,)).tolist()], device=device)
    sizes = {"keep": 0.4, "adjust": 0.05, "length": 3, "device": device}
    plan = pyeff.ops.block_mask(batch, masks, (tokens,), seed=1, lengths=lengths, **sizes)
    teacher, (x, fill) = (
        [torch.randn(n, tokens, width).to(dtype).to(device).requires_grad_() for n in many]
        for many in ((batch,) * layers, (batch, 1))
    )
    slopes = torch.rand(3).to(device).requires_grad_()
    target = pyeff.ops.multimask_targets(teacher, lengths=lengths, norm=norm, post_norm=post_norm)
    kept = pyeff.ops.multimask_gather(x, plan)
    pred = pyeff.ops.multimask_scatter(kept, plan, fill=fill[0], seed=2)
    options = {"kind": kind, "reduction": reduction, "beta": 0.5 if kind == "smooth_l1" else 0.0}
    loss, moments = pyeff.ops.multimask_loss(pred, target, plan, statistics=True, **options)
    bias = pyeff.ops.multimask_relative_bias(plan, slopes, dtype=dtype)
    grads = torch.autograd.grad([loss.sum() * 2, bias.nan_to_num(neginf=0).float().sum()], [*teacher, x, fill, slopes])
    averages = [torch.randn(n).to(device) for n in (7, 3000, 1)]
    copies = [torch.zeros_like(t, dtype=dtype) for t in averages]
    pyeff.ops.ema_update_(averages, [t + 1 for t in averages], 0.9, copies=copies)
    found = [target, kept, pred, loss, moments, bias.nan_to_num(neginf=0), *grads, *averages, *copies]
    return [t.detach().cpu() for t in found]


CALLS = {"read": (read, READ), "ticket": (ticket, TICKET), "multimask": (multimask, MULTIMASK)}


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
