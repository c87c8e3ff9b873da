"""Pre-training of text and image encoders: what a step is, what it does not depend on, data, precision, presets."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from pyeff.recipes import _multimask_data, _multimask_models, _multimask_settings
from tests.multimask_models import (
    WIDTH,
    assert_close,
    assert_same,
    bert,
    everything,
    images,
    multimask,
    texts,
    trainer,
    vit,
)  # fmt: skip

ATOM = 1e-9


def by_hand(of, samples):
    """The loss of a step by the definition, one student at a time, each seeing nothing but what it keeps.

    No batch, no padding, no repeated sample; returns the loss for each hidden token.
    """
    s, image = of.settings, of.settings.modality == "image"
    shape = (6, 6) if image else None
    seed = (_multimask_settings.key(s.seed, "masks and noise") + of.steps_done) % 2**63
    taken, modules = [], []
    for layer in list(_multimask_models.find_parts(of.teacher).stack.layers)[-s.top_k_layers :]:
        modules.append(layer.mlp if image else layer.output.dense)
    total, count, cls_total, rows = 0.0, 0, 0.0, 0
    stack, decoder, prefix = of.parts.stack, of.decoder, int(image)
    for i, sample in enumerate(samples):
        taken.clear()
        hooks = [m.register_forward_hook(lambda m, a, out: taken.append(out[:, prefix:])) for m in modules]
        with torch.no_grad():
            of.teacher(sample[None])
        [hook.remove() for hook in hooks]
        target = pyeff.reference.multimask_targets(taken, norm=s.norm, post_norm=s.post_norm)
        tokens = target.shape[1]
        ids = torch.tensor([of.samples_done + i])
        plan = pyeff.reference.block_mask(
            1, s.masks, shape or (tokens,), keep=s.keep, adjust=s.adjust, length=s.length, inverse=s.inverse,
            seed=seed, sample_ids=ids,
        )  # fmt: skip
        embedded = of.encoder.embeddings(sample[None])
        for m in range(s.masks):
            kept = plan.ids_keep[m, : plan.keep_len[m]].long()
            seen = torch.cat([torch.arange(prefix), kept + prefix])
            encoded = embedded[:, :0] if len(seen) == 0 else stack(embedded[:, seen])
            # Of noise alone: the scatter of nothing.
            nothing = pyeff.MaskPlan.from_mask(torch.ones(1, s.masks, tokens, dtype=torch.bool))
            noise = pyeff.reference.multimask_scatter(
                torch.zeros(s.masks, 1, WIDTH, dtype=target.dtype), nothing, noise_std=s.noise_std, seed=seed,
                sample_ids=ids,
            )[m : m + 1]  # fmt: skip
            if s.positions:
                table = of.encoder.embeddings.position_embeddings
                noise = noise + (table[:, 1:] if image else table.weight[:tokens])
            full = noise.clone()
            full[:, kept] = encoded[:, prefix:]
            hidden = torch.ones(tokens, dtype=torch.bool)
            hidden[kept] = False
            each = (decoder(full) - target)[:, hidden].square()
            total, count = total + each.sum() * s.scale, count + int(hidden.sum())
            if s.cls_loss:
                cls_total = cls_total + (encoded[:, 0] - target.mean(1)).square().sum() * s.scale
            rows += 1
    return total / count + (s.cls_loss * cls_total / rows if s.cls_loss else 0.0)


STEPS = {
    "text": (bert, texts, {}),
    "text in parts": (bert, texts, {"accumulate": 3, "positions": True}),
    "blocks of text": (bert, texts, {"preset": "audio", "post_norm": "layer"}),
    "images": (vit, images, {"cls_loss": 0.5, "positions": True, "top_k_layers": 2}),
}  # fmt: skip


def batch_of(of, samples):
    return of._collate.items(samples)


@pytest.mark.parametrize("case", STEPS)
def test_step_is_the_definition(case):
    make, data, options = STEPS[case]
    samples = [t if t.dtype == torch.int64 else t.double() for t in data(7)]
    of = trainer(make().double(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), clip=0, warmup=0, **options)
    of.step(batch_of(of, samples))
    before = everything(of)
    expected = by_hand(of, samples)
    named = {**dict(of.encoder.named_parameters()), **{f"d.{k}": p for k, p in of.decoder.named_parameters()}}
    grads = dict(zip(named, torch.autograd.grad(expected, named.values(), allow_unused=True), strict=True))
    rate = 0.1 * of.settings.rate(1)
    loss = of.step(batch_of(of, samples))
    torch.testing.assert_close(loss, expected.detach(), rtol=ATOM, atol=ATOM)
    moved = 0
    for name, p in of.encoder.named_parameters():
        old = before[f"encoder.{name}"]
        grad = torch.zeros_like(old) if grads[name] is None else grads[name]
        torch.testing.assert_close(p.detach(), old - rate * grad, rtol=ATOM, atol=ATOM, msg=name)
        decay = of.settings.decay(2)
        averaged = decay * before[f"teacher.{name}"] + (1 - decay) * p.detach()
        torch.testing.assert_close(dict(of.teacher.named_parameters())[name], averaged, rtol=ATOM, atol=ATOM)
        moved += bool(grad.abs().max() > 0)
    assert moved > 0.9 * len([n for n in grads if "pooler" not in n and not n.startswith("d.")])
    for name, p in of.decoder.named_parameters():
        torch.testing.assert_close(
            p.detach(), before[f"decoder.{name}"] - rate * grads[f"d.{name}"], rtol=ATOM, atol=ATOM
        )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_place_in_the_batch_do_not_matter(attention):
    samples = texts(6)
    one, other = (trainer(bert().double()) for _ in range(2))
    for of in (one, other):
        of.model.set_attn_implementation(attention)
        of.teacher.set_attn_implementation(attention)
    batch = {**batch_of(one, samples), "sample_ids": torch.arange(6) + 100}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {name: t[order] for name, t in batch.items()}
    for name in ("input_ids", "attention_mask"):
        moved[name] = torch.nn.functional.pad(moved[name], (0, 5))
    torch.testing.assert_close(one.step(batch), other.step(moved), rtol=ATOM, atol=ATOM)
    assert_close(everything(one), everything(other), 1e-7)


def test_clipping_limits_the_norm_and_parts_change_nothing():
    whole, parts = (trainer(bert().double(), accumulate=n, clip=0.01) for n in (1, 4))
    data = texts()
    records = [of.fit(data, 3, progress=False)[-1] for of in (whole, parts)]
    assert records[0]["grad_norm"] == pytest.approx(records[1]["grad_norm"], rel=1e-9)
    assert_close(everything(whole), everything(parts), 1e-7)
    norm = torch.stack([p.grad.norm() for p in whole._parameters]).norm()
    assert norm <= 0.01 < records[0]["grad_norm"]


def test_counts_on_the_device_are_put_right_in_the_gradients(monkeypatch):
    """As in several processes, where nobody knows the number of hidden tokens before the step is over."""
    known, unknown = (trainer(bert().double()) for _ in range(2))
    monkeypatch.setattr(unknown._engine, "divisor", lambda batch: (977.0, False))
    for of in (known, unknown):
        of.fit(texts(), 2, progress=False)
    assert_close(everything(known), everything(unknown), 1e-7)


def test_samples_come_in_an_order_that_the_seed_decides():
    order = _multimask_data.Order(7, seed=3)
    for epoch in range(3):
        assert sorted(order.at(7 * epoch + i) for i in range(7)) == list(range(7))
    again, other = _multimask_data.Order(7, seed=3), _multimask_data.Order(7, seed=4)
    places = list(reversed(range(21)))
    assert [again.at(p) for p in places] == [order.at(p) for p in places] != [other.at(p) for p in places]
    whole = [p for step in _multimask_data.Places(order, 5, 2, 6, 0, 1) for p in step]
    halves = [list(_multimask_data.Places(order, 5, 2, 3, rank, 2)) for rank in range(2)]
    assert [p for step in zip(*halves, strict=True) for half in step for p in half] == whole
    assert [place for place, _ in whole] == list(range(5, 17))


class Words:
    """What of a tokenizer is used."""

    def __call__(self, texts, padding, padding_side, return_tensors, truncation=False, max_length=None):
        rows = [[3 + ord(c) % 50 for c in text][:max_length] for text in texts]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


def test_texts_mappings_and_batches_are_the_same_samples():
    words = ["one", "seventeen", "a", "thirty-one"]
    tokens = [torch.tensor([3 + ord(c) % 50 for c in text][:8]) for text in words]
    found = []
    for data in (
        words, [(text, 1) for text in words], tokens, [{"input_ids": t.tolist()} for t in tokens],
    ):  # fmt: skip
        of = trainer(bert(), tokenizer=Words(), max_length=8)
        of.fit(data, 2, progress=False)
        found.append(everything(of))
    for other in found[1:]:
        assert_same(found[0], other)
    # Batches of the caller's are named in the order in which they come.
    one, other = (trainer(bert(), tokenizer=Words(), max_length=8) for _ in range(2))
    one.step(words)
    other.fit(iter([batch_of(one, tokens)]), 5, progress=False)
    assert other.steps_done == 1
    assert_same(everything(one), everything(other))


def test_places_and_segments_of_tokens_are_kept():
    """In a dataset as in a batch; an item without one of them is named."""
    items = [
        {"input_ids": ids, "position_ids": torch.arange(len(ids)) + 5, "token_type_ids": torch.ones_like(ids)}
        for ids in texts(4, shortest=5)
    ]
    items[1]["attention_mask"] = torch.arange(len(items[1]["input_ids"])) < 3
    one, other = trainer(bert().double()), trainer(bert().double())
    found = batch_of(one, items)
    assert found["attention_mask"].sum(1).tolist() == [
        len(items[0]["input_ids"]),
        3,
        *(len(i["input_ids"]) for i in items[2:]),
    ]
    for name, last in (("position_ids", 7), ("token_type_ids", 1)):
        assert found[name][1, :4].tolist() == [*items[1][name][:3], 0]
        assert found[name][1, 2] == last
    moved = {**found, "position_ids": (found["position_ids"] - 5).clamp(min=0)}
    assert one.step(found) != other.step(moved)
    del items[2]["position_ids"]
    with pytest.raises(
        ValueError, match=r"an item has the keys \['input_ids', 'token_type_ids'\], expected 'position_ids'"
    ):
        batch_of(one, items)


def test_integers_of_numpy():
    """As settings they are Python's, so that masks, order and files are the same."""
    numpy = pytest.importorskip("numpy")
    left, right = (
        trainer(bert(), seed=kind(7), masks=kind(2), steps=kind(40), warmup=None) for kind in (int, numpy.int64)
    )
    assert left.settings == right.settings
    assert all(type(value) is not numpy.int64 for value in right.settings.as_json().values())
    for of in (left, right):
        of.fit(texts(), 1, progress=False)
    assert_same(everything(left), everything(right))


