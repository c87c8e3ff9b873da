"""The ticket's CPU kernels in every instruction set that was built: one source, so one answer."""

from __future__ import annotations

import pytest
import torch

from tests import helpers
from tests.test_backends import output

SETS = ("portable", "avx2", "avx512", "avx512bf16")

CHECK = """
import itertools, torch, pyeff
from pyeff import backends
from tests import helpers

reason = backends.load_library()
assert not reason, reason
print(torch.ops.pyeff_cpu.isa_chosen())
torch.set_num_threads(1)
torch.manual_seed(0)


def gradients(backend, dtype, ticket, activation, tensors, grad):
    tensors = [t if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors]
    with pyeff.backend(backend):
        y = pyeff.ops.ticket_linear(tensors[0], tensors[1], ticket, tensors[2], activation=activation)
    given = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(dtype))]


def check(tokens, shape, block, density, dtype, activation, bias):
    out, width = shape
    grid = -(-out // block[0]), -(-width // block[1])
    ticket = pyeff.Ticket.from_blocks(torch.rand(grid) < density, shape, block)
    x, values = torch.randn(tokens, width, dtype=dtype), ticket.gather(torch.randn(shape, dtype=dtype))
    tensors = [x, values, torch.randn(out, dtype=dtype) if bias else None]
    grad = torch.randn(tokens, out, dtype=dtype)
    found, same, truth = (
        gradients(*how, ticket, activation, tensors, grad)
        for how in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    names, terms = ("y", "dx", "dvalues", "dbias"), (width, out, tokens, tokens)
    what = f"{tokens} tokens, {ticket!r}, {activation}"
    for name, k, one, two, three in zip(names, terms, found, same, truth):
        helpers.assert_three_way(f"{name} of {what}", one, two, three, k)


sizes = [
    (37, (65, 130), (16, 16)), (130, (70, 100), (32, 32)), (3, (33, 40), (8, 8)), (300, (20, 33), (5, 9)),
    (50, (140, 70), (64, 32)), (1, (64, 96), (16, 32)), (64, (17, 40), (1, 32)), (9, (40, 17), (16, 1)),
]
activations = itertools.cycle((None, "relu", "gelu"))
for dtype, (tokens, shape, block), density in itertools.product(backends.DTYPES["cpu"], sizes, (0.4, 1.0)):
    check(tokens, shape, block, density, dtype, next(activations), density < 1)
"""


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    """The set is capped by PYEFF_CPU_ISA, which is read once: a process for each."""
    helpers.need("ticket_linear", "cpu")
    built = torch.ops.pyeff_cpu.isa_built().replace(",", " ").split()
    if isa not in built:
        pytest.skip(f"{isa} was not built")
    chosen = output(CHECK, PYEFF_CPU_ISA=isa)
    detected = torch.ops.pyeff_cpu.isa_detected().replace(",", " ").split()
    if isa not in detected and isa != "portable":
        pytest.skip(f"this processor has no {isa}; {chosen} ran in its place")
    assert chosen == isa
