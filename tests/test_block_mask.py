"""Masks of blocks: exact counts, the same bits on every backend and in every batch, blocks that are blocks."""

from __future__ import annotations

import pytest
import torch

import pyeff
from tests import places
from tests.helpers import says
from tests.test_multimask_plan import check_plan, same

OPERATION = "block_mask"
# The settings of the paper's image, audio and text encoders, and corner cases.
CASES = {
    "image": ((14, 14), {"keep": 0.2, "adjust": 0.07, "length": 3}),
    "audio": ((500,), {"keep": 0.5, "adjust": 0.05, "length": 5, "inverse": False}),
    "text": ((512,), {"keep": 0.52, "adjust": 0.0, "length": 1, "inverse": False}),
    "one token": ((1,), {"keep": 1.0, "adjust": 0.0, "length": 1}),
    "one line": ((1, 9), {"keep": 0.5, "adjust": 0.1, "length": 3}),
    "one column": ((9, 1), {"keep": 0.5, "adjust": 0.1, "length": 3, "inverse": False}),
    "nothing kept": ((37,), {"keep": 0.0, "adjust": 0.1, "length": 4}),
    "nothing hidden": ((37,), {"keep": 1.0, "adjust": 0.0, "length": 4, "inverse": False}),
    "no centre": ((40,), {"keep": 0.5, "adjust": -0.5, "length": 4}),
    "fewer than no centres": ((40,), {"keep": 0.5, "adjust": -5.0, "length": 4}),
    "blocks of everything": ((5, 7), {"keep": 0.3, "adjust": 0.9, "length": 50}),
    "an even block": ((6, 9), {"keep": 0.3, "adjust": 0.2, "length": 2}),
    "a length that no lane divides": ((1023,), {"keep": 0.37, "adjust": 0.02, "length": 7}),
    "many centres": ((63,), {"keep": 0.4, "adjust": 9.0, "length": 2}),
}
cases = pytest.mark.parametrize("case", CASES)


def draw(case: str, batch: int = 2, masks: int = 3, where=pyeff.ops, **more) -> pyeff.MaskPlan:
    shape, options = CASES[case]
    return where.block_mask(batch, masks, shape, **{**options, "device": places.here().device, **more})


@cases
def test_counts_and_bits(backend, case):
    """Each row keeps exactly int(T keep), and every backend draws the definition's masks."""
    shape, options = CASES[case]
    tokens = shape[0] * (shape[1] if len(shape) == 2 else 1)
    for seed in (0, -3):
        plan = draw(case, seed=seed)
        check_plan(plan.to("cpu"))
        assert (plan.tokens, plan.rows, plan.width) == (tokens, 6, max(int(tokens * options["keep"]), 1))
        assert set(plan.keep_len.tolist()) == {int(tokens * options["keep"])}
        assert same(plan, draw(case, where=pyeff.reference, seed=seed))


def test_lengths(backend):
    """Each sample's own count; blocks and single tokens are drawn within what is no padding."""
    lengths = torch.tensor([500, 0, 1, 2, 77, 499])
    for case in ("audio", "text"):
        tokens, keep = CASES[case][0][0], CASES[case][1]["keep"]
        plan = draw(case, 6, 2, lengths=lengths)
        check_plan(plan.to("cpu"))
        expected = [int(n * keep) for n in lengths.tolist() for _ in range(2)]
        assert plan.keep_len.tolist() == expected
        assert same(plan, draw(case, 6, 2, where=pyeff.reference, lengths=lengths))
        assert plan.tokens == tokens
        # A sample has the masks that it would have in a batch of its own.
        alone = draw(case, 1, 2, lengths=lengths[4:5], sample_ids=torch.tensor([4]))
        assert torch.equal(alone.inverse, plan.inverse[8:10])


