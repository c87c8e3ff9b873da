"""The resource gates over everything that is built for GPUs: what is collected, what is excluded, what fails.

A Triton configuration that fails a gate on an architecture is excluded there by name, with the reason, in
kernels/excluded.py. That table is written by ``scripts/gpu_resources.py --write`` and believed by the kernels when they
choose a configuration. A CUDA C++ kernel has one configuration and may not fail.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import aot, ptxas, resources
from .gpus import ARCHITECTURES
from .resources import Usage

ROOT = aot.ROOT
EXCLUDED = ROOT / "kernels" / "excluded.py"
# CUDA kernels that may have a stack frame (not spills): pattern of the name -> why.
STACK_ALLOWED: dict[str, str] = {}

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
    """

    usages: list[Usage] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


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


def triton(report: Report, modules: Sequence[str] | None = None, excluded: Exclusions | None = None) -> None:
    """Compiles every configuration for every architecture and adds it to the report."""
    modules = aot.kernel_modules() if modules is None else modules
    if not modules:
        report.skipped.append("Triton: no kernel file lists configurations")
        return
    found = aot.run(aot.jobs(modules))
    report.usages += found
    report.failures += triton_failures(found, read_exclusions() if excluded is None else excluded)
    from importlib.metadata import version

    report.versions["triton"] = version("triton")


def cuda(report: Report, build: Path, launches: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Reads what the build in ``build`` kept and adds it to the report."""
    logs = ptxas.logs(build)
    if not logs:
        nvcc = "nvcc is here; build first" if shutil.which("nvcc") else "nvcc is not here"
        report.skipped.append(f"CUDA C++: no kernels were compiled in {build} ({nvcc})")
        return
    found = []
    for log in logs:
        found += ptxas.usages(log.read_text(), log.with_suffix(""))
    found = [_launched(usage, launches or {}) for usage in found]
    missing = sorted(set(ARCHITECTURES) - {usage.arch for usage in found})
    if missing:
        report.skipped.append("CUDA C++: not built for " + ", ".join(f"sm_{arch}" for arch in missing))
    if ptxas.cuobjdump() is None:
        report.skipped.append("CUDA C++: no cuobjdump, so nobody looked for matrix instructions and launch bounds")
    report.usages += found
    report.failures += cuda_failures(found)
    if shutil.which("nvcc"):
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
        report.versions["nvcc"] = next((line.split()[-1] for line in text.splitlines() if "release" in line), "unknown")


def _launched(usage: Usage, launches: Mapping[str, tuple[int, int]]) -> Usage:
    """With the threads and the dynamic shared memory of its launch plan, where that names it."""
    from dataclasses import replace

    plan = next((launches[p] for p in launches if fnmatch.fnmatchcase(usage.kernel, p)), None)
    return usage if plan is None else replace(usage, threads=plan[0], shared=(usage.shared or 0) + plan[1])


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
