"""The operations. Each is also ``torch.ops.pyeff.<name>``, with autograd, autocast and fake kernels."""

from pyeff.ops.read import read_recurrence, read_step
from pyeff.ops.ticket import ticket_linear

__all__ = ["read_recurrence", "read_step", "ticket_linear"]
