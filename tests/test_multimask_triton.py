"""The multimask family's Triton kernels by themselves: guarded buffers, every way through them.

Under the interpreter with PYEFF_EMULATE=1 (float32 and float16: it is wrong for bfloat16), on a GPU otherwise. The
interpreter sees no access out of bounds, so inputs lie in NaN, and outputs between numbers that must stay.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from pyeff import MaskPlan, backends, reference
from pyeff.reference import _philox
from pyeff.reference.block_mask import draw
from pyeff.reference.block_mask import share as share_of
from pyeff.reference.multimask import KINDS, NORMS
from tests import helpers
from tests.multimask_parts import TRITON, triton_kernels

DEVICE = "cpu" if backends.EMULATED else "cuda"
pytestmark = TRITON
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
GUARD = 64
B, M, T, D = 2, 3, 13, 40
R = B * M
TINY = 5  # tokens, for what has a program for each


@pytest.fixture(scope="module")
def kernels():
    return triton_kernels()


@pytest.fixture(autouse=True)
def on_device():
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def random(*shape, dtype=torch.float32, seed=0, offset=0.25):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn + offset).to(torch.get_default_device(), dtype)


def odd(t):
    """The same numbers in rows that are aligned to nothing, NaN between them."""
    room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
    return room[..., 1 : 1 + t.shape[-1]].copy_(t)


class Outputs:
    """Buffers of NaN between guards, and whether these are still there."""

    def __init__(self) -> None:
        self.buffers = []

    def __call__(self, *shape, dtype=torch.float32):
        size, fill = math.prod(shape), 7 if dtype == torch.int32 else 12345.0
        buffer = torch.full((size + 2 * GUARD,), fill, dtype=dtype)
        buffer[GUARD : GUARD + size] = -9 if dtype == torch.int32 else math.nan
        self.buffers.append((buffer, fill))
        return buffer[GUARD : GUARD + size].view(shape)

    def check(self):
        for buffer, fill in self.buffers:
            assert (buffer[:GUARD] == fill).all()
            assert (buffer[-GUARD:] == fill).all()


@pytest.fixture
def empty():
    outputs = Outputs()
    yield outputs
    outputs.check()


def make_plan(tokens=T, lengths=(T, T - 4), ragged=True):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.rand(B, M, tokens, generator=generator, device="cpu") < 0.6
    if ragged:
        hidden[0, 1], hidden[1, 2] = True, False
    device = torch.get_default_device()
    return MaskPlan.from_mask(hidden.to(device), torch.tensor(lengths, device=device))


def index(plan):
    return plan.ids_keep, plan.keep_len, plan.inverse, plan.lengths


def check(what, found, same, oracle, terms=1, scale=0.0):
    helpers.assert_three_way(what, found, same, oracle, terms, scale)


@dtypes
def test_gather_and_its_derivative(kernels, empty, dtype):
    plan, x = make_plan(), odd(random(B, T, D, dtype=dtype))
    ids_keep, keep_len, inverse, _ = index(plan)
    out = empty(R, plan.width, D, dtype=dtype)
    kernels.gather(x, ids_keep, keep_len, out)
    assert torch.equal(out, reference.multimask.gather(x, ids_keep, keep_len))
    kernels.gather(x[:1].expand(B, T, D), ids_keep, keep_len, out)
    assert torch.equal(out, reference.multimask.gather(x[:1].expand(B, T, D), ids_keep, keep_len))
    grad, dx = odd(random(R, plan.width, D, dtype=dtype)), empty(B, T, D, dtype=dtype)
    kernels.gather_backward(grad, inverse, dx)

    def derived(kind):
        leaf = x.to(kind).detach().requires_grad_()
        return torch.autograd.grad(reference.multimask.gather(leaf, ids_keep, keep_len), leaf, grad.to(kind))[0]

    check("dx", dx, derived(dtype), derived(torch.float64), M)


@dtypes
@pytest.mark.parametrize("fills", [0, 1, B])
def test_scatter_and_its_derivative(kernels, empty, fills, dtype):
    plan, seed = make_plan(TINY, (TINY, TINY - 2)), torch.tensor([-(1 << 40) - 3])
    ids_keep, keep_len, inverse, lengths = index(plan)
    x = odd(random(R, plan.width, D - 2, dtype=dtype))
    fill = odd(random(fills, TINY, D - 2, dtype=dtype, seed=1)) if fills else None
    names = torch.tensor([1 << 33, -5]) if fills else None
    for std in (0.0, 0.5):
        out = empty(R, TINY, D - 2, dtype=dtype)
        kernels.scatter(x, inverse, lengths, fill, seed, names, std, out)
        same, oracle = (
            reference.multimask.scatter(x.to(kind), inverse, lengths, f, seed, names, std)
            for kind, f in ((dtype, fill), (torch.float64, None if fill is None else fill.double()))
        )
        check("out", out, same, oracle)
    if not fills:
        return
    grad = random(R, TINY, D - 2, dtype=dtype, seed=2)
    dx, dfill = empty(R, plan.width, D - 2, dtype=dtype), empty(fills, TINY, D - 2, dtype=dtype)
    kernels.scatter_backward(odd(grad), ids_keep, keep_len, inverse, lengths, dx, dfill)

    def derived(kind):
        leaves = [t.to(kind).detach().requires_grad_() for t in (x, fill)]
        out = reference.multimask.scatter(leaves[0], inverse, lengths, leaves[1], seed, names, 0.0)
        return torch.autograd.grad(out, leaves, grad.to(kind))

    for name, found, same, oracle in zip("xf", (dx, dfill), derived(dtype), derived(torch.float64), strict=True):
        check(name, found, same, oracle, R)


def test_sums_in_parts(kernels, empty):
    """Rows of one fill are many: they are summed in parts, and the parts in their order."""
    masks, grad = 20, random(B * 20, 5, 8)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(B, masks, 5, generator=generator, device="cpu") < 0.5
    plan = MaskPlan.from_mask(hidden.to(grad.device))
    dfill = empty(1, 5, 8)
    kernels.scatter_backward(grad, *index(plan), grad.new_empty(0), dfill)
    oracle = torch.where(plan.hidden()[..., None], grad.view(B, masks, 5, 8).double(), 0).sum((0, 1))[None]
    check("dfill", dfill, oracle.float(), oracle, 40)


@dtypes
@pytest.mark.parametrize("norm", range(4), ids=NORMS)
def test_targets_and_their_derivative(kernels, empty, norm, dtype):
    """A whole sample on the chip; statistics first (instance norm after another); all norms after each other."""
    post, eps = (3, 0, 1, 2)[norm], 1e-5
    lengths = torch.tensor([T, T - 4], dtype=torch.int32)
    layers = [random(B, T, D, dtype=dtype, seed=i, offset=i) for i in range(3)]
    layers[1] = odd(layers[1])
    for layer in layers:
        layer[1, T - 4 :] = math.nan
    out = empty(B, T, D)
    kernels.targets(layers, lengths, norm, post, eps, 1 / 3, False, out)
    grad = random(B, T, D, seed=9)
    found = [empty(B, T, D, dtype=dtype) for _ in layers]
    kernels.targets_backward(grad, layers, lengths, norm, post, eps, found)

    def computed(kind):
        leaves = [t.to(kind).detach().requires_grad_() for t in layers]
        out = reference.multimask.targets(leaves, lengths, NORMS[norm], NORMS[post], eps)
        return out.detach(), torch.autograd.grad(out, leaves, grad.to(out))

    (same, d_same), (oracle, d_oracle) = computed(dtype), computed(torch.float64)
    check("out", out, same, oracle, B * T * D)
    for i, each in enumerate(zip(found, d_same, d_oracle, strict=True)):
        check(f"layer {i}", *each, terms=B * T * D, scale=1.0)


@pytest.mark.parametrize(("norm", "tokens"), [("instance", 1), ("instance", 300), ("instance", 1030), ("layer", 7)])
def test_targets_of_any_length(kernels, empty, norm, tokens):
    """Also a large mean with a small deviation; wider rows; and added layer by layer, padding left alone."""
    lengths = torch.tensor([tokens, tokens - tokens // 3], dtype=torch.int32)
    width = 100 if norm == "layer" else 3
    layers = [30 + 0.01 * random(B, tokens, width, seed=i) for i in range(2)]
    out, kind = empty(B, tokens, width), NORMS.index(norm)
    kernels.targets(layers, lengths, kind, 0, 1e-5, 0.5, False, out)
    same = reference.multimask.targets(layers, lengths, norm, "none", 1e-5)
    oracle = reference.multimask.targets([t.double() for t in layers], lengths, norm, "none", 1e-5)
    check("out", out, same, oracle, tokens)
    total = empty(B, tokens, width).fill_(2.0)
    for layer in layers:
        kernels.targets([layer], lengths, kind, 0, 1e-5, 0.5, True, total)
    live = torch.arange(tokens) < lengths[:, None]
    check("total", total[live], same[live] + 2, oracle[live] + 2, tokens)
    assert (total[~live] == 2).all()


def test_more_layers_than_a_launch_takes(kernels, empty):
    layers = [random(1, 2, 4, seed=i) for i in range(70)]
    lengths = torch.tensor([2], dtype=torch.int32)
    for norm in ("none", "layer"):
        out = empty(1, 2, 4)
        kernels.targets(layers, lengths, NORMS.index(norm), 0, 1e-5, 1 / 70, False, out)
        same = reference.multimask.targets(layers, lengths, norm, "none", 1e-5)
        oracle = reference.multimask.targets([t.double() for t in layers], lengths, norm, "none", 1e-5)
        check(norm, out, same, oracle, 70)


@dtypes
@pytest.mark.parametrize(("kind", "beta"), [("l2", 0), ("smooth_l1", 0.5), ("smooth_l1", 0), ("l1", 0), ("cosine", 0)])
def test_loss_and_its_derivative(kernels, empty, kind, beta, dtype):
    """The sum with derivative and moments at once; each token's loss; derivatives for what comes from above."""
    plan, scale = make_plan(), 0.7
    inverse, lengths = plan.inverse, plan.lengths
    pred = odd(random(R, T, D, dtype=dtype)).masked_fill(~plan.hidden().flatten(0, 1)[..., None], math.nan)
    target = random(B, T, D, seed=3)
    target[1, T - 4 :] = math.nan
    target[0, 0], count = 0.0, plan.count()
    options = KINDS.index(kind), beta, scale
    total, dpred, moments = empty(), empty(R, T, D, dtype=dtype), empty(1 + 4 * D, dtype=torch.float64)
    kernels.loss(pred, target, inverse, lengths, count, *options, total, dpred, moments)
    each = empty(R, T)
    kernels.loss(pred, target, inverse, lengths, None, *options, each, pred.new_empty(0), target.new_empty(0))
    above = random(R, T, seed=4)
    back, into_target = empty(R, T, D, dtype=dtype), empty(B, T, D)
    kernels.loss_backward(above, pred, target, inverse, lengths, None, *options, back, into_target)

    def computed(dtype):
        x, y = (t.detach().to(dtype).requires_grad_() for t in (pred, target))
        if dtype != torch.float64:
            y = target.detach().requires_grad_()
        one = reference.multimask.loss(x, y, inverse, lengths, kind, beta, scale, "sum") / count
        all_ = reference.multimask.loss(x, y, inverse, lengths, kind, beta, scale, "none")
        first = torch.autograd.grad(one, x)
        return [t.detach() for t in (one, *first, all_, *torch.autograd.grad(all_, (x, y), above.to(all_)))]

    names, found = ("loss", "dpred", "each", "back", "target"), (total, dpred, each, back, into_target)
    for name, *three in zip(names, found, computed(dtype), computed(torch.float64), strict=True):
        check(name, *three, terms=R * T * D if name == "loss" else D, scale=2.0 if name == "target" else 0.0)
    torch.testing.assert_close(
        moments, reference.multimask.moments(pred, target, inverse, lengths), rtol=1e-12, atol=1e-10
    )


