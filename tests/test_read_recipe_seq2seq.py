"""pyeff.recipes.read.attach on encoder-decoders: two recurrences, and the joiner between them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from pyeff.recipes import read
from pyeff.recipes._cross import attention_probabilities
from tests.helpers import error, rounding

transformers = pytest.importorskip("transformers")


def build(kind, implementation="sdpa"):
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        if not transformers.T5ForConditionalGeneration._supports_sdpa:  # before transformers 5
            implementation = "eager"
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=implementation)
        names = ("encoder", "decoder", "block")
    else:
        config = transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0,
            forced_eos_token_id=None,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation=implementation)
        names = ("model.encoder", "model.decoder", "layers")
    # Attention that differs between tokens, or every probability is 1/S.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ttention" in name or "attn" in name:
                p.mul_(6)
    # In float64, so that the kernels of both attention implementations round alike.
    return model.eval().double(), *names


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    return {"input_ids": ids[:, :7], "attention_mask": mask, "decoder_input_ids": ids[:, 7:]}


def randomise(attachment, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def by_hand(model, encoder, decoder, layers, attachment, kwargs):
    """The corrected decoder states, from the eager model's own cross-attentions."""
    seen = {}
    stacks = {
        stack: [f"{stack}.{layers}.{i}" for i in range(len(model.get_submodule(f"{stack}.{layers}")))]
        for stack in (encoder, decoder)
    }
    paths = [*stacks, *stacks[encoder], *stacks[decoder]]
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.update({path: first(o)}))
        for path in paths
    ]
    with torch.no_grad():
        crosses = model(**kwargs, output_attentions=True).cross_attentions
    for handle in handles:
        handle.remove()
    phi = [seen[path] for path in stacks[decoder]]
    adapters, joiner = attachment.adapters, attachment.joiner
    if joiner is not None:
        e = adapters["encoder"]([seen[path] for path in stacks[encoder]])
        aggregated = [cross.mean(1) @ e for cross in crosses]
        if attachment.config["joiner"] == "cross":
            phi = [p + a @ joiner.projection.weight.T for p, a in zip(phi, aggregated, strict=True)]
        else:
            phi = [
                p + joiner.outer(torch.nn.functional.gelu(joiner.inner(torch.cat([p, a], -1))))
                for p, a in zip(phi, aggregated, strict=True)
            ]
    return seen[encoder], seen[decoder] + adapters["decoder"](phi)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("joiner", ["cross", "ffn", None])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_joiner(kind, joiner, implementation):
    model, *names = build(kind, implementation)
    kwargs = inputs()
    with torch.no_grad():
        own = model(**kwargs)
    eager = build(kind, "eager")[0]
    chosen = model.config._attn_implementation

    attachment = read.attach(model, 8, joiner=joiner)
    assert set(attachment.adapters) == ({"encoder", "decoder"} if joiner else {"decoder"})
    with torch.no_grad():
        assert torch.equal(model(**kwargs).logits, own.logits)
    randomise(attachment)
    states, expected = by_hand(eager, *names, attachment, kwargs)
    got = []
    handle = model.get_submodule(names[1]).register_forward_hook(lambda m, i, o: got.append(first(o)))
    output = model(**kwargs)
    with torch.no_grad():
        model(**kwargs)
    handle.remove()
    for states_out in got:
        torch.testing.assert_close(states_out, expected, rtol=1e-12, atol=1e-12)
    # What the decoder attends to is the backbone's own.
    torch.testing.assert_close(output.encoder_last_hidden_state, states, rtol=1e-12, atol=1e-12)
    output.logits.square().mean().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in attachment.parameters()}
    assert all(p.grad.abs().sum() > 0 for p in attachment.parameters())

    attachment.detach()
    with torch.no_grad():
        assert torch.equal(model(**kwargs).logits, own.logits)
    assert not any(hasattr(m, "_read_capture") for m in model.modules())
    assert all(m.config._attn_implementation == chosen for m in model.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_zero_start_learns(kind):
    model, *_ = build(kind)
    attachment = read.attach(model, 8)
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(**inputs()).logits.square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in attachment.parameters())


