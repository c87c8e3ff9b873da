"""What the build promises: one library for every torch from 2.11, kernels kept apart by instruction set, a clean wheel,
and a package that works without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from pyeff import backends

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("portable", "avx2", "avx512", "avx512bf16")

needs_library = pytest.mark.skipif(not backends.LIBRARY.exists(), reason="the native library was not built")
needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not here")
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these are not the sources")


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def undefined_symbols() -> list[str]:
    lines = run("nm", "-D", "--undefined-only", backends.LIBRARY).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


@needs_library
@needs_nm
def test_library_uses_only_the_stable_abi():
    names = undefined_symbols()
    assert "torch_library_impl" in names
    # Itanium mangling: at::, c10::, torch:: and caffe2:: anywhere in a name, as a scope or in an argument.
    assert [n for n in names if re.search(r"(?<!\d)(2at|3c10|5torch|6caffe2)[A-Z0-9]", n) and n.startswith("_Z")] == []


@needs_library
@needs_nm
def test_library_uses_no_shim_newer_than_torch_2_11():
    include = Path(torch.__file__).parent / "include/torch/csrc"
    text = "".join((include / f).read_text() for f in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"))
    guarded = re.findall(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0(.*?)#endif", text, re.DOTALL)
    newer = {name for minor, body in guarded if int(minor) > 11 for name in re.findall(r"\b(\w*torch_\w+)\(", body)}
    older = {name for minor, body in guarded if int(minor) <= 11 for name in re.findall(r"\b(\w*torch_\w+)\(", body)}
    assert "torch_parallel_for" in older
    assert newer.isdisjoint(undefined_symbols())


@needs_library
@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf (binutils) is not here")
def test_library_needs_torch_and_the_c_runtime_only():
    needed = re.findall(r"NEEDED.*\[(\w+)", run("readelf", "-d", backends.LIBRARY))
    assert "libtorch_cpu" in needed
    assert set(needed) <= {
        "libtorch_cpu",
        "libstdc++",
        "libstdc",
        "libgcc_s",
        "libm",
        "libc",
        "ld",
        "libpthread",
        "libdl",
        "librt",
    }


def leaked_symbols(isa: str, objects: list[Path]) -> list[str]:
    """Weak functions of these objects that are not named after their instruction set.

    The linker keeps one definition of a weak function, from any object. One that was compiled for AVX-512 could so come
    to be called on every processor.
    """
    lines = [line for obj in objects for line in run("nm", "--defined-only", obj).splitlines()]
    weak = [line.split()[-1] for line in lines if " W " in line]
    return [name for name in weak if f"{len(isa)}{isa}" not in name]


def kernel_objects() -> list[tuple[str, str]]:
    return sorted(
        (build.name, isa)
        for build in (ROOT / "build").glob("*")
        for isa in ISAS
        if list((build / "CMakeFiles").glob(f"pyeff_*_{isa}.dir/**/*.o"))
    )


@needs_nm
@pytest.mark.parametrize(
    ("build", "isa"), kernel_objects() or [pytest.param("", "", marks=pytest.mark.skip("no objects"))]
)
def test_no_function_leaks_from_an_instruction_set(build, isa):
    objects = sorted((ROOT / "build" / build / "CMakeFiles").glob(f"pyeff_*_{isa}.dir/**/*.o"))
    assert leaked_symbols(isa, objects) == []


@needs_nm
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_leak_is_seen(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text(
        """
        struct Shared { int twice(int x) { return 2 * x; } };
        namespace avx2 {
        template <class T> T own(T x) { return x + 1; }
        int call(int x) { return Shared().twice(own(x)); }
        }
        """
    )
    # Without optimisation nothing is inlined, and nothing cloned to a local name.
    run("c++", "-O0", "-c", source, "-o", tmp_path / "leak.o")
    assert leaked_symbols("avx2", [tmp_path / "leak.o"]) == ["_ZN6Shared5twiceEi"]


# Each of the rest installs or builds the package, from a copy: the tree that is being tested stays as it is.


def environment(**variables: str) -> dict[str, str]:
    """The tests' environment, with the tools of the interpreter's folder first and nothing of the build's options."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYEFF_") and k not in ("PYTHONPATH", "CMAKE_ARGS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "PYEFF_CUDA": "0", **variables}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution, made from a copy of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "out")
    shutil.copytree(ROOT, folder / "tree", ignore=skipped)
    code = "import sys; sys.path.insert(0, 'scripts'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=folder / "tree", env=environment())
    (archive,) = folder.glob("pyeff-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def install(source: Path, target: Path, **variables: str) -> subprocess.CompletedProcess:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", "-v", *options, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**variables))


