"""The command line app: what a user types, and what comes back."""

import json
import subprocess
import sys

import pytest

import pyeff
from pyeff import backends

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from pyeff import cli
from pyeff.cli.info import op_table

SURFACE = {
    "read_recurrence", "read_step", "ticket_linear", "ligo_grow", "multimask_targets", "multimask_gather",
    "multimask_scatter", "multimask_loss", "block_mask", "ema_update_", "ctc_loss", "linear_ctc_loss",
    "softmax_embedding", "beam_conv",
}  # fmt: skip


def invoke(*arguments: str):
    return CliRunner().invoke(cli.build(), list(arguments), env={"COLUMNS": "80"})


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in cli.COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version():
    assert invoke("--version").stdout.strip() == pyeff.__version__


def test_unknown_command_fails():
    assert invoke("ticktes").exit_code == 2


def test_info_json_is_info_and_nothing_else():
    result = invoke("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    expected = json.loads(json.dumps(pyeff.info()))
    assert facts == expected


def test_info_json_names_every_op_with_each_backend():
    ops = json.loads(invoke("info", "--json").stdout)["ops"]
    assert not SURFACE - set(ops)
    for states in ops.values():
        assert set(states) == set(backends.NAMES)
        for state in states.values():
            assert state["usable"] is (state["reason"] == "")


def test_info_json_has_versions_and_hardware():
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["versions"]["pyeff"] == pyeff.__version__
    assert set(facts["versions"]) == {"pyeff", "python", "torch", "triton"}
    assert facts["cpu"]["model"]
    assert facts["cpu"]["threads"] >= 1
    if facts["cpu"]["reason"]:
        assert facts["cpu"]["isa_chosen"] == ""
    else:
        assert facts["cpu"]["isa_chosen"] in set(facts["cpu"]["isa_built"]) & set(facts["cpu"]["isa_detected"])


def test_info_fits_80_columns_and_says_why():
    result = invoke("info")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for op in SURFACE:
        assert any(op in line for line in lines)
    assert "not in this release" in result.stdout


def test_equal_reasons_share_a_footnote():
    facts = {"ops": {
        "a": {"reference": {"usable": True, "reason": ""}, "cpu": {"usable": False, "reason": "why"}},
        "b": {"reference": {"usable": False, "reason": "why"}, "cpu": {"usable": False, "reason": "other"}},
    }}  # fmt: skip
    table, notes = op_table(facts)
    assert notes == ["why", "other"]
    assert table.row_count == 2


def test_info_shows_the_backend_in_force():
    with pyeff.backend("reference"):
        assert json.loads(invoke("info", "--json").stdout)["backend"] == "reference"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_told_in_one_line(package):
    done = python(f"import sys; sys.modules[{package!r}] = None; from pyeff.cli import main; main()")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'pyeff[cli]'" in done.stderr


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "pyeff", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == pyeff.__version__


def test_the_app_is_built_without_anything_heavy():
    heavy = ("transformers", "matplotlib", "benchmarks", "pyeff.benchmarks", "pyeff.nn", "pyeff.recipes")
    done = python(f"import sys; from pyeff import cli; cli.build(); print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_demo_says_which_packages_it_lacks():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else real(name, *a)\n"
        "import sys; sys.argv = ['pyeff', 'demo']; from pyeff.cli import main; main()"
    )
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.strip() == "pyeff demo needs matplotlib: pip install 'pyeff[demo]'"


def test_the_demo_takes_rates_and_the_validation_set(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from pyeff.demo import run

    calls = []
    monkeypatch.setattr(run, "demo", lambda settings, out, **options: calls.append((settings, options["validate"])))
    default, chosen = ([], ["--lr-read", "0.5", "--lr-full", "0.25", "--lr-head", "0", "--validate"])
    for arguments in (default, chosen):
        result = invoke("demo", "--out", str(tmp_path / "x.png"), *arguments)
        assert result.exit_code == 0, result.output
    (plain, off), (given, on) = calls
    assert (off, on) == (False, True)
    assert (plain.lr_read, plain.lr_full, plain.lr_head) == tuple(
        type(plain).__dataclass_fields__[name].default for name in ("lr_read", "lr_full", "lr_head")
    )
    assert (given.lr_read, given.lr_full, given.lr_head) == (0.5, 0.25, 0.0)
