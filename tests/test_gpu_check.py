"""The check on a GPU as far as it goes without one: its plan, its limits, its table, and a dry run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


@pytest.fixture
def gpu_check(monkeypatch):
    """The program as a module, and gpu_run beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_run(gpu_check):
    module = sys.modules["gpu_run"]
    module.GRACE_SECONDS = 1.0
    return module


FAKES = {
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.88'",
    "compute-sanitizer": "echo 'Version 2025.3'",
    "ncu": "echo 'Version 2025.3.1.0'",
    "nvidia-smi": "echo 'NVIDIA H200, 580.159.03, 9.0, 143771 MiB'",
}


def check(*words: object, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "OUT"}
    if path:
        for name, body in FAKES.items():
            (path / name).write_text(f"#!/bin/sh\n{body}\n")
            (path / name).chmod(0o755)
        clean["PATH"] = f"{path}{os.pathsep}{clean['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *map(str, words)], env={**clean, "PYTHON": sys.executable, **environment}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


def test_help_and_wrong_arguments():
    shown = check("--help")
    assert shown.returncode == 0
    for word in ("--only", "--op", "--out", "--dry-run", "test", "bench", "profile"):
        assert word in shown.stdout
    for words, message in (
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        (["--seconds", "soon"], "invalid seconds value: 'soon'"),
        (["--seconds", "-5"], "-5, expected at least 10"),
        (["--out", "/proc/no"], "cannot be written to"),
        (["run"], "unrecognized arguments: run"),
    ):
        refused = check(*words)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert check(PYTHON="no-such-python").returncode == 2


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every command is printed; tests are collected, small calls made, a benchmark run and a stored one shown."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    done = check("--dry-run", "--op", "read", "--out", out, path=tools)
    assert done.returncode == 0, done.stdout + done.stderr
    for command in (
        "-DPYEFF_CUDA_ARCHS=90a",
        "cmake --build build/gpu --target pyeff_C",
        "compute-sanitizer --tool racecheck",
        "scripts/gpu_sanitize.py --op read --backend cuda",
        "python -m benchmarks read --device cuda",
        "ncu --clock-control none",
    ):
        assert command in done.stdout.replace(sys.executable, "python"), command
    summary = json.loads((out / "gpu_check.json").read_text())
    assert summary["dry_run"]
    assert summary["tools"]["gpu"]["name"] == "NVIDIA H200"
    states = {part["name"]: part["status"] for part in summary["parts"]}
    assert [states[name] for name in ("device", "suite", "memcheck", "bench")] == ["ok"] * 4
    assert [states[name] for name in ("build", "racecheck", "profile")] == ["printed"] * 3
    assert done.stdout.splitlines()[-1] == f"written to {out}"
    assert "tests/test_read_cuda.py::test_graph_capture_and_replay" in (out / "device.log").read_text()
    assert "ceiling float32" in (out / "bench.log").read_text()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.parent == out for path in files)


def facts(**more):
    gpu = {"name": "NVIDIA H200", "driver": "580", "capability": "9.0", "memory": "143771 MiB"}
    torch = {"version": "2.11.0+cu130", "folder": "/torch", "cuda": "13.0", "devices": 1, "capability": "9.0"}
    known = dict.fromkeys(("nvcc", "cmake", "ninja", "make", "compute-sanitizer", "ncu", "pytest"), "1.0")
    optional = ("hypothesis", "xdist", "triton", "transformers", "typer", "rich", "numpy")
    return {"python": "3.12.3", "torch": torch, "gpu": gpu, **known, **dict.fromkeys(optional, "1.0"), **more}


def plan(gpu_check, *words, **more):
    return gpu_check.plan(facts(**more), gpu_check.arguments().parse_args(list(words)), Path("/out"))


def test_parts(gpu_check):
    every = [part.name for part in plan(gpu_check)]
    assert every == ["build", "device", "suite", *gpu_check.SANITIZERS, "compile", "bench", "profile"]
    assert [part.name for part in plan(gpu_check, "--only", "bench")] == ["build", "bench"]
    assert [part.name for part in plan(gpu_check, "--only", "profile")] == ["build", "profile"]
    parts = plan(gpu_check)
    # Parts of one stage run side by side. Nothing runs beside what is timed.
    stages = dict.fromkeys(part.stage for part in parts)
    assert sum(max(part.limit for part in parts if part.stage == stage) for stage in stages) <= 640
    assert gpu_check.SECONDS + 8 < 540
    assert [part.name for part in parts if part.stage == "bench"] == ["bench"]


