"""The resource gates over everything that is built for GPUs: what is collected, what is excluded, what fails.

A Triton configuration that fails a gate on an architecture is excluded there by name, with the reason, in
kernels/excluded.py. That table is written by ``scripts/gpu_resources.py --write`` and believed by the kernels when they
choose a configuration. A CUDA C++ kernel has one configuration and may not fail.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from . import aot, lock, ptxas, resources
from .gpus import ARCHITECTURES
from .resources import NO_MATRIX, Usage

ROOT = aot.ROOT
EXCLUDED = ROOT / "kernels" / "excluded.py"
# CUDA kernels that may have a stack frame (not spills): pattern of the name -> why.
STACK_ALLOWED: dict[str, str] = {}
# CUDA kernels without a launch: name -> why.
NOT_LAUNCHED = {"probe": "its attributes tell whether the library serves a device"}
LAUNCHES = ROOT / "csrc" / "dev" / "launches"
SOURCES = ROOT / "csrc" / "cuda"

_HEAD = '''"""Tuning configurations that fail a gate on an architecture, by name and with the reason; see docs/gpu.md.

Written by ``python scripts/gpu_resources.py --write``, not by hand. Kernels skip a configuration where it is listed.
"""

EXCLUDED: dict[str, dict[int, str]] = {'''

Exclusions = Mapping[str, Mapping[int, str]]


@dataclass
class Report:
    """What was collected, and what the gates say.

    Args:
        usages (list of Usage): Triton's first.
        versions (dict): of the compilers.
        skipped (list of str): what could not be looked at, and why.
        failures (list of str): each gate that is not held; empty if all is well.
        compiled (int): how many of Triton's usages were compiled, or read from build/aot-cache; the rest is locked.
    """

    usages: list[Usage] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    compiled: int = 0


def read_exclusions(path: Path = EXCLUDED) -> dict[str, dict[int, str]]:
    """The committed table, read without importing the kernels; empty where there is none."""
    if not path.exists():
        return {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "EXCLUDED":
            assert node.value
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} has no table EXCLUDED")


def write_exclusions(table: Exclusions, path: Path = EXCLUDED) -> None:
    """Writes the table, sorted, so that a change shows as what it is."""
    lines = []
    for name in sorted(table):
        lines.append(f"    {json.dumps(name)}: {{")
        lines += [f"        {arch}: {json.dumps(table[name][arch])}," for arch in sorted(table[name])]
        lines.append("    },")
    path.write_text("\n".join([_HEAD, *lines, "}"]) + "\n" if lines else _HEAD + "}\n")


def short_reason(problems: Sequence[str]) -> str:
    """Without the byte counts, which change with every compiler and variant: the first clause of each failed gate."""
    kinds = (problem.split(":")[0] for problem in problems)
    kinds = ("wgmma serialised" if "Performance Loss" in kind else kind for kind in kinds)
    return ", ".join(sorted(dict.fromkeys("stack frame" if kind.startswith("stack") else kind for kind in kinds)))


def exclusions(usages: Sequence[Usage]) -> dict[str, dict[int, str]]:
    """The table that these usages ask for."""
    failing = resources.failing(usages)
    return {name: {arch: short_reason(text) for arch, text in found.items()} for name, found in failing.items()}


def triton_failures(usages: Sequence[Usage], excluded: Exclusions) -> list[str]:
    """What is wrong between the usages and the table: three ways."""
    failing = resources.failing(usages)
    listed = {(name, arch) for name, reasons in excluded.items() for arch in reasons}
    known = {(usage.configuration, usage.arch) for usage in usages}
    found = [
        f"{name} on sm_{arch} fails a gate and is not excluded: {'; '.join(sorted(set(problems)))}"
        for name, by_arch in failing.items()
        for arch, problems in by_arch.items()
        if (name, arch) not in listed
    ]
    for name, arch in sorted(listed):
        if (name, arch) not in known:
            found.append(f"{name} on sm_{arch} is excluded and does not exist")
        elif arch not in failing.get(name, {}):
            found.append(f"{name} on sm_{arch} is excluded and passes every gate")
    found += [
        f"{kernel} has no configuration that passes on sm_{arch}"
        for kernel, arch in resources.without_configuration(usages)
    ]
    return found


def cuda_failures(usages: Sequence[Usage], stack_allowed: Mapping[str, str] = STACK_ALLOWED) -> list[str]:
    """The gates that CUDA C++ kernels fail, but for the stack frames that are allowed; and allowances without use."""
    found, used = [], set()
    for usage in usages:
        for problem in usage.problems():
            pattern = next((p for p in stack_allowed if fnmatch.fnmatchcase(usage.kernel, p)), None)
            if problem.startswith("stack frame") and pattern is not None:
                used.add(pattern)
            else:
                found.append(f"{usage.name} on sm_{usage.arch}: {problem}")
    return [
        *found,
        *(f"no kernel like {p!r} has the stack frame it is allowed" for p in stack_allowed if p not in used),
    ]


def triton(
    report: Report,
    modules: Sequence[str] | None = None,
    excluded: Exclusions | None = None,
    *,
    locks: Path = lock.LOCKS,
    turn: int | None = None,
    renew: bool = False,
) -> None:
    """Adds every configuration on every architecture to the report: compiled, or as the lock has it.

    Compiled is what the lock does not know, and of the rest the share of a turn; without a turn, all. With ``renew``
    the lock is written from what was found, else it must agree.
    """
    modules = aot.kernel_modules() if modules is None else modules
    if not modules:
        report.skipped.append("Triton: no kernel file lists configurations")
        return
    report.versions["triton"] = version("triton")
    jobs, books = aot.jobs(modules), {module: lock.read(locks / f"{module}.json") for module in modules}
    names = [""] * len(jobs)
    for module in modules:
        mine = [i for i, job in enumerate(jobs) if job.module == module]
        for i, name in zip(mine, lock.names(jobs[i] for i in mine), strict=True):
            names[i] = name
    keys = {module: {n: j.key for n, j in zip(names, jobs, strict=True) if j.module == module} for module in modules}
    due = {module: lock.due(keys[module], books[module], turn) for module in modules}
    chosen = [i for i, job in enumerate(jobs) if names[i] in due[job.module]]
    compiled = dict(zip(chosen, aot.run([jobs[i] for i in chosen]), strict=True))
    found = [compiled[i] if i in compiled else _locked(job, names[i], books) for i, job in enumerate(jobs)]
    for module in modules:
        now = {names[i]: lock.figures(found[i]) for i, job in enumerate(jobs) if job.module == module}
        path = locks / f"{module}.json"
        if renew:
            entries = {name: (keys[module][name], figures) for name, figures in now.items()}
            lock.write(path, lock.Lock({"triton": report.versions["triton"]}, entries))
        elif (other := books[module].versions.get("triton", report.versions["triton"])) != report.versions["triton"]:
            report.skipped.append(f"{path.name}: locked by Triton {other}, all was compiled and nothing compared")
        else:
            report.failures += lock.problems(path.name, keys[module], now, books[module])
    report.usages += found
    report.compiled += len(compiled)
    report.failures += triton_failures(found, read_exclusions() if excluded is None else excluded)


def _locked(job: aot.Job, name: str, books: Mapping[str, lock.Lock]) -> Usage:
    usage = Usage("triton", job.kernel, job.config, job.arch, job.variant, expects=job.expects)
    return lock.filled(usage, books[job.module].entries[name][1])


class Launched(NamedTuple):
    """What a kernel is launched with: threads of a block, bytes of dynamic shared memory, and where (0: everywhere);
    and the matrix instruction that must be in it, or ``"none"``."""

    threads: int
    shared: int
    arch: int = 0
    matrix: str = NO_MATRIX


def launches(folder: Path = LAUNCHES) -> dict[str, Launched]:
    """Pattern of a kernel's name -> what it is launched with, from the programs in ``folder`` that print it.

    Raises:
        RuntimeError: there is no C++ compiler, or it does not build them.
    """
    found, compiler = {}, shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise RuntimeError("no C++ compiler builds the lists of launches")
    with tempfile.TemporaryDirectory() as scratch:
        for source in sorted(folder.glob("*.cpp")):
            program = Path(scratch) / source.stem
            # Kernels that are no templates are compiled, too, and never called: what they need is not there.
            lean = ["-ffunction-sections", "-Wl,--gc-sections"]
            command = [compiler, "-std=c++17", *lean, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                raise RuntimeError(f"{source} does not compile: {built.stderr[-2000:]}")
            lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
            for name, *rest, matrix in (line.split("\t") for line in lines):
                found[name] = Launched(*map(int, rest), matrix)
    return found


def launched(usages: Sequence[Usage], plans: Mapping[str, Launched]) -> tuple[list[Usage], list[str]]:
    """The usages with what they are launched with, without those that their architecture never launches; and failures:
    a kernel that no plan names, a launch with more threads than the kernel's bounds."""
    found, failures = [], []
    for usage in usages:
        plan = next((plans[p] for p in plans if fnmatch.fnmatchcase(usage.kernel, p)), None)
        if plan is None:
            if usage.kernel not in NOT_LAUNCHED:
                failures.append(f"{usage.name} on sm_{usage.arch}: no list of launches names it")
            found.append(usage)
        elif plan.arch in (0, usage.arch):
            if usage.threads is not None and plan.threads > usage.threads:
                failures.append(f"{usage.name}: launched with {plan.threads} threads, its bounds are {usage.threads}")
            shared = (usage.shared or 0) + plan.shared
            found.append(replace(usage, threads=plan.threads, shared=shared, expects=(plan.matrix,)))
    return found, failures


