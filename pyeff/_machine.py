"""Facts about this machine, for ``pyeff.info()``."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from pyeff import backends
from pyeff._version import __version__


def describe() -> dict[str, object]:
    """Versions, the processor with its instruction sets, and the CUDA devices; see :func:`pyeff.info`."""
    return {"versions": versions(), "cpu": cpu(), "cuda": cuda()}


def versions() -> dict[str, str | None]:
    """Of pyeff, Python, torch and Triton; None for what is not installed. Triton is not imported for it."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"pyeff": __version__, "python": platform.python_version(), "torch": torch.__version__, "triton": triton}


def cpu() -> dict[str, object]:
    """The processor's model and threads; the instruction sets: detected, built, chosen (none without the library)."""
    reason = backends.load_library()
    native = None if reason else torch.ops.pyeff_cpu
    return {
        "model": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa_detected": native.isa_detected().split() if native else [],
        "isa_built": native.isa_built().split() if native else [],
        "isa_chosen": native.isa_chosen() if native else "",
        "reason": reason,
    }


def cpu_model() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    if (table := Path("/proc/cpuinfo")).exists():
        for line in table.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def cuda() -> dict[str, list[str]]:
    """The devices that torch sees, why the CUDA kernels cannot run on each (or ``""``), what they were built for."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = backends.load_library()
    native = None if reason else torch.ops.pyeff_cuda
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "why_not": [native.why_not(i) if native else reason for i in range(count)],
        "built": native.built_architectures().split() if native else [],
    }
