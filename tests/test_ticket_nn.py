"""pyeff.nn.TicketLinear: the same numbers as a masked linear layer, and an ordinary module to everything around it."""

from __future__ import annotations

import copy
import doctest
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyeff
import pyeff.nn._ticket_fused
import pyeff.nn.ticket
from pyeff.nn import TicketLinear
from pyeff.nn._ticket_fused import stack, unstack
from tests import helpers, places

# (out, in), block: whole blocks, a rectangle, and edges on both sides.
SHAPES = [((32, 48), 8), ((32, 48), (16, 8)), ((37, 29), (8, 16))]
shapes = pytest.mark.parametrize(("shape", "block"), SHAPES, ids=["square", "rectangle", "edges"])


def ticket_for(shape=(37, 29), block=(8, 16), share=0.5, seed=0):
    block = (block, block) if isinstance(block, int) else block
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    drawn = torch.rand(grid, generator=torch.Generator().manual_seed(seed), device="cpu")
    return pyeff.Ticket.from_blocks((drawn < share).to(torch.get_default_device()), shape, block)


def layer_for(shape=(37, 29), block=(8, 16), share=0.5, seed=0, dtype=None, **options):
    torch.manual_seed(seed)
    return TicketLinear(ticket_for(shape, block, share, seed), dtype=dtype or places.here().dtypes[0], **options)


def draw(*shape, dtype=None, seed=1):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype or places.here().dtypes[0])


def assert_close(found, expected, terms):
    """Two ways to sum the same terms differ by what rounding does to each."""
    slack = 2 * helpers.rounding(expected.dtype, terms, max(1.0, expected.abs().max().item()))
    assert helpers.error(found, expected) <= slack


@shapes
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_is_a_masked_linear_layer(backend, shape, block, activation):
    linear = nn.Linear(shape[1], shape[0], dtype=places.here().dtypes[0])
    layer = TicketLinear.from_linear(linear, ticket_for(shape, block), activation=activation)
    dense = layer.to_linear()
    assert torch.equal(dense.weight, torch.where(layer.ticket.mask(), linear.weight, 0))
    x = draw(2, 5, shape[1]).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = {None: lambda z: z, "relu": torch.relu, "gelu": F.gelu}[activation](dense(twin))
    found = layer(x)
    assert_close(found, expected, shape[1])
    grad = draw(*found.shape, seed=2)
    found.backward(grad)
    expected.backward(grad)
    assert_close(x.grad, twin.grad, shape[0])
    assert_close(layer.values.grad, layer.ticket.gather(dense.weight.grad), 10)
    assert_close(layer.bias.grad, dense.bias.grad, 10)


def test_from_linear_copies_everything():
    linear = nn.Linear(29, 37, dtype=torch.bfloat16).eval().requires_grad_(False)
    layer = TicketLinear.from_linear(linear, ticket_for())
    assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.values.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    assert layer.values.data_ptr() != linear.weight.data_ptr()
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    back = layer.to_linear()
    assert torch.equal(back.bias, linear.bias)
    assert not back.weight.requires_grad
    assert not back.training
    assert TicketLinear.from_linear(nn.Linear(29, 37, bias=False), ticket_for()).bias is None


def test_a_mask_chooses_blocks_and_zeroes_inside_them():
    linear = nn.Linear(16, 16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[3, 5] = mask[12, 0] = True
    layer = TicketLinear.from_linear(linear, mask, block=8)
    assert layer.ticket.nnz == 2
    assert torch.equal(layer.weight, torch.where(mask, linear.weight, 0))
    assert layer.density == 0.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_alive(backend, share):
    layer = layer_for(share=share)
    x = draw(3, 29)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 29)
    assert layer.density == share
    if share == 0:
        assert torch.equal(layer(x), layer.bias.expand(3, 37))


