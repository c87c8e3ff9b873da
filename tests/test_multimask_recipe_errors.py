"""Settings, models, batches and calls that a pre-training refuses: the message says what was expected."""

from __future__ import annotations

import math

import pytest
import torch

from pyeff.recipes import _multimask_models, _multimask_parts
from tests.multimask_models import WIDTH, assert_same, bert, everything, images, trainer, vit


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "video"}, "preset is 'video', expected one of 'image', 'audio', 'text'"),
        ({"preset": "image"}, "preset is 'image', expected one for text"),
        ({"modality": "image"}, "modality is 'image', but the embeddings of BertModel take .*input_ids"),
        ({"masks": 0}, "masks is 0, expected an integer, at least 1"),
        ({"masks": 1.5}, "masks is 1.5"),
        ({"keep": 1.0}, "keep is 1.0, expected less than 1"),
        ({"keep": -0.5}, "keep is -0.5, expected a number from 0"),
        ({"top_k_layers": 4}, "top_k_layers is 4, expected an integer, 1 to 3, the layers"),
        ({"norm": "group"}, "norm is 'group', expected one of 'none', 'instance'"),
        ({"target": "qkv"}, "target is 'qkv', expected one of 'auto', 'ffn', 'layer'"),
        ({"loss": "l3"}, "loss is 'l3'"),
        ({"beta": 1.0}, "beta is 1.0 for loss 'l2'"),
        ({"cls_loss": 1.0}, "cls_loss is 1.0 for text"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5, expected a number from 0 to 1"),
        ({"ema_decay": 0.9, "ema_end": 0.5}, "ema_end is 0.5, expected at least ema_decay, 0.9"),
        ({"accumulate": 9}, "accumulate is 9, expected an integer, 1 to batch_size, 4"),
        ({"amp": "int8"}, "amp is 'int8', expected one of None, 'bf16', 'fp16'"),
        ({"lr": math.inf}, "lr is inf, expected a finite number"),
        ({"betas": (0.9,)}, "betas is"),
        ({"seed": True}, "seed is True, expected an integer, 64 bits"),
        ({"seed": 1.0}, "seed is 1.0, expected an integer, 64 bits"),
        ({"max_length": -1}, "max_length is -1, expected an integer, at least 1, or None"),
        ({"max_length": "8"}, "max_length is '8', expected an integer"),
        ({"max_length": 41}, "max_length is 41, expected at most 40: the model has so many positions"),
        ({"decoder_groups": 5}, "multiple of the 5 groups"),
        ({"optimizer": "adam"}, "optimizer is a str, expected a callable"),
        ({"warmup": 11}, "warmup is 11, expected an integer, 0 to steps, 10"),
    ],
)
def test_arguments_that_are_wrong(options, match):
    with pytest.raises(ValueError, match=match):
        trainer(bert(), **options)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: None, "model is a NoneType"),
        (lambda: torch.nn.Linear(2, 2), "Linear is without a module 'embeddings'; supported are BERT, RoBERTa"),
        (lambda: bert().bfloat16(), "parameters of torch.bfloat16, expected float32"),
        (lambda: bert(is_decoder=True), "configured as a decoder"),
        (lambda: bert(kind="Electra", embedding_size=16), "16 wide and projected to 32"),
        (lambda: bert(kind="MPNet"), r"MPNetModel \(model type 'mpnet'\) has layers that take position_bias, expected"),
        (lambda: bert(kind="RoFormer"), r"RoFormerModel \(model type 'roformer'\) has layers that take sinusoidal_pos"),
        (lambda: bert(kind="Esm", mask_token_id=4, pad_token_id=1), "'esm'.* has layers that take position_embeddings"),
        (lambda: bert(kind="BigBird", sep_token_id=3), "'big_bird'.* cannot be called by themselves .*block size"),
        (lambda: bert(kind="Longformer", attention_window=4), "'longformer'.* cannot be called by themselves"),
        (lambda: bert(kind="FNet"), "'fnet'.* cannot be called by themselves .*; supported are BERT, RoBERTa"),
        (lambda: bert(kind="Albert", embedding_size=WIDTH), "'albert'.* computes something else than its embeddings"),
        (lambda: bert(kind="Nystromformer"), "'nystromformer'.* has layers that know the order of tokens"),
        (lambda: bert(kind="MobileBert", embedding_size=WIDTH), "'mobilebert'.* gives targets of shapes"),
        (lambda: bert(kind="GPT2"), "'gpt2'.* is without a module 'embeddings'; supported are"),
        (lambda: vit(kind="CLIPVision"), r"'clip_vision_model'.* embeddings that give \[1, 37, 32\], expected"),
        (lambda: vit(kind="VideoMAE"), "'videomae'.* cannot be called by themselves .*bool_masked_pos"),
        (
            lambda: vit(kind="ViTMAE"),
            r"'vit_mae'.* \(ValueError: .*ViTMAEEmbeddings returns a tuple, expected .*\[B, T, D",
        ),
    ],
)
def test_models_that_are_not_understood(model, match):
    with pytest.raises(ValueError, match=match):
        trainer(model())