def cuda(
    report: Report,
    build: Path,
    plans: Mapping[str, Launched] | None = None,
    *,
    locks: Path = lock.LOCKS,
    renew: bool = False,
) -> None:
    """Reads what the build in ``build`` kept and adds it to the report; ``plans`` by default those of the library.

    Of the library's sources the lock has the architectures that were not built, and must agree about those that were.
    With ``renew`` it is written, from a build for all of them.
    """
    logs = ptxas.logs(build)
    if not logs:
        nvcc = "nvcc is here; build first" if shutil.which("nvcc") else "nvcc is not here"
        report.skipped.append(f"CUDA C++: no kernels were compiled in {build} ({nvcc})")
        return
    found, sources = [], {source.name: source for source in SOURCES.glob("*.cu")} if plans is None else {}
    for log in logs:
        built = ptxas.usages(log.read_text(), log.with_suffix(""), aot.CACHE)
        if source := sources.get(log.name.removesuffix(".o.log")):
            built = _against_lock(report, source, built, locks, renew)
        found += built
    # A build that stopped half-way has kept the reports of some sources.
    if absent := sorted(set(sources) - {log.name.removesuffix(".o.log") for log in logs}):
        report.failures.append(f"CUDA C++: {build} has no report on {', '.join(absent)}; build it to the end")
    found, failures = launched(found, launches() if plans is None else plans)
    report.failures += failures
    missing = sorted(set(ARCHITECTURES) - {usage.arch for usage in found})
    if missing:
        report.skipped.append("CUDA C++: not built for " + ", ".join(f"sm_{arch}" for arch in missing))
    if ptxas.cuobjdump() is None:
        report.skipped.append("CUDA C++: no cuobjdump, so nobody looked for matrix instructions and launch bounds")
    report.usages += found
    report.failures += cuda_failures(found)
    if nvcc := lock.nvcc_version():
        report.versions["nvcc"] = nvcc


