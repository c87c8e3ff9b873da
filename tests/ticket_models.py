"""Tiny models that the tests of the ticket recipe prune."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def mlp():
    """Two linear layers, of which edges cut blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 36))


def classifier(kind="bert"):
    """A tiny encoder of Hugging Face with a head, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).eval()
    config = transformers.RobertaConfig(**SIZES, num_labels=3, max_position_embeddings=32)
    return transformers.RobertaForSequenceClassification(config).eval()


def inputs():
    """Two texts of seven tokens, the second shorter."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask}


def build(kind):
    """A tiny model of another kind, and named arguments for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = inputs()["input_ids"]
    if kind == "gpt-like":
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = transformers.LlamaConfig(**{n: SIZES[n] for n in names}, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids}
    if kind == "t5":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        return transformers.T5ForConditionalGeneration(config).eval(), {"input_ids": ids, "decoder_input_ids": ids}
    config = transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=4
    )
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
