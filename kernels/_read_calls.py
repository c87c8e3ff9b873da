"""READ's launches one by one: what each kernel of one call is given, and with which tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from . import _launch, configs, read_backward, read_forward, read_weights
from ._launch import cdiv, given, launch
from ._tile import CENTRED, GRU, LAYER, LSTM, NONE, RMS, RNN
from .configs import Config, choose

CELLS = {"rnn": RNN.value, "gru": GRU.value, "lstm": LSTM.value}
NORMS = {"none": NONE.value, "rms": RMS.value, "layer": LAYER.value}
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Place:
    """A run of tokens, and the [L, room, stride] buffer that holds their gates or inputs from token ``origin`` on."""

    def __init__(self, first: int, count: int, buffer: Tensor | None, origin: int, room: int, stride: int) -> None:
        self.first, self.count, self.buffer = first, count, buffer
        self.origin, self.room, self.stride = origin, room, stride


class Problem:
    """One call's tensors and sizes. ``gates`` is g r, ``wide`` the columns of da, ``itemsize`` bytes of T."""

    def __init__(
        self, phi: Sequence[Tensor], dphi: Sequence[Tensor] | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, h0: Tensor | None,
        c0: Tensor | None, cell: str, norm: str, eps: float, reduce: str,
    ) -> None:  # fmt: skip
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = w_ih, w_hh, given(b_ih), given(b_hh)
        self.norm_weight, self.norm_bias, self.h0, self.c0 = map(given, (norm_weight, norm_bias, h0, c0))
        self.cell, self.norm, self.eps, self.mean = CELLS[cell], NORMS[norm], float(eps), reduce == "mean"
        if norm == "layer" and phi[0].dtype == torch.float32:
            self.norm = CENTRED.value
        self.rank, self.width = w_hh.shape[1], w_ih.shape[1]
        self.gates, self.wide = w_ih.shape[0], self.rank * (1 if cell == "rnn" else 4)
        self.tokens, self.layers, self.itemsize = phi[0].numel() // self.width, len(phi), w_ih.element_size()
        self.machine = _launch.machine(w_ih.device)
        self.inputs = _launch.layers_of(phi, dphi, KINDS.__getitem__)
        if w_ih.numel() >= 1 << 31 or w_hh.numel() >= 1 << 31:
            raise ValueError("a weight has 2^31 elements or more, the Triton kernels index it by 32 bits")
        # Whether phi's rows, and those of a matrix beside them, are whole 16-byte pieces: as Triton sees it.
        self.regular = self.width % 16 == 0 and self.inputs.constants["ALIGNED"]
        # The input weights as the kernels multiply by them, once ``fold`` has made them.
        self.weight, self.bias, self.colsum = w_ih, None, None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch on the call's device, of T unless said otherwise."""
        return self.w_ih.new_empty(shape, dtype=dtype or self.w_ih.dtype)

    def tile(self, kernel: str, tokens: int = 0, others: int = 1, regular: bool = True) -> Config:
        """The tiles of a kernel that has ``others`` programs for each tile of tokens; the largest where 0 are named.

        Three quarters of the multiprocessors are enough: smaller tiles read the weights more often.
        """
        found = configs.configs(kernel, self.machine.arch, self.itemsize, regular)
        if not found:
            raise RuntimeError(f"every configuration of {kernel} is excluded on sm_{self.machine.arch}")
        if not tokens:
            return found[0]
        wanted = self.machine.multiprocessors * 3 // 4
        return choose(found, lambda blocks: cdiv(tokens, blocks["BLOCK_N"]) * others, wanted)

    def recurrent(self, kernel: str) -> Config:
        """The tiles of ``recur`` or ``reverse``; the same for all chunks, so that gates come out the same again."""
        return self.tile(kernel + "_lstm" * (self.cell == LSTM.value), self.tokens, regular=self.rank % 16 == 0)

    def fused(self) -> bool:
        """Whether the forward is one kernel: for the RNN, when its tiles of tokens occupy the device.

        A prediction, not a measurement: with g > 1 gates the accumulators of a fused tile become too narrow to feed
        the matrix units, and with few tiles only the product over all layers at once fills the device.
        """
        if self.cell != RNN.value or not self.regular or self.rank % 16:
            return False
        if not configs.configs("fused", self.machine.arch, self.itemsize):
            return False
        blocks = self.tile("fused").blocks
        return cdiv(self.tokens, blocks["BLOCK_N"]) * 4 >= self.machine.multiprocessors * 3

    def fold(self, bias: bool, weights: bool) -> None:
        """Writes the table of the layers and, as asked for, the folded weights and the bias."""
        config = self.tile("fold")
        folded = self.empty(self.gates, self.width) if weights and self.norm_weight is not None else None
        if bias:
            self.bias = self.empty(self.gates, dtype=torch.float32)
            if self.norm == LAYER.value:
                self.colsum = self.empty(self.gates, dtype=torch.float32)
        grid = (cdiv(self.gates, config.blocks["BLOCK_ROWS"]) if folded is not None or bias else 1,)
        for start, lines in self.inputs.batches():
            if start:
                launch(read_forward.describe, (1,), self.tile("describe"), self.inputs.table, lines, start, self.layers)
                continue
            launch(
                read_forward.fold, grid, config, self.inputs.table, lines, self.w_ih, self.norm_weight,
                self.norm_bias if bias else None, self.b_ih, self.b_hh, folded, self.bias, self.colsum, self.layers,
                self.gates, self.width, CELL=self.cell,
            )  # fmt: skip
        self.weight = self.w_ih if folded is None else folded

    def project(self, place: Place, stats: Tensor | None) -> None:
        """The input products of all layers, into the place's buffer."""
        wide = self.itemsize == 2 and self.inputs.constants["PHI"] == KINDS[torch.float32]
        config = self.tile("project_wide" if wide else "project", self.tokens, self.layers, self.regular)
        blocks = config.blocks
        tiles, columns = cdiv(place.count, blocks["BLOCK_N"]), cdiv(self.gates, blocks["BLOCK_M"])
        launch(
            read_forward.project, (columns * tiles * self.layers,), config, self.inputs.table, self.weight, self.bias,
            self.colsum, place.buffer, stats, place.first, place.count, self.tokens, self.layers, tiles, self.gates,
            self.width, place.origin, place.room, place.stride, self.eps,
            NORM=self.norm, EVEN_WIDTH=self.width % blocks["BLOCK_K"] == 0, **self.inputs.constants,
        )  # fmt: skip

    def recur(
        self, place: Place, h: Tensor, c: Tensor | None, total: Tensor | None, out: Tensor | None,
        c_last: Tensor | None, stats: Tensor | None, slots: int, c_slots: int, *, fused: bool, save: bool, replay: bool,
    ) -> None:  # fmt: skip
        """The recurrence; see ``read_forward.recur`` for ``fused``, ``save`` (the gates) and ``replay``."""
        config = self.tile("fused") if fused else self.recurrent("recur")
        blocks = config.blocks
        tiles = cdiv(place.count, blocks["BLOCK_N"])
        inputs = (self.inputs.table, self.weight, self.bias, self.colsum, stats) if fused else (None,) * 5
        constants = self.inputs.constants if fused else {"PHI": KINDS[self.w_ih.dtype], "ALIGNED": True, "FLAT": True}
        launch(
            read_forward.recur, (tiles * self.layers if replay else tiles,), config, place.buffer, self.w_hh,
            self.b_hh if self.cell == GRU.value else None, self.h0, None if replay else self.c0, h, c, total, out,
            c_last, *inputs, place.first, place.count, self.tokens, self.layers, tiles, self.rank,
            self.width if fused else 0, slots, c_slots, place.origin, place.room, self.eps,
            CELL=self.cell, FUSED=fused, REPLAY=replay, SAVE_GATES=save, MEAN=self.mean,
            NORM=self.norm if fused else NONE.value,
            EVEN_WIDTH=fused and self.width % blocks["BLOCK_K"] == 0,
            EVEN_RANK=self.rank % blocks["BLOCK_K"] == 0, **constants,
        )  # fmt: skip

    def reverse(
        self, place: Place, da: Tensor, grad_out: Tensor | None, grad_c: Tensor | None, h: Tensor, c: Tensor | None,
        carry: Tensor | None, sums: Tensor | None, dh0: Tensor | None, dc0: Tensor | None,
    ) -> None:  # fmt: skip
        """The recurrence in reverse; the place holds the gates, ``da`` [L, count, wide] what comes out."""
        config = self.recurrent("reverse")
        blocks = config.blocks
        launch(
            read_backward.reverse, (cdiv(place.count, blocks["BLOCK_N"]),), config, grad_out, grad_c, self.w_hh,
            self.h0, self.c0, h, c, place.buffer, da, carry, sums, dh0, dc0, place.first, place.count, self.tokens,
            self.layers, self.rank, place.count, place.origin, place.room, 1.0 / self.layers if self.mean else 1.0,
            CELL=self.cell, MEAN=self.mean, EVEN_DEPTH=self.gates % blocks["BLOCK_K"] == 0,
        )  # fmt: skip

    def layer_gradient(self, da: Tensor, stats: Tensor | None, first: int, count: int) -> None:
        """The gradients of the layers that want one."""
        kernel = "layer_gradient" + "_mean" * (self.norm >= LAYER.value)
        config = self.tile(kernel, self.tokens, self.layers, self.regular and self.rank % 16 == 0)
        blocks = config.blocks
        tiles = cdiv(count, blocks["BLOCK_N"])
        launch(
            read_backward.layer_gradient, (tiles * self.layers,), config, self.inputs.table, da, self.weight, stats,
            first, count, self.tokens, self.layers, tiles, count, self.rank, self.width,
            CELL=self.cell, NORM=self.norm, EVEN_DEPTH=self.gates % blocks["BLOCK_K"] == 0, **self.inputs.constants,
        )  # fmt: skip


