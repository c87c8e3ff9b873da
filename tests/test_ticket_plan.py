"""pyeff.Ticket: how it is made, what its index holds, what it refuses, and what it can be turned into."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyeff
from pyeff import Ticket
from pyeff.plans.ticket import PARTS
from tests.helpers import says
from tests.ticket_calls import make_ticket, padding, random_blocks

# shape, block: one that divides, ones that do not, one row, one column, one block that is larger than all.
SIZES = [
    ((64, 48), 16), ((40, 57), 16), ((40, 57), (8, 32)), ((33, 20), (5, 7)), ((8, 100), 8), ((100, 8), 8),
    ((3, 5), 16), ((7, 9), 1),
]  # fmt: skip
sizes = pytest.mark.parametrize(("shape", "block"), SIZES, ids=str)
densities = pytest.mark.parametrize("density", [0.0, 0.4, 1.0])


def all_equal(one: Ticket, *others: Ticket) -> bool:
    return all(one == other and torch.equal(one.index, other.index) for other in others)


@sizes
@densities
def test_index(shape, block, density):
    """Each part against its definition, written out."""
    ticket = make_ticket(shape, block, density, holes=density < 1)
    blocks, (rows, columns) = ticket.blocks(), ticket.grid
    places = [(r, c) for r in range(rows) for c in range(columns) if blocks[r, c]]
    by_column = sorted(places, key=lambda place: place[::-1])
    assert ticket.index.dtype == torch.int32
    assert ticket.nnz == len(places) == int(blocks.sum())
    assert ticket.row_start.tolist() == [sum(p[0] < r for p in places) for r in range(rows + 1)]
    assert ticket.column.tolist() == [c for _, c in places]
    assert ticket.column_start.tolist() == [sum(p[1] < c for p in places) for c in range(columns + 1)]
    assert ticket.row.tolist() == [r for r, _ in by_column]
    assert ticket.slot.tolist() == [places.index(place) for place in by_column]
    for order, full in ((ticket.row_order, blocks.sum(1)), (ticket.column_order, blocks.sum(0))):
        assert sorted(order.tolist()) == list(range(len(full)))
        assert (full[order.long()].diff() <= 0).all()
    assert torch.equal(torch.cat([getattr(ticket, name) for name in PARTS]), ticket.index)


@sizes
@densities
def test_every_way_to_make_one(shape, block, density):
    ticket = make_ticket(shape, block, density, holes=density < 1)
    bo, bi = ticket.block
    one_survivor = torch.zeros(shape, dtype=torch.bool)
    for r, c in ticket.blocks().nonzero().tolist():
        # The last element of each block that is inside of the weight.
        one_survivor[min((r + 1) * bo, shape[0]) - 1, min((c + 1) * bi, shape[1]) - 1] = True
    again = Ticket(ticket.index, list(shape), torch.Size((bo, bi)))
    made = [Ticket.from_mask(ticket.mask(), block), Ticket.from_mask(one_survivor, (bo, bi)), again]
    if not (shape[0] % bo or shape[1] % bi):
        made.append(Ticket.from_sparse_bsr(ticket.to_sparse_bsr(torch.randn(ticket.nnz, bo, bi))))
    assert all_equal(ticket, *made)
    assert ticket.shape == shape
    assert ticket.block == (bo, bi)


@sizes
@densities
def test_density_and_mask(shape, block, density):
    ticket = make_ticket(shape, block, density, holes=density < 1)
    bo, bi = ticket.block
    expected = torch.tensor([[bool(ticket.blocks()[i // bo, j // bi]) for j in range(shape[1])]
                             for i in range(shape[0])])  # fmt: skip
    assert torch.equal(ticket.mask(), expected)
    assert ticket.density == pytest.approx(expected.double().mean().item(), abs=1e-15)


@sizes
@densities
def test_gather_and_scatter(shape, block, density):
    ticket = make_ticket(shape, block, density, holes=density < 1)
    dense = torch.randn(shape)
    values = ticket.gather(dense)
    assert values.is_contiguous()
    assert values.shape == (ticket.nnz, *ticket.block)
    assert not values[padding(ticket)].any()
    assert torch.equal(ticket.scatter(values), dense * ticket.mask())
    # What lies past the end is nowhere in the matrix.
    assert torch.equal(ticket.scatter(values.masked_fill(padding(ticket), float("nan"))), dense * ticket.mask())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_gather_and_scatter_keep_the_dtype(dtype):
    ticket = make_ticket((40, 57), 16)
    dense = (torch.randn(40, 57) * 5).to(dtype)
    values = ticket.gather(dense.t().contiguous().t())
    assert values.dtype == dtype
    assert torch.equal(ticket.scatter(values), torch.where(ticket.mask(), dense, torch.zeros((), dtype=dtype)))


def test_gather_and_scatter_are_differentiable():
    ticket = make_ticket((13, 18), (4, 5))
    dense = torch.randn(13, 18, dtype=torch.float64, requires_grad=True)
    values = torch.randn(ticket.nnz, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ticket.gather, dense)
    assert torch.autograd.gradcheck(ticket.scatter, values)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block", [4, (4, 8)])
def test_round_trip_with_bsr(block, index_dtype):
    ticket = make_ticket((24, 32), block)
    dense = torch.randn(24, 32) * ticket.mask()
    bsr = dense.to_sparse_bsr(ticket.block)
    bsr = torch.sparse_bsr_tensor(
        bsr.crow_indices().to(index_dtype), bsr.col_indices().to(index_dtype), bsr.values(), (24, 32)
    )
    assert Ticket.from_sparse_bsr(bsr) == ticket
    assert torch.equal(bsr.values(), ticket.gather(dense))
    back = ticket.to_sparse_bsr(bsr.values())
    assert torch.equal(back.to_dense(), dense)
    assert back.values().data_ptr() == bsr.values().data_ptr()


def test_round_trip_of_a_checkpoint(tmp_path):
    """The index and the values as safetensors, which holds dense tensors only."""
    files = pytest.importorskip("safetensors.torch")
    ticket = make_ticket((40, 57), 16)
    files.save_file({"index": ticket.index, "values": torch.randn(ticket.nnz, 16, 16)}, tmp_path / "t.safetensors")
    loaded = files.load_file(tmp_path / "t.safetensors")
    assert Ticket(loaded["index"], (40, 57), 16) == ticket


def test_copies():
    ticket = make_ticket((40, 57), 16)
    for other in (copy.deepcopy(ticket), pickle.loads(pickle.dumps(ticket)), ticket.to("cpu")):
        assert all_equal(ticket, other)
        assert (other.shape, other.block) == ((40, 57), (16, 16))
    assert copy.deepcopy(ticket).index.data_ptr() != ticket.index.data_ptr()
    elsewhere = ticket.to("meta")
    assert elsewhere.index.device.type == "meta"
    assert elsewhere.nnz == ticket.nnz


def test_equality():
    ticket = make_ticket((64, 48), 16)
    blocks = ticket.blocks()
    assert ticket == Ticket.from_blocks(blocks.clone(), (64, 48), 16)
    blocks[0, 0] ^= True
    for other in (
        Ticket.from_blocks(blocks, (64, 48), 16),
        Ticket.from_blocks(ticket.blocks(), (63, 48), 16),
        Ticket.from_blocks(ticket.blocks(), (64, 45), (16, 15)),
        "a ticket",
        None,
    ):
        assert ticket != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(ticket)
    nowhere = ticket.to("meta")
    assert nowhere == nowhere.to("meta")
    assert ticket != nowhere
    assert nowhere != ticket
    assert nowhere != ticket.to("meta")


def test_repr():
    text = repr(Ticket.from_blocks(torch.eye(3, dtype=torch.bool), (24, 44), (8, 16)))
    assert text == "Ticket(shape=(24, 44), block=(8, 16), nnz=3 of 9 on cpu)"


def bsr(column=(0, 2, 1), start=(0, 2, 3), shape=(8, 12)):
    values = torch.zeros(len(column), 4, 4)
    return torch.sparse_bsr_tensor(torch.tensor(start), torch.tensor(column), values, shape, check_invariants=False)


MASK, BLOCKS = torch.ones(40, 57, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
# What is called, then what the message must say in this order: the argument, what came, what was expected.
REFUSED = {
    "block 0": (lambda: Ticket.from_mask(MASK, 0), "block is 0", "expected one positive number or (bo, bi)"),
    "block negative": (lambda: Ticket.from_mask(MASK, (8, -8)), "block is (8, -8)", "expected"),
    "block of three": (lambda: Ticket.from_mask(MASK, (8, 8, 8)), "block is (8, 8, 8)", "expected"),
    "block of one": (lambda: Ticket.from_mask(MASK, (8,)), "block is (8,)", "expected"),
    "block no integer": (lambda: Ticket.from_mask(MASK, 8.0), "block is 8.0", "expected"),
    "block a text": (lambda: Ticket.from_mask(MASK, "16"), "block is '16'", "expected"),
    "block None": (lambda: Ticket.from_mask(MASK, None), "block is None", "expected"),
    "block True": (lambda: Ticket.from_mask(MASK, True), "block is True", "expected"),
    "block of a bool": (lambda: Ticket.from_mask(MASK, (8, True)), "block is (8, True)", "expected"),
    "mask of floats": (lambda: Ticket.from_mask(MASK.float(), 8), "mask is torch.float32 [40, 57]", "expected a bool"),
    "mask of one dimension": (lambda: Ticket.from_mask(MASK[0], 8), "mask is", "[57]", "expected", "[out, in]"),
    "mask empty": (lambda: Ticket.from_mask(MASK[:0], 8), "shape is", "[0, 57]", "expected"),
    "mask of NumPy": (lambda: Ticket.from_mask(MASK.numpy(), 8), "mask is a ndarray", "expected"),
    "mask a list": (lambda: Ticket.from_mask(MASK.tolist(), 8), "mask is a list", "expected"),
    "blocks of another grid": (
        lambda: Ticket.from_blocks(BLOCKS, (40, 57), 8),
        "blocks is", "[3, 4]", "expected a bool tensor [5, 8]", "shape [40, 57]", "block [8, 8]",
    ),
    "blocks transposed": (lambda: Ticket.from_blocks(BLOCKS.T, (40, 57), 16), "[4, 3]", "expected", "[3, 4]"),
    "blocks of integers": (lambda: Ticket.from_blocks(BLOCKS.int(), (40, 57), 16), "torch.int32", "expected a bool"),
    "blocks None": (lambda: Ticket.from_blocks(None, (40, 57), 16), "blocks is a NoneType", "expected"),
    "shape of one number": (lambda: Ticket.from_blocks(BLOCKS, 48, 16), "shape is 48", "expected (out, in)"),
    "shape empty": (lambda: Ticket.from_blocks(BLOCKS, (40, 0), 16), "shape is (40, 0)", "expected", "at least 1"),
    "shape of floats": (lambda: Ticket.from_blocks(BLOCKS, (40.0, 57.0), 16), "shape is", "expected"),
    "no bsr": (lambda: Ticket.from_sparse_bsr(torch.ones(8, 8)), "t is", "strided", "expected", "sparse_bsr"),
    "csr": (lambda: Ticket.from_sparse_bsr(torch.ones(8, 8).to_sparse_csr()), "sparse_csr", "expected", "sparse_bsr"),
    "bsc": (lambda: Ticket.from_sparse_bsr(torch.ones(8, 8).to_sparse_bsc(4)), "sparse_bsc", "expected"),
    "bsr of three dimensions": (
        lambda: Ticket.from_sparse_bsr(torch.ones(2, 8, 8).to_sparse_bsr(4)), "[2, 8, 8]", "expected", "matrix",
    ),
    "bsr none at all": (lambda: Ticket.from_sparse_bsr(None), "t is a NoneType", "expected"),
    "bsr with a column before all": (lambda: Ticket.from_sparse_bsr(bsr((0, 2, -1))), "a column of t", "0 to 2"),
    "bsr with a column past all": (lambda: Ticket.from_sparse_bsr(bsr((0, 9, 1))), "a column of t", "0 to 2"),
    "bsr with rows that fall": (lambda: Ticket.from_sparse_bsr(bsr(start=(0, 4, 3))), "crow_indices", "from 0 to 3"),
    "bsr that begins late": (lambda: Ticket.from_sparse_bsr(bsr(start=(1, 2, 3))), "crow_indices", "from 0 to 3"),
    "bsr that ends early": (lambda: Ticket.from_sparse_bsr(bsr(start=(0, 1, 2))), "crow_indices", "from 0 to 3"),
    "bsr with a row too many": (lambda: Ticket.from_sparse_bsr(bsr(start=(0, 1, 2, 3))), "crow_indices", "expected 3"),
    "bsr out of order": (lambda: Ticket.from_sparse_bsr(bsr((2, 0, 1))), "columns of t do not ascend"),
    "bsr with a block twice": (lambda: Ticket.from_sparse_bsr(bsr((1, 1, 0))), "columns of t do not ascend"),
    "gather of another shape": (
        lambda: make_ticket((40, 57), 16).gather(torch.ones(57, 40)),
        "gather", "dense is", "[57, 40]", "expected", "[40, 57]",
    ),
    "gather elsewhere": (
        lambda: make_ticket((40, 57), 16).gather(torch.ones(40, 57, device="meta")), "on meta", "expected", "on cpu",
    ),
    "gather of NumPy": (lambda: make_ticket((40, 57), 16).gather(MASK.numpy()), "dense is a ndarray", "expected"),
    "gather of something sparse": (
        lambda: make_ticket((40, 57), 16).gather(torch.ones(40, 57).to_sparse()), "sparse_coo", "expected a dense",
    ),
    "scatter of another block": (
        lambda: make_ticket((40, 57), 16, 0.0).scatter(torch.ones(0, 8, 8)),
        "scatter", "values is", "[0, 8, 8]", "expected", "[0, 16, 16]",
    ),
    "scatter of too many": (
        lambda: make_ticket((40, 57), 16, 0.0).scatter(torch.ones(1, 16, 16)), "[1, 16, 16]", "expected", "[0, 16, 16]",
    ),
    "scatter of a list": (lambda: make_ticket((40, 57), 16).scatter([]), "values is a list", "expected"),
    "bsr of another shape": (
        lambda: make_ticket((64, 48), 16, 0.0).to_sparse_bsr(torch.ones(3)), "to_sparse_bsr", "[3]", "expected",
    ),
    "bsr of a shape that torch refuses": (
        lambda: make_ticket((40, 57), 16, 0.0).to_sparse_bsr(torch.ones(0, 16, 16)),
        "shape [40, 57]", "no multiple", "[16, 16]", "sparse_bsr",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case):
    call, *parts = REFUSED[case]
    with pytest.raises(ValueError, match=says("Ticket", *parts)):
        call()


def changed(ticket: Ticket, part: str, at: int, value: int) -> torch.Tensor:
    index = ticket.index.clone()
    other = copy.copy(ticket)
    other.index = index
    getattr(other, part)[at] = value
    return index


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [-(2**31), -1, 0, 1, 2, 3, 10**6, 2**31 - 1])
def test_an_index_with_one_wrong_number(part, value):
    """Any number in any place but the right one is refused."""
    ticket = make_ticket((64, 80), 16, seed=1)
    right = getattr(ticket, part)
    for at in range(len(right)):
        if right[at] != value:
            with pytest.raises(ValueError, match=says("Ticket: index is", "expected the index of a ticket")):
                Ticket(changed(ticket, part, at, value), (64, 80), 16)


WRONG_INDEX = {
    "int64": (lambda i: i.long(), "torch.int64"),
    "floats": (lambda i: i.float(), "torch.float32"),
    "a list": (lambda i: i.tolist(), "a list"),
    "nothing": (lambda i: None, "a NoneType"),
    "two dimensions": (lambda i: i[None], "[1, "),
    "sparse": (lambda i: i.to_sparse(), "sparse_coo"),
    "too short": (lambda i: i[:-1], "length"),
    "too long": (lambda i: torch.cat([i, i[-1:]]), "length"),
    "three more": (lambda i: torch.cat([i, i[-3:]]), "expected the index"),
    "empty": (lambda i: i[:0], "length"),
    "all zero": (torch.zeros_like, "out of range"),
    "longer than all blocks": (lambda i: torch.zeros(2 * 4 + 2 * 5 + 2 + 3 * 21, dtype=torch.int32), "length"),
}


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_what_is_no_index(case):
    change, said = WRONG_INDEX[case]
    with pytest.raises(ValueError, match=says("Ticket: index is", said)):
        Ticket(change(make_ticket((64, 80), 16).index), (64, 80), 16)


def test_an_index_of_another_ticket():
    index = make_ticket((64, 80), 16).index
    Ticket(index, (64, 80), 16)
    for shape, block in (((80, 64), 16), ((64, 80), 8), ((64, 96), 16), ((64, 80), (16, 40))):
        with pytest.raises(ValueError, match=says("Ticket: index is", "expected", list(shape))):
            Ticket(index, shape, block)


def test_an_index_that_wraps_around():
    """Differences that are positive in 32 bits only: taken for counts, they would ask for 34 GB."""
    ticket = make_ticket((64, 80), 16)
    index = ticket.index.clone()
    index[:5] = torch.tensor([0, 2**31 - 1, -(2**31), -1, ticket.nnz])
    with pytest.raises(ValueError, match=says("Ticket: index is", "out of range")):
        Ticket(index, (64, 80), 16)


def test_parts_of_two_tickets():
    """Each part is right by itself."""
    one, other = (Ticket.from_blocks(torch.tensor(b) > 0, (16, 16), 8) for b in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]))
    index = torch.cat([getattr(one, name) for name in PARTS[:2]] + [getattr(other, name) for name in PARTS[2:]])
    with pytest.raises(ValueError, match="do not belong together"):
        Ticket(index, (16, 16), 8)


class Operations(TorchDispatchMode):
    """Counts what is asked of torch."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def operations(blocks: torch.Tensor) -> list[int]:
    """How many operations each of a ticket's ways takes; its blocks are of 1 x 2."""
    counts, shape = [], (blocks.shape[0], 2 * blocks.shape[1])
    mask, ticket = blocks.repeat_interleave(2, 1), Ticket.from_blocks(blocks, shape, (1, 2))
    values = ticket.gather(mask)
    for work in (
        lambda: Ticket.from_blocks(blocks, shape, (1, 2)), lambda: Ticket.from_mask(mask, (1, 2)),
        lambda: Ticket(ticket.index, shape, (1, 2)), lambda: ticket.gather(mask), lambda: ticket.scatter(values),
        lambda: Ticket.from_sparse_bsr(ticket.to_sparse_bsr(values)), lambda: ticket.density, ticket.mask,
    ):  # fmt: skip
        with Operations() as counter:
            work()
        counts.append(counter.count)
    return counts


