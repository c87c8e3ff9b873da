"""The model of the multimask family's GPU kernels: amounts by hand, the floor below every prediction, its tables."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks import model, multimask_model, multimask_plan, plans, predictions
from benchmarks.gpus import CARDS
from benchmarks.multimask_model import Shape, Step

H200 = CARDS["h200"]
SHAPES = [shape for op in multimask_plan.FAMILIES for shape in multimask_plan.shapes(op)]


def shape(op: str, **options) -> Shape:
    return Shape(op, "some", 2, 10, 3, 4, 5, width=16, **options)


def plan_of(backend, shape, card):
    """What a backend launches, where this machine can tell: Triton's needs Triton."""
    try:
        return multimask_plan.plan(backend, shape, card)
    except plans.NoPlan as reason:
        if backend == "cuda":
            raise
        pytest.skip(str(reason))


def launches(op, name="image", training=False, card=H200, **options):
    """The CUDA launches at one of the settings: (name, blocks) of each, and the steps of the model."""
    one = dataclasses.replace(Shape(op, name, *multimask_plan.SETTINGS[name], training=training), **options)
    steps = multimask_plan.plan("cuda", one, card)
    return [(step.name.removeprefix("multimask_"), step.blocks) for step in steps], steps


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


@pytest.mark.parametrize("backend", predictions.BACKENDS)
@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_no_prediction_is_below_the_floor(card, backend):
    for one in SHAPES:
        found = multimask_model.predict(one, plan_of(backend, one, card), card)
        assert all(math.isfinite(p.seconds) and p.seconds > 0 for p in found)
        assert model.total(found) > multimask_model.floor_seconds(one, card), one


@pytest.mark.parametrize("backend", predictions.BACKENDS)
def test_a_backward_pass_launches_more(backend):
    for one in SHAPES:
        if not one.training:
            continue
        kernels = [step.kernel for step in plan_of(backend, one, H200)]
        expected = {
            "multimask_gather": ["gather", "sum"],
            "multimask_scatter": ["scatter", "gather from rows"],
            "multimask_relative_bias": ["bias", "bias gradient", "add"],
        }
        assert kernels == expected[one.op]


def test_what_waits_is_counted_for_triton_as_it_loops():
    """A program of the loss has three tiles of tokens and passes the masks by eight; one of slopes has all heads."""

    def rounds(op, name, training=False):
        one = Shape(op, name, *multimask_plan.SETTINGS[name], training=training)
        return {step.kernel: step.rounds for step in plan_of("triton", one, H200)}

    assert rounds("multimask_loss", "image") == {"loss": 3 * 2 * 2, "finish": 3}
    assert rounds("multimask_gather", "image", True) == {"gather": 0, "sum": 2 * 2}
    assert rounds("multimask_relative_bias", "audio", True) == {"bias": 0, "bias gradient": 12, "add": 4}


