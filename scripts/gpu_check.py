"""Everything that needs a GPU, on a bare machine: build, test, sanitize, time and profile pyeff, and write it down.

It uses what is installed (torch with CUDA, nvcc, cmake; pytest, compute-sanitizer and ncu where they are), needs no
network, changes no setting of the device, and ends within nine minutes. docs/gpu.md says what each part does.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_run import LEFT_OUT, Command, Part, dry_run, run, table  # noqa: E402

OPS = ("read", "ticket", "multimask")
ONLY = ("test", "bench", "profile")
BACKENDS = ("cuda", "triton")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 525.0
LIBRARY = ROOT / "pyeff" / "_C.abi3.so"
SUMMARY, SANITIZE_LOG, PROFILE_LOG = "gpu_check.json", "sanitize.log", "profile.log"
LOGS = ("build.log", "device.log", "suite.log", SANITIZE_LOG, "bench.log", PROFILE_LOG)
# The architecture whose own instructions (wgmma) a kernel may use; the others' code needs no suffix.
ARCHITECTURES = {"9.0": "90a"}
# Of Nsight Compute's table.
METRICS = (
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "Registers Per Thread",
    "Dynamic Shared Memory Per Block", "Achieved Occupancy",
)  # fmt: skip
# What the tests and the command line do without, and what is left out then.
OPTIONAL = {
    "hypothesis": "tests of properties and the fuzz", "xdist": "tests side by side", "triton": "the triton backend",
    "transformers": "tests of the recipes", "typer": "tests of the command line", "rich": "tests of the command line",
    "numpy": "some tests of the definition",
}  # fmt: skip


def seconds(text: str) -> float:
    given = float(text)
    if not given >= 10:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 10")
    return given


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ONLY, action="append", help="this alone, after the build; may be repeated")
    parser.add_argument("--op", choices=OPS, help="tests, times and profiles of this operation alone")
    parser.add_argument("--out", type=Path, help="the folder for JSON and logs; default: $OUT, or build/gpu_check")
    parser.add_argument(
        "--seconds", type=seconds, default=SECONDS, help="the time for everything (default %(default)g)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print each command, run what needs no GPU")
    return parser


def first_line(command: list[str], pattern: str = "") -> str | None:
    """What a program says of itself; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(pattern, line) and line.strip()]
    return lines[0] if done.returncode == 0 and lines else None


def torch_facts() -> dict[str, object]:
    code = (
        "import json, torch; there = torch.cuda.is_available(); print(json.dumps({'version': torch.__version__, "
        "'folder': torch.__path__[0], 'cuda': torch.version.cuda, 'devices': torch.cuda.device_count() if there else 0,"
        " 'capability': '.'.join(map(str, torch.cuda.get_device_capability())) if there else None}))"
    )
    line = first_line([sys.executable, "-c", code], r"^\{")
    return json.loads(line) if line else {}


def tools() -> dict[str, object]:
    """What this machine has: interpreter, torch, GPU, compilers, checkers."""
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    gpu = first_line(["nvidia-smi", query, "--format=csv,noheader"])
    names = ("name", "driver", "capability", "memory")
    found: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch_facts(),
        "gpu": dict(zip(names, re.split(r",\s*", gpu), strict=False)) if gpu else None,
        "nvcc": first_line(["nvcc", "--version"], "release"),
        "cmake": first_line(["cmake", "--version"]),
        "ninja": first_line(["ninja", "--version"]),
        "make": first_line(["make", "--version"]),
        "compute-sanitizer": first_line(["compute-sanitizer", "--version"], "ersion"),
        "ncu": first_line(["ncu", "--version"], "ersion"),
        "pytest": version("pytest"),
    }
    return found | {name: version("pytest-xdist" if name == "xdist" else name) for name in OPTIONAL}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(found: dict) -> list[str]:
    """Why nothing can run here."""
    said = []
    torch = found["torch"]
    if not torch:
        said.append(f"{sys.executable} has no torch that can be imported")
    elif tuple(map(int, re.findall(r"\d+", torch["version"])[:2])) < (2, 11):
        said.append(f"torch is {torch['version']}, expected 2.11 or later")
    elif not torch["devices"]:
        said.append("torch sees no CUDA device")
    for name in ("nvcc", "cmake"):
        if not found[name]:
            said.append(f"{name} is not here")
    if not (found["ninja"] or found["make"]):
        said.append("neither ninja nor make is here")
    return said


