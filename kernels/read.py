"""READ's recurrence in Triton, forward and backward: the launches. The kernels are in read_forward.py,
read_backward.py and read_weights.py, their tiles in configs.py.

Called by pyeff/ops, which has checked its user's arguments and allocated the outputs. Nothing here waits for the
device, reads a number from it or copies one to it, and all scratch comes from torch's allocator: a call can be captured
in a CUDA graph. Source: Nguyen et al., 2023, arXiv 2305.15348, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from . import _launch, configs
from ._aot import AotCase, cases, key
from ._launch import Launch, Machine, cdiv, given
from ._read_calls import Outer, Place, Problem, finish
from ._tile import LSTM, RNN
from .configs import ARCHITECTURES


def forward(
    phi: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, h0: Tensor | None, c0: Tensor | None,
    cell: str, norm: str, eps: float, reduce: str,
    out: Tensor, c_last: Tensor, h: Tensor, c: Tensor, gates: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    """Fills the outputs of READ's forward. A tensor without elements is an output that is not wanted.

    Args:
        phi: L tensors [*, d] of one dtype: T, or float32 beside a T of 16 bits; rows of at most two leading strides.
        w_ih [g r, d], w_hh [g r, r], b_ih, b_hh [g r], norm_weight, norm_bias [d], h0, c0 [*, r]: T, contiguous.
        cell, norm, eps, reduce: the options of ``pyeff.ops.read_recurrence``.
        out, c_last (LSTM): [*, r] T. h, c (LSTM): [L, *, r] T.
        gates: [L, *, 4 r] T: r, z, n, R_n h + b_hn of the GRU; i, f, g, o of the LSTM.
        stats: [1 or 2, L, *] float32: 1/sqrt(mean square + eps), and the mean for the layer norm.

    Raises:
        ValueError: phi has more strides than two.
    """
    p = Problem(phi, None, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce)
    if p.tokens == 0:
        return
    states, cells, ends, kept, stats = map(given, (h, c, c_last, gates, stats))
    with _launch.on(w_ih.device):
        p.fold(bias=True, weights=True)
        slots = c_slots = p.layers
        total = None
        if states is None:
            states, slots = p.empty(2, p.tokens, p.rank), 2
            if p.mean:
                total = out if out.dtype == torch.float32 else p.empty(p.tokens, p.rank, dtype=torch.float32)
        if p.cell == LSTM.value and cells is None:
            # c is carried in place: where it ends is where it is wanted.
            cells, c_slots, ends = p.empty(p.tokens, p.rank) if ends is None else ends, 1, None
        fused = p.fused()
        scratch = 0 if fused or kept is not None else p.layers * p.gates * p.itemsize
        for first, count in _launch.chunks(p.tokens, scratch):
            if kept is not None:
                place = Place(first, count, kept, 0, p.tokens, p.wide)
            else:
                buffer = None if fused else p.empty(p.layers, count, p.gates)
                place = Place(first, count, buffer, first, count, p.gates)
            if not fused:
                p.project(place, stats)
            p.recur(
                place, states, cells, total, out, ends, stats, slots, c_slots,
                fused=fused, save=kept is not None, replay=False,
            )  # fmt: skip


def backward(
    grad_out: Tensor | None, grad_c: Tensor | None,
    phi: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, h0: Tensor | None, c0: Tensor | None,
    h: Tensor, c: Tensor, gates: Tensor, stats: Tensor, cell: str, norm: str, eps: float, reduce: str,
    dphi: Sequence[Tensor], dw_ih: Tensor, dw_hh: Tensor, db_ih: Tensor, db_hh: Tensor,
    dnorm_weight: Tensor, dnorm_bias: Tensor, dh0: Tensor, dc0: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients of READ. A tensor without elements is a gradient that is not wanted; what only it needs is
    not computed.

    Args:
        grad_out, grad_c: [*, r] T, the gradients of ``out`` and ``c_last``, or None.
        phi .. c0 and the options: as given to :func:`forward`. h, c, gates, stats: as it left them; gates without
            elements are computed again.
        dphi: L tensors [*, d] T. dw_ih .. dc0: as the tensors they belong to.

    Raises:
        ValueError: phi has more strides than two.
    """
    p = Problem(phi, dphi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce)
    grad_out, grad_c, c, kept, stats = map(given, (grad_out, grad_c, c, gates, stats))
    weights = [given(t) for t in (dw_ih, dw_hh, db_ih, db_hh, dnorm_weight, dnorm_bias)]
    into_w, into_r, into_b, into_b_hh, into_gamma, into_beta = (t is not None for t in weights)
    into_phi, into_x = any(t.numel() for t in dphi), into_w or into_gamma
    # W beta is part of the bias, so that the norm's bias brings the bias' gradient into that of W.
    into_sums = into_b or into_b_hh or into_beta or (into_w and p.norm_bias is not None)
    again = p.cell != RNN.value and kept is None
    with _launch.on(w_ih.device):
        if again or into_phi or into_x:
            p.fold(bias=again, weights=again or into_phi)
        tile = p.recurrent("reverse").blocks["BLOCK_N"]
        sums = p.empty(cdiv(p.tokens, tile), p.wide, dtype=torch.float32) if into_sums else None
        carry = None if p.cell == RNN.value else p.empty(p.tokens, p.rank, dtype=torch.float32)
        runs = list(_launch.chunks(p.tokens, p.layers * p.wide * p.itemsize * (2 if again else 1)))
        x_part = Outer(p, False, runs[0][1]) if into_x else None
        h_part = Outer(p, True, runs[0][1]) if into_r and (p.layers > 1 or p.h0 is not None) else None
        for first, count in runs:
            place = Place(first, count, kept, 0, p.tokens, p.wide)
            if again:
                place = Place(first, count, p.empty(p.layers, count, p.wide), first, count, p.wide)
                p.project(place, None)
                p.recur(
                    place, h, None, None, None, None, None, p.layers, 1, fused=False, save=True, replay=True
                )  # fmt: skip
            da = p.empty(p.layers, count, p.wide)
            p.reverse(place, da, grad_out, grad_c, h, c, carry, sums, given(dh0), given(dc0))
            if into_phi:
                p.layer_gradient(da, stats, first, count)
            for part in (x_part, h_part):
                if part is not None:
                    part.add(da, h, stats, first, count)
        finish(p, x_part, h_part, sums, *weights)


