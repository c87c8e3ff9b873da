"""READ attached to a model under DistributedDataParallel and FSDP2, two processes with gloo on this machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyeff.recipes import read

transformers = pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)


def build():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double()
    attachment = read.attach(model, rank=8, train=("classifier",))
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    ids, labels = torch.randint(3, 60, (4, 7)), torch.tensor([0, 1, 2, 0])
    return model, attachment, ids, labels


def step(model, ids, labels, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def work(rank, folder, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, attachment, ids, labels = build()
    half = slice(2 * rank, 2 * rank + 2)
    if how == "ddp":
        step(torch.nn.parallel.DistributedDataParallel(model), ids[half], labels[half])
        values = {name: p.detach() for name, p in attachment.named_parameters()}
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        step(model, ids[half], labels[half])
        # Sharding replaces the parameters: the model's modules have the new ones.
        values = {name: p.full_tensor().detach() for name, p in attachment.named_parameters()}
    torch.save(values, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(how, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, args=(str(tmp_path), how), nprocs=2)
    model, attachment, ids, labels = build()
    start = {name: p.detach().clone() for name, p in attachment.named_parameters()}
    step(model, ids, labels)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == start.keys()
        for name, p in attachment.named_parameters():
            assert not torch.equal(p, start[name]), name
            torch.testing.assert_close(got[name], p.detach(), rtol=1e-12, atol=1e-12)
