"""The resource gates: every GPU kernel compiled for every architecture, and planted kernels that each gate catches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import aot, gates, gpus, ptxas, resource_table, resources
from benchmarks.resources import Usage
from scripts import gpu_resources, turn

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "release"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")

LOG = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in function '_ZN5pyeff3gpu5outerINS0_4bf16EEEvNS0_6ParamsE'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5pyeff3gpu4foldEv' for 'sm_80'
ptxas info    : Function properties for _ZN5pyeff3gpu4foldEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 512 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 8.291 ms
ptxas info    : Compiling entry function '_ZN5pyeff3gpu5outerINS0_4bf16EEEvNS0_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN5pyeff3gpu5outerINS0_4bf16EEEvNS0_6ParamsE
    256 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 4.587 ms
ptxas info    : Function properties for _ZN5pyeff3gpu4slowEPfi
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
OUTER = "_ZN5pyeff3gpu5outerINS0_4bf16EEEvNS0_6ParamsE"


def test_a_log_of_ptxas_is_read():
    fold, outer = ptxas.parse(LOG)
    assert (fold.arch, fold.registers, fold.stack, fold.spill_stores, fold.shared) == (80, 14, 0, 0, 512)
    assert fold.warnings == []
    # With what a function that was not inlined adds.
    assert (outer.arch, outer.registers, outer.stack) == (90, 128, 264)
    assert (outer.spill_stores, outer.spill_loads) == (16, 20)
    assert len(outer.warnings) == 1
    assert "serialized" in outer.warnings[0]


@pytest.mark.parametrize("word", ["Used", "bytes stack frame"])
def test_a_log_without_the_numbers_is_not_read_as_zero(word):
    lines = [line for line in LOG.splitlines() if word not in line]
    with pytest.raises(ValueError, match="ptxas reports no"):
        ptxas.parse("\n".join(lines))


def test_names_are_short():
    name = "void pyeff::gpu::(anonymous namespace)::project<pyeff::gpu::bf16, (int)128, (pyeff::Cell)1>(pyeff::P)"
    assert ptxas.short(name) == "project<bf16, 128, Cell 1>"
    assert ptxas.short("pyeff::gpu::fold(pyeff::gpu::Params<float>)") == "fold"
    if shutil.which("c++filt"):
        assert ptxas.demangled([OUTER]) == {OUTER: "outer<bf16>"}


def test_dumps_of_cuobjdump_are_read():
    elf = (
        "arch = sm_90a\n.nv.info\n\tAttribute:\tEIATTR_REGCOUNT\n\n.nv.info._Zouter\n\tAttribute:\tEIATTR_PARAM_CBANK\n"
        "\tFormat:\tEIFMT_SVAL\n\tValue:\t0x6 0x100160 \n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n"
        "\tValue:\t0x80 0x2 0x1 \n\n.nv.info._Zfold\n\tAttribute:\tEIATTR_PARAM_CBANK\n"
    )
    assert ptxas.launch_threads(elf) == {("_Zouter", 90): 256}
    sass = (
        "arch = sm_80\n\t\tFunction : _Za\n /*00b0*/ HMMA.16816.F32.BF16 R8, R8, R8, RZ ;\n"
        "\t\tFunction : _Zb\n FFMA R1 ;\narch = sm_90a\n\t\tFunction : _Za\n HGMMA.64x128x16.F32.BF16 R24 ;\n"
    )
    expected = {("_Za", 80): (gpus.MMA,), ("_Zb", 80): (), ("_Za", 90): (gpus.WGMMA,)}
    assert ptxas.matrix_by_kernel(sass) == expected
    assert ptxas.matrix_instructions("  wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16") == (gpus.WGMMA,)
    assert ptxas.matrix_instructions("  tcgen05.mma.cta_group::1.kind::f16") == (gpus.TCGEN05,)


# The architecture's limits, each passed by one.
GOOD = Usage("cuda", "k", "", 90, registers=128, shared=64 * 1024, threads=256, matrix=(gpus.WGMMA,))
BAD = {
    "spills": {"spill_stores": 4, "stack": 8},
    "spills: 0 bytes stored": {"spill_loads": 4},
    "stack frame of 8": {"stack": 8},
    "are more than 65536": {"threads": 512, "registers": 129},
    "the limit is 232448": {"shared": 227 * 1024 + 1},
    "tensor memory": {"tensor_memory": 1},
    "the limit is 1024": {"threads": 1025, "registers": 8},
    "serialized": {"warnings": ("wgmma.mma_async instructions are serialized",)},
    "expected mma.sync, found wgmma": {"expects": (gpus.MMA,)},
    "expected none, found wgmma": {"expects": (resources.NO_MATRIX,)},
    "does not compile: why": {"error": "why"},
}


@pytest.mark.parametrize("text", BAD)
def test_each_gate_can_fail(text):
    assert GOOD.problems() == []
    problems = dataclasses.replace(GOOD, **BAD[text]).problems()
    assert len(problems) == 1
    assert text in problems[0]


def test_a_gate_is_silent_about_what_is_not_known():
    unknown = dataclasses.replace(GOOD, shared=None, threads=None, matrix=None, expects=(gpus.MMA,))
    assert unknown.problems() == []
    assert unknown.blocks_per_sm is None
    assert "-" in resources.tables([unknown])[0].rows[0]


def test_limits_are_those_of_the_architecture():
    limits = {cc: a.shared_per_block for cc, a in gpus.ARCHITECTURES.items()}
    assert limits == {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
    for cc, limit in limits.items():
        assert dataclasses.replace(GOOD, arch=cc, shared=limit).problems() == []
        assert dataclasses.replace(GOOD, arch=cc, shared=limit + 1).problems() != []


def test_exclusions_say_what_fails_and_nothing_else(tmp_path):
    good, bad = dataclasses.replace(GOOD, config="small"), dataclasses.replace(GOOD, config="large", spill_stores=4)
    failures = gates.triton_failures([good, bad], {})
    assert len(failures) == 1
    assert "k/large on sm_90 fails a gate and is not excluded" in failures[0]
    table = gates.exclusions([good, bad])
    assert table == {"k/large": {90: "spills"}}
    assert gates.triton_failures([good, bad], table) == []
    # Excluded without reason, and excluded without being there.
    (stale,) = gates.triton_failures([good, dataclasses.replace(bad, spill_stores=0)], table)
    assert "k/large on sm_90 is excluded and passes every gate" in stale
    (gone,) = gates.triton_failures([good], table)
    assert "k/large on sm_90 is excluded and does not exist" in gone
    # All of a kernel's configurations fail.
    (none,) = gates.triton_failures([bad], table)
    assert "k has no configuration that passes on sm_90" in none

    path = tmp_path / "excluded.py"
    for wanted in (table, {}):
        gates.write_exclusions(wanted, path)
        assert gates.read_exclusions(path) == wanted
    assert gates.read_exclusions(tmp_path / "nothing.py") == {}


def test_a_cuda_kernel_takes_what_it_is_launched_with():
    plans = {"k": gates.Launched(256, 1000, 0, gpus.WGMMA), "other<*, Cell 1>": gates.Launched(128, 0, 90)}
    kernel = dataclasses.replace(GOOD, shared=24, threads=512)
    (found,), failures = gates.launched([kernel], plans)
    assert (found.threads, found.shared, found.expects, failures) == (256, 1024, (gpus.WGMMA,), [])
    assert len(gates.launched([dataclasses.replace(kernel, threads=128)], plans)[1]) == 1
    assert len(gates.launched([dataclasses.replace(kernel, kernel="unknown")], plans)[1]) == 1
    assert gates.launched([dataclasses.replace(kernel, kernel="probe")], plans)[1] == []
    elsewhere = dataclasses.replace(kernel, kernel="other<bf16, Cell 1>", arch=80)
    assert gates.launched([elsewhere], plans) == ([], [])
    assert gates.launched([dataclasses.replace(elsewhere, arch=90)], plans)[0][0].threads == 128


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_lists_of_launches_name_threads_and_shared_memory():
    plans = gates.launches()
    assert plans["read_fold<*"] == (128, 16, 0, "none")
    assert plans["read_resident<bf16, Cell 1>"][2:] == (90, "wgmma")
    assert all(plan.shared <= gpus.ARCHITECTURES[plan.arch or 120].shared_per_block for plan in plans.values())


def test_a_stack_frame_of_a_cuda_kernel_needs_a_reason_and_a_spill_has_none():
    framed = dataclasses.replace(GOOD, stack=8)
    assert len(gates.cuda_failures([framed], {})) == 1
    assert gates.cuda_failures([framed], {"k": "an array that is indexed at run time"}) == []
    assert len(gates.cuda_failures([dataclasses.replace(framed, spill_loads=4)], {"k": "why"})) == 2
    assert len(gates.cuda_failures([GOOD], {"k": "why"})) == 1


def test_artefacts_hold_every_number_and_the_skips(tmp_path):
    bad = dataclasses.replace(GOOD, config="large", spill_stores=4)
    report = gates.Report([GOOD, bad], {"triton": "1"}, ["nobody: why"], ["something"])
    data, page = gates.save(report, tmp_path, {"k/large": {90: "spills"}})
    assert resources.load(data) == ([GOOD, bad], {"triton": "1"})
    assert json.loads(data.read_text())["kernels"][0]["blocks_per_sm"] == GOOD.blocks_per_sm == 2
    text = page.read_text()
    assert "SKIPPED: nobody: why" in text
    assert "excluded; spills" in text
    assert "- something" in text
    assert gpu_resources.best([bad, GOOD]) == [GOOD]


def test_the_table_of_the_predictions_keeps_what_could_not_be_looked_at(tmp_path):
    path = tmp_path / "table.py"
    triton = dataclasses.replace(GOOD, backend="triton", kernel="recur", config="large", variant="few-gru-rms-bfloat16")
    cuda = dataclasses.replace(GOOD, kernel="read_fold<bf16>")
    two = dataclasses.replace(triton, registers=64, shared=0)  # more of these fit: not the one that counts
    odd = dataclasses.replace(triton, variant="odd-gru-rms-bfloat16", registers=255)
    gates.write_table(*gates.kept(gates.Report([triton, two, odd, cuda], {"triton": "1", "nvcc": "2"}), path), path)
    first, versions = gates.kept(gates.Report(), path)
    assert first == {"recur/large gru": {90: (256, 2, "wgmma")}, "read_fold<bf16>": {90: (256, 2, "wgmma")}}
    assert versions == {"triton": "1", "nvcc": "2"}
    # A backend that was looked at counts as it is now.
    second, versions = gates.kept(gates.Report([], {"triton": "3"}), path)
    assert (list(second), versions) == (["read_fold<bf16>"], {"triton": "3", "nvcc": "2"})


@pytest.fixture(scope="module")
def planted():
    pytest.importorskip("triton")
    usages = aot.run(aot.jobs(["tests.planted_kernels"]))
    return {(usage.name, usage.arch): usage for usage in usages}


PLANTED = {
    "spills/256x256 bf16": "spills",
    "shared/256x128 bf16": "shared memory",
    "tf32/64x64 fp32": "matrix instruction: expected none",
    "no_matrix/256": "found no matrix instruction",
    "broken/256": "does not compile",
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", gpus.ARCHITECTURES)
def test_planted_triton_kernels_fail_their_gate_and_the_good_one_none(planted, arch):
    for name, text in PLANTED.items():
        assert any(text in problem for problem in planted[name, arch].problems()), name
    good = planted["good/64x64 bf16", arch]
    assert good.problems() == []
    assert good.matrix == gpus.ARCHITECTURES[arch].matrix[:1]
    assert good.threads == 128
    assert good.blocks_per_sm >= 1
    ieee = planted["good/64x64 fp32", arch]
    assert (ieee.problems(), ieee.matrix) == ([], ())


@pytest.mark.slow
def test_planted_triton_kernels_without_a_configuration_are_named(planted):
    kernels = {kernel for kernel, _ in resources.without_configuration(list(planted.values()))}
    assert kernels == {"shared", "tf32", "no_matrix", "broken"}


@pytest.mark.slow
def test_what_was_compiled_is_kept_and_a_change_is_seen(planted, tmp_path):
    jobs = {job.arch: job for job in aot.jobs(["tests.planted_kernels"], [80, 120]) if job.variant == "fp32"}
    (first,) = aot.run([jobs[80]], cache=tmp_path)
    assert first == planted[first.name, 80]
    (entry,) = tmp_path.iterdir()
    # What comes from the cache is shown by changing what is in it.
    entry.write_text(entry.read_text().replace(f'"registers": {first.registers}', '"registers": 7'))
    assert aot.run([jobs[80]], cache=tmp_path)[0].registers == 7
    (other,) = aot.run([jobs[120]], cache=tmp_path)
    assert other.registers != 7
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_compiler_that_dies_is_a_finding(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    (tmp_path / "dying_kernels.py").write_text(
        "import os, sys\n\nfrom benchmarks.aot import Case\nfrom tests import planted_kernels\n\n\nclass Dies:\n"
        "    __name__ = property(lambda self: os.abort() if 'serve' in sys.argv else 'dies')\n\n\ndef aot_cases():\n"
        "    yield Case('dies/1', 80, Dies(), {}, {}, {}, {}, False)\n    yield from planted_kernels.aot_cases()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    dead, good = aot.run(aot.jobs(["dying_kernels"], [80])[:2], processes=1)
    assert "process died" in dead.error
    assert good.problems() == []


@pytest.fixture(scope="module")
def triton_report():
    pytest.importorskip("triton")
    report = gates.Report()
    gates.triton(report, turn=turn.current())
    return report


@pytest.fixture(scope="module")
def cuda_report():
    report = gates.Report()
    gates.cuda(report, BUILD)
    if not report.usages:
        pytest.skip("; ".join(report.skipped))
    return report


@pytest.mark.slow
def test_every_triton_configuration_passes_or_is_excluded(triton_report):
    assert triton_report.failures == []
    assert {usage.arch for usage in triton_report.usages} == set(gpus.ARCHITECTURES)
    assert {usage.expects for usage in triton_report.usages} >= {(resources.NO_MATRIX,), (gpus.WGMMA,), (gpus.TCGEN05,)}


@pytest.mark.slow
def test_every_cuda_kernel_passes(cuda_report):
    assert cuda_report.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton_report", "cuda_report"])
def test_the_table_of_the_predictions_is_what_the_compilers_say(name, request):
    report = request.getfixturevalue(name)
    if any(resource_table.VERSIONS.get(tool) != version for tool, version in report.versions.items()):
        pytest.skip(f"the table is by {resource_table.VERSIONS}, here is {report.versions}")
    built = {usage.arch for usage in report.usages}
    for kernel, entries in gates.table(report.usages).items():
        committed = dict(zip(gpus.ARCHITECTURES, resource_table.RESOURCES.get(kernel, ()), strict=False))
        known = {arch: entry for arch, entry in committed.items() if entry and arch in built}
        assert known == entries, f"{kernel}: python scripts/gpu_resources.py --write"


SPILLING = """
__global__ void __launch_bounds__(256, 1) framed(float* x, int i) {
  float t[64];
  for (int k = 0; k < 64; ++k) t[(k * i) % 64] = x[k];
  x[0] = t[i % 7] + t[i % 63];
}
__global__ void __launch_bounds__(1024, 2) spilled(float* x, int n) {
  float t[64];
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < 64; ++k) t[k] = (i ? t[k] * t[(k + 7) % 64] : 0.f) + x[i * 64 + k];
  }
