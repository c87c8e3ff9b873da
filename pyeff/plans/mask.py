"""Which tokens each of several students of one sample sees: the plan of a batch of masks.

Rows are students: row ``r = b * M + m`` is mask m of sample b. Everything is int32 and lies on the device of the masks,
so that plans can be made there, without a word from the host, and change between two replays of a CUDA graph.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor


class MaskPlan:
    """Which tokens of B samples each of M students keeps, and which ones are hidden from it.

    Made by :meth:`from_mask`, :meth:`from_ids` or :func:`pyeff.ops.block_mask`; immutable. A token is kept, hidden, or
    padding (at or past the length of its sample).

    Attributes:
        batch, masks, tokens, width (int): B, M, T, and K: how many slots a row has for what it keeps.
        rows (int): R = B * M.
        ids_keep (Tensor): [R, K] int32, the kept tokens of each row in ascending order; zero past ``keep_len``.
        keep_len (Tensor): [R] int32, how many those are.
        inverse (Tensor): [R, T] int32, the slot of each token, -1 where it is not kept.
        lengths (Tensor): [B] int32, tokens of each sample that are no padding.
        prefix (int): how many leading tokens stand outside of the sequence (a class token); see :meth:`with_prefix`.

    Example:
        >>> import torch, pyeff
        >>> hidden = torch.tensor([[[False, True, True, False], [True, True, False, False]]])
        >>> plan = pyeff.MaskPlan.from_mask(hidden)
        >>> plan.rows, plan.ids_keep.tolist(), plan.inverse.tolist()
        (2, [[0, 3], [2, 3]], [[0, -1, -1, 1], [-1, -1, 0, 1]])
    """

    def __init__(self, ids_keep: Tensor, keep_len: Tensor, inverse: Tensor, lengths: Tensor, prefix: int = 0) -> None:
        """Takes the parts as another plan has them; only their shapes and kinds are looked at.

        Raises:
            ValueError: a part is not int32, on another device than the first, or of a shape that does not fit.
        """
        batch, rows = _dims("lengths", lengths, 1)[0], _dims("keep_len", keep_len, 1)[0]
        width, tokens = _dims("ids_keep", ids_keep, 2)[1], _dims("inverse", inverse, 2)[1]
        shapes = {"ids_keep": (rows, width), "inverse": (rows, tokens)}
        for name, t in (("ids_keep", ids_keep), ("keep_len", keep_len), ("inverse", inverse), ("lengths", lengths)):
            if t.dtype != torch.int32 or t.device != ids_keep.device or tuple(t.shape) != shapes.get(name, t.shape):
                raise ValueError(
                    f"MaskPlan: {name} is {_describe(t)}, expected int32 {list(shapes.get(name, t.shape))} on "
                    f"{ids_keep.device}"
                )
        if batch < 1 or rows < 1 or rows % batch:
            raise ValueError(
                f"MaskPlan: keep_len has {rows} rows, expected a multiple of the {batch} samples of lengths"
            )
        if not 0 <= prefix <= tokens:
            raise ValueError(f"MaskPlan: prefix is {prefix}, expected 0 to {tokens}")
        self.ids_keep, self.keep_len, self.inverse, self.lengths, self.prefix = (
            ids_keep, keep_len, inverse, lengths, prefix,
        )  # fmt: skip

    @classmethod
    def from_mask(cls, mask: Tensor, lengths: Tensor | None = None, *, width: int | None = None) -> MaskPlan:
        """The plan of masks that are there.

        Args:
            mask (Tensor): [B, M, T] bool, True = hidden.
            lengths (Tensor, optional): [B] integers, the tokens of each sample; what the mask says past them does not
                matter. Default: T for all.
            width (int, optional): K, at least as many as any row keeps; a row that keeps more loses its last ones.
                Default: the most that any row keeps, which on a GPU has to be waited for.

        Raises:
            ValueError: ``mask`` or ``lengths`` is not as said, or a number is out of range.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3 or 0 in mask.shape[:2]:
            raise ValueError(f"MaskPlan.from_mask: mask is {_describe(mask)}, expected bool [B, M, T]")
        batch, _, tokens = mask.shape
        lengths = checked_lengths("MaskPlan.from_mask", lengths, batch, tokens, mask.device)
        valid = torch.arange(tokens, device=mask.device) < lengths[:, None, None]
        kept = (valid & ~mask).flatten(0, 1)
        if width is None:
            width = max(int(kept.sum(1).max()), 1) if tokens else 1
        elif isinstance(width, bool) or operator.index(width) < 1:
            raise ValueError(f"MaskPlan.from_mask: width is {width!r}, expected at least 1")
        return cls(*_positions(kept, width), lengths)

    @classmethod
    def from_ids(
        cls, ids: Tensor, tokens: int, keep_len: Tensor | None = None, lengths: Tensor | None = None
    ) -> MaskPlan:
        """The plan of students of which the kept tokens are listed, as the masks of the JEPA family are.

        Args:
            ids (Tensor): [B, M, K] integers, in any order, each at most once in a row.
            tokens (int): T.
            keep_len (Tensor, optional): [B, M] integers, how many of the K count. Default: all.
            lengths (Tensor, optional): [B] integers, as for :meth:`from_mask`; what is listed past them is not kept.

        Raises:
            ValueError: shapes or kinds do not fit; on a CPU also a token that is not there, or is there twice, or a
                number in ``keep_len`` or ``lengths`` that is out of range. On a GPU, which would have to be waited for,
                tokens that are not there do not count, and numbers are brought into their range.
        """
        kinds = (torch.int32, torch.int64)
        if not isinstance(ids, Tensor) or ids.dtype not in kinds or ids.dim() != 3 or 0 in ids.shape:
            raise ValueError(f"MaskPlan.from_ids: ids is {_describe(ids)}, expected integers [B, M, K]")
        if isinstance(tokens, bool) or operator.index(tokens) < 1:
            raise ValueError(f"MaskPlan.from_ids: tokens is {tokens!r}, expected at least 1")
        batch, masks, width = ids.shape
        if keep_len is not None and (
            not isinstance(keep_len, Tensor)
            or tuple(keep_len.shape) != (batch, masks)
            or keep_len.dtype not in kinds
            or keep_len.device != ids.device
        ):
            raise ValueError(
                f"MaskPlan.from_ids: keep_len is {_describe(keep_len)}, expected integers {[batch, masks]} on "
                f"{ids.device}"
            )
        lengths = checked_lengths("MaskPlan.from_ids", lengths, batch, tokens, ids.device)
        plain = type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if plain and type(keep_len) is Tensor and not 0 <= int(keep_len.min()) <= int(keep_len.max()) <= width:
            raise ValueError(
                f"MaskPlan.from_ids: keep_len has values outside of 0 to {width}, the slots that ids has for a row"
            )
        rows, slot = ids.reshape(-1, width).long(), torch.arange(width, device=ids.device)
        counts = (slot < (width if keep_len is None else keep_len.reshape(-1, 1))).expand_as(rows)
        if plain:
            given = rows.masked_fill(~counts, -1).sort(1).values
            twice = (given[:, 1:] == given[:, :-1]) & (given[:, 1:] >= 0)
            if bool(((rows < 0) | (rows >= tokens))[counts].any()) or bool(twice.any()):
                raise ValueError(f"MaskPlan.from_ids: ids are not each one of 0 to {tokens - 1}, at most once in a row")
        # One place more, for what does not count; on a GPU also for tokens that are not there.
        counts = counts & (rows >= 0) & (rows < tokens)
        kept = torch.zeros(len(rows), tokens + 1, dtype=torch.bool, device=ids.device)
        kept = kept.scatter(1, torch.where(counts, rows, tokens), True)[:, :tokens]
        kept = kept & (torch.arange(tokens, device=ids.device) < lengths.repeat_interleave(masks)[:, None])
        return cls(*_positions(kept, width), lengths)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def rows(self) -> int:
        return self.keep_len.shape[0]

    @property
    def masks(self) -> int:
        return self.rows // self.batch

    @property
    def tokens(self) -> int:
        return self.inverse.shape[1]

    @property
    def width(self) -> int:
        return self.ids_keep.shape[1]

    def hidden(self) -> Tensor:
        """[B, M, T] bool, True where a token is hidden: neither kept nor padding."""
        at = torch.arange(self.tokens, device=self.inverse.device)
        inverse = self.inverse.view(self.batch, self.masks, self.tokens)
        return (inverse < 0) & (at < self.lengths[:, None, None])

    def slots(self) -> Tensor:
        """[R, K] bool, True for slots that hold a kept token: the students' attention mask."""
        return torch.arange(self.width, device=self.keep_len.device) < self.keep_len[:, None]

    def count(self) -> Tensor:
        """[] int64, how many tokens are hidden, over all rows."""
        return self.masks * self.lengths.sum() - self.keep_len.sum()

    def with_prefix(self, count: int) -> MaskPlan:
        """The plan of the same tokens behind ``count`` more that every student keeps, such as a class token.

        For gathering from [B, count + T, D]; :func:`pyeff.ops.multimask_relative_bias` gives them no distance.
        """
        if isinstance(count, bool) or operator.index(count) < 0:
            raise ValueError(f"MaskPlan.with_prefix: count is {count!r}, expected at least 0")
        first = torch.arange(count, dtype=torch.int32, device=self.inverse.device).expand(self.rows, count)
        ids = torch.where(self.slots(), self.ids_keep + count, 0)
        inverse = torch.where(self.inverse < 0, self.inverse, self.inverse + count)
        # What was the first slot may now be a zero past the end: those stay zero.
        return MaskPlan(
            torch.cat((first, ids), 1), self.keep_len + count, torch.cat((first, inverse), 1), self.lengths + count,
            self.prefix + count,
        )  # fmt: skip

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskPlan:
        """The same plan on another device."""
        ids_keep, keep_len, inverse, lengths = (
            t.to(device, non_blocking=non_blocking) for t in (self.ids_keep, self.keep_len, self.inverse, self.lengths)
        )
        return MaskPlan(ids_keep, keep_len, inverse, lengths, self.prefix)

    def copy_(self, other: MaskPlan) -> MaskPlan:
        """Takes over another plan of the same sizes, in place: new masks for a captured CUDA graph.

        Raises:
            ValueError: the sizes differ.
        """
        mine, theirs = ((p.batch, p.masks, p.tokens, p.width, p.prefix) for p in (self, other))
        if mine != theirs:
            raise ValueError(f"MaskPlan.copy_: other has (B, M, T, K, prefix) = {theirs}, expected {mine}")
        for name in ("ids_keep", "keep_len", "inverse", "lengths"):
            getattr(self, name).copy_(getattr(other, name))
        return self

    def __repr__(self) -> str:
        return (
            f"MaskPlan(batch={self.batch}, masks={self.masks}, tokens={self.tokens}, width={self.width}"
            f"{f', prefix={self.prefix}' if self.prefix else ''} on {self.inverse.device})"
        )