# What the ahead-of-time cases are made of: the largest and the smallest tiles, and sizes that divide by nothing.
_AOT_SIZES = {"large": (65536, 768, 256), "middle": (8192, 768, 256), "few": (33, 768, 256), "odd": (65536, 769, 40)}
_AOT_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


def aot_cases(archs: Sequence[int] = ARCHITECTURES, *, every: bool = False) -> Iterator[AotCase]:
    """Every kernel in every configuration, as calls of :func:`forward` and :func:`backward` would compile it.

    The calls are made with tensors that have no memory, and their launches collected. Triton's interpreter must be off
    when this module is imported.

    Args:
        archs: the architectures.
        every: all combinations of options, not only those that lead to different products.
    """
    known = set()
    for arch in archs:
        on = Machine(arch, _AOT_MULTIPROCESSORS[arch])
        for size, cell, norm, dtype, wide in product(
            _AOT_SIZES, ("gru", "lstm", "rnn"), ("rms", "layer", "none"),
            (torch.bfloat16, torch.float32, torch.float16), (False, True),
        ):  # fmt: skip
            # The tiles of few tokens are there for every cell in 16 bits, those of float32 hardly differ.
            usual = norm == "rms" and not wide and size != "odd" and (
                dtype == torch.bfloat16 or (cell == "gru" and dtype == torch.float32)
            )  # fmt: skip
            telling = size == "large" and dtype == torch.bfloat16 and not wide
            special = (cell, norm, dtype) in (
                ("rnn", "rms", torch.float32), ("gru", "layer", torch.bfloat16), ("lstm", "layer", torch.float32),
            ) and size in (("large", "odd", "few") if cell == "lstm" else ("large", "odd"))  # fmt: skip
            if not (every or usual or telling or special) or (wide and dtype == torch.float32):
                continue
            label = f"{size}-{cell}-{norm}-{str(dtype).removeprefix('torch.')}{'-wide' if wide else ''}"
            for case in cases(_aot_launches(on, *_AOT_SIZES[size], cell, norm, dtype, wide), arch, label):
                if key(case) not in known:
                    known.add(key(case))
                    yield case


def _aot_launches(
    on: Machine, tokens: int, width: int, rank: int, cell: str, norm: str, dtype: torch.dtype, wide: bool
) -> list[Launch]:
    """The launches of inference, training and the backward, with gates saved and computed again."""
    layers, gates = 12, rank * {"rnn": 1, "gru": 3, "lstm": 4}[cell]

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    lstm, state = cell == "lstm", (tokens, rank)
    phi = [empty(tokens, width, kind=torch.float32 if wide else dtype) for _ in range(layers)]
    weights = (empty(gates, width), empty(gates, rank), empty(gates), empty(gates))
    affine = (None if norm == "none" else empty(width), empty(width) if norm == "layer" else None)
    inputs = (*weights, *affine, empty(*state), empty(*state) if lstm else None)
    options = (cell, norm, 1e-6, "mean")
    none = empty(0)
    h, c = empty(layers, *state), empty(layers, *state) if lstm else none
    kept = none if cell == "rnn" else empty(layers, tokens, 4 * rank)
    stats = empty(0 if norm == "none" else 2, layers, tokens, kind=torch.float32)
    found = []
    # With what is excluded, which has to fail still, and without: what a call then takes in its place has to pass.
    for choice in (configs.with_excluded(), contextlib.nullcontext()):
        with choice, contextlib.suppress(RuntimeError), _launch.record(on) as launches:
            found.append(launches)
            forward(phi, *inputs, *options, empty(*state), empty(*state) if lstm else none, none, none, none, none)
            forward(phi, *inputs, *options, empty(*state), empty(*state) if lstm else none, h, c, kept, stats)
            for saved in (kept, none):
                gradients = [none if t is None else torch.empty_like(t) for t in inputs]
                dphi = [torch.empty_like(t, dtype=dtype) for t in phi]
                backward(
                    empty(*state),
                    empty(*state) if lstm else None,
                    phi,
                    *inputs,
                    h,
                    c,
                    saved,
                    stats,
                    *options,
                    dphi,
                    *gradients,
                )
    return [launch for launches in found for launch in launches]