#pragma unroll
  for (int k = 0; k < 64; ++k) x[k] = t[k];
}
__global__ void __launch_bounds__(256, 1) good(float* x) { x[threadIdx.x] *= 2; }
"""


@needs_nvcc
@pytest.mark.slow
def test_planted_cuda_kernels_fail_their_gate_and_the_good_one_none(tmp_path):
    source, target = tmp_path / "planted.cu", tmp_path / "planted.cu.o"
    source.write_text(SPILLING)
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command = ["nvcc", "-O3", "-Xptxas=-v", *archs, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    Path(f"{target}.log").write_text(done.stdout + done.stderr)
    report, good = gates.Report(), gates.Launched(256, 1000)
    gates.cuda(report, tmp_path, {"good": good, "framed": good, "spilled": good._replace(arch=80)})
    found = {(usage.kernel, usage.arch): usage.problems() for usage in report.usages}
    # Where a kernel is not launched, what it takes is of no interest.
    assert set(found) == {("spilled", 80), *itertools.product(("framed", "good"), (80, 90))}
    assert any("spills" in problem for problem in found["spilled", 80])
    for arch in (80, 90):
        assert any("stack frame" in problem for problem in found["framed", arch])
        assert found["good", arch] == []
    assert len(report.failures) == 3
    assert {usage.shared for usage in report.usages} == {1000}
    assert any("not built for sm_100, sm_120" in line for line in report.skipped)
    if ptxas.cuobjdump():
        threads = {usage.kernel: usage.threads for usage in report.usages}
        assert threads == {"framed": 256, "spilled": 256, "good": 256}


def test_the_script_prints_the_skips_and_fails_with_a_gate(tmp_path, capsys, monkeypatch):
    def compiled(report, excluded, **_):
        report.usages = [dataclasses.replace(GOOD, backend="triton", spill_stores=4)]
        report.failures = gates.triton_failures(report.usages, excluded)

    monkeypatch.setattr(gates, "triton", compiled)
    assert gpu_resources.main(["--build", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "SKIPPED: CUDA C++" in printed
    assert "FAIL: k on sm_90 fails a gate" in printed
    assert (tmp_path / "out" / "resources.json").exists()
    assert gpu_resources.main(["--build", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "cuda"]) == 0


def test_a_build_that_stopped_half_way(tmp_path, monkeypatch):
    """The kernels of a source without a report are missed, not forgotten."""
    monkeypatch.setattr(gates, "launches", dict)
    (tmp_path / "read.cu.o.log").touch()
    report = gates.Report()
    gates.cuda(report, tmp_path)
    assert any("no report on" in line and "read_backward.cu" in line for line in report.failures)
