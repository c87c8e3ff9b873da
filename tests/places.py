"""Where a test of an operation runs: the pairs of backend and device that this machine has.

The definition and the CPU kernels on CPU tensors; where there is a GPU, the definition and its two backends on CUDA
tensors, too; PYEFF_TEST_PLACES=cuda leaves out the CPU, and the tests that ask for no place. With PYEFF_EMULATE=1 the
GPU's backends alone, emulated on CPU tensors, in a run of its own (``make emulate``). Triton's interpreter is slow: it
gets the tests that are marked ``emulated``, and every test with PYEFF_EMULATE=all.

A test asks for a fixture of ``conftest.py`` (``backend``, ``kernels``, ..), and runs once at each place with that
backend in force and that device as torch's default one. What depends on the place asks :func:`here`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import pyeff
from pyeff import backends

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What must be there: backends by name, `dev` (the development module), `gpu`, `emulation`. What is missing ends the
# run, or fails a test that would otherwise be skipped.
REQUIRED = tuple(filter(None, os.environ.get("PYEFF_TEST_REQUIRE", "").split(",")))


class Place(NamedTuple):
    """A backend and the type of device that its tensors are on."""

    backend: str
    device: str

    @property
    def emulated(self) -> bool:
        """Whether a GPU's kernels run on CPU tensors there."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    def __str__(self) -> str:
        where = "emulated" if self.emulated else "" if self.device == "cpu" else f"on_{self.device}"
        return "_".join(filter(None, (self.backend, where)))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What can be computed there, the widest first."""
        if self.backend not in backends.DTYPES:
            return DTYPES[:3]
        served = backends.DTYPES[self.backend]
        # Triton's interpreter is wrong for matrix products and arithmetic in bfloat16.
        wrong = (torch.bfloat16,) if backends.EMULATED and self.backend == "triton" else ()
        return tuple(dtype for dtype in DTYPES if dtype in served and dtype not in wrong)


def _places() -> tuple[Place, ...]:
    if backends.EMULATED:
        return Place("triton", "cpu"), Place("cuda", "cpu")
    found = [Place("reference", "cpu"), Place("cpu", "cpu")]
    if torch.cuda.is_available():
        found += [Place(name, "cuda") for name in ("reference", "triton", "cuda")]
    return tuple(place for place in found if place.device == os.environ.get("PYEFF_TEST_PLACES", place.device))


PLACES = _places()
KERNELS = tuple(place for place in PLACES if place.backend != "reference")
# A test that asks for no place is on the CPU, by whatever backend ``auto`` takes.
_here = Place("auto", "cpu")


def here() -> Place:
    """The place of the running test."""
    return _here


@contextlib.contextmanager
def at(place: Place) -> Iterator[None]:
    """Puts the place in force."""
    global _here
    before, _here = _here, place
    # A default device is a mode around every call, which the CPU does without.
    if place.device != "cpu":
        torch.set_default_device(place.device)
    try:
        with pyeff.backend(place.backend):
            yield
    finally:
        _here = before
        if place.device != "cpu":
            torch.set_default_device(None)


def does_not_apply(parameters: dict[str, Any], emulated: bool = False) -> bool:
    """Whether a test with these parameters is left out.

    It is where a place is paired with a dtype that nothing computes in there; and unless it is marked ``emulated``,
    where it asks for the interpreter, or for no place in a run of those that do.
    """
    place = next((value for value in parameters.values() if isinstance(value, Place)), None)
    if place is None:
        return (backends.EMULATED or "PYEFF_TEST_PLACES" in os.environ) and not emulated
    if backends.EMULATED and place.backend == "triton" and not emulated and os.environ["PYEFF_EMULATE"] != "all":
        return True
    return parameters.get("dtype", place.dtypes[0]) not in place.dtypes


def unmet(required: tuple[str, ...] = REQUIRED) -> list[str]:
    """Why nothing here would test what PYEFF_TEST_REQUIRE demands; one line for each.

    Where there is a place for a backend that cannot be used there, its tests fail, and the others run.
    """
    problems = []
    for name in required:
        if name == "gpu" and not torch.cuda.is_available():
            problems.append("gpu: torch sees no CUDA device")
        elif name == "emulation" and not backends.EMULATED:
            problems.append("emulation: PYEFF_EMULATE is not set")
        elif name in backends.NAMES:
            if name not in [place.backend for place in PLACES]:
                problems.append(f"{name}: nothing runs it here, there is no GPU and PYEFF_EMULATE is not set")
        elif name not in ("gpu", "emulation", "dev"):
            problems.append(f"{name}: expected one of {', '.join((*backends.NAMES, 'dev', 'gpu', 'emulation'))}")
    return problems
