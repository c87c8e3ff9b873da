#!/usr/bin/env python3
"""Which share of the slow checks is looked at this time: CI divides what takes long among the commits.

PYEFF_TURN is a number, another one for each commit. What is divided into n shares takes share number PYEFF_TURN modulo
n (the native tests a sixteenth of it, since the instruction sets go by the rest); where the variable is not set,
everything is done. Standard library only: it runs before anything is installed.

    python scripts/turn.py             the number of the commit that is checked out, by its hash
    python scripts/turn.py isa 1       the instruction set that the sanitizers build in this turn (1: the one after it);
                                       nothing, which stands for all, where PYEFF_TURN is not set
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Instruction sets and what Linux calls the extensions that each adds; see csrc/cpu/isa.cpp.
ISAS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512bf16": {"avx512_bf16"},
}


def asked() -> int | None:
    """The number in PYEFF_TURN; None where everything is asked for.

    Raises:
        ValueError: it is no number.
    """
    text = os.environ.get("PYEFF_TURN", "")
    return int(text) if text else None


def current() -> int | None:
    """The same for what is locked, and need not be done as a whole by hand: then the commit's number, and everything
    only where PYEFF_TURN is set to nothing."""
    return asked() if "PYEFF_TURN" in os.environ else of_commit()


def of_commit(root: Path = ROOT) -> int:
    """A number that is the same for every run on a commit; outside a repository, for every run on a day."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return int(time.time()) // 86400
    return int(done.stdout[:8], 16) if done.returncode == 0 else int(time.time()) // 86400


def usable(cpuinfo: str) -> list[str]:
    """The instruction sets that the processor has, the smallest first."""
    flags = next((set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    found = []
    for isa, extensions in ISAS.items():
        if not extensions <= flags:
            break
        found.append(isa)
    return found


def isa(turn: int | None, further: int, cpuinfo: str) -> str:
    """The set of a turn; empty, for all of them, without one."""
    sets = usable(cpuinfo)
    return "" if turn is None else sets[(turn + further) % len(sets)]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["isa"]:
        path = Path("/proc/cpuinfo")
        known = path.read_text() if path.exists() and platform.machine() in ("x86_64", "AMD64") else ""
        print(isa(asked(), int(arguments[1]), known))
    else:
        print(of_commit())


if __name__ == "__main__":
    main(sys.argv[1:])
