"""A pruned model under DistributedDataParallel and FSDP2, two processes with gloo on this machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyeff.recipes import ticket
from tests.ticket_models import classifier

pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)


def build():
    model = classifier("bert").double().train()
    ticket.prune(model, density=0.5, block=8)
    ticket.fuse_qkv(model)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(3, 60, (4, 7), generator=generator), torch.tensor([0, 1, 2, 0])


def step(model, ids, labels, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    model, ids, labels = build()
    step(torch.nn.parallel.DistributedDataParallel(model), ids[half], labels[half])
    torch.save({name: p.detach() for name, p in model.named_parameters()}, f"{folder}/ddp{rank}.pt")

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model, ids, labels = build()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, ids[half], labels[half])
    values = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save(values, f"{folder}/fsdp2{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # Both in one go: to start the processes takes most of the time.
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    model, ids, labels = build()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, ids, labels)
    for how in ("ddp0", "ddp1", "fsdp20", "fsdp21"):
        got = torch.load(tmp_path / f"{how}.pt")
        assert got.keys() == start.keys(), how
        for name, p in model.named_parameters():
            assert not torch.equal(p, start[name]), name
            # Adam divides by the root of a square: what rounding does to a tiny gradient shows in the step.
            torch.testing.assert_close(got[name], p.detach(), rtol=1e-6, atol=1e-8)