def test_fresh_values_have_the_size_of_the_inputs_that_are_there():
    torch.manual_seed(0)
    layer = layer_for((256, 512), 16, 0.25, dtype=torch.float32)
    spread = layer(torch.randn(500, 512)).std(0)
    # Uniform in +-1/sqrt(fan in), as torch.nn.Linear: a variance of 1/3 for inputs of variance 1, however many live.
    assert 0.4 < spread.mean() < 0.75
    assert (spread[layer.ticket.row_start.diff().repeat_interleave(16) > 0] > 0.2).all()
    odd = layer_for(share=1.0)
    assert torch.equal(odd.ticket.gather(odd.weight), odd.values)  # nothing past the end


def test_state_dict_restores_another_ticket():
    source, target = layer_for(share=0.6, seed=1), layer_for(share=0.2, seed=2)
    parameter = target.values
    target(draw(3, 29)).sum().backward()
    assert source.values.shape != target.values.shape
    assert target.load_state_dict(source.state_dict()).missing_keys == []
    assert target.values is parameter
    assert parameter.grad is None
    assert target.ticket == source.ticket
    x = draw(3, 29)
    assert torch.equal(target(x), source(x))
    other_block = layer_for(block=8, share=0.3, seed=3)
    target.load_state_dict(other_block.state_dict())
    assert target.block == (8, 8)
    assert torch.equal(target.weight, other_block.weight)
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1)
    before = target.values.detach().clone()
    target(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, target.values)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_casts_and_assigns(assign):
    source, target = layer_for(share=0.6, seed=1, dtype=torch.float32), layer_for(share=0.2, dtype=torch.float64)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.values.dtype == (torch.float32 if assign else torch.float64)
    assert torch.equal(target.weight.float(), source.weight)


def test_bad_state_dicts_change_nothing():
    layer = layer_for()
    before, index = layer.values.detach().clone(), layer.index.clone()
    good = layer_for(share=0.9, seed=1).state_dict()
    broken = good["index"].clone()
    broken[0] = 3
    for change, message in [
        ({"index": broken}, "a position is out of range"),
        ({"index": good["index"].long()}, "int64"),
        ({"values": good["values"][1:]}, "values has shape"),
        ({"values": good["values"].flatten(1)}, "values has shape"),
        ({"index": layer_for((37, 40), share=0.9).index}, "index"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**good, **change})
        assert torch.equal(layer.values, before), message
        assert torch.equal(layer.index, index), message
    without = {name: t for name, t in layer.state_dict().items() if name != "index"}
    with pytest.raises(RuntimeError, match="index"):
        layer.load_state_dict(without)
    assert layer.load_state_dict(without, strict=False).missing_keys == ["index"]


def test_an_index_alone_is_checked_too():
    layer = layer_for()
    values, index = layer.values.detach().clone(), layer.index.clone()
    noise = torch.arange(len(index), dtype=torch.int32) * 7919
    stored = layer.state_dict()
    for state, message in [
        ({"index": noise}, "a position is out of range"),
        ({"index": noise, "bias": stored["bias"]}, "a position is out of range"),
        ({"index": noise, "values": stored["values"].flatten(1)}, "values has shape"),
        ({"index": layer_for(share=0.9, seed=1).index}, "index"),
        ({"index": index.long()}, "int64"),
        ({"index": index.tolist()}, "index"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=False)
        assert torch.equal(layer.index, index), message
        assert torch.equal(layer.values, values), message
    layer.load_state_dict({"index": index.clone()}, strict=False)
    assert torch.equal(layer.index, index)


def test_state_dicts_on_meta():
    layer, other = layer_for(), layer_for(share=0.9, seed=1)
    index, bare = layer.index.clone(), {name: t.to("meta") for name, t in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="index is on meta, expected the positions"):
        layer.load_state_dict(bare)
    assert torch.equal(layer.index, index)
    assert not layer.values.is_meta
    # As with any module: into one on meta, or assigned.
    copy.deepcopy(layer).to("meta").load_state_dict(bare)
    layer.load_state_dict(bare, assign=True)
    assert layer.index.is_meta
    assert layer.values.shape == other.values.shape
    with pytest.raises(RuntimeError, match="values has shape"):
        layer.load_state_dict({**bare, "values": bare["values"][1:]}, assign=True)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer.weight, other.weight)


