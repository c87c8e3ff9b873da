"""The operations. Each is also ``torch.ops.pyeff.<name>``, with autograd, autocast and fake kernels."""

from pyeff.ops.read import read_recurrence, read_step

__all__ = ["read_recurrence", "read_step"]