@pytest.mark.parametrize("joiner", ["cross", "ffn", None])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generation(kind, joiner):
    model, *_ = build(kind)
    randomise(read.attach(model, 8, joiner=joiner))
    encode = {key: inputs()[key] for key in ("input_ids", "attention_mask")}
    calls = []
    model.get_encoder().register_forward_hook(lambda m, i, o: calls.append(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**encode, **options, output_logits=True)
    assert len(calls) == 1
    with torch.no_grad():
        full = model(**encode, decoder_input_ids=out.sequences[:, :-1]).logits
        # generate rounds logits to float32: numbers that differ by less may round to neighbours.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(torch.stack(out.logits, 1), full.float(), rtol=eps, atol=1e-12)
        beams = model.generate(**encode, **options, num_beams=3, output_scores=True)
        scores = model(**encode, decoder_input_ids=beams.sequences[:, :-1]).logits.log_softmax(-1)
    # A beam's score is the mean log-probability of its tokens, by the same corrected model.
    expected = scores.gather(-1, beams.sequences[:, 1:, None])[..., 0].mean(-1)
    # In float32 from there on: the log-softmax sums the vocabulary, the score sums the tokens.
    allowed = rounding(torch.float32, scores.shape[-1] + scores.shape[1], scores.abs().max().item())
    assert error(beams.sequences_scores, expected) <= allowed


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_checkpointing_and_copies(kind):
    model, *_ = build(kind)
    model.train()
    attachment = read.attach(model, 8)
    randomise(attachment)
    kwargs = inputs()

    def gradients():
        for p in attachment.parameters():
            p.grad = None
        model(**kwargs).logits.square().mean().backward()
        return [p.grad.clone() for p in attachment.parameters()]

    expected = gradients()
    for reentrant in (False, True):
        # transformers 5 has new names for these.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    twin, own = copy.deepcopy(model), model(**kwargs).logits
    for p in attachment.parameters():
        p.data.zero_()
    assert torch.equal(twin(**kwargs).logits, own)
    assert not torch.equal(model(**kwargs).logits, own)


def test_encoder_outputs_given():
    model, *_ = build("t5")
    randomise(read.attach(model, 8))
    kwargs = inputs()
    whole = model(**kwargs).logits
    encoded = model.get_encoder()(input_ids=kwargs["input_ids"], attention_mask=kwargs["attention_mask"])
    kwargs.pop("input_ids")
    torch.testing.assert_close(model(**kwargs, encoder_outputs=encoded).logits, whole)
    with pytest.raises(RuntimeError, match="correction is not known"):
        model(**kwargs, encoder_outputs=(encoded.last_hidden_state + 1,))
    assert model(**kwargs, encoder_outputs=encoded).logits.shape == whole.shape


def alive(refs):
    gc.collect()
    return [i for i, ref in enumerate(refs) if ref() is not None]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_nothing_of_a_call_is_kept(kind):
    model, *_ = build(kind)
    attachment = read.attach(model, 8)
    randomise(attachment)
    refs = []

    def watch(module, args, output):
        refs.append(weakref.ref(first(output)))

    model.get_encoder().register_forward_hook(watch)
    attachment.adapters["encoder"].register_forward_hook(watch)
    model(**inputs()).logits.square().mean().backward()
    assert len(refs) == 2
    assert not alive(refs)
    model(**inputs())  # without a backward, which frees what it used
    with torch.no_grad():
        model(**inputs())
    assert not alive(refs)
    encode = {key: inputs()[key] for key in ("input_ids", "attention_mask")}
    for beams in (1, 3):
        model.generate(**encode, max_new_tokens=3, do_sample=False, num_beams=beams)
    assert not alive(refs)
    with torch.no_grad():
        output = model(**inputs())
        again = inputs()
        again.pop("input_ids")
        # What the caller keeps can be decoded again.
        repeated = model(**again, encoder_outputs=(output.encoder_last_hidden_state,)).logits
    torch.testing.assert_close(repeated, output.logits)
    del output, repeated
    assert not alive(refs)


def test_autocast():
    model = build("bart")[0].float()
    attachment = read.attach(model, 8)
    randomise(attachment)
    exact = model(**inputs()).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs()).logits
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters())
    assert (got - exact).abs().max() < 32 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_layers_of_each_half_and_round_trip(tmp_path):
    model, *_ = build("bart")
    attachment = read.attach(model, 8, layers={"encoder": [1], "decoder": [0, 2]})
    assert attachment.config["stacks"]["encoder"]["layers"] == [1]
    randomise(attachment)
    out = model(**inputs()).logits
    attachment.save(tmp_path / "a.safetensors")
    attachment.detach()
    again = read.attach(model, 8, layers={"encoder": [1], "decoder": [0, 2]}).load(tmp_path / "a.safetensors")
    assert torch.equal(model(**inputs()).logits, out)
    again.detach()
    with pytest.raises(ValueError, match="joiner is 'cross' in the file, expected 'ffn'"):
        read.attach(model, 8, layers={"encoder": [1], "decoder": [0, 2]}, joiner="ffn").load(tmp_path / "a.safetensors")


def test_layers_of_a_stack_that_is_not_there():
    model, *_ = build("bart")
    for layers, joiner, known in [
        ({"encodr": [0], "decoder": [0]}, "cross", "'encoder' and 'decoder'"),
        ({"encoder": [0]}, None, "'decoder'"),
    ]:
        with pytest.raises(ValueError, match=rf"layers has the keys \[.*\], expected {known} at most"):
            read.attach(model, 8, layers=layers, joiner=joiner)
    assert not any(hasattr(m, "read_adapter") for m in model.modules())


def test_no_cross_attention_to_be_found():
    model, *_ = build("bart")
    assert read.attach(copy.deepcopy(model), 8).config["joiner"] == "cross"
    with pytest.raises(ValueError, match="cross_attention is 'x', expected None without a joiner"):
        read.attach(model, 8, joiner=None, cross_attention="x")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="no cross-attention in decoder layer 0"):
        read.attach(model, 8, cross_attention="nothing")
    assert not any(hasattr(m, "_read_capture") or hasattr(m, "read_adapter") for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("kind", ["bool", "additive", "padding"])
def test_attention_probabilities(kind):
    q, k = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    mask = {
        "bool": keep[:, None, None, :],
        "additive": torch.zeros(2, 1, 1, 5, dtype=torch.float64).masked_fill(~keep[:, None, None, :], float("-inf")),
        "padding": keep.long(),
    }[kind]
    value = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    # Attention over the identity returns the probabilities.
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, value, attn_mask=keep[:, None, None, :], enable_gqa=True
    ).mean(1)
    torch.testing.assert_close(attention_probabilities(q, k, mask), expected)
