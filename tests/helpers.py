"""What the tests of every operation share: random strided tensors, READ calls and the three-way tolerance."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

import pyeff
from pyeff import backends
from tests import places

DTYPES = places.DTYPES
CELLS, NORMS, REDUCTIONS = ("rnn", "gru", "lstm"), ("rms", "layer", "none"), ("mean", "last")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
# What the CPU's kernels take, and what a GPU's do; a place runs those of them that it has.
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
gpu_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))


def need(op: str, name: str) -> None:
    """Skips the test where backend ``name`` cannot serve ``op``; fails it where PYEFF_TEST_REQUIRE names it."""
    state = backends.support(op, name)
    if not state.usable:
        message = f"{op}: backend {name!r} cannot be used: {state.reason}"
        pytest.fail(message) if name in places.REQUIRED else pytest.skip(message)


def kept_for_backward(call: Callable[[], Tensor], given: Iterable[Tensor]) -> list[Tensor]:
    """What the graph holds beyond what it was given and its output: one tensor of each storage."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    known.add(out.untyped_storage().data_ptr())
    return [t for address, t in kept.items() if address not in known]


def bytes_of(storages: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in storages)


# The oracle is the reference in float64 on the very numbers that the low-precision call gets. In a dtype, the
# reference itself is wrong by `allowed`; a kernel may be wrong by as much, plus what rounding alone does to a sum of
# K terms.
#
# A sum of K terms of size s with random signs has size sqrt(K) s =: scale. Adding term after term rounds K partial
# sums, the k-th of size sqrt(k) s, each by at most u = eps/2 of itself, with random signs: together
# u s sqrt(1 + 2 + .. + K) ~ u s K / sqrt(2) = eps / (2 sqrt(2)) * sqrt(K) * scale. Products of low-precision numbers
# are summed in float32 (float64 for float64), so this eps is the accumulator's. What is compared is the largest of M
# errors, and the largest of M draws lies at sqrt(2 log M) standard deviations, 3 to 5 for our sizes, which over the
# 2 sqrt(2) above is 1.1 to 1.8: the constant is 2 for the sum.
#
# What is stored in the tensors' own dtype is rounded by up to eps/2 of its size, and a gradient comes by four such
# stores: the weight that the norm's is folded into, the state, the gradient of the pre-activation, the result. Hence
# 2 eps for the stores.
SUM_CONSTANT = 2.0
STORE_CONSTANT = 2.0


def rounding(dtype: torch.dtype, terms: int, scale: float) -> float:
    """What rounding does to a sum of ``terms`` terms that comes out at size ``scale`` and is stored as ``dtype``."""
    accumulator = torch.promote_types(dtype, torch.float32)
    relative = STORE_CONSTANT * torch.finfo(dtype).eps + SUM_CONSTANT * torch.finfo(accumulator).eps * math.sqrt(terms)
    return relative * scale


