"""Triton kernels compiled ahead of time, for architectures that this machine need not have.

A kernel file lists what it launches: ``aot_cases()`` yields (name, JIT function, signature, constexprs, num_warps,
num_stages, expects_matrix) for each configuration. Triton then compiles it for each architecture, without GPU and
driver, in worker processes (a crash of the compiler is a finding, not the end), and what it takes is kept in
build/aot-cache by everything that it depends on.

    python -m benchmarks.aot list kernels.read      the names
    python -m benchmarks.aot serve CACHE < jobs     what a worker does: one job a line, one result a line

Only these processes import Triton: the caller may have it loaded as an interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from . import ptxas
from .gpus import ARCHITECTURES
from .resources import NO_MATRIX, Usage, from_plain

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot-cache"
PROCESSES = 2
_FORMAT = 1  # of a cached entry; what changes the meaning of one raises it


@dataclass(frozen=True)
class Job:
    """One configuration, by name, of the kernels in ``module``, for one architecture."""

    module: str
    name: str
    arch: int


@dataclass(frozen=True)
class Case:
    """A configuration as a kernel file yields it.

    Args:
        name (str): ``"kernel/configuration"``: before the slash what is computed (kernel, dtype, cell...), after it
            how. Configurations of the same kernel stand in for each other.
        fn (JITFunction): the kernel.
        signature (dict): argument -> Triton type (``"*bf16"``, ``"i32"``, ``"constexpr"``, a tuple of these).
        constexprs (dict): argument -> value.
        num_warps, num_stages (int): launch options.
        expects_matrix (bool, str, sequence or dict): whether products go to the tensor cores: True for any of the
            architecture's, False for none at all, names of :mod:`gpus` for these, a dict for one of these by
            architecture.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    expects_matrix: Any

    @property
    def kernel(self) -> str:
        return self.name.partition("/")[0]

    @property
    def config(self) -> str:
        return self.name.partition("/")[2]

    def expects(self, arch: int) -> tuple[str, ...]:
        """The matrix instructions of which one must be there, or ``("none",)``."""
        wanted = self.expects_matrix.get(arch, False) if isinstance(self.expects_matrix, dict) else self.expects_matrix
        if wanted is True:
            return ARCHITECTURES[arch].matrix
        if not wanted:
            return (NO_MATRIX,)
        return (wanted,) if isinstance(wanted, str) else tuple(wanted)

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What the launcher would say of well-aligned arguments: divisible by 16, unless the kernel forbids it.

        Aligned pointers and sizes are the usual call, and what decides about vector loads and async copies.
        """
        found = {}
        for i, parameter in enumerate(self.fn.params):
            type = self.signature[parameter.name]
            plain = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            # A tuple's numbers are left as they are: the kernels put nothing into one that is worth a promise.
            if not plain and isinstance(type, str) and type.startswith(("*", "i", "u")):
                found[(i,)] = [["tt.divisibility", 16]]
        return found


def cases(module: str) -> list[Case]:
    """What ``module`` lists.

    Raises:
        ValueError: two configurations have the same name, so that an exclusion could mean either.
    """
    found = [Case(*entry) for entry in importlib.import_module(module).aot_cases()]
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{module}.aot_cases() has several configurations called {', '.join(twice)}")
    return found


def kernel_modules() -> list[str]:
    """The kernel files that list configurations."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [f"kernels.{file.stem}" for file in files if "def aot_cases(" in file.read_text()]


def compile_case(case: Case, arch: int, cache: Path) -> Usage:
    """What one configuration takes on one architecture; from the cache if nothing that it depends on changed."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(case.fn, case.signature, case.constexprs, case.attributes())
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    key = f"{_FORMAT} {source.hash()} {sorted(options.items())} {arch} triton {triton.__version__}"
    entry = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if entry.exists():
        usage = from_plain(json.loads(entry.read_text()))
    else:
        usage = _compiled(source, options, arch)
        cache.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process may read or write the same entry.
        aside = entry.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(asdict(usage)))
        aside.replace(entry)
    return replace(usage, kernel=case.kernel, config=case.config, expects=case.expects(arch))


def _compiled(source: Any, options: dict[str, int], arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is its answer
        return Usage("triton", "", "", arch, error=_first_line(error))
    (report,) = ptxas.parse(log.getvalue())
    metadata = kernel.metadata
    return Usage(
        "triton",
        "",
        "",
        arch,
        registers=report.registers,
        stack=report.stack,
        spill_stores=report.spill_stores,
        spill_loads=report.spill_loads,
        shared=metadata.shared,
        threads=metadata.num_warps * metadata.warp_size,
        tensor_memory=metadata.tmem_size or 0,
        matrix=ptxas.matrix_instructions(kernel.asm["ptx"]),
        warnings=tuple(report.warnings),
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.aot", *args]


def _environment(scratch: str) -> dict[str, str]:
    """The interpreter's functions cannot be compiled, and a persistent cache would hide what ptxas says."""
    ours = {"TRITON_CACHE_DIR": scratch, "TRITON_DUMP_PTXAS_LOG": "1"}
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYEFF_EMULATE")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, **ours, "PYTHONPATH": path}


class _Worker:
    """A process that compiles, one job after another."""

    def __init__(self, cache: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            _command("serve", str(cache)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(self._scratch.name),
            cwd=ROOT,
        )

    def run(self, job: Job) -> Usage | None:
        """The result, or None if the process died of it."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            return None
        return from_plain(json.loads(answer)) if answer else None

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1][:300] if lines else f"exit status {self._process.wait()}"

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._errors.close()
        self._scratch.cleanup()


def run(jobs: Sequence[Job], *, processes: int = PROCESSES, cache: Path = CACHE) -> list[Usage]:
    """Compiles ``jobs``, several at a time, and returns their usages in the same order."""
    queue: SimpleQueue[int] = SimpleQueue()
    for i in range(len(jobs)):
        queue.put(i)
    found: list[Usage | None] = [None] * len(jobs)

    def work(_: int) -> None:
        worker = _Worker(cache)
        try:
            while True:
                try:
                    i = queue.get_nowait()
                except Empty:
                    return
                found[i] = worker.run(jobs[i])
                if found[i] is None:
                    kernel, _, config = jobs[i].name.partition("/")
                    error = f"the compiler's process died: {worker.last_words()}"
                    found[i] = Usage("triton", kernel, config, jobs[i].arch, error=error)
                    worker.close()
                    worker = _Worker(cache)
        finally:
            worker.close()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(min(processes, len(jobs)))))
    return [usage for usage in found if usage is not None]


def names(modules: Sequence[str]) -> list[tuple[str, str]]:
    """(module, name) of every configuration of ``modules``.

    Raises:
        RuntimeError: a module cannot be imported or listed; with what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            _command("list", *modules), capture_output=True, text=True, check=False, env=_environment(scratch), cwd=ROOT
        )
    if done.returncode:
        raise RuntimeError(f"{', '.join(modules)} cannot be listed: {done.stderr.strip()[-2000:]}")
    return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def jobs(modules: Sequence[str], architectures: Iterable[int] = tuple(ARCHITECTURES)) -> list[Job]:
    """Every configuration of ``modules`` for every architecture."""
    return [Job(module, name, arch) for module, name in names(modules) for arch in architectures] if modules else []


def _serve(cache: Path) -> None:
    known: dict[str, dict[str, Case]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # what a module prints is not an answer
    for line in sys.stdin:
        job = Job(**json.loads(line))
        if job.module not in known:
            known[job.module] = {case.name: case for case in cases(job.module)}
        usage = compile_case(known[job.module][job.name], job.arch, cache)
        print(json.dumps(asdict(usage)), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    else:
        print(json.dumps([(module, case.name) for module in sys.argv[2:] for case in cases(module)]))
