"""The launches of the moving average: all tensors of the same dtypes in one; see multimask.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import _launch, multimask_configs, multimask_plan
from ._launch import launch

_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Calls whose tables are kept: a teacher or two, each with and without copies.
_KEPT = 16
_tables: OrderedDict[tuple[Any, ...], list[_Table]] = OrderedDict()


class _Table:
    """Where the numbers of some tensors of the same dtypes are, a line for each program."""

    def __init__(self, kinds: tuple[Any, ...], lines: list[tuple[int, ...]], device: torch.device) -> None:
        self.constants = dict(zip(("EMA", "PARAM", "COPY"), kinds, strict=True))
        self.constants["ALIGNED"] = not any(address % 16 for line in lines for address in line[:3])
        # Kept, since a captured graph copies it again with each replay.
        self.host = torch.tensor(lines, dtype=torch.int64)
        if device.type == "cuda":
            self.host = self.host.pin_memory()
        self.lines = self.host.to(device, non_blocking=True)


def ema_update(ema: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor, copies: Sequence[Tensor]) -> None:
    """ema = decay ema + (1 - decay) params, in float32, with 1 - decay in float64.

    Args:
        ema: contiguous tensors, changed. params: as many, of the same sizes, contiguous.
        decay: float64, one number. copies: as many, contiguous, out: the new averages once more; or none.
    """
    device = ema[0].device
    with _launch.on(device):
        config = multimask_configs.config("multimask_ema", _launch.machine(device).arch)
        for table in _tables_of(ema, params, copies, device, config.blocks["BLOCK"]):
            launch(multimask_plan.ema_update, (len(table.lines),), config, table.lines, decay, **table.constants)


def _tables_of(
    ema: Sequence[Tensor], params: Sequence[Tensor], copies: Sequence[Tensor], device: torch.device, block: int
) -> list[_Table]:
    """The tables of these tensors: made once, since making them copies from the host."""
    groups = (ema, params, copies)
    key = (
        device, block, *((t.data_ptr(), t.dtype, t.numel()) for t in ema),
        *((t.data_ptr(), t.dtype) for t in (*params, *copies)), len(copies),
    )  # fmt: skip
    if device.type == "cuda" and key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    lines: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for i, average in enumerate(ema):
        row = [group[i] if len(group) else None for group in groups]
        kinds = tuple(t if t is None else _KINDS[t.dtype] for t in row)
        starts = [(0, 0) if t is None else (t.data_ptr(), t.element_size()) for t in row]
        for first in range(0, average.numel(), block):
            count = min(block, average.numel() - first)
            lines.setdefault(kinds, []).append((*(start + first * size for start, size in starts), count))
    made = [_Table(kinds, found, device) for kinds, found in lines.items()]
    if device.type == "cuda":
        _tables[key] = made
        while len(_tables) > _KEPT:
            _tables.popitem(last=False)
    return made