def test_the_device_decides_the_architecture(gpu_check):
    for capability, flag in (("9.0", "90a"), ("8.0", "80"), ("12.0", "120")):
        found = facts()
        found["torch"]["capability"] = capability
        text = gpu_check.build(found).commands[0].text()
        assert f"-DPYEFF_CUDA_ARCHS={flag} " in text


def test_what_is_missing_is_left_out(gpu_check):
    parts = {part.name: part for part in plan(gpu_check, ncu=None, pytest=None, triton=None, xdist=None)}
    assert parts["profile"].reason == "ncu is not here"
    assert parts["suite"].reason == "pytest is not installed"
    assert "triton" not in parts["memcheck"].commands[-1].text()
    assert " -n " not in parts["suite"].commands[0].text()
    assert "triton" not in parts["suite"].commands[0].environment["PYEFF_TEST_REQUIRE"]


def test_problems(gpu_check):
    assert gpu_check.problems(facts()) == []
    old = {**facts()["torch"], "version": "2.9.1", "devices": 1}
    assert gpu_check.problems(facts(torch=old)) == ["torch is 2.9.1, expected 2.11 or later"]
    assert gpu_check.problems(facts(nvcc=None, ninja=None)) == ["nvcc is not here"]
    none = {**facts()["torch"], "devices": 0}
    assert gpu_check.problems(facts(torch=none, ninja=None, make=None)) == [
        "torch sees no CUDA device", "neither ninja nor make is here",
    ]  # fmt: skip
    assert "no torch" in gpu_check.problems(facts(torch={}))[0]


def test_without_a_gpu_nothing_runs_and_everything_says_so(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "tools", lambda: facts(torch={**facts()["torch"], "devices": 0}))
    monkeypatch.chdir(ROOT)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {part["status"] for part in summary["parts"]} == {"left out"}
    said = capsys.readouterr()
    assert "torch sees no CUDA device" in said.err
    assert "left out" in said.out


def shell(gpu_run, text, **more):
    return gpu_run.Command(["sh", "-c", text], **more)


def test_a_part_that_fails_stops_no_other(gpu_run, tmp_path):
    parts = [
        gpu_run.Part("one", "a", 20, "one.log", [shell(gpu_run, "echo first; exit 3"), shell(gpu_run, "echo never")]),
        gpu_run.Part("two", "b", 20, "two.log", [gpu_run.Command(["no-such-program"])]),
        gpu_run.Part("three", "c", 20, "three.log", [shell(gpu_run, "echo $WORD", environment={"WORD": "third"})]),
        gpu_run.Part("four", "d", 20, "four.log", reason="not here"),
    ]
    done = []
    gpu_run.run(parts, tmp_path, time.monotonic() + 60, after=lambda: done.append(1))
    assert [part.status for part in parts] == ["FAILED", "FAILED", "ok", "left out"]
    assert parts[0].reason == "exit status 3"
    assert parts[0].bad
    parts[0].optional = True
    assert not parts[0].bad
    assert "no-such-program" in parts[1].reason
    first = (tmp_path / "one.log").read_text()
    assert "\nfirst\n" in first
    assert "\nnever\n" not in first
    assert "\nthird\n" in (tmp_path / "three.log").read_text()
    assert len(done) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".log"}


def test_time_limits(gpu_run, tmp_path):
    """A part that takes too long is asked to end, then ended with all that it has started."""
    child = tmp_path / "child"
    polite = "trap 'echo so far so good; exit 1' INT; sleep 60 & wait"
    stubborn = f"trap '' INT; sleep 60 & echo $! > {child}; wait; sleep 60"
    parts = [
        gpu_run.Part("polite", "a", 0.5, "both.log", [shell(gpu_run, polite), shell(gpu_run, "echo never")]),
        gpu_run.Part("stubborn", "a", 0.5, "both.log", [shell(gpu_run, stubborn)]),
        gpu_run.Part("quick", "a", 30, "both.log", [shell(gpu_run, "echo quick")]),
    ]
    gpu_run.run(parts, tmp_path, time.monotonic() + 60)
    assert [part.status for part in parts] == ["TIMEOUT", "TIMEOUT", "ok"]
    text = (tmp_path / "both.log").read_text()
    assert "so far so good" in text
    assert "\nnever\n" not in text
    for _ in range(100):
        if not Path(f"/proc/{child.read_text().strip()}").exists() or "Z" in state(child):
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the part had started is still running")


