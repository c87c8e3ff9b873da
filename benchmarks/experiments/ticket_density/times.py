"""Time and memory of a ticket against the dense model: training steps and inference, in turns.

The ticket is as a user would run it, query, key and value of an attention as one layer. Texts are full-length and
random: time does not depend on what they say. Memory of a training step is measured in a process of its own, in which
nothing else has run: the high-water mark of the resident size, once the model stands, minus the size before it was
loaded. So weights, gradients, the optimizer's moments, activations and what kernels allocate are all in it. What is
exact is beside it: the bytes of weights with their index, gradients and moments.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pyeff.demo import measure as demo_measure
from pyeff.demo import variants

from . import methods
from .methods import Job, Masks
from .train import Bench, Settings, Trained

REPEATS = 15
UNTIMED = 2
PEAK_STEPS = 3


def random_batch(settings: Settings, texts: int) -> dict[str, Tensor]:
    """Texts of full length; every token is one of BERT's vocabulary, none of them special."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, 20000, (texts, settings.max_length), generator=generator)
    labels = torch.randint(settings.classes, (texts,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measure(bench: Bench, job: Job, masks: Masks, dtype: str, repeats: int, folder: Path) -> dict[str, object]:
    """Everything about one ticket, every sample included; the dense model's beside it.

    Args:
        bench (Bench), job (Job), masks (dict of Tensor): whose ticket it is.
        dtype (str): of the products.
        repeats (int): samples of each call.
        folder (Path): for what is handed to another process.
    """
    settings = dataclasses.replace(bench.settings, classes=len(bench.corpus.labels))
    model, _ = bench.at(job.seed)
    dense = Job("dense", 1.0, job.seed)
    rivals = {
        "dense": Trained(model, settings, dense, {}, dtype=dtype),
        "ticket": Trained(model, settings, job, masks, through="ticket", dtype=dtype, fused=True),
    }
    batch, one = random_batch(settings, settings.batch), random_batch(settings, 1)
    calls = {
        "step": lambda rival: rival.step(batch, 0, settings.steps),
        "inference": lambda rival: infer(rival, batch),
        "one_text": lambda rival: infer(rival, one),
    }
    found: dict[str, object] = {"method": job.method, "density": job.density, "seed": job.seed, "dtype": dtype}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for call, run in calls.items():
        samples: dict[str, list[float]] = {name: [] for name in rivals}
        for index in range(UNTIMED + repeats):
            for name in list(rivals)[:: 1 if index % 2 else -1]:  # nobody always follows the other
                start = time.perf_counter()
                run(rivals[name])
                samples[name].append(time.perf_counter() - start)
        found[call] = {name: [round(s, 6) for s in taken[UNTIMED:]] for name, taken in samples.items()}
    found["bytes"] = {name: state_bytes(rival) for name, rival in rivals.items()}
    rivals.clear()
    found["peak_bytes"] = {
        "dense": peak(settings, dense, {}, dtype, folder),
        "ticket": peak(settings, job, masks, dtype, folder),
    }
    return found | {"threads": torch.get_num_threads(), "load": load}


@torch.no_grad()
def infer(rival: Trained, batch: dict[str, Tensor]) -> None:
    """One forward, as it is for answering."""
    rival.model.eval()
    with rival.running():
        rival.model(batch["input_ids"], batch["attention_mask"])


def state_bytes(rival: Trained) -> dict[str, int]:
    """Weights, gradients and Adam's moments after a step: of the whole model, and of the pruned layers alone."""
    tables = {"all": 0, "pruned": 0}
    state = rival.optimizer.state
    own = {id(p) for layer in methods.layers(rival.model).values() for p in layer.parameters() if p.dim() > 1}
    for parameter in rival.model.parameters():
        moments = [t for t in state[parameter].values() if isinstance(t, Tensor)]
        size = 2 * parameter.nbytes + sum(t.nbytes for t in moments)  # the gradient is as large as the weight
        tables["all"] += size
        tables["pruned"] += size if id(parameter) in own else 0
    indices = sum(t.nbytes for name, t in rival.model.named_buffers() if name.endswith(".index"))
    return {key: size + indices for key, size in tables.items()}


def peak(settings: Settings, job: Job, masks: Masks, dtype: str, folder: Path) -> int:
    """The peak of training steps in a process of its own, in bytes.

    Raises:
        RuntimeError: the process failed; the message has its last words.
    """
    file = folder / "peak.pt"
    torch.save(masks, file)
    given = {
        "settings": dataclasses.asdict(settings), "job": dataclasses.astuple(job), "dtype": dtype, "masks": str(file),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    # What is freed goes back to the system at once, or the heap's holes would count as memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    assert __package__
    root = str(Path(__file__).resolve().parents[__package__.count(".") + 1])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.times", json.dumps(given)],
        capture_output=True,
        text=True,
        env=environment,
    )
    file.unlink()
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {job.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_here(settings: Settings, job: Job, masks: Masks, dtype: str) -> int:
    """The same in this process, which should have done nothing else."""
    batch = random_batch(settings, settings.batch)
    before = demo_measure._status("VmRSS") if demo_measure._reset_peak() else demo_measure._peak()
    model = variants.load(settings.demo(job.seed), settings.classes)[1]
    rival = Trained(model, settings, job, masks, through="ticket", dtype=dtype, fused=True)
    del model
    gc.collect()
    precise = demo_measure._reset_peak()
    for index in range(PEAK_STEPS):
        rival.step(batch, index, settings.steps)
    return (demo_measure._status("VmHWM") if precise else demo_measure._peak()) - before


def answer(argument: str) -> int:
    """What the other process does with its argument."""
    given = json.loads(argument)
    torch.set_num_threads(given["threads"])
    return peak_here(Settings(**given["settings"]), Job(*given["job"]), torch.load(given["masks"]), given["dtype"])


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1])))