def test_no_loop_over_blocks():
    """Three blocks or half a million among 16 million: as many operations, each over all of them."""
    few = operations(torch.eye(3, dtype=torch.bool))
    assert operations(random_blocks((4096, 4096), 0.03, seed=0)) == few
    assert max(few) < 100


def test_more_blocks_than_an_index_can_count():
    huge = torch.zeros(1, 1, dtype=torch.bool).expand(1 << 16, 1 << 15)
    with pytest.raises(ValueError, match=says("65536 x 32768 blocks", "expected less than 2^31")):
        Ticket.from_blocks(huge, (1 << 20, 1 << 20), (16, 32))
    with pytest.raises(ValueError, match=says("expected less than 2^31")):
        Ticket(torch.zeros(2 * (1 << 20) + 2, dtype=torch.int32), (1 << 20, 1 << 20), 1)


def test_the_op_takes_the_ticket_of_every_way():
    x, ticket = torch.randn(3, 48), make_ticket((64, 48), 16)
    values = torch.randn(ticket.nnz, 16, 16)
    expected = pyeff.ops.ticket_linear(x, values, ticket)
    stored = ticket.to_sparse_bsr(values)
    assert torch.equal(pyeff.ops.ticket_linear(x, stored.values(), Ticket.from_sparse_bsr(stored)), expected)
    assert torch.equal(pyeff.ops.ticket_linear(x, values, Ticket(ticket.index, (64, 48), 16)), expected)
