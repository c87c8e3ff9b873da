"""Times the contenders of each case in one process, in alternation, after checking what they compute.

For each case: input sets are made, every contender runs once and its outputs are held against the oracle in float64,
once more for its memory, and then all take turns (A B C A B C ...) until the time is spent or the medians stand. A turn
is as many calls in a row as make a measurable time, over rotating input sets. Contenders that are far behind after the
first turns sit out the later ones. On a GPU each contender races twice: by its calls, and as CUDA graphs.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from . import cuda, machine, memory, results, roofline
from .registry import TRAINING, Call, Case, Contender, Selection, Unavailable, dtype_name
from .results import Measured, Row, Run

# Seconds for calls [first, first + count) of a rotation.
Timer = Callable[[Sequence[Call], int, int], float]
# The same calls as graphs; raises where they cannot be.
Capture = Callable[[Sequence[Call]], list[Call]]

_MAX_SETS = 256


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        seconds_per_case (float): turns go on until this is spent...
        min_turns (int): ...but each contender has at least so many,
        max_turns (int): ...and at most so many.
        sample_seconds (float): the least length of a turn; short calls are repeated to reach it.
        precision (float): stop early when every interquartile range over the median, over the root of the number of
            turns, is below this.
        slow (float): after the first turns, a contender that is so many times slower than the fastest sits out.
        seed (int): of the inputs.
        budget_seconds (float): no case is begun after this much time for the whole run; 0 is no limit.
    """

    seconds_per_case: float = 2.5
    min_turns: int = 3
    max_turns: int = 60
    sample_seconds: float = 0.005
    precision: float = 0.002
    slow: float = 2.0
    seed: int = 0
    budget_seconds: float = 0.0

    @staticmethod
    def of(size: str) -> Settings:
        """The settings for a selection's size."""
        return Settings(seconds_per_case=0.5) if size == "quick" else Settings()


class Progress:
    """What the runner tells while it runs; this one says nothing."""

    def begin(self, cases: int) -> None: ...

    def step(self, case: Case, contender: str, doing: str) -> None: ...

    def finish(self, row: Row) -> None: ...


def run(
    cases: Sequence[Case],
    select: Selection,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    ceilings: roofline.Ceilings | None = None,
    timer: Timer | None = None,
    capture: Capture | None = None,
    checkpoint: Callable[[Run], None] | None = None,
) -> Run:
    """Runs ``cases`` one after another.

    Args:
        cases (sequence of Case): all of one device.
        select (Selection): what they were selected by; kept with the results.
        settings (Settings): default: those of the selection's size.
        progress (Progress): told of every step.
        ceilings (Ceilings), timer (callable), capture (callable): other clocks and graphs, for tests.
        checkpoint (callable): is given what there is after each case, so that a run that is ended leaves something.

    Returns:
        Run: with a row for every case for which there was time; ``settings["left_out"]`` has the labels of the others.
        What went wrong is in the rows, nothing is raised for it.
    """
    start = time.monotonic()
    settings, progress = settings or Settings.of(select.size), progress or Progress()
    progress.begin(len(cases))
    if ceilings is None:
        dtypes = {case.dtype: None for case in cases}
        ceilings = roofline.measure(select.device, list(dtypes))
    if select.device == "cuda":
        timer, capture = timer or cuda.timer, capture or cuda.capture
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for cuDNN as for cuBLAS
    else:
        timer = timer or cpu_timer
    found = Run(
        date=machine.now(),
        commit=machine.commit(),
        machine={**machine.cpu(), "gpu": machine.gpu() if select.device == "cuda" else None},
        versions=machine.versions(),
        settings={**asdict(select), **asdict(settings), "left_out": [_name(case) for case in cases]},
        ceilings={"sources": ceilings.sources, "samples": []},
        memory_method="",
        rows=[],
    )
    methods = set()
    for done, case in enumerate(cases, 1):
        if settings.budget_seconds and time.monotonic() - start > settings.budget_seconds:
            break
        row, method = run_case(case, ceilings, settings, progress, timer, capture)
        methods.add(method)
        found = replace(
            found,
            settings={**found.settings, "left_out": [_name(c) for c in cases[done:]]},
            ceilings={"sources": ceilings.sources, "samples": [asdict(sample) for sample in ceilings.samples]},
            memory_method="; ".join(memory.METHODS[m] for m in sorted(methods - {""})),
            rows=[*found.rows, row],
        )
        progress.finish(row)
        if checkpoint:
            checkpoint(found)
    return found


