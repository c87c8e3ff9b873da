"""Triton kernels compiled ahead of time, for architectures that this machine need not have.

A kernel file lists what it launches: ``aot_cases()`` yields a :class:`Case` (or what has its fields) for each
configuration, architecture, and variant of a call that is another program. Triton compiles each of them, without GPU
and driver, in worker processes (a crash of the compiler is a finding, not the end), and what it takes is kept in
build/aot-cache by everything that it depends on.

    python -m benchmarks.aot list kernels.read      what there is to compile
    python -m benchmarks.aot serve CACHE < jobs     what a worker does: one job a line, one result a line

Only these processes import Triton: the caller may have it loaded as an interpreter.
"""

from __future__ import annotations

import contextlib
import functools
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
from typing import Any, NamedTuple

from . import ptxas
from .gpus import ARCHITECTURES
from .resources import NO_MATRIX, Usage, from_plain

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot-cache"
PROCESSES = 2
_FORMAT = 2  # of a cached entry; what changes the meaning of one raises it


@dataclass(frozen=True)
class Job:
    """The case at ``index`` of those that ``module`` lists, and what is known of it before it is compiled.

    ``key`` is a hash of all that the result depends on (empty where it cannot be told), ``expects`` is that of
    :class:`~benchmarks.resources.Usage`.
    """

    module: str
    index: int
    kernel: str
    config: str
    variant: str
    arch: int
    key: str = ""
    expects: tuple[str, ...] = ()


class Case(NamedTuple):
    """One compilation, for ``triton.compile(ASTSource(kernel, signature, constexprs, attrs), target, options)``.

    Args:
        name (str): ``"kernel/configuration variant"``. Configurations of the same kernel stand in for each other; a
            variant is what a call's options make of it, and has no choice.
        arch (int): compute capability.
        kernel (JITFunction): the kernel.
        signature (dict): argument -> Triton type (``"*bf16"``, ``"i32"``, ``"constexpr"``, a tuple of these).
        constexprs (dict): argument -> value.
        attrs (dict): what the launcher promises of arguments, such as divisibility by 16.
        options (dict): of the launch: num_warps, num_stages, maxnreg.
        matrix (bool): whether 16-bit operands are multiplied; see :meth:`expects`.
    """

    name: str
    arch: int
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, int]
    matrix: bool

    def expects(self) -> tuple[str, ...]:
        """The matrix instructions of which one must be there; ``("none",)`` if there must be none.

        The architecture's best where every block of the output (the constants BLOCK_*, but for that of the sum's index)
        has the 64 rows that wgmma and tcgen05 need; any of them where the tiles are smaller.
        """
        if not self.matrix:
            return (NO_MATRIX,)
        sides = [v for k, v in self.constexprs.items() if k.startswith("BLOCK_") and k != "BLOCK_K"]
        known = ARCHITECTURES[self.arch].matrix
        return known[:1] if sides and min(sides) >= 64 else known


def job(module: str, index: int, case: Case) -> Job:
    """Where a case is found again, by another process."""
    configuration, _, variant = case.name.partition(" ")
    kernel, _, config = configuration.partition("/")
    try:
        key = key_of(case)
    except Exception:  # a case that is wrong in itself: the one that compiles it says what is wrong
        key = ""
    return Job(module, index, kernel, config, variant, case.arch, key, case.expects())


def key_of(case: Case) -> str:
    """A hash of the kernel's source with what it calls, what it is compiled with, and the compilers."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    versions = f"triton {triton.__version__} ptxas {_ptxas_version(case.arch)}"
    text = f"{_FORMAT} {source.hash()} {sorted(case.options.items())} {case.arch} {versions}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _ptxas_version(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas_version

    return str(get_ptxas_version(arch)).strip().splitlines()[-1]


def _without_lines() -> None:
    """Lets Triton forget at which line a kernel begins: one that has only moved within its file has not changed."""
    from triton.runtime.jit import JITFunction

    JITFunction.starting_line_number = property(lambda _: 0, lambda _, line: None)  # type: ignore[assignment]


def cases(module: str) -> list[Case]:
    """What ``module`` lists, in its order."""
    return [Case(*case) for case in importlib.import_module(module).aot_cases()]


def kernel_modules() -> list[str]:
    """The kernel files that list configurations."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [f"kernels.{file.stem}" for file in files if "def aot_cases(" in file.read_text()]


def compile_case(case: Case, this: Job, cache: Path) -> Usage:
    """What one case takes; from the cache if nothing that it depends on changed."""
    from triton.compiler import ASTSource

    entry = cache / f"{this.key}.json"
    if this.key and entry.exists():
        usage = from_plain(json.loads(entry.read_text()))
    else:
        source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
        usage = _compiled(source, case.options, case.arch)
        if this.key:
            cache.mkdir(parents=True, exist_ok=True)
            # Written aside and renamed: another process may read or write the same entry.
            aside = entry.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(asdict(usage)))
            aside.replace(entry)
    return replace(usage, kernel=this.kernel, config=this.config, variant=this.variant, expects=case.expects())


def _compiled(source: Any, options: dict[str, int], arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is its answer
        return Usage("triton", "", "", arch, error=_last_line(error))
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


def _last_line(error: Exception) -> str:
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
                this = jobs[i]
                found[i] = worker.run(this)
                if found[i] is None:
                    error = f"the compiler's process died: {worker.last_words()}"
                    found[i] = Usage("triton", this.kernel, this.config, this.arch, this.variant, error=error)
                    worker.close()
                    worker = _Worker(cache)
        finally:
            worker.close()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(min(processes, len(jobs)))))
    return [usage for usage in found if usage is not None]


def jobs(modules: Sequence[str], architectures: Iterable[int] = tuple(ARCHITECTURES)) -> list[Job]:
    """Every case of ``modules`` for ``architectures``.

    Raises:
        RuntimeError: a module cannot be imported or listed; with what it said.
    """
    if not modules:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            _command("list", *modules), capture_output=True, text=True, check=False, env=_environment(scratch), cwd=ROOT
        )
    if done.returncode:
        raise RuntimeError(f"{', '.join(modules)} cannot be listed: {done.stderr.strip()[-2000:]}")
    wanted = set(architectures)
    return [j for j in map(_job, json.loads(done.stdout.splitlines()[-1])) if j.arch in wanted]


def _job(entry: dict[str, Any]) -> Job:
    """A job from its JSON."""
    return Job(**{**entry, "expects": tuple(entry["expects"])})


def _serve(cache: Path) -> None:
    known: dict[str, list[Case]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # what a module prints is not an answer
    for line in sys.stdin:
        this = _job(json.loads(line))
        if this.module not in known:
            known[this.module] = cases(this.module)
        try:
            usage = compile_case(known[this.module][this.index], this, cache)
        except Exception as error:  # a case that is wrong in itself, not the compiler's answer to it
            usage = Usage("triton", this.kernel, this.config, this.arch, this.variant, error=_last_line(error))
        print(json.dumps(asdict(usage)), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    else:
        _without_lines()
        listed = [job(module, i, case) for module in sys.argv[2:] for i, case in enumerate(cases(module))]
        print(json.dumps([asdict(one) for one in listed]))