def test_features_and_images_in_a_loader():
    features = [torch.randn(n, WIDTH) for n in (5, 9, 7, 4)]
    of = trainer(bert(), preset="audio")
    assert math.isfinite(of.fit([{"inputs_embeds": f} for f in features], 2, progress=False)[-1]["loss"])
    labelled = torch.utils.data.TensorDataset(images(), torch.zeros(11))
    left, right = trainer(vit()), trainer(vit())
    left.fit(labelled, 2, progress=False)
    right.fit(images(), 2, progress=False, workers=1)
    assert_same(everything(left), everything(right))
    loader = torch.utils.data.DataLoader(labelled, batch_size=4, drop_last=True)
    assert len(trainer(vit()).fit(loader, every=1, progress=False)) == 2


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"amp": "fp16"}, {"amp": "bf16", "teacher_dtype": "bf16"}])
@pytest.mark.parametrize("make", [bert, vit])
def test_lower_precision_stays_close(options, make):
    data = texts() if make is bert else images()
    exact, lower = trainer(make()), trainer(make(), **options)
    first, last = zip(*(of.fit(data, 8, every=1, progress=False)[::7] for of in (exact, lower)), strict=True)
    # Of the same parameters; later the scaler of float16 leaves out steps until it has found its factor.
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=16 * torch.finfo(torch.bfloat16).eps)
    assert last[1]["loss"] < 0.9 * first[1]["loss"]
    assert all(p.dtype == torch.float32 for p in lower.encoder.parameters())
    assert next(lower.teacher.parameters()).dtype == torch.float32


