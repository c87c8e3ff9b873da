"""The linear layer of a ticket as an op: schema, checks, autocast, fake kernels and autograd.

``pyeff::ticket_linear`` checks, casts and chooses a backend. The ``reference`` is differentiated by PyTorch; the
kernels sit behind ``pyeff::ticket_forward`` and ``pyeff::ticket_backward``, which hold the autograd formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff import backends, reference
from pyeff.ops import _register
from pyeff.ops import _ticket_kernels as kernels
from pyeff.ops._calls import autocast_dtype, cast, check_tensor, plain, refuse_tangents, transform_of, wants_gradient
from pyeff.plans import Ticket
from pyeff.reference.ticket import check_activation

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_lib = torch.library.Library("pyeff", "FRAGMENT")
_lib.define(
    "ticket_linear(Tensor x, Tensor values, Tensor index, SymInt out_features, Tensor? bias=None, *, "
    "str? activation=None, str backend='') -> Tensor"
)
_lib.define(
    "ticket_forward(Tensor x, Tensor values, Tensor index, SymInt out_features, Tensor? bias, str activation, "
    "bool keep, str backend) -> (Tensor y, Tensor z)"
)
_lib.define(
    "ticket_backward(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor saved, bool bias, str activation, "
    "bool[] needs, str backend) -> (Tensor dx, Tensor dvalues, Tensor dbias)"
)


def ticket_linear(
    x: Tensor, values: Tensor, ticket: Ticket, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``act(x W^T + b)`` for a weight of which only the blocks of a ticket are there.

    The gradient of ``x`` goes through the ticket's index by columns, from the same values; that of ``values`` is formed
    on living blocks only. Bias and activation are part of the kernels. Saved for the backward are references to ``x``
    and ``values``, the output for relu, and for gelu what the activation was taken of.

    Args:
        x (Tensor): [*, in], of any strides.
        values (Tensor): [nnz, bo, bi], the living blocks in the ticket's order.
        ticket (Ticket): which blocks of [out, in] they are.
        bias (Tensor, optional): [out]. Default: none.
        activation (str, optional): ``"relu"``, ``"gelu"`` (by the error function) or None.

    Returns:
        Tensor: [*, out]. What the blocks of a row do not select of ``x`` plays no part in that row's output, whatever
        it holds; what a block holds past the end of the weight counts nowhere, and its gradient is zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an unknown activation.
        RuntimeError: a backend was named that cannot serve the call; or a double backward through the kernels.

    All tensors have one dtype, float64, float32, bfloat16 or float16 (on a CPU float16, and on a GPU float64, by the
    reference), sums are in at least float32; under autocast they are cast to its dtype. Source: Chen et al., "The
    Lottery Ticket Hypothesis for Pre-trained BERT Networks", 2020, arXiv 2007.12223, section 3, for masks of blocks.

    Example:
        >>> import torch, pyeff
        >>> weight, x = torch.randn(64, 32), torch.randn(2, 5, 32, requires_grad=True)
        >>> ticket = pyeff.Ticket.from_blocks(torch.rand(4, 2) < 0.5, (64, 32), 16)
        >>> y = pyeff.ops.ticket_linear(x, ticket.gather(weight), ticket, activation="gelu")
        >>> y.shape
        torch.Size([2, 5, 64])
        >>> y.sum().backward()
    """
    if not isinstance(ticket, Ticket):
        raise ValueError(f"ticket_linear: ticket is a {type(ticket).__name__}, expected a pyeff.Ticket")
    _check_types(x, values, bias)
    if x.dim() == 0 or x.shape[-1] != ticket.shape[1]:
        raise ValueError(f"ticket_linear: x has shape {list(x.shape)}, expected [*, {ticket.shape[1]}] for {ticket!r}")
    if tuple(values.shape) != (ticket.nnz, *ticket.block):
        expected = [ticket.nnz, *ticket.block]
        raise ValueError(f"ticket_linear: values has shape {list(values.shape)}, expected {expected} for {ticket!r}")
    given, backend = (x, values, ticket.index, ticket.shape[0], bias), backends.current()
    if plain((x, values, ticket.index, bias)):
        return _linear(*given, activation=activation, backend=backend, past=True)
    return torch.ops.pyeff.ticket_linear(*given, activation=activation, backend=backend)


def _check_types(x: object, values: object, bias: object) -> None:
    for name, t in (("x", x), ("values", values)):
        if not isinstance(t, Tensor):
            raise ValueError(f"ticket_linear: {name} is a {type(t).__name__}, expected a tensor")
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"ticket_linear: bias is a {type(bias).__name__}, expected a tensor or None")


