"""The build backend: setuptools', and the knowledge of what the native library needs to be built.

The headers of torch are all that the build takes from it. An installed torch that the build can see serves, also from
within pip's isolation; only where there is none is a pinned one asked for, since an unpinned one is several gigabytes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  (the hooks that are not replaced here)

OLDEST_TORCH = (2, 11)
BUILD_TORCH = "torch==2.13.0"
BUILD_TOOLS = ["cmake>=3.20", "ninja"]


def enabled(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "") not in ("", "0")


def without_extension() -> str:
    """Why the native library is not built; empty if it is.

    Raises:
        RuntimeError: there is a reason and PYEFF_REQUIRE_EXTENSION forbids to go on without.
    """
    reason = "PYEFF_NO_EXTENSION is set" if enabled("PYEFF_NO_EXTENSION") else _compiler_problem()
    if reason and enabled("PYEFF_REQUIRE_EXTENSION"):
        raise RuntimeError(f"pyeff: the native library cannot be built and PYEFF_REQUIRE_EXTENSION is set: {reason}")
    return reason


def _compiler_problem() -> str:
    """Tries the compiler that cmake would take, with what the sources need of it."""
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), [])
    if not command or not shutil.which(command[0]):
        return f"no C++ compiler: CXX is {named!r} and is not found" if named else "no C++ compiler (c++, g++, clang++)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        args = [*command, "-std=c++17", str(source), "-o", str(Path(folder, "try"))]
        done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"the C++ compiler does not work: {shlex.join(command)}: {done.stderr.strip()[-500:]}"
    return ""


def find_torch() -> Path | None:
    """The folder of a torch package with headers that are new enough, without importing it."""
    return next((folder for folder in _torch_folders() if _torch_version(folder) >= OLDEST_TORCH), None)


def _torch_folders() -> Iterator[Path]:
    if os.environ.get("PYEFF_TORCH_DIR"):
        yield Path(os.environ["PYEFF_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    # pip hides the environment that it installs into from the build, but runs the build with its interpreter. Other
    # frontends build in an environment of their own; there the active one is known by its variable. Last, what the
    # environment may look through to: a distribution's packages, or a user's.
    prefixes = [sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.base_prefix]
    places = [
        sysconfig.get_path(name, vars={"base": prefix, "platbase": prefix})
        for prefix in prefixes
        if prefix
        for name in ("purelib", "platlib")
    ]
    for place in dict.fromkeys([*places, *site.getsitepackages(), site.getusersitepackages()]):
        yield Path(place, "torch")


def _torch_version(folder: Path) -> tuple[int, int]:
    header = folder / "include/torch/headeronly/version.h"
    if not header.is_file() or not list(folder.glob("lib/*torch_cpu.*")):
        return (0, 0)
    text = header.read_text()
    major, minor = (re.search(rf"define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else (0, 0)


def _requirements() -> list[str]:
    if without_extension():
        return []
    return [*BUILD_TOOLS, *([] if find_torch() else [BUILD_TORCH])]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()