def test_it_learns_and_the_encoder_stays_what_it_was():
    model = bert()
    of = multimask.Pretrainer(
        model, masks=4, batch_size=8, decoder_layers=2, decoder_kernel=3, lr=3e-3, steps=40, warmup=4,
    )  # fmt: skip
    history = of.fit(texts(8, shortest=8), every=8, progress=False)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["target_spread"] > 0.3 < history[-1]["prediction_spread"]
    assert of.encoder is model
    assert type(of.teacher) is type(model)
    out = of.teacher(input_ids=torch.randint(3, 60, (2, 9))).last_hidden_state
    assert out.shape == (2, 9, WIDTH)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "kind"), [(bert, "Roberta"), (bert, "Electra"), (vit, "DeiT"), (vit, "Dinov2")]
)  # fmt: skip
def test_other_encoders(make, kind):
    extra = {"Roberta": {"pad_token_id": 1}, "Electra": {"embedding_size": WIDTH}}.get(kind, {})
    of = trainer(make(kind=kind, **extra), positions=kind != "Dinov2")
    history = of.fit(texts() if make is bert else images(), 2, every=1, progress=False)
    assert all(math.isfinite(r["loss"]) for r in history)


def test_a_model_with_a_head_and_parameters_that_nobody_uses():
    import transformers

    config = bert().config
    model = transformers.BertForMaskedLM(config)
    head = model.cls.predictions.transform.dense.weight.detach().clone()
    of = trainer(model)
    assert of.encoder is model.bert
    of.fit(texts(), 1, progress=False)
    assert torch.equal(model.cls.predictions.transform.dense.weight, head)
    masked = transformers.ViTModel(vit().config, use_mask_token=True)
    trainer(masked).fit(images(), 1, progress=False)
    assert not masked.embeddings.mask_token.any()


