"""Settings, models, batches and calls that a pre-training refuses: the message says what was expected."""

from __future__ import annotations

import math

import pytest
import torch

from tests.multimask_models import assert_same, bert, everything, images, trainer, vit


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
        (lambda: torch.nn.Linear(2, 2), "Linear without a module 'embeddings'"),
        (lambda: bert().bfloat16(), "parameters of torch.bfloat16, expected float32"),
        (lambda: bert(is_decoder=True), "configured as a decoder"),
        (lambda: bert(kind="Electra", embedding_size=16), "16 wide and projected to 32"),
        (lambda: bert(kind="MPNet"), "layers of MPNetModel take position_bias, expected positions that are in the emb"),
        (lambda: bert(kind="RoFormer"), "layers of RoFormerModel take sinusoidal_pos"),
    ],
)
def test_models_that_are_not_understood(model, match):
    with pytest.raises(ValueError, match=match):
        trainer(model())


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


def test_embeddings_that_mask_by_themselves():
    with pytest.raises(ValueError, match=r"ViTMAEEmbeddings returns a tuple, expected .* \[B, T, D\]"):
        trainer(vit(kind="ViTMAE")).step(images(2))


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
