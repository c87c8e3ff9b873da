"""The choice of an implementation: context manager, environment, fallback, and what pyeff.info() says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyeff
from pyeff import backends
from tests import helpers, places
from tests.helpers import make_read, says

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_OPS = (
    "read_recurrence", "read_step", "ticket_linear", "ligo_grow", "multimask_targets", "multimask_gather",
    "multimask_scatter", "multimask_loss", "multimask_accumulate_", "multimask_relative_bias", "block_mask",
    "ema_update_", "ctc_loss", "linear_ctc_loss", "softmax_embedding", "beam_conv",
)  # fmt: skip


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter that sees this copy of pyeff."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {n: v for n, v in os.environ.items() if n != "PYEFF_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def output(code: str, **environment: str) -> str:
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_context_managers_nest():
    before = backends.current()
    with pyeff.backend("reference"):
        assert backends.current() == "reference"
        with pyeff.backend("auto"):
            assert backends.current() == "auto"
            with pyeff.backend("cpu"):
                assert backends.current() == "cpu"
            assert backends.current() == "auto"
        assert backends.current() == "reference"
    assert backends.current() == before


def fail_inside(name: str) -> None:
    with pyeff.backend(name):
        raise KeyError(name)


def test_the_choice_is_undone_after_an_error():
    before = backends.current()
    with pytest.raises(KeyError):
        fail_inside("reference")
    assert backends.current() == before


@pytest.mark.parametrize("name", ["", "CPU", "gpu", None])
def test_unknown_names_raise(name):
    before = backends.current()
    with pytest.raises(ValueError, match=says("backend", repr(name), "expected", "reference, cpu, triton, cuda, auto")):
        pyeff.backend(name).__enter__()
    assert backends.current() == before


def test_unknown_name_in_the_op_itself():
    call = make_read("gru")
    with pytest.raises((ValueError, RuntimeError), match=says("backend", "'gpu'", "expected")):
        torch.ops.pyeff.read_recurrence(call.phi, call.tensors["w_ih"], call.tensors["w_hh"], backend="gpu")


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda", "auto"])
def test_environment(name):
    code = "import pyeff; from pyeff import backends; print(backends.current(), pyeff.info()['backend'])"
    assert output(code, PYEFF_BACKEND=name) == f"{name} {name}"


def test_environment_that_is_wrong():
    done = python("import pyeff", PYEFF_BACKEND="fastest")
    assert done.returncode != 0
    assert "PYEFF_BACKEND is 'fastest', expected one of reference, cpu, triton, cuda, auto" in done.stderr


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_without_kernels_says_so(name):
    call = make_read("gru", dtype=torch.float32)
    with (
        pyeff.backend(name),
        pytest.raises(RuntimeError, match=says("read_recurrence", name, "cannot serve")) as caught,
    ):
        call()
    # The reason is the one that info gives.
    assert pyeff.info()["ops"]["read_recurrence"][name]["reason"] in str(caught.value)
    with pyeff.backend("auto"):
        assert call().shape == (5, 10)


def test_a_dtype_without_kernels_says_so(cpu_kernels):
    with pytest.raises(RuntimeError, match=says("read_recurrence", "cpu", "float16", "float64, float32, bfloat16")):
        make_read("gru", dtype=torch.float16)()
    call = make_read("gru", dtype=torch.float16, state=False)
    with pytest.raises(RuntimeError, match=says("read_step", "cpu", "float16")):
        pyeff.ops.read_step(call.phi[0], None, call.tensors["w_ih"], call.tensors["w_hh"])


def test_a_device_without_kernels_says_so(kernels):
    call = make_read("gru").map(lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=says("read_recurrence", kernels, "meta")):
        call()
    with pyeff.backend("auto"):
        assert call().device.type == "meta"


def test_auto_prefers_the_kernels():
    helpers.need("read_recurrence", "cpu")
    cpu = torch.device("cpu")
    for dtype in backends.DTYPES["cpu"]:
        assert backends.choose("read_recurrence", cpu, dtype, "auto") == "cpu"
    assert backends.choose("read_recurrence", cpu, torch.float16, "auto") == "reference"
    call = make_read("gru", dtype=torch.float32)
    with pyeff.backend("cpu"):
        expected = call()
    with pyeff.backend("auto"):
        assert torch.equal(call(), expected)


MISSING = """
import pathlib, torch
from pyeff import backends
backends.LIBRARY = pathlib.Path({library!r})
import pyeff
phi, gru = [torch.ones(4, 16)], torch.nn.GRU(16, 8)
print(tuple(pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0).shape))
state = pyeff.info()["ops"]["read_recurrence"]
print(state["reference"]["usable"], state["cpu"]["usable"], state["cpu"]["reason"])
try:
    with pyeff.backend("cpu"):
        pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0)
except RuntimeError as error:
    print(error)
"""


def test_without_the_library_the_reference_serves(tmp_path):
    shape, state, refusal = output(MISSING.format(library=str(tmp_path / "none.so"))).splitlines()
    assert shape == "(4, 8)"
    assert state.startswith("True False")
    assert "not built" in state
    assert "cpu" in refusal
    assert "not built" in refusal


def test_a_library_that_does_not_load(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library at all")
    shape, state, refusal = output(MISSING.format(library=str(broken))).splitlines()[:3]
    assert shape == "(4, 8)"
    assert state.startswith("True False")
    assert "does not load" in state
    assert "does not load" in refusal


WRONG_ISA = """
import torch, pyeff
from pyeff import backends
info = pyeff.info()
print(info["ops"]["read_recurrence"]["cpu"], info["cpu"]["reason"], info["cpu"]["isa_chosen"] == "", sep="|")
phi, gru = [torch.ones(4, 16)], torch.nn.GRU(16, 8)
print(tuple(pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0).shape))
try:
    with pyeff.backend("cpu"):
        pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0)
except RuntimeError as error:
    print(error)
"""


def test_an_instruction_set_that_does_not_exist():
    helpers.need("read_recurrence", "cpu")
    state, shape, refusal = output(WRONG_ISA, PYEFF_CPU_ISA="sse9").splitlines()
    said = "PYEFF_CPU_ISA is 'sse9', expected one of portable, avx2, avx512, avx512bf16"
    support, reason, nothing_chosen = state.split("|")
    assert "'usable': False" in support
    assert said in support
    assert said in reason
    assert nothing_chosen == "True"
    assert shape == "(4, 8)"
    assert "cannot serve" in refusal
    assert said in refusal
    assert "csrc/" not in refusal


def test_info_names_every_op_and_backend():
    info = pyeff.info()
    assert set(info["ops"]) == set(PUBLIC_OPS) == set(backends.OPS)
    for op, states in info["ops"].items():
        assert list(states) == ["reference", "cpu", "triton", "cuda"], op
        for name, state in states.items():
            assert set(state) == {"usable", "reason"}, (op, name)
            assert isinstance(state["usable"], bool)
            # A reason exactly where there is something to explain.
            assert bool(state["reason"]) != state["usable"], (op, name, state)
            if name in backends.OPS[op] and name in places.REQUIRED:
                assert state["usable"], (op, name, state)
    assert info["backend"] == backends.current()
    assert info["versions"]["torch"] == torch.__version__


def test_every_served_op_has_a_reference():
    for op, served in backends.OPS.items():
        assert not served or served[-1] == "reference", f"{op}: nothing serves it where no kernel can"
        assert set(served) <= set(backends.NAMES)
