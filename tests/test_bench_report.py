"""What is made of a run: JSON, tables, Markdown, pictures, and the command."""

from __future__ import annotations

import json

import pytest

from benchmarks import report, results
from benchmarks.registry import FORWARD, TRAINING, Contender
from tests.bench_fakes import FUSED, REFERENCE, absent, contender, fake_case, run, square


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
    with pytest.raises(ValueError, match=r"schema|not a result"):
        results.load(path)


def wide_run():
    """Rows with the longest labels and numbers of the registry."""
    points = {"read_recurrence": [("gru", "1"), ("lstm", "32768")], "ticket_linear": [("down b128 32768", "0.3")]}
    cases = [
        fake_case(FUSED, REFERENCE, contender("recompute", "rival", square), group=g, point=p, mode=mode, op=op)
        for mode in (FORWARD, TRAINING)
        for op, labels in points.items()
        for g, p in labels
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
        "before\n<!-- bench:toy_op toy -->\nold\n<!-- /bench -->\n"
        "between\n<!-- bench:elsewhere -->\nkept\n<!-- /bench -->\n"
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
        (["--device", "abacus"], "expected one of auto, cpu, cuda"),
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
