"""The model of the GPU kernels, and READ's: amounts by hand, units, the floor below every prediction, and where
predictions go."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from typer.testing import CliRunner

from benchmarks import gpus, model, plans, predictions, read_model, read_plan, report
from benchmarks.gpus import CARDS
from benchmarks.model import Work
from benchmarks.read_model import Builder, Shape, Step
from pyeff import cli

H200 = CARDS["h200"]
PRODUCT = Work("k", 132, 1, tensor_flops=1e12, instruction=gpus.WGMMA)


def plans_of(shape, card):
    """The plans that this machine can make: Triton's need Triton."""
    for backend in predictions.BACKENDS:
        try:
            yield backend, read_plan.plan(backend, shape, card)
        except plans.NoPlan:
            if backend == "cuda":
                raise


@pytest.mark.parametrize(
    ("term", "amount", "rate"),
    [
        ("memory", "hbm_bytes", H200.copy * model.MEMORY_SHARE),
        ("l2", "l2_bytes", H200.l2 * model.L2_SHARE),
        ("shared", "shared_bytes", 128 * H200.clock * H200.sms * model.SHARED_SHARE),
        ("fma", "fma_flops", H200.fma * model.FMA_SHARE),
        ("sfu", "sfu_ops", H200.fma / 16 * model.SFU_SHARE),
    ],
)
def test_a_term_is_an_amount_over_a_rate(term, amount, rate):
    found = model.predict(Work("k", H200.sms, 1, **{amount: 1e12}), H200)
    assert found.terms[term] == pytest.approx(1e12 / rate)
    assert {name for name, seconds in found.terms.items() if seconds} == {term}
    assert found.bound == term
    assert found.seconds == found.terms[term] + model.LAUNCH


def test_tensor_cores_run_at_the_rate_of_their_instruction():
    best = model.predict(PRODUCT, H200).terms["tensor"]
    assert best == pytest.approx(1e12 / (790e12 * model.PRODUCT_SHARE))
    older = model.predict(dataclasses.replace(PRODUCT, instruction=gpus.MMA), H200).terms["tensor"]
    assert older == pytest.approx(best / model.INSTRUCTION_SHARE[90, gpus.MMA])
    for instruction in ("", gpus.TCGEN05):
        with pytest.raises(ValueError, match="sm_90 has no"):
            model.predict(dataclasses.replace(PRODUCT, instruction=instruction), H200)


def test_the_fullest_sm_sets_the_pace_but_not_of_memory():
    def terms(blocks, **amounts):
        return model.predict(Work("k", blocks, 2, instruction=gpus.WGMMA, **amounts), H200).terms

    full = terms(132, tensor_flops=1e12)["tensor"]
    assert terms(264, tensor_flops=1e12)["tensor"] == pytest.approx(full)
    assert terms(133, tensor_flops=1e12)["tensor"] == pytest.approx(full * 2 * 132 / 133)
    assert terms(1, tensor_flops=1e12)["tensor"] == pytest.approx(full * 132)
    assert terms(1, hbm_bytes=1e12)["memory"] == terms(132, hbm_bytes=1e12)["memory"]
    # One SM alone takes from L2 what its port lets through.
    assert terms(1, l2_bytes=1e9)["l2"] == pytest.approx(1e9 / (64 * H200.clock))
    assert terms(265, chain=1e-6)["latency"] == 2e-6
    assert model.predict(Work("k", 264, 2), H200).waves == 1
    with pytest.raises(ValueError, match="expected at least one"):
        model.predict(Work("k", 132, 0), H200)


def test_a_launch_is_the_least_there_is():
    found = model.predict(Work("k", 1, 1), H200)
    assert (found.seconds, found.bound) == (model.LAUNCH, "launch")
    assert model.total([found, found]) == 2 * model.LAUNCH


def test_rates_have_sources_and_sizes_of_real_cards():
    assert set(CARDS) == {"h200", "a100", "b200", "rtx5090"}
    for card in CARDS.values():
        assert set(card.sources) == {"sms", "clock", "fma", "copy", "tensor", "l2", "l2_bytes"}
        # Lanes of multiply-adds: 64 an SM on the A100, 128 on the others.
        assert card.fma == pytest.approx(card.sms * card.clock * 2 * (64 if card.cc == 80 else 128), rel=0.03)
        assert 10 < card.tensor / card.fma < 35 or card.cc == 120
        assert card.copy < card.l2 < card.shared
    assert "measured" in H200.sources["copy"]
    assert "assumption" in H200.sources["l2"]


