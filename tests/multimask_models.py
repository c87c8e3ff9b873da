"""Small encoders of Hugging Face for the tests of pre-training."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from pyeff.recipes import multimask  # noqa: E402

WIDTH = 32
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48}


def bert(*, dropout=0.0, seed=0, kind="Bert", **options):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, max_position_embeddings=40, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        **{**SIZES, **options},
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config)


def vit(*, dropout=0.0, seed=0, kind="ViT", **options):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        image_size=24, patch_size=4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        **{**SIZES, **options},
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config)


def trainer(model, **options):
    """A pre-trainer in which everything changes visibly within a few steps."""
    small = {
        "masks": 3, "decoder_layers": 2, "decoder_kernel": 3, "batch_size": 4, "steps": 10, "warmup": 2,
        "ema_decay": 0.5, "ema_end": 0.9, "ema_steps": 5, "lr": 1e-2,
    }  # fmt: skip
    return multimask.Pretrainer(model, **{**small, **options})


def texts(count=11, seed=1, shortest=1):
    """Token numbers of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, 60, (n,), generator=generator) for n in lengths]


def images(count=11, seed=1):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def everything(of):
    """All numbers of a pre-trainer, by name."""
    found = {}
    for name, module in (("encoder", of.encoder), ("teacher", of.teacher), ("decoder", of.decoder)):
        found |= {f"{name}.{key}": t.detach().clone() for key, t in module.state_dict().items()}
    for i, state in of.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": torch.as_tensor(t).clone() for key, t in state.items()}
    return found | {"steps": torch.tensor(of.steps_done), "samples": torch.tensor(of.samples_done)}


def assert_same(left, right):
    """Bit by bit."""
    assert left.keys() == right.keys()
    for name, t in left.items():
        assert torch.equal(t, right[name]), name


def assert_close(left, right, tolerance=1e-12):
    assert left.keys() == right.keys()
    for name, t in left.items():
        torch.testing.assert_close(t, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
