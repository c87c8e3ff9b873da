"""pyeff.nn.ReadAdapter: counts, layouts, and the same numbers as the definition written out."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import pyeff
import pyeff.nn.read
from tests import helpers, places

TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS = sorted(TORCH)
# Those of the two that are computed in at the place.
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def layers(count=4, shape=(2, 5), width=12, dtype=None, seed=0):
    generator, dtype = torch.Generator().manual_seed(seed), dtype or places.here().dtypes[0]
    drawn = [torch.randn(*shape, width, generator=generator, dtype=torch.float64, device="cpu") for _ in range(count)]
    return [t.to(torch.get_default_device(), dtype) for t in drawn]


def adapter_for(cell, norm="rms", reduce="mean", seed=1, **kw):
    torch.manual_seed(seed)
    kw = {"zero_init": False, "dtype": places.here().dtypes[0]} | kw
    adapter = pyeff.nn.ReadAdapter(12, 7, cell=cell, norm=norm, reduce=reduce, **kw)
    with torch.no_grad():
        for p in (adapter.norm_weight, adapter.norm_bias):
            if p is not None:
                p.add_(torch.randn_like(p))
    return adapter


def assert_close(found, expected):
    """Two ways to compute one thing, over at most four layers, differ by what rounding does to each."""
    slack = 2 * helpers.rounding(expected.dtype, 4 * (12 + 7), max(1.0, expected.abs().max().item()))
    assert helpers.error(found, expected) <= slack


def state_for(cell):
    """A first state, h0 and c0."""
    h0, c0 = layers(1, width=7, seed=5)[0], layers(1, width=7, seed=6)[0]
    return h0, c0 if cell == "lstm" else None


def expected(adapter, phi, h0=None, c0=None):
    """torch's own recurrent module over the stacked and normalised layer outputs."""
    rnn = TORCH[adapter.cell](12, 7, bias=adapter.bias_ih_l0 is not None, dtype=phi[0].dtype)
    rnn.load_state_dict(adapter.torch_state_dict())
    x = torch.stack([p.reshape(-1, 12) for p in phi])
    if adapter.norm == "rms":
        x = nn.functional.rms_norm(x, (12,), adapter.norm_weight, adapter.eps)
    elif adapter.norm == "layer":
        x = nn.functional.layer_norm(x, (12,), adapter.norm_weight, adapter.norm_bias, adapter.eps)
    zero = x.new_zeros(1, x.shape[1], 7)
    first = [zero if s is None else s.reshape(1, -1, 7) for s in (h0, c0)]
    h, _ = rnn(x, tuple(first) if adapter.cell == "lstm" else first[0])
    hbar = h.mean(0) if adapter.reduce == "mean" else h[-1]
    out = adapter.scale * (hbar @ adapter.projection.weight.T + adapter.projection.bias)
    return out.reshape(phi[0].shape)


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("cell", CELLS)
def test_matches_torch_rnn(backend, cell, norm, reduce):
    phi = layers()
    adapter = adapter_for(cell, norm, reduce, scale=0.5)
    assert_close(adapter(phi), expected(adapter, phi))
    h0, c0 = state_for(cell)
    assert_close(adapter(phi, h0, c0), expected(adapter, phi, h0, c0))


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize("cell", CELLS)
def test_stream_and_step_match_forward(backend, cell, reduce):
    phi = layers()
    adapter = adapter_for(cell, reduce=reduce)
    state, stream = None, adapter.stream()
    for i, p in enumerate(phi, 1):
        state = adapter.step(p, state)
        stream.push(p)
        assert_close(stream.correction(), adapter(phi[:i]))
    h = state[0] if cell == "lstm" else state
    if reduce == "last":
        assert_close(adapter.project(h), adapter(phi))
    h0, c0 = state_for(cell)
    stream = adapter.stream(h0, c0)
    for p in phi:
        stream.push(p)
    assert_close(stream.correction(), adapter(phi, h0, c0))


@pytest.mark.parametrize(("width", "count"), [(768, 986_112), (1024, 1_248_768)])
def test_parameter_count(width, count):
    assert sum(p.numel() for p in pyeff.nn.ReadAdapter(width, device="meta").parameters()) == count


