"""The launches of the teacher targets; see multimask.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton.language as tl
from torch import Tensor

from . import _launch, multimask_configs, multimask_targets
from ._launch import LINES, LINES_STEP, cdiv, encode, launch
from .configs import Config

_INSTANCE, _LAYER, _NONE = multimask_targets.INSTANCE.value, multimask_targets.LAYER.value, multimask_targets.NONE.value
# Tiles of layers on their way while another is worked on, and that one: what the least shared memory holds.
_STAGES = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 3}
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def targets(
    layers: Sequence[Tensor], lengths: Tensor, norm: int, post_norm: int, eps: float, weight: float, accumulate: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """weight times the sum of normalised layers, itself normalised.

    Args:
        layers: K of [B, T, D]. lengths: [B] int32. norm, post_norm: 0 none, 1 instance, 2 layer, 3 batch.
        accumulate: add to ``out``, of which padding is left alone; else that is zero.
        out: [B, T, D] float32, out.
    """
    with _launch.on(out.device):
        _Layers(layers, lengths, eps).normalise(norm, weight, accumulate, out)
        if post_norm != _NONE:
            _Layers([out], lengths, eps).normalise(post_norm, 1.0, False, out)


def targets_backward(
    grad: Tensor, layers: Sequence[Tensor], lengths: Tensor, norm: int, post_norm: int, eps: float,
    dlayers: Sequence[Tensor],
) -> None:  # fmt: skip
    """The layers' gradients, for targets that are the mean of normalised layers.

    Args:
        grad: [B, T, D] float32. layers .. eps: as for :func:`targets`. dlayers: as the layers, out; zero at padding.
    """
    with _launch.on(grad.device):
        mean = 1.0 / len(layers)
        if post_norm != _NONE:
            between = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
            _Layers(layers, lengths, eps).normalise(norm, mean, False, between)
            below = torch.empty_like(between)
            _Layers([between], lengths, eps, [below]).differentiate(grad, post_norm, 1.0)
            grad = below
        _Layers(layers, lengths, eps, dlayers).differentiate(grad, norm, mean)


class _Layers:
    """Layers of one call: where they are, and what the kernels are told of all of them."""

    def __init__(
        self, layers: Sequence[Tensor], lengths: Tensor, eps: float, gradients: Sequence[Tensor] | None = None
    ) -> None:
        self.batch, self.tokens, self.width = layers[0].shape
        self.lengths, self.eps, self.first = lengths, float(eps), layers[0]
        to = [0] * len(layers) if gradients is None else [t.data_ptr() for t in gradients]
        self.lines = [(t.data_ptr(), t.stride(0), t.stride(1), g) for t, g in zip(layers, to, strict=True)]
        # Strides in elements: 8 of them are 16 bytes of the narrowest numbers.
        odd = any(line[0] % 16 or line[3] % 16 or line[1] % 8 or line[2] % 8 for line in self.lines)
        self.constants = {"KIND": KINDS[layers[0].dtype], "ALIGNED": not odd}
        self.stages = _STAGES[layers[0].dtype]

    def batches(self, most: int = LINES) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(layers, encoded lines) of each launch."""
        for start in range(0, len(self.lines), most):
            some = self.lines[start : start + most]
            padded = some + [(0,) * len(some[0])] * (-len(some) % LINES_STEP)
            yield len(some), tuple(encode(number) for line in padded for number in line)

    def config(self, kernel: str) -> Config:
        return multimask_configs.config(f"multimask_{kernel}", _launch.machine(self.first.device).arch)

    def across(self, config: Config) -> int:
        return cdiv(self.width, config.blocks["BLOCK_C"])

    def normalise(self, norm: int, weight: float, accumulate: bool, out: Tensor) -> None:
        """weight times the sum of the normalised layers, to ``out``; that may be the only layer itself."""
        size = next((size for size in multimask_configs.WHOLE if size >= self.tokens), 0)
        if norm == _LAYER:
            config = self.config("rows")
            whole = self.width <= config.blocks["BLOCK_C"]
            grid = self.batch * cdiv(self.tokens, config.blocks["BLOCK_T"])
            kernel, constants, most = multimask_targets.rows, {"WHOLE": whole}, LINES if whole else 1
        elif norm == _INSTANCE and size:
            config = self.config(f"whole{size}")
            grid, kernel, constants, most = self.batch * self.across(config), multimask_targets.whole, {}, LINES
        else:
            self._by_statistics(norm, weight, accumulate, out)
            return
        for count, lines in self.batches(most):
            launch(
                kernel, (grid,), config, lines, self.lengths, out, count, self.tokens, self.width, self.eps, weight,
                STAGES=self.stages, ACCUMULATE=accumulate, **constants, **self.constants,
            )  # fmt: skip
            accumulate = True

    def _tiles(self, config: Config) -> int:
        return self.batch * cdiv(self.tokens, config.blocks["BLOCK_T"]) * self.across(config)

    def _by_statistics(self, norm: int, weight: float, accumulate: bool, out: Tensor) -> None:
        config = self.config("apply")
        for count, lines in self.batches():
            means, scales, groups = self._statistics(norm, count, lines)
            launch(
                multimask_targets.apply, (self._tiles(config),), config, lines, self.lengths, means, scales, out,
                count, groups, self.tokens, self.width, weight, STAGES=self.stages, ACCUMULATE=accumulate,
                **self.constants,
            )  # fmt: skip
            accumulate = True

    def _statistics(
        self, norm: int, count: int, lines: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor | None, int]:  # fmt: skip
        """Means and scales of some layers, [count, groups, D] float32; none for no norm."""
        if norm == _NONE:
            return None, None, 1
        groups = self.batch if norm == _INSTANCE else 1
        means, scales = (self._scratch(count, groups) for _ in range(2))
        config = self.config("statistics")
        launch(
            multimask_targets.statistics, (count * groups * self.across(config),), config, lines, self.lengths, means,
            scales, groups, self.batch // groups, self.tokens, self.width, self.eps, **self.constants,
        )  # fmt: skip
        return means, scales, groups

    def _scratch(self, count: int, groups: int) -> Tensor:
        return torch.empty(count, groups, self.width, dtype=torch.float32, device=self.first.device)

    def differentiate(self, grad: Tensor, norm: int, weight: float) -> None:
        """weight times the derivative of the normalised layers, to the gradients."""
        strides = grad.stride()[:2]
        if norm == _LAYER:
            config = self.config("rows")
            grid = (self.batch * cdiv(self.tokens, config.blocks["BLOCK_T"]),)
            for count, lines in self.batches():
                launch(
                    multimask_targets.rows_gradient, grid, config, lines, grad, self.lengths, count, self.tokens,
                    *strides, self.width, self.eps, weight, **self.constants,
                )  # fmt: skip
            return
        config, sums = self.config("apply"), self.config("statistics")
        for count, lines in self.batches():
            means, scales, groups = self._statistics(norm, count, lines)
            first = second = None
            if means is not None:
                first, second = (self._scratch(count, groups) for _ in range(2))
                launch(
                    multimask_targets.gradient_means, (count * groups * self.across(sums),), sums, lines, grad,
                    self.lengths, means, scales, first, second, groups, self.batch // groups, self.tokens, *strides,
                    self.width, **self.constants,
                )  # fmt: skip
            launch(
                multimask_targets.apply_gradient, (self._tiles(config),), config, lines, grad, self.lengths, means,
                scales, first, second, count, groups, self.tokens, *strides, self.width, weight, **self.constants,
            )  # fmt: skip