def test_a_model_is_as_it_was_after_it_was_looked_at():
    model = bert(dropout=0.1)
    model.embeddings.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    parts = _multimask_models.find_parts(model)
    _multimask_parts.check_parts(parts, "auto", torch.device("cpu"))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (3, "batch is a int, expected a mapping"),
        ({"labels": torch.ones(2)}, r"keys \['labels'\], expected 'input_ids' or 'inputs_embeds'"),
        (torch.ones(4, 5), "input_ids is torch.float32, expected integers"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"input_ids has shape \[4\], expected \[B, T\]"),
        (["text"], "expected a tokenizer="),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
            "attention_mask has gaps or padding on the left",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
            r"attention_mask has shape \[2, 4\], expected \[2, 3\]",
        ),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64), "sample_ids": torch.ones(3)}, r"sample_ids is \[3\]"),
        (torch.ones(1, 5, dtype=torch.int64), "batch has 1 samples, expected at least accumulate, 2"),
    ],
)
def test_batches_that_are_wrong(batch, match):
    of = trainer(bert(), accumulate=2)
    before = everything(of)
    with pytest.raises(ValueError, match=match):
        of.step(batch)
    assert_same(everything(of), before)


def test_images_and_calls_that_are_wrong(tmp_path):
    of = trainer(vit())
    with pytest.raises(ValueError, match=r"pixel_values has shape \[2, 3, 25, 24\], expected multiples of patches"):
        of.step(torch.ones(2, 3, 25, 24))
    with pytest.raises(ValueError, match="every is 0, expected an integer of at least 1"):
        of.fit(images(), 1, every=0)
    with pytest.raises(ValueError, match="save_every was given without a path"):
        of.fit(images(), 1, save_every=1)
    with pytest.raises(ValueError, match=r"there is no folder '.*missing', expected one to save to"):
        of.fit(images(), 1, progress=False, path=tmp_path / "missing" / "file")
    assert of.steps_done == 0
    # A text is a sequence too, of characters; a batch would be read as its keys.
    for data, kind in (("some text", "str"), ({"pixel_values": images()}, "dict")):
        with pytest.raises(ValueError, match=f"data is a {kind}, expected samples, or batches"):
            of.fit(data, 1)
    with pytest.raises(ValueError, match="data is a int"):
        of.fit(3, 1)
    with pytest.raises(ValueError, match="progress is 'loud'"):
        of.fit(images(), 1, progress="loud")
    with pytest.raises(ValueError, match=r"keys \['labels'\], expected 'input_ids' or 'inputs_embeds'"):
        trainer(bert()).fit([{"labels": 1}], 1, progress=False)
    for mask in ([0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]):
        item = {"input_ids": torch.arange(4) + 3, "attention_mask": torch.tensor(mask)}
        with pytest.raises(ValueError, match="attention_mask has gaps or padding on the left"):
            trainer(bert()).fit([item] * 4, 1, progress=False)
    item = {"input_ids": torch.arange(4) + 3, "position_ids": torch.arange(3)}
    with pytest.raises(ValueError, match=r"position_ids has shape \[3\], expected \[4\]"):
        trainer(bert()).fit([item] * 4, 1, progress=False)


def test_entries_that_embeddings_know_and_a_pretraining_does_not():
    """They would be left out, and the model trained on something else; labels are left out in peace."""
    of = trainer(bert(kind="Roberta", pad_token_id=1))
    ids = torch.arange(8).view(2, 4) + 3
    message = "has 'past_key_values_length', which the model's embeddings take and a pre-training does not"
    with pytest.raises(ValueError, match=f"batch {message}"):
        of.step({"input_ids": ids, "past_key_values_length": 3})
    with pytest.raises(ValueError, match=f"data: an item {message}"):
        of.fit([{"input_ids": row, "past_key_values_length": 3} for row in ids], 1, progress=False)
    assert of.steps_done == 0
    of.step({"input_ids": ids, "past_key_values_length": None, "labels": torch.ones(2)})
    masks = {"pixel_values": images(2), "bool_masked_pos": torch.ones(2, 36, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"batch has 'bool_masked_pos', .* expected 'pixel_values', 'sample_ids'"):
        trainer(vit()).step(masks)


def test_positions_of_its_own_are_not_for_position_ids():
    batch = {"input_ids": torch.randint(3, 60, (4, 9)), "position_ids": torch.arange(9).expand(4, 9) + 5}
    trainer(bert()).step(batch)
    with pytest.raises(ValueError, match="the batch has position_ids, expected none with positions=True"):
        trainer(bert(), positions=True).step(batch)
