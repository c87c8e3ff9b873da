"""Which implementation of an operation runs, and why the others do not.

Every operation has up to four implementations: ``reference`` (plain PyTorch, always there), ``cpu`` (the compiled
C++ kernels), ``triton`` and ``cuda``. ``auto`` takes the fastest that can serve the tensors at hand and falls back
silently; naming one makes its absence an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
LIBRARY = Path(__file__).with_name("_C.abi3.so")
# The CUDA C++ kernels built for the CPU, for tests: only in a checkout.
EMULATED_LIBRARY = Path(__file__).parents[1] / "build" / "dev" / "pyeff_emulated.so"

# For each public operation: the implementations that this release has. The order is the order of preference.
OPS: dict[str, tuple[str, ...]] = {
    "read_recurrence": ("cuda", "triton", "cpu", "reference"),
    "read_step": ("cuda", "triton", "cpu", "reference"),
    "ticket_linear": ("cuda", "triton", "cpu", "reference"),
    "ligo_grow": (),
    "multimask_targets": ("cuda", "triton", "cpu", "reference"),
    "multimask_accumulate_": ("cuda", "triton", "cpu", "reference"),
    "multimask_gather": ("cuda", "triton", "cpu", "reference"),
    "multimask_scatter": ("cuda", "triton", "cpu", "reference"),
    "multimask_loss": ("cuda", "triton", "cpu", "reference"),
    "multimask_relative_bias": ("cuda", "triton", "cpu", "reference"),
    "block_mask": ("cuda", "triton", "cpu", "reference"),
    "ema_update_": ("cuda", "triton", "cpu", "reference"),
    "ctc_loss": (),
    "linear_ctc_loss": (),
    "softmax_embedding": (),
    "beam_conv": (),
}

# What the compiled kernels of a backend can compute with.
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

# Process-wide, as torch.backends is. A plain module global, so that torch.compile guards on it.
_choice = os.environ.get("PYEFF_BACKEND", "auto")
if _choice not in (*NAMES, "auto"):
    raise ValueError(f"PYEFF_BACKEND is {_choice!r}, expected one of {', '.join((*NAMES, 'auto'))}")


# For tests: the GPU's kernels serve CPU tensors, Triton's by its interpreter and those of CUDA C++ by a build of the
# same source for the CPU. Only where they are named: this is slow.
_emulate = os.environ.get("PYEFF_EMULATE", "0")
if _emulate not in ("", "0", "1", "all"):
    raise ValueError(f"PYEFF_EMULATE is {_emulate!r}, expected 0, 1 or all")
EMULATED = _emulate in ("1", "all")
_TRITON_FIRST = EMULATED and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if EMULATED:
    # Triton decides as it is imported whether it interprets, and torch may import it before a kernel is called.
    os.environ["TRITON_INTERPRET"] = "1"


@dataclass(frozen=True)
class Support:
    """Whether a backend can serve an operation, and the reason where it cannot."""

    usable: bool
    reason: str = ""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the implementation for the operations called inside.

    Args:
        name (str): ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"auto"``. The choice is process-wide, and
            one that cannot serve a call raises there instead of falling back.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import torch, pyeff
        >>> phi, gru = [torch.randn(4, 16)], torch.nn.GRU(16, 8)
        >>> with pyeff.backend("reference"):
        ...     pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0).shape
        torch.Size([4, 8])
    """
    global _choice
    if name not in (*NAMES, "auto"):
        raise ValueError(f"backend is {name!r}, expected one of {', '.join((*NAMES, 'auto'))}")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def current() -> str:
    """The backend in force: a name, or ``"auto"``."""
    return _choice