def builder(kernel, cell="gru", dtype="bfloat16", training=True, **step):
    shape = Shape(1024, cell, dtype, training)
    given = {"blocks": 96, "rows": 128, "columns": 256, "threads": 256, "blocks_per_sm": 1, "instruction": gpus.WGMMA}
    given |= {"instruction": ""} if dtype == "float32" else {}
    return Builder(shape, Step(kernel, 1024, **{**given, **step}), H200)


def test_amounts_of_the_projection_are_those_by_hand():
    work = read_model.project(builder("project"))
    assert work.tensor_flops == 2 * 1024 * 12 * 768 * 768
    assert work.hbm_bytes == 1024 * 12 * 768 * 2 + 768 * 768 * 2  # pre: 19 MB, stays in L2
    assert work.l2_bytes == 96 * 3 * (128 + 256) * 768 * 2 + 1024 * 12 * 768 * 2
    # Two warpgroups: the rows are read once, the columns twice, each written once.
    assert work.shared_bytes == 96 * 3 * (2 * 128 + 3 * 256) * 768 * 2
    large = builder("project", columns=768)
    large = Builder(dataclasses.replace(large.shape, tokens=32768), dataclasses.replace(large.step, tokens=32768), H200)
    assert read_model.project(large).hbm_bytes == 32768 * 12 * 768 * 2 * 2 + 768 * 768 * 2  # pre goes to memory


def test_amounts_of_the_recurrence_are_those_by_hand():
    streamed = read_model.recur(builder("recur", rows=64, columns=64, blocks=16))
    units = 1024 * 12 * 256
    assert streamed.tensor_flops == 2 * units * 768
    assert streamed.sfu_ops == 6 * units
    assert streamed.hbm_bytes == units * 2 * (1 + 4) + 1024 * 256 * 2
    weights = 16 * 12 * 768 * 256 * 2
    assert streamed.l2_bytes == units * 2 * (3 + 2 + 4) + weights
    assert streamed.chain == pytest.approx(read_model.STEP * 12 * 4)
    resident = builder("recur", rows=128, columns=64, blocks=16, side_by_side=4, resident=True)
    found = read_model.recur(resident)
    assert found.l2_bytes == streamed.l2_bytes - weights + 4 * 768 * 256 * 2
    assert found.chain == pytest.approx(read_model.STEP * 2 * 12)  # 8 tiles on 4 clusters
    inference = read_model.recur(builder("recur", training=False))
    assert inference.hbm_bytes == 1024 * 256 * 2


def test_float32_is_multiplied_by_multiply_adds():
    work = read_model.outer(builder("outer", dtype="float32", splits=4))
    assert work.tensor_flops == 0
    assert work.fma_flops >= 2 * 1024 * 12 * 768 * 768
    assert model.predict(work, H200).bound == "fma"


SHAPES = [
    Shape(tokens, cell, dtype, training)
    for tokens in (1, 63, *read_plan.TOKENS)
    for cell in read_model.GATES
    for dtype in read_model.SIZES
    for training in (False, True)
]


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_no_prediction_is_below_the_floor(card):
    for shape in SHAPES:
        for backend, plan in plans_of(shape, card):
            found = read_model.predict(shape, plan, card)
            assert model.total(found) > read_model.floor_seconds(shape, card), (backend, shape)
            assert all(math.isfinite(p.seconds) and p.seconds > 0 for p in found)


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_launches_do_at_least_the_floors_arithmetic(card):
    from benchmarks.read import work

    for shape in SHAPES:
        flops, _ = work(shape.tokens, shape.cell, shape.s, shape.training, shape.layers, shape.width, shape.rank)
        for backend, plan in plans_of(shape, card):
            found = read_model.works(shape, plan, card)
            assert sum(w.tensor_flops + w.fma_flops for w in found) >= flops, (backend, shape)


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_more_tokens_take_longer_with_the_same_tiles(card):
    compared = 0
    for less in SHAPES:
        more = dataclasses.replace(less, tokens=2 * less.tokens)
        larger = dict(plans_of(more, card))
        for backend, small in plans_of(less, card):
            large = larger[backend]
            if [(s.kernel, s.rows, s.columns) for s in small] == [(s.kernel, s.rows, s.columns) for s in large]:
                times = [model.total(read_model.predict(s, p, card)) for s, p in ((less, small), (more, large))]
                assert times[0] <= times[1], (backend, less)
                compared += 1
    assert compared > len(SHAPES) / 2