def test_cuda_moves_tokens_by_vectors():
    # 96 vectors a token. Four of a thread are gathered, two scattered, one is added.
    gather, scatter = -(-8 * 16 * 39 * 96 // 1024), 8 * 16 * 196 * 96 // 512
    found, _ = launches("multimask_gather", training=True)
    assert found == [("gather_kernel<bf16, true>", gather), ("sums_kernel<bf16, true>", 8 * 196 * 96 // 256)]
    found, _ = launches("multimask_scatter", training=True)
    assert found == [("scatter_kernel<bf16, true>", scatter), ("gather_kernel<bf16, true>", gather)]
    found, _ = launches("multimask_gather", dtype="float32")
    assert found == [("gather_kernel<float, true>", 2 * gather)]
    with pytest.raises(plans.NoPlan, match="whole vectors"):
        launches("multimask_gather", width=100)


def test_cuda_cuts_targets_as_their_tokens_and_the_processors_want_it():
    # Two vectors wide where wider ones were fewer than two for each of 132 processors.
    found, steps = launches("multimask_targets")
    assert found == [("targets_slice<bf16, true, 2>", 8 * 48), ("targets_warp<float, true>", 8 * 196 // 8)]
    # Each number passes four times; of 256 threads' eight, four shuffles for each of two sums.
    assert steps[0].shared == 10 * (4 * 2 * 8 * 196 * 768 + 8 * 48 * 256 * 8 * 4 * 4 * 2)
    assert launches("multimask_targets", batch=16)[0][0] == ("targets_slice<bf16, true, 4>", 16 * 24)
    assert launches("multimask_targets", batch=64)[0][0] == ("targets_slice<bf16, true, 8>", 64 * 12)
    # Longer sequences than 1024 tokens do not stay on the chip: parts of 256 tokens first.
    found, steps = launches("multimask_targets", "audio", tokens=1025)
    assert found == [
        ("targets_part<bf16, true, false>", 2 * 5 * 12 * 8),
        ("targets_whole<false>", 8 * 2 * 768 // 256),
        ("targets_apply<bf16, true>", -(-2 * 1025 * 96 // 256)),
    ]
    one = Shape("multimask_targets", "audio", 2, 1025, 8, 8, 500)
    layers, statistics = 8 * 2 * 2 * 1025 * 768, 12 * 8 * 2 * 768
    part, whole, apply = (multimask_model.work(one, step, H200) for step in steps)
    assert (part.l2_bytes, whole.l2_bytes) == (layers + 5 * statistics, 6 * statistics)
    # What is read again comes from L2 while half of that holds it: the H200's does, the A100's does not.
    assert (part.hbm_bytes, apply.hbm_bytes) == (layers, 4 * 2 * 1025 * 768)
    assert multimask_model.work(one, steps[2], CARDS["a100"]).hbm_bytes == layers + 4 * 2 * 1025 * 768
    with pytest.raises(plans.NoPlan, match="32 layers"):
        launches("multimask_targets", layers=33)


def test_cuda_adds_the_loss_in_two_stages():
    # Three blocks for each processor, of 192 threads with four channels each; then sums of 32 moments a block.
    found, steps = launches("multimask_loss")
    assert found == [("loss_channels<bf16, true, true>", 396), ("loss_total<double>", 1), ("loss_moments<double>", 97)]
    # Four tokens a block, sixteen masks by eight, an index and what it says; fifty numbers by four.
    assert [step.rounds for step in steps] == [4 * 2 * 2, 1, 13]
    assert launches("multimask_loss", batch=1)[0][0][1] == 196


def test_cuda_makes_distances_for_all_heads_at_once():
    found, steps = launches("multimask_relative_bias", "audio", True)
    blocks = 16 * -(-500 * 500 // 2048)
    assert found == [("bias_kernel<bf16>", blocks), ("bias_backward_kernel<bf16>", blocks), ("bias_sum_kernel", 12)]
    assert [step.rounds for step in steps] == [0, 12, 2]
    # Few rows: a block for each head.
    found, steps = launches("multimask_relative_bias", "audio", True, batch=1, masks=1, kept=100)
    assert found[0][1] == 5 * 12
    assert steps[1].rounds == 1


def test_cuda_draws_a_row_a_block_and_averages_by_tensors():
    for tokens, inside in ((196, "true"), (18_000, "true"), (20_000, "false")):
        assert launches("block_mask", tokens=tokens)[0] == [(f"draw_kernel<{inside}>", 8 * 16)]
    square = 768 * 768
    assert launches("ema_update_")[0] == [("ema_kernel", 12 * ((4 + 3 + 4 + 1) * square // 4096 + 1))]


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_a_cuda_launch_fits_as_often_as_the_resource_table_says_or_more(card):
    """The table has the most threads and shared memory that a kernel is launched with."""
    for one in SHAPES:
        for step in multimask_plan.plan("cuda", one, card):
            assert step.blocks_per_sm >= plans.resources(step.name, card)[1], (one, step)


def test_its_tables_are_marked_as_predictions():
    found = predictions.rows(H200, "image", "multimask_gather")
    assert {row.label for row in found} == {"image gather"}
    for table in (*predictions.tables(found), *predictions.details(found)):
        assert table.title.startswith("PREDICTION, not a measurement: multimask_gather")
    assert "docs/multimask.md" in "\n".join(predictions.notes(found))
