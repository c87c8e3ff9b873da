"""What a compiled GPU kernel takes of an SM, and the gates that it must pass.

``aot`` fills a :class:`Usage` for each configuration of each Triton kernel, ``ptxas`` one for each CUDA C++ kernel;
none of it needs a GPU. :meth:`Usage.problems` are the gates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpus import ARCHITECTURES, KIB, MMA, REGISTERS, TCGEN05, WGMMA, blocks_per_sm
from .report import Table

# The instructions of the tensor cores, by what PTX and SASS call them.
MATRIX_NAMES = {
    MMA: (r"\bmma\.sync\b", r"\b[HIDQ]MMA\b"),
    WGMMA: (r"\bwgmma\.mma_async\b", r"\b[HIQ]GMMA\b"),
    TCGEN05: (r"\btcgen05\.mma\b", r"\bUTC\wMMA\b"),
}
NO_MATRIX = "none"


@dataclass(frozen=True)
class Usage:
    """One kernel in one configuration on one architecture.

    Args:
        backend (str): ``"triton"`` or ``"cuda"``.
        kernel (str): what it computes; configurations of the same kernel stand in for each other.
        config (str): the configuration's name; empty where there is only one.
        arch (int): compute capability.
        variant (str): what a call's options (cell, dtype...) make of it.
        registers (int): of a thread.
        stack (int): bytes of a thread's stack frame, where spilled registers live, and arrays without registers.
        spill_stores, spill_loads (int): bytes of spills in the code, each counted once.
        shared (int): bytes of a block, static and dynamic; None where the dynamic part is not known.
        threads (int): of a block; None where it is not known.
        tensor_memory (int): columns of a block.
        matrix (tuple of str): the matrix instructions in it; None where nobody looked.
        expects (tuple of str): any of these matrix instructions will do; ``("none",)`` if there must not be one
            (products in float32 are IEEE products); empty if nothing is expected.
        warnings (tuple of str): what ptxas said beside its numbers, such as that it serialised wgmma.
        error (str): why it did not compile; the numbers then mean nothing.
    """

    backend: str
    kernel: str
    config: str
    arch: int
    variant: str = ""
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int | None = None
    threads: int | None = None
    tensor_memory: int = 0
    matrix: tuple[str, ...] | None = None
    expects: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""

    @property
    def configuration(self) -> str:
        """What an exclusion names: the kernel and its configuration, whatever the variant."""
        return "/".join(filter(None, (self.kernel, self.config)))

    @property
    def name(self) -> str:
        """What a table calls it."""
        return " ".join(filter(None, (self.configuration, self.variant)))

    @property
    def blocks_per_sm(self) -> int | None:
        """How many blocks an SM holds at once, as far as it can be said."""
        if self.error or self.threads is None or self.shared is None:
            return None
        return blocks_per_sm(self.arch, self.threads, self.registers, self.shared, self.tensor_memory)

    @property
    def occupancy(self) -> float | None:
        """The share of an SM's threads that can be resident."""
        blocks = self.blocks_per_sm
        return None if blocks is None else blocks * (self.threads or 0) / ARCHITECTURES[self.arch].threads_per_sm

    def problems(self) -> list[str]:
        """The gates that it fails, in words; empty if it passes all of them."""
        if self.error:
            return [f"does not compile: {self.error}"]
        return [*self._registers(), *self._memory(), *self._instructions()]

    def _registers(self) -> list[str]:
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills: {self.spill_stores} bytes stored, {self.spill_loads} loaded")
        elif self.stack:
            found.append(f"stack frame of {self.stack} bytes")
        if self.threads is not None and self.threads * self.registers > REGISTERS:
            found.append(f"{self.threads} threads of {self.registers} registers are more than {REGISTERS}")
        return found

    def _memory(self) -> list[str]:
        limits, found = ARCHITECTURES[self.arch], []
        if self.shared is not None and self.shared > limits.shared_per_block:
            found.append(f"shared memory: {self.shared} bytes, the limit is {limits.shared_per_block}")
        if self.tensor_memory > limits.tensor_memory_columns:
            found.append(f"tensor memory: {self.tensor_memory} columns, the limit is {limits.tensor_memory_columns}")
        if self.threads is not None and self.threads > 1024:
            found.append(f"{self.threads} threads, the limit is 1024")
        return found

    def _instructions(self) -> list[str]:
        found = [warning for warning in self.warnings if "serialized" in warning]
        if not self.expects or self.matrix is None:
            return found
        has = " and ".join(self.matrix) or "no matrix instruction"
        if self.expects == (NO_MATRIX,):
            if self.matrix:
                found.append(f"matrix instruction: expected none, found {has}")
        elif not set(self.expects) & set(self.matrix):
            found.append(f"matrix instruction: expected {' or '.join(self.expects)}, found {has}")
        return found