def _against_lock(report: Report, source: Path, built: list[Usage], locks: Path, renew: bool) -> list[Usage]:
    """What was built, and what the lock has beside it."""
    if renew and {usage.arch for usage in built} == set(ARCHITECTURES):
        lock.lock_cuda(source, built, locks)
        return built
    found, wrong, skipped = lock.with_locked(source, built, locks)
    report.failures += wrong
    report.skipped += skipped
    if renew and wrong:
        report.failures.append(f"{source.name} is not built for all architectures (make install), not locked")
    return found


def save(report: Report, folder: Path, excluded: Exclusions) -> list[Path]:
    """Writes resources.json and resources.md, and returns their paths."""
    allowed = [(name, arch) for name, reasons in excluded.items() for arch in reasons]
    data, page = folder / "resources.json", folder / "resources.md"
    resources.save(report.usages, report.versions, data)
    parts = ["# Resources of the GPU kernels", ", ".join(f"{k} {v}" for k, v in report.versions.items())]
    parts += [f"SKIPPED: {line}" for line in report.skipped]
    parts += [table.markdown() for table in resources.tables(report.usages, allowed)]
    parts.append("\n".join(["## Failures", "", *(f"- {line}" for line in report.failures or ["none"])]))
    page.write_text("\n\n".join(parts) + "\n")
    return [data, page]