def state(child: Path) -> str:
    try:
        return Path(f"/proc/{child.read_text().strip()}/stat").read_text().split()[2]
    except OSError:
        return "Z"


def test_no_part_begins_without_time_for_it(gpu_run, tmp_path):
    part = gpu_run.Part("late", "a", 60, "late.log", [shell(gpu_run, "echo too late")])
    gpu_run.run([part], tmp_path, time.monotonic() + 0.5)
    assert (part.status, part.reason) == ("left out", "no time was left")


def test_excuses_and_expectations(gpu_run, tmp_path):
    refused = shell(gpu_run, "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    parts = [
        gpu_run.Part("profile", "a", 20, "a.log", [refused], excuses={"ERR_NVGPUCTRPERM": "not allowed"}),
        gpu_run.Part("empty", "a", 20, "b.log", [shell(gpu_run, "echo nothing")], expected="Kernel Name"),
    ]
    gpu_run.run(parts, tmp_path, time.monotonic() + 60)
    assert [(part.status, part.reason) for part in parts] == [
        ("left out", "not allowed"), ("FAILED", "nothing like 'Kernel Name' in its log"),
    ]  # fmt: skip


def test_the_table(gpu_run):
    parts = [
        gpu_run.Part("build", "build", 9, "build.log", status="ok", seconds=83.04),
        gpu_run.Part(
            "racecheck", "suite", 9, "sanitize.log", status="TIMEOUT", seconds=130.0, reason="ended after 130 s"
        ),
        gpu_run.Part("profile", "profile", 9, "profile.log", status="left out", reason="ncu is not here"),
    ]
    assert gpu_run.table(parts).splitlines() == [
        "part       status    seconds  log",
        "build      ok           83.0  build.log",
        "racecheck  TIMEOUT     130.0  sanitize.log  ended after 130 s",
        "profile    left out      0.0  -             ncu is not here",
    ]


@pytest.mark.parametrize(("statuses", "code"), [(("true",), 0), (("true", "false"), 1)])
def test_the_exit_status_tells(gpu_check, gpu_run, monkeypatch, tmp_path, capsys, statuses, code):
    parts = [gpu_run.Part(word, word, 20, f"{word}.log", [gpu_run.Command([word])]) for word in statuses]
    monkeypatch.setattr(gpu_check, "tools", facts)
    monkeypatch.setattr(gpu_check, "plan", lambda *arguments: parts)
    monkeypatch.chdir(ROOT)
    assert gpu_check.main(["--out", str(tmp_path)]) == code
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["status"] for part in summary["parts"]] == ["ok", "FAILED"][: len(statuses)]
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path}"


NCU = """==PROF== Connected to process 1
"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python3","here","project","GPU Speed Of Light Throughput","Duration","us","1,012.5"
"0","1","python3","here","project","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","61.2"
"0","1","python3","here","project","Launch Statistics","Grid Size","","512"
"1","1","python3","here","recur","GPU Speed Of Light Throughput","Duration","us","310"
# profile: something else
"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","2","python3","here","_project","GPU Speed Of Light Throughput","Duration","ms","1.1"
"""


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5recur' for 'sm_90a'
ptxas info    : Function properties for _Z5recur
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
"""


def test_what_is_read_from_the_logs(gpu_check, tmp_path):
    assert gpu_check.kernels_of(NCU) == [
        {"kernel": "project", "Duration": "1,012.5 us", "Compute (SM) Throughput": "61.2 %"},
        {"kernel": "recur", "Duration": "310 us"},
        {"kernel": "_project", "Duration": "1.1 ms"},
    ]
    assert gpu_check.kernels_of("==PROF== No kernels were profiled.") == []
    build = tmp_path / "CMakeFiles" / "read.cu.o.log"
    build.parent.mkdir()
    build.write_text(PTXAS)
    assert gpu_check.resources(tmp_path) == [
        "_Z5recur sm_90a: 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "_Z5recur sm_90a: Used 168 registers, used 1 barriers, 1024 bytes smem",
    ]
    said = (
        "========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 3 errors\n========= RACECHECK SUMMARY: 0 hazards"
    )
    assert gpu_check.sanitizer_errors(said) == ["ERROR SUMMARY: 3 errors"]
