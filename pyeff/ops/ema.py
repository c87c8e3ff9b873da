"""The moving average of parameters as an op: all of them in one pass, with copies in lower precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _multimask_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import unwatched
from pyeff.ops._multimask_checks import DTYPES, check_floating

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "ema_update_(Tensor(a!)[] ema, Tensor[] params, Tensor decay, Tensor(b!)[] copies, *, str backend='') -> ()"
)
_lib.define(
    "ema_update_kernels(Tensor(a!)[] ema, Tensor[] params, Tensor decay, Tensor(b!)[] copies, str backend) -> ()"
)


def ema_update_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """``ema = decay ema + (1 - decay) params`` in place, for all tensors in one pass.

    Args:
        ema (sequence of Tensor): the averages, float32 as a rule; contiguous; changed.
        params (sequence of Tensor): as many, of the same shapes, of any floating dtype.
        decay (float or Tensor): 0 to 1. A float64 tensor of one number on the device of ``ema`` may change between
            replays of a graph. ``1 - decay`` is taken in float64.
        copies (sequence of Tensor, optional): as many, of the same shapes: the new averages once more, in the dtypes of
            these, written in the same pass.

    Raises:
        ValueError: anything that does not fit; then nothing has been written.
        RuntimeError: a backend was named that cannot serve the call.

    Computed in at least float32. Nothing is recorded for a gradient. Source: Baevski et al., 2022, arXiv 2212.07525,
    section 3.1.

    Example:
        >>> import torch, pyeff
        >>> student = torch.nn.Linear(4, 4)
        >>> teacher = [p.detach().clone() for p in student.parameters()]
        >>> pyeff.ops.ema_update_(teacher, list(student.parameters()), 0.999)
    """
    op = "ema_update_"
    for name, given in (("ema", ema), ("params", params), ("copies", copies)):
        if isinstance(given, torch.nn.Module):
            raise ValueError(f"{op}: {name} is a {type(given).__name__}, expected tensors: list(module.parameters())")
    ema, params, copies = list(ema), list(params), None if copies is None else list(copies)
    for name, given in (("params", params), *([("copies", copies)] if copies is not None else [])):
        if len(given) != len(ema):
            raise ValueError(f"{op}: {name} has {len(given)} tensors, expected {len(ema)} as ema")
    copies = copies or []
    for name, given in (("ema", ema), ("params", params), ("copies", copies)):
        if all(isinstance(t, Tensor) for t in given):
            continue
        for i, t in enumerate(given):
            if not isinstance(t, Tensor):
                raise ValueError(f"{op}: {name}[{i}] is a {type(t).__name__}, expected a tensor")
    if not ema:
        return
    if isinstance(decay, Tensor):
        _check_decay(op, decay, ema[0].device)
    elif isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise ValueError(f"{op}: decay is {decay!r}, expected a number from 0 to 1")
    else:
        decay = torch.full((), float(decay), dtype=torch.float64, device=ema[0].device)
    function = _ema if unwatched((*ema, *params, *copies, decay)) else torch.ops.pyeff.ema_update_
    function(ema, params, decay, copies, backend=backends.current())


def _check_decay(op: str, decay: Tensor, device: torch.device) -> None:
    if decay.dtype != torch.float64 or decay.numel() != 1 or decay.device != device:
        raise ValueError(
            f"{op}: decay is {decay.dtype} {list(decay.shape)} on {decay.device}, expected a number, or one float64 on "
            f"{device}"
        )
    # On a GPU it would have to be waited for.
    plain = type(decay) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and not 0 <= decay.item() <= 1:
        raise ValueError(f"{op}: decay is {decay.item()!r}, expected a number from 0 to 1")


def _check(op: str, ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> None:
    """Everything that can be wrong, before anything is written."""
    if len(params) != len(ema) or len(copies) not in (0, len(ema)):
        raise ValueError(f"{op}: params has {len(params)} tensors and copies {len(copies)}, expected {len(ema)} as ema")
    device = ema[0].device
    for name, given in (("ema", ema), ("params", params), ("copies", copies)):
        for i, (t, average) in enumerate(zip(given, ema, strict=False)):
            if t.shape != average.shape or t.device != device or t.layout != torch.strided:
                raise ValueError(
                    f"{op}: {name}[{i}] is {t.layout} {list(t.shape)} on {t.device}, expected a dense tensor "
                    f"{list(average.shape)} on {device}"
                )
            if t.dtype not in DTYPES:
                check_floating(op, **{f"{name}[{i}]": t})
            if name != "params" and not t.is_contiguous():
                raise ValueError(f"{op}: {name}[{i}] is not contiguous, expected a contiguous tensor: it is written")
    _check_apart(op, ema, params, copies)


def _check_apart(op: str, ema: list[Tensor], params: list[Tensor], copies: list[Tensor]) -> None:
    """What is written may overlap nothing: threads would see each other's results."""
    if not unwatched((*ema, *params, *copies)):
        return
    spans = [
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), f"{name}[{i}]", name != "params")
        for name, given in (("ema", ema), ("copies", copies), ("params", params))
        for i, t in enumerate(given)
        if t.numel() and (t.is_contiguous() or name != "params")
    ]
    spans.sort()
    end, last, written = 0, "", False
    for start, stop, name, writes in spans:
        if start < end and (writes or written):
            raise ValueError(f"{op}: {name} shares memory with {last}, expected tensors that do not overlap")
        if stop > end:
            end, last, written = stop, name, writes


def _ema(ema, params, decay, copies, *, backend=""):
    op = "ema_update_"
    if not ema:
        return
    given, device = (*ema, *params, *copies), ema[0].device
    likes = {t.dtype: t for t in given}
    # The libraries of kernels check for themselves, in a fraction of the time, and do not say which tensor it is.
    trusted = all(dtype in DTYPES for dtype in likes) and unwatched(given)
    if not trusted or any(t.device != device for t in likes.values()):
        _check(op, ema, params, copies)
    _check_decay(op, decay, device)
    # One tensor of a dtype that the kernels do not know, and all are for the reference.
    try:
        found = [kernels.choose(op, t, 0, backend, "") for t in likes.values()]
    except RuntimeError:
        _check(op, ema, params, copies)
        raise
    chosen = min(found, key=lambda name: name != "reference")
    with torch.no_grad():
        if chosen in ("cpu", "cuda") and trusted:
            try:
                _write(ema, params, decay, copies, chosen)
            except RuntimeError:
                pass  # nothing has been written; either the check says why, or the dispatcher knows these tensors
            else:
                return _tell_autograd(ema, copies)
        if trusted:
            _check(op, ema, params, copies)
        ema, params, copies = ([t.detach() for t in given] for given in (ema, params, copies))
        if chosen == "reference":
            reference.ema_update_(ema, params, decay, copies=copies or None)
        else:
            torch.ops.pyeff.ema_update_kernels(ema, params, decay, copies, chosen)


def _write(ema, params, decay, copies, backend):
    kernels.call(backend, "ema_update", ema, [t.contiguous() for t in params], decay, copies)


def _tell_autograd(ema, copies):
    """That these were changed; torch does this for its own ops alone."""
    torch.autograd.graph.increment_version((*ema, *copies))


def _kernels(ema, params, decay, copies, backend):
    _write(ema, params, decay, copies, backend)
    _tell_autograd(ema, copies)


_register.composite(_lib, "ema_update_", _ema)
_register.kernels(_lib, "ema_update_kernels", _kernels, lambda *arguments: None)
