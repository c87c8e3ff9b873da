"""Everybody who computes a ticket's linear layer: ours, the dense layer in several ways, and other sparse ones."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import ops, reference
from pyeff.ops import _ticket_kernels as kernels

from . import cuda, machine, ours
from .compiled import compiled
from .registry import Call, Contender, Unavailable

if TYPE_CHECKING:
    from .ticket import Inputs

OP = "ticket_linear"
_OURS = "pyeff.ops.ticket_linear"


def with_grads(inputs: Inputs, function: Callable[[], Tensor], weight: Tensor) -> Call:
    """A call that returns the output, and in training the gradients of x, the weight (or its blocks) and the bias."""
    if inputs.grad_out is None:
        return lambda: (function(),)
    wanted = [inputs.x, weight, inputs.bias]

    def call() -> Sequence[Tensor]:
        out = function()
        return (out, *torch.autograd.grad(out, wanted, inputs.grad_out))

    return call


def _on_blocks(sets: Sequence[Inputs], function: Callable[..., Tensor]) -> list[Call]:
    return [with_grads(s, functools.partial(function, s.x, s.values, s.ticket, s.bias), s.values) for s in sets]


def fused(sets: Sequence[Inputs]) -> list[Call]:
    """Our op, by the backend that ``auto`` takes; absent where that is the reference."""
    ours.need_kernels(OP, sets[0].values)
    return _on_blocks(sets, ops.ticket_linear)


def fused_by(name: str, sets: Sequence[Inputs]) -> list[Call]:
    """Our op by one of the GPU's backends."""
    return ours.by_name(OP, name, sets[0].values, _on_blocks(sets, ops.ticket_linear))


def definition(sets: Sequence[Inputs]) -> list[Call]:
    return _on_blocks(sets, reference.ticket_linear)


def _enough(sets: Sequence[Inputs]) -> Sequence[Inputs]:
    """As many sets as empty the caches of a dense contender; its weights are larger, and memory is not endless."""
    first = sets[0]
    cache = machine.last_cache_bytes() if first.x.device.type == "cpu" else cuda.l2_bytes()
    one = (math.prod(first.ticket.shape) + first.x.numel()) * first.x.element_size()
    return sets[: max(2, math.ceil(2 * cache / one))]


def dense(sets: Sequence[Inputs]) -> list[Call]:
    return [with_grads(s, functools.partial(F.linear, s.x, s.weight, s.bias), s.weight) for s in _enough(sets)]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@functools.cache
def _compiled_linear(dtype: torch.dtype, shape: tuple[int, ...], training: bool, device: str) -> Callable[..., Tensor]:
    return compiled(_linear, device)


def compiled_dense(sets: Sequence[Inputs]) -> list[Call]:
    x, training = sets[0].x, sets[0].grad_out is not None
    run = _compiled_linear(x.dtype, (*x.shape, *sets[0].ticket.shape), training, x.device.type)
    return [with_grads(s, functools.partial(run, s.x, s.weight, s.bias), s.weight) for s in _enough(sets)]


def _forward_only(sets: Sequence[Inputs], why: str) -> None:
    if sets[0].grad_out is not None:
        raise Unavailable(f"forward only: {why}")


def onednn(sets: Sequence[Inputs]) -> list[Call]:
    _forward_only(sets, "products with prepacked weights have no backward")
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch is built without oneDNN")
    product = torch.ops.mkldnn._linear_pointwise.default

    def one(s: Inputs) -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(s.weight, s.x.shape[0])
        return lambda: (product(s.x, packed, s.bias, "none", [], ""),)

    return [one(s) for s in _enough(sets)]


def torch_bsr(sets: Sequence[Inputs]) -> list[Call]:
    """torch.sparse_bsr, in the faster of its two ways on each device."""
    on_cpu = sets[0].x.device.type == "cpu"
    _forward_only(sets, "torch's BSR has no backward" if on_cpu else "torch's BSR has no gradient of its values")
    if on_cpu and sets[0].x.dtype != torch.float32:
        raise Unavailable(f"torch's BSR on a CPU has no product in {sets[0].x.dtype}")

    def one(s: Inputs) -> Call:
        weight = s.ticket.to_sparse_bsr(s.values)
        if on_cpu:
            return lambda: ((weight @ s.x.t()).t() + s.bias,)
        return lambda: (F.linear(s.x, weight, s.bias),)

    return _tried([one(s) for s in sets])


def scipy_bsr(sets: Sequence[Inputs]) -> list[Call]:
    _forward_only(sets, "SciPy knows no gradients")
    if sets[0].x.dtype != torch.float32:
        raise Unavailable(f"SciPy has no {sets[0].x.dtype}")
    sparse = _installed("scipy.sparse")

    def one(s: Inputs) -> Call:
        parts = (s.values.numpy(), s.ticket.column.numpy(), s.ticket.row_start.numpy())
        weight, x = sparse.bsr_matrix(parts, shape=s.ticket.shape), s.x.numpy()
        return lambda: (torch.from_numpy(weight @ x.T).t() + s.bias,)

    return [one(s) for s in sets]


