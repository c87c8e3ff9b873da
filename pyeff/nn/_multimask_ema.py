"""The teacher: a moving average of the student."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import ops

_HALF = (torch.bfloat16, torch.float16)


class EMATeacher(nn.Module):
    """A copy of a model whose parameters are the moving average of the student's.

    ``average = d average + (1 - d) parameter`` in float32 at least, all in one call of :func:`pyeff.ops.ema_update_`,
    with ``d = end_decay - (end_decay - decay) (1 - t / steps)`` for the t-th update, from 1 on, and ``end_decay`` after
    ``steps``. Buffers and parameters that require no gradient are copied. It runs in evaluation mode without gradients.
    The number of updates and the decay are tensors on the device: an update waits for nothing, and can be captured in a
    CUDA graph.

    Args:
        model (Module): the student; copied.
        decay (float): d at first.
        end_decay (float, optional): d at last. Default: ``decay``.
        steps (int): updates until then.
        dtype (torch.dtype, optional): what the teacher computes in. With a dtype below float32 the teacher has a
            working copy in it that is written in the same pass as the average; the average stays in float32. Default:
            the average itself computes.

    Attributes:
        average (Module): the average, in float32 at least; what the state dict holds, besides ``updates``.
        model (Module): what computes: the working copy, or the average.
        updates (Tensor): [] int64, how many there have been.

    Raises:
        ValueError: a decay or ``steps`` out of range, or a ``dtype`` that is not floating.

    Source: Baevski et al., 2022, arXiv 2212.07525, section 3.1.

    Example:
        >>> import torch, pyeff
        >>> student = torch.nn.Linear(4, 4)
        >>> teacher = pyeff.nn.EMATeacher(student, decay=0.999, end_decay=0.9999, steps=1000)
        >>> torch.equal(teacher(torch.ones(1, 4)), student(torch.ones(1, 4)))
        True
        >>> teacher.update(student)
        >>> int(teacher.updates), f"{float(teacher.decay):.7f}"
        (1, '0.9990009')
    """

    updates: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.999,
        end_decay: float | None = None,
        steps: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        end_decay = decay if end_decay is None else end_decay
        for name, value in (("decay", decay), ("end_decay", end_decay)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"EMATeacher: {name} is {value!r}, expected a number from 0 to 1")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"EMATeacher: steps is {steps!r}, expected an integer of at least 1")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"EMATeacher: dtype is {dtype!r}, expected a floating-point torch.dtype or None")
        self.start, self.end, self.steps = float(decay), float(end_decay), steps
        self.average = copy.deepcopy(_bare(model))
        for t in (*self.average.parameters(), *self.average.buffers()):
            t.requires_grad_(False)
            t.grad = None
            if t.dtype in _HALF:
                t.data = t.data.float()
            if not t.is_contiguous():  # what is written in one pass
                t.data = t.data.contiguous()
        device = next((t.device for t in self.average.parameters()), None)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        # Not a submodule: it is made from the average, and does not belong in a file.
        self._working: list[nn.Module] = []
        if dtype is not None and dtype in _HALF:
            self._working.append(copy.deepcopy(self.average).to(dtype))
        elif dtype is not None:
            self.average.to(dtype)
        self.eval()
        self.register_load_state_dict_post_hook(_refreshed)

    @property
    def model(self) -> nn.Module:
        return self._working[0] if self._working else self.average

    @property
    def decay(self) -> Tensor:
        """[] float64 on the device: d of the last update (before the first one: as for t = 0)."""
        return self._decay_at(self.updates)

    def _decay_at(self, updates: Tensor) -> Tensor:
        left = (1 - updates.double() / self.steps).clamp(min=0)
        return self.end - (self.end - self.start) * left

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the teacher gives, without gradients."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Takes one step of the average, after the optimizer's.

        Args:
            student (Module): of the model's structure; may be wrapped by torch.compile or DistributedDataParallel.

        Raises:
            ValueError: it has other parameters or buffers. Then nothing has been written.
        """
        student = _bare(student)
        mine, working = dict(self.average.named_parameters()), dict(self.model.named_parameters())
        theirs = dict(student.named_parameters())
        differ = sorted(set(mine) ^ set(theirs)) or [n for n in mine if mine[n].shape != theirs[n].shape]
        buffers, given = dict(self.average.named_buffers()), dict(student.named_buffers())
        differ = differ or sorted(set(buffers) ^ set(given)) or [n for n in given if buffers[n].shape != given[n].shape]
        if differ:
            raise ValueError(
                f"EMATeacher.update: student differs in {differ[0]} ({len(differ)} in all), expected the parameters "
                "and buffers of the model"
            )
        decay = self._decay_at(self.updates + 1)
        names = [name for name in mine if theirs[name].requires_grad and mine[name].is_floating_point()]
        devices = list(dict.fromkeys(mine[name].device for name in names))
        for device in devices:
            here = [name for name in names if mine[name].device == device]
            ops.ema_update_(
                [mine[n] for n in here], [theirs[n].detach() for n in here], decay.to(device),
                copies=[working[n] for n in here] if self._working else None,
            )  # fmt: skip
        averaged = set(names)
        rest: dict[str, tuple[Tensor, Tensor]] = {
            name: (mine[name], theirs[name]) for name in mine if name not in averaged
        }
        rest |= {name: (buffers[name], given[name]) for name in buffers}
        for to, source in rest.values():
            to.copy_(source)
        if self._working:
            copies = working | dict(self.model.named_buffers())
            for name, (to, _) in rest.items():
                copies[name].copy_(to)
        self.updates.add_(1)

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in evaluation mode, whatever the model around it does."""
        super().train(False)
        for module in getattr(self, "_working", ()):
            module.train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)
        for module in self._working:
            module._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"decay={self.start}, end_decay={self.end}, steps={self.steps}"


def _bare(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile and DistributedDataParallel put around it."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@torch.no_grad()
def _refreshed(teacher: Any, incompatible: Any) -> None:
    """The working copy, after the average was read from a file."""
    for module in teacher._working:
        for to, source in zip(module.parameters(), teacher.average.parameters(), strict=True):
            to.copy_(source)
        for to, source in zip(module.buffers(), teacher.average.buffers(), strict=True):
            to.copy_(source)