_TABLE_HEAD = '''"""What kernels take of an SM, by architecture: threads of a block, blocks on it, matrix instruction.

The predictions rest on it. Written by ``python scripts/gpu_resources.py --write``, not by hand.
"""

VERSIONS = {versions}

# On sm_80, sm_90, sm_100, sm_120; None where the kernel is not launched.
RESOURCES: dict[str, tuple[tuple[int, int, str] | None, ...]] = {{'''
TABLE = ROOT / "benchmarks" / "resource_table.py"
Table = dict[str, dict[int, tuple[int, int, str]]]
# Variants of a call that the predictions are not about, by a word of their names; and those that will do where there is
# no other: to most kernels the norm is all one.
_UNUSUAL, _SECOND = {"odd", "wide"}, {"layer", "none"}


def table(usages: Sequence[Usage]) -> Table:
    """The committed table of these usages: of several variants the one of which fewest blocks fit."""
    found: Table = {}
    first: dict[tuple[str, int], bool] = {}
    for usage in sorted(usages, key=lambda u: bool(_SECOND & set(u.variant.split("-")))):
        words = usage.variant.split("-")
        if not usage.blocks_per_sm or _UNUSUAL & set(words) or re.search(r"<b?f16, float>", usage.kernel):
            continue
        cell = next((word for word in words if word in ("rnn", "gru", "lstm")), "")
        name = " ".join(filter(None, (usage.configuration, cell)))
        matrix = next((m for m in ARCHITECTURES[usage.arch].matrix if m in (usage.matrix or ())), "")
        second = bool(_SECOND & set(words))
        if second > first.setdefault((name, usage.arch), second):
            continue
        entry = (usage.threads or 0, usage.blocks_per_sm, matrix.partition(".")[0])
        found.setdefault(name, {})
        found[name][usage.arch] = min(found[name].get(usage.arch, entry), entry, key=lambda e: e[1])
    return found


def kept(report: Report, path: Path = TABLE) -> tuple[Table, dict[str, str]]:
    """The table of a report and its versions; where a backend could not be looked at, as they were."""
    found, versions = table(report.usages), dict(report.versions)
    before = runpy.run_path(str(path)) if path.exists() else {"RESOURCES": {}, "VERSIONS": {}}
    for tool, mark in (("triton", "/"), ("nvcc", "<")):
        if tool not in versions and tool in before["VERSIONS"]:
            versions[tool] = before["VERSIONS"][tool]
            for name, entries in before["RESOURCES"].items():
                if mark in name:
                    by_arch = dict(zip(ARCHITECTURES, entries, strict=True))
                    found[name] = {arch: entry for arch, entry in by_arch.items() if entry}
    return found, versions


def write_table(found: Table, versions: Mapping[str, str], path: Path = TABLE) -> None:
    """Writes the table, a kernel a line."""
    lines = []
    for name in sorted(found):
        entries = repr(tuple(found[name].get(arch) for arch in ARCHITECTURES)).replace("'", '"')
        lines.append(f"    {json.dumps(name)}: {entries},")
    head = _TABLE_HEAD.format(versions=json.dumps(dict(sorted(versions.items()))))
    path.write_text("\n".join([head, *lines, "}"]) + "\n")