def python(target: Path, code: str, **variables: str) -> str:
    """Runs code with the package of `target`, outside the tree."""
    variables = {**variables, "PYTHONPATH": str(target)}
    return run(sys.executable, "-c", textwrap.dedent(code), cwd=target, env=environment(**variables))


@needs_sources
def test_sdist_has_all_that_the_build_reads(sdist):
    for folder, pattern in (
        ("csrc", "*"),
        ("cmake", "*"),
        ("kernels", "*.py"),
        ("benchmarks", "*.py"),
        ("pyeff", "*.py"),
    ):
        for path in (ROOT / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                assert (sdist / path.relative_to(ROOT)).is_file(), path
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "scripts/build_backend.py"):
        assert (sdist / name).is_file(), name


@needs_sources
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_wheel(sdist, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    # Not optimised, and as by a compiler that knows no AVX2: what is in the wheel is asked here, and everything else is
    # about a build that has it all.
    flags = "-DCMAKE_BUILD_TYPE=None -DPYEFF_COMPILER_HAS_avx2=OFF -DPYEFF_EMULATE=OFF"
    options = {"PYEFF_REQUIRE_EXTENSION": "1", "PYEFF_DEV": "1", "CMAKE_ARGS": flags}
    run(*command, "-w", tmp_path, sdist, env=environment(**options))
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"pyeff-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"pyeff/__init__.py", "pyeff/_C.abi3.so", "pyeff/py.typed", "pyeff/kernels/__init__.py"} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"pyeff"}
    for folder, package in (("kernels", "pyeff/kernels"), ("benchmarks", "pyeff/benchmarks"), ("pyeff", "pyeff")):
        expected = {f"{package}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob("*.py")}
        assert expected <= names
    # Sources, tests and the development module, which this build was asked to make, stay out.
    foreign = [n for n in names if re.search(r"pyeff_dev|csrc|tests/|\.(cpp|cu|h|o)$", n)]
    assert foreign == []
    code = """
        import torch, pyeff
        from pyeff import backends
        print(backends.load_library() or torch.ops.pyeff_cpu.isa_chosen(), pyeff.__file__)
    """
    isa, file = python(tmp_path / "site", code, PYEFF_CPU_ISA="portable").split()
    assert isa == "portable"
    assert Path(file).is_relative_to(tmp_path / "site")


FALLBACK = """
    import torch, pyeff
    from pyeff import backends
    phi, gru = [torch.ones(4, 16)], torch.nn.GRU(16, 8)
    weights = (gru.weight_ih_l0, gru.weight_hh_l0)
    out = pyeff.ops.read_recurrence(phi, *weights)
    assert torch.equal(out, pyeff.reference.read_recurrence(phi, *weights))
    state = pyeff.info()["ops"]["read_recurrence"]["cpu"]
    assert not state["usable"], state
    assert not backends.LIBRARY.exists()
    print(state["reason"])
    try:
        with pyeff.backend("cpu"):
            pyeff.ops.read_recurrence(phi, *weights)
    except RuntimeError as error:
        print(error)
"""


@needs_sources
@pytest.mark.parametrize("how", [{"CXX": "/nonexistent/c++"}, {"PYEFF_NO_EXTENSION": "1"}], ids=["compiler", "asked"])
def test_without_a_compiler_the_references_serve(sdist, tmp_path, how):
    done = install(sdist, tmp_path / "site", **how)
    assert done.returncode == 0, done.stdout + done.stderr
    said = python(tmp_path / "site", FALLBACK).splitlines()
    assert "not built" in said[0]
    assert "'cpu' was asked for and cannot serve" in said[1]


@needs_sources
def test_a_required_extension_is_an_error_without_a_compiler(sdist, tmp_path):
    done = install(sdist, tmp_path / "site", CXX="/nonexistent/c++", PYEFF_REQUIRE_EXTENSION="1")
    assert done.returncode != 0
    assert "PYEFF_REQUIRE_EXTENSION is set" in done.stdout + done.stderr


@needs_sources
def test_build_says_that_the_library_is_left_out(sdist):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=sdist, capture_output=True, text=True, check=False, env=environment(CXX="/nonexistent/c++"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "INSTALLING WITHOUT THE NATIVE LIBRARY: no C++ compiler" in done.stderr


@needs_sources
def test_build_asks_for_torch_only_where_there_is_none():
    code = """
        import sys; sys.path.insert(0, "scripts")
        import build_backend as backend
        if sys.argv[1] == "none":
            backend._torch_folders = lambda: iter(())
        print(" ".join(backend.get_requires_for_build_wheel()))
    """
    for which, expected in (("found", False), ("none", True)):
        said = run(sys.executable, "-c", textwrap.dedent(code), which, cwd=ROOT, env=environment())
        assert "cmake" in said
        assert ("torch==" in said) == expected
