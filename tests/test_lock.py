"""The lock of the GPU kernels' figures: what is believed, what is compiled again, what is an error; and turns."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import aot, gates, lock, ptxas
from benchmarks.gpus import ARCHITECTURES, MMA
from benchmarks.resources import Usage
from scripts import turn

ROOT = Path(__file__).resolve().parent.parent
KEYS = {f"k/{i} sm_90": f"{i:08x}" for i in range(32)}
GOOD = Usage("triton", "k", "large", 90, registers=128, shared=1024, threads=256, matrix=(MMA,), warnings=("slow",))


def locked(found=None) -> lock.Lock:
    return lock.Lock({"triton": "1"}, {name: (key, found or {"registers": 8}) for name, key in KEYS.items()})


def test_figures_come_back(tmp_path):
    found = lock.figures(GOOD)
    plain = Usage("triton", "k", "large", 90)
    assert lock.filled(plain, found) == GOOD
    assert lock.figures(plain) == {}
    assert lock.difference(found, found) == ""
    assert lock.difference(found, lock.figures(dataclasses.replace(GOOD, registers=130, warnings=()))) == (
        "registers 128 is now 130, warnings ['slow'] is now ()"
    )
    path = tmp_path / "folder" / "a.json"
    assert lock.read(path) == lock.Lock()
    whole = lock.Lock({"triton": "1"}, {"b sm_80": ("1", {}), "a sm_80": ("2", found)})
    lock.write(path, whole)
    assert lock.read(path) == whole
    lines = [line for line in path.read_text().splitlines() if "sm_80" in line]
    assert [line.split('"')[1] for line in lines] == ["a sm_80", "b sm_80"]


def test_every_entry_is_compiled_in_one_turn_of_each_round():
    shares = [lock.due(KEYS, locked(), turn) for turn in range(100, 100 + lock.SHARES)]
    assert set().union(*shares) == set(KEYS)
    assert sum(map(len, shares)) == len(KEYS)
    assert lock.due(KEYS, locked(), None) == set(KEYS)


def test_what_changed_or_is_not_locked_is_compiled_in_every_turn():
    jobs = {**KEYS, "k/1 sm_90": "another", "k/new sm_90": "1", "k/strange sm_90": ""}
    for turn_ in range(lock.SHARES):
        assert lock.due(jobs, locked(), turn_) >= {"k/1 sm_90", "k/new sm_90", "k/strange sm_90"}


def test_each_way_in_which_a_lock_is_wrong():
    found = {name: {"registers": 8} for name in KEYS}
    assert lock.problems("a.json", KEYS, found, locked()) == []
    wrong = {
        "1 of 33 entries are missing (k/new sm_90)": ({**KEYS, "k/new sm_90": "1"}, found),
        "1 of 32 entries are of other sources or options (k/1 sm_90)": ({**KEYS, "k/1 sm_90": "another"}, found),
        "of kernels that are gone (k/0 sm_90)": ({n: k for n, k in KEYS.items() if n != "k/0 sm_90"}, {}),
        "k/3 sm_90: registers 8 is now 9": (KEYS, {**found, "k/3 sm_90": {"registers": 9}}),
        "k/3 sm_90: spill_loads 0 is now 4": (KEYS, {**found, "k/3 sm_90": {"registers": 8, "spill_loads": 4}}),
    }
    for text, (jobs, now) in wrong.items():
        (said,) = lock.problems("a.json", jobs, now, locked())
        assert text in said
        assert "make resources ARGS=--write" in said
    # Another key is reason enough: what it then takes is no contradiction to the lock.
    assert len(lock.problems("a", {**KEYS, "k/1 sm_90": "x"}, {**found, "k/1 sm_90": {"registers": 9}}, locked())) == 1


def test_names_tell_everything_apart():
    jobs = [aot.Job("m", i, "k", "large", variant, 90) for i, variant in enumerate(("a", "b", "a", "a"))]
    assert lock.names(jobs) == ["k/large a sm_90", "k/large b sm_90", "k/large a sm_90 #2", "k/large a sm_90 #3"]
    assert lock.names([Usage("cuda", "read_fold<bf16>", "", 80)]) == ["read_fold<bf16> sm_80"]


@pytest.fixture
def compiled(monkeypatch):
    """Triton's place: its jobs, and those of them that were compiled, with 8 registers each or as many as are set."""
    jobs = [aot.Job("kernels.k", i, "k", str(i), "", 90, f"{i:08x}", (MMA,)) for i in range(32)]
    seen: list[str] = []
    registers: dict[str, int] = {}

    def run(some):
        seen[:] = [job.config for job in some]
        return [
            Usage("triton", j.kernel, j.config, j.arch, registers=registers.get(j.config, 8), matrix=(MMA,),
                  expects=j.expects)
            for j in some
        ]  # fmt: skip

    monkeypatch.setattr(aot, "jobs", lambda modules: list(jobs))
    monkeypatch.setattr(aot, "run", run)
    return jobs, seen, registers