def _name(case: Case) -> str:
    return f"{case.op} {case.label} {dtype_name(case.dtype)} {case.mode}"


def compile_only(cases: Sequence[Case], settings: Settings | None = None) -> None:
    """Runs the compiled contenders once, so that what Inductor makes of them is in its cache for a later process."""
    for case in cases:
        with torch.set_grad_enabled(case.mode == TRAINING):
            sets = case.make(1, (settings or Settings()).seed)
            for contender in case.contenders:
                if contender.name in ("compiled", "folded"):
                    # What goes wrong here goes wrong in the run, too, which says so.
                    with contextlib.suppress(Exception):
                        contender.prepare(sets)[0]()


def run_case(
    case: Case,
    ceilings: roofline.Ceilings,
    settings: Settings,
    progress: Progress,
    timer: Timer,
    capture: Capture | None = None,
) -> tuple[Row, str]:
    """One case: its row, and how memory was measured."""
    with torch.set_grad_enabled(case.mode == TRAINING):
        progress.step(case, "", "inputs and oracle")
        sets = case.make(_set_count(case), settings.seed)
        truth = [t.detach() for t in case.oracle(sets[0])]
        measured, calls, method = _check_all(case, sets, truth, progress)
        racers = [_Racer(m, calls[m.name], m.samples) for m in measured if m.name in calls]
        if capture:
            racers += _graphs(case, racers, capture, progress)
        before = ceilings.sample(dtype_name(case.dtype))
        _take_turns(case, racers, settings, progress, timer)
        around = ceilings.around(before, ceilings.sample(dtype_name(case.dtype)))
    floor = roofline.floor_seconds(case.flops, case.bytes, around[dtype_name(case.dtype)], around[roofline.COPY])
    row = Row(
        op=case.op,
        group=case.group,
        point=case.point,
        axis=case.axis,
        shape=case.shape,
        dtype=dtype_name(case.dtype),
        device=case.device,
        mode=case.mode,
        flops=case.flops,
        bytes=case.bytes,
        input_sets=len(sets),
        ceilings=around,
        floor_seconds=floor,
        contenders=measured,
    )
    return row, method


def _set_count(case: Case) -> int:
    """As many sets as fill the last cache twice; two at least, so that no call meets the buffers of the one before."""
    cache = machine.last_cache_bytes() if case.device == "cpu" else cuda.l2_bytes()
    return min(_MAX_SETS, max(2, math.ceil(2 * cache / case.set_bytes)))