def error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where one of the two is not finite and the other is."""
    value, truth = value.double(), truth.double()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    assert torch.equal(torch.isfinite(value), torch.isfinite(truth)), "not finite where the oracle is, or the other way"
    gap = (value - truth)[torch.isfinite(truth)].abs()
    return gap.max().item() if gap.numel() else 0.0


def assert_three_way(
    what: str, fused: Tensor, same_dtype: Tensor, oracle: Tensor, terms: int, scale: float = 0.0
) -> None:
    """The kernel's error against the oracle is at most the reference's in the same dtype plus the bound above.

    Args:
        what (str): names the tensor in the failure.
        fused (Tensor): what is tested.
        same_dtype (Tensor): the reference on the same numbers in the same dtype.
        oracle (Tensor): the reference on the same numbers in float64.
        terms (int): the length K of the reduction that ends in one element.
        scale (float): the size of what is summed, where the sum itself is smaller because its terms cancel.
    """
    assert fused.dtype == same_dtype.dtype, f"{what}: {fused.dtype}, the reference gives {same_dtype.dtype}"
    finite = oracle[torch.isfinite(oracle)]
    scale = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    wrong, allowed = error(fused, oracle), error(same_dtype, oracle)
    slack = rounding(fused.dtype, terms, scale)
    assert wrong <= allowed + slack, (
        f"{what}: error {wrong:.3e}; the reference in {fused.dtype} makes {allowed:.3e}, rounding of {terms} terms of "
        f"total size {scale:.3e} adds {slack:.3e}"
    )


STRIDES = ("contiguous", "sliced", "transposed", "every_second", "permuted", "expanded")


def lay_out(values: Tensor, kind: str) -> Tensor:
    """``values`` behind strides of one kind; the memory between the elements holds NaN.

    ``sliced`` starts inside a wider row, ``transposed`` has a last stride that is not 1, ``every_second`` strides by 2,
    ``permuted`` has its leading dimensions stored in reverse, ``expanded`` repeats the first row by strides of 0.
    """
    if not values.dim() or kind == "contiguous":
        return values.contiguous()
    *lead, width = values.shape

    def room(*shape: int) -> Tensor:
        return values.new_full(shape, math.nan)

    if kind == "sliced":
        out = room(*lead, width + 5)[..., 3 : 3 + width]
    elif kind == "transposed":
        out = room(width, *lead).movedim(0, -1)
    elif kind == "every_second":
        out = room(*lead, 2 * width)[..., 1::2]
    elif kind == "permuted":
        out = room(*lead[::-1], width).permute(*reversed(range(len(lead))), len(lead))
    elif kind == "expanded":
        return values if 0 in lead else values[(0,) * len(lead)].clone().expand(values.shape)
    else:
        raise ValueError(kind)
    return out.copy_(values)


WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0")


@dataclasses.dataclass
class Read:
    """One call of read_recurrence: ``tensors`` holds phi as ``phi0``, ``phi1``, .. and the rest by its name."""

    tensors: dict[str, Tensor]
    options: dict[str, object]

    @property
    def layers(self) -> int:
        return sum(name.startswith("phi") for name in self.tensors)

    @property
    def phi(self) -> list[Tensor]:
        return [self.tensors[f"phi{i}"] for i in range(self.layers)]

    @property
    def rank(self) -> int:
        return self.tensors["w_hh"].shape[1]

    @property
    def width(self) -> int:
        return self.tensors["w_ih"].shape[1]

    @property
    def tokens(self) -> int:
        return math.prod(self.tensors["phi0"].shape[:-1])

    def to(self, dtype: torch.dtype) -> Read:
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Read:
        return Read({name: change(t) for name, t in self.tensors.items()}, self.options)

    def but(self, **options) -> Read:
        return Read(self.tensors, {**self.options, **options})

    def require_grad(self, names: Iterable[str]) -> Read:
        names = set(names)
        assert names <= set(self.tensors), names
        return Read(
            {name: t.detach().requires_grad_(name in names) for name, t in self.tensors.items()}, dict(self.options)
        )

    def __call__(self, function: Callable[..., Tensor] | None = None, **extra) -> Tensor:
        function = pyeff.ops.read_recurrence if function is None else function
        given = {name: self.tensors[name] for name in WEIGHTS if name in self.tensors}
        return function(self.phi, **given, **self.options, **extra)

    def terms(self, name: str) -> int:
        """The reduction length behind one element of the output or of a gradient.

        Every pre-activation sums d + r products and passes its error on through L layers; a weight's gradient then sums
        over tokens and layers, a norm's also over the gates, a phi's and a state's over the gates.
        """
        gates = GATES[self.options["cell"]] * self.rank
        own = {"out": 0, "h0": gates, "c0": gates}
        over_tokens = max(self.tokens, 1) * self.layers
        for weight in ("w_ih", "w_hh", "b_ih", "b_hh"):
            own[weight] = over_tokens
        own["norm_weight"] = own["norm_bias"] = over_tokens * gates
        return self.layers * (self.width + self.rank) + (gates if name.startswith("phi") else own[name])


def make_read(
    cell: str = "gru", norm: str = "rms", reduce: str = "mean", *, lead: tuple[int, ...] = (5,), layers: int = 3,
    d: int = 24, r: int = 10, dtype: torch.dtype | None = None, bias: bool = True, state: bool = True,
    affine: bool = True, strides: tuple[str, ...] = ("contiguous",), weight_strides: str = "contiguous",
    eps: float = 1e-6, seed: int = 0,
) -> Read:  # fmt: skip
    """A random READ call in which every argument matters, on torch's default device.

    phi takes its strides from ``strides`` in turn; the dtype is the place's widest unless one is given. The numbers are
    drawn on the CPU, so that they are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.get_default_device(), dtype or places.here().dtypes[0]
    gates = GATES[cell] * r
    shapes: dict[str, tuple[tuple[int, ...], float, float]] = {  # name: shape, scale, offset
        "w_ih": ((gates, d), d**-0.5, 0.0),
        "w_hh": ((gates, r), r**-0.5, 0.0),
    }
    if bias:
        shapes |= {"b_ih": ((gates,), 0.5, 0.0), "b_hh": ((gates,), 0.5, 0.0)}
    if affine and norm != "none":
        shapes["norm_weight"] = ((d,), 0.3, 1.0)
    if affine and norm == "layer":
        shapes["norm_bias"] = ((d,), 0.3, 0.0)
    if state:
        shapes["h0"] = ((*lead, r), 0.5, 0.0)
        if cell == "lstm":
            shapes["c0"] = ((*lead, r), 1.0, 0.0)
    # phi neither centred nor of size one, so that a norm left out shows.
    shapes |= {f"phi{i}": ((*lead, d), 1.5, 0.25) for i in range(layers)}
    tensors = {}
    for name, (shape, scale, offset) in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale + offset
        kind = strides[int(name[3:]) % len(strides)] if name.startswith("phi") else weight_strides
        tensors[name] = lay_out(values.to(device, dtype), kind)
    return Read(tensors, {"cell": cell, "norm": norm, "reduce": reduce, "eps": eps})


