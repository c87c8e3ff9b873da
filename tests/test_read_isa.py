"""READ's CPU kernels in every instruction set that was built: one source, so one answer."""

from __future__ import annotations

import pytest
import torch

from tests import helpers
from tests.test_backends import output

SETS = ("portable", "avx2", "avx512", "avx512bf16")

CHECK = """
import itertools, sys, torch, pyeff
from pyeff import backends
from tests import helpers
reason = backends.load_library()
assert not reason, reason
print(torch.ops.pyeff_cpu.isa_chosen())
torch.set_num_threads(1)
sizes = [((37,), 3, 65, 33), ((3, 5), 2, 24, 16), ((1,), 1, 7, 3), ((70,), 2, 130, 64)]
with pyeff.backend("cpu"):
    for cell, norm, dtype in itertools.product(helpers.CELLS, helpers.NORMS, backends.DTYPES["cpu"]):
        for lead, layers, d, r in sizes:
            call = helpers.make_read(cell, norm, lead=lead, layers=layers, d=d, r=r, dtype=dtype)
            helpers.check_read(call, call.tensors)
            helpers.check_read(call, ["w_ih", "w_hh"], recompute=True)
        call = helpers.make_read(cell, norm, lead=(6, 7), layers=6, d=31, r=17, dtype=dtype, strides=helpers.STRIDES)
        helpers.check_read(call, call.tensors)
"""


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    """The set is capped by PYEFF_CPU_ISA, which is read once: a process for each."""
    helpers.need("read_recurrence", "cpu")
    built = torch.ops.pyeff_cpu.isa_built().replace(",", " ").split()
    if isa not in built:
        pytest.skip(f"{isa} was not built")
    chosen = output(CHECK, PYEFF_CPU_ISA=isa)
    detected = torch.ops.pyeff_cpu.isa_detected().replace(",", " ").split()
    if isa not in detected and isa != "portable":
        pytest.skip(f"this processor has no {isa}; {chosen} ran in its place")
    assert chosen == isa