def test_nothing_is_hidden(kernels, empty):
    plan = MaskPlan.from_mask(torch.zeros(B, M, T, dtype=torch.bool))
    total, dpred = empty(), empty(R, T, D)
    pred, target = random(R, T, D), random(B, T, D)
    kernels.loss(pred, target, plan.inverse, plan.lengths, plan.count(), 0, 0.0, 1.0, total, dpred, target.new_empty(0))
    assert total.isnan()
    assert (dpred == 0).all()


@dtypes
def test_rescale(kernels, dtype):
    t = random(3, 5000, dtype=dtype)
    before = t.clone()
    kernels.rescale(t, torch.tensor(1.0))
    assert torch.equal(t, before)
    kernels.rescale(t, torch.tensor(0.3))
    assert torch.equal(t, (before.float() * torch.tensor(0.3)).to(dtype))


@dtypes
def test_relative_bias_and_its_derivative(kernels, empty, dtype):
    plan, heads = make_plan().with_prefix(1), 3
    ids_keep, keep_len, _, _ = index(plan)
    slopes, k = random(heads), plan.width
    out, dslopes = empty(R, heads, k, k, dtype=dtype), empty(heads)
    kernels.relative_bias(ids_keep, keep_len, slopes, 1, out)
    same, oracle = (
        reference.multimask.relative_bias(ids_keep, keep_len, s, 1, t)
        for s, t in ((slopes, dtype), (slopes.double(), torch.float64))
    )
    assert torch.equal(out.isinf(), oracle.isinf())
    check("bias", out.nan_to_num(neginf=0.0), same.nan_to_num(neginf=0.0), oracle.nan_to_num(neginf=0.0))
    grad = random(R, heads, k, k, dtype=dtype)
    kernels.relative_bias_backward(grad, ids_keep, keep_len, 1, dslopes)

    def derived(kind):
        leaf = slopes.to(kind).detach().requires_grad_()
        bias = reference.multimask.relative_bias(ids_keep, keep_len, leaf, 1, kind)
        return torch.autograd.grad(bias, leaf, grad.to(kind))[0]

    check("dslopes", dslopes, derived(torch.float32), derived(torch.float64), R * k * k, scale=20.0)


