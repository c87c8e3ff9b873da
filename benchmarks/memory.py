"""Memory of a call: what it keeps for the backward, and how far it makes the process grow at its peak.

Saved bytes come from autograd itself: the storages of the tensors that it saves, each counted once and whole, without
those of the inputs and parameters, which live anyway.

Peak bytes on Linux are the growth of the resident set: the heap's free pages are given back, the kernel's high-water
mark is reset (``/proc/self/clear_refs``), the call runs, and the mark is read. This sees the scratch memory of every
library (MKL, oneDNN, ours), which torch's own statistics do not; it misses scratch that a library has kept from an
earlier call. The call runs on a thread of its own, whose heap has no holes from earlier calls, with glibc told to take
separate pages for all but small blocks: what is freed is gone, and fragmentation is not counted. Below a few hundred KB
the number means nothing. Elsewhere torch's allocator events are used, on a GPU its allocator's peak. ``METHODS`` has
the words for the results.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

METHODS = {
    "rss": "growth of the resident set at its peak",
    "allocator": "peak of torch's CPU allocations",
    "cuda": "peak of torch's CUDA allocations",
}


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """The addresses of the storages of ``tensors``; opaque tensors (oneDNN's packed weights) have none."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided}


def saved_and_peak(call: Callable[[], object], known: Iterable[Tensor], device: str) -> tuple[int, int, str]:
    """Runs ``call`` once.

    Args:
        call (callable): a forward and backward, or a forward.
        known (iterable of Tensor): inputs and parameters.
        device (str): ``"cpu"`` or ``"cuda"``.

    Returns:
        tuple: bytes saved for the backward, bytes at the peak beyond those before the call, and the method (a key of
        ``METHODS``).
    """
    kept = _Kept(storages(known))

    def hooked() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, kept), lambda saved: saved.tensor):
            call()

    most, method = peak(hooked, device)
    return kept.most, most, method


class _Kept:
    """Bytes of the storages that autograd holds now, and the most that it held at any time."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored, self.now, self.most = ignored, 0, 0
        self.holders: Counter[int] = Counter()

    def add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        self.holders[address] += 1
        if self.holders[address] == 1 and address not in self.ignored:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        self.holders[address] -= 1
        if self.holders[address] == 0 and address not in self.ignored:
            self.now -= storage.nbytes()


class _Saved:
    """What autograd keeps in place of a tensor; it dies with its node in the graph, perhaps before the backward."""

    def __init__(self, tensor: Tensor, kept: _Kept) -> None:
        # Detached: a node that saves its own output would otherwise hold itself.
        self.tensor, self.kept = tensor.detach(), kept
        if tensor.layout == torch.strided:
            kept.add(tensor.untyped_storage())

    def __del__(self) -> None:
        # A compiler that tries the hooks on tensors without memory is refused in the middle of __init__.
        if "tensor" in vars(self) and self.tensor.layout == torch.strided:
            self.kept.remove(self.tensor.untyped_storage())


def peak(call: Callable[[], object], device: str) -> tuple[int, str]:
    """Runs ``call`` once: the bytes at its peak beyond those before it, and the method (a key of ``METHODS``)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "cuda"
    if _reset_high_water():
        try:
            return _peak_on_thread(call), "rss"
        finally:
            _allocate_from(_SETTLED_BYTES)
    return _peak_of_allocations(call), "allocator"


def _peak_on_thread(call: Callable[[], object]) -> int:
    grad, peak, failed = torch.is_grad_enabled(), 0, None

    def body() -> None:
        nonlocal peak, failed
        try:
            with torch.set_grad_enabled(grad):
                torch.ones(1 << 16).sum()  # the thread's own team of workers exists before the count begins
                before = _status("VmRSS")
                call()
                peak = max(0, _status("VmHWM") - before)
        except BaseException as error:  # handed to the caller's thread
            failed = error

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed is not None:
        raise failed
    return peak


# Where glibc's own threshold between heap and separate pages ends up once a process frees large blocks.
_SETTLED_BYTES = 32 << 20
# mallopt's numbers for its parameters, and how many blocks may have separate pages if nobody says otherwise.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _MMAP_MAX_DEFAULT = -1, -3, -4, 65536


def _allocate_from(separate_bytes: int) -> None:
    """Sets the size from which glibc takes separate pages, and twice that as what the heap may keep (mallopt)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, separate_bytes)
    libc.mallopt(_TRIM_THRESHOLD, 2 * separate_bytes)


@contextlib.contextmanager
def freed_pages_kept() -> Iterator[None]:
    """Within it glibc's main heap gives nothing back to the system: no call waits for pages that it had before.

    glibc gives blocks of more than 32 MiB back at once, whatever it is told of thresholds, and the system clears their
    pages anew: in the time of a call with a large output that is most, and it is not the call's own. Elsewhere than
    with glibc nothing is changed.
    """
    try:
        mallopt, trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        _allocate_from(_SETTLED_BYTES)
        trim(0)


def _reset_high_water() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        _allocate_from(64 << 10)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except AttributeError:  # a C library without these
        return False
    except OSError:  # no permission
        _allocate_from(_SETTLED_BYTES)
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_of_allocations(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # One event for every allocation (positive) and release (negative), in order of time.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def available(device: str = "cpu") -> float:
    """Bytes of memory that are free to use, the GPU's or the main memory's; infinity where the system does not say."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")
