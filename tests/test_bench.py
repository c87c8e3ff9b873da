"""The benchmark's own mechanics, with clocks and contenders that are made up: nothing here depends on a real time."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import memory, read, registry, report, results, roofline, runner
from benchmarks.registry import FORWARD, TRAINING, Case, Contender, Selection, Unavailable

SETTINGS = runner.Settings(seconds_per_case=1.0, min_turns=3, max_turns=20, sample_seconds=0.0)


class Clock:
    """A timer that runs the calls and charges each contender its own price; ``log`` is the order of the turns."""

    def __init__(self, prices):
        self.prices, self.log = prices, []

    def __call__(self, calls, first, count):
        for i in range(first, first + count):
            calls[i % len(calls)]()
        self.log.append((calls[0].owner, first, count))
        return self.prices[calls[0].owner] * count


class Owned:
    """A call that knows whose it is."""

    def __init__(self, owner, function):
        self.owner, self.function = owner, function

    def __call__(self):
        return self.function()


def contender(name, role, function, **keywords):
    def prepare(sets):
        return [Owned(name, lambda s=s: function(s)) for s in sets]

    return Contender(name, f"about {name}", role, prepare, **keywords)


def square(x):
    return (x * x,)


def absent(sets):
    raise Unavailable("it is not installed")


def fake_case(*contenders, point="7", group="toy", mode=FORWARD, dtype=torch.float32, op="toy_op", axis="size"):
    return Case(
        op=op, group=group, point=point, axis=axis, shape={"N": 7, "d": 3}, dtype=dtype, device="cpu", mode=mode, flops=1e9,
        bytes=1e9, make=lambda count, seed: [torch.arange(1.0, 8.0).to(dtype) + i for i in range(count)],
        set_bytes=1 << 24, tensors=lambda x: [x], oracle=lambda x: [x.double() ** 2], contenders=contenders,
    )  # fmt: skip


def ceilings():
    return roofline.Ceilings({"float32": lambda: 2e9, "bfloat16": lambda: 4e9, "copy": lambda: 1e10}, {
        "float32": "made up", "bfloat16": "made up", "copy": "made up"})  # fmt: skip


def run(*cases, prices=None, settings=SETTINGS, progress=None):
    prices = prices or {"fused": 0.6, "reference": 1.2, "rival": 0.9}
    clock = Clock(prices)
    found = runner.run(
        list(cases), Selection("quick"), settings=settings, ceilings=ceilings(), timer=clock, progress=progress
    )
    return found, clock


FUSED = contender("fused", "fused", square)
REFERENCE = contender("reference", "reference", square)
RIVAL = contender("rival", "rival", lambda x: (x**2,))


def status(row):
    return {c.name: c.status for c in row.contenders}


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


def test_a_wrong_reference_is_an_error():
    found, _ = run(fake_case(FUSED, contender("reference", "reference", lambda x: (x * x * 1.01,))))
    assert status(found.rows[0])["reference"] == results.WRONG


def test_a_contender_that_raises_does_not_end_the_run():
    def breaks(x):
        raise RuntimeError("no such kernel\nand a long trace")

    found, _ = run(fake_case(FUSED, REFERENCE, contender("rival", "rival", breaks)))
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


def test_json_round_trip(tmp_path):
    found, _ = run(fake_case(FUSED, REFERENCE, Contender("rival", "about rival", "rival", absent)))
    path = tmp_path / "new" / "run.json"
    results.save(found, path)
    assert results.load(path) == found
    data = json.loads(path.read_text())
    assert data["schema"] == results.SCHEMA
    assert {"date", "commit", "machine", "versions", "settings", "ceilings", "memory_method", "rows"} <= set(data)
    assert {"model", "cores", "threads", "instruction_sets"} <= set(data["machine"])
    assert {"python", "torch"} <= set(data["versions"])
    assert data["rows"][0]["contenders"][0]["samples"] == found.rows[0].contenders[0].samples
    assert data["ceilings"]["samples"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 999}', '{"schema": 1}', '{"schema": 1, "rows": [{"op": 1}]}']
)
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="schema|not a result"):
        results.load(path)


def wide_run():
    """Rows with the longest labels and numbers of the registry."""
    points = [("gru", "1"), ("lstm", "32768")]
    cases = [
        fake_case(
            FUSED, REFERENCE, contender("recompute", "rival", square), group=g, point=p, mode=mode, op="read_recurrence"
        )
        for mode in (FORWARD, TRAINING)
        for g, p in points
    ]
    cases += [fake_case(FUSED, REFERENCE, group="", point="4096x3072x768", op="linear")]
    found, _ = run(*cases, prices={"fused": 98.7654, "reference": 987.654, "recompute": 123.456})
    for row in found.rows:
        for c in row.contenders:
            c.peak_bytes, c.saved_bytes = 98_700_000_000, 123_456_789_000
            c.reason = "a reason that goes on and on " * 5 if c.status != results.TIMED else ""
        row.floor_seconds = 0.0987
    return found


@pytest.mark.parametrize("every", [False, True])
def test_the_report_fits_a_terminal(every):
    text = report.text(wide_run(), every)
    assert max(map(len, text.splitlines())) <= 80
    assert "lstm 32768" in text
    assert "4096x3072x768" in text


def test_units():
    cases = {1.234: "1.23s", 0.0999: "99.9ms", 0.09999: "100ms", 0.9999e-3: "1.00ms", 5e-6: "5.00us", 3e-8: "30.0ns"}
    assert {value: report.seconds(value) for value in cases} == cases
    sizes = {0: "0", 999: "999", 1000: "1.0K", 24_400_000: "24M", 9_960_000: "10M", 999_600_000: "1.0G", None: "-"}
    assert {value: report.size(value) for value in sizes} == sizes


def test_markdown_fills_the_marked_places(tmp_path):
    found, _ = run(fake_case(FUSED, REFERENCE), fake_case(FUSED, REFERENCE, group="other"))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- bench:toy_op toy -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:elsewhere -->\nkept\n<!-- /bench -->\n"
    )
    assert report.write_into(found, page) == 1
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:toy_op toy -->\n")
    assert "| toy 7 | 600ms |" in text
    assert "other 7" not in text
    assert "old" not in text.splitlines()
    assert text.endswith("<!-- /bench -->\nbetween\n<!-- bench:elsewhere -->\nkept\n<!-- /bench -->\n")
    assert report.write_into(found, page) == 1
    assert page.read_text() == text
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no place"):
        report.write_into(found, page)


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    path = tmp_path / "new" / "picture.png"
    plot.save(wide_run(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    without, _ = run(fake_case(Contender("fused", "ours", "fused", absent), REFERENCE))
    plot.save(without, path)
    nothing, _ = run(fake_case(Contender("fused", "ours", "fused", absent)))
    with pytest.raises(ValueError, match="no times"):
        plot.save(nothing, path)


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(1000, requires_grad=True)

    def call():
        y = x.exp()  # saves its result, 4000 bytes
        z = y[:10] * y[10:20]  # saves two views of it
        torch.autograd.grad((z * x[:10]).sum(), x)  # saves z, 40 bytes, and an input

    with torch.enable_grad():
        saved, _, method = memory.saved_and_peak(call, [x], "cpu")
    assert saved == 4000 + 40
    assert method in memory.METHODS


@pytest.mark.parametrize("method", ["default", "allocator"])
def test_peak_bytes(method, monkeypatch):
    if method == "allocator":
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size = 40_000_000

    def call():
        a = torch.ones(size // 4)
        b = a + 1
        del a
        return b * 2

    call()
    _, peak, name = memory.saved_and_peak(call, [], "cpu")
    # Two of the three live at any time; the resident set is counted in batches.
    assert 2 * size - 2_000_000 < peak < 2 * size + 4_000_000
    assert method == "default" or name == "allocator"


def test_an_error_in_the_measured_call_arrives():
    def call():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        memory.saved_and_peak(call, [], "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_every_case_has_a_reference_and_ours(size, device):
    cases = registry.cases(None, Selection(size, device))
    assert {case.op for case in cases} == {"linear", "read_recurrence"}
    for case in cases:
        roles = [c.role for c in case.contenders]
        assert roles.count("reference") == roles.count("fused") == 1
        names = [c.name for c in case.contenders]
        assert len(set(names)) == len(names)
        assert max(map(len, names)) <= 9
    keys = [(case.op, case.label, case.dtype, case.mode) for case in cases]
    assert len(set(keys)) == len(keys)


def test_selection():
    assert len(registry.cases("read", Selection(match="gru 64 float32 forward"))) == 1
    assert {c.op for c in registry.cases("linear", Selection())} == {"linear"}
    with pytest.raises(ValueError, match="no benchmark is called 'nothing'"):
        registry.cases("nothing", Selection())


def test_work_of_read():
    # The figures of the definition's own table: GRU, 2048 tokens, 12 layers, d = 768, r = 256.
    flops, least = read.work(2048, "gru", 4, False, 12, 768, 256)
    assert flops == 2048 * 12 * 2 * 3 * 256 * (768 + 256)
    assert least == 4 * (2048 * 12 * 768 + 2048 * 256 + 3 * 256 * (768 + 256 + 2) + 768)
    training, _ = read.work(2048, "gru", 4, True, 12, 768, 256)
    assert training == flops + 2048 * 12 * 2 * 3 * 256 * (768 + 2 * 256)


# Those of READ's contenders that neither compile nor need the native library.
PLAIN = ("eager", "torch.nn", "naive")


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_plain_contenders_compute_read(cell, mode, dtype):
    case = read.case(5, cell, dtype, "cpu", mode, layers=3, width=24, rank=8)
    only = tuple(c for c in case.contenders if c.name in PLAIN)
    (inputs,) = case.make(1, 0)
    with torch.set_grad_enabled(mode == TRAINING):
        truth = case.oracle(inputs)
        reference = next(c for c in only if c.role == "reference")
        limits = runner.error_limits(runner.relative_errors(reference.prepare([inputs])[0](), truth), dtype)
        for c in only:
            outputs = [t.detach() for t in c.prepare([inputs])[0]()]
            assert len(outputs) == (6 if mode == TRAINING else 1)
            errors = runner.relative_errors(outputs, truth)
            assert runner._verdict(errors, limits)[0] == results.TIMED, (c.name, errors, limits)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_folded_rival_is_read(cell):
    from benchmarks import read_folded

    case = read.case(5, cell, torch.float64, "cpu", TRAINING, layers=3, width=24, rank=8)
    (inputs,) = case.make(1, 0)
    truth = case.oracle(inputs)
    out, *kept = read_folded.forward(inputs.phi, *inputs.weights, cell, inputs.eps, True)
    w_ih, w_hh, _, _, gamma = (w.detach() for w in inputs.weights)
    grads = read_folded.backward(inputs.grad_out, inputs.phi, w_ih, w_hh, gamma, *(t.detach() for t in kept), cell)
    # Its inner arithmetic is float32, whatever the tensors are.
    errors = runner.relative_errors([out.detach(), *grads], truth)
    assert max(errors) < 30 * torch.finfo(torch.float32).eps


def test_the_oracle_does_not_depend_on_its_chunks(monkeypatch):
    case = read.case(11, "gru", torch.float32, "cpu", TRAINING, layers=2, width=16, rank=4)
    (inputs,) = case.make(1, 0)
    whole = case.oracle(inputs)
    monkeypatch.setattr(read, "_ORACLE_TOKENS", 4)
    for one, other in zip(whole, case.oracle(inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_linear(dtype):
    from benchmarks import gemm

    case = gemm.case(9, 32, 16, dtype, "cpu")
    sets = case.make(2, 0)
    for s, call in zip(sets, gemm.onednn(sets), strict=True):
        expected = F.linear(s.x.double(), s.weight.double())
        assert runner.relative_errors(call(), [expected])[0] < 4 * torch.finfo(dtype).eps


# The command.


@pytest.fixture
def command():
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from pyeff.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_shows_a_stored_result(command, tmp_path):
    found, _ = run(fake_case(FUSED, REFERENCE, op="linear"), fake_case(FUSED, REFERENCE, op="read_recurrence"))
    path = tmp_path / "run.json"
    results.save(found, path)
    shown = command("--from", path)
    assert shown.exit_code == 0, shown.output
    assert "read_recurrence" in shown.stdout
    assert "linear" in shown.stdout
    only = command("read", "--from", path, "--markdown")
    assert "linear" not in only.stdout
    assert "| toy 7 | 600ms |" in only.stdout
    copy = tmp_path / "copy.json"
    command("--from", path, "--json", copy, "--no-table")
    assert results.load(copy) == found


def test_the_command_fails_where_a_result_was_wrong(command, tmp_path):
    found, _ = run(fake_case(contender("fused", "fused", lambda x: (x,)), REFERENCE, op="linear"))
    results.save(found, tmp_path / "run.json")
    shown = command("--from", tmp_path / "run.json")
    assert shown.exit_code == 1
    assert "WRONG: fused" in shown.stdout


def test_the_command_runs_a_case(command, tmp_path, monkeypatch):
    from pyeff.cli.bench import module

    found, _ = run(fake_case(REFERENCE))

    def instead(cases, select, progress):
        progress.begin(len(cases))
        progress.step(cases[0], "reference", "check")
        progress.finish(found.rows[0])
        return found

    monkeypatch.setattr(module("registry"), "cases", lambda op, select: [fake_case(REFERENCE)])
    monkeypatch.setattr(module("runner"), "run", instead)
    done = command("read", "--quick", "--json", tmp_path / "run.json", "--details")
    assert done.exit_code == 0, done.output
    assert "reference" in done.stdout
    assert results.load(tmp_path / "run.json").rows[0].label == "toy 7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--list"], "no benchmark is called"),
        (["--quick", "--full"], "exclude each other"),
        (["--device", "abacus"], "expected one of cpu, cuda"),
        (["--from", "/nowhere.json"], "No such file"),
        (["--match", "no-such-word"], "no case has all of"),
    ],
)
def test_the_command_refuses(command, arguments, message):
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_command_lists(command):
    listed = command("gemm", "--list")
    assert listed.exit_code == 0
    assert "linear 64x768x768  float32 forward: fused F.linear compiled oneDNN" in listed.stdout
