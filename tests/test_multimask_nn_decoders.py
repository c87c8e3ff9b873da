"""Decoders, and slopes and scales of a bias by distance: against loops in plain PyTorch, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyeff
from pyeff.nn import ConvDecoder1d, ConvDecoder2d, RelativeBias, slopes_of
from tests.multimask_parts import hidden_tokens


@pytest.mark.parametrize("kernel", [3, 4])
def test_decoders_are_stacks_of_convolutions(kernel):
    decoder = ConvDecoder1d(8, hidden=12, kernel=kernel, groups=4, layers=3, out=5).double()
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    y = x.transpose(1, 2)
    for layer in decoder.layers:
        weight = layer.convolution.weight[:, :, 0]
        z = F.conv1d(y, weight, layer.convolution.bias, padding="same", groups=4)
        z = F.gelu(F.layer_norm(z.transpose(1, 2), (12,))).transpose(1, 2)
        y = z + y if z.shape == y.shape else z
    torch.testing.assert_close(decoder(x), decoder.projection(y.transpose(1, 2)))
    grid = ConvDecoder2d(8, (3, 5), hidden=8, kernel=kernel, groups=2, layers=2).double()
    x = torch.randn(4, 15, 8, dtype=torch.float64)
    y = x.transpose(1, 2).unflatten(2, (3, 5))
    for layer in grid.layers:
        z = F.conv2d(y, layer.convolution.weight, layer.convolution.bias, padding="same", groups=2)
        y = y + F.gelu(F.layer_norm(z.permute(0, 2, 3, 1), (8,))).permute(0, 3, 1, 2)
    torch.testing.assert_close(grid(x), grid.projection(y.flatten(2).transpose(1, 2)))


def test_decoder_does_not_see_how_much_padding_there_is():
    decoder = ConvDecoder1d(8, hidden=8, kernel=5, groups=2, layers=3).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    x[1, 6:] = float("nan")
    found = decoder(x, lengths=torch.tensor([9, 6]))
    torch.testing.assert_close(found[1, :6], decoder(x[1:, :6])[0])
    torch.testing.assert_close(found[0], decoder(x[:1])[0])


def test_decoders_refuse_what_does_not_fit():
    for options in ({"hidden": 9}, {"layers": 0}, {"kernel": 0}, {"groups": 3}, {"out": 0}):
        with pytest.raises(ValueError, match="ConvDecoder1d: "):
            ConvDecoder1d(8, **{"hidden": 8, "groups": 2} | options)
    with pytest.raises(ValueError, match="grid"):
        ConvDecoder2d(8, (0, 2), hidden=8, groups=2)
    with pytest.raises(ValueError, match="x has shape"):
        ConvDecoder2d(8, (2, 2), hidden=8, groups=2)(torch.randn(1, 5, 8))


def test_slopes():
    assert slopes_of(1) == [2.0**-8]
    assert slopes_of(8) == [2.0**-i for i in range(1, 9)]
    # As the code of ALiBi has them for twelve heads.
    assert slopes_of(12) == pytest.approx([*slopes_of(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    with pytest.raises(ValueError, match="heads"):
        slopes_of(0)
    with pytest.raises(ValueError, match="slopes"):
        RelativeBias(3, slopes=[1.0])
    assert RelativeBias(3, scale=False).scale is None


def test_negative_scales_count_as_zero():
    bias = RelativeBias(2)
    bias.scale.data[:] = torch.tensor([-1.0, 2.0])
    out = bias(pyeff.MaskPlan.from_mask(hidden_tokens(ragged=False)))
    assert not out[:, 0].any()
    assert (out[:, 1] <= 0).all()
    out.sum().backward()
    assert bias.scale.grad[0] == 0 != bias.scale.grad[1]
