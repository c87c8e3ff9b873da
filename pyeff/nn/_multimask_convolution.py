"""The students' decoders: a few grouped convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Convolution(nn.Module):
    """One layer: a grouped convolution that keeps the size, a norm over channels without parameters, GELU, residual.

    Channels are last throughout, [R, H, W, C]: the norm finds its row contiguous, and nothing is transposed in memory.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], groups: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding="same", groups=groups)
        weight = self.convolution.weight
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        y = self.convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = F.gelu(F.layer_norm(y, y.shape[-1:]))
        if x.shape[-1] == y.shape[-1]:
            y = y + x
        return y if valid is None else torch.where(valid, y, 0)


class _ConvDecoder(nn.Module):
    def __init__(
        self, dim: int, hidden: int, kernel: tuple[int, int], groups: int, layers: int, out: int | None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        numbers = {"dim": dim, "hidden": hidden, "kernel": min(kernel), "groups": groups, "layers": layers, "out": out}
        for argument, value in numbers.items():
            if value is None and argument == "out":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {argument} is {value!r}, expected an integer of at least 1")
        for argument, value in (("dim", dim), ("hidden", hidden)):
            if value % groups:
                raise ValueError(f"{name}: {argument} is {value}, expected a multiple of the {groups} groups")
        self.layers = nn.ModuleList(
            _Convolution(dim if i == 0 else hidden, hidden, kernel, groups) for i in range(layers)
        )
        self.projection = nn.Linear(hidden, dim if out is None else out)

    def _run(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[R, H, W, C] to [R, H, W, out]."""
        for layer in self.layers:
            x = layer(x, valid)
        return self.projection(x)


class ConvDecoder1d(_ConvDecoder):
    """The decoder of sequences: ``layers`` times convolution over tokens, norm over channels, GELU; then a projection.

    A residual is added where a layer's input and output are equally wide. All convolutions keep the length, by zeros
    at the ends.

    Args:
        dim (int): D, channels of the input.
        hidden (int): of the layers.
        kernel (int): tokens that a convolution sees.
        groups (int): of the convolutions; must divide ``dim`` and ``hidden``.
        layers (int): how many.
        out (int, optional): channels of the output. Default: ``dim``.

    Raises:
        ValueError: a size that is no integer above zero, or that the groups do not divide.

    Source: Baevski et al., 2022, arXiv 2212.07525, section 3.2; sizes of the text model.

    Example:
        >>> import torch, pyeff
        >>> decoder = pyeff.nn.ConvDecoder1d(32, hidden=48, kernel=5, groups=4, layers=3)
        >>> decoder(torch.randn(8, 20, 32)).shape
        torch.Size([8, 20, 32])
    """

    takes_lengths = True

    def __init__(
        self, dim: int, *, hidden: int = 768, kernel: int = 9, groups: int = 16, layers: int = 5, out: int | None = None
    ) -> None:
        super().__init__(dim, hidden, (1, kernel), groups, layers, out)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """What the students predict.

        Args:
            x (Tensor): [R, T, D].
            lengths (Tensor, optional): [R] integers: past these there is padding, which counts as zeros in every layer,
                so that a sample's output does not depend on how much of it there is.

        Returns:
            Tensor: [R, T, out].
        """
        valid = None
        if lengths is not None:
            valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, :, None]
            x = torch.where(valid[:, 0], x, 0)
        return self._run(x[:, None], valid)[:, 0]


class ConvDecoder2d(_ConvDecoder):
    """The decoder of images: as :class:`ConvDecoder1d`, over a grid of tokens in both directions.

    Args:
        dim (int): D, channels of the input.
        grid ((int, int)): H and W; tokens are its rows one behind the other.
        hidden (int), kernel (int), groups (int), layers (int): of the layers; ``groups`` must divide ``dim`` and
            ``hidden``.
        out (int, optional): channels of the output. Default: ``dim``.

    Raises:
        ValueError: a size that is no integer above zero, or that the groups do not divide.

    Source: Baevski et al., 2022, arXiv 2212.07525, section 3.2.

    Example:
        >>> import torch, pyeff
        >>> decoder = pyeff.nn.ConvDecoder2d(32, (4, 5), hidden=48, groups=4, layers=2)
        >>> decoder(torch.randn(8, 20, 32)).shape
        torch.Size([8, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        hidden: int = 768,
        kernel: int = 3,
        groups: int = 16,
        layers: int = 6,
        out: int | None = None,
    ) -> None:
        super().__init__(dim, hidden, (kernel, kernel), groups, layers, out)
        if len(grid) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
            raise ValueError(f"ConvDecoder2d: grid is {grid!r}, expected two integers of at least 1")
        self.grid = (int(grid[0]), int(grid[1]))

    def forward(self, x: Tensor) -> Tensor:
        """[R, H*W, D] to [R, H*W, out].

        Raises:
            ValueError: another number of tokens.
        """
        height, width = self.grid
        if x.dim() != 3 or x.shape[1] != height * width:
            raise ValueError(f"ConvDecoder2d: x has shape {list(x.shape)}, expected [R, {height * width}, D]")
        return self._run(x.unflatten(1, self.grid)).flatten(1, 2)
