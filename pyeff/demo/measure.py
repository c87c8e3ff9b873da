"""Memory of a training step, and the time of READ's part of it alone.

Memory is measured in a process of its own for each variant: the model is loaded and used once, the system's high-water
mark of the resident size is reset, and a few training steps run on full-length batches. What is reported is the mark
minus the size before. So everything that the step needs counts (activations, gradients, the optimizer's moments, what
kernels and libraries allocate for themselves), and the loaded model does not. Saved-for-backward bytes are those of the
distinct storages that autograd keeps after a forward, parameters left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pyeff
from pyeff.demo.variants import Settings, Variant, load

STEPS = 3
REPEATS = 15


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def _reset_peak() -> bool:
    """Starts the high-water mark of the resident size anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def saved_bytes(variant: Variant, batch: dict[str, Tensor]) -> int:
    """What autograd keeps between the forward and the backward of one step, in bytes."""
    own = {t.untyped_storage().data_ptr() for t in (*variant.model.parameters(), *variant.model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    variant.model.train(variant.key == "full")
    with variant.running(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(variant.model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
    del loss
    return sum(kept.values())


def memory_here(key: str, classes: int, settings: Settings) -> dict[str, object]:
    """Peak and saved bytes of one variant, in this process, which should have done nothing else."""
    tokenizer, model = load(settings, classes)
    variant = Variant(key, model, settings)
    del model
    ids = torch.randint(len(tokenizer), (settings.batch, settings.max_length))
    labels = torch.randint(classes, (settings.batch,))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    # Touches every weight (they are mapped from the file) and starts the libraries' threads.
    variant.accuracy(iter([{name: t[:1, :8] if t.dim() == 2 else t[:1] for name, t in batch.items()}]))
    precise = _reset_peak()
    before = _status("VmRSS") if precise else _peak()
    for index in range(STEPS):
        variant.step(batch, index, STEPS)
    after = _status("VmHWM") if precise else _peak()
    method = "VmHWM after the steps - VmRSS before" if precise else "growth of ru_maxrss"
    return {"peak_bytes": after - before, "saved_bytes": saved_bytes(variant, batch), "method": method}


def memory(key: str, classes: int, settings: Settings) -> dict[str, object]:
    """:func:`memory_here` in a process of its own.

    Raises:
        RuntimeError: the process failed; the message has its last words.
    """
    job = json.dumps({"key": key, "classes": classes, "settings": dataclasses.asdict(settings)})
    # What is freed goes back to the system at once, or the heap's holes would count as memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = (str(Path(pyeff.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, "-m", "pyeff.demo.measure", job], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {key!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read_alone(variants: list[Variant], training: Iterator[dict[str, Tensor]]) -> dict[str, float]:
    """Seconds for forward and backward of READ's recurrence and projection alone, on the layer outputs of batches.

    The variants take turns; each gets the same layer outputs and the first variant's weights.

    Returns:
        dict: the median for each variant's key.
    """
    first = variants[0]
    adapter, encoder = first.attachment.adapter, first.model.encoder.eval()
    seconds: dict[str, list[float]] = {variant.key: [] for variant in variants}
    for batch in itertools.islice(training, REPEATS + 1):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            phi = encoder(**inputs, output_hidden_states=True).hidden_states[1:]
        for variant in variants:
            with variant.running():
                start = time.perf_counter()
                out = adapter(phi)
                out.backward(torch.ones_like(out))
                seconds[variant.key].append(time.perf_counter() - start)
            adapter.zero_grad()
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(memory_here(arguments["key"], arguments["classes"], Settings(**arguments["settings"]))))
