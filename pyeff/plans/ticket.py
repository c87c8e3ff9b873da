"""A ticket: which blocks of a weight matrix are alive, and where each of them lies in the stored values.

Everything a kernel asks is in one int32 tensor, ``index``, so that a module needs one buffer, and a call one argument.
With R x C blocks, nnz of them alive, stored row by row and in a row by column, it holds, one behind the other:

=================  =======  ============================================================================
``row_start``      R + 1    the first stored block of each row of blocks, and nnz
``column``         nnz      the column of each stored block
``column_start``   C + 1    the same for the columns: the first entry of each in the next two, and nnz
``row``            nnz      the row of each block, column by column, and in a column by row
``slot``           nnz      where each of those is stored
``row_order``      R        the rows, the fullest first: the order in which work is handed out
``column_order``   C        the columns, the fullest first
=================  =======  ============================================================================
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PARTS = ("row_start", "column", "column_start", "row", "slot", "row_order", "column_order")


class Ticket:
    """Which blocks of a weight [out, in] are alive.

    Made by :meth:`from_mask`, :meth:`from_blocks` or :meth:`from_sparse_bsr`; immutable. The values are not in it: they
    are an ordinary strided tensor [nnz, bo, bi], so that optimizers, copies and files treat them as any parameter.

    Attributes:
        shape ((int, int)): (out, in), of the weight.
        block ((int, int)): (bo, bi). The last row and column of blocks may reach past the weight.
        index (Tensor): int32, the positions; its parts are the attributes ``row_start``, ``column``, ``column_start``,
            ``row``, ``slot``, ``row_order`` and ``column_order``.

    Example:
        >>> import torch, pyeff
        >>> mask = torch.zeros(64, 32, dtype=torch.bool)
        >>> mask[:16, 8:24] = True
        >>> ticket = pyeff.Ticket.from_mask(mask, block=16)
        >>> ticket.nnz, ticket.density
        (2, 0.25)
        >>> ticket.gather(torch.randn(64, 32)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, index: Tensor, shape: Sequence[int], block: int | Sequence[int]) -> None:
        """Takes an ``index`` as another ticket has it.

        Raises:
            ValueError: it is not the index of a ticket of this shape and block.
        """
        self.shape, self.block = _shape(shape), _block(block)
        self.index = index
        _check_index(self)

    @classmethod
    def from_blocks(cls, blocks: Tensor, shape: Sequence[int], block: int | Sequence[int]) -> Ticket:
        """The ticket of a mask of blocks.

        Args:
            blocks (Tensor): [ceil(out / bo), ceil(in / bi)] bool, True where a block is alive.
            shape ((int, int)): (out, in).
            block (int or (int, int)): (bo, bi), or one number for both.

        Returns:
            Ticket: on the device of ``blocks``.

        Raises:
            ValueError: ``blocks`` is no bool matrix of that shape; a size is not positive.
        """
        shape, block = _shape(shape), _block(block)
        grid = _checked_grid(shape, block)
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool or tuple(blocks.shape) != grid:
            raise ValueError(
                f"Ticket: blocks is {_describe(blocks)}, expected a bool tensor {list(grid)} for shape {list(shape)} "
                f"and block {list(block)}"
            )
        ticket = cls.__new__(cls)
        ticket.shape, ticket.block, ticket.index = shape, block, _build_index(blocks)
        return ticket

    @classmethod
    def from_mask(cls, mask: Tensor, block: int | Sequence[int]) -> Ticket:
        """The ticket that keeps every block in which anything of a mask survives.

        Args:
            mask (Tensor): [out, in] bool, True for what survives.
            block (int or (int, int)): (bo, bi), or one number for both.

        Raises:
            ValueError: ``mask`` is no bool matrix; a size is not positive.
        """
        block = _block(block)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"Ticket.from_mask: mask is {_describe(mask)}, expected a bool tensor [out, in]")
        shape = _shape(mask.shape)
        return cls.from_blocks(_to_blocks(mask, block).flatten(2).any(-1), shape, block)

    @classmethod
    def from_sparse_bsr(cls, t: Tensor) -> Ticket:
        """The ticket of a torch.sparse_bsr tensor [out, in]; its values are then ``t.values()``.

        Raises:
            ValueError: ``t`` is no block-sparse matrix, an index of it is out of range, or its columns do not ascend
                within each row.
        """
        if not isinstance(t, Tensor) or t.layout != torch.sparse_bsr or t.dim() != 2:
            raise ValueError(f"Ticket.from_sparse_bsr: t is {_describe(t)}, expected a torch.sparse_bsr matrix")
        start, column, block = t.crow_indices().long(), t.col_indices().long(), _block(t.values().shape[1:])
        grid = _checked_grid(_shape(t.shape), block)
        # torch may have been told not to look at them.
        fit = start.shape == (grid[0] + 1,) and len(column) == t.values().shape[0]
        if not fit or not _ascends(start, len(column)):
            raise ValueError(
                f"Ticket.from_sparse_bsr: crow_indices of t is {_describe(start)}, expected {grid[0] + 1} numbers that "
                f"ascend from 0 to {t.values().shape[0]}, and as many col_indices"
            )
        if not _within(column, grid[1]):
            raise ValueError(f"Ticket.from_sparse_bsr: a column of t is out of range, expected 0 to {grid[1] - 1}")
        row = torch.repeat_interleave(torch.arange(grid[0], device=start.device), start.diff())
        position = row * grid[1] + column
        if not bool((position.diff() > 0).all()):
            raise ValueError("Ticket.from_sparse_bsr: the columns of t do not ascend within each row of blocks")
        blocks = torch.zeros(grid, dtype=torch.bool, device=start.device)
        blocks[row, column] = True
        return cls.from_blocks(blocks, tuple(t.shape), block)

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): how many rows and columns of blocks the weight has."""
        return _grid(self.shape, self.block)

    @property
    def nnz(self) -> int:
        """How many blocks are alive."""
        rows, columns = self.grid
        return (self.index.shape[0] - 2 * rows - 2 * columns - 2) // 3

    @property
    def density(self) -> float:
        """The share of the weight's elements that lie in living blocks; what reaches past the weight does not count."""
        (out, width), (bo, bi), (rows, columns) = self.shape, self.block, self.grid
        start, column = self.row_start, self.column
        high = torch.full((rows,), bo, device=start.device)
        high[-1] = out - (rows - 1) * bo
        wide = torch.full((columns,), bi, device=start.device)
        wide[-1] = width - (columns - 1) * bi
        live = (torch.repeat_interleave(high, start.diff()) * wide[column.long()]).sum()
        return live.item() / (out * width)

    def to(self, device: torch.device | str) -> Ticket:
        """The same ticket with its index on another device."""
        ticket = Ticket.__new__(Ticket)
        ticket.shape, ticket.block, ticket.index = self.shape, self.block, self.index.to(device)
        return ticket

    def blocks(self) -> Tensor:
        """[R, C] bool, True where a block is alive."""
        rows, columns = self.grid
        row = torch.repeat_interleave(torch.arange(rows, device=self.index.device), self.row_start.diff())
        alive = torch.zeros(rows * columns, dtype=torch.bool, device=self.index.device)
        alive[row * columns + self.column] = True
        return alive.view(rows, columns)

    def mask(self) -> Tensor:
        """[out, in] bool, True in living blocks."""
        (out, width), (bo, bi) = self.shape, self.block
        return self.blocks().repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:out, :width]

    def gather(self, dense: Tensor) -> Tensor:
        """The living blocks of a matrix, differentiably.

        Args:
            dense (Tensor): [out, in].

        Returns:
            Tensor: [nnz, bo, bi]; what reaches past the matrix is zero.

        Raises:
            ValueError: ``dense`` has another shape or is on another device than the ticket.
        """
        self._check_tensor("gather", "dense", dense, self.shape)
        blocks = _to_blocks(dense, self.block)
        return blocks.flatten(0, 1)[self._positions()]

    def scatter(self, values: Tensor) -> Tensor:
        """The matrix [out, in] with these blocks and zero elsewhere, differentiably: the inverse of :meth:`gather`.

        Raises:
            ValueError: ``values`` is not [nnz, bo, bi], or on another device than the ticket.
        """
        self._check_tensor("scatter", "values", values, (self.nnz, *self.block))
        (rows, columns), (bo, bi), (out, width) = self.grid, self.block, self.shape
        flat = values.new_zeros(rows * columns, bo, bi).index_copy(0, self._positions(), values)
        return flat.view(rows, columns, bo, bi).transpose(1, 2).reshape(rows * bo, columns * bi)[:out, :width]

    def to_sparse_bsr(self, values: Tensor) -> Tensor:
        """A torch.sparse_bsr tensor [out, in] that shares the memory of ``values``.

        Raises:
            ValueError: ``values`` is not [nnz, bo, bi], or on another device than the ticket; or the shape is no
                multiple of the block, as torch demands.
        """
        self._check_tensor("to_sparse_bsr", "values", values, (self.nnz, *self.block))
        if self.shape[0] % self.block[0] or self.shape[1] % self.block[1]:
            raise ValueError(
                f"Ticket.to_sparse_bsr: shape {list(self.shape)} is no multiple of block {list(self.block)}, which "
                "torch.sparse_bsr demands"
            )
        # Checked when the ticket was made.
        return torch.sparse_bsr_tensor(self.row_start, self.column, values, size=self.shape, check_invariants=False)

    def _check_tensor(self, method: str, name: str, t: object, shape: tuple[int, ...]) -> None:
        if (
            not isinstance(t, Tensor)
            or tuple(t.shape) != shape
            or t.device != self.index.device
            or t.layout != torch.strided
        ):
            raise ValueError(
                f"Ticket.{method}: {name} is {_describe(t)}, expected a dense tensor {list(shape)} on "
                f"{self.index.device}"
            )

    def _positions(self) -> Tensor:
        """The place of every stored block among all R C, int64."""
        rows, columns = self.grid
        row = torch.repeat_interleave(
            torch.arange(rows, device=self.index.device), self.row_start.diff(), output_size=self.nnz
        )
        return row * columns + self.column

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ticket):
            return NotImplemented
        if self.shape != other.shape or self.block != other.block:
            return False
        if self.index is other.index:
            return True
        # On meta there are no positions to compare.
        known = not (self.index.is_meta or other.index.is_meta)
        return known and torch.equal(self.index, other.index.to(self.index.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        blocks = self.grid[0] * self.grid[1]
        return f"Ticket(shape={self.shape}, block={self.block}, nnz={self.nnz} of {blocks} on {self.index.device})"

    def _part(self, name: str) -> Tensor:
        sizes = _sizes(self.grid, self.nnz)
        at = PARTS.index(name)
        start = sum(sizes[:at])
        return self.index[start : start + sizes[at]]

    row_start = property(functools.partial(_part, name="row_start"))
    column = property(functools.partial(_part, name="column"))
    column_start = property(functools.partial(_part, name="column_start"))
    row = property(functools.partial(_part, name="row"))
    slot = property(functools.partial(_part, name="slot"))
    row_order = property(functools.partial(_part, name="row_order"))
    column_order = property(functools.partial(_part, name="column_order"))


def _sizes(grid: tuple[int, int], nnz: int) -> tuple[int, ...]:
    rows, columns = grid
    return rows + 1, nnz, columns + 1, nnz, nnz, rows, columns


def _grid(shape: tuple[int, int], block: Sequence[int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _checked_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    rows, columns = _grid(shape, block)
    if rows * columns >= 2**31:
        raise ValueError(
            f"Ticket: shape {list(shape)} has {rows} x {columns} blocks of {list(block)}, expected less than 2^31"
        )
    return rows, columns


def _pair(name: str, value: object, pair: object, expected: str) -> tuple[int, int]:
    try:
        given = tuple(pair)  # type: ignore[arg-type, var-annotated]
        # Python takes a bool for a number.
        numbers = () if any(isinstance(n, bool) for n in given) else tuple(map(operator.index, given))
    except TypeError:
        numbers = ()
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"Ticket: {name} is {value!r}, expected {expected}")
    return numbers  # type: ignore[return-value]


def _shape(shape: object) -> tuple[int, int]:
    return _pair("shape", shape, shape, "(out, in), both at least 1")


def _block(block: object) -> tuple[int, int]:
    pair = block if isinstance(block, Iterable) else (block, block)
    return _pair("block", block, pair, "one positive number or (bo, bi)")


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} on {value.device} ({value.layout})"


def _to_blocks(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """[out, in] as [R, C, bo, bi], with zeros past the end."""
    (out, width), (bo, bi) = dense.shape, block
    rows, columns = _grid((out, width), block)
    padded = torch.nn.functional.pad(dense, (0, columns * bi - width, 0, rows * bo - out))
    return padded.view(rows, bo, columns, bi).transpose(1, 2)


def _build_index(blocks: Tensor) -> Tensor:
    by_row, by_column = blocks.sum(1), blocks.sum(0)
    row, column = blocks.nonzero(as_tuple=True)
    # Stored row by row: what keeps the order among equal columns goes through each column by rows.
    slot = torch.argsort(column, stable=True)
    zero = by_row.new_zeros(1)
    parts = (
        torch.cat((zero, by_row.cumsum(0))),
        column,
        torch.cat((zero, by_column.cumsum(0))),
        row[slot],
        slot,
        torch.argsort(by_row, descending=True, stable=True),
        torch.argsort(by_column, descending=True, stable=True),
    )
    return torch.cat(parts).to(torch.int32)


def _ascends(start: Tensor, end: int) -> bool:
    """Whether these are where each of several runs begins, and the end of the last."""
    # No differences: those of what may be any numbers can wrap around.
    return bool(start[0] == 0 and start[-1] == end and (start[1:] >= start[:-1]).all())


def _within(numbers: Tensor, size: int) -> bool:
    return len(numbers) == 0 or 0 <= int(numbers.min()) <= int(numbers.max()) < size


def _check_index(ticket: Ticket) -> None:
    """Raises ValueError unless the index is the very one that its blocks have."""
    index, (rows, columns) = ticket.index, _checked_grid(ticket.shape, ticket.block)
    wrong = (
        f"Ticket: index is {_describe(index)}, expected the index of a ticket of shape {list(ticket.shape)} and block "
        f"{list(ticket.block)}"
    )
    strided = isinstance(index, Tensor) and index.layout == torch.strided
    if not strided or index.dtype != torch.int32 or index.dim() != 1:
        raise ValueError(wrong)
    extra = index.shape[0] - 2 * rows - 2 * columns - 2
    if extra < 0 or extra % 3 or extra // 3 > rows * columns:
        raise ValueError(f"{wrong}: its length fits no number of blocks")
    if not _ascends(ticket.row_start, ticket.nnz) or not _within(ticket.column, columns):
        raise ValueError(f"{wrong}: a position is out of range")
    if not torch.equal(_build_index(ticket.blocks()), index):
        raise ValueError(f"{wrong}: its parts do not belong together")
