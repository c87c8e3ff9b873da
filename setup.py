"""Builds the native library by cmake; everything else about the package is in pyproject.toml.

Environment:
    PYEFF_NO_EXTENSION=1       install without the native library: every operation is served by its reference.
    PYEFF_REQUIRE_EXTENSION=1  fail where the library cannot be built, instead of installing without.
    PYEFF_CUDA=0               leave out the CUDA kernels even where nvcc is.
    PYEFF_CUDA_ARCHS           their architectures, such as "80;90".
    PYEFF_DEV=1                build the development module, too (into build/dev).
    PYEFF_TORCH_DIR            the folder of the torch package to build with.
    PYEFF_BUILD_DIR            where cmake builds. Default: build/release.
    CXX, CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL  as cmake knows them.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
from build_backend import BUILD_TORCH, enabled, find_torch, without_extension  # noqa: E402

# Folders of the tree that are packages inside pyeff.
MAPPED = {
    "pyeff.kernels": "kernels",
    "pyeff.benchmarks": "benchmarks",
    "pyeff.benchmarks.experiments": "benchmarks/experiments",
    "pyeff.benchmarks.experiments.multimask_reuse": "benchmarks/experiments/multimask_reuse",
    "pyeff.benchmarks.experiments.ticket_density": "benchmarks/experiments/ticket_density",
}


class CleanBuild(build):
    """Starts from an empty folder, or a module that is gone from the tree would stay in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Hands the one extension to cmake."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise RuntimeError(
                f"pyeff: no torch >= 2.11 to take headers from. Install {BUILD_TORCH} first, or name its folder by "
                "PYEFF_TORCH_DIR, or set PYEFF_NO_EXTENSION=1 to install without the native library."
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(os.environ.get("PYEFF_BUILD_DIR") or ROOT / "build" / "release")
        args = [
            f"-DPYEFF_OUTPUT={target.parent}",
            f"-DPYEFF_TORCH_DIR={torch}",
            f"-DPYEFF_DEV={'ON' if enabled('PYEFF_DEV') else 'OFF'}",
            f"-DPYEFF_CUDA={'OFF' if os.environ.get('PYEFF_CUDA') == '0' else 'ON'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if os.environ.get("PYEFF_CUDA_ARCHS"):
            archs = os.environ["PYEFF_CUDA_ARCHS"].replace(",", ";").replace(" ", ";")
            args.append(f"-DPYEFF_CUDA_ARCHS={archs}")
        ninja = shutil.which("ninja")
        if ninja:
            # Named each time: a build environment that is gone by the next build may have had another.
            args += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self._run("cmake", "-S", str(ROOT), "-B", str(folder), *args)
        jobs = [] if ninja or "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ else ["--parallel", str(os.cpu_count() or 1)]
        self._run("cmake", "--build", str(folder), *jobs)
        if not target.is_file():
            raise RuntimeError(f"pyeff: cmake succeeded but did not write {target}")

    def _run(self, *command: str) -> None:
        print("pyeff:", shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise RuntimeError(f"pyeff: {command[0]} is not installed: pip install cmake ninja") from None


def main() -> None:
    reason = without_extension()
    if reason:
        line = "!" * 100
        print(
            f"{line}\npyeff: INSTALLING WITHOUT THE NATIVE LIBRARY: {reason}.\n"
            f"pyeff: every operation works, by its reference in PyTorch, without the fast kernels.\n{line}",
            file=sys.stderr,
            flush=True,
        )
    setup(
        packages=[*find_packages(include=["pyeff", "pyeff.*"]), *(p for p, d in MAPPED.items() if (ROOT / d).is_dir())],
        package_dir=MAPPED,
        package_data={"pyeff": ["py.typed"]},
        include_package_data=False,
        ext_modules=[] if reason else [Extension("pyeff._C", sources=[], py_limited_api=True)],
        cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
        # One library for every CPython: it does not touch Python's own interface at all.
        options={} if reason else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
