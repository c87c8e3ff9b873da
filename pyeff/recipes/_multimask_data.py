"""Batches: in an order that a seed decides, whatever the number of processes, and as the students take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff.recipes._multimask_settings import key

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_KEPT = {"text": (*_TEXT, "sample_ids"), "image": ("pixel_values", "sample_ids")}
# One number for each token.
_BESIDE = ("token_type_ids", "position_ids")


class Order:
    """The order of samples: one permutation after another, each a function of (seed, epoch).

    Places count from 0 and never end; the epoch of a place is ``place // size``.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"data has {size} samples, expected at least 1")
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def at(self, place: int) -> int:
        """The index of the sample at a place."""
        epoch, within = divmod(place, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
            self._permutation = torch.randperm(self.size, generator=generator)
            self._epoch = epoch
        return int(self._permutation[within])


class Places(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """(place, index) of this process's samples, step after step; of a step, each process has a run of places."""

    def __init__(self, order: Order, start: int, steps: int, batch: int, rank: int, world: int) -> None:
        self.order, self.start, self.steps, self.batch, self.rank, self.world = order, start, steps, batch, rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = self.start + (step * self.world + self.rank) * self.batch
            yield [(place, self.order.at(place)) for place in range(first, first + self.batch)]


class _Numbered(torch.utils.data.Dataset):
    """A dataset of which the items come with the place that they were asked for."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, Any]:
        return at[0], self.data[at[1]]


class Collate:
    """Items of a dataset as one batch: texts tokenised, sequences padded on the right, images stacked.

    Of a mapping's entries those are taken that a pre-training knows. Others that the model's embeddings know
    (``known``, the names of their arguments) are refused, since without them it would be trained on something else;
    what they do not know either, such as labels, is left out.
    """

    def __init__(self, modality: str, tokenizer: Any, pad: int, limit: int | None, known: Collection[str] = ()) -> None:
        self.modality, self.tokenizer, self.pad, self.limit = modality, tokenizer, pad, limit
        self.refused = frozenset(known) - {*_KEPT[modality]}

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Tensor]:
        places = torch.tensor([place for place, _ in numbered], dtype=torch.int64)
        return {**self.items([item for _, item in numbered]), "sample_ids": places}

    def check(self, what: str, entries: Mapping[str, Any]) -> None:
        """Raises ValueError if an entry is one that the model would use and that would be left out."""
        if found := sorted(name for name in self.refused & entries.keys() if entries[name] is not None):
            raise ValueError(
                f"{what} has {found[0]!r}, which the model's embeddings take and a pre-training does not, expected "
                f"{', '.join(map(repr, _KEPT[self.modality]))} (and what no embeddings take, which is left out)"
            )

    def items(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of some items; of one that is a tuple or a list of tensors, the first counts."""
        first = items[0]
        if isinstance(first, (tuple, list)) and first and not isinstance(first[0], int):
            items = [item[0] for item in items]
            first = items[0]
        if isinstance(first, str):
            return self.texts(items)
        if not isinstance(first, Mapping):
            name = "pixel_values" if self.modality == "image" else "input_ids"
            items = [{name: item} for item in items]
        for item in items:
            self.check("data: an item", item)
        if self.modality == "image":
            return {"pixel_values": torch.stack([torch.as_tensor(_part(item, "pixel_values")) for item in items])}
        return self._padded(items)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise ValueError("data has texts, expected a tokenizer= for them, or input_ids")
        limit = {"truncation": True, "max_length": self.limit} if self.limit else {}
        return dict(self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt", **limit))

    def _padded(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        main = "input_ids" if "input_ids" in items[0] else "inputs_embeds"
        sequences = [torch.as_tensor(_part(item, main))[: self.limit] for item in items]
        # Padding of its own counts no more here than elsewhere.
        lengths = [len(sequence) for sequence in sequences]
        for i, item in enumerate(items):
            if item.get("attention_mask") is None:
                continue
            mask = torch.as_tensor(item["attention_mask"])[: self.limit]
            if mask.dim() != 1 or bool((mask[1:].ne(0) & mask[:-1].eq(0)).any()):
                raise ValueError(
                    "data: an item's attention_mask has gaps or padding on the left, expected padding on the right only"
                )
            lengths[i] = min(int(mask.ne(0).sum()), lengths[i])
        longest = max(max(lengths), 1)
        out = {main: sequences[0].new_full((len(items), longest, *sequences[0].shape[1:]), self._filler(main))}
        out["attention_mask"] = torch.zeros(len(items), longest, dtype=torch.int64)
        beside = [name for name in _BESIDE if any(item.get(name) is not None for item in items)]
        out |= {name: torch.zeros(len(items), longest, dtype=torch.int64) for name in beside}
        for i, (item, sequence, length) in enumerate(zip(items, sequences, lengths, strict=True)):
            out[main][i, :length] = sequence[:length]
            out["attention_mask"][i, :length] = 1
            for name in beside:
                given = torch.as_tensor(_part(item, name))
                if given.dim() != 1 or len(given) < length:
                    raise ValueError(
                        f"data: an item's {name} has shape {list(given.shape)}, expected [{len(sequence)}], one number "
                        f"for each of its {main}"
                    )
                out[name][i, :length] = given[:length]
        return out

    def _filler(self, name: str) -> int:
        return self.pad if name == "input_ids" else 0


def _part(item: Mapping[str, Any], name: str) -> Any:
    if item.get(name) is None:
        expected = "'input_ids' or 'inputs_embeds'" if name == "inputs_embeds" else repr(name)
        raise ValueError(f"data: an item has the keys {sorted(item)}, expected {expected}")
    return item[name]


def loader(
    data: Any, collate: Collate, places: Places, *, workers: int, pin: bool, seed: int
) -> Iterable[dict[str, Tensor]]:
    """The batches of a dataset at these places."""
    # Workers get seeds of their own; the caller's generator is not asked for them.
    generator = torch.Generator().manual_seed(key(seed, "workers", places.start))
    return torch.utils.data.DataLoader(
        _Numbered(data), batch_sampler=places, collate_fn=collate, num_workers=workers, pin_memory=pin,
        generator=generator, persistent_workers=False,
    )  # fmt: skip


def is_dataset(data: Any) -> bool:
    """Whether samples can be asked for by their index (a list, a Dataset), or only batches come one after another."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping)


@dataclasses.dataclass
class Batch:
    """One batch on the device.

    Attributes:
        inputs (dict): what the embeddings take.
        lengths (Tensor): [B] int32, tokens that are no padding, the class token left out.
        on_host (list of int, optional): the same where no device had to be waited for.
        ragged (bool): whether lengths may differ, so that attention has to be masked.
        sample_ids (Tensor): [B] int64.
        shape (tuple of int): (T,) or (H, W) of what is masked.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor
    on_host: list[int] | None
    ragged: bool
    sample_ids: Tensor
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.lengths.shape[0]

    def split(self, parts: int) -> list[Batch]:
        """The same samples in that many batches, as even as they can be."""
        if parts == 1:
            return [self]
        sizes = [len(chunk) for chunk in torch.arange(self.size).tensor_split(parts)]
        cut = {name: t.split(sizes) for name, t in self.inputs.items()}
        out, at = [], 0
        for i, size in enumerate(sizes):
            here = slice(at, at + size)
            out.append(
                Batch(
                    {name: t[i] for name, t in cut.items()}, self.lengths[here],
                    None if self.on_host is None else self.on_host[here], self.ragged, self.sample_ids[here],
                    self.shape,
                )
            )  # fmt: skip
            at += size
        return out


def prepare(
    batch: Any,
    collate: Collate,
    patch: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
    first_id: int,
) -> Batch:
    """A batch of the caller's, checked and on the device.

    Args:
        batch: a mapping with ``input_ids`` or ``inputs_embeds`` (and ``attention_mask``, True on the left), or
            ``pixel_values``; one such tensor; or a list of texts. ``sample_ids`` may name the samples.
        dtype (torch.dtype): of what is floating in it.
        first_id (int): what the samples are named from, if nothing names them.

    Raises:
        ValueError: it is something else; the message says what came.
    """
    image = collate.modality == "image"
    if isinstance(batch, Tensor):
        batch = {"pixel_values" if image else "input_ids" if batch.dim() == 2 else "inputs_embeds": batch}
    elif not isinstance(batch, Mapping) and hasattr(batch, "data") and isinstance(batch.data, Mapping):
        batch = batch.data
    elif isinstance(batch, (list, tuple)) and batch and all(isinstance(text, str) for text in batch) and not image:
        batch = collate.texts(batch)
    elif isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        return prepare(batch[0], collate, patch, device, dtype, first_id)
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch is a {type(batch).__name__}, expected a mapping, a tensor or a list of texts")
    collate.check("batch", batch)
    given = {name: t for name, t in batch.items() if name in _KEPT[collate.modality] and t is not None}
    main = next((n for n in ("pixel_values", "input_ids", "inputs_embeds") if n in given), None)
    if main is None:
        wanted = "'pixel_values'" if image else "'input_ids' or 'inputs_embeds'"
        raise ValueError(f"batch has the keys {sorted(batch)}, expected {wanted}")
    for name, t in given.items():
        if not isinstance(t, Tensor) or not t.dim() or len(t) != len(given[main]) or not len(t):
            came = list(t.shape) if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(f"batch: {name} is {came}, expected a tensor of one entry for each sample")
    shape = _shape(main, given[main], patch)
    size = len(given[main])
    lengths, on_host = _lengths(given.pop("attention_mask", None), size, shape)
    ragged = lengths is not None and (on_host is None or min(on_host) < shape[0])
    ids = given.pop("sample_ids", None)
    if ids is None:
        ids = torch.arange(first_id, first_id + size)
    tokens = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    if lengths is None:
        lengths, on_host = torch.full((size,), tokens, dtype=torch.int32), [tokens] * size
    inputs = {
        name: t.to(device, dtype if t.is_floating_point() else t.dtype, non_blocking=True) for name, t in given.items()
    }
    return Batch(
        inputs, lengths.to(device, non_blocking=True), on_host, ragged,
        ids.to(device, torch.int64, non_blocking=True), shape,
    )  # fmt: skip


def _shape(main: str, t: Tensor, patch: tuple[int, int] | None) -> tuple[int, ...]:
    """Of the tokens of a sample."""
    wanted = {"pixel_values": (4, "[B, C, H, W]"), "input_ids": (2, "[B, T]"), "inputs_embeds": (3, "[B, T, D]")}
    dims, expected = wanted[main]
    if t.dim() != dims or 0 in t.shape:
        raise ValueError(f"batch: {main} has shape {list(t.shape)}, expected {expected}")
    if (main == "input_ids") == t.is_floating_point():
        raise ValueError(f"batch: {main} is {t.dtype}, expected {'integers' if main == 'input_ids' else 'floats'}")
    if patch is None:
        return (t.shape[1],)
    if t.shape[2] % patch[0] or t.shape[3] % patch[1]:
        raise ValueError(f"batch: pixel_values has shape {list(t.shape)}, expected multiples of patches of {patch}")
    return t.shape[2] // patch[0], t.shape[3] // patch[1]


def _lengths(mask: Tensor | None, size: int, shape: tuple[int, ...]) -> tuple[Tensor | None, list[int] | None]:
    """[B] int32 of a mask of what is no padding, and the same numbers where they can be read without waiting."""
    if mask is None:
        return None, None
    if tuple(mask.shape) != (size, *shape):
        raise ValueError(f"batch: attention_mask has shape {list(mask.shape)}, expected {[size, *shape]}")
    lengths = mask.ne(0).sum(1, dtype=torch.int32)
    if mask.device.type != "cpu":
        return lengths, None
    left = torch.arange(shape[0]) < lengths[:, None]
    if not torch.equal(mask.ne(0), left):
        raise ValueError("batch: attention_mask has gaps or padding on the left, expected padding on the right only")
    return lengths, lengths.tolist()