def test_copies_pickles_and_files(tmp_path):
    layer, x = layer_for(dtype=torch.float32), draw(3, 29, dtype=torch.float32)
    twin = copy.deepcopy(layer)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    loaded = layer_for(seed=3, dtype=torch.float32)
    loaded.load_state_dict(torch.load(stored))
    for other in (twin, pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.values.zero_()
        assert layer.values.any()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(loaded.weight, layer.weight)


def test_moves_and_casts_as_any_module():
    layer = layer_for(dtype=torch.float32)
    layer.bfloat16()
    assert layer.values.dtype == torch.bfloat16
    assert layer.index.dtype == torch.int32
    meta = copy.deepcopy(layer).to("meta")
    assert meta.values.is_meta
    meta.reset_parameters()


OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9}, "Adam": {}, "AdamW": {}, "Adamax": {}, "NAdam": {}, "RAdam": {},
    "Adadelta": {}, "Adagrad": {}, "ASGD": {}, "RMSprop": {"momentum": 0.5}, "Rprop": {}, "Adafactor": {},
    "LBFGS": {"max_iter": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name):
    layer = layer_for(dtype=torch.float32)
    x, goal = draw(16, 29, dtype=torch.float32), draw(16, 37, dtype=torch.float32, seed=5)
    optimizer = getattr(torch.optim, name)(layer.parameters(), **OPTIMIZERS[name])

    def loss():
        optimizer.zero_grad()
        value = F.mse_loss(layer(x), goal)
        value.backward()
        return value

    first = loss().item()
    for _ in range(10):
        optimizer.step(loss)
    assert loss().item() < first


