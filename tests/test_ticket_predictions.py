"""The model of the ticket's GPU kernels: amounts by hand, the floor below every prediction, random blocks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks import gpus, model, plans, predictions, ticket_model, ticket_plan
from benchmarks.gpus import CARDS
from benchmarks.ticket_model import Builder, Shape, Step

H200 = CARDS["h200"]
SHAPES = list(ticket_plan.shapes())


def plans_of(shape, card):
    """The plans that this machine can make: Triton's need Triton, and either its kernels in the resource table."""
    for backend in predictions.BACKENDS:
        try:
            yield backend, ticket_plan.plan(backend, shape, card)
        except plans.NoPlan:
            continue


def builder(kernel, shape=None, **step):
    shape = Shape(1024, 32, 0.25, "bfloat16", out=128, width=256) if shape is None else shape
    given = {"rows": 128, "columns": 32, "depth": 64, "threads": 128, "blocks_per_sm": 2, "instruction": gpus.WGMMA}
    given |= {"instruction": ""} if shape.dtype == "float32" else {}
    return Builder(shape, Step(kernel, **{**given, **step}), H200)


def test_amounts_of_a_product_are_those_by_hand():
    b = builder("product")  # 4 rows of blocks by 8 columns, 8 of them alive, two in the mean row
    work, steps = ticket_model.product(b), ticket_model.expected_steps(8, 0.25, 2)
    assert b.shape.blocks == 8
    assert work.blocks == 8 * 4
    assert work.tensor_flops == pytest.approx(2 * 32 * 128 * 32 * steps * 64)
    assert work.hbm_bytes == 2 * (1024 * 256 + 8 * 32 * 32 + 1024 * 128)
    assert work.l2_bytes == 2 * (32 * (128 + 32) * 2 * 32 + 1024 * 128)
    across = ticket_model.product(builder("product", along_columns=True))
    assert across.blocks == 8 * 8
    assert across.l2_bytes == 2 * (64 * (128 + 32) * 32 + 1024 * 256)
    tall = ticket_model.product(builder("product", columns=16))
    assert tall.blocks == 2 * work.blocks
    assert tall.tensor_flops == work.tensor_flops


def test_amounts_of_the_blocks_gradient_are_those_by_hand():
    b = builder("outer", splits=4)
    work, strips = ticket_model.outer(b), 4 * ticket_model.expected_steps(8, 0.25, 4)
    assert work.blocks == round(4 * strips)
    assert work.tensor_flops == pytest.approx(2 * strips * 128 * 32 * 1024)
    assert work.hbm_bytes == 2 * 1024 * (128 + 256) + 4 * 4 * 8 * 32 * 32
    assert work.l2_bytes == pytest.approx(2 * 1024 * (4 * 2 * 32 + strips * 32) + 4 * 4 * 8 * 32 * 32)
    whole = ticket_model.outer(builder("outer"))
    assert whole.hbm_bytes == 2 * 1024 * (128 + 256) + 2 * 8 * 32 * 32


def test_few_tokens_are_multiplied_by_multiply_adds():
    shape = Shape(3, 32, 0.25, "bfloat16", out=128, width=256)
    work = ticket_model.few(builder("few", shape, rows=4, depth=128))
    assert (work.tensor_flops, work.instruction) == (0, "")
    assert work.fma_flops >= ticket_model.least(shape)[0]
    assert work.hbm_bytes == 2 * (3 * 256 + 8 * 32 * 32 + 3 * 128)


