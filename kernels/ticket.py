"""The block-sparse linear layer in Triton, forward and backward: the launches. The kernels are in ticket_forward.py and
ticket_backward.py, their tiles in ticket_configs.py.

Called by pyeff/ops, which has checked its user's arguments and allocated the outputs. Nothing here waits for the
device, reads a number from it or copies one to it, and all scratch comes from torch's allocator: a call can be captured
in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch, configs, ticket_backward, ticket_configs, ticket_forward
from ._aot import AotCase, cases, key
from ._launch import Launch, Machine, cdiv, given, launch
from ._ticket_tile import GELU, NONE, RELU
from .configs import ARCHITECTURES, Config, choose

_ACTIVATIONS = {"none": NONE.value, "relu": RELU.value, "gelu": GELU.value}
# Fewer tokens are multiplied one by one.
FEW = 16
# Programs for each multiprocessor that a sum over tokens is cut into, at most; and the tokens that a part is worth.
_ROUNDS, _PART_TOKENS = 4, 256


def forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, activation: str, y: Tensor, z: Tensor
) -> None:
    """y = act(x W^T + b).

    Args:
        x: [N, in] T, contiguous rows. values: [nnz, bo, bi] T. index: int32, of the ticket. bias: [out] T or None.
        activation: "none", "relu" or "gelu".
        y: [N, out] T, out. z: [N, out] T, out: what the activation was taken of; without elements not wanted.
    """
    with _launch.on(values.device):
        Call(values, index, y.shape[1], x.shape[1]).multiply(x, y, given(bias), given(z), activation, columns=False)


def backward(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, saved: Tensor, activation: str,
    dx: Tensor, dvalues: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """The gradients. One without elements is not wanted; what only it needs is not computed.

    Args:
        grad: [N, out] T, contiguous rows. x .. activation: as given to :func:`forward`. saved: [N, out] T: y for relu,
            z for gelu, nothing without an activation.
        dx: [N, in] T. dvalues: [nnz, bo, bi] T. dbias: [out] T.
    """
    into_x, into_values, into_bias = map(given, (dx, dvalues, dbias))
    call = Call(values, index, grad.shape[1], x.shape[1])
    with _launch.on(values.device):
        g = grad
        if activation != "none" and (into_x is not None or into_values is not None):
            g = values.new_empty(grad.shape)
        if g is not grad or into_bias is not None:
            call.derive(grad, given(saved), None if g is grad else g, into_bias, activation)
        if into_x is not None:
            call.multiply(g, into_x, None, None, "none", columns=True)
        if into_values is not None:
            call.outer(g, x, into_values)


class Side(NamedTuple):
    """A pass along the rows or columns of blocks: the groups, and where their parts of the index begin."""

    columns: bool
    own: int
    other: int
    groups: int
    others: int  # groups of the other side: no group has more blocks
    blocks: int
    places: tuple[int, int, int, int]  # start, other coordinate, slot, order

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.groups, self.others, self.blocks

    def constants(self, step: int, itemsize: int, width: int) -> dict[str, Any]:
        """How a step of ``step`` numbers of the other side, which is ``width`` wide, meets the blocks."""
        run = min(self.other & -self.other, step)
        return {
            "COLUMNS": self.columns,
            "OWN": self.own,
            "OTHER": self.other,
            "PIECE": _power(self.other),
            "RUN": run if run * itemsize >= 16 else 1,
            "WHOLE": width % self.other == 0,
        }

    def regular(self, itemsize: int) -> bool:
        """Whether every load from the blocks, and along the other side, is of whole 16-byte pieces."""
        inner = self.own if self.columns else self.other
        return all(side * itemsize % 16 == 0 for side in (inner, self.other))


class Call:
    """One call's sizes and ticket."""

    def __init__(self, values: Tensor, index: Tensor, out: int, width: int) -> None:
        self.values, self.index = values, index
        nnz, bo, bi = values.shape
        rows, columns = cdiv(out, bo), cdiv(width, bi)
        if index.numel() >= 1 << 31 or max(out, width) >= 1 << 23:
            raise ValueError(
                f"a weight [{out}, {width}] with {nnz} blocks, the Triton kernels address 2^23 columns, 2^31 positions"
            )
        second = rows + 1 + nnz
        slot = second + columns + 1 + nnz
        order = slot + nnz
        self.rows = Side(False, bo, bi, rows, columns, nnz, (0, rows + 1, slot, order))
        self.columns = Side(True, bi, bo, columns, rows, nnz, (second, second + columns + 1, slot, order + rows))
        self.machine = _launch.machine(values.device)
        self.itemsize = values.element_size()

    def choices(self, kernel: str, regular: bool = True) -> tuple[Config, ...]:
        found = ticket_configs.choices(kernel, self.machine.arch, self.itemsize, regular)
        if not found:
            raise RuntimeError(f"every configuration of {kernel} is excluded on sm_{self.machine.arch}")
        return found

    def regular(self, side: Side, *rows: Tensor) -> bool:
        """Whether all that is loaded comes in whole 16-byte pieces, as Triton sees it."""
        even = all(t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in rows)
        aligned = all(t.data_ptr() % 16 == 0 for t in (*rows, self.values))
        return even and aligned and side.regular(self.itemsize)

    def tall(self, kernel: str, side: Side, regular: bool, most: int, gelu: bool = False) -> tuple[Config, ...]:
        """The configurations of a product's kernel for blocks of this side, no higher than ``most``."""
        height = ticket_configs.height(side.own, self.itemsize, regular, most)
        return self.choices(f"{kernel}{height}{'_gelu' * (gelu and height == 128)}", regular)

    def multiply(
        self, x: Tensor, y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str, *, columns: bool
    ) -> None:
        """y = act(x W^T + b), or with ``columns`` act(x W + b)."""
        side, (tokens, width), out = self.columns if columns else self.rows, x.shape, y.shape[1]
        if tokens < FEW:
            (config,) = self.choices("ticket_few")
            step, kernel, rows = config.blocks["BLOCK_STEP"], ticket_forward.multiply_few, 4
        else:
            gelu = activation == "gelu"
            # Numbers that are stored one by one take registers, and so does gelu.
            most = 128 if out % 16 == 0 else 32 if gelu else 64
            config = choose(
                self.tall("ticket_multiply", side, self.regular(side, x), most, gelu),
                functools.partial(_programs, side, tokens),
                self.machine.multiprocessors * 3 // 4,
            )
            step, kernel, rows = config.blocks["BLOCK_K"], ticket_forward.multiply, config.blocks["BLOCK_N"]
        height = config.blocks["BLOCK_M"]
        constants = side.constants(step, self.itemsize, width) | {"ACTIVATION": _ACTIVATIONS[activation]}
        if tokens >= FEW:
            piece = constants["PIECE"]
            constants["EVEN"] = constants["WHOLE"] and step <= piece == side.other and side.own % height == 0
        across = side.groups * cdiv(side.own, height)
        # A grid has less than 2^31 programs: more tokens take several launches.
        turn = max(((1 << 31) - 1) // across, 1) * rows
        for first in range(0, tokens, turn):
            part = slice(first, min(first + turn, tokens))
            launch(
                kernel, (across * cdiv(part.stop - first, rows),), config, x[part], self.values, self.index, bias,
                y[part], None if z is None else z[part], part.stop - first, *side.counts, *side.places, x.stride(0),
                width, out, **constants,
            )  # fmt: skip

    def derive(
        self, grad: Tensor, saved: Tensor | None, g: Tensor | None, dbias: Tensor | None, activation: str
    ) -> None:
        """g and its sum over the tokens, each where wanted."""
        (config,) = self.choices("ticket_derive")
        tokens, width = grad.shape
        step, across = config.blocks["BLOCK_N"], cdiv(width, config.blocks["BLOCK_M"])
        parts, each = _cut(tokens, step, _parts(across, self.machine.multiprocessors))
        sums = dbias
        if dbias is not None and parts > 1:
            sums = self.values.new_empty(parts, width, dtype=torch.float32)
        launch(
            ticket_backward.derive, (across, parts), config, grad, saved, g, sums, tokens, each, width, grad.stride(0),
            ACTIVATION=_ACTIVATIONS[activation],
        )  # fmt: skip
        if sums is not dbias:
            self.add(sums, dbias)

    def add(self, parted: Tensor, to: Tensor) -> None:
        """The sum of parts in their order."""
        (config,) = self.choices("ticket_add")
        grid = (cdiv(to.numel(), config.blocks["BLOCK_N"]),)
        launch(ticket_backward.add_parts, grid, config, parted, to, parted.shape[0], to.numel())

    def outer(self, g: Tensor, x: Tensor, dvalues: Tensor) -> None:
        """The gradient of the living blocks, in strips along the side that has more of them."""
        side = self.rows if self.rows.others >= self.columns.others else self.columns
        own, other = (x, g) if side.columns else (g, x)
        (config,) = self.tall("ticket_outer", side, self.regular(side, own, other), 128)
        blocks, tokens = config.blocks, g.shape[0]
        constants = side.constants(blocks["BLOCK_N"], self.itemsize, other.shape[1])
        joined = max(blocks["BLOCK_N"] // constants["PIECE"], 1)
        programs = side.groups * cdiv(side.own, blocks["BLOCK_M"]) * max(constants["PIECE"] // blocks["BLOCK_N"], 1)
        # How many strips there are is on the device: what an even distribution of the blocks would make.
        living = programs * cdiv(cdiv(side.blocks, side.groups), joined)
        room = max(_launch.SCRATCH_LIMIT // (4 * dvalues.numel()), 1)
        most = min(_parts(living, self.machine.multiprocessors), cdiv(tokens, _PART_TOKENS), room)
        parts, each = _cut(tokens, blocks["BLOCK_K"], most)
        to = dvalues if parts == 1 else dvalues.new_empty(parts, *dvalues.shape, dtype=torch.float32)
        launch(
            ticket_backward.outer_blocks, (programs * cdiv(side.others, joined), parts), config, own, other,
            self.index, to, tokens, each, dvalues.numel(), *side.counts, *side.places, own.stride(0), other.stride(0),
            own.shape[1], other.shape[1], **constants,
        )  # fmt: skip
        if parts > 1:
            self.add(to, dvalues)


def _programs(side: Side, tokens: int, blocks: dict[str, int]) -> int:
    """The programs of a product with these tiles; none if they were half empty."""
    tiles = cdiv(tokens, blocks["BLOCK_N"])
    full = tiles * blocks["BLOCK_N"] <= 1.5 * tokens
    return side.groups * cdiv(side.own, blocks["BLOCK_M"]) * tiles if full else 0


@functools.lru_cache(maxsize=256)
def _parts(programs: int, multiprocessors: int) -> int:
    """The parts that a sum over tokens is cut into: more only where multiprocessors are a tenth busier for it.

    By sizes and the device alone, so that a sum has the same order each time.
    """
    best, least = 1, float(cdiv(programs, multiprocessors))
    for parts in range(2, multiprocessors * _ROUNDS // programs + 1):
        time = cdiv(programs * parts, multiprocessors) / parts
        if time < 0.9 * least:
            best, least = parts, time
    return best


def _cut(tokens: int, step: int, most: int) -> tuple[int, int]:
    """(parts, tokens of a part), of which each but the last has as many, a multiple of ``step``."""
    each = cdiv(cdiv(tokens, most), step) * step
    return cdiv(tokens, each), each


# What the ahead-of-time cases are made of, by a name: dtype, block, tokens, the activation, and what of y, x (its
# gradient), v (that of the values) and b (that of the bias). Many tokens take the largest tiles, tens the smallest.
_AOT_CALLS: dict[str, tuple[torch.dtype, tuple[int, int], int, str, str]] = {
    "many-16-bfloat16": (torch.bfloat16, (16, 16), 65536, "gelu", "yxvb"),
    "many-8-bfloat16": (torch.bfloat16, (8, 8), 65536, "gelu", "yx"),
    "many-32-bfloat16": (torch.bfloat16, (32, 32), 65536, "gelu", "yxv"),
    "many-64-bfloat16": (torch.bfloat16, (64, 64), 65536, "gelu", "yxv"),
    "many-128-bfloat16": (torch.bfloat16, (128, 128), 65536, "gelu", "yxv"),
    "plain-128-bfloat16": (torch.bfloat16, (128, 128), 65536, "none", "y"),
    "thousands-128-bfloat16": (torch.bfloat16, (128, 128), 4096, "none", "x"),
    "thousand-128-bfloat16": (torch.bfloat16, (128, 128), 1024, "none", "y"),
    "tens-16-bfloat16": (torch.bfloat16, (16, 16), 33, "gelu", "yx"),
    "tens-32-bfloat16": (torch.bfloat16, (32, 32), 33, "gelu", "yxv"),
    "tens-64-bfloat16": (torch.bfloat16, (64, 64), 33, "gelu", "yx"),
    "tens-128-bfloat16": (torch.bfloat16, (128, 128), 33, "gelu", "yx"),
    "tens-plain-128-bfloat16": (torch.bfloat16, (128, 128), 33, "none", "y"),
    "few-32-bfloat16": (torch.bfloat16, (32, 32), 5, "gelu", "yxb"),
    "many-16-float32": (torch.float32, (16, 16), 65536, "gelu", "yv"),
    "many-32-float32": (torch.float32, (32, 32), 65536, "gelu", "xv"),
    "many-64-float32": (torch.float32, (64, 64), 65536, "gelu", "yxv"),
    "tens-64-float32": (torch.float32, (64, 64), 33, "gelu", "y"),
    "odd-bfloat16": (torch.bfloat16, (24, 20), 65536, "gelu", "yxv"),
}
_AOT_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


def aot_cases(archs: Sequence[int] = ARCHITECTURES) -> Iterator[AotCase]:
    """Every kernel in every configuration, as calls of :func:`forward` and :func:`backward` would compile it.

    The calls are made with tensors that have no memory, and their launches collected. Triton's interpreter must be off
    when this module is imported.

    Args:
        archs: the architectures.
    """
    known = set()
    for arch in archs:
        on = Machine(arch, _AOT_MULTIPROCESSORS[arch])
        for label, call in _AOT_CALLS.items():
            for case in cases(_aot_launches(on, *call), arch, label):
                if key(case) not in known:
                    known.add(key(case))
                    yield case


def _aot_launches(
    on: Machine, dtype: torch.dtype, block: tuple[int, int], tokens: int, activation: str, wanted: str
) -> list[Launch]:
    """The launches of a call that keeps z, with three tenths of the blocks alive."""
    out, width = (3070, 765) if block[0] % 8 or block[1] % 8 else (3072, 768)
    rows, columns = cdiv(out, block[0]), cdiv(width, block[1])
    nnz = rows * columns * 3 // 10

    def empty(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    none, x, y, values, bias = empty(0), empty(tokens, width), empty(tokens, out), empty(nnz, *block), empty(out)
    z = y if activation == "gelu" else none
    index = empty(2 * (rows + columns) + 2 + 3 * nnz, kind=torch.int32)
    gradients = [t if letter in wanted else none for letter, t in (("x", x), ("v", values), ("b", bias))]
    found = []
    # With what is excluded, which has to fail still, and without: what a call then takes in its place has to pass.
    for choice in (configs.with_excluded(), contextlib.nullcontext()):
        with choice, contextlib.suppress(RuntimeError), _launch.record(on) as launches:
            found.append(launches)
            if "y" in wanted:
                forward(x, values, index, bias, activation, y, z)
            backward(y, x, values, index, z, activation, *gradients)
    return [launch for launches in found for launch in launches]


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