def build(found: dict) -> Part:
    capability = (found["torch"] or {}).get("capability") or (found["gpu"] or {}).get("capability") or "9.0"
    folder = "build/gpu"
    configure = [
        "cmake", "-S", ".", "-B", folder, *(["-G", "Ninja"] if found["ninja"] else []),
        f"-DPYEFF_CUDA_ARCHS={ARCHITECTURES.get(capability, capability.replace('.', ''))}", "-DPYEFF_DEV=OFF",
        f"-DPYEFF_TORCH_DIR={found['torch'].get('folder', '')}", f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    make = ["cmake", "--build", folder, "--target", "pyeff_C", "--parallel", str(os.cpu_count() or 1)]
    return Part("build", "build", 180, "build.log", [Command(configure), Command(make)])


def tests(found: dict, op: str | None, dry: bool) -> list[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if dry:
        pytest.append("--collect-only")
    # The suite's tests on CUDA tensors alone: what runs on a CPU is what every machine checks.
    names = ["gpu", "cuda", *(["triton"] if found["triton"] else [])]
    demanded = {} if dry else {"PYEFF_TEST_REQUIRE": ",".join(names)}
    on_gpu = demanded | ({} if dry else {"PYEFF_TEST_PLACES": "cuda"})
    device = [f"tests/test_{stem}_cuda.py" for stem in ((op,) if op else OPS)] + ["tests/test_bench_cuda.py"]
    chosen = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"tests/test_{op}*.py")) if op else ["tests"]
    chosen = [path for path in chosen if path not in device]
    workers = ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))] if found["xdist"] else []
    suite = [*chosen, *(f"--ignore={path}" for path in device), "-m", "not slow", *workers]
    parts = [
        Part("device", "device", 80, "device.log", [Command([*pytest, *device], demanded, dry=True)]),
        Part("suite", "suite", 150, "suite.log", [Command([*pytest, *suite], on_gpu, dry=True)]),
    ]
    for part in parts:
        part.reason = "" if found["pytest"] else "pytest is not installed"
    return parts


def sanitizers(found: dict, op: str | None, dry: bool) -> list[Part]:
    parts = []
    for tool in SANITIZERS:
        part = Part(tool, "suite", 130, SANITIZE_LOG)
        for name in backends(found):
            call = [sys.executable, "scripts/gpu_sanitize.py", *(["--op", op] if op else []), "--backend", name]
            watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes",
                     "application-only", "--print-limit", "20"]  # fmt: skip
            # Every allocation by itself, or an access past one tensor is an access to its neighbour.
            part.commands.append(Command([*watch, *call], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
        part.reason = "" if found["compute-sanitizer"] else "compute-sanitizer is not here"
        part.excuses = {"Device not supported": "compute-sanitizer does not support this device"}
        parts.append(part)
    if dry and LIBRARY.exists():
        small = [sys.executable, "scripts/gpu_sanitize.py", "--backend", "cpu", "--device", "cpu"]
        parts[0].commands.append(Command(small, dry=True))
        parts[0].reason = ""
    return parts


def backends(found: dict) -> list[str]:
    return [name for name in BACKENDS if name != "triton" or found["triton"]]


def benchmarks(found: dict, op: str | None, out: Path, dry: bool, seconds: float, size: str) -> list[Part]:
    program, what = [sys.executable, "-m", "benchmarks"], [op] if op else []
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "gpu_inductor")}
    on_gpu = [*program, *what, "--device", "cuda", "--size", size]
    # A compiled rival takes a minute to compile: while the tests run, so that the times are taken on a quiet machine.
    warm = Part("compile", "suite", 140, "bench.log", [Command([*on_gpu, "--compile-only"], cache)], optional=True)
    budget = seconds - 30
    times = Part("bench", "bench", seconds, "bench.log")
    times.commands = [Command([*on_gpu, "--budget", f"{budget:g}", "--json", str(out)], cache)]
    if dry:
        smoke = ["--device", "cpu", "--size", "quick", "--match", "gru 16 float32 forward", "--with", "fused,eager"]
        times.commands.append(Command([*program, *what, *smoke, "--json", str(out)], dry=True))
        times.commands.append(Command([*program, *what, "--from", "benchmarks/results/cpu.json"], dry=True))
    return [warm, times]


def profiles(found: dict, op: str | None) -> Part:
    part = Part("profile", "profile", 75, PROFILE_LOG)
    sections = [word for name in ("SpeedOfLight", "LaunchStats", "Occupancy") for word in ("--section", name)]
    for stem, name in itertools.product((op,) if op else OPS, backends(found)):
        watch = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--target-processes",
                 "application-only", *sections, "--page", "details", "--csv"]  # fmt: skip
        call = [sys.executable, "scripts/gpu_profile.py", "--op", stem, "--backend", name]
        part.commands.append(Command([*watch, *call]))
    part.reason = "" if found["ncu"] else "ncu is not here"
    part.expected = '"Kernel Name"'
    part.excuses = {
        "ERR_NVGPUCTRPERM": "this user may not read the device's counters",
        "Failed to initialize the profiler": "the profiler cannot be initialised on this machine",
    }
    return part