def test_steps_of_random_blocks_are_those_that_are_drawn():
    drawn = torch.rand(200000, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    for joined in (1, 2, 8):
        mean = drawn.sum(1).add(joined - 1).div(joined, rounding_mode="floor").double().mean().item()
        assert ticket_model.expected_steps(24, 0.3, joined) == pytest.approx(mean, rel=0.01)
    assert ticket_model.expected_steps(24, 0.3, 1) == pytest.approx(24 * 0.3)
    assert ticket_model.expected_steps(24, 1.0, 5) == 5
    assert ticket_model.steps(Shape(1, 48, 1.0, "bfloat16", out=96, width=96), False, 32) == 4


def test_the_floor_is_that_of_the_page():
    shape = Shape(4096, 32, 0.3, "bfloat16")
    flops, moved = ticket_model.least(shape)
    assert flops == 2 * 4096 * 3072 * 768 * 0.3
    assert moved == 2 * (4096 * (3072 + 768) + 0.3 * 3072 * 768)
    assert ticket_model.floor_seconds(shape, H200) == max(flops / H200.tensor, moved / H200.copy)
    training = ticket_model.least(dataclasses.replace(shape, training=True))
    assert training[0] == 3 * flops
    assert training[1] == 2 * (4096 * (2 * 3072 + 3 * 768) + 3 * 0.3 * 3072 * 768)


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_no_prediction_is_below_the_floor(card):
    compared = 0
    for shape in SHAPES:
        for backend, plan in plans_of(shape, card):
            found = ticket_model.predict(shape, plan, card)
            assert model.total(found) > ticket_model.floor_seconds(shape, card), (backend, shape)
            assert all(math.isfinite(p.seconds) and p.seconds > 0 for p in found)
            done = sum(w.tensor_flops + w.fma_flops for w in ticket_model.works(shape, plan, card))
            assert done >= 0.99 * ticket_model.least(shape)[0], (backend, shape)
            compared += 1
    assert compared >= len(SHAPES)


def test_training_is_a_forward_and_all_gradients():
    for shape in SHAPES:
        for _, plan in plans_of(shape, H200):
            kernels = ["product" if step.kernel == "resident" else step.kernel for step in plan]
            product = "product" if shape.tokens >= 16 else "few"
            if not shape.training:
                assert kernels == [product]
                continue
            assert [k for k in kernels if k != "add"] == [product, "derive", product, "outer"]
            both = (product, "resident")
            assert [step.along_columns for step in plan if step.kernel in both] == [False, True]


class Everywhere(dict):
    """A resource table that has every kernel: 256 threads, two blocks, the matrix instruction of its name."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        matrix = "wgmma" if "wgmma" in name or "resident" in name else "mma"
        return ((256, 2, matrix),) * 4


def test_cuda_keeps_the_tokens_of_small_blocks_on_the_chip(monkeypatch):
    monkeypatch.setattr(plans, "RESOURCES", Everywhere())

    def kernels(tokens, block, dtype="bfloat16", card=H200, **more):
        shape = Shape(tokens, block, 0.3, dtype, True, **more)
        plan = ticket_plan.plan("cuda", shape, card)
        assert model.total(ticket_model.predict(shape, plan, card)) > ticket_model.floor_seconds(shape, card)
        return [step.kernel for step in plan if step.kernel not in ("derive", "add")]

    # 768 numbers of 128 tokens fit, 3072 do not.
    assert kernels(4096, 32) == kernels(512, 16) == ["resident", "product", "outer"]
    assert kernels(4096, 32, out=768, width=3072) == ["product", "resident", "outer"]
    assert kernels(4096, 32, out=768) == ["resident", "resident", "outer"]
    for other in ({"tokens": 511}, {"block": 128}, {"block": 8}, {"dtype": "float32"}, {"card": CARDS["b200"]}):
        assert kernels(**{"tokens": 4096, "block": 32, **other}) == ["product", "product", "outer"]
    assert kernels(15, 32) == ["few", "few", "outer"]


def test_amounts_of_tokens_on_the_chip_are_those_by_hand():
    b = builder("resident", rows=128, columns=32, splits=2, side_by_side=2)
    work = ticket_model.resident(b)
    assert work.blocks == 8 * 2
    assert work.tensor_flops == 2 * 1024 * 8 * 32 * 32
    assert work.l2_bytes == 2 * (16 * 128 * 256 + 8 * 8 * 32 * 32 + 1024 * 128)
    assert work.shared_bytes == 2 * (16 * 128 * 256 + 8 * 8 * 32 * (128 + 32 * 3))
    assert work.chain == pytest.approx(ticket_model.START + ticket_model.STEP * ticket_model.expected_steps(8, 0.25, 2))


def test_triton_launches_what_is_predicted():
    """The model's programs are those of the launches where all blocks are alive; else fewer strips have work."""
    pytest.importorskip("triton")
    for shape in (Shape(4096, 32, 0.3, "bfloat16", True), Shape(4096, 32, 1.0, "bfloat16", True)):
        plan = ticket_plan.plan("triton", shape, H200)
        grids = [math.prod(launch.grid) for launch in ticket_plan._recorded(shape, H200)]
        for grid, work in zip(grids, ticket_model.works(shape, plan, H200), strict=True):
            if work.kernel == "outer" and shape.density < 1:
                assert work.blocks < grid
            else:
                assert work.blocks == grid, work.kernel


def test_its_tables_are_marked_as_predictions():
    found = predictions.rows(H200, "b32 bfloat16 4096", "ticket")
    assert {row.label for row in found} == {"b32 0.3 4096", "b32 0.1 4096", "b32 0.5 4096"}
    for table in (*predictions.tables(found), *predictions.details(found)):
        assert table.title.startswith("PREDICTION, not a measurement: ticket_linear")
    notes = "\n".join(predictions.notes(found))
    assert "docs/ticket.md" in notes
    assert "docs/read.md" not in notes
    assert "a dense product at the card's rate, bfloat16 forward: 4096 tokens 24.5us" in notes
    assert predictions.rows(H200, "b32", "ticket_linear")
    with pytest.raises(ValueError, match="only for read, ticket"):
        predictions.rows(H200, "", "gemm")