# The rounds of programs that a split product is cut into, at most, and the tokens that a split is worth.
ROUNDS, SPLIT_TOKENS = 4, 256


@functools.lru_cache(maxsize=256)
def splits(tiles: int, layers: int, tokens: int, multiprocessors: int) -> tuple[int, int]:
    """How a sum over layers and tokens is cut: (layers of a split, parts of the tokens).

    The cut that leaves the fewest multiprocessors idle in the last round, the coarsest of these; it depends on sizes
    and on the device alone, so that a sum has the same order each time.
    """
    best, found = 0.0, (layers, 1)
    for each in range(layers, 0, -1):
        for parts in range(1, max(tokens // SPLIT_TOKENS, 1) + 1):
            programs = tiles * cdiv(layers, each) * parts
            rounds = cdiv(programs, multiprocessors)
            if rounds > ROUNDS:
                break
            # The slowest split sets the pace.
            longest = each * cdiv(tokens, parts)
            used = tiles * layers * tokens / (rounds * multiprocessors * longest)
            if used > best * 1.02:
                best, found = used, (each, parts)
    return found


class Outer:
    """One weight's long product: partial sums over the chunks of tokens, each in its split's place."""

    def __init__(self, p: Problem, state: bool, tokens: int) -> None:
        self.p, self.state, self.columns = p, state, p.rank if state else p.width
        self.first_layer = 1 if state and p.h0 is None else 0
        self.config = p.tile("outer", regular=p.rank % 16 == 0 and (state or p.regular))
        blocks = self.config.blocks
        self.tiles = cdiv(p.gates, blocks["BLOCK_M"]) * cdiv(self.columns, blocks["BLOCK_N"])
        layers = p.layers - self.first_layer
        self.layers_each, self.parts = splits(self.tiles, layers, tokens, p.machine.multiprocessors)
        self.splits = cdiv(layers, self.layers_each) * self.parts
        self.partial = p.empty(self.splits, p.gates, self.columns, dtype=torch.float32)

    def add(self, da: Tensor, h: Tensor, stats: Tensor | None, first: int, count: int) -> None:
        p, step = self.p, self.config.blocks["BLOCK_K"]
        each = math.ceil(count / self.parts / step) * step
        state, constants = self.state, p.inputs.constants
        launch(
            read_weights.outer, (self.tiles, self.splits), self.config, da, None if state else p.inputs.table,
            None if state else stats, h if state else None, p.h0 if state else None, self.partial, int(first > 0),
            first, count, p.tokens, p.layers, count, self.first_layer, self.parts, self.layers_each, each, p.rank,
            self.columns, CELL=p.cell, STATE=state, NORM=NONE.value if state else p.norm,
            **({"PHI": KINDS[da.dtype], "ALIGNED": True, "FLAT": True} if state else constants),
        )  # fmt: skip


def finish(
    p: Problem, x: Outer | None, h: Outer | None, sums: Tensor | None, dw_ih: Tensor | None, dw_hh: Tensor | None,
    db_ih: Tensor | None, db_hh: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None,
) -> None:  # fmt: skip
    """The weights' gradients from the partial sums."""
    db = None
    if sums is not None:
        config, db = p.tile("reduce_bias"), p.empty(p.wide, dtype=torch.float32)
        launch(
            read_weights.reduce_bias, (cdiv(p.wide, config.blocks["BLOCK_N"]),), config, sums, db, db_ih, db_hh,
            sums.shape[0], p.rank, CELL=p.cell,
        )  # fmt: skip
    config = p.tile("reduce_weight")
    tiles = cdiv(p.gates, config.blocks["BLOCK_M"])
    if x is not None or dbeta is not None:
        gamma_tiles, beta_tiles = (
            None if t is None else p.empty(tiles, p.width, dtype=torch.float32) for t in (dgamma, dbeta)
        )
        launch(
            read_weights.reduce_weight, (tiles, cdiv(p.width, config.blocks["BLOCK_N"])), config,
            None if x is None else x.partial, db, p.w_ih, p.norm_weight, p.norm_bias, dw_ih, gamma_tiles, beta_tiles,
            0 if x is None else x.splits, p.rank, p.width, CELL=p.cell, ROWS_OF_X=True,
        )  # fmt: skip
        if dgamma is not None or dbeta is not None:
            columns = p.tile("reduce_norm")
            launch(
                read_weights.reduce_norm, (cdiv(p.width, columns.blocks["BLOCK_N"]),), columns, gamma_tiles,
                beta_tiles, dgamma, dbeta, tiles, p.width,
            )  # fmt: skip
    if dw_hh is None:
        return
    if h is None:
        dw_hh.zero_()  # one layer and no first state: nothing was multiplied by these weights
        return
    launch(
        read_weights.reduce_weight, (tiles, cdiv(p.rank, config.blocks["BLOCK_N"])), config, h.partial, None, p.w_hh,
        None, None, dw_hh, None, None, h.splits, p.rank, p.rank, CELL=p.cell, ROWS_OF_X=False,
    )  # fmt: skip