def triton(tmp_path, **kwargs) -> gates.Report:
    report = gates.Report()
    gates.triton(report, ["kernels.k"], {}, locks=tmp_path, **kwargs)
    return report


def test_the_gates_believe_the_lock_but_for_a_share(tmp_path, compiled):
    jobs, seen, registers = compiled
    (missing,) = triton(tmp_path, turn=3).failures
    assert "32 of 32 entries are missing" in missing
    assert len(seen) == 32
    assert triton(tmp_path, renew=True, turn=3).failures == []
    report = triton(tmp_path, turn=3)
    assert (report.failures, seen, report.compiled) == ([], ["3", "11", "19", "27"], 4)
    assert report.usages == triton(tmp_path).usages
    assert len(seen) == 32
    # A figure that changed though nothing else did: seen in its turn.
    registers["3"] = 9
    assert triton(tmp_path, turn=4).failures == []
    (changed,) = triton(tmp_path, turn=3).failures
    assert "k/3 sm_90: registers 8 is now 9" in changed
    registers.clear()
    # A source that changed: in every turn, and only --write makes it good.
    jobs[5] = dataclasses.replace(jobs[5], key="ffffff00")
    for _ in range(2):
        (stale,) = triton(tmp_path, turn=3).failures
        assert "1 of 32 entries are of other sources or options (k/5 sm_90)" in stale
        assert "5" in seen
    registers["5"] = 10
    report = triton(tmp_path, turn=3, renew=True)
    assert (report.failures, report.usages[5].registers) == ([], 10)
    report = triton(tmp_path, turn=3)
    assert (report.failures, report.usages[5].registers) == ([], 10)
    assert "5" not in seen


def test_the_gates_hold_for_what_is_locked(tmp_path, compiled):
    triton(tmp_path, renew=True)
    path = tmp_path / "kernels.k.json"
    whole = lock.read(path)
    whole.entries["k/4 sm_90"] = (whole.entries["k/4 sm_90"][0], {"registers": 8, "spill_loads": 4})
    lock.write(path, whole)
    assert any("k/4 on sm_90 fails a gate" in line for line in triton(tmp_path, turn=3).failures)


def test_with_another_triton_everything_is_compiled_and_nothing_compared(tmp_path, compiled):
    _, seen, registers = compiled
    triton(tmp_path, renew=True)
    path = tmp_path / "kernels.k.json"
    data = json.loads(path.read_text())
    data["versions"] = {"triton": "0"}
    data["entries"] = {name: ["another", found] for name, (_, found) in data["entries"].items()}
    path.write_text(json.dumps(data))
    registers["3"] = 9
    report = triton(tmp_path, turn=3)
    assert (len(seen), report.failures) == (32, [])
    assert any("locked by Triton 0" in line for line in report.skipped)


