"""Whether predictions have collapsed, over steps and processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyeff import ops


class CollapseWatch(nn.Module):
    """Sums of moments over steps; over processes too when they are asked for.

    The moments are those of :func:`pyeff.ops.multimask_loss` with ``statistics=True``, packed as one float64 tensor.
    Adding them waits for nothing; only :meth:`spread` reads from the device, after one all-reduce.

    Args:
        width (int): D, the channels of targets and predictions.
        device: where the moments are.

    Attributes:
        moments (Tensor): [1 + 4D] float64; a buffer that is not in the state dict.

    Raises:
        ValueError: ``width`` is not at least 1.

    Source: Baevski et al., 2022, arXiv 2212.07525: training is stopped where the variance of targets or predictions
    falls below a threshold.

    Example:
        >>> import torch, pyeff
        >>> watch = pyeff.nn.CollapseWatch(16)
        >>> plan = pyeff.ops.block_mask(2, 4, (20,), keep=0.5, adjust=0.05, length=5)
        >>> for step in range(3):
        ...     pred, target = torch.randn(8, 20, 16), torch.randn(2, 20, 16)
        ...     loss, moments = pyeff.ops.multimask_loss(pred, target, plan, statistics=True)
        ...     watch.add(moments)
        >>> of_targets, of_predictions = watch.spread()
        >>> of_targets > 0.5, of_predictions > 0.5
        (True, True)
    """

    moments: Tensor

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"CollapseWatch: width is {width!r}, expected an integer of at least 1")
        moments = torch.zeros(1 + 4 * width, dtype=torch.float64, device=device)
        self.register_buffer("moments", moments, persistent=False)

    @torch.no_grad()
    def add(self, moments: Tensor) -> None:
        """Adds the moments of one step.

        Raises:
            ValueError: they are of another width or dtype.
        """
        if moments.shape != self.moments.shape or moments.dtype != torch.float64:
            raise ValueError(
                f"CollapseWatch.add: moments is {moments.dtype} {list(moments.shape)}, expected float64 "
                f"{list(self.moments.shape)}"
            )
        self.moments.add_(moments)

    def spread(self, *, reset: bool = True, group: torch.distributed.ProcessGroup | None = None) -> tuple[float, float]:
        """``mean_d sqrt(var_d + 1e-6)`` of targets and of predictions over all that was added, in all processes.

        Every process of the group must ask. NaN where fewer than two tokens were hidden.

        Args:
            reset (bool): begin anew afterwards.
            group (ProcessGroup, optional): Default: all processes, if torch.distributed is at work.

        Returns:
            (float, float): of targets, of predictions.
        """
        total = self.moments.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total, group=group)
        if reset:
            self.moments.zero_()
        # One transfer for both.
        found = torch.stack(ops.multimask_spread(total)).tolist()
        return found[0], found[1]

    def _apply(self, fn, recurse=True):
        # model.half() is not meant for sums.
        before = self.moments
        super()._apply(fn, recurse)
        if self.moments.dtype != torch.float64:
            self.moments = before.to(self.moments.device)
        return self
