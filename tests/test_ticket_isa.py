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
with pyeff.backend("cpu"):
    for block, dtype in itertools.product((8, 16, 32, 64, (16, 8), (7, 5)), backends.DTYPES["cpu"]):
        for lead, activation in zip(((1,), (5,), (8,), (17,), (130,)), (*ACTIVATIONS, *ACTIVATIONS)):
            call = make_call((100, 135), block, lead=lead, activation=activation, dtype=dtype)
            check_call(call, TENSORS)
        call = make_call((100, 135), block, lead=(6, 7), dtype=dtype, x_strides="sliced")
        check_call(call, ["values"])
        check_call(call, ["x"])
        check_call(call.but(bias=None))
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
