"""Pre-training by two processes is that of one with both of their batches, in masks, noise, updates and records."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.multimask_models import assert_close, assert_same, bert, everything, images, texts, trainer, vit

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

STEPS = 3
CASES = {"text": (bert, texts, {"accumulate": 2}), "images": (vit, images, {"cls_loss": 0.5})}


def run(case, world, path=None):
    make, data, options = CASES[case]
    model = make().double()
    if world == 2 and dist.get_rank() == 1:  # the first process's parameters are everybody's
        for p in model.parameters():
            torch.nn.init.zeros_(p)
    items = [t if t.dtype == torch.int64 else t.double() for t in data()]
    of = trainer(model, batch_size=8 // world, **options)
    history = of.fit(items, STEPS, progress=False, path=path)
    found = everything(of)
    return {**found, **{f"metrics.{k}": torch.tensor(v) for k, v in history[-1].items() if "second" not in k}}


def work(rank, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        torch.save(run(case, 2, f"{folder}/{case}.safetensors"), f"{folder}/{case}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(work, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, folder):
    first, second = (torch.load(folder / f"{case}.{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert_close(first, run(case, 1), 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_what_two_processes_saved_one_resumes(case, folder):
    make, _, options = CASES[case]
    of = trainer(make(seed=3).double(), batch_size=8, **options).resume(folder / f"{case}.safetensors")
    saved = torch.load(folder / f"{case}.0.pt")
    assert_same(everything(of), {name: t for name, t in saved.items() if not name.startswith("metrics")})
