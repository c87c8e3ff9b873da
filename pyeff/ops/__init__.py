"""The operations. Each is also ``torch.ops.pyeff.<name>``, with autograd, autocast and fake kernels."""

from pyeff.ops.block_mask import block_mask
from pyeff.ops.ema import ema_update_
from pyeff.ops.multimask import multimask_gather, multimask_scatter
from pyeff.ops.multimask_bias import multimask_relative_bias
from pyeff.ops.multimask_loss import multimask_loss, multimask_spread
from pyeff.ops.multimask_targets import multimask_accumulate_, multimask_targets
from pyeff.ops.read import read_recurrence, read_step
from pyeff.ops.ticket import ticket_linear

__all__ = [
    "block_mask",
    "ema_update_",
    "multimask_accumulate_",
    "multimask_gather",
    "multimask_loss",
    "multimask_relative_bias",
    "multimask_scatter",
    "multimask_spread",
    "multimask_targets",
    "read_recurrence",
    "read_step",
    "ticket_linear",
]