def failing(usages: Iterable[Usage]) -> dict[str, dict[int, list[str]]]:
    """Configuration -> architecture -> the gates that it fails there in some variant, of those that fail any."""
    found: dict[str, dict[int, list[str]]] = {}
    for usage in usages:
        problems = usage.problems()
        if problems:
            found.setdefault(usage.configuration, {}).setdefault(usage.arch, []).extend(problems)
    return found


def without_configuration(usages: Sequence[Usage]) -> list[tuple[str, int]]:
    """The kernels, each with an architecture, of which no configuration passes the gates there.

    Kernels on tensor cores are apart from those of the same name in float32, which have their own configurations.
    """
    bad = {(name, arch) for name, by_arch in failing(usages).items() for arch in by_arch}
    every, left = set(), set()
    for usage in usages:
        key = (usage.kernel, usage.expects == (NO_MATRIX,), usage.arch)
        every.add(key)
        if (usage.configuration, usage.arch) not in bad:
            left.add(key)
    return sorted({(kernel, arch) for kernel, _, arch in every - left})


_HEADER = ["kernel", "registers", "spills", "stack", "shared", "threads", "blocks/SM", "occupancy", "matrix", "gates"]


def tables(usages: Sequence[Usage], allowed: Iterable[tuple[str, int]] = ()) -> list[Table]:
    """One table for each backend and architecture. ``allowed`` are the failures that are known, by name."""
    allowed, groups = set(allowed), {}
    for usage in usages:
        groups.setdefault((usage.backend, usage.arch), []).append(usage)
    return [
        Table(f"{backend} sm_{arch}", _HEADER, [_line(usage, allowed) for usage in group])
        for (backend, arch), group in groups.items()
    ]


def _line(usage: Usage, allowed: set[tuple[str, int]]) -> list[str]:
    problems = usage.problems()
    known = (usage.configuration, usage.arch) in allowed
    verdict = "pass" if not problems else "; ".join(["excluded" if known else "FAIL", *(p[:70] for p in problems)])
    if usage.error:
        return [usage.name, *["-"] * 8, verdict]
    occupancy = usage.occupancy
    return [
        usage.name,
        str(usage.registers),
        str(usage.spill_stores + usage.spill_loads),
        str(usage.stack),
        "-" if usage.shared is None else f"{usage.shared / KIB:.1f}K",
        _or_dash(usage.threads),
        _or_dash(usage.blocks_per_sm),
        "-" if occupancy is None else f"{occupancy:.0%}",
        "-" if usage.matrix is None else " ".join(usage.matrix) or "none",
        verdict,
    ]


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def save(usages: Sequence[Usage], versions: dict[str, str], path: str | Path) -> None:
    """Writes the resources as JSON, one kernel a line; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(_plain(usage)) for usage in usages)
    path.write_text(f'{{\n "versions": {json.dumps(versions)},\n "kernels": [\n{lines}\n ]\n}}\n')


def load(path: str | Path) -> tuple[list[Usage], dict[str, str]]:
    """Reads what :func:`save` wrote: the usages and the versions of the compilers."""
    data = json.loads(Path(path).read_text())
    return [from_plain(entry) for entry in data["kernels"]], data["versions"]


def _plain(usage: Usage) -> dict[str, Any]:
    return {**dataclasses.asdict(usage), "blocks_per_sm": usage.blocks_per_sm}


def from_plain(entry: dict[str, Any]) -> Usage:
    """A usage from its JSON."""
    fields = {f.name for f in dataclasses.fields(Usage)}
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key in fields}
    return Usage(**lists)
