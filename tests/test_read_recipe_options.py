"""Several tasks over one pass of the backbone, padding left out, and attaching from a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyeff.recipes import read

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return (
            transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).double().eval()
        )
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        return transformers.LlamaForCausalLM(config).double().eval()
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).double().eval()


def inputs(kind, left=False):
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    mask = mask.flip(1) if left else mask
    kwargs = {"input_ids": torch.randint(3, 60, (3, 7)), "attention_mask": mask}
    if kind == "bart":
        kwargs |= {"decoder_input_ids": torch.randint(3, 60, (3, 4)), "decoder_attention_mask": mask[:, :4]}
    return kwargs


def randomise(attachment, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def gradients(attachment, loss):
    for p in attachment.parameters():
        p.grad = None
    loss().backward()
    return [p.grad.clone() for p in attachment.parameters()]


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_packing_changes_nothing_but_padding(kind):
    model, kwargs = build(kind), inputs(kind)
    with torch.no_grad():
        own = model(**kwargs).logits
    keep = (kwargs["attention_mask"] if kind == "llama" else kwargs.get("decoder_attention_mask", torch.ones(3))).bool()

    def run(pack):
        torch.manual_seed(5)
        with read.attach(model, 8, pack=pack) as attachment:
            randomise(attachment)
            rows = []
            attachment.adapter.register_forward_hook(lambda m, args, out: rows.append(out.numel() // out.shape[-1]))
            trained = model(**kwargs).logits
            grads = gradients(attachment, lambda: (model(**kwargs).logits[keep]).square().sum())
            with torch.no_grad():
                streamed = model(**kwargs).logits
        return trained.detach(), streamed, grads, rows[0]

    plain, packed = run(False), run(True)
    for i in range(2):
        torch.testing.assert_close(packed[i][keep], plain[i][keep], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(packed[i][~keep], own[~keep], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed[2], plain[2], rtol=1e-12, atol=1e-12)
    tokens = {"bert": 14, "llama": 14, "bart": 10}
    assert packed[3] == tokens[kind] < plain[3]


def test_packing_by_the_mask_of_the_layers_owner():
    model, kwargs = build("llama"), inputs("llama")
    attachment = read.attach(model, 8, pack=True)
    randomise(attachment)
    rows = []
    attachment.adapter.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    model.model(**kwargs)
    assert rows == [14]


def test_packed_generation_with_left_padding():
    model, kwargs = build("llama"), inputs("llama", left=True)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for pack in (False, True):
        torch.manual_seed(5)
        with read.attach(model, 8, pack=pack) as attachment:
            randomise(attachment)
            outputs.append(model.generate(**kwargs, **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    # generate rounds logits to float32: numbers that differ by less may round to neighbours.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), rtol=eps, atol=1e-12)


def test_packing_needs_a_model():
    with pytest.raises(ValueError, match="pack is True with a list"):
        read.attach([nn.Linear(16, 16)], pack=True)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_tasks_share_one_pass(kind, tmp_path):
    model, kwargs = build(kind), inputs(kind)
    alone = {}
    for seed, task in enumerate(("news", "mail")):
        with read.attach(model, 8) as attachment:
            randomise(attachment, seed)
            attachment.save(tmp_path / f"{task}.safetensors")
            alone[task] = model(**kwargs).logits.detach()
    calls = []
    attachment = read.attach(model, 8, tasks=("news", "mail"))
    for task in alone:
        attachment.load(tmp_path / f"{task}.safetensors", task=task)
    base = model.bert if kind == "bert" else model.model
    layer = (base.encoder.layer if kind == "bert" else base.layers)[0]
    layer.register_forward_hook(lambda m, args, out: calls.append(1))
    trained = model(**kwargs).logits
    assert calls == [1]
    with torch.no_grad():
        streamed = model(**kwargs).logits
    for got in (trained, streamed):
        torch.testing.assert_close(got, torch.cat([alone["news"], alone["mail"]]), rtol=1e-12, atol=1e-12)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.parameters())
    attachment.tasks = "mail"
    assert attachment.adapter is attachment.adapters["mail"]
    torch.testing.assert_close(model(**kwargs).logits, alone["mail"], rtol=1e-12, atol=1e-12)
    attachment.tasks = ("mail", "news")
    swapped = model(**kwargs).logits
    torch.testing.assert_close(swapped, torch.cat([alone["mail"], alone["news"]]), rtol=1e-12, atol=1e-12)
    attachment.save(tmp_path / "both.safetensors")
    attachment.save(tmp_path / "one.safetensors", task="news")
    attachment.detach()
    with read.from_file(model, tmp_path / "one.safetensors"):
        torch.testing.assert_close(model(**kwargs).logits, alone["news"], rtol=1e-12, atol=1e-12)
    with read.from_file(model, tmp_path / "both.safetensors") as attachment:
        assert attachment.tasks == ("news", "mail")
        torch.testing.assert_close(model(**kwargs).logits[3:], alone["mail"], rtol=1e-12, atol=1e-12)


def test_bad_tasks(tmp_path):
    for tasks, message in [((), "one or more"), (("a", "a"), "different"), (("a b",), "identifiers")]:
        with pytest.raises(ValueError, match=message):
            read.attach(build("bert"), tasks=tasks)
    with pytest.raises(ValueError, match="with an encoder-decoder"):
        read.attach(build("bart"), tasks=("a",))
    attachment = read.attach(build("bert"), 8, tasks=("a", "b"))
    for names in ((), ("c",), ("a", "a")):
        with pytest.raises(ValueError, match=r"expected one or more of \('a', 'b'\)"):
            attachment.tasks = names
    with pytest.raises(ValueError, match="task is 'c'"):
        attachment.save(tmp_path / "x.safetensors", task="c")


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_from_file(kind, tmp_path):
    model, kwargs = build(kind), inputs(kind)
    options = {"rank": 8, "cell": "rnn", "norm": "layer", "reduce": "last", "scale": 0.5, "embed_state": True}
    layers = {"encoder": [0], "decoder": [1, 2]} if kind == "bart" else [0, 2]
    with read.attach(model, **options, layers=layers, joiner="ffn" if kind == "bart" else "auto") as attachment:
        randomise(attachment)
        expected = model(**kwargs).logits
        attachment.save(tmp_path / "a.safetensors")
    with read.from_file(model, tmp_path / "a.safetensors") as again:
        assert again.config == attachment.config
        assert torch.equal(model(**kwargs).logits, expected)
    before = [p.requires_grad for p in model.parameters()]
    other = transformers.BertModel(transformers.BertConfig(**SIZES | {"hidden_size": 16}))
    with pytest.raises(ValueError, match="does not fit" if kind == "bert" else "cannot be attached: joiner is"):
        read.from_file(other, tmp_path / "a.safetensors")
    assert not any(hasattr(m, "read_adapter") for m in other.modules())
    assert all(p.requires_grad for p in other.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
