"""The noise of hidden places: the generator's known answers, statistics, and what it depends on."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff import MaskPlan
from pyeff.reference import _philox
from tests import helpers
from tests.helpers import dtypes
from tests.multimask_calls import check_call, exact_normals, make_plan, make_scatter

OPERATION = "multimask_scatter"


def zero(batch: int, masks: int, tokens: int) -> MaskPlan:
    """Nothing is kept."""
    return MaskPlan.from_mask(torch.ones(batch, masks, tokens, dtype=torch.bool))


def noise(plan: MaskPlan, width: int, dtype=torch.float32, **options) -> torch.Tensor:
    """[R, T, D] of zeros and noise, of deviation one unless it is given."""
    x = torch.zeros(plan.rows, plan.width, width, dtype=dtype)
    return pyeff.ops.multimask_scatter(x, plan, **{"noise_std": 1.0, **options})


# Of Random123's file of known answers, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_ten_rounds(monkeypatch, counter, key, expected):
    """Seven rounds are the first seven of these."""
    monkeypatch.setattr(_philox, "ROUNDS", 10)
    seed = key[0] | key[1] << 32
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    found = _philox.words(seed, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in found) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("width", [1, 4, 9, 30])
def test_the_noise_is_the_definitions(backend, width, seed):
    """To the rounding of a logarithm, a root and a cosine in float32."""
    call = make_scatter(make_plan(2, 3, 11), width, noise=1.0, seed=seed - 5 if seed == 2**63 - 1 else seed + 0)
    call = call.but(seed=seed)
    check_call(call, [])
    found = call()[call.plan.hidden().flatten(0, 1)].double()
    exact = exact_normals(call)[call.plan.hidden().flatten(0, 1)]
    assert helpers.error(found, exact) <= helpers.rounding(torch.float32, 1, exact.abs().max().item())


@dtypes
def test_statistics(native, dtype):
    """Mean, deviation, skewness and kurtosis of a million numbers; their tails; nothing in common with neighbours."""
    std = 0.5
    found = noise(zero(2, 4, 125), 1000, dtype, noise_std=std, seed=3).double()
    flat, count = found.flatten() / std, found.numel()
    assert abs(flat.mean()) < 5 / math.sqrt(count)
    assert abs(flat.square().mean() - 1) < 5 * math.sqrt(2 / count) + 2 * torch.finfo(dtype).eps
    assert abs(flat.pow(3).mean()) < 5 * math.sqrt(15 / count)
    assert abs(flat.pow(4).mean() - 3) < 5 * math.sqrt(96 / count) + 16 * torch.finfo(dtype).eps
    for limit in (1.0, 2.0, 3.0):
        share = math.erfc(limit / math.sqrt(2))
        slack = torch.finfo(dtype).eps * limit  # rounding moves a few across
        assert abs((flat.abs() > limit).double().mean() - share) < 5 * math.sqrt(share / count) + slack
    for shifted in (found.roll(1, 0), found.roll(1, 1), found.roll(1, 2), found.roll(4, 2), found.roll(4, 0)):
        assert abs((found * shifted).mean() / std**2) < 5 / math.sqrt(count)


def test_neither_repeats_nor_holes(backend):
    """Other samples, students, tokens and channels have other numbers, and so have other seeds."""
    found = torch.stack([noise(zero(2, 3, 9), 8, seed=seed) for seed in (0, 1, 2**32, -1)])
    assert len(found.unique()) > 0.99 * found.numel()
    assert found.isfinite().all()
    assert (found != 0).all()


def test_the_layout_of_the_batch_does_not_matter(backend):
    """Named samples have their noise wherever they are, in batches of any size, with more students beside them."""
    names = torch.tensor([7, 3, 2**40 + 1, -9])
    plan = zero(4, 3, 9)
    whole = noise(plan, 10, seed=4, sample_ids=names).view(4, 3, 9, 10)
    for order in ([0, 1, 2, 3], [3, 1], [2], [1, 1, 0]):
        part = noise(zero(len(order), 3, 9), 10, seed=4, sample_ids=names[order])
        assert torch.equal(part.view(len(order), 3, 9, 10), whole[order])
    assert torch.equal(noise(zero(4, 2, 9), 10, seed=4, sample_ids=names).view(4, 2, 9, 10), whole[:, :2])
    assert torch.equal(noise(zero(4, 3, 5), 10, seed=4, sample_ids=names).view(4, 3, 5, 10), whole[:, :, :5])
    # Without names they are numbered.
    assert torch.equal(noise(plan, 10), noise(plan, 10, sample_ids=torch.arange(4)))


def test_what_is_kept_does_not_matter(backend):
    """A token has the same noise under every plan that hides it."""
    plan = make_plan(2, 3, 13, lengths=[13, 13])
    hidden = plan.hidden().flatten(0, 1)
    assert torch.equal(noise(plan, 10)[hidden], noise(zero(2, 3, 13), 10)[hidden])
    assert not noise(plan, 10)[~hidden].any()


def test_seeds(backend):
    """A number and a tensor of it give the same; of 64 bits each one counts."""
    plan = zero(1, 2, 5)
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        expected = noise(plan, 8, seed=seed)
        for shape in ((), (1,), (1, 1)):
            assert torch.equal(noise(plan, 8, seed=torch.full(shape, seed)), expected)
        assert not torch.equal(noise(plan, 8, seed=seed ^ 1), expected)
        assert not torch.equal(noise(plan, 8, seed=seed ^ (1 << 40)), expected)
    again = torch.tensor(5)
    first = noise(plan, 8, seed=again)
    assert torch.equal(noise(plan, 8, seed=again), first)
    assert again == 5


def test_the_default_generator_is_left_alone(backend):
    before = torch.get_rng_state()
    noise(zero(1, 2, 5), 8)
    assert torch.equal(torch.get_rng_state(), before)


@dtypes
def test_noise_and_fill_are_rounded_once(backend, dtype):
    """Their sum in float32, then the dtype; not a sum of two rounded numbers."""
    call = make_scatter(make_plan(2, 3, 11), fill="TD", noise=0.7, dtype=dtype, traps=False)
    call = call.but(x=torch.zeros_like(call.first))
    hidden = call.plan.hidden().flatten(0, 1)
    truth = (call.tensors["fill"].double().expand(6, 11, 9) + 0.7 * exact_normals(call))[hidden]
    found = call()[hidden].double()
    # Half of a unit in the last place, and what float32 adds.
    half = truth.abs() * torch.finfo(dtype).eps / 2
    noise_error = helpers.rounding(torch.float32, 1, 5.0)
    assert ((found - truth).abs() <= half + noise_error).all()


def test_no_deviation_no_noise(backend):
    assert not noise(zero(2, 2, 5), 8, noise_std=0.0).any()
    tiny = noise(zero(2, 2, 5), 8, noise_std=1e-30)
    assert tiny.any()
    torch.testing.assert_close(tiny * 1e30, noise(zero(2, 2, 5), 8), rtol=1e-5, atol=0)