def checked_lengths(op: str, lengths: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """``lengths`` as int32 [B] on ``device``, in memory of its own; T for all where there are none.

    Raises:
        ValueError: another shape, kind or device; on a CPU also a length out of range.
    """
    if lengths is None:
        return torch.full((batch,), tokens, dtype=torch.int32, device=device)
    kinds = (torch.int32, torch.int64)
    fits = isinstance(lengths, Tensor) and lengths.dtype in kinds and tuple(lengths.shape) == (batch,)
    if not fits or lengths.device != device:
        raise ValueError(f"{op}: lengths is {_describe(lengths)}, expected integers [{batch}] on {device}")
    # On a GPU, which would have to be waited for, what is out of range is brought into it.
    if type(lengths) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling():
        if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tokens:
            raise ValueError(f"{op}: lengths has values outside of 0 to {tokens}, the tokens that there are")
        return lengths.to(torch.int32, copy=True)
    return lengths.clamp(0, tokens).to(torch.int32)


def _positions(kept: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_keep, keep_len, inverse) of [R, T] bool, without a word from the host."""
    rows, tokens = kept.shape
    slot = kept.cumsum(1) - 1
    kept = kept & (slot < width)
    # One slot more, for what is not kept.
    slot = torch.where(kept, slot, width)
    at = torch.arange(tokens, dtype=torch.int32, device=kept.device).expand(rows, tokens)
    ids = torch.zeros(rows, width + 1, dtype=torch.int32, device=kept.device).scatter(1, slot, at)[:, :width]
    inverse = torch.where(kept, slot, -1).to(torch.int32)
    return ids.contiguous(), kept.sum(1).to(torch.int32), inverse


def _dims(name: str, t: object, count: int) -> torch.Size:
    if not isinstance(t, Tensor) or t.dim() != count:
        raise ValueError(f"MaskPlan: {name} is {_describe(t)}, expected a tensor of {count} dimensions")
    return t.shape


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} on {value.device}"
