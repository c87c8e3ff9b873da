"""Plans: what they hold, how they are made, moved, copied and stored, and what makes none."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyeff
from pyeff import MaskPlan
from tests.helpers import says
from tests.multimask_calls import make_plan

PARTS = ("ids_keep", "keep_len", "inverse", "lengths")


def parts(plan: MaskPlan) -> list[torch.Tensor]:
    return [getattr(plan, name) for name in PARTS]


def same(a: MaskPlan, b: MaskPlan) -> bool:
    return a.prefix == b.prefix and all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def check_plan(plan: MaskPlan) -> None:
    """Ids rise and are where the inverse says; past what a row keeps they are zero; padding is not kept."""
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in parts(plan))
    assert plan.ids_keep.shape == (plan.rows, plan.width)
    assert plan.inverse.shape == (plan.rows, plan.tokens)
    assert plan.keep_len.shape == (plan.rows,) == (plan.batch * plan.masks,)
    for row in range(plan.rows):
        count, length = int(plan.keep_len[row]), int(plan.lengths[row // plan.masks])
        ids = plan.ids_keep[row, :count].tolist()
        assert ids == sorted(set(ids))
        assert all(0 <= i < length for i in ids)
        assert not plan.ids_keep[row, count:].any()
        expected = torch.full((plan.tokens,), -1, dtype=torch.int32)
        expected[ids] = torch.arange(count, dtype=torch.int32)
        assert torch.equal(plan.inverse[row], expected)


def test_a_plan_by_hand():
    hidden = torch.tensor([[[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]]) > 0
    plan = MaskPlan.from_mask(hidden, torch.tensor([5, 3]))
    assert plan.ids_keep.tolist() == [[0, 3, 4], [0, 0, 0], [0, 1, 0], [0, 1, 2]]
    assert plan.keep_len.tolist() == [3, 0, 2, 3]
    assert plan.inverse.tolist() == [[0, -1, -1, 1, 2], [-1] * 5, [0, 1, -1, -1, -1], [0, 1, 2, -1, -1]]
    assert (plan.batch, plan.masks, plan.rows, plan.tokens, plan.width, plan.prefix) == (2, 2, 4, 5, 3, 0)
    assert plan.hidden().int().tolist() == [
        [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    ]  # fmt: skip
    assert plan.slots().int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert (plan.count(), plan.count().dtype) == (8, torch.int64)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 13), (3, 16, 7), (1, 2, 500)], ids=str)
@pytest.mark.parametrize("ragged", [True, False])
def test_plans_of_masks(size, ragged):
    plan = make_plan(*size, ragged=ragged)
    check_plan(plan)
    hidden = plan.hidden()
    assert same(MaskPlan.from_mask(hidden, plan.lengths), plan)
    assert plan.count() == hidden.sum()
    assert plan.slots().sum(1).tolist() == plan.keep_len.tolist()
    # What the mask says of padding does not matter.
    padding = torch.arange(plan.tokens) >= plan.lengths[:, None, None]
    assert same(MaskPlan.from_mask(hidden | padding, plan.lengths.long()), plan)


def test_width():
    """More slots than needed are empty; fewer cut the last tokens off, which are hidden then."""
    plan = make_plan()
    wide = MaskPlan.from_mask(plan.hidden(), plan.lengths, width=plan.width + 4)
    check_plan(wide)
    assert torch.equal(wide.ids_keep[:, : plan.width], plan.ids_keep)
    assert torch.equal(wide.inverse, plan.inverse)
    narrow = MaskPlan.from_mask(plan.hidden(), plan.lengths, width=2)
    check_plan(narrow)
    assert torch.equal(narrow.keep_len, plan.keep_len.clamp(max=2))
    assert torch.equal(narrow.ids_keep, plan.ids_keep[:, :2])
    assert narrow.count() == narrow.hidden().sum() > plan.count()


def test_no_token_and_nothing_kept():
    for hidden, lengths in ((torch.ones(2, 3, 4) > 0, None), (torch.ones(2, 3, 0) > 0, None),
                            (torch.zeros(2, 3, 4) > 0, torch.tensor([0, 0]))):  # fmt: skip
        plan = MaskPlan.from_mask(hidden, lengths)
        check_plan(plan)
        assert plan.width == 1
        assert not plan.keep_len.any()


def test_no_slot(backend):
    """A plan of K = 0, as its parts may say."""
    empty = torch.zeros(4, 0, dtype=torch.int32)
    plan = MaskPlan(empty, torch.zeros(4, dtype=torch.int32), torch.full((4, 5), -1, dtype=torch.int32),
                    torch.full((2,), 5, dtype=torch.int32))  # fmt: skip
    x = torch.randn(2, 5, 3, requires_grad=True)
    kept = pyeff.ops.multimask_gather(x, plan)
    assert kept.shape == (4, 0, 3)
    out = pyeff.ops.multimask_scatter(kept, plan, fill=torch.ones(3), noise_std=0.0)
    assert torch.equal(out, torch.ones(4, 5, 3))
    assert not torch.autograd.grad(out.sum() + kept.sum(), x)[0].any()


def test_plans_of_ids():
    """In any order, as predictors list them; some do not count; what is padding is not kept."""
    plan = make_plan(2, 3, 13, ragged=False)
    ids = plan.ids_keep.view(2, 3, -1).long()
    shuffled = ids[:, :, torch.randperm(plan.width)]
    for given in (ids, shuffled, shuffled.int()):
        assert same(MaskPlan.from_ids(given, 13), plan)
    ragged = make_plan(2, 3, 13)
    given = ragged.ids_keep.view(2, 3, -1)
    assert same(MaskPlan.from_ids(given, 13, ragged.keep_len.view(2, 3), ragged.lengths), ragged)
    short = MaskPlan.from_ids(ids, 13, lengths=torch.tensor([13, 4]))
    check_plan(short)
    assert (short.keep_len[3:] <= 4).all()


@pytest.mark.parametrize("number", [-1, 5])
def test_plans_of_ids_whose_counts_are_out_of_range(number):
    """On a GPU, which nobody waits for, they are brought into their range; so they are while tracing."""
    ids = make_plan(2, 3, 13, ragged=False).ids_keep.view(2, 3, -1)[..., :4].contiguous()
    counts = torch.full((2, 3), 2)
    assert MaskPlan.from_ids(ids, 13, counts).keep_len.tolist() == [2] * 6
    counts[1, 1] = number
    with pytest.raises(ValueError, match=says("MaskPlan.from_ids", "keep_len has values outside of 0 to 4")):
        MaskPlan.from_ids(ids, 13, counts)
    with pytest.raises(ValueError, match=says("MaskPlan.from_ids", "lengths has values outside of 0 to 13")):
        MaskPlan.from_ids(ids, 13, lengths=torch.tensor([13, 14 if number > 0 else -1]))
    plan = torch.compile(MaskPlan.from_ids, backend="eager")(ids, 13, counts)
    check_plan(plan)
    assert int(plan.keep_len[4]) == min(max(number, 0), 4)


def test_prefix():
    plan = make_plan()
    found = plan.with_prefix(2)
    check_plan(found)
    assert (found.prefix, found.tokens, found.width) == (2, plan.tokens + 2, plan.width + 2)
    assert torch.equal(found.hidden()[..., 2:], plan.hidden())
    assert not found.hidden()[..., :2].any()
    assert found.count() == plan.count()
    assert same(plan.with_prefix(1).with_prefix(1), found)
    assert same(plan.with_prefix(0), plan)


def test_copies():
    """A deep copy, a pickle and a stored file are the same plan with memory of its own; a copy is shallow."""
    plan, file = make_plan().with_prefix(1), io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), torch.load(file, weights_only=False)):
        assert isinstance(other, MaskPlan)
        assert same(other, plan)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(parts(other), parts(plan), strict=True))
    assert all(a is b for a, b in zip(parts(copy.copy(plan)), parts(plan), strict=True))


def test_new_masks_in_place():
    """The tensors stay, so that whoever holds them sees the new masks."""
    plan, other = make_plan(ragged=False), make_plan(ragged=False, seed=1)
    held, pointers = plan.inverse, [t.data_ptr() for t in parts(plan)]
    assert not same(plan, other)
    assert plan.copy_(other) is plan
    assert same(plan, other)
    assert torch.equal(held, other.inverse)
    assert [t.data_ptr() for t in parts(plan)] == pointers
    for wrong in (make_plan(2, 3, 14, ragged=False), make_plan(3, 2, 13, ragged=False), other.with_prefix(1)):
        before = [t.clone() for t in parts(plan)]
        with pytest.raises(ValueError, match=says("MaskPlan.copy_", "other has", "expected (2, 3, 13,")):
            plan.copy_(wrong)
        assert all(torch.equal(a, b) for a, b in zip(parts(plan), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_copied(dtype):
    """What a plan is made of stays the caller's: neither changes with the other."""
    lengths, mask = torch.tensor([9, 5], dtype=dtype), torch.rand(2, 3, 9) < 0.5
    plan = MaskPlan.from_mask(mask, lengths, width=9)
    plan.copy_(MaskPlan.from_mask(mask, torch.tensor([4, 3]), width=9))
    assert lengths.tolist() == [9, 5]
    lengths.zero_()
    assert plan.lengths.tolist() == [4, 3]