def _check(x: Tensor, values: Tensor, index: Tensor, out: int, bias: Tensor | None, activation: str | None) -> None:
    """Everything that can be wrong with a call but the positions in the index, before anything is computed."""
    op = "ticket_linear"
    check_activation(op, activation)
    if values.dtype not in DTYPES:
        raise ValueError(f"{op}: values is {values.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if values.dim() != 3 or values.shape[1] == 0 or values.shape[2] == 0:
        raise ValueError(f"{op}: values has shape {list(values.shape)}, expected [nnz, bo, bi]")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [*, in] with in > 0")
    if out < 1:
        raise ValueError(f"{op}: out_features is {out}, expected at least 1")
    check_tensor(op, "values", values, tuple(values.shape), values, as_what="values")
    check_tensor(op, "x", x, tuple(x.shape), values, as_what="values")
    rows, columns = kernels.grid(values, out, x.shape[-1])
    length = 2 * rows + 2 * columns + 2 + 3 * values.shape[0]
    check_tensor(op, "index", index, (length,), values, torch.int32, "an index is")
    if bias is not None:
        check_tensor(op, "bias", bias, (out,), values, as_what="values")


def _linear(x, values, index, out_features, bias=None, *, activation=None, backend="", past=False):
    """``past``: past the dispatcher, as far as autograd lets it."""
    _check_types(x, values, bias)
    dtype, transform = autocast_dtype(values.device), transform_of([values, x, bias])
    if dtype is not None:
        x, values, bias = cast([x, values, bias], dtype)
    _check(x, values, index, out_features, bias, activation)
    prefer = kernels.prefer(values.device, values.dtype, values.shape)
    chosen = backends.choose("ticket_linear", values.device, values.dtype, backend, transform, prefer)
    activation = activation or "none"
    if chosen == "reference":
        kernels.check_positions(values, index, out_features, x.shape[-1])
        return reference.ticket.linear(x, values, index, out_features, bias, activation)
    differentiable = wants_gradient((x, values, bias))
    keep = differentiable and activation == "gelu"
    forward = _forward if past and not differentiable else torch.ops.pyeff.ticket_forward
    return forward(x, values, index, out_features, bias, activation, keep, chosen)[0]


def _forward(x, values, index, out_features, bias, activation, keep, backend):
    refuse_tangents("ticket_linear", backend, [values, x, bias])
    outputs = kernels.empty_forward(x, values, out_features, keep)
    if outputs[0].numel() > 0:
        kernels.forward(backend, x, values, index, bias, activation, outputs)
    return outputs


def _backward_kernels(grad, x, values, index, saved, bias, activation, needs, backend):
    refuse_tangents("ticket_linear", backend, [values, x, grad])
    outputs = kernels.empty_backward(grad, x, values, bias, needs)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    kernels.backward(backend, grad, x, values, index, saved, activation, outputs)
    return outputs


def _forward_fake(x, values, index, out_features, bias, activation, keep, backend):
    return kernels.empty_forward(x, values, out_features, keep)


def _backward_fake(grad, x, values, index, saved, bias, activation, needs, backend):
    return kernels.empty_backward(grad, x, values, bias, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, values, index, _, bias, activation, keep, backend = inputs
    y, z = output
    if activation == "gelu" and not keep:
        raise RuntimeError("ticket_forward: keep is False, expected True where a gradient of gelu is wanted")
    saved = {"relu": y, "gelu": z}.get(activation, values.new_empty(0))
    ctx.save_for_backward(x, values, index, saved)
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.bias, ctx.activation, ctx.backend = bias is not None, activation, backend


def _backward(ctx, grad, unused):
    x, values, index, saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    if grad is None:
        return (None,) * 8
    dx, dvalues, dbias = torch.ops.pyeff.ticket_backward(
        grad, x, values, index, saved, ctx.bias, ctx.activation, needs, ctx.backend
    )
    dx, dvalues, dbias = (g if need else None for g, need in zip((dx, dvalues, dbias), needs, strict=True))
    return dx, dvalues, None, None, dbias, None, None, None


_register.composite(_lib, "ticket_linear", _linear)
_register.kernels(_lib, "ticket_forward", _forward, _forward_fake, _backward, _setup_context)
_register.kernels(_lib, "ticket_backward", _backward_kernels, _backward_fake)
_register.no_double_backward(_lib, "ticket_backward", "ticket_linear")
