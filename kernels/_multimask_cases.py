"""The ahead-of-time cases of the multimask family: every kernel in every configuration, each compiled once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _launch, multimask
from ._aot import AotCase, cases, key
from ._launch import Launch, Machine
from .configs import with_excluded

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
_HALF, _BATCH, _MASKS, _SLOTS, _WIDTH = torch.bfloat16, 8, 16, 40, 768


def aot_cases(archs: Sequence[int]) -> Iterator[AotCase]:
    """The calls are made with tensors that have no memory, and their launches collected."""
    known = set()
    for arch in archs:
        for choice in (with_excluded(), contextlib.nullcontext()):
            with choice, contextlib.suppress(RuntimeError), _launch.record(Machine(arch, _MULTIPROCESSORS[arch])) as on:
                _call_all(on)
            for case in cases(on, arch, "bfloat16"):
                if key(case) not in known:
                    known.add(key(case))
                    yield case


def _empty(*sizes: int, kind: torch.dtype = _HALF) -> Tensor:
    return torch.empty(sizes, dtype=kind, device="meta")


def _call_all(on: list[Launch]) -> None:
    """One call for each program that the family has, with all that it may write."""
    rows, tokens = _BATCH * _MASKS, 196
    ids, lengths, inverse = (_empty(*shape, kind=torch.int32) for shape in ((rows, _SLOTS), (_BATCH,), (rows, tokens)))
    counts, one, number = _empty(rows, kind=torch.int32), _empty(1, kind=torch.int64), _empty(kind=torch.float32)
    whole, kept, wide = (_empty(_BATCH, tokens, _WIDTH), _empty(rows, _SLOTS, _WIDTH), _empty(rows, tokens, _WIDTH))
    target, none = _empty(_BATCH, tokens, _WIDTH, kind=torch.float32), _empty(0)
    multimask.gather(whole, ids, counts, kept)
    multimask.gather_backward(kept, inverse, whole)
    multimask.scatter(kept, inverse, lengths, whole, one, one, 0.01, wide)
    multimask.scatter_backward(wide, ids, counts, inverse, lengths, none, whole[:1])
    for size, norm, post in ((196, 1, 2), (500, 1, 0), (1000, 1, 1), (2000, 1, 0)):
        layers = [_empty(_BATCH, size, _WIDTH)] * 2
        out = _empty(_BATCH, size, _WIDTH, kind=torch.float32)
        multimask.targets(layers, lengths, norm, post, 1e-5, 0.5, False, out)
    for norm in (1, 2):
        multimask.targets_backward(target, [whole] * 2, lengths, norm, 0, 1e-5, [whole] * 2)
    moments = _empty(1 + 4 * _WIDTH, kind=torch.float64)
    multimask.loss(wide, target, inverse, lengths, one, 0, 0.0, 1.0, number, wide, moments)
    multimask.loss(wide, target, inverse, lengths, None, 1, 1.0, 1.0, number, wide, none)
    multimask.loss_backward(number, wide, target, inverse, lengths, None, 3, 0.0, 1.0, wide, target)
    multimask.rescale(wide, number)
    bias, slopes = _empty(rows, 12, _SLOTS, _SLOTS), _empty(12, kind=torch.float32)
    multimask.relative_bias(ids, counts, slopes, 0, bias)
    multimask.relative_bias_backward(bias, ids, counts, 0, slopes)
    for size in (196, 1000, 2000):
        slot = _empty(rows, size, kind=torch.int32)
        multimask.block_mask(one, one, lengths, _MASKS, 0, 0.5, 0.1, 5, True, ids, counts, slot)
    decay = _empty(1, kind=torch.float64)
    multimask.ema_update([target], [target], decay, [whole])
