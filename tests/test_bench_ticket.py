"""The tickets' benchmark: its cases, and what their contenders compute, at small sizes."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import pyeff
from benchmarks import registry, report, results, runner, ticket, ticket_rivals
from benchmarks.registry import FORWARD, TRAINING, Selection
from tests import helpers

modes = pytest.mark.parametrize("mode", [FORWARD, TRAINING])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def small(dtype=torch.float32, mode=FORWARD, block=8, tokens=5, density=0.4):
    return ticket.case("up", (48, 32), block, density, tokens, dtype, "cpu", mode)


def outputs_of(case, contender):
    """A contender's outputs as the runner compares them, and the oracle's."""
    with torch.set_grad_enabled(case.mode == TRAINING):
        sets = case.make(3, 0)
        calls = contender.prepare(sets)
        assert len(calls) >= 2
        found = [t.detach() for t in calls[1]()]
        return case.comparable(sets[1], found), case.oracle(sets[1])


@modes
@dtypes
@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", ["F.linear", "eager", "oneDNN", "BSR", "SciPy"])
def test_rivals_compute_the_layer(name, block, dtype, mode):
    case = small(dtype, mode, block)
    contender = next(c for c in case.contenders if c.name == name)
    forward_only = name in ("oneDNN", "BSR", "SciPy")
    if (forward_only and mode == TRAINING) or (name in ("BSR", "SciPy") and dtype != torch.float32):
        with pytest.raises(registry.Unavailable):
            outputs_of(case, contender)
        return
    if name == "SciPy" and importlib.util.find_spec("scipy") is None:
        pytest.skip("SciPy is not installed")
    found, truth = outputs_of(case, contender)
    assert len(found) == len(truth) == (4 if mode == TRAINING else 1)
    limits = runner.error_limits([0.0] * len(truth), dtype, case.reduction)
    assert runner._verdict(runner.relative_errors(found, truth), limits)[0] == results.TIMED


@modes
@dtypes
def test_ours_computes_the_layer(dtype, mode):
    helpers.need("ticket_linear", "cpu")
    case = small(dtype, mode)
    found, truth = outputs_of(case, next(c for c in case.contenders if c.role == "fused"))
    limits = runner.error_limits([0.0] * len(truth), dtype, case.reduction)
    assert runner._verdict(runner.relative_errors(found, truth), limits)[0] == results.TIMED


def test_the_reference_does_not_pose_as_ours():
    case = small()
    ours = next(c for c in case.contenders if c.role == "fused")
    with pyeff.backend("reference"), pytest.raises(registry.Unavailable):
        ours.prepare(case.make(2, 0))


def test_work():
    # 3072 x 768 at a density of .3, 4096 tokens, float32.
    alive = round(0.3 * 3072 * 768)
    flops, least = ticket.work(4096, (3072, 768), alive, 4, False)
    assert flops == 2 * 4096 * alive
    assert least == 4 * (4096 * (3072 + 768) + alive)
    training, bytes_trained = ticket.work(4096, (3072, 768), alive, 4, True)
    assert training == 3 * flops
    # Read: x, values, gradient, x and values again. Written: output, gradients of x and values.
    assert bytes_trained == 4 * (3 * 4096 * 768 + 2 * 4096 * 3072 + 3 * alive)


def test_a_case_counts_what_is_alive():
    """The density that is asked for, in whole blocks: as the tickets that are made have it."""
    for block, density in ((8, 0.4), (16, 0.2), (16, 0.01)):
        case = small(block=block, density=density)
        (inputs,) = case.make(1, 3)
        alive = round(inputs.ticket.density * 48 * 32)
        assert inputs.ticket.nnz >= 1
        assert case.flops == 2 * 5 * alive
        assert case.set_bytes == 4 * (5 * 32 + inputs.values.numel())


def test_sets_share_nothing():
    """Weights and tickets of their own, so that rotating them empties the caches."""
    one, other = small().make(2, 0)
    assert one.ticket != other.ticket
    assert one.ticket.nnz == other.ticket.nnz
    assert not torch.equal(one.x, other.x)
    again = small().make(1, 0)[0]
    assert torch.equal(one.values, again.values)
    assert one.ticket == again.ticket


def test_the_dense_weight_is_a_parameter_and_not_saved():
    case = small(mode=TRAINING)
    (inputs,) = case.make(1, 0)
    before = len(case.tensors(inputs))
    assert inputs.weight is inputs.weight
    assert inputs.weight.requires_grad
    assert torch.equal(inputs.weight.detach(), inputs.ticket.scatter(inputs.values.detach()))
    assert len(case.tensors(inputs)) == before + 1


def test_dense_contenders_hold_no_more_weights_than_empty_the_caches(monkeypatch):
    monkeypatch.setattr(ticket_rivals.machine, "last_cache_bytes", lambda: 20_000)
    sets = small().make(40, 0)
    # 48 x 32 weights and 5 x 32 of x: 6784 bytes.
    assert len(ticket_rivals.dense(sets)) == 6
    assert sum(bool(s._weight) for s in sets) == 6
    assert len(ticket_rivals.definition(sets)) == 40


def test_panels_are_over_densities():
    cases = registry.cases("ticket", Selection(match="up b32 4096 float32 forward"))
    assert [case.point for case in cases] == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert {case.group for case in cases} == {"up b32 4096"}
    full = registry.cases("ticket", Selection("full"))
    assert {case.shape["b"] for case in full} == {8, 16, 32, 64, 128}
    assert {case.shape["N"] for case in full} == {1, 16, 128, 512, 4096}
    assert {case.point for case in full} == {"0.1", "0.2", "0.3", "0.5", "0.7", "0.9"}


def test_a_gpu_case_has_each_backend_and_its_own_rivals():
    for case in registry.cases("ticket", Selection("default", "cuda")):
        names = {c.name for c in case.contenders}
        assert {"triton", "cuda", "F.linear", "compiled", "BSR", "stk", "blksprs"} <= names
        assert not {"oneDNN", "SciPy"} & names
        assert {c.name for c in case.contenders if c.role == "fused"} <= {"triton", "cuda"}


@pytest.mark.parametrize("name", ["stk", "blksprs"])
def test_a_package_that_is_not_there_is_named(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    case = small(block=8)
    prepare = getattr(ticket_rivals, name)
    with pytest.raises(registry.Unavailable, match="blocks of"):
        prepare(case.make(2, 0))
    large = ticket.case("up", (256, 128), 128, 0.5, 128, torch.float32, "cpu", FORWARD)
    with pytest.raises(registry.Unavailable, match=f"{name} cannot be imported"):
        prepare(large.make(2, 0))


def test_a_refusal_of_another_package_is_a_reason():
    def refuse():
        raise ValueError("Expected float16 data. Got torch.bfloat16 data.\nand more")

    with pytest.raises(registry.Unavailable, match=r"refuses the call: ValueError: Expected float16 data\. .* data\.$"):
        ticket_rivals._tried([refuse])


def test_tables_are_by_layer():
    """The first word of a group has a table of its own, and is not in its rows."""
    rows = [row(group, point) for group in ("up b32 1", "down b32 1") for point in ("0.1", "0.9")]
    tables = report.tables(rows)
    assert [table.title.split("  ")[:2] for table in tables] == [["ticket_linear", "up"], ["ticket_linear", "down"]]
    assert [line[0] for line in tables[0].rows] == ["b32 1 0.1", "b32 1 0.9"]
    assert row("gru", "64").section == ""
    assert row("", "64x768x768").short_label == "64x768x768"


def row(group: str, point: str) -> results.Row:
    return results.Row(
        op="ticket_linear", group=group, point=point, axis="density", shape={"N": 1}, dtype="float32", device="cpu",
        mode=FORWARD, flops=1.0, bytes=1.0, input_sets=2, ceilings={"float32": 1.0, "copy": 1.0}, floor_seconds=1.0,
        contenders=[],
    )  # fmt: skip