def test_training_is_a_forward_and_more():
    for shape in SHAPES:
        for _, plan in plans_of(dataclasses.replace(shape, training=True), H200):
            kernels = [step.kernel for step in plan]
            forward = "fused" if "fused" in kernels else "recur"
            assert kernels.index(forward) < kernels.index("reverse") < kernels.index("outer") < kernels.index("reduce")
        for _, plan in plans_of(dataclasses.replace(shape, training=False), H200):
            assert {step.kernel for step in plan} <= {"fold", "statistics", "project", "recur", "fused"}


def test_without_resources_there_is_no_prediction(monkeypatch):
    monkeypatch.setattr(plans, "RESOURCES", {})
    row = predictions.row(read_plan.FAMILY, Shape(512, "gru", "bfloat16"), H200)
    assert row.kernels == {}
    assert set(row.absent) == {"triton", "cuda"}
    assert "the resource table has no" in row.absent["cuda"]
    assert "no prediction: the resource table has no" in predictions.text([row])


@pytest.fixture
def rows():
    found = predictions.rows(H200, "gru bfloat16 512")
    assert [row.mode for row in found] == ["forward", "forward+backward"]
    return found


def test_every_form_says_that_it_is_a_prediction(rows, tmp_path):
    text, page = predictions.text(rows, every=True), predictions.markdown(rows)
    for table in (*predictions.tables(rows), *predictions.details(rows)):
        assert table.title.startswith("PREDICTION, not a measurement")
    for form in (text, page):
        assert "Nothing in these tables was timed" in form
        assert "h200: copy 4.30 TB/s (measured" in form
        assert "h200: l2 5.5 TB/s (assumption" in form
        assert "us a kernel" in form
        assert "a step that nothing hides" in form
    predictions.save(rows, tmp_path / "sub" / "predicted.json")
    data = json.loads((tmp_path / "sub" / "predicted.json").read_text())
    assert data["kind"].startswith("PREDICTION")
    kernels = data["rows"][1]["backends"]["cuda"]
    assert sum(kernel["seconds"] for kernel in kernels["kernels"]) == pytest.approx(kernels["seconds"])
    assert kernels["seconds_with_l2_twice_as_fast"] <= kernels["seconds"]


def test_predictions_are_kept_from_results(rows):
    from benchmarks import results

    folder = predictions.ROOT / "benchmarks" / "results"
    with pytest.raises(ValueError, match="is where results are kept"):
        predictions.save(rows, folder / "h200.json")
    timed = 0
    for path in folder.glob("*.json"):
        assert "PREDICTION" not in path.read_text()
        if "ceilings" in json.loads(path.read_text()):  # not an experiment's, which has a test of its own
            results.load(path)
            timed += 1
    assert timed


def test_places_in_a_document_are_filled(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- predict:h200 gru bfloat16 512 forward -->\nwas here\n<!-- /predict -->\nafter\n")
    assert predictions.write_into(page) == 1
    text = page.read_text()
    assert text.startswith("before\n<!-- predict:h200 gru bfloat16 512 forward -->\n**PREDICTION")
    assert text.endswith("\n<!-- /predict -->\nafter\n")
    assert "was here" not in text
    assert report._MARKED.search(text) is None


def test_the_command_line(tmp_path):
    target = tmp_path / "out.json"
    done = CliRunner().invoke(
        cli.build(), ["bench", "read", "--predict", "h200", "--match", "gru 512", "--json", str(target)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("PREDICTION, not a measurement")
    assert "float16" in done.output
    assert json.loads(target.read_text())["card"]["name"] == "h200"
    for wrong in (["--predict", "h201"], ["gemm", "--predict", "h200"], ["--predict", "h200", "--match", "nothing"]):
        assert CliRunner().invoke(cli.build(), ["bench", *wrong]).exit_code == 2
