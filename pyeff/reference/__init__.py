"""The definitions: every operation written in plain PyTorch, as the papers' equations.

They are the oracle of the tests, the baseline of the benchmarks, and what runs where no kernel can.
"""

from pyeff.reference.read import read_recurrence, read_step
from pyeff.reference.ticket import ticket_linear

__all__ = ["read_recurrence", "read_step", "ticket_linear"]
