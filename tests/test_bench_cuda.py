"""The benchmark of a GPU as far as it goes without one: graphs, tables, the budget, and what a case holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import cuda, machine, report, results, runner
from benchmarks.registry import Contender, Selection, cases
from tests.bench_fakes import FUSED, REFERENCE, RIVAL, SETTINGS, contender, fake_case, graphs, run, square

ROOT = Path(__file__).resolve().parents[1]
PRICES = {
    "fused": 0.6, "reference": 1.2, "rival": 0.9, "fused graph": 0.2, "reference graph": 0.8, "rival graph": 0.3,
}  # fmt: skip


def with_graphs(*contenders, capture=graphs, **more):
    """Rows of a device that a CPU stands for; what asks the device itself is the timer's and the capture's."""
    found, clock = run(fake_case(*contenders), prices={**PRICES, **more}, capture=capture)
    for row in found.rows:
        row.device = "cuda"
    return found, clock


def test_calls_and_graphs_take_turns():
    found, clock = with_graphs(FUSED, REFERENCE, RIVAL)
    owners = [owner for owner, _, _ in clock.log][2 * 6 :]
    assert owners[:6] == ["fused", "reference", "rival", "fused graph", "reference graph", "rival graph"]
    row = found.rows[0]
    ours = row.fused()
    assert (ours.median, ours.graph_median, ours.best) == pytest.approx((0.6, 0.2, 0.2))
    assert row.gain() == pytest.approx(1.5)
    assert row.graph_gain() == pytest.approx(1.5)
    assert row.over_floor(ours) == pytest.approx(1.2)


def test_calls_race_with_calls_and_graphs_with_graphs():
    """A call that is slow beside a graph is not slow beside other calls."""
    prices = {"fused": 0.06, "rival": 0.1, "reference": 0.07, "rival graph": 0.02, "reference graph": 0.001}
    found, _ = with_graphs(FUSED, REFERENCE, RIVAL, **{"fused graph": 0.0011}, **prices)
    turns = {c.name: (len(c.samples), len(c.graph_samples)) for c in found.rows[0].contenders}
    assert turns["rival"][1] == SETTINGS.min_turns
    assert turns["rival"][0] > SETTINGS.min_turns
    assert len(set(turns["fused"])) == 1


def test_what_cannot_be_a_graph_keeps_its_time():
    def refuse(calls):
        if calls[0].owner == "rival":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return graphs(calls)

    found, _ = with_graphs(FUSED, REFERENCE, RIVAL, capture=refuse)
    rival = found.rows[0].contenders[2]
    assert rival.status == results.TIMED
    assert rival.samples
    assert rival.graph_median is None
    assert not found.errors()
    text = " ".join(report.text(found).split())
    assert "no graph: rival in 1 of 1 cases: RuntimeError: operation not permitted" in text


def test_without_capture_there_are_no_graphs():
    found, clock = run(fake_case(FUSED, REFERENCE))
    assert not any("graph" in owner for owner, _, _ in clock.log)
    assert found.rows[0].graph_gain() is None
    assert "graph" not in report.text(found)


def test_the_table_of_a_gpu():
    other = contender("triton", "variant", square)
    found, _ = with_graphs(FUSED, other, REFERENCE, RIVAL, triton=0.7, **{"triton graph": 0.25})
    (table,) = report.tables(found.rows)
    assert table.header[:6] == ["case", "fused", "±", "graph", "xfloor", "variant"]
    assert table.rows[0][:8] == [
        "toy 7", "600ms", "0%", "200ms", "1.20", "250ms", "900ms rival", "1.50/1.50x",
    ]  # fmt: skip
    (details,) = report.details(found.rows)
    assert "graph" in details.header
    assert [row[0] for row in details.rows] == ["fused", "triton", "reference", "rival"]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(("group", "point"), [("lstm", "32768"), ("down b128 32768", "0.3")])
def test_the_table_of_a_gpu_fits_a_terminal(group, point, every):
    away = Contender("recompute", "about", "variant", lambda sets: 1 / 0)
    ours, rival = contender("triton", "fused", square), contender("compiled", "rival", square)
    prices = {"triton": 0.0987, "compiled": 0.987, "triton graph": 0.0987, "compiled graph": 0.987}
    found, _ = with_graphs(ours, REFERENCE, rival, away, **prices)
    row = found.rows[0]
    row.group, row.point, row.floor_seconds = group, point, 0.00987
    for c in row.contenders:
        c.peak_bytes, c.saved_bytes = 98_700_000_000, 123_456_789_000
        if c.role == "reference":
            c.samples, c.graph_samples = [9.87, 9.88], [9.87, 9.88]
    text = report.text(found, every)
    assert max(map(len, text.splitlines())) <= 80, text
    assert f"{group} {point}".removeprefix("down ") in text


def test_graphs_are_kept_in_the_file(tmp_path):
    found, _ = with_graphs(FUSED, REFERENCE, RIVAL)
    results.save(found, tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == found


def test_the_budget_leaves_cases_out_and_says_so(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(now))
    kept = []
    found, _ = run(
        *(fake_case(FUSED, REFERENCE, point=str(n)) for n in range(4)),
        settings=runner.Settings(max_turns=3, min_turns=3, sample_seconds=0.0, budget_seconds=100),
        checkpoint=kept.append,
    )
    done = [row.point for row in found.rows]
    assert 0 < len(done) < 4
    assert [len(part.rows) for part in kept] == list(range(1, len(done) + 1))
    assert kept[-1] == found
    left = [f"toy_op toy {n} float32 forward" for n in range(len(done), 4)]
    assert found.settings["left_out"] == left
    assert f"not reached: {', '.join(left)}" in " ".join(report.text(found).split())


def test_a_gpu_case_has_each_backend_and_no_rival_of_the_cpu():
    for case in cases("read", Selection("full", "cuda")):
        names = [c.name for c in case.contenders]
        assert {"triton", "cuda", "eager", "compiled", "folded", "torch.nn"} <= set(names)
        assert "oneDNN" not in names
        assert {c.name for c in case.contenders if c.role == "fused"} <= {"triton", "cuda"}
    dtypes = {case.dtype for case in cases("read", Selection("full", "cuda"))}
    assert dtypes == {torch.bfloat16, torch.float16, torch.float32}


def test_names_of_result_files():
    assert machine.slug({"name": "NVIDIA GeForce RTX 4090"}) == "nvidia-geforce-rtx-4090"
    assert machine.slug(None) == "cpu"


def test_the_program_for_a_bare_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.registry, "cases", lambda op, select: [fake_case(FUSED, REFERENCE)])
    measure = runner.run

    def instead(cases, select, **more):
        monkeypatch.setattr(runner, "run", measure)
        return run(*cases, **more)[0]

    monkeypatch.setattr(runner, "run", instead)
    assert program.main(["read", "--device", "cpu", "--size", "quick", "--json", str(tmp_path), "--budget", "5"]) == 0
    said = capsys.readouterr()
    assert "toy 7" in said.out
    assert "toy_op toy 7 float32 forward: fused" in said.err
    assert json.loads((tmp_path / "cpu.json").read_text())["settings"]["budget_seconds"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "no benchmark is called"), (["read", "--match", "no-such-word"], "no case has all of")],
)
def test_the_program_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        program.main([*arguments, "--device", "cpu"])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


INTERPRETED = """
import torch
from benchmarks import fma
out = torch.full((2 * fma.BLOCK,), float("nan"))
fma.run(out, 2, 0.5, 1.0)
x = (torch.arange(out.numel()) % 7).double()
for _ in range(2 * fma.UNROLL):
    x = 0.5 * x + 1
assert (out.double() - x).abs().max() < 1e-6
print(fma.flops(out, 2) == 2 * out.numel() * 2 * fma.UNROLL)
"""


def test_the_loop_of_multiply_adds_computes_them_all():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_graphs_of_calls():
    """A replay does what the call does, with what is in memory then."""
    inputs = [torch.full((1000,), float(i), device="cuda") for i in range(3)]
    outputs = [torch.zeros(1000, device="cuda") for _ in range(3)]

    def call(i):
        return lambda: (outputs[i].copy_(inputs[i] + 1),)

    replays = cuda.capture([call(i) for i in range(3)])
    for i, replay in enumerate(replays):
        inputs[i].add_(10)
        replay()
        torch.cuda.synchronize()
        assert (outputs[i] == i + 11).all()
    assert cuda.timer(replays, 0, 5) > 0