@functools.cache
def load_library() -> str:
    """Loads the compiled kernels once. Returns an empty string, or the reason why they cannot be used."""
    if not LIBRARY.exists():
        return (
            "the compiled library was not built (no C++ compiler when pyeff was installed, PYEFF_NO_EXTENSION, or a "
            "checkout that was never built)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    try:
        torch.ops.pyeff_cpu.isa_chosen()  # now, so that a wrong PYEFF_CPU_ISA is a reason and no crash later
    except RuntimeError as error:
        return f"the compiled library cannot be used: {str(error).splitlines()[0]}"
    return ""


@functools.cache
def load_emulated() -> str:
    """Loads the CUDA kernels that were built for the CPU. Returns an empty string, or why they cannot be used."""
    if reason := load_library():
        return reason
    if not EMULATED_LIBRARY.exists():
        return "PYEFF_EMULATE is set and build/dev/pyeff_emulated.so was not built (PYEFF_DEV=1, in a checkout)"
    try:
        torch.ops.load_library(str(EMULATED_LIBRARY))
    except OSError as error:
        return f"the emulated CUDA kernels do not load: {error}"
    return ""


def triton_kernels(stem: str) -> Any:
    """The module of Triton kernels of one stem: in an installed pyeff, and in a checkout where they lie beside it."""
    if "pyeff.kernels" not in sys.modules and importlib.util.find_spec("pyeff.kernels") is None:
        folder = Path(__file__).parents[1] / "kernels"
        spec = importlib.util.spec_from_file_location(
            "pyeff.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError("this installation of pyeff has no Triton kernels")
        sys.modules["pyeff.kernels"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"pyeff.kernels.{stem}")


def support(op: str, name: str) -> Support:
    """Whether backend ``name`` can serve ``op`` on this machine at all."""
    served = OPS[op]
    if not served:
        return Support(False, "not in this release")
    if name == "reference":
        return Support(True)
    if name not in served:
        return Support(False, f"no {name} kernel in this release")
    if name == "cpu":
        reason = _missing(name)
        return Support(not reason, reason)
    if EMULATED:
        reason = _missing(name) or (load_emulated() if name == "cuda" else "")
        return Support(not reason, reason or "emulated on the CPU (PYEFF_EMULATE), where it is named")
    if not torch.cuda.is_available():
        return Support(False, "torch sees no CUDA device")
    reasons = [_device_problem(name, i) for i in range(torch.cuda.device_count())]
    return Support(not all(reasons), reasons[0] if all(reasons) else "")


@functools.cache
def _missing(name: str) -> str:
    """What a backend needs and this installation lacks; an empty string where nothing does."""
    if name == "triton" and _TRITON_FIRST:
        return "PYEFF_EMULATE is set and triton was imported before pyeff, too early to interpret its kernels"
    if name == "triton":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    return load_library()


@functools.cache
def _unusable(name: str) -> bool:
    """Whether a backend serves nothing on this machine: asked once, since every call of an op would ask."""
    return not support(next(op for op, served in OPS.items() if name in served), name).usable


@functools.cache
def _device_problem(name: str, device: int) -> str:
    """Why the kernels of one of the GPU's backends do not run on a device, or an empty string.

    By what the device says of itself: to ask the CUDA runtime whether a kernel is there would take memory on every
    device that is asked, in every process.
    """
    if reason := _missing(name):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if name == "triton":
        return "" if major >= 8 else f"the Triton kernels need compute capability 8.0, this device has {major}.{minor}"
    built = torch.ops.pyeff_cuda.built_architectures()
    if not built:
        return "the compiled library has no CUDA code (no nvcc when pyeff was built)"
    if any(_runs_on(arch, major, minor) for arch in built.split()):
        return ""
    return f"the CUDA kernels were built for {built}, which does not serve compute capability {major}.{minor}"


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for an architecture as nvcc names it ("80", "90a") runs on a device of a compute capability."""
    digits = arch.rstrip("af")
    of_major, of_minor = int(digits[:-1]), int(digits[-1])
    return of_major == major and (of_minor == minor if arch.endswith("a") else of_minor <= minor)


def refusal(
    op: str, name: str, device: torch.device, dtype: torch.dtype, transform: str = "", named: bool = True
) -> str:
    """Why backend ``name`` cannot serve this call; an empty string where it can."""
    if name == "reference":
        return "" if OPS[op] else "not in this release"
    if name not in OPS[op] or _unusable(name):
        return support(op, name).reason
    if transform:
        return f"{transform} is not supported by the {name} kernels"
    emulated = EMULATED and DEVICE[name] == "cuda"
    serves = "cpu" if emulated else DEVICE[name]
    if device.type != serves or (emulated and not named):
        return f"the tensors are on {device.type}, the {name} kernels work on {serves if named else DEVICE[name]}"
    if emulated and name == "triton" and dtype == torch.bfloat16:
        return "the tensors are torch.bfloat16, in which Triton's interpreter is wrong"
    if dtype not in DTYPES[name]:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[name])
        return f"the tensors are {dtype}, the {name} kernels compute in {expected}"
    if device.type == "cuda":
        return _device_problem(name, device.index if device.index is not None else torch.cuda.current_device())
    return ""


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = "",
    transform: str = "",
    prefer: Sequence[str] = (),
) -> str:
    """The backend that runs ``op`` on tensors of this device and dtype.

    Args:
        op (str): a public operation.
        device (torch.device), dtype (torch.dtype): those of its tensors.
        requested (str): a backend's name or ``"auto"``; empty stands for the one in force.
        transform (str): what is done to the call that only the reference can follow; empty for an ordinary call.
        prefer (sequence of str): backends that are tried before the op's others.

    Raises:
        RuntimeError: a backend was named and cannot serve this call; the message says why.
        ValueError: there is no backend of that name.
    """
    requested = requested or _choice
    if requested not in (*NAMES, "auto"):
        raise ValueError(f"{op}: backend is {requested!r}, expected one of {', '.join((*NAMES, 'auto'))}")
    if requested != "auto":
        reason = refusal(op, requested, device, dtype, transform)
        if reason:
            raise RuntimeError(f"{op}: backend {requested!r} was asked for and cannot serve: {reason}")
        return requested
    for name in dict.fromkeys((*prefer, *OPS[op])):
        # Most are for another device, and nobody asks why: every call of an op comes here.
        here = name == "reference" or DEVICE[name] == device.type
        if here and not refusal(op, name, device, dtype, transform, named=False):
            return name
    raise AssertionError(f"{op} has no reference")


def info() -> dict[str, object]:
    """What runs on this machine, and why.

    Returns:
        dict: ``versions`` (pyeff, torch, Python, Triton), ``cpu`` (instruction sets: what the processor has, what was
        built, what is chosen; threads), ``cuda`` (devices; architectures that were built), ``backend`` (the choice in
        force) and ``ops``: for each operation, each backend's ``usable`` and ``reason``.

    Example:
        >>> import pyeff
        >>> pyeff.info()["ops"]["read_recurrence"]["reference"]["usable"]
        True
    """
    from pyeff import _machine

    return {
        **_machine.describe(),
        "backend": _choice,
        "ops": {op: {name: vars(support(op, name)) for name in NAMES} for op in OPS},
    }
