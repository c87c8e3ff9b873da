"""The choice of the instruction set, the ceilings' loops, and the kernels' threads, through the library's own ops."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pyeff import backends

ISAS = ("portable", "avx2", "avx512", "avx512bf16")

pytestmark = pytest.mark.skipif(bool(backends.load_library()), reason=backends.load_library())


def chosen(cap: str) -> subprocess.CompletedProcess:
    code = "from pyeff import backends; backends.load_library(); import torch; print(torch.ops.pyeff_cpu.isa_chosen())"
    env = {**os.environ, "PYEFF_CPU_ISA": cap}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_sets_are_nested():
    for sets in (torch.ops.pyeff_cpu.isa_built().split(), torch.ops.pyeff_cpu.isa_detected().split()):
        assert tuple(sets) == ISAS[: len(sets)]
        assert sets


@pytest.mark.parametrize("cap", ISAS)
def test_environment_caps_the_choice(cap):
    here = set(torch.ops.pyeff_cpu.isa_built().split()) & set(torch.ops.pyeff_cpu.isa_detected().split())
    expected = [isa for isa in ISAS[: ISAS.index(cap) + 1] if isa in here][-1]
    assert chosen(cap).stdout.strip() == expected


def test_unknown_set_is_an_error():
    done = chosen("sse9")
    assert done.returncode != 0
    assert "PYEFF_CPU_ISA is 'sse9', expected one of portable, avx2, avx512, avx512bf16" in done.stderr


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_fma_loop_counts_what_all_threads_do(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = torch.ops.pyeff_cpu.fma_loop(dtype, 10)
        torch.set_num_threads(3)
        assert torch.ops.pyeff_cpu.fma_loop(dtype, 20) == 6 * once > 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "iterations"), [("int8", 1), ("float32", 0), ("float32", -1)])
def test_fma_loop_refuses(dtype, iterations):
    with pytest.raises(RuntimeError, match=r"fma_loop: (dtype|iterations) is .*expected"):
        torch.ops.pyeff_cpu.fma_loop(dtype, iterations)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000, (1 << 20) + 65, (3 << 20) - 1])
@pytest.mark.parametrize("offset", [0, 1, 63])
def test_stream_copy(size, offset):
    source = torch.randint(0, 256, (size + offset,), dtype=torch.uint8)[offset:]
    target = torch.full((size + offset + 64,), 0xEE, dtype=torch.uint8)
    torch.ops.pyeff_cpu.stream_copy(target[offset : offset + size], source)
    assert torch.equal(target[offset : offset + size], source)
    assert (target[:offset] == 0xEE).all()
    assert (target[offset + size :] == 0xEE).all()


def test_stream_copy_refuses():
    with pytest.raises(RuntimeError, match="dst has 8 bytes, expected those of src, 12"):
        torch.ops.pyeff_cpu.stream_copy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RuntimeError, match="src is not a contiguous tensor"):
        torch.ops.pyeff_cpu.stream_copy(torch.zeros(2), torch.zeros(4)[::2])


def test_stream_read_sees_every_byte():
    data = torch.zeros((2 << 20) + 77, dtype=torch.uint8)
    for at in (0, 8, 1 << 20, len(data) - 77, len(data) - 1):
        data[at] = 1
        assert torch.ops.pyeff_cpu.stream_read(data) != 0
        data[at] = 0
    assert torch.ops.pyeff_cpu.stream_read(data) == 0


def test_cuda_side_says_why_it_does_not_serve():
    # Without a driver both answer; neither raises and neither stops the library from loading.
    assert isinstance(torch.ops.pyeff_cuda.built_architectures(), str)
    if not torch.cuda.is_available():
        assert torch.ops.pyeff_cuda.why_not(0)