def gradients(call: Read, names: Iterable[str], grad_out: Tensor, function=None, **extra) -> dict[str, Tensor]:
    """The output under ``out`` and the gradient of each of ``names``."""
    call = call.require_grad(names)
    names = list(names)
    out = call(function, **extra)
    grads = torch.autograd.grad(out, [call.tensors[name] for name in names], grad_out.to(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def phi_gradient_scale(call: Read, grad_out: Tensor) -> float:
    """The size of what makes up the gradient of a phi.

    A norm's derivative is rstd (g - projections of g), with g the gradient of its output before weight and bias. With
    few features the projections take nearly all of g, so that the difference is as wrong as g is.
    """
    call, norm = call.to(torch.float64), call.options["norm"]
    weight, bias, eps = call.tensors.get("norm_weight"), call.tensors.get("norm_bias"), call.options["eps"]
    normed = [pyeff.reference.read.normalize(phi_i, norm, None, None, eps).requires_grad_() for phi_i in call.phi]
    cell_inputs = {f"phi{i}": x if weight is None else x * weight for i, x in enumerate(normed)}
    if bias is not None:
        cell_inputs = {name: x + bias for name, x in cell_inputs.items()}
    rest = {n: t for n, t in call.tensors.items() if not n.startswith(("phi", "norm_"))}
    out = Read({**rest, **cell_inputs}, {**call.options, "norm": "none"})(pyeff.reference.read_recurrence)
    scale = 0.0
    for phi_i, grad in zip(call.phi, torch.autograd.grad(out, normed, grad_out.double()), strict=True):
        if norm != "none":
            centred = phi_i - phi_i.mean(-1, keepdim=True) if norm == "layer" else phi_i
            grad = grad * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        grad = grad[torch.isfinite(grad)].abs()
        scale = max(scale, grad.max().item() if grad.numel() else 0.0)
    return scale


def few_element_scales(call: Read, grad_out: Tensor) -> dict[str, float]:
    """The size of what makes up each gradient: for a weight, the root of the summed squares of what each token adds.

    Many sums of random terms show their size by the largest of them. Where they are few, all may be small by chance;
    only for these is it worked out. Empty otherwise.
    """
    if call.rank > 4 or not call.tokens:
        return {}
    call = call.to(torch.float64)
    weights = {n: t for n, t in call.tensors.items() if n in WEIGHTS and n not in ("h0", "c0")}
    rows = {n: t.reshape(call.tokens, t.shape[-1]) for n, t in call.tensors.items() if n not in weights}

    def loss(weights, row, grad_row):
        return (Read({**weights, **row}, call.options)(pyeff.reference.read_recurrence) * grad_row).sum()

    grad_rows = grad_out.double().reshape(call.tokens, call.rank)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, rows, grad_rows)
    scales = {name: grads.square().sum(0).sqrt().max().item() for name, grads in each.items()}
    # A state's gradient is what arrives from above and what comes back from the gates; by itself neither is larger.
    return scales | dict.fromkeys(("h0", "c0"), grad_out.abs().max().item())


def check_read(call: Read, names: Iterable[str] = (), *, grad_out: Tensor | None = None, **extra) -> None:
    """Output and gradients of a call, three ways, on the backend in force."""
    # What the gates sum has a size of about one by make_read's choice of weights, however small a state comes out.
    names, scales = list(names), {"out": 1.0}
    if names:
        if grad_out is None:
            generator = torch.Generator().manual_seed(99)
            shape = (*call.tensors["phi0"].shape[:-1], call.rank)
            # Rounded to the call's dtype first: all three must be asked for the same derivative.
            grad_out = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            grad_out = grad_out.to(call.tensors["w_ih"])
        fused = gradients(call, names, grad_out, **extra)
        same = gradients(call, names, grad_out, pyeff.reference.read_recurrence)
        oracle = gradients(call.to(torch.float64), names, grad_out, pyeff.reference.read_recurrence)
        scales |= few_element_scales(call, grad_out)
        scales |= dict.fromkeys((n for n in names if n.startswith("phi")), phi_gradient_scale(call, grad_out))
    else:
        with torch.no_grad():
            fused = {"out": call(**extra)}
            same = {"out": call(pyeff.reference.read_recurrence)}
            oracle = {"out": call.to(torch.float64)(pyeff.reference.read_recurrence)}
    for name in fused:
        assert_three_way(name, fused[name], same[name], oracle[name], call.terms(name), scales.get(name, 0.0))


def says(*parts: object) -> str:
    """A pattern for ``pytest.raises(match=...)``: the parts in this order, anything between them."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)