def stk(sets: Sequence[Inputs]) -> list[Call]:
    """The sparse toolkit of MegaBlocks: x times the transposed weight, in blocks of 128."""
    block, tokens = sets[0].ticket.block[0], sets[0].x.shape[0]
    if block != 128 or tokens % 128:
        raise Unavailable("stk has blocks of 128 only, and numbers of tokens that they divide")
    module = _installed("stk")

    def one(s: Inputs) -> Call:
        rows = torch.repeat_interleave(torch.arange(s.ticket.grid[0], device=s.x.device), s.ticket.row_start.diff())
        weight = module.Matrix(
            s.ticket.shape, s.values, rows.short(), s.ticket.column.short(), s.ticket.row_start.clone()
        )
        return with_grads(s, lambda: module.ops.dds(s.x, weight.t()) + s.bias, s.values)

    return _tried([one(s) for s in sets])


def blksprs(sets: Sequence[Inputs]) -> list[Call]:
    """The weight times the transposed x, all three in its own form; dense on the way in and out, as a layer's are."""
    block, tokens = sets[0].ticket.block[0], sets[0].x.shape[0]
    if block < 16 or tokens % block:
        raise Unavailable("blksprs has blocks of 16 or more, and numbers of tokens that they divide")
    bs = _installed("blksprs")

    def one(s: Inputs) -> Call:
        (rows, columns), parts = s.ticket.grid, tokens // block
        layout_w = s.ticket.blocks()[None].contiguous()
        layout_x = torch.ones(1, columns, parts, dtype=torch.bool, device=s.x.device)
        layout_y = torch.ones(1, rows, parts, dtype=torch.bool, device=s.x.device)
        # What it finds out about layouts is kept from call to call, under the name that the version has for it.
        kept = "layout_cache" if "layout_cache" in inspect.signature(bs.ops.matmul).parameters else "lut"
        caches: list[dict[str, Any]] = [{kept: {}} for _ in range(3)]

        def function() -> Tensor:
            x = bs.ops.to_sparse(s.x.t()[None].contiguous(), layout_x, block, **caches[0])
            y = bs.ops.matmul(s.values, layout_w, x, layout_x, layout_y, block, **caches[1])
            return bs.ops.to_dense(y, layout_y, block, **caches[2])[0].t() + s.bias

        return with_grads(s, function, s.values)

    return _tried([one(s) for s in sets])


def _installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package for a GPU may fail in many ways where there is none
        raise Unavailable(f"{name} cannot be imported: {str(error).splitlines()[0][:120]}") from error


def _tried(calls: list[Call]) -> list[Call]:
    """The calls, if the first one works: other packages refuse a dtype or a size by errors of their own."""
    try:
        calls[0]()
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        raise Unavailable(f"it refuses the call: {type(error).__name__}: {message[:160]}") from error
    return calls


def _own(device: str, dtype: torch.dtype, block: int, needed: float) -> list[Contender]:
    if device == "cpu":
        return [Contender("fused", _OURS, "fused", fused, needed)]
    here = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    first, *rest = ours.gpu_order(OP, dtype, kernels.prefer(here, dtype, (1, block, block)))
    return [
        Contender(name, f"{_OURS} by its {name} kernels", role, functools.partial(fused_by, name), needed)
        for role, names in (("fused", [first]), ("variant", rest))
        for name in names
    ]


def contenders(
    device: str, dtype: torch.dtype, block: int, alive: int, tokens: int, shape: tuple[int, int], training: bool,
    with_definition: bool,
) -> tuple[Contender, ...]:  # fmt: skip
    """Everybody for a case with ``alive`` living elements. The dense layer, as a network has it, is the reference.

    The estimates are of the memory that a call takes, rounded up.
    """
    (out, width), directions = shape, 3 if training else 1
    layer = 4.0 * directions * (tokens * (width + out) + out * width)
    library = "MKL in float32, oneDNN in bfloat16" if device == "cpu" else "cuBLAS"
    found = [
        *_own(device, dtype, block, layer),
        Contender("F.linear", f"the dense layer, zeros for what is pruned ({library})", "reference", dense, layer),
        Contender("compiled", "the same under torch.compile", "rival", compiled_dense, layer),
    ]
    if device == "cpu":
        found.append(Contender("oneDNN", "the dense layer by oneDNN with prepacked weights", "rival", onednn, layer))
    found.append(Contender("BSR", "torch.sparse_bsr", "rival", torch_bsr, 2 * layer))
    if device == "cpu":
        found.append(Contender("SciPy", "scipy.sparse.bsr_matrix, one thread", "rival", scipy_bsr, 2 * layer))
    else:
        found.append(Contender("stk", "stk, the sparse toolkit of MegaBlocks", "rival", stk, 2 * layer))
        found.append(Contender("blksprs", "blksprs, with x and output dense", "rival", blksprs, 4 * layer))
    if with_definition:
        # Every living block's products, before they are added up.
        products = 8.0 * directions * tokens * alive / block
        about = "the definition, block by block (pyeff.reference)"
        found.append(Contender("eager", about, "rival", definition, 2 * products + layer))
    return tuple(found)