@pytest.mark.parametrize("block", [(8, 16), (4, 4)], ids=["same block", "another block"])
def test_set_ticket_carries_moments(block):
    layer = layer_for(dtype=torch.float32, share=0.6)
    optimizer = torch.optim.AdamW(layer.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        layer(draw(4, 29, dtype=torch.float32, seed=seed)).square().sum().backward()
        optimizer.step()
    old, parameter = layer.ticket, layer.values
    dense = {key: old.scatter(optimizer.state[parameter][key]) for key in ("exp_avg", "exp_avg_sq")}
    weight, fill = layer.weight.detach(), draw(37, 29, dtype=torch.float32, seed=9)
    new = ticket_for(block=block, share=0.5, seed=7)
    assert bool((new.mask() & ~old.mask()).any())
    assert bool((new.mask() & old.mask()).any())
    layer.set_ticket(new, fill, optimizers=[optimizer])
    assert layer.values is parameter
    assert layer.ticket == new
    for key, moment in dense.items():
        assert torch.equal(optimizer.state[parameter][key], new.gather(moment)), key
    assert optimizer.state[parameter]["step"] == 3
    expected = torch.where(old.mask(), weight, fill)
    assert torch.equal(layer.weight, torch.where(new.mask(), expected, 0))
    layer(draw(4, 29, dtype=torch.float32)).sum().backward()
    optimizer.step()
    layer.set_ticket(old, fill, rewind=True)
    assert torch.equal(layer.weight, torch.where(old.mask(), fill, 0))


def test_set_ticket_without_fill_begins_at_zero():
    layer = layer_for(share=0.0, dtype=torch.float32)
    layer.set_ticket(ticket_for(share=1.0))
    assert not layer.values.any()
    assert layer.values.shape[0] == 10


def test_factored_moments_follow_their_blocks():
    layer = layer_for(share=0.7, dtype=torch.float32)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(draw(4, 29, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    old, row = layer.ticket, optimizer.state[layer.values]["row_var"].clone()
    keep = old.blocks()
    keep[0] = False
    layer.set_ticket(pyeff.Ticket.from_blocks(keep, old.shape, old.block), optimizers=[optimizer])
    assert torch.equal(optimizer.state[layer.values]["row_var"], row[int(old.row_start[1]) :])
    layer.set_ticket(ticket_for(block=8), optimizers=[optimizer])
    assert layer.values not in optimizer.state
    layer(draw(4, 29, dtype=torch.float32)).square().sum().backward()
    optimizer.step()


def test_autocast():
    layer, x = layer_for(dtype=torch.float32), draw(4, 29, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32
    assert (out - layer(x)).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * layer(x).abs().max()


def test_compiles_whole(backend):
    layer = layer_for(dtype=torch.float32, activation="gelu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        x = draw(tokens, 29, dtype=torch.float32)
        assert_close(compiled(x), layer(x), 29)
        got, expected = (torch.autograd.grad(f(x).sum(), layer.values)[0] for f in (compiled, layer))
        assert_close(got, expected, tokens)
    layer.set_ticket(ticket_for(share=0.3, seed=4))
    assert_close(compiled(x), layer(x), 29)


def test_stack_and_unstack():
    layers = [layer_for((rows, 29), 8, seed=i) for i, rows in enumerate((16, 24, 19))]
    whole, x = stack(layers), draw(3, 29)
    assert_close(whole(x), torch.cat([layer(x) for layer in layers], -1), 29)
    for part, layer in zip(unstack(whole, [16, 24, 19]), layers, strict=True):
        assert part.ticket == layer.ticket
        assert torch.equal(part.values, layer.values)
        assert torch.equal(part.bias, layer.bias)
    for others, message in [
        ([], "expected one or more TicketLinear"),
        ([layers[0], nn.Linear(3, 3)], "expected one or more TicketLinear"),
        ([layers[2], layers[0]], r"layers\[0\] has 19 outputs, expected a multiple of 8"),
        ([layers[0], layer_for((16, 30), 8)], r"layers\[1\] has in_features 30, expected 29"),
        ([layers[0], layer_for((16, 29), 4)], r"layers\[1\] has block \(4, 4\)"),
        ([layers[0], layer_for((16, 29), 8, bias=False)], r"layers\[1\] has bias=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            stack(others)
    for sizes in ([16, 24], [15, 44], [], [59, 0]):
        with pytest.raises(ValueError, match="unstack: sizes is"):
            unstack(whole, sizes)


def test_bad_arguments():
    ticket, linear = ticket_for(), nn.Linear(29, 37)
    for call, message in [
        (lambda: TicketLinear((37, 29)), "ticket is a tuple, expected a pyeff.Ticket"),
        (lambda: TicketLinear(ticket, activation="silu"), "activation is 'silu'"),
        (lambda: TicketLinear(ticket, dtype=torch.int8), r"dtype is torch\.int8"),
        (lambda: TicketLinear.from_linear(linear, ticket, 8), "block is 8 with a ticket, expected None"),
        (lambda: TicketLinear.from_linear(linear, ticket.mask()), "block is None with a mask"),
        (lambda: TicketLinear.from_linear(linear, ticket_for((29, 37))), r"shape \[29, 37\], expected \[37, 29\]"),
        (lambda: layer_for()(torch.zeros(3, 28)), r"x has shape \[3, 28\], expected \[\*, 29\]"),
        (lambda: layer_for()(torch.zeros(())), r"x has shape \[\], expected \[\*, 29\]"),
        (lambda: layer_for()([1.0] * 29), "x is a list, expected a tensor"),
        (lambda: layer_for()(None), "x is a NoneType, expected a tensor"),
        (lambda: layer_for()(torch.zeros(3, 29, dtype=torch.int64)), "x is torch.int64"),
        (lambda: layer_for().set_ticket(ticket, [0.0]), r"fill is a list, expected a tensor \[37, 29\] or None"),
        (lambda: layer_for().set_ticket(ticket_for((29, 37))), r"expected a pyeff.Ticket of \(37, 29\)"),
        (lambda: layer_for().set_ticket(ticket, torch.zeros(3, 3)), r"fill has shape \[3, 3\]"),
        (lambda: layer_for().set_ticket(ticket, rewind=True), "fill is None with rewind"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_repr_says_what_it_is():
    assert "in_features=29, out_features=37, block=(8, 16), blocks=" in repr(layer_for())
    assert "activation='relu'" in repr(layer_for(activation="relu"))


@pytest.mark.parametrize("module", [pyeff.nn.ticket, pyeff.nn._ticket_fused])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
