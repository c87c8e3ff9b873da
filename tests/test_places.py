"""Where tests run, and that what was demanded cannot be skipped unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyeff import backends
from tests import places
from tests.places import Place

ROOT = Path(__file__).resolve().parents[1]


def collected(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    ours = ("PYEFF_TEST_REQUIRE", "PYEFF_EMULATE", "PYEFF_BACKEND", "PYEFF_TURN")
    clean = {n: v for n, v in os.environ.items() if n not in ours}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300)


def test_dtypes_follow_the_place():
    half, single, double = torch.float16, torch.float32, torch.float64
    for place in places.PLACES:
        assert set(place.dtypes) <= set(backends.DTYPES.get(place.backend, places.DTYPES))
    place = Place("triton", "cuda")
    assert not places.does_not_apply({"kernels": place, "dtype": half})
    assert not places.does_not_apply({"kernels": place, "cell": "gru"})
    assert places.does_not_apply({"kernels": place, "dtype": double})
    assert places.does_not_apply({"backend": Place("cpu", "cpu"), "dtype": half})
    assert not places.does_not_apply({"dtype": half, "place": "none"})
    assert Place("cpu", "cpu").dtypes[0] is double
    assert place.dtypes[0] is single


def test_a_place_is_in_force_and_leaves_nothing_behind():
    before = places.here(), backends.current(), torch.get_default_device()
    with places.at(Place("reference", "meta")):
        assert places.here().backend == backends.current() == "reference"
        assert torch.ones(1).device.type == "meta"
    assert (places.here(), backends.current(), torch.get_default_device()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is demanded")
@pytest.mark.parametrize("name", ["triton", "cuda", "gpu", "emulation", "trtion"])
def test_what_is_demanded_and_missing_ends_the_run(name):
    done = collected("tests/test_read_emulated.py", PYEFF_TEST_REQUIRE=name)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"PYEFF_TEST_REQUIRE is not met:\n{name}: " in done.stderr


def test_turns_collect_other_cases_of_each_test_of_an_operation_and_the_same_of_the_others():
    files = ("tests/test_ticket.py", "tests/test_docs.py")
    one, other = (set(re.findall(r"(\S+::\w+)(.*)", collected(*files, PYEFF_TURN=turn).stdout)) for turn in ("0", "1"))
    assert {name for name, _ in one} == {name for name, _ in other}
    for some in (one - other, other - one):
        assert {name.partition("::")[0] for name, _ in some} == {"tests/test_ticket.py"}


def test_emulation_collects_the_backends_of_the_gpu_alone():
    done = collected("tests/test_read_emulated.py", "tests/test_read_nn.py", "tests/test_docs.py", PYEFF_EMULATE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = re.findall(r"::\w+\[(\w+)(.*)\]", done.stdout)
    assert {where for where, _ in tests} == {"triton_emulated", "cuda_emulated"}
    # Not every test is one for an interpreter; what asks for no place needs no emulation.
    assert set(re.findall(r"test_read_nn.py::.*(triton|cuda)_emulated", done.stdout)) == {"cuda"}
    assert "test_docs" not in done.stdout
    # The interpreter is wrong in bfloat16, the emulated CUDA kernels are not.
    assert {where for where, others in tests if "bfloat16" in others} == {"cuda_emulated"}
