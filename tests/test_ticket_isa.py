"""The tickets' CPU kernels in every instruction set that was built: one source, so one answer."""

from __future__ import annotations

import pytest
import torch

from tests import helpers
from tests.test_backends import output
from tests.test_read_isa import SETS

CHECK = """
import itertools, torch, pyeff
from pyeff import backends
from tests.ticket_calls import ACTIVATIONS, TENSORS, check_call, make_call
reason = backends.load_library()
assert not reason, reason
print(torch.ops.pyeff_cpu.isa_chosen())
torch.set_num_threads(1)
sizes = [
    (37, (65, 130), 16), (130, (70, 100), 32), (3, (33, 40), 8), (300, (20, 33), (5, 9)), (50, (140, 70), (64, 32)),
    (1, (64, 96), (16, 32)), (64, (17, 40), (1, 32)), (9, (40, 17), (16, 1)), (8, (140, 135), 64),
]
activations = itertools.cycle(ACTIVATIONS)
with pyeff.backend("cpu"):
    for dtype, (tokens, shape, block), density in itertools.product(backends.DTYPES["cpu"], sizes, (0.4, 1.0)):
        activation = next(activations)
        call = make_call(shape, block, density, lead=(tokens,), dtype=dtype, activation=activation, holes=density < 1)
        check_call(call, TENSORS)
        check_call(call.but(bias=None), ["x"])
        strided = make_call(shape, block, density, lead=(2, tokens), dtype=dtype, x_strides="sliced")
        check_call(strided, ["values"])
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
