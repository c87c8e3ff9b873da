"""Other ways to gather and to compare: torch's own, other packages, and the helpers of I-JEPA, written anew."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import multimask_paper as paper
from .registry import Call, Unavailable

if TYPE_CHECKING:
    from .multimask import Inputs


def with_grads(s: Inputs, outputs: Sequence[Tensor], leaf: Tensor) -> Sequence[Tensor]:
    """The outputs, and in training the gradient of what they were made of."""
    if not leaf.requires_grad:
        return outputs
    return (*outputs, *torch.autograd.grad(outputs[0], leaf, s.tensors.get("grad")))


def _flat(s: Inputs) -> Tensor:
    """[R K] int64: where the kept tokens are among all tokens of all samples."""
    sample = torch.arange(s.plan.rows, device=s.x.device) // s.plan.masks
    return (s.plan.ids_keep.long() + sample[:, None] * s.plan.tokens).flatten()


def _rows(function: Callable[[Tensor, Tensor], Tensor], sets: Sequence[Inputs]) -> list[Call]:
    """A way to take rows of a table, as a gather."""

    def one(s: Inputs) -> Call:
        index, shape = _flat(s), (s.setting.rows, s.setting.kept, s.setting.width)
        return lambda: with_grads(s, (function(s.x.flatten(0, 1), index).view(shape),), s.x)

    return _tried([one(s) for s in sets])


def index_select(sets: Sequence[Inputs]) -> list[Call]:
    return _rows(lambda x, index: x.index_select(0, index), sets)


def embedding(sets: Sequence[Inputs]) -> list[Call]:
    return _rows(lambda x, index: F.embedding(index, x), sets)


def xformers(sets: Sequence[Inputs]) -> list[Call]:
    select = _installed("xformers.ops").index_select_cat
    return _rows(lambda x, index: select([x], [index]), sets)


def fbgemm(sets: Sequence[Inputs]) -> list[Call]:
    _installed("fbgemm_gpu")

    def select(x: Tensor, index: Tensor) -> Tensor:
        return torch.ops.fbgemm.jagged_index_select(x, torch.ones_like(x[:, 0], dtype=torch.int64), index)[0]

    return _rows(select, sets)


def ijepa(sets: Sequence[Inputs]) -> list[Call]:
    """I-JEPA's helper, written anew: one gather for each mask, put behind each other; rows are mask by mask."""

    def one(s: Inputs) -> Call:
        setting = s.setting
        each = s.plan.ids_keep.long().view(setting.batch, setting.masks, -1).unbind(1)
        # Its rows have an order of their own, and so has what comes from above.
        above = s.grad.unflatten(0, (setting.batch, -1)).transpose(0, 1).flatten(0, 1) if s.x.requires_grad else None

        def call() -> Sequence[Tensor]:
            out = torch.cat([torch.gather(s.x, 1, ids[..., None].repeat(1, 1, setting.width)) for ids in each])
            grads = () if above is None else torch.autograd.grad(out, s.x, above)
            return (out.unflatten(0, (setting.masks, -1)).transpose(0, 1), *grads)

        return call

    return [one(s) for s in sets]


def ijepa_loss(sets: Sequence[Inputs]) -> list[Call]:
    """Targets repeated as I-JEPA's repeat_interleave_batch does, both gathered at hidden tokens, one mean square."""

    def one(s: Inputs) -> Call:
        setting = s.setting
        batch, masks, tokens, width = setting.batch, setting.masks, setting.tokens, setting.width
        hidden = s.plan.hidden().flatten(0, 1).nonzero()[:, 1].view(batch, masks, -1).transpose(0, 1).contiguous()
        index = hidden[..., None].expand(-1, -1, -1, width)

        def call() -> Sequence[Tensor]:
            repeated = torch.cat([s.target for _ in range(masks)]).view(masks, batch, tokens, width)
            y = torch.gather(repeated, 2, index).float()
            x = torch.gather(s.pred.view(batch, masks, tokens, width).transpose(0, 1), 2, index).float()
            loss = F.mse_loss(x, y, reduction="sum") * width**-0.5
            spreads = [paper.spread(t.detach().reshape(-1, width)) for t in (y, x)] if s.moments else []
            return (*with_grads(s, (loss,), s.pred), *spreads)

        return call

    return [one(s) for s in sets]


def nested(sets: Sequence[Inputs]) -> list[Call]:
    """A jagged nested tensor of what each row keeps, padded."""

    def one(s: Inputs) -> Call:
        index, lengths = _flat(s), s.plan.keep_len.long()
        offsets, most = F.pad(lengths.cumsum(0), (1, 0)), s.setting.kept

        def call() -> Sequence[Tensor]:
            values = s.x.flatten(0, 1).index_select(0, index)
            jagged = torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=most, max_seqlen=most)
            return with_grads(s, (jagged.to_padded_tensor(0.0),), s.x)

        return call

    return _tried([one(s) for s in sets])


def _installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package for a GPU may fail in many ways where there is none
        raise Unavailable(f"{name} cannot be imported: {str(error).splitlines()[0][:120]}") from error


def _tried(calls: list[Call]) -> list[Call]:
    """The calls, if the first one works: other packages refuse a dtype or a device by errors of their own."""
    try:
        calls[0]()
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        raise Unavailable(f"it refuses the call: {type(error).__name__}: {message[:160]}") from error
    return calls