def test_compiled_is_the_same():
    plain, compiled = (trainer(vit().double(), compile=kind) for kind in (False, "eager"))
    for of in (plain, compiled):
        of.fit(images().double(), 2, progress=False)
    assert_close(everything(plain), everything(compiled), 1e-9)


def test_presets_are_the_papers():
    import transformers

    base = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 12}
    image = multimask.Pretrainer(transformers.ViTModel(transformers.ViTConfig(**base))).settings
    assert (image.masks, image.top_k_layers, image.norm, image.post_norm) == (16, 10, "instance", "layer")
    assert (int(196 * image.keep), image.adjust, image.length, image.inverse) == (39, 0.07, 3, True)
    assert image.scale == 48**-0.5
    assert [image.decay(t) for t in (0, 100_000, 200_000)] == pytest.approx([0.9998, 0.99999, 0.99999], abs=1e-15)
    text = _multimask_settings.resolve(None, {}, "text", 12, 768)
    assert (text.masks, text.top_k_layers, text.scale, int(512 * text.keep)) == (8, 12, 1.0, 266)
    assert text.decay(50_000) == pytest.approx((0.9999 + 0.99999) / 2)
    audio = _multimask_settings.resolve("audio", {}, "text", 12, 768)
    assert (audio.masks, audio.top_k_layers, audio.keep, audio.adjust, audio.length) == (8, 8, 0.5, 0.05, 5)
    assert (audio.decay(75_000), audio.scale, audio.post_norm) == (0.99999, 768**-0.5, "none")
    assert [text.rate(t) for t in (0, 4999, 5000, 100_000)] == pytest.approx([1 / 5000, 1.0, 1.0, 0.0])