@pytest.mark.parametrize("case", ["image", "audio", "text"])
def test_the_layout_of_the_batch_does_not_matter(backend, case):
    names = torch.tensor([7, 3, 2**40 + 1, -9])
    whole = draw(case, 4, seed=4, sample_ids=names).inverse.view(4, 3, -1)
    for order in ([0, 1, 2, 3], [3, 1], [2]):
        part = draw(case, len(order), seed=4, sample_ids=names[order])
        assert torch.equal(part.inverse.view(len(order), 3, -1), whole[order])
    assert torch.equal(draw(case, 4, 2, seed=4, sample_ids=names).inverse.view(4, 2, -1), whole[:, :2])
    assert same(draw(case), draw(case, sample_ids=torch.arange(2)))
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 12, "masks repeat"


def test_seeds(backend):
    expected = draw("image", seed=-1)
    for shape in ((), (1,)):
        assert same(draw("image", seed=torch.full(shape, -1)), expected)
    for other in (-2, 2**63 - 1, 0):
        assert not same(draw("image", seed=other), expected)


@pytest.mark.parametrize("inverse", [True, False])
def test_blocks(backend, inverse):
    """With a length of 5 what is drawn hangs together: far more neighbours than single tokens have."""

    def neighbours(length: int) -> float:
        plan = pyeff.ops.block_mask(4, 8, (400,), keep=0.5, adjust=0.05, length=length, inverse=inverse)
        drawn = plan.inverse >= 0 if inverse else plan.inverse < 0
        return (drawn[:, 1:] & drawn[:, :-1]).double().mean().item()

    assert neighbours(1) == pytest.approx(0.25, abs=0.01)
    assert neighbours(5) > 0.33


def test_every_token_has_its_turn(backend):
    """Over many masks each token of a sequence is kept about as often as another, but for borders."""
    plan = pyeff.ops.block_mask(8, 64, (64,), keep=0.5, adjust=0.0, length=1)
    often = (plan.inverse >= 0).double().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 512) ** 0.5
    image = pyeff.ops.block_mask(8, 64, (8, 8), keep=0.3, adjust=0.1, length=3)
    often = (image.inverse >= 0).double().mean(0)
    assert often.min() > 0.15
    assert often.max() < 0.45


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_thread_count_changes_no_bit(cpu_kernels, count):
    threads = torch.get_num_threads()
    expected = draw("image", 5, 7)
    try:
        torch.set_num_threads(count)
        assert same(draw("image", 5, 7), expected)
    finally:
        torch.set_num_threads(threads)


def test_where_the_plan_is(native):
    device = places.here().device
    for given in ({"lengths": torch.tensor([9, 5])}, {"sample_ids": torch.tensor([3, 4])}, {"seed": torch.tensor(1)}):
        plan = pyeff.ops.block_mask(2, 3, (9,), keep=0.5, adjust=0.1, length=2, **given)
        assert plan.inverse.device.type == device
    with pyeff.backend("auto"):
        plan = pyeff.ops.block_mask(2, 3, (9,), keep=0.5, adjust=0.1, length=2, device="meta")
    assert plan.inverse.device.type == "meta"
    assert plan.ids_keep.shape == (6, 4)


