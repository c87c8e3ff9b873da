"""READ's trainable part: a recurrent network over the depth of a frozen one, and a projection to its width."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff import ops
from pyeff.reference.read import GATES, NORMS, REDUCTIONS

_RNN_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_RNN_CLASSES = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def like_backbone(t: Any, phi: Tensor) -> Any:
    """A float32 parameter in the dtype of a half-precision backbone; the op refuses any other difference."""
    if t is None or t.dtype != torch.float32 or phi.dtype not in (torch.bfloat16, torch.float16):
        return t
    return t if torch.is_autocast_enabled(phi.device.type) else t.to(phi.dtype)


def linear_like(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)``, with the parameters of :func:`like_backbone`."""
    return F.linear(x, like_backbone(linear.weight, x), like_backbone(linear.bias, x))


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"ReadAdapter: {name} is {value!r}, expected {expected}")


def _is_number(value: Any, kind: Any = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _is_device(value: Any) -> bool:
    try:
        return value is None or isinstance(torch.device(value), torch.device)
    except (RuntimeError, TypeError):
        return False


class ReadAdapter(nn.Module):
    """The correction ``scale * (U hbar + c)`` of a frozen network's output, from the outputs of its layers.

    ``hbar`` is :func:`pyeff.ops.read_recurrence` over the layer outputs. The recurrent parameters have the names and
    the layout of a single-layer torch.nn.RNN, GRU or LSTM, so that ``load_state_dict(gru.state_dict(), strict=False)``
    fits.

    Args:
        width (int): d, the width of the layer outputs and of the correction.
        rank (int): r, the width of the recurrent state. Default: 256.
        cell (str): ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        norm (str): ``"rms"``, ``"layer"`` or ``"none"``, over each layer output.
        eps (float): of the norm.
        reduce (str): ``"mean"`` over the layers or ``"last"``.
        bias (bool): biases in the recurrent cell. The projection always has its own.
        scale (float): constant factor of the correction.
        zero_init (bool): start the projection at zero, so that the first correction is exactly nothing.
        recompute (bool): compute the gates again in the backward instead of saving them. The ``"rnn"`` cell has none to
            save: there it changes nothing.
        embed_state (bool): the first state is a trainable projection of the embedding instead of zeros.
        device, dtype: of the parameters.

    Attributes:
        weight_ih_l0 [g r, d], weight_hh_l0 [g r, r], bias_ih_l0 and bias_hh_l0 [g r]: the cell (g = 1, 3, 4).
        norm_weight [d], norm_bias [d]: of the norm; the bias with ``norm="layer"`` only.
        projection (torch.nn.Linear): U [d, r] and c [d].
        embed_projection (torch.nn.Linear): [r, d], with ``embed_state`` only.

    Raises:
        ValueError: an unknown option, a size that is no integer above zero, or another argument out of its range; the
            message names the argument, what came and what was expected.

    Source: Nguyen et al., 2023, arXiv 2305.15348, section 3.

    Example:
        >>> import torch, pyeff
        >>> adapter = pyeff.nn.ReadAdapter(16, rank=8)
        >>> layers = [torch.randn(2, 5, 16) for _ in range(3)]
        >>> adapter(layers).shape
        torch.Size([2, 5, 16])
        >>> adapter(layers).abs().max().item()    # the projection starts at zero
        0.0
        >>> sum(p.numel() for p in pyeff.nn.ReadAdapter(768).parameters())
        986112
    """

    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter | None
    bias_hh_l0: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        rank: int = 256,
        *,
        cell: str = "gru",
        norm: str = "rms",
        eps: float = 1e-6,
        reduce: str = "mean",
        bias: bool = True,
        scale: float = 1.0,
        zero_init: bool = True,
        recompute: bool = False,
        embed_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, option, known in (("cell", cell, GATES), ("norm", norm, NORMS), ("reduce", reduce, REDUCTIONS)):
            _expect(name, option, isinstance(option, str) and option in known, f"one of {', '.join(map(repr, known))}")
        for name, size in (("width", width), ("rank", rank)):
            _expect(name, size, _is_number(size, numbers.Integral) and size >= 1, "an integer of at least 1")
        _expect("eps", eps, _is_number(eps) and eps >= 0, "a finite number of at least 0")
        _expect("scale", scale, _is_number(scale), "a finite number")
        switches = {"bias": bias, "zero_init": zero_init, "recompute": recompute, "embed_state": embed_state}
        for name, value in switches.items():
            _expect(name, value, isinstance(value, bool), "True or False")
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        _expect("dtype", dtype, dtype is None or floating, "a floating-point torch.dtype or None")
        _expect("device", device, _is_device(device), "a device of torch or None")
        self.width, self.rank, self.cell, self.norm, self.eps, self.reduce = width, rank, cell, norm, eps, reduce
        self.scale, self.zero_init, self.recompute = scale, zero_init, recompute
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = GATES[cell] * rank
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates, width, **like))
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates, rank, **like))
        for name in ("bias_ih_l0", "bias_hh_l0"):
            self.register_parameter(name, nn.Parameter(torch.empty(gates, **like)) if bias else None)
        for name, there in (("norm_weight", norm != "none"), ("norm_bias", norm == "layer")):
            self.register_parameter(name, nn.Parameter(torch.empty(width, **like)) if there else None)
        self.projection = nn.Linear(rank, width, **like)
        self.embed_projection = nn.Linear(width, rank, **like) if embed_state else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values: the cell as torch.nn.GRU's, the norm at identity, the projection as ``zero_init`` says."""
        bound = 1.0 / math.sqrt(self.rank)
        for name in _RNN_NAMES:
            if getattr(self, name) is not None:
                nn.init.uniform_(getattr(self, name), -bound, bound)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            nn.init.zeros_(self.norm_bias)
        self.projection.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        if self.embed_projection is not None:
            self.embed_projection.reset_parameters()

    def forward(
        self,
        phi: Sequence[Tensor],
        h0: Tensor | None = None,
        c0: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """The correction.

        Args:
            phi (sequence of Tensor): L tensors [*, d], the layer outputs. References, never stacked or copied.
            h0 (Tensor, optional), c0 (Tensor, optional): [*, r], the first state; cast to the dtype of the computation.
            embedding (Tensor, optional): [*, d], what the first state is projected from, with ``embed_state`` only, and
                not beside ``h0``.

        Returns:
            Tensor: [*, d]. Half-precision ``phi`` with float32 parameters computes in the dtype of ``phi``.

        Raises:
            ValueError: shapes or dtypes that do not fit, or ``embedding`` where it cannot apply or is missing.
        """
        phi = list(phi)
        if not phi:
            raise ValueError("ReadAdapter: phi is empty, expected at least one layer output")
        w = self._weights(phi[0])
        h0, c0 = self._first_state(h0, c0, embedding, w["w_ih"].dtype)
        hbar = ops.read_recurrence(
            phi, w["w_ih"], w["w_hh"], w["b_ih"], w["b_hh"], norm_weight=w["norm_weight"], norm_bias=w["norm_bias"],
            h0=h0, c0=c0, cell=self.cell, norm=self.norm, eps=self.eps, reduce=self.reduce, recompute=self.recompute,
        )  # fmt: skip
        return self.project(hbar)

    def project(self, hbar: Tensor) -> Tensor:
        """``scale * (U hbar + c)``: [*, r] -> [*, d]."""
        out = linear_like(self.projection, hbar)
        return out if self.scale == 1.0 else out * self.scale

    def step(self, phi_i: Tensor, state: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | tuple[Tensor, Tensor]:
        """One layer of the recurrence, :func:`pyeff.ops.read_step` with this module's weights.

        Args:
            phi_i (Tensor): [*, d], one layer's output.
            state (None, Tensor or (Tensor, Tensor)): what the previous step returned; None before the first.

        Returns:
            Tensor or (Tensor, Tensor): h [*, r], or (h, c) for the LSTM.

        Example:
            >>> import torch, pyeff
            >>> adapter = pyeff.nn.ReadAdapter(16, rank=8)
            >>> adapter.step(torch.randn(5, 16), None).shape
            torch.Size([5, 8])
        """
        return ops.read_step(phi_i, state, cell=self.cell, norm=self.norm, eps=self.eps, **self._weights(phi_i))

    def stream(
        self, h0: Tensor | None = None, c0: Tensor | None = None, *, embedding: Tensor | None = None
    ) -> ReadStream:
        """An accumulator that takes the layer outputs one by one and keeps none; arguments as of :meth:`forward`."""
        return ReadStream(self, h0, c0, embedding)

    def load_torch(self, source: nn.RNNBase | Mapping[str, Tensor]) -> ReadAdapter:
        """Copies the recurrent weights of a torch.nn.RNN, GRU or LSTM; norm and projection stay.

        Args:
            source (torch.nn.RNNBase or mapping): the module, or its state dict. One layer, one direction, no
                projection; a state dict without biases sets them to zero.

        Returns:
            ReadAdapter: self.

        Raises:
            ValueError: another cell, more than one layer or direction, or shapes that do not fit; nothing is written
                then.

        Example:
            >>> import torch, pyeff
            >>> gru = torch.nn.GRU(16, 8)
            >>> adapter = pyeff.nn.ReadAdapter(16, rank=8).load_torch(gru)
            >>> torch.equal(adapter.weight_hh_l0, gru.weight_hh_l0)
            True
        """
        if isinstance(source, nn.RNNBase):
            if not isinstance(source, _RNN_CLASSES[self.cell]):
                raise ValueError(f"load_torch: source is a {type(source).__name__}, expected {self.cell!r}'s module")
            if getattr(source, "nonlinearity", "tanh") != "tanh":
                raise ValueError(f"load_torch: source has nonlinearity {source.nonlinearity!r}, expected 'tanh'")
            source = source.state_dict()
        extra = sorted(name for name in source if name not in _RNN_NAMES)
        if extra:
            raise ValueError(
                f"load_torch: source has {', '.join(extra)}, expected one layer and direction, no projection"
            )
        values: dict[str, Tensor] = {}
        for name in _RNN_NAMES:
            mine, theirs = getattr(self, name), source.get(name)
            if theirs is None and name.startswith("weight"):
                raise ValueError(f"load_torch: source has no {name}")
            if mine is None and theirs is not None:
                raise ValueError(f"load_torch: source has {name}, expected none as this adapter has bias=False")
            if theirs is not None and theirs.shape != mine.shape:
                raise ValueError(f"load_torch: {name} has shape {list(theirs.shape)}, expected {list(mine.shape)}")
            if mine is not None:
                values[name] = torch.zeros_like(mine) if theirs is None else theirs
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(value)
        return self

    def torch_state_dict(self) -> dict[str, Tensor]:
        """The recurrent weights as the state dict of a single-layer torch.nn.RNN, GRU or LSTM.

        Example:
            >>> import torch, pyeff
            >>> adapter = pyeff.nn.ReadAdapter(16, rank=8, cell="lstm")
            >>> torch.nn.LSTM(16, 8).load_state_dict(adapter.torch_state_dict())
            <All keys matched successfully>
        """
        return {name: getattr(self, name).detach() for name in _RNN_NAMES if getattr(self, name) is not None}

    def extra_repr(self) -> str:
        parts = [f"{self.width}, rank={self.rank}, cell={self.cell!r}, norm={self.norm!r}, reduce={self.reduce!r}"]
        parts += [f"scale={self.scale}"] if self.scale != 1.0 else []
        parts += ["bias=False"] if self.bias_ih_l0 is None else []
        parts += ["recompute=True"] if self.recompute else []
        return ", ".join(parts)

    def _weights(self, phi: Tensor) -> dict[str, Any]:
        named = {
            "w_ih": self.weight_ih_l0, "w_hh": self.weight_hh_l0, "b_ih": self.bias_ih_l0, "b_hh": self.bias_hh_l0,
            "norm_weight": self.norm_weight, "norm_bias": self.norm_bias,
        }  # fmt: skip
        return {name: like_backbone(t, phi) for name, t in named.items()}

    def _first_state(
        self, h0: Tensor | None, c0: Tensor | None, embedding: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.embed_projection is None:
            if embedding is not None:
                raise ValueError("ReadAdapter: embedding was given, expected None with embed_state=False")
        elif h0 is not None:
            if embedding is not None:
                raise ValueError("ReadAdapter: h0 and embedding were both given, expected one: each is the first state")
        else:
            if embedding is None:
                raise ValueError("ReadAdapter: embedding is None, expected [*, width] with embed_state=True")
            h0 = linear_like(self.embed_projection, embedding)
        return None if h0 is None else h0.to(dtype), None if c0 is None else c0.to(dtype)


class ReadStream:
    """READ over layer outputs that arrive one by one: one state and one sum are kept, no layer output.

    Made by :meth:`ReadAdapter.stream`.

    Args:
        adapter (ReadAdapter): whose weights are used.
        h0 (Tensor, optional), c0 (Tensor, optional), embedding (Tensor, optional): as of :meth:`ReadAdapter.forward`.

    Example:
        >>> import torch, pyeff
        >>> adapter = pyeff.nn.ReadAdapter(16, rank=8, zero_init=False)
        >>> layers = list(torch.randn(3, 5, 16))
        >>> stream = adapter.stream()
        >>> for phi_i in layers:
        ...     stream.push(phi_i)
        >>> torch.allclose(stream.correction(), adapter(layers), atol=1e-6)
        True
    """

    def __init__(
        self, adapter: ReadAdapter, h0: Tensor | None = None, c0: Tensor | None = None, embedding: Tensor | None = None
    ) -> None:
        self.adapter, self.count = adapter, 0
        self._first: tuple[Tensor | None, Tensor | None, Tensor | None] = (h0, c0, embedding)
        self._state: Any = None
        self._weights: dict[str, Any] = {}
        self._total: Tensor | None = None

    def push(self, phi_i: Tensor) -> None:
        """Takes one layer's output [*, d]."""
        adapter = self.adapter
        if self.count == 0:
            # Once a stream, since float32 parameters may have to be cast to the backbone's dtype.
            self._weights = adapter._weights(phi_i)
            self._state = self._begin(phi_i)
        self._state = ops.read_step(
            phi_i, self._state, cell=adapter.cell, norm=adapter.norm, eps=adapter.eps, **self._weights
        )
        h = self._state[0] if adapter.cell == "lstm" else self._state
        if adapter.reduce == "mean":
            # Half-precision states are summed in float32: the mean over many layers must not lose the late ones.
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            self._total = wide if self._total is None else self._total + wide
        self.count += 1

    def correction(self) -> Tensor:
        """The correction [*, d] from the layers so far.

        Raises:
            RuntimeError: no layer output was pushed.
        """
        if self.count == 0:
            raise RuntimeError("ReadStream: no layer output was pushed, expected at least one")
        h = self._state[0] if self.adapter.cell == "lstm" else self._state
        hbar = h if self._total is None else (self._total / self.count).to(h.dtype)
        return self.adapter.project(hbar)

    def _begin(self, phi_i: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        h0, c0 = self.adapter._first_state(*self._first, self._weights["w_ih"].dtype)
        self._first = (None, None, None)
        if self.adapter.cell != "lstm":
            if c0 is not None:
                raise ValueError(f"ReadStream: c0 was given with cell={self.adapter.cell!r}, expected None")
            return h0
        if h0 is None:
            return None if c0 is None else (torch.zeros_like(c0), c0)
        return h0, torch.zeros_like(h0) if c0 is None else c0