def test_on_another_device():
    plan = make_plan().with_prefix(1)
    meta = plan.to("meta")
    assert [t.device.type for t in parts(meta)] == ["meta"] * 4
    assert (meta.batch, meta.masks, meta.tokens, meta.width, meta.prefix) == (2, 3, 14, plan.width, 1)
    assert meta.hidden().shape == (2, 3, 14)
    assert "on meta" in repr(meta)
    assert "prefix=1" in repr(plan)
    assert same(plan.to("cpu"), plan)
    x = torch.randn(2, 14, 4, device="meta")
    assert pyeff.ops.multimask_gather(x, meta).shape == (6, plan.width, 4)
    out = pyeff.ops.multimask_loss(torch.randn(6, 14, 4, device="meta"), x, meta)
    assert out.device.type == "meta"


def test_of_fake_tensors():
    """Made where there are no numbers, as under a tracer, if the width is given."""
    with FakeTensorMode():
        plan = MaskPlan.from_mask(torch.ones(2, 3, 13, dtype=torch.bool), torch.tensor([13, 9]), width=5)
        assert (plan.width, plan.tokens, plan.rows) == (5, 13, 6)
        assert plan.with_prefix(1).ids_keep.shape == (6, 6)
        assert pyeff.ops.multimask_gather(torch.empty(2, 13, 4), plan).shape == (6, 5, 4)
        ids = MaskPlan.from_ids(torch.zeros(2, 3, 4, dtype=torch.int64), 13)
        assert ids.inverse.shape == (6, 13)