BAD = {
    "no samples": ({"B": 0}, "B is 0", "at least 1"),
    "no students": ({"M": 0}, "M is 0", "at least 1"),
    "a share of a student": ({"M": 1.5}, "M is 1.5", "expected integers"),
    "B true": ({"B": True}, "B is True", "expected integers"),
    "no dimension": ({"shape": ()}, "shape is ()", "(T,) or (H, W)"),
    "three dimensions": ({"shape": (2, 3, 4)}, "shape is (2, 3, 4)", "(T,) or (H, W)"),
    "shape a number": ({"shape": 9}, "shape is 9", "(T,) or (H, W)"),
    "no tokens": ({"shape": (0,)}, "shape is 0", "at least 1"),
    "too many tokens": ({"shape": (2**16, 2**16)}, "shape is (65536, 65536)", "2^30"),
    "too many students": ({"M": 2**30}, "M 1073741824", "2^30"),
    "keep above one": ({"keep": 1.5}, "keep is 1.5", "from 0 to 1"),
    "keep negative": ({"keep": -0.1}, "keep is -0.1", "from 0 to 1"),
    "keep no number": ({"keep": float("nan")}, "keep is nan", "from 0 to 1"),
    "keep a tensor": ({"keep": torch.tensor(0.5)}, "keep is tensor", "expected a finite number"),
    "adjust infinite": ({"adjust": float("inf")}, "adjust is inf", "expected a finite number"),
    "no length": ({"length": 0}, "length is 0", "at least 1"),
    "too long": ({"length": 2**30}, "length is 1073741824", "less than 2^30"),
    "far too long": ({"length": 2**70}, "length is 1180591620717411303424", "less than 2^30"),
    "seed too large": ({"seed": 2**63}, "seed is 9223372036854775808", "64 bits"),
    "seed a float": ({"seed": 1.0}, "seed is a float", "expected an integer"),
    "seed true": ({"seed": True}, "seed is a bool", "expected an integer"),
    "seeds": ({"seed": torch.tensor([1, 2])}, "seed is torch.int64 [2]", "expected one int64"),
    "seed of int32": ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed is torch.int32", "expected one int64"),
    "names too few": ({"sample_ids": torch.tensor([1])}, "sample_ids is torch.int64 [1]", "expected int64 [2]"),
    "names of int32": ({"sample_ids": torch.arange(2, dtype=torch.int32)}, "sample_ids is torch.int32", "int64 [2]"),
    "names a list": ({"sample_ids": [1, 2]}, "sample_ids is a list", "expected int64 [2]"),
    "lengths too long": ({"lengths": torch.tensor([9, 10])}, "lengths has values outside of 0 to 9"),
    "lengths of a grid": ({"shape": (3, 3), "lengths": torch.tensor([9, 9])}, "lengths was given", "none but for (T,)"),
    "names elsewhere": (
        {"sample_ids": torch.zeros(2, dtype=torch.int64, device="meta"), "device": "cpu"},
        "sample_ids is", "meta", "cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_name_the_argument(case):
    change, *said = BAD[case]
    given = {"B": 2, "M": 3, "shape": (9,), "keep": 0.5, "adjust": 0.1, "length": 2, **change}
    with pytest.raises(ValueError, match=says("block_mask", *said)):
        pyeff.ops.block_mask(given.pop("B"), given.pop("M"), given.pop("shape"), **given)


def test_lengths_that_no_kernel_takes(native):
    """By every backend, through the op itself too."""
    with pytest.raises(ValueError, match=says("block_mask", "length is 1073741824", "less than 2^30")):
        pyeff.ops.block_mask(2, 3, (9,), keep=0.5, length=2**30)
    seed, lengths = torch.tensor(1), torch.tensor([9, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=says("block_mask", "length is 1073741824", "less than 2^30")):
        torch.ops.pyeff.block_mask(seed, None, lengths, 3, 9, 0, 0.5, 0.2, 2**30, True, 4, backend=native)
    assert pyeff.ops.block_mask(2, 3, (9,), keep=0.5, length=2**30 - 1).width == 4


def test_no_centres_more_by_default(native):
    options = {"keep": 0.5, "length": 2, "seed": 3, "device": places.here().device}
    expected = pyeff.ops.block_mask(2, 3, (9,), adjust=0.0, **options)
    assert same(pyeff.ops.block_mask(2, 3, (9,), **options), expected)
    assert same(pyeff.reference.block_mask(2, 3, (9,), **options), expected)


@pytest.mark.parametrize("where", [pyeff.ops, pyeff.reference], ids=["ops", "reference"])
def test_seeds_of_other_kinds(where):
    """Whatever counts as an index; what is true or false does not."""
    numpy = pytest.importorskip("numpy")

    class Seven:
        def __index__(self):
            return 7

    def masks(seed):
        return where.block_mask(2, 3, (9,), keep=0.5, length=2, seed=seed)

    for seed in (numpy.int64(7), numpy.uint8(7), Seven()):
        assert same(masks(seed), masks(7))
    assert same(masks(numpy.int64(-1)), masks(-1))
    for seed in (True, numpy.bool_(True), 7.0, "7", None):
        with pytest.raises(ValueError, match=says("block_mask", f"seed is a {type(seed).__name__}", "an integer")):
            masks(seed)
    with pytest.raises(ValueError, match="64 bits"):
        masks(numpy.uint64(2**63))
