"""The model of the multimask family's GPU kernels: amounts by hand, the floor below every prediction, its tables."""

from __future__ import annotations

import math

import pytest

from benchmarks import model, multimask_model, multimask_plan, plans, predictions
from benchmarks.gpus import CARDS
from benchmarks.multimask_model import Shape, Step

H200 = CARDS["h200"]
SHAPES = [shape for op in multimask_plan.FAMILIES for shape in multimask_plan.shapes(op)]


def shape(op: str, **options) -> Shape:
    return Shape(op, "some", 2, 10, 3, 4, 5, width=16, **options)


def plan_of(shape, card):
    """What Triton launches, where this machine can tell: it needs Triton, and its kernels in the resource table."""
    try:
        return multimask_plan.plan("triton", shape, card)
    except plans.NoPlan as reason:
        pytest.skip(str(reason))


def test_floors_are_those_by_hand():
    sample, rows, slots = 2 * 10 * 16, 2 * 3 * 10 * 16, 2 * 3 * 5 * 16
    for training, twice in ((False, 1), (True, 2)):
        assert multimask_model.least(shape("multimask_gather", training=training)) == twice * 2 * (sample + slots)
    assert multimask_model.least(shape("multimask_targets")) == sample * (4 * 2 + 4)
    assert multimask_model.least(shape("multimask_scatter", training=True)) == 2 * (rows + 3 * slots)
    assert multimask_model.least(shape("multimask_loss", dtype="float32")) == 4 * (sample + rows - slots + rows)
    assert multimask_model.least(shape("multimask_relative_bias", heads=2)) == 2 * 2 * 3 * 2 * 5 * 5
    assert multimask_model.least(shape("block_mask")) == 4 * 2 * 3 * (10 + 5)
    assert multimask_model.least(shape("ema_update_", parameters=7)) == 12 * 7


def test_amounts_of_launches_are_those_by_hand():
    sample, rows, slots = 2 * 10 * 16, 2 * 3 * 10 * 16, 2 * 3 * 5 * 16
    gather = multimask_model.work(shape("multimask_gather"), Step("gather", 8, 4), H200)
    assert (gather.blocks, gather.hbm_bytes, gather.l2_bytes) == (8, 2 * (sample + slots), 4 * slots)
    scatter = multimask_model.work(shape("multimask_scatter"), Step("scatter", 8, 4), H200)
    assert scatter.hbm_bytes == 2 * (rows + slots)
    assert scatter.sfu_ops == 2 * (rows - slots)
    loss = multimask_model.work(shape("multimask_loss"), Step("loss", 6, 2), H200)
    assert loss.l2_bytes == 4 * sample + 2 * (2 * rows - slots) + 4 * 6
    moments = multimask_model.work(shape("multimask_loss"), Step("loss", 6, 2, groups=3, moments=True), H200)
    assert moments.l2_bytes - loss.l2_bytes == 8 * 3 * 4 * 16 - 4 * 6


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_no_prediction_is_below_the_floor(card):
    for one in SHAPES:
        found = multimask_model.predict(one, plan_of(one, card), card)
        assert all(math.isfinite(p.seconds) and p.seconds > 0 for p in found)
        assert model.total(found) > multimask_model.floor_seconds(one, card), one


def test_a_backward_pass_launches_more():
    for one in SHAPES:
        if not one.training:
            continue
        kernels = [step.kernel for step in plan_of(one, H200)]
        expected = {
            "multimask_gather": ["gather", "sum"],
            "multimask_scatter": ["scatter", "gather from rows"],
            "multimask_relative_bias": ["bias", "bias", "add"],
        }
        assert kernels == expected[one.op]


def test_cuda_has_no_plan_yet_and_says_so():
    with pytest.raises(plans.NoPlan, match="csrc/cuda/multimask"):
        multimask_plan.plan("cuda", SHAPES[0], H200)


def test_its_tables_are_marked_as_predictions():
    found = predictions.rows(H200, "image", "multimask_gather")
    assert {row.label for row in found} == {"image gather"}
    for table in (*predictions.tables(found), *predictions.details(found)):
        assert table.title.startswith("PREDICTION, not a measurement: multimask_gather")
    assert "docs/multimask.md" in "\n".join(predictions.notes(found))
