"""The portable CUDA layer under nvcc: every primitive compiles for every architecture to the instruction it stands for.
What it does is tested in tests/native, in its emulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "native" / "device" / "everything.cu"

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="these are not the sources")

EVERYWHERE = (
    r"cp\.async\.cg\.shared\.global",
    r"cp\.async\.commit_group",
    r"cp\.async\.wait_group[ \t]+0",
    r"cp\.async\.wait_group[ \t]+1",
    r"bar\.sync",
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16",
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16",
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    r"shfl\.sync\.idx",
    r"shfl\.sync\.bfly",
    r"vote\.sync\.ballot",
    r"cvt\.rn\.bf16x2\.f32",
    r"cvt\.rn\.f16x2\.f32",
    r"ld\.shared\.v4",
    r"st\.shared\.v4",
    r"ld\.global\.v4",
    r"st\.global\.v4",
)
CLUSTERS = (r"barrier\.cluster\.arrive\.release", r"barrier\.cluster\.wait\.acquire", r"mapa\.u64")
WGMMA = (
    r"wgmma\.fence\.sync\.aligned",
    r"wgmma\.commit_group\.sync\.aligned",
    r"wgmma\.wait_group\.sync\.aligned[ \t]+0",
    r"fence\.proxy\.async\.shared::cta",
    *(
        rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k16\.f32\.{t}\.{t}"
        for n in (16, 32, 64, 96, 128, 192, 256)
        for t in ("bf16", "f16")
    ),
)
EXPECTED = {
    "80": EVERYWHERE,
    "90a": EVERYWHERE + CLUSTERS + WGMMA,
    "100": EVERYWHERE + CLUSTERS,
    "120": EVERYWHERE + CLUSTERS,
}


def nvcc() -> str:
    """The compiler's path, or the test is skipped."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return path or pytest.skip("nvcc is not here")


@pytest.mark.parametrize("arch", EXPECTED)
def test_every_primitive_is_its_instruction_and_assembles_without_spills(arch, tmp_path):
    # Once for both: --keep leaves the PTX that the cubin is made of.
    command = [nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin"]
    command += ["--keep", "--keep-dir", str(tmp_path), str(SOURCE), "-o", str(tmp_path / "all.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said

    (kept,) = tmp_path.glob("*.ptx")
    ptx = kept.read_text()
    assert [name for name in EXPECTED[arch] if not re.search(name, ptx)] == []
    # Not where the hardware would not have them.
    assert ("wgmma.mma_async" in ptx) == (arch == "90a")
    assert ("mapa." in ptx) == (arch != "80")

    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    # use_basics and seven widths of use_wgmma, for both types, and use_cluster.
    assert len(spilled) == 17
    assert set(spilled) == {("0", "0")}
    # ptxas puts a wait after each wgmma where it sees the accumulators used in between, and says so.
    assert "serialized" not in said