def _check_all(
    case: Case, sets: list, truth: list[Tensor], progress: Progress
) -> tuple[list[Measured], dict[str, list[Call]], str]:
    """Runs every contender twice: for its result, and for its memory. Returns the calls of those that passed."""
    measured, calls, method = {}, {}, ""
    # Without the reference (it breaks, or has no room), what is left of the limit is the part without its error.
    limits = error_limits([0.0] * len(truth), case.dtype, case.reduction)
    # The reference first, since its error in this dtype sets the limit of the others.
    for contender in sorted(case.contenders, key=lambda c: c.role != "reference"):
        progress.step(case, contender.name, "check")
        entry = Measured(contender.name, contender.about, contender.role, results.TIMED)
        measured[contender.name] = entry
        try:
            rotation = _prepare(contender, sets, case.device)
            outputs = case.comparable(sets[0], [t.detach() for t in rotation[0]()])
            errors = relative_errors(outputs, truth)
            entry.error = max(errors)
            if contender.role == "reference":
                limits = error_limits(errors, case.dtype, case.reduction)
            entry.status, entry.reason = _verdict(errors, limits)
            if entry.status == results.TIMED:
                progress.step(case, contender.name, "memory")
                entry.saved_bytes, entry.peak_bytes, method = memory.saved_and_peak(
                    rotation[1 % len(rotation)], case.tensors(sets[1 % len(sets)]), case.device
                )
                calls[contender.name] = rotation
        except Unavailable as reason:
            entry.status, entry.reason = results.ABSENT, str(reason)
        except Exception as error:  # a rival that breaks must not end the run, and must not go unseen either
            entry.status, entry.reason = results.FAILED, _first_line(error)
    return [measured[c.name] for c in case.contenders], calls, method


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _prepare(contender: Contender, sets: list, device: str) -> list[Call]:
    free = memory.available(device)
    if contender.bytes_needed > free:
        raise Unavailable(f"needs about {contender.bytes_needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    return contender.prepare(sets)


def relative_errors(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """For each output the norm of its difference to the truth over that of the truth; inf for a wrong shape or NaN."""
    if len(outputs) != len(truth):
        raise ValueError(f"{len(outputs)} outputs, expected {len(truth)}")
    errors = []
    for output, expected in zip(outputs, truth, strict=True):
        if output.shape != expected.shape:
            errors.append(math.inf)
            continue
        scale = expected.norm().item() or 1.0
        error = (output.to(expected) - expected).norm().item() / scale
        errors.append(error if math.isfinite(error) else math.inf)
    return errors


def error_limits(reference: list[float], dtype: torch.dtype, reduction: int) -> list[float]:
    """What the errors of outputs may be.

    The reference's in the same dtype, and a bound for what another order of the same work adds: four roundings to the
    dtype on the way to a result, and what a plain running sum of ``reduction`` random terms loses, u sqrt(K) with the
    unit roundoff u of the dtype that sums are kept in (at least float32). The reference's sums may be blocked, others
    need not be. The bound holds for the reference too: of its error no more than that counts, so that one that is wrong
    lets nothing wrong pass.
    """
    eps = torch.finfo(dtype).eps
    roundoff = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    bound = 4 * eps + roundoff * math.sqrt(reduction)
    return [min(error, bound) + bound for error in reference]


def _verdict(errors: list[float], limits: list[float]) -> tuple[str, str]:
    for i, (error, limit) in enumerate(zip(errors, limits, strict=True)):
        if error > limit:
            return results.WRONG, f"output {i} is off by {error:.1e} of its norm, the limit is {limit:.1e}"
    return results.TIMED, ""


@dataclass
class _Racer:
    """A contender's calls, or its graphs, and where their samples go."""

    measured: Measured
    calls: list[Call]
    samples: list[float]
    graph: bool = False
    count: int = 1
    position: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def _graphs(case: Case, racers: list[_Racer], capture: Capture, progress: Progress) -> list[_Racer]:
    found = []
    for racer in racers:
        progress.step(case, racer.measured.name, "graph")
        try:
            graphs = capture(racer.calls)
        except Exception as error:  # not everything can be a graph, and its calls are timed nevertheless
            racer.measured.graph_reason = _first_line(error)
        else:
            found.append(_Racer(racer.measured, graphs, racer.measured.graph_samples, graph=True))
    return found


def _take_turns(case: Case, racers: list[_Racer], settings: Settings, progress: Progress, timer: Timer) -> None:
    if not racers:
        return

    def turn(racer: _Racer) -> float:
        seconds = timer(racer.calls, racer.position, racer.count)
        racer.position += racer.count
        return seconds / racer.count

    racing = list(racers)
    with _no_garbage_collection(), memory.freed_pages_kept():
        for racer in racing:
            progress.step(case, racer.measured.name, "warm-up")
            once = min(turn(racer), turn(racer))
            racer.count = max(1, min(10_000, math.ceil(settings.sample_seconds / max(once, 1e-9))))
            if racer.graph:
                racer.measured.graph_calls_per_sample = racer.count
            else:
                racer.measured.calls_per_sample = racer.count
        spent = 0.0
        for turns in itertools.count(1):
            for racer in racing:
                progress.step(case, racer.measured.name, f"turn {turns}")
                seconds = turn(racer)
                racer.samples.append(seconds)
                spent += seconds * racer.count
            if turns >= settings.min_turns:
                racing = [r for graph in (False, True) for r in _in_the_race(racing, graph, settings)]
                if turns >= settings.max_turns or spent >= settings.seconds_per_case:
                    return
                spreads = [results.spread(racer.samples) / math.sqrt(turns) for racer in racing]
                if turns >= 10 and max(spreads) < settings.precision:
                    return


def _in_the_race(racing: list[_Racer], graph: bool, settings: Settings) -> list[_Racer]:
    racing = [racer for racer in racing if racer.graph == graph]
    fastest = min((racer.median for racer in racing), default=0.0)
    # Ours always stays: it is what every number is about.
    return [r for r in racing if r.measured.role == "fused" or r.median <= settings.slow * fastest]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cpu_timer(calls: Sequence[Call], first: int, count: int) -> float:
    """Wall time of ``count`` calls of a rotation."""
    sets = len(calls)
    start = time.perf_counter()
    for i in range(first, first + count):
        calls[i % sets]()
    return time.perf_counter() - start
