"""The definitions: every operation written in plain PyTorch, as the papers' equations.

They are the oracle of the tests, the baseline of the benchmarks, and what runs where no kernel can.
"""

from pyeff.reference.block_mask import block_mask
from pyeff.reference.ema import ema_update_
from pyeff.reference.multimask import (
    multimask_accumulate_,
    multimask_gather,
    multimask_loss,
    multimask_relative_bias,
    multimask_scatter,
    multimask_spread,
    multimask_targets,
)
from pyeff.reference.read import read_recurrence, read_step
from pyeff.reference.ticket import ticket_linear

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
