"""What each GPU kernel took when it was last compiled, kept in the repository: nobody has to compile it again to know.

benchmarks/locks has a file for each Triton kernel file and for each CUDA source. An entry has a key, a hash of all that
its figures depend on: the kernel's source with what it calls or includes, the options, the compilers. Where the key
still fits, the figures are believed, but for a share of the entries that is compiled in turn and compared; where it
does not, or where there is no entry, the kernel is compiled, and the lock must be written anew. So a checkout tells by
hashes alone whether its lock is right, and what the lock says is looked at again all the time.

    python -m benchmarks.lock archs     the architectures that the CUDA C++ kernels are to be built for in this turn
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import ptxas
from .resources import Usage

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "benchmarks" / "locks"
SHARES = 8  # one of so many entries is compiled though its key fits
RENEW = "make resources ARGS=--write"
_FORMAT = 1
# What a compiler says of a kernel; the rest of a Usage follows from its name and from how it is launched.
FIGURES = (
    "registers", "stack", "spill_stores", "spill_loads", "shared", "threads", "tensor_memory", "matrix", "warnings",
    "error",
)  # fmt: skip
_USUAL = {f.name: f.default for f in fields(Usage) if f.name in FIGURES}
Figures = dict[str, Any]


@dataclass
class Lock:
    """A file of locked figures: entries by name, each with its key; and the versions of the compilers they are by."""

    versions: dict[str, str] = field(default_factory=dict)
    entries: dict[str, tuple[str, Figures]] = field(default_factory=dict)


def figures(usage: Usage) -> Figures:
    """What is locked of a usage: the figures that are not the usual ones."""
    found = {name: getattr(usage, name) for name in FIGURES}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v != _USUAL[k]}


def filled(usage: Usage, locked: Figures) -> Usage:
    """The usage with locked figures in the place of its own."""
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in locked.items()}
    return replace(usage, **{**_USUAL, **found})


def difference(locked: Figures, found: Figures) -> str:
    """The figures that differ, in words; empty if none do."""
    names = [name for name in FIGURES if locked.get(name, _USUAL[name]) != found.get(name, _USUAL[name])]
    return ", ".join(f"{n} {locked.get(n, _USUAL[n])!r} is now {found.get(n, _USUAL[n])!r}" for n in names)


def read(path: Path) -> Lock:
    """The lock in a file; an empty one where there is none."""
    if not path.exists():
        return Lock()
    data = json.loads(path.read_text())
    return Lock(data["versions"], {name: (key, found) for name, (key, found) in data["entries"].items()})


def write(path: Path, lock: Lock) -> None:
    """Writes a lock, an entry a line and sorted, so that a change shows as what it is and branches can be merged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(lock.entries[name])}" for name in sorted(lock.entries))
    path.write_text(f'{{\n "versions": {json.dumps(lock.versions)},\n "entries": {{\n{lines}\n }}\n}}\n')


def names(usages: Iterable[Any]) -> list[str]:
    """A name for each usage or job, in their order: kernel, configuration, variant, architecture; and which one of
    several that these do not tell apart."""
    seen: Counter[str] = Counter()
    found = []
    for usage in usages:
        configuration = "/".join(filter(None, (usage.kernel, usage.config)))
        name = " ".join(filter(None, (configuration, usage.variant, f"sm_{usage.arch}")))
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return found


def in_turn(key: str, turn: int) -> bool:
    """Whether an entry is among those that are compiled again in a turn."""
    return int(key[:8], 16) % SHARES == turn % SHARES


def due(jobs: Mapping[str, str], lock: Lock, turn: int | None) -> set[str]:
    """Of the jobs, name -> key, those that must be compiled: the lock does not have them, or it is their turn.

    Without a turn it is everyone's.
    """
    return {
        name for name, key in jobs.items()
        if turn is None or not key or lock.entries.get(name, ("",))[0] != key or in_turn(key, turn)
    }  # fmt: skip


def problems(where: str, jobs: Mapping[str, str], found: Mapping[str, Figures], lock: Lock) -> list[str]:
    """What is wrong between a lock, the jobs that there are (name -> key) and what some of them were found to take."""
    groups = {
        "missing": [name for name in jobs if name not in lock.entries],
        "of other sources or options": [
            n for n, key in jobs.items() if n in lock.entries and lock.entries[n][0] != key
        ],
        "of kernels that are gone": [name for name in lock.entries if name not in jobs],
    }
    said = []
    for what, some in groups.items():
        if some:
            few = ", ".join(some[:3]) + (", .." if len(some) > 3 else "")
            said.append(f"{where}: {len(some)} of {len(jobs)} entries are {what} ({few}); {RENEW}")
    for name, now in found.items():
        key, locked = lock.entries.get(name, ("", {}))
        change = difference(locked, now) if key == jobs[name] else ""
        if change:
            said.append(f"{where}: {name}: {change}, though its sources and compilers are the same; {RENEW}")
    return said


