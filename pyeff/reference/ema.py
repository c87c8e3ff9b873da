"""The moving average of parameters, by its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """``ema = decay ema + (1 - decay) params``, in place; see :func:`pyeff.ops.ema_update_` for the arguments.

    Example:
        >>> import torch, pyeff
        >>> average = torch.zeros(3)
        >>> pyeff.reference.ema_update_([average], [torch.ones(3)], 0.75)
        >>> average.tolist()
        [0.25, 0.25, 0.25]
    """
    with torch.no_grad():
        for i, (average, parameter) in enumerate(zip(ema, params, strict=True)):
            dtype = torch.promote_types(average.dtype, torch.float32)
            # Of a number close to one: what is left of it in single precision would be wrong in its third digit.
            keep = torch.as_tensor(decay, dtype=torch.float64, device=average.device).reshape(())
            mixed = keep.to(dtype) * average.to(dtype) + (1 - keep).to(dtype) * parameter.to(dtype)
            average.copy_(mixed)
            if copies is not None:
                copies[i].copy_(mixed)