MASK = torch.ones(2, 3, 5, dtype=torch.bool)
IDS = torch.arange(4).expand(2, 3, 4)
BAD = {
    "mask of integers": (lambda: MaskPlan.from_mask(MASK.int()), "mask is torch.int32 [2, 3, 5]", "expected bool"),
    "mask of two dimensions": (lambda: MaskPlan.from_mask(MASK[0]), "mask is torch.bool [3, 5]", "expected bool"),
    "mask of nobody": (lambda: MaskPlan.from_mask(MASK[:, :0]), "mask is torch.bool [2, 0, 5]", "expected bool"),
    "mask a list": (lambda: MaskPlan.from_mask([[True]]), "mask is a list", "expected bool"),
    "lengths of floats": (lambda: MaskPlan.from_mask(MASK, torch.ones(2)), "lengths is torch.float32 [2]", "integers"),
    "lengths too many": (
        lambda: MaskPlan.from_mask(MASK, torch.ones(3, dtype=torch.int64)), "lengths is", "[3]", "[2]",
    ),
    "lengths too long": (lambda: MaskPlan.from_mask(MASK, torch.tensor([5, 6])), "lengths has values outside", "5"),
    "lengths negative": (lambda: MaskPlan.from_mask(MASK, torch.tensor([-1, 5])), "lengths has values outside", "5"),
    "lengths a list": (lambda: MaskPlan.from_mask(MASK, [5, 5]), "lengths is a list", "expected integers [2]"),
    "lengths elsewhere": (lambda: MaskPlan.from_mask(MASK, torch.tensor([5, 5], device="meta")), "lengths is", "meta"),
    "width of nothing": (lambda: MaskPlan.from_mask(MASK, width=0), "width is 0", "expected at least 1"),
    "ids of floats": (lambda: MaskPlan.from_ids(IDS.float(), 5), "ids is torch.float32", "expected integers [B, M, K]"),
    "ids of two dimensions": (lambda: MaskPlan.from_ids(IDS[0], 5), "ids is torch.int64 [3, 4]", "expected"),
    "ids past the end": (lambda: MaskPlan.from_ids(IDS, 3), "ids are not each one of 0 to 2"),
    "ids negative": (lambda: MaskPlan.from_ids(IDS - 1, 5), "ids are not each one of 0 to 4"),
    "ids twice": (lambda: MaskPlan.from_ids(IDS // 2, 5), "ids are not", "at most once"),
    "no tokens": (lambda: MaskPlan.from_ids(IDS, 0), "tokens is 0", "expected at least 1"),
    "keep_len of another shape": (
        lambda: MaskPlan.from_ids(IDS, 5, torch.ones(6, dtype=torch.int64)), "keep_len is", "[6]", "[2, 3]",
    ),
    "negative prefix": (lambda: make_plan().with_prefix(-1), "count is -1", "expected at least 0"),
    "a prefix that is true": (lambda: make_plan().with_prefix(True), "count is True", "expected at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_plan(case):
    function, *said = BAD[case]
    with pytest.raises(ValueError, match=says("MaskPlan", *said)):
        function()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids_keep": torch.zeros(6, 4, dtype=torch.int64)}, "ids_keep is torch.int64"),
        ({"ids_keep": torch.zeros(5, 4, dtype=torch.int32)}, "ids_keep is torch.int32 [5, 4]"),
        ({"inverse": torch.zeros(6, dtype=torch.int32)}, "inverse is torch.int32 [6]"),
        ({"inverse": torch.zeros(5, 13, dtype=torch.int32)}, "inverse is torch.int32 [5, 13]"),
        ({"keep_len": torch.zeros(6, 1, dtype=torch.int32)}, "keep_len is torch.int32 [6, 1]"),
        ({"keep_len": torch.zeros(6, dtype=torch.int32, device="meta")}, "keep_len is torch.int32 [6] on meta"),
        ({"lengths": torch.zeros(4, dtype=torch.int32)}, "keep_len has 6 rows"),
        ({"lengths": torch.zeros(0, dtype=torch.int32)}, "keep_len has 6 rows"),
        ({"lengths": 13}, "lengths is a int"),
        ({"prefix": -1}, "prefix is -1"),
        ({"prefix": 14}, "prefix is 14"),
    ],
)
def test_parts_that_do_not_fit(change, said):
    given = {name: getattr(make_plan(), name) for name in PARTS}
    with pytest.raises(ValueError, match=says("MaskPlan", said, "expected")):
        MaskPlan(**{**given, **change})
