"""READ's recurrence as an op: schema, checks, autocast, fake kernels and autograd.

``pyeff::read_recurrence`` and ``pyeff::read_step`` check, cast and choose a backend. The ``reference`` is
differentiated by PyTorch; the kernels sit behind ``pyeff::read_forward`` and ``pyeff::read_backward``, which hold the
autograd formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _read_kernels as kernels
from pyeff.ops import _register
from pyeff.ops._calls import (
    autocast_dtype,
    cast,
    check_tensor,
    checked_number,
    plain,
    refuse_tangents,
    transform_of,
    wants_gradient,
)
from pyeff.ops._read_kernels import SAVE_GATES, SAVE_NOTHING, SAVE_STATES
from pyeff.reference.read import GATES, check_layers, check_options, split_state

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_WEIGHTS = (
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, Tensor? b_hh=None, *, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None"
)
_INNER = (
    "Tensor[] phi, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? h0, Tensor? c0"
)
_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    f"read_recurrence(Tensor[] phi, {_WEIGHTS}, Tensor? h0=None, Tensor? c0=None, str cell='gru', str norm='rms', "
    "float eps=1e-6, str reduce='mean', bool recompute=False, str backend='') -> Tensor"
)
_lib.define(
    f"read_step(Tensor phi_i, Tensor? h, Tensor? c, {_WEIGHTS}, str cell='gru', str norm='rms', float eps=1e-6, "
    "str backend='') -> (Tensor, Tensor)"
)
_lib.define(
    f"read_forward({_INNER}, str cell, str norm, float eps, str reduce, int save, str backend) -> "
    "(Tensor out, Tensor c_last, Tensor h, Tensor c, Tensor gates, Tensor stats)"
)
_lib.define(
    f"read_backward(Tensor? grad_out, Tensor? grad_c, {_INNER}, Tensor h, Tensor c, Tensor gates, Tensor stats, "
    "str cell, str norm, float eps, str reduce, bool[] needs_phi, bool[] needs, str backend) -> "
    "(Tensor dphi, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dnorm_weight, Tensor dnorm_bias, "
    "Tensor dh0, Tensor dc0)"
)


def read_recurrence(
    phi: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    cell: str = "gru",
    norm: str = "rms",
    eps: float = 1e-6,
    reduce: str = "mean",
    recompute: bool = False,
) -> Tensor:
    """READ: a recurrent network over the depth of a frozen one, for every token on its own.

    ``x_i = norm(phi_i)``, ``h_i = Cell(x_i, h_{i-1})`` with one set of weights for all layers, and the mean of the h_i
    or the last. The norm's weight is folded into ``w_ih``, so that no gradient of width d is formed unless some phi
    asks for its own; nothing of width d is saved beyond references to ``phi``.

    Args:
        phi (sequence of Tensor): L tensors [*, d], the layer outputs, of any strides; they are not copied or stacked.
        w_ih (Tensor): [g r, d], gates stacked as in torch.nn.RNN (g = 1), GRU (3) or LSTM (4).
        w_hh (Tensor): [g r, r].
        b_ih (Tensor, optional), b_hh (Tensor, optional): [g r]. Default: no bias.
        norm_weight (Tensor, optional), norm_bias (Tensor, optional): [d]. A bias belongs to the layer norm only.
        h0 (Tensor, optional), c0 (Tensor, optional): [*, r], the first state; c0 belongs to the LSTM. Default: zeros.
        cell (str): ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        norm (str): ``"rms"``, ``"layer"`` or ``"none"``, over d, with statistics in at least float32.
        eps (float): added to the mean square (or variance).
        reduce (str): ``"mean"`` over the layers or ``"last"``.
        recompute (bool): compute the gates again in the backward instead of saving them: 4 r numbers a token and layer
            less for GRU and LSTM, for the time of one more forward.

    Returns:
        Tensor: [*, r], in the dtype of the weights.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown option, or an option that cannot
            apply.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    All tensors have one dtype, float64, float32, bfloat16 or float16 (on a CPU float16, and on a GPU float64, by the
    reference); under autocast the weights and
    states are cast to its dtype. Source: Nguyen et al., "READ: Recurrent Adaptation of Large Transformers", 2023, arXiv
    2305.15348, section 3.

    Example:
        >>> import torch, pyeff
        >>> phi = [torch.randn(2, 5, 16) for _ in range(3)]
        >>> gru = torch.nn.GRU(16, 8)
        >>> out = pyeff.ops.read_recurrence(phi, gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
        >>> out.shape
        torch.Size([2, 5, 8])
        >>> out.sum().backward()
    """
    if not isinstance(phi, Sequence | Tensor) or isinstance(phi, str) or (isinstance(phi, Tensor) and phi.dim() == 0):
        found = "a tensor of no dimension" if isinstance(phi, Tensor) else f"a {type(phi).__name__}"
        raise ValueError(f"read_recurrence: phi is {found}, expected a sequence of tensors [*, d]")
    phi = list(phi)
    _check_types(
        "read_recurrence", phi, w_ih, w_hh, b_ih=b_ih, b_hh=b_hh, norm_weight=norm_weight, norm_bias=norm_bias,
        h0=h0, c0=c0,
    )  # fmt: skip
    if not isinstance(recompute, int) or recompute not in (False, True):
        raise ValueError(f"read_recurrence: recompute is {recompute!r}, expected False or True")
    tensors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "h0": h0, "c0": c0}
    options: dict[str, Any] = {
        "cell": cell, "norm": norm, "eps": checked_number("read_recurrence", "eps", eps), "reduce": reduce,
        "recompute": recompute, "backend": backends.current(),
    }  # fmt: skip
    if plain((*phi, w_ih, w_hh, b_ih, b_hh, *tensors.values())):
        return _recurrence(phi, w_ih, w_hh, b_ih, b_hh, **tensors, **options, past=True)
    return torch.ops.pyeff.read_recurrence(phi, w_ih, w_hh, b_ih, b_hh, **tensors, **options)


def read_step(
    phi_i: Tensor,
    state: reference.read.State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cell: str = "gru",
    norm: str = "rms",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """One layer of :func:`read_recurrence`, for inference that streams and keeps no layer output.

    Args:
        phi_i (Tensor): [*, d], one layer's output.
        state (None, Tensor or (Tensor, Tensor)): what the previous layer returned; None before the first.
        w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, cell, norm, eps: as in :func:`read_recurrence`.

    Returns:
        Tensor or (Tensor, Tensor): h [*, r], or (h, c) for the LSTM.

    Raises:
        ValueError, RuntimeError: as :func:`read_recurrence`.

    Example:
        >>> import torch, pyeff
        >>> lstm, state = torch.nn.LSTM(16, 8), None
        >>> for phi_i in torch.randn(3, 5, 16):
        ...     state = pyeff.ops.read_step(phi_i, state, lstm.weight_ih_l0, lstm.weight_hh_l0, cell="lstm")
        >>> state[0].shape
        torch.Size([5, 8])
    """
    h, c = split_state(state, cell)
    _check_types(
        "read_step", [phi_i], w_ih, w_hh, b_ih=b_ih, b_hh=b_hh, norm_weight=norm_weight, norm_bias=norm_bias
    )  # fmt: skip
    tensors = (phi_i, h, c, w_ih, w_hh, b_ih, b_hh)
    options: dict[str, Any] = {
        "norm_weight": norm_weight, "norm_bias": norm_bias, "cell": cell, "norm": norm,
        "eps": checked_number("read_step", "eps", eps), "backend": backends.current(),
    }  # fmt: skip
    if plain((*tensors, norm_weight, norm_bias)):
        h, c = _step(*tensors, **options, past=True)
    else:
        h, c = torch.ops.pyeff.read_step(*tensors, **options)
    return (h, c) if cell == "lstm" else h


def _phi_name(op: str, i: int) -> str:
    return "phi_i" if op == "read_step" else f"phi[{i}]"


def _check_types(op: str, phi: Sequence[Any], w_ih: object, w_hh: object, **optional: object) -> None:
    """That tensors are tensors. The dispatcher would name no item of phi, and let None pass for one."""
    for i, phi_i in enumerate(phi):
        if not isinstance(phi_i, Tensor):
            raise ValueError(f"{op}: {_phi_name(op, i)} is a {type(phi_i).__name__}, expected a tensor [*, d]")
    for name, t in (("w_ih", w_ih), ("w_hh", w_hh)):
        if not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} is a {type(t).__name__}, expected a tensor")
    for name, t in optional.items():
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} is a {type(t).__name__}, expected a tensor or None")


def _check(
    op, phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce="mean", phi_dtype=None,
):  # fmt: skip
    """Everything that can be wrong with a call, before anything is computed."""
    h_name, c_name = ("state (h)", "state (c)") if op == "read_step" else ("h0", "c0")
    check_options(op, cell, norm, eps, reduce, norm_weight, norm_bias, c0)
    check_layers(op, phi)
    if w_ih.dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise ValueError(f"{op}: w_ih is {w_ih.dtype}, expected one of {expected}")
    if w_hh.dim() != 2 or w_hh.shape[1] == 0 or w_hh.shape[0] != GATES[cell] * w_hh.shape[1]:
        raise ValueError(f"{op}: w_hh has shape {list(w_hh.shape)}, expected [{GATES[cell]} r, r] for {cell!r}")
    first = phi[0]
    if first.dim() == 0 or first.shape[-1] == 0:
        raise ValueError(f"{op}: {_phi_name(op, 0)} has shape {list(first.shape)}, expected [*, d] with d > 0")
    rank, width, lead = w_hh.shape[1], first.shape[-1], tuple(first.shape[:-1])
    gates = GATES[cell] * rank
    check_tensor(op, "w_ih", w_ih, (gates, width), w_ih)
    check_tensor(op, "w_hh", w_hh, (gates, rank), w_ih)
    for i, phi_i in enumerate(phi):
        check_tensor(op, _phi_name(op, i), phi_i, tuple(first.shape), w_ih, phi_dtype)
    for name, t, shape in (
        ("b_ih", b_ih, (gates,)), ("b_hh", b_hh, (gates,)), ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)), (h_name, h0, (*lead, rank)), (c_name, c0, (*lead, rank)),
    ):  # fmt: skip
        if t is not None:
            check_tensor(op, name, t, shape, w_ih)


def _prepare(
    op: str, phi: list[Tensor], rest: list[Any], backend: str, **options
) -> tuple[list[Tensor], list[Any], str]:
    """Casts and checks the tensors of a call, and chooses its backend."""
    _check_types(op, phi, *rest[:2])
    dtype, transform = autocast_dtype(rest[0].device), transform_of([*rest, *phi])
    if dtype is None:
        _check(op, phi, *rest, **options)
        return phi, rest, _choose(op, rest, backend, transform, options["cell"])
    rest = cast(rest, dtype)
    chosen = _choose(op, rest, backend, transform, options["cell"])
    # The kernels round a float32 phi as they pack it: no copy is made, and none is kept for the backward.
    if chosen != "reference" and dtype == rest[0].dtype != torch.float32 and all(t.dtype == torch.float32 for t in phi):
        options["phi_dtype"] = torch.float32
    else:
        phi = cast(phi, dtype)
    _check(op, phi, *rest, **options)
    return phi, rest, chosen


def _choose(op: str, rest: list[Any], backend: str, transform: str, cell: str) -> str:
    w_ih, w_hh = rest[:2]
    # A weight of a wrong shape is refused by the checks that follow.
    rank = w_hh.shape[-1] if w_hh.dim() else 0
    prefer = kernels.prefer(w_ih.device, w_ih.dtype, cell, rank)
    return backends.choose(op, w_ih.device, w_ih.dtype, backend, transform, prefer)


def _save_mode(tensors: list[Tensor | None], recompute: bool) -> int:
    if not wants_gradient(tensors):
        return SAVE_NOTHING
    return SAVE_STATES if recompute else SAVE_GATES


def _recurrence(
    phi, w_ih, w_hh, b_ih=None, b_hh=None, *, norm_weight=None, norm_bias=None, h0=None, c0=None,
    cell="gru", norm="rms", eps=1e-6, reduce="mean", recompute=False, backend="", past=False,
):  # fmt: skip
    """``past``: past the dispatcher, as far as autograd lets it."""
    rest = [w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0]
    phi, rest, chosen = _prepare("read_recurrence", phi, rest, backend, cell=cell, norm=norm, eps=eps, reduce=reduce)
    w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0 = rest
    if chosen == "reference":
        return reference.read_recurrence(
            phi, w_ih, w_hh, b_ih, b_hh, norm_weight=norm_weight, norm_bias=norm_bias, h0=h0, c0=c0,
            cell=cell, norm=norm, eps=eps, reduce=reduce,
        )  # fmt: skip
    save = _save_mode([*phi, *rest], recompute)
    forward: Any = _forward if past and save == SAVE_NOTHING else torch.ops.pyeff.read_forward
    return forward(phi, *rest, cell, norm, eps, reduce, save, chosen)[0]


def _step(
    phi_i, h, c, w_ih, w_hh, b_ih=None, b_hh=None, *, norm_weight=None, norm_bias=None,
    cell="gru", norm="rms", eps=1e-6, backend="", past=False,
):  # fmt: skip
    rest = [w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h, c]
    (phi_i,), rest, chosen = _prepare("read_step", [phi_i], rest, backend, cell=cell, norm=norm, eps=eps)
    w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h, c = rest
    if chosen != "reference":
        save = _save_mode([phi_i, *rest], False)
        forward: Any = _forward if past and save == SAVE_NOTHING else torch.ops.pyeff.read_forward
        return forward([phi_i], *rest, cell, norm, eps, "last", save, chosen)[:2]
    state: Any = h
    if cell == "lstm" and not (h is None and c is None):
        zero = torch.zeros_like(h if h is not None else c)
        state = (zero if h is None else h, zero if c is None else c)
    state = reference.read_step(
        phi_i, state, w_ih, w_hh, b_ih, b_hh,
        norm_weight=norm_weight, norm_bias=norm_bias, cell=cell, norm=norm, eps=eps,
    )  # fmt: skip
    return state if cell == "lstm" else (state, state.new_empty(0))


def _forward(phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce, save, backend):
    rest = (w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0)
    refuse_tangents("read_recurrence", backend, [*rest, *phi])
    outputs = kernels.empty_forward(phi, w_ih, w_hh, cell, norm, save)
    if outputs[0].numel() > 0:
        kernels.forward(backend, phi, rest, (cell, norm, eps, reduce), outputs)
    return outputs


def _backward_kernels(
    grad_out, grad_c, phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, h, c, gates, stats,
    cell, norm, eps, reduce, needs_phi, needs, backend,
):  # fmt: skip
    rest = (w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0)
    refuse_tangents("read_recurrence", backend, [*rest, *phi, grad_out, grad_c])
    outputs = kernels.empty_backward(phi, w_ih, w_hh, needs_phi, needs)
    if phi[0].numel() == 0 or (grad_out is None and grad_c is None):
        return tuple(t.zero_() for t in outputs)
    saved = (h, c, gates, stats)
    kernels.backward(backend, (grad_out, grad_c), phi, rest, saved, (cell, norm, eps, reduce), needs_phi, outputs)
    return outputs


def _forward_fake(
    phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce, save, backend
):  # fmt: skip
    return kernels.empty_forward(phi, w_ih, w_hh, cell, norm, save)


def _backward_fake(
    grad_out, grad_c, phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, h, c, gates, stats,
    cell, norm, eps, reduce, needs_phi, needs, backend,
):  # fmt: skip
    return kernels.empty_backward(phi, w_ih, w_hh, needs_phi, needs)


def _setup_context(ctx, inputs, output) -> None:
    phi, *rest, cell, norm, eps, reduce, save, backend = inputs
    if save == SAVE_NOTHING:
        raise RuntimeError("read_forward: save is 0, expected 1 or 2 where a gradient is wanted")
    saved = output[2:]
    ctx.save_for_backward(*phi, *rest, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.layers, ctx.options, ctx.backend = len(phi), (cell, norm, eps, reduce), backend


def _backward(ctx, grad_out, grad_c, *unused):
    tensors = ctx.saved_tensors
    if ctx.options[0] != "lstm":
        grad_c = None  # c_last is empty; compiled graphs pass an empty gradient for it nevertheless
    phi, rest = list(tensors[: ctx.layers]), tensors[ctx.layers :]
    needs_phi, needs = list(ctx.needs_input_grad[0]), list(ctx.needs_input_grad[1:9])
    dphi, *grads = torch.ops.pyeff.read_backward(
        grad_out, grad_c, phi, *rest, *ctx.options, needs_phi, needs, ctx.backend
    )
    layers = iter(dphi.unbind(0)) if any(needs_phi) else iter(())
    return (
        [next(layers).to(t.dtype) if need else None for t, need in zip(phi, needs_phi, strict=True)],
        *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
        *(None,) * 6,
    )


_register.composite(_lib, "read_recurrence", _recurrence)
_register.composite(_lib, "read_step", _step)
_register.kernels(_lib, "read_forward", _forward, _forward_fake, _backward, _setup_context)
_register.kernels(_lib, "read_backward", _backward_kernels, _backward_fake)
_register.no_double_backward(_lib, "read_backward", "read_recurrence")