# CUDA C++


def nvcc_version() -> str:
    """Such as ``"V13.0.88"``; empty without nvcc."""
    if not shutil.which("nvcc"):
        return ""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.split()[-1] for line in text.splitlines() if "release" in line), "unknown")


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
# A string is found first, so that what looks like a comment in it stays.
_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.S)


def closure(source: Path, include: Path) -> list[Path]:
    """A source and all of the repository's files that it includes, by their paths under ``include`` or beside it."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        for name in _INCLUDE.findall(file.read_text()):
            place = next((p for p in (file.parent / name, include / name) if p.exists()), None)
            if place is not None:
                waiting.append(place)
    return sorted(found)


def cuda_key(source: Path, root: Path = ROOT) -> str:
    """A hash of a CUDA source with what it includes, but for comments and white space, and of how it is built."""
    total = hashlib.sha256(f"{_FORMAT}".encode())
    for file in closure(source, root / "csrc"):
        code = " ".join(_COMMENT.sub(r" \1", file.read_text()).split())
        total.update(f"\n{file.relative_to(root)}\n{code}".encode())
    build = re.sub(r"^\s*#.*$", "", (root / "cmake" / "cuda.cmake").read_text(), flags=re.M)
    total.update(" ".join(build.split()).encode())
    return total.hexdigest()[:32]


def cuda_path(source: Path, locks: Path = LOCKS) -> Path:
    """Where the lock of a CUDA source lies."""
    return locks / f"{source.name}.json"


def with_locked(
    source: Path, built: Sequence[Usage], locks: Path = LOCKS, root: Path = ROOT
) -> tuple[list[Usage], list[str], list[str]]:
    """What was built of a source, with the lock's usages for the architectures that were not; and what is wrong, and
    what could not be compared."""
    lock, key, version = read(cuda_path(source, locks)), cuda_key(source, root), nvcc_version()
    if not built:
        return [], [f"{source.name}: its build reports no kernel"], []
    if lock.versions and version and lock.versions.get("nvcc") != version:
        return list(built), [], [f"{source.name}: locked by nvcc {lock.versions.get('nvcc')}, here is {version}"]
    if not lock.entries or any(entry[0] != key for entry in lock.entries.values()):
        what = "is not the source that was locked" if lock.entries else "has no lock"
        return list(built), [f"{source.name} {what}; {RENEW}"], []
    found = {name: figures(usage) for name, usage in zip(names(built), built, strict=True)}
    if ptxas.cuobjdump() is None:  # then nobody has looked for these
        for name in found:
            kept = {n: v for n, v in lock.entries.get(name, ("", {}))[1].items() if n in ("threads", "matrix")}
            found[name] = {**found[name], **kept}
    archs = {usage.arch for usage in built}
    expected = {name: key for name in lock.entries if int(_arch(name)) in archs}
    now = Lock(lock.versions, {name: lock.entries[name] for name in expected})
    wrong = problems(source.name, dict.fromkeys(found, key), found, now)
    rest = [
        filled(Usage("cuda", name.rpartition(" sm_")[0], "", int(_arch(name))), locked)
        for name, (_, locked) in lock.entries.items()
        if name not in expected
    ]
    return [*built, *rest], wrong, []


def _arch(name: str) -> str:
    return name.rpartition(" sm_")[2].partition(" ")[0]


def lock_cuda(source: Path, built: Sequence[Usage], locks: Path = LOCKS, root: Path = ROOT) -> None:
    """Writes the lock of a source that was built for every architecture."""
    key = cuda_key(source, root)
    entries = {name: (key, figures(usage)) for name, usage in zip(names(built), built, strict=True)}
    write(cuda_path(source, locks), Lock({"nvcc": nvcc_version()}, entries))


def architectures(root: Path = ROOT) -> list[str]:
    """The architectures that the build names, as nvcc calls them."""
    found = re.search(r'set\(PYEFF_CUDA_ARCHS "([0-9a-f;]+)"\)', (root / "cmake" / "cuda.cmake").read_text())
    assert found, "cmake/cuda.cmake names no architectures"
    return found[1].split(";")


def to_build(turn: int | None, locks: Path = LOCKS, root: Path = ROOT) -> list[str]:
    """The architectures to build for: where the lock fits every source one in turn, to compare it; else all."""
    every, version = architectures(root), nvcc_version()
    if turn is None:
        return every
    for source in (root / "csrc" / "cuda").glob("*.cu"):
        lock, key = read(cuda_path(source, locks)), cuda_key(source, root)
        if not lock.entries or lock.versions.get("nvcc") != version or any(e[0] != key for e in lock.entries.values()):
            return every
    return [every[turn % len(every)]]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from scripts import turn as turns

    print(";".join(to_build(turns.asked())))
