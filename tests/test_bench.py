"""The runner: turns, checks, absences and the floor, with clocks and contenders that are made up."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import report, results, roofline, runner
from benchmarks.registry import FORWARD, TRAINING, Contender
from tests.bench_fakes import FUSED, REFERENCE, RIVAL, SETTINGS, absent, contender, fake_case, run, square, status


def test_contenders_take_turns():
    found, clock = run(fake_case(FUSED, REFERENCE, RIVAL), prices={"fused": 0.1, "reference": 0.1, "rival": 0.1})
    owners = [owner for owner, _, _ in clock.log]
    warm_up = 2 * 3
    assert sorted(owners[:warm_up]) == ["fused"] * 2 + ["reference"] * 2 + ["rival"] * 2
    rounds = [tuple(owners[i : i + 3]) for i in range(warm_up, len(owners), 3)]
    assert len(rounds) >= 3
    assert len(set(rounds)) == 1
    assert [len(c.samples) for c in found.rows[0].contenders] == [len(rounds)] * 3


def test_input_sets_rotate():
    _, clock = run(fake_case(FUSED, REFERENCE), settings=runner.Settings(max_turns=4, min_turns=4, sample_seconds=1.0),
                   prices={"fused": 0.25, "reference": 0.25})  # fmt: skip
    turns = [(first, count) for owner, first, count in clock.log if owner == "fused"]
    assert turns[:2] == [(0, 1), (1, 1)]
    # Each later turn is four calls (a second of a quarter each) and starts where the one before ended.
    assert turns[2:] == [(2 + 4 * i, 4) for i in range(4)]


def test_number_of_sets_fills_the_cache(monkeypatch):
    monkeypatch.setattr(runner.machine, "last_cache_bytes", lambda: 100 << 20)
    case = fake_case(FUSED, REFERENCE)
    assert runner._set_count(case) == math.ceil(200 / 16)
    found, _ = run(case)
    assert found.rows[0].input_sets == 13


def test_a_slow_contender_sits_out_but_keeps_its_row():
    found, _ = run(fake_case(FUSED, REFERENCE, RIVAL), prices={"fused": 0.001, "reference": 0.1, "rival": 0.0015})
    counts = {c.name: len(c.samples) for c in found.rows[0].contenders}
    assert counts["reference"] == SETTINGS.min_turns
    assert counts["fused"] == counts["rival"] > SETTINGS.min_turns


def test_ours_never_sits_out():
    found, _ = run(fake_case(FUSED, REFERENCE), prices={"fused": 0.1, "reference": 0.001})
    assert len(found.rows[0].fused().samples) > SETTINGS.min_turns
    assert found.rows[0].gain() == pytest.approx(0.01)


def test_floor_and_gain():
    found, _ = run(fake_case(FUSED, REFERENCE, RIVAL))
    row = found.rows[0]
    # 1e9 operations at 2e9 a second take longer than 1e9 bytes at 1e10.
    assert row.floor_seconds == pytest.approx(0.5)
    assert row.over_floor(row.fused()) == pytest.approx(1.2)
    assert row.of_peak(row.fused()) == pytest.approx(1 / 1.2)
    assert row.best_other().name == "rival"
    assert row.gain() == pytest.approx(1.5)
    assert roofline.floor_seconds(1e9, 1e12, 2e9, 1e10) == pytest.approx(100)


def test_ceilings_are_sampled_on_both_sides_of_a_case():
    rates = iter([1.0, 3.0, 5.0, 100.0])
    two_sided = roofline.Ceilings({"float32": lambda: next(rates), "copy": lambda: 1.0}, {})
    before, after = two_sided.sample("float32"), two_sided.sample("float32")
    assert two_sided.around(before, after) == {"float32": 4.0, "copy": 1.0}
    assert [s.value for s in two_sided.samples if s.kind == "float32"] == [1.0, 3.0, 5.0, 100.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x * 1.001,),
        lambda x: (x * float("nan"),),
        lambda x: (torch.where(x == x[0], 0.0, x * x),),
        lambda x: ((x * x)[:-1],),
    ],
)
def test_a_wrong_result_is_an_error_and_no_row(function):
    found, clock = run(fake_case(contender("fused", "fused", function), REFERENCE, RIVAL))
    row = found.rows[0]
    assert status(row) == {"fused": results.WRONG, "reference": results.TIMED, "rival": results.TIMED}
    assert row.fused() is None
    assert "fused" not in {owner for owner, _, _ in clock.log}
    assert [c.name for _, c in found.errors()] == ["fused"]
    text = report.text(found)
    assert "WRONG: fused" in text
    assert "output 0 is off" in text


def test_limits_follow_the_dtype_and_the_length_of_the_sum():
    eps = torch.finfo(torch.float32).eps
    assert runner.error_limits([0.0, eps], torch.float32, 10_000) == pytest.approx([54 * eps, 55 * eps])
    # A reference that is wrong itself does not let everything else pass.
    assert runner.error_limits([1.0], torch.bfloat16, 400_000)[0] < 0.07
    assert runner.error_limits([math.inf], torch.float32, 1)[0] < 10 * eps
    assert runner.error_limits([0.0], torch.float64, 10_000)[0] < 2e-14


def test_a_wrong_reference_is_an_error():
    found, _ = run(fake_case(FUSED, contender("reference", "reference", lambda x: (x * x * 1.01,))))
    assert status(found.rows[0])["reference"] == results.WRONG


def broken(x):
    raise RuntimeError("no such kernel\nand a long trace")


@pytest.mark.parametrize(
    "reference", [Contender("reference", "about", "reference", absent), contender("reference", "reference", broken)]
)
def test_without_the_reference_nobody_sets_the_limit(reference):
    """Neither the first that comes nor the kernel itself: one that is 20 roundings off stays wrong."""
    off = contender("fused", "fused", lambda x: (x * x * (1 + 20 * 2.0**-23),))
    found, _ = run(fake_case(off, reference, RIVAL))
    assert status(found.rows[0])["fused"] == results.WRONG
    assert status(found.rows[0])["rival"] == results.TIMED
    found, _ = run(fake_case(FUSED, reference))
    assert status(found.rows[0])["fused"] == results.TIMED


def test_a_contender_that_raises_does_not_end_the_run():
    found, _ = run(fake_case(FUSED, REFERENCE, contender("rival", "rival", broken)))
    assert status(found.rows[0]) == {"fused": results.TIMED, "reference": results.TIMED, "rival": results.FAILED}
    assert "FAILED: rival in toy_op toy 7 float32 forward: RuntimeError: no such kernel" in report.text(found)
    assert [c.name for _, c in found.errors()] == ["rival"]


def test_an_absent_contender_is_listed_with_its_reason():
    away = Contender("rival", "about rival", "rival", absent)
    huge = contender("huge", "rival", square, bytes_needed=1e18)
    found, _ = run(fake_case(FUSED, REFERENCE, away, huge))
    assert status(found.rows[0])["rival"] == status(found.rows[0])["huge"] == results.ABSENT
    assert not found.errors()
    for shown in (report.text(found), report.text(found, every=True), report.markdown(found)):
        flat = " ".join(shown.split())
        assert "absent: rival in 1 of 1 cases: it is not installed" in flat
        assert "absent: huge in 1 of 1 cases: needs about 1000000000.0 GB" in flat


def test_without_fused_the_row_stands():
    found, _ = run(fake_case(Contender("fused", "ours", "fused", absent), REFERENCE))
    (table,) = report.tables(found.rows)
    assert table.rows[0][:6] == ["toy 7", "absent", "-", "-", "-", "1.20s reference"]


def test_gradient_mode_follows_the_case():
    seen = {}

    def look(name):
        return lambda x: (seen.setdefault(name, torch.is_grad_enabled()), square(x))[1]

    run(fake_case(contender("reference", "reference", look("forward")), mode=FORWARD))
    run(fake_case(contender("reference", "reference", look("training")), mode=TRAINING))
    assert seen == {"forward": False, "training": True}


def test_progress_is_told():
    class Log(runner.Progress):
        def __init__(self):
            self.said = []

        def begin(self, cases):
            self.said.append(cases)

        def step(self, case, contender, doing):
            self.said.append(doing)

        def finish(self, row):
            self.said.append(row.label)

    log = Log()
    run(fake_case(FUSED, REFERENCE), progress=log)
    assert log.said[0] == 1
    assert {"check", "memory", "warm-up", "turn 1"} <= set(log.said)
    assert log.said[-1] == "toy 7"