def test_the_lock_is_by_the_pinned_triton():
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "requirements" / "dev.txt").read_text(), re.M)
    assert pinned
    for module in aot.kernel_modules():
        assert lock.read(lock.LOCKS / f"{module}.json").versions == {"triton": pinned[1]}, lock.RENEW


@pytest.mark.slow
def test_a_kernel_that_only_moved_keeps_its_key(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = (
        "import triton\nimport triton.language as tl\nfrom benchmarks.aot import Case\n\n\n"
        "@triton.jit\ndef twice(x):\n    return x + x\n\n\n"
        "@triton.jit\ndef kernel(x, BLOCK: tl.constexpr):\n    i = tl.arange(0, BLOCK)\n"
        "    tl.store(x + i, twice(tl.load(x + i)))\n\n\n"
        "def aot_cases():\n    for block in (32, 64):\n"
        "        yield Case(f'k/{block}', 80, kernel, {'x': '*fp32', 'BLOCK': 'constexpr'}, {'BLOCK': block}, {}, "
        "{'num_warps': 1}, False)\n"
    )
    keys = []
    for changed in (
        text,
        "\n\n" + text,
        text.replace("x + x", "x * 2"),
        text.replace("num_warps': 1", "num_warps': 2"),
    ):
        (tmp_path / "moved.py").write_text(changed)
        keys.append([job.key for job in aot.jobs(["moved"])])
    assert keys[0] == keys[1]
    assert len({key for some in keys for key in some}) == 6  # two of each: what is called counts, and the options


def tree(tmp_path) -> Path:
    """A repository with one CUDA source."""
    for folder in ("csrc/cuda", "csrc/other", "cmake"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cuda/k.cu").write_text('#include "cuda/a.cuh"\n#include <cmath>\nint x = 1;  // one\n')
    (tmp_path / "csrc/cuda/a.cuh").write_text('#include "b.cuh"\n')
    (tmp_path / "csrc/cuda/b.cuh").write_text('#include "cuda/a.cuh"\nconst char* s = "// not a comment";\n')
    (tmp_path / "csrc/other/c.h").write_text("int y;\n")
    (tmp_path / "cmake/cuda.cmake").write_text('set(PYEFF_CUDA_ARCHS "80;90a;100;120")\noptions -O3\n')
    return tmp_path / "csrc/cuda/k.cu"


def test_the_key_of_a_cuda_source_is_of_all_that_it_includes(tmp_path):
    source = tree(tmp_path)
    assert [file.name for file in lock.closure(source, tmp_path / "csrc")] == ["a.cuh", "b.cuh", "k.cu"]
    first = lock.cuda_key(source, tmp_path)
    for path, old, new, same in (
        ("csrc/cuda/k.cu", "// one", "// two\n/* or\n more */\n", True),
        ("csrc/cuda/k.cu", "int x", "long x", False),
        ("csrc/cuda/b.cuh", "// not a", "// not the", False),
        ("csrc/other/c.h", "int y", "int z", True),
        ("cmake/cuda.cmake", "-O3", "-O2", False),
        ("cmake/cuda.cmake", "options", "# why\noptions", True),
    ):
        before = (tmp_path / path).read_text()
        (tmp_path / path).write_text(before.replace(old, new))
        assert (lock.cuda_key(source, tmp_path) == first) == same, (path, new)
        (tmp_path / path).write_text(before)


@pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not here")
def test_the_key_misses_no_header_that_the_build_read():
    build = ROOT / "build" / "release"
    objects = [log.with_suffix("") for log in ptxas.logs(build)]
    if not objects:
        pytest.skip("no CUDA sources were built")
    for target in objects:
        command = ["ninja", "-C", str(build), "-t", "deps", str(target.relative_to(build))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {(build / line.strip()).resolve() for line in said.splitlines() if line.startswith(" ")}
        source = ROOT / "csrc" / "cuda" / target.name.removesuffix(".o")
        ours = {file for file in found if file.is_relative_to(ROOT / "csrc")}
        assert len(ours) > 1
        assert ours <= {file.resolve() for file in lock.closure(source, ROOT / "csrc")}


def usage(arch: int, **figures) -> Usage:
    return Usage("cuda", "k<bf16>", "", arch, **{"registers": 100, "threads": 256, "matrix": (), **figures})


def test_a_cuda_source_is_built_for_some_and_locked_for_the_others(tmp_path, monkeypatch):
    source, locks = tree(tmp_path), tmp_path / "locks"
    monkeypatch.setattr(lock, "nvcc_version", lambda: "V1")
    monkeypatch.setattr(ptxas, "cuobjdump", lambda: "cuobjdump")
    every = [usage(arch, registers=arch) for arch in ARCHITECTURES]

    def seen(built):
        return lock.with_locked(source, built, locks, tmp_path)

    _, wrong, _ = seen(every)
    assert "k.cu has no lock; make resources ARGS=--write" in wrong[0]
    assert lock.to_build(5, locks, tmp_path) == ["80", "90a", "100", "120"]
    lock.lock_cuda(source, every, locks, tmp_path)
    assert [lock.to_build(turn, locks, tmp_path) for turn in (4, 5)] == [["80"], ["90a"]]
    assert lock.to_build(None, locks, tmp_path) == ["80", "90a", "100", "120"]
    found, wrong, skipped = seen(every[1:2])
    assert sorted(u.arch for u in found) == sorted(ARCHITECTURES)
    assert all(u in every for u in found)
    assert (wrong, skipped) == ([], [])
    # A figure that changed, a kernel that is new, one that is gone.
    _, (wrong,), _ = seen([usage(90, registers=91)])
    assert "k<bf16> sm_90: registers 90 is now 91" in wrong
    _, (wrong,), _ = seen([every[1], dataclasses.replace(every[1], kernel="new")])
    assert "1 of 2 entries are missing (new sm_90)" in wrong
    _, wrong, _ = seen([dataclasses.replace(every[1], kernel="new")])
    assert any("of kernels that are gone (k<bf16> sm_90)" in line for line in wrong)
    # A build that says nothing is no reason to believe the lock.
    assert seen([]) == ([], ["k.cu: its build reports no kernel"], [])
    # Another source, another compiler: then the lock says nothing.
    monkeypatch.setattr(lock, "nvcc_version", lambda: "V2")
    assert seen(every[:1]) == (every[:1], [], ["k.cu: locked by nvcc V1, here is V2"])
    assert len(lock.to_build(5, locks, tmp_path)) == 4
    monkeypatch.setattr(lock, "nvcc_version", lambda: "V1")
    source.write_text("int other;\n")
    found, wrong, _ = seen(every[:1])
    assert (found, len(lock.to_build(5, locks, tmp_path))) == (every[:1], 4)
    assert "is not the source that was locked; make resources ARGS=--write" in wrong[0]


def test_turns(monkeypatch, tmp_path):
    monkeypatch.delenv("PYEFF_TURN", raising=False)
    assert turn.asked() is None
    assert turn.current() == turn.of_commit()
    monkeypatch.setenv("PYEFF_TURN", "")
    assert turn.asked() is turn.current() is None
    monkeypatch.setenv("PYEFF_TURN", "7")
    assert turn.asked() == turn.current() == 7
    # Outside a repository, too.
    assert turn.of_commit(tmp_path) > 0
    zen = "flags\t: avx2 fma f16c avx512f avx512bw avx512vl avx512dq\n"
    assert turn.usable(zen) == ["portable", "avx2", "avx512"]
    assert turn.usable("") == ["portable"]
    assert [turn.isa(i, 1, zen) for i in range(3)] == ["avx2", "avx512", "portable"]
    assert turn.isa(None, 1, zen) == ""
