"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def cpu() -> dict[str, object]:
    """Model, cores, instruction sets and the last cache of the processor, and torch's threads."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    features = re.search(r"^(?:flags|Features)\s*: (.*)$", info, re.M)
    flags = set(features[1].split()) if features else set()
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in _FEATURES if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "last_cache_bytes": last_cache_bytes(),
    }


def gpu() -> dict[str, object] | None:
    """Name, memory and capability of the current CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "memory_bytes": p.total_memory,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]


def slug(gpu: dict[str, object] | None) -> str:
    """The name of the file for the results of a GPU (what :func:`gpu` says of it), as ``"nvidia-h200"``; ``"cpu"``."""
    return re.sub(r"[^a-z0-9]+", "-", str(gpu["name"]).lower()).strip("-") if gpu else "cpu"


def versions() -> dict[str, str]:
    """Python, torch, and what a contender may stand on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("pyeff", "triton", "numpy", "scipy", "stanford-stk", "blksprs", "xformers", "fbgemm-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this file lies in, ``+`` behind it where files differ; None outside of one."""
    here = str(Path(__file__).parent)
    try:
        # Outside of a checkout of its own, a wheel in some environment must not name that environment's repository.
        subprocess.run(["git", "-C", here, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        sha = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha.stdout.strip() + ("+" if changed.stdout.strip() else "")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def last_cache_bytes() -> int:
    """The size of the largest cache that core 0 can use; 32 MiB where the system does not say."""
    sizes = [_read(str(p)).strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=32 << 20)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
