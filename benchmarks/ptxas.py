"""What ptxas and cuobjdump say about a kernel, read into numbers.

nvcc's ptxas reports every kernel for every architecture (``-Xptxas=-v``); the build keeps that beside the object
(cmake/keep_output.sh). Triton's ptxas is asked for the same. Both write the same few lines.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .resources import MATRIX_NAMES, Usage

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\d+)[af]?'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+)(?:\+(\d+))? bytes smem")
_LOSS = re.compile(r"\((C\d+)\)\s*(Potential Performance Loss: .*?) in (?:the )?function '([^']+)'")


@dataclass
class Report:
    """One kernel on one architecture, by ptxas. Frames and spills of functions that it calls are counted in."""

    symbol: str
    arch: int
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    warnings: list[str] = field(default_factory=list)


def parse(log: str) -> list[Report]:
    """Every kernel of a log, in its order.

    A function that was not inlined has a frame of its own, listed with the kernel that is being compiled; its bytes
    count for that kernel.

    Raises:
        ValueError: a kernel without its numbers, so that a log that changed its form is not read as "no spills".
    """
    reports: list[Report] = []
    losses: dict[str, list[str]] = {}
    framed = used = True
    for line in log.splitlines():
        if loss := _LOSS.search(line):
            losses.setdefault(loss[3], []).append(f"{loss[2]} ({loss[1]})")
        elif entry := _ENTRY.search(line):
            _complete(reports, framed, used)
            reports.append(Report(entry[1], int(entry[2])))
            framed = used = False
        elif (frame := _FRAME.search(line)) and reports:
            last = reports[-1]
            last.stack += int(frame[1])
            last.spill_stores += int(frame[2])
            last.spill_loads += int(frame[3])
            framed = True
        elif (registers := _USED.search(line)) and reports:
            reports[-1].registers = int(registers[1])
            shared = _SHARED.search(line)
            reports[-1].shared = sum(int(part) for part in shared.groups() if part) if shared else 0
            used = True
    _complete(reports, framed, used)
    for report in reports:
        report.warnings = losses.get(report.symbol, [])
    return reports


def _complete(reports: list[Report], framed: bool, used: bool) -> None:
    if not (framed and used):
        missing = "registers" if framed else "stack frame and spills"
        raise ValueError(f"ptxas reports no {missing} for {reports[-1].symbol} on sm_{reports[-1].arch}")


def matrix_instructions(code: str) -> tuple[str, ...]:
    """The matrix instructions in PTX or SASS, by the names of :mod:`gpus`."""
    return tuple(name for name, forms in MATRIX_NAMES.items() if any(re.search(form, code) for form in forms))


def logs(build: str | Path) -> list[Path]:
    """The logs that the build kept beside the objects of the CUDA sources."""
    return sorted(Path(build).rglob("*.cu.o.log"))


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """C++ symbols -> short names: the kernel and its template arguments, without namespaces and parameters."""
    symbols = list(dict.fromkeys(symbols))
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not symbols:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {symbol: short(name) for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True)}


def short(name: str) -> str:
    """``void pyeff::gpu::project<pyeff::gpu::bf16, (pyeff::Cell)1>(Params)`` -> ``project<bf16, Cell 1>``."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"\[clone [^]]*\]", "", name).strip().removeprefix("void ")
    name = re.sub(r"\((?:int|unsigned int|unsigned|bool|char|long)\)", "", name)
    name = re.sub(r"\((?:\w+::)*(\w+)\)(\d+)", r"\1 \2", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\b(?:\w+::)+", "", name[:end]).strip()


_FUNCTION = re.compile(r"^\s*(?:Function : |\.text\.)(\S+?):?\s*$")
_MAX_THREADS = re.compile(r"EIATTR_MAX_THREADS.*?0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)", re.S)


def cuobjdump() -> str | None:
    """The tool that reads CUDA objects: the toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def launch_threads(elf: str) -> dict[tuple[str, int], int]:
    """(symbol, architecture) -> threads of a block by the kernel's launch bounds, from ``cuobjdump -elf``."""
    found: dict[tuple[str, int], int] = {}
    for arch, text in _by_architecture(elf):
        for section in re.split(r"^(?=\.nv\.info\.)", text, flags=re.M)[1:]:
            symbol = section.split("\n", 1)[0].removeprefix(".nv.info.").strip()
            bounds = _MAX_THREADS.search(section.split("\n.", 1)[0])
            if bounds:
                x, y, z = (int(bounds[i], 16) for i in (1, 2, 3))
                found[symbol, arch] = x * y * z
    return found


def matrix_by_kernel(sass: str) -> dict[tuple[str, int], tuple[str, ...]]:
    """(symbol, architecture) -> its matrix instructions, from ``cuobjdump -sass``."""
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for arch, text in _by_architecture(sass):
        for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
            symbol, _, code = part.partition("\n")
            found[symbol.strip(), arch] = matrix_instructions(code)
    return found


def _by_architecture(dump: str) -> Iterator[tuple[int, str]]:
    parts = re.split(r"^arch = sm_(\d+)[af]?\s*$", dump, flags=re.M)
    for arch, text in zip(parts[1::2], parts[2::2], strict=True):
        yield int(arch), text


def usages(log: str, object_file: Path | None = None, cache: Path | None = None) -> list[Usage]:
    """The kernels of one CUDA source.

    Args:
        log (str): of its compilation.
        object_file (Path): its object: from it come the threads by launch bounds and the matrix instructions, where
            cuobjdump is to be had. The dynamic part of shared memory is in neither.
        cache (Path): a folder that keeps what was in an object: disassembling one takes a while.
    """
    reports = parse(log)
    names = demangled(report.symbol for report in reports)
    inside = contents(object_file, cache) if object_file is not None and object_file.exists() and reports else {}
    found = []
    for r in reports:
        threads, matrix = inside.get(f"{r.symbol} {r.arch}", (None, None))
        found.append(
            Usage(
                "cuda",
                names[r.symbol],
                "",
                r.arch,
                registers=r.registers,
                stack=r.stack,
                spill_stores=r.spill_stores,
                spill_loads=r.spill_loads,
                shared=r.shared or None,
                threads=threads,
                matrix=None if matrix is None else tuple(matrix),
                warnings=tuple(r.warnings),
            )
        )
    return found


def contents(object_file: Path, cache: Path | None) -> dict[str, tuple[int | None, list[str] | None]]:
    """``"symbol architecture"`` -> threads by launch bounds, and matrix instructions; empty without cuobjdump."""
    tool = cuobjdump()
    if not tool:
        return {}
    entry = cache / f"{hashlib.sha256(object_file.read_bytes()).hexdigest()}.object.json" if cache else None
    if entry and entry.exists():
        return json.loads(entry.read_text())
    threads = launch_threads(_dump(tool, "-elf", object_file))
    matrix = matrix_by_kernel(_dump(tool, "-sass", object_file))
    found = {
        f"{symbol} {arch}": (
            threads.get((symbol, arch)),
            list(matrix[symbol, arch]) if (symbol, arch) in matrix else None,
        )
        for symbol, arch in threads.keys() | matrix.keys()
    }
    if entry:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(json.dumps(found))
    return found


def _dump(tool: str, what: str, object_file: Path) -> str:
    return subprocess.run([tool, what, str(object_file)], capture_output=True, text=True, check=True).stdout