MASKS = {
    "image": (196, 14, 0.2, 0.07, 3, True),
    "sound": (60, 0, 0.5, 0.05, 5, True),
    "blocks are hidden": (60, 0, 0.5, 0.05, 4, False),
    "single": (33, 0, 0.48, 0.0, 1, False),
    "all": (7, 0, 1.0, 0.0, 3, True),
    "none": (7, 0, 0.0, 0.0, 3, True),
    "long": (1100, 0, 0.3, 0.0, 50, True),
}


@pytest.mark.parametrize("case", MASKS)
def test_block_mask(kernels, empty, monkeypatch, case):
    """Bit for bit those of the definition; rows that no program holds are drawn in two steps."""
    tokens, grid_width, keep, adjust, length, inverse = MASKS[case]
    if case == "long":
        monkeypatch.setattr(kernels.configs, "MASK", (256,))
    lengths = torch.tensor([tokens, tokens if grid_width else tokens // 2], dtype=torch.int32)
    names, seed = torch.tensor([3, 1 << 40]), torch.tensor([1 << 50])
    share = share_of(keep, adjust, length, inverse, 2 if grid_width else 1)
    slots = max(int(tokens * keep), 1)
    for ids in (names, None):
        outputs = [empty(*shape, dtype=torch.int32) for shape in ((R, slots), (R,), (R, tokens))]
        kernels.block_mask(seed, ids, lengths, M, grid_width, keep, share, length, inverse, *outputs)
        kept = draw(seed, ids, lengths, M, tokens, grid_width, keep, share, length, inverse)
        expected = importlib.import_module("pyeff.plans.mask")._positions(kept, slots)
        for name, found, truth in zip(("ids", "len", "inverse"), outputs, expected, strict=True):
            assert torch.equal(found, truth), name


def test_noise_is_that_of_the_definition(kernels, empty):
    """Far along the counter, too: positions, masks and names that need all of their bits."""
    plan = MaskPlan.from_mask(torch.ones(1, 2, 5, dtype=torch.bool))
    seed, out = torch.tensor([1 << 62]), empty(2, 5, 33)
    kernels.scatter(torch.zeros(2, 1, 33), plan.inverse, plan.lengths, None, seed, torch.tensor([-1]), 1.0, out)
    expected = _philox.normals(seed, torch.tensor([-1]), 2, 5, 33)[0]
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("copies", [False, True])
def test_ema_update(kernels, empty, copies):
    """Blocks that are full and others, tensors of several dtypes, aligned to nothing, and without numbers."""
    sizes = (1, 0, 513, 1024, 3)
    kinds = (torch.float32, torch.float32, torch.float32, torch.float32, torch.float16)
    averages = [empty(n, dtype=kind).copy_(random(n, dtype=kind)) for n, kind in zip(sizes, kinds, strict=True)]
    params = [random(n + 1, dtype=torch.float16, seed=1)[1:] for n in sizes]
    wanted = [empty(n, dtype=torch.float16) for n in sizes] if copies else []
    decay = torch.tensor([0.9999], dtype=torch.float64)
    expected = [a.clone() for a in averages]
    copied = [torch.zeros_like(c) for c in wanted]
    reference.ema_update_(expected, params, decay, copies=copied or None)
    kernels.ema_update(averages, params, decay, wanted)
    for found, truth in zip(averages + wanted, expected + copied, strict=True):
        torch.testing.assert_close(found, truth, rtol=2e-7 if found.dtype == torch.float32 else 1e-3, atol=0)


@pytest.mark.parametrize("wrong", [T, (1 << 31) - 1])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_index_leads_out_of_the_tensors(kernels, empty, wrong):
    """Nobody has looked into a plan on the device: a wrong one gives any numbers, and touches nothing else."""
    plan = make_plan()
    parts = [t.clone() for t in index(plan)]
    for part in parts:
        part.view(-1)[::3] = wrong
    ids_keep, keep_len, inverse, lengths = parts
    x, small, large = random(B, T, D), random(R, plan.width, D), random(R, T, D)
    kernels.gather(x, ids_keep, keep_len, empty(R, plan.width, D))
    kernels.gather_backward(small, inverse, empty(B, T, D))
    kernels.scatter(small, inverse, lengths, x, torch.tensor([1]), None, 0.0, empty(R, T, D))
    kernels.scatter_backward(large, *parts, empty(R, plan.width, D), empty(1, T, D))
    for norm, post in ((1, 2), (3, 0)):
        kernels.targets([x], lengths, norm, post, 1e-5, 1.0, False, empty(B, T, D))
        kernels.targets_backward(x, [x], lengths, norm, post, 1e-5, [empty(B, T, D)])
    for kind in (0, 3):
        kernels.loss(
            large, x, inverse, lengths, None, kind, 0.0, 1.0, empty(), empty(R, T, D),
            empty(1 + 4 * D, dtype=torch.float64),
        )  # fmt: skip
    k = plan.width
    kernels.relative_bias(ids_keep, keep_len, random(2), 0, empty(R, 2, k, k))
    kernels.relative_bias_backward(random(R, 2, k, k), ids_keep, keep_len, 0, empty(2))
    outputs = [empty(*shape, dtype=torch.int32) for shape in ((R, k), (R,), (R, T))]
    kernels.block_mask(torch.tensor([1]), None, lengths, M, 0, 0.5, 0.1, 3, True, *outputs)