def test_starts_at_nothing_and_still_learns(backend):
    adapter = adapter_for("gru", zero_init=True)
    out = adapter(layers())
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().sum().backward()
    assert adapter.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_state_dicts_both_ways(cell, bias):
    rnn = TORCH[cell](12, 7, bias=bias, dtype=torch.float64)
    adapter = adapter_for(cell, bias=bias)
    assert adapter.load_torch(rnn) is adapter
    for name, value in rnn.state_dict().items():
        assert torch.equal(getattr(adapter, name), value)
    again = TORCH[cell](12, 7, bias=bias, dtype=torch.float64)
    again.load_state_dict(adapter.torch_state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rnn.parameters(), strict=True))
    by_name = adapter_for(cell, bias=bias)
    result = by_name.load_state_dict(rnn.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(by_name.weight_ih_l0, rnn.weight_ih_l0)


def test_torch_layouts_that_do_not_fit_are_refused():
    adapter = adapter_for("gru")
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    for source, message in [
        (nn.LSTM(12, 7), "LSTM"),
        (nn.GRU(12, 7, num_layers=2), "weight_hh_l1"),
        (nn.GRU(12, 7, bidirectional=True), "reverse"),
        (nn.GRU(12, 8), r"weight_ih_l0 has shape \[24, 12\], expected \[21, 12\]"),
        ({"weight_ih_l0": adapter.weight_ih_l0}, "no weight_hh_l0"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter.load_torch(source)
    with pytest.raises(ValueError, match="relu"):
        adapter_for("rnn").load_torch(nn.RNN(12, 7, nonlinearity="relu"))
    with pytest.raises(ValueError, match="source has bias_ih_l0"):
        adapter_for("gru", bias=False).load_torch(nn.GRU(12, 7))
    assert all(torch.equal(before[name], p) for name, p in adapter.named_parameters())


def test_state_dict_without_biases_clears_them():
    adapter = adapter_for("gru").load_torch(nn.GRU(12, 7, bias=False))
    assert not adapter.bias_ih_l0.any()
    assert not adapter.bias_hh_l0.any()


def test_embed_state(backend):
    adapter = adapter_for("gru", embed_state=True)
    phi, embedding = layers(), layers(1, seed=9)[0]
    h0 = embedding @ adapter.embed_projection.weight.T + adapter.embed_projection.bias
    out = adapter(phi, embedding=embedding)
    assert_close(out, expected(adapter, phi, h0))
    stream = adapter.stream(embedding=embedding)
    for p in phi:
        stream.push(p)
    assert_close(stream.correction(), out)
    with pytest.raises(ValueError, match="embedding is None"):
        adapter(phi)
    assert_close(adapter(phi, h0), out)
    with pytest.raises(ValueError, match="h0 and embedding were both given"):
        adapter(phi, h0, embedding=embedding)
    with pytest.raises(ValueError, match="h0 and embedding were both given"):
        adapter.stream(h0, embedding=embedding).push(phi[0])
    with pytest.raises(ValueError, match="embed_state=False"):
        adapter_for("gru")(phi, embedding=embedding)


@halves
@pytest.mark.parametrize("cell", CELLS)
def test_float32_parameters_follow_a_half_precision_backbone(backend, cell, dtype):
    phi = layers(dtype=dtype)
    adapter = adapter_for(cell, dtype=torch.float32)
    out = adapter(phi, h0=torch.zeros(2, 5, 7))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert adapter.weight_ih_l0.grad.dtype == torch.float32
    assert adapter.weight_ih_l0.grad.abs().sum() > 0
    with pyeff.backend("reference"):
        exact = adapter.double()([p.double() for p in phi])
    # Rounding of inputs, weights and states, over four layers of a contracting recurrence.
    assert (out.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_other_mixed_dtypes_raise():
    with pytest.raises((ValueError, RuntimeError), match="float"):
        adapter_for("gru", dtype=torch.float32)(layers(dtype=torch.float64))


@halves
def test_autocast(backend, dtype):
    phi, adapter = layers(dtype=torch.float32), adapter_for("gru", dtype=torch.float32)
    with torch.autocast(places.here().device, dtype):
        out = adapter(phi)
        stream = adapter.stream()
        for p in phi:
            stream.push(p)
        streamed = stream.correction()
    assert out.dtype == streamed.dtype == dtype
    scale = adapter(phi).abs().max()
    for got in (out, streamed):
        assert (got - adapter(phi)).abs().max() < 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cell": "elman"}, "cell is 'elman'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"reduce": "sum"}, "reduce is 'sum'"),
        ({"cell": ["gru"]}, r"cell is \['gru'\], expected one of 'rnn', 'gru', 'lstm'"),
        ({"rank": 0}, "rank is 0, expected an integer of at least 1"),
        ({"rank": 4.0}, "rank is 4.0, expected an integer of at least 1"),
        ({"rank": True}, "rank is True, expected an integer of at least 1"),
        ({"width": 12.0}, "width is 12.0, expected an integer of at least 1"),
        ({"width": None}, "width is None, expected an integer of at least 1"),
        ({"eps": -1}, "eps is -1, expected a finite number of at least 0"),
        ({"eps": float("nan")}, "eps is nan, expected a finite number"),
        ({"eps": "1e-6"}, "eps is '1e-6', expected a finite number"),
        ({"scale": float("inf")}, "scale is inf, expected a finite number"),
        ({"scale": None}, "scale is None, expected a finite number"),
        ({"bias": 1}, "bias is 1, expected True or False"),
        ({"zero_init": None}, "zero_init is None, expected True or False"),
        ({"recompute": "no"}, "recompute is 'no', expected True or False"),
        ({"embed_state": 0}, "embed_state is 0, expected True or False"),
        ({"dtype": torch.int64}, r"dtype is torch\.int64, expected a floating-point torch\.dtype"),
        ({"dtype": "float32"}, "dtype is 'float32', expected a floating-point"),
        ({"device": "abacus"}, "device is 'abacus', expected a device of torch"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pyeff.nn.ReadAdapter(**{"width": 12} | kwargs)


def test_odd_but_good_options():
    numpy = pytest.importorskip("numpy")
    adapter = pyeff.nn.ReadAdapter(numpy.int64(12), numpy.int32(4), eps=0, scale=numpy.float32(2), device="cpu")
    assert adapter(layers(dtype=torch.float32)).shape == (2, 5, 12)


def test_bad_calls():
    adapter = adapter_for("gru")
    with pytest.raises(ValueError, match="phi is empty"):
        adapter([])
    with pytest.raises(RuntimeError, match="no layer output"):
        adapter.stream().correction()
    stream = adapter.stream(None, torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="c0"):
        stream.push(layers(1)[0])


def test_repr_says_what_it_is():
    assert "12, rank=7, cell='gru', norm='rms', reduce='mean'" in repr(adapter_for("gru"))


def test_examples():
    result = doctest.testmod(pyeff.nn.read)
    assert result.attempted
    assert not result.failed