def plan(found: dict, options: argparse.Namespace, out: Path) -> list[Part]:
    """The parts in their order: stages one after another, the parts of one side by side."""
    only, dry = options.only or ONLY, options.dry_run
    parts = [build(found)]
    if "test" in only:
        parts += tests(found, options.op, dry) + sanitizers(found, options.op, dry)
    if "bench" in only:
        beside = "test" in only
        seconds = 130.0 if beside else max(60.0, options.seconds - 200)
        warm, times = benchmarks(found, options.op, out, dry, seconds, "quick" if beside else "default")
        parts += [warm, times] if beside else [times]
    if "profile" in only:
        parts.append(profiles(found, options.op))
    return parts


def kernels_of(text: str) -> list[dict[str, str]]:
    """What Nsight Compute says in its table of values, one dictionary a kernel launch."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for block, part in enumerate(re.split(r'(?m)^(?="ID",)', text)[1:]):
        rows = csv.DictReader(line for line in part.splitlines() if line.startswith('"'))
        for row in rows:
            if row.get("Metric Name") in METRICS:
                kernel = found.setdefault((block, row["ID"]), {"kernel": row["Kernel Name"]})
                kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())


def sanitizer_errors(text: str) -> list[str]:
    """The summaries of the sanitizers' runs that found something."""
    return [line.strip("= ") for line in text.splitlines() if re.search(r"SUMMARY: [1-9]", line)]


def resources(build: Path) -> list[str]:
    """Registers, shared memory and spills of each kernel, as ptxas said them when it was built."""
    found = []
    for log in sorted(build.rglob("*.cu.o.log")):
        kernel = ""
        for line in log.read_text(errors="replace").splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                kernel = " ".join(entry.groups())
            elif re.search(r"spill stores|Used \d+ registers", line):
                found.append(f"{kernel}: {line.replace('ptxas info    :', '').strip()}")
    return found


def highlights(folder: Path, parts: list[Part]) -> str:
    """What is worth a look before the table: the end of what went wrong, and the times."""
    shown = []
    for log in dict.fromkeys(part.log for part in parts if part.seconds):
        lines = read_log(folder, log).splitlines()
        bad = [part.name for part in parts if part.log == log and part.bad]
        if bad:
            shown += [f"--- {log} ({', '.join(bad)})", *lines[-25:]]
        elif log == "bench.log":
            shown += [f"--- {log}", *lines[-60:]]
    return "\n".join(shown)


def read_log(folder: Path, name: str) -> str:
    path = folder / name
    return path.read_text(errors="replace") if path.exists() else ""


def commit() -> str | None:
    sha = first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return sha and sha + ("+" if changed else "")


def write(folder: Path, found: dict, options: argparse.Namespace, parts: list[Part], why: list[str]) -> None:
    """Everything that is known so far, as JSON."""
    left_out = [f"{what}: {name} is not installed" for name, what in OPTIONAL.items() if not found[name]]
    left_out += [f"{part.name}: {part.reason}" for part in parts if part.status == LEFT_OUT]
    summary = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry_run": options.dry_run,
        "tools": found,
        "problems": why,
        "left_out": left_out,
        "parts": [
            {name: value for name, value in vars(part).items() if name != "commands"}
            | {"commands": [command.text() for command in part.commands]}
            for part in parts
        ],
        "sanitizers": sanitizer_errors(read_log(folder, SANITIZE_LOG)),
        "profile": kernels_of(read_log(folder, PROFILE_LOG)),
        "ptxas": resources(ROOT / "build" / "gpu"),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def main(words: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(words)
    deadline = time.monotonic() + options.seconds
    os.chdir(ROOT)
    out = (options.out or Path(os.environ.get("OUT") or "build/gpu_check")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / SUMMARY).touch()
    except OSError as error:
        parser.error(f"--out is {out}, which cannot be written to: {error.strerror}")
    for name in (*LOGS, SUMMARY):
        (out / name).unlink(missing_ok=True)
    found = tools()
    for name, what in found.items():
        print(f"{name:>18}: {what if what else 'not here'}")
    parts, why = plan(found, options, out), problems(found)
    for line in why:
        print(f"gpu_check: {line}", file=sys.stderr)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    if options.dry_run:
        if not found["torch"]:  # what needs no GPU needs torch nevertheless
            for part in parts:
                for command in part.commands:
                    command.dry = False
        dry_run(parts, out, deadline)
    elif why:
        for part in parts:
            part.status, part.reason = LEFT_OUT, "; ".join(why)
    else:
        run(parts, out, deadline, after=lambda: write(out, found, options, parts, why))
    write(out, found, options, parts, why)
    print(highlights(out, parts))
    print(f"\n{table(parts)}\nwritten to {out}")
    return 2 if why and not options.dry_run else int(any(part.bad for part in parts))


if __name__ == "__main__":
    sys.exit(main())
