"""The limits of the architectures: what fits an SM, against NVIDIA's own calculator."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpus

OCCUPANCY = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, threads, registers; long shared, optin, sm, most;
  while (std::scanf("%d %d %d %ld %ld %ld %ld", &major, &threads, &registers, &shared, &optin, &sm, &most) == 7) {
    cudaOccDeviceProp p; p.computeMajor = major; p.computeMinor = 0; p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = int(most); p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32;
    p.sharedMemPerBlock = 48 * 1024; p.sharedMemPerMultiprocessor = sm; p.sharedMemPerBlockOptin = optin;
    p.reservedSharedMemPerBlock = 1024; p.numSms = 1;
    cudaOccFuncAttributes a; a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF; a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = optin; a.numBlockBarriers = 1;
    cudaOccDeviceState s; s.cacheConfig = CACHE_PREFER_NONE; s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r;
    cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
    std::printf("%d\n", e == CUDA_OCC_SUCCESS ? r.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def occupancy_header() -> Path | None:
    places = [Path("/usr/local/cuda/include")]
    if shutil.which("nvcc"):
        places.append(Path(shutil.which("nvcc")).resolve().parents[1] / "include")
    triton = next((Path(p) / "triton" for p in sys.path if (Path(p) / "triton" / "backends").is_dir()), None)
    if triton:
        places.append(triton / "backends" / "nvidia" / "include")
    return next((place for place in places if (place / "cuda_occupancy.h").exists()), None)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.skipif(not occupancy_header(), reason="no cuda_occupancy.h")
def test_occupancy_is_that_of_nvidias_own_calculator(tmp_path):
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    command = ["c++", "-std=c++17", "-w", "-I", occupancy_header(), tmp_path / "occupancy.cpp", "-o", program]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    shared = (0, 1, 16 * 1024, 48 * 1024, 96 * 1024, 99 * 1024, 163 * 1024, 227 * 1024)
    threads, registers = (32, 96, 128, 256, 384, 1024), (16, 40, 64, 96, 168, 255)
    cases = list(itertools.product(gpus.ARCHITECTURES, threads, registers, shared))
    cases = [case for case in cases if case[3] <= gpus.ARCHITECTURES[case[0]].shared_per_block]
    lines = []
    for cc, *rest in cases:
        a = gpus.ARCHITECTURES[cc]
        lines.append(" ".join(map(str, (cc // 10, *rest, a.shared_per_block, a.shared_per_sm, a.threads_per_sm))))
    done = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in done.stdout.split()]
    assert theirs == [gpus.blocks_per_sm(*case) for case in cases]
    assert len(set(theirs)) > 10
