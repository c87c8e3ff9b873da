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


KINDS = ("distilbert", "electra", "albert", "mpnet", "bart", "opt", "vit", "t5", "llama")
_NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def build(kind):
    """A tiny model of another kind in evaluation mode, and named arguments for it."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes, ids = {name: SIZES[name] for name in _NAMES}, inputs()["input_ids"]
    image = {name: size for name, size in sizes.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
    halves = {f"{half}_{name}": size for half in ("encoder", "decoder")
              for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    model = {
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        ),
        "electra": lambda: t.ElectraModel(t.ElectraConfig(**sizes, embedding_size=16)),
        "albert": lambda: t.AlbertModel(t.AlbertConfig(**sizes, embedding_size=16, hidden_act="gelu")),
        "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**sizes)),
        "bart": lambda: t.BartModel(t.BartConfig(vocab_size=64, d_model=32, **halves)),
        "opt": lambda: t.OPTModel(
            t.OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                        word_embed_proj_dim=32)
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(**image)),
        "t5": lambda: t.T5Model(t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        "llama": lambda: t.LlamaModel(t.LlamaConfig(**sizes, num_key_value_heads=2)),
    }[kind]()  # fmt: skip
    if kind == "vit":
        return model.eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model.eval(), {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
