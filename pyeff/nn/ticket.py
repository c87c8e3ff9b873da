"""A linear layer of which only the blocks of a ticket are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import backends
from pyeff.nn._ticket_carry import Carry
from pyeff.plans import Ticket
from pyeff.reference.ticket import check_activation


def trusted(index: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Ticket:
    """A ticket from an index that came from one: nothing is checked, so nothing waits for a device."""
    ticket = Ticket.__new__(Ticket)
    ticket.shape, ticket.block, ticket.index = shape, block, index
    return ticket


class TicketLinear(nn.Module):
    """``act(x W^T + b)``, where W [out, in] consists of the living blocks of a ticket: a linear layer after pruning.

    The blocks are one ordinary strided parameter, so that optimizers, copies, files, DistributedDataParallel and FSDP
    treat it as any other; gradients and an optimizer's moments exist for living blocks only. The positions are an int32
    buffer that travels in the state dict: loading the state dict of a layer of the same size restores that layer's
    ticket, whatever blocks it has, into the same Parameter object.

    Args:
        ticket (Ticket): which blocks of [out, in] live; the layer has an index of its own.
        bias (bool): whether there is one. Default: True.
        activation (str, optional): ``"relu"``, ``"gelu"`` (by the error function) or None, part of the kernel.
        device, dtype: of the parameters; the index goes to the same device. Default: the ticket's device, torch's
            dtype.

    Attributes:
        values (Parameter): [nnz, bo, bi], the living blocks in the ticket's order.
        bias (Parameter or None): [out].
        index (Tensor): int32, the ticket's positions; a buffer.
        in_features (int), out_features (int), activation (str or None): as given.

    Raises:
        ValueError: no ticket, or an unknown activation.

    Source: Chen et al., 2020, arXiv 2007.12223, for masks of blocks.

    Example:
        >>> import torch, pyeff
        >>> linear, keep = torch.nn.Linear(32, 64), torch.rand(64, 32) < 0.002
        >>> layer = pyeff.nn.TicketLinear.from_linear(linear, pyeff.Ticket.from_mask(keep, block=16))
        >>> layer(torch.randn(5, 32)).shape
        torch.Size([5, 64])
        >>> twin = pyeff.nn.TicketLinear(pyeff.Ticket.from_mask(torch.ones(64, 32, dtype=torch.bool), block=8))
        >>> twin.load_state_dict(layer.state_dict())    # another ticket, even of another block
        <All keys matched successfully>
        >>> twin.ticket == layer.ticket
        True
    """

    index: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        ticket: Ticket,
        bias: bool = True,
        activation: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(ticket, Ticket):
            raise ValueError(f"TicketLinear: ticket is a {type(ticket).__name__}, expected a pyeff.Ticket")
        check_activation("TicketLinear", activation)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"TicketLinear: dtype is {dtype!r}, expected a floating-point torch.dtype or None")
        device = ticket.index.device if device is None else torch.device(device)
        self.out_features, self.in_features = ticket.shape
        self.activation = None if activation == "none" else activation
        self.register_buffer("index", ticket.index.detach().to(device, copy=True))
        self.values = nn.Parameter(torch.empty(ticket.nnz, *ticket.block, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        ticket: Ticket | Tensor,
        block: int | Sequence[int] | None = None,
        *,
        activation: str | None = None,
    ) -> TicketLinear:
        """The layer with the blocks that a ticket chooses of a linear layer.

        Args:
            linear (torch.nn.Linear): whose weight and bias are copied, with their device, dtype and ``requires_grad``.
            ticket (Ticket or Tensor): the ticket, or a mask [out, in] of bool: then a block with any survivor lives,
                and what the mask takes away is zero in it.
            block (int or (int, int), optional): with a mask: (bo, bi), or one number for both.
            activation (str, optional): as of the class.

        Returns:
            TicketLinear: a new layer; ``linear`` is left alone.

        Raises:
            ValueError: ``ticket`` is of another shape; a mask without ``block``, or a ticket with one.

        Example:
            >>> import torch, pyeff
            >>> linear = torch.nn.Linear(64, 32)
            >>> layer = pyeff.nn.TicketLinear.from_linear(linear, linear.weight.abs() > 0.1, block=8)
            >>> layer.values.shape[1:]
            torch.Size([8, 8])
        """
        weight = linear.weight.detach()
        if isinstance(ticket, Ticket):
            if block is not None:
                raise ValueError(f"TicketLinear.from_linear: block is {block!r} with a ticket, expected None")
        else:
            if block is None:
                raise ValueError("TicketLinear.from_linear: block is None with a mask, expected a number or (bo, bi)")
            mask, ticket = ticket, Ticket.from_mask(ticket, block)
            if ticket.shape == tuple(weight.shape):
                weight = torch.where(mask.to(weight.device), weight, 0)
        if ticket.shape != tuple(weight.shape):
            raise ValueError(
                f"TicketLinear.from_linear: ticket has shape {list(ticket.shape)}, expected {list(weight.shape)} as "
                "the weight of linear"
            )
        own = ticket.to(weight.device)
        layer = cls(own, linear.bias is not None, activation, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(own.gather(weight))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer of the same numbers, with zeros where no block lives; the activation is left out.

        Example:
            >>> import torch, pyeff
            >>> ticket = pyeff.Ticket.from_blocks(torch.eye(4, dtype=torch.bool), (32, 32), 8)
            >>> layer = pyeff.nn.TicketLinear(ticket)
            >>> dense = layer.to_linear()
            >>> float((dense.weight != 0).sum()) <= 0.25 * dense.weight.numel()
            True
        """
        like: dict[str, Any] = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        linear.weight.requires_grad_(self.values.requires_grad)
        return linear.train(self.training)

    @property
    def block(self) -> tuple[int, int]:
        """(bo, bi)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def ticket(self) -> Ticket:
        """Which blocks live. It shares the memory of ``index``."""
        return trusted(self.index, (self.out_features, self.in_features), self.block)

    @property
    def density(self) -> float:
        """The share of the weight's elements that lie in living blocks."""
        return self.ticket.density

    @property
    def weight(self) -> Tensor:
        """W [out, in] with zeros where no block lives: computed anew whenever it is asked for, differentiably."""
        return self.ticket.scatter(self.values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values as torch.nn.Linear's, for the inputs that each row of blocks really has."""
        if self.index.is_meta:
            return
        bound = 1.0 / math.sqrt(self.in_features)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        ticket, (bo, bi) = self.ticket, self.block
        start = ticket.row_start
        row = torch.repeat_interleave(
            torch.arange(ticket.grid[0], device=start.device), start.diff(), output_size=ticket.nnz
        )
        across = (self.in_features - ticket.column * bi).clamp(max=bi)
        fan_in = torch.zeros(ticket.grid[0], device=start.device, dtype=across.dtype).index_add_(0, row, across)
        nn.init.uniform_(self.values, -1.0, 1.0)
        self.values.mul_(fan_in[row].to(self.values.dtype).rsqrt()[:, None, None])
        # What a block holds past the end of the weight counts nowhere; zeros keep files and comparisons clean.
        down = (self.out_features - row * bo).clamp(max=bo)
        steps_o, steps_i = (torch.arange(size, device=start.device) for size in (bo, bi))
        inside = (steps_o < down[:, None])[:, :, None] & (steps_i < across[:, None])[:, None, :]
        self.values.masked_fill_(~inside, 0)

    def _check(self, x: Tensor) -> None:
        """Raises ValueError unless ``x`` is a tensor [*, in]."""
        if not isinstance(x, Tensor):
            raise ValueError(f"TicketLinear: x is a {type(x).__name__}, expected a tensor")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"TicketLinear: x has shape {list(x.shape)}, expected [*, {self.in_features}]")

    def forward(self, x: Tensor) -> Tensor:
        """[*, in] -> [*, out].

        Raises:
            ValueError: ``x`` is no tensor, its last dimension is not ``in_features``, or it has another dtype or
                device.
        """
        self._check(x)
        return torch.ops.pyeff.ticket_linear(
            x, self.values, self.index, self.out_features, self.bias, activation=self.activation,
            backend=backends.current(),
        )  # fmt: skip

    @torch.no_grad()
    def set_ticket(
        self,
        ticket: Ticket,
        fill: Tensor | None = None,
        *,
        rewind: bool = False,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        """Changes which blocks live, in the same Parameter object; what stays keeps its values and moments.

        Args:
            ticket (Ticket): of the same shape; its block may be another.
            fill (Tensor, optional): [out, in], where blocks that come to life take their values. Default: zeros.
            rewind (bool): take all values from ``fill``, those of surviving blocks too.
            optimizers (iterable of torch.optim.Optimizer): whose state for ``values`` is carried over: moments of
                surviving elements stay, new ones are zero; factored moments (Adafactor's) follow their blocks, and are
                dropped where the block changes. Other state, such as the step, stays as it is.

        Gradients are dropped. Wrap in DistributedDataParallel anew, and shard anew, after this.

        Raises:
            ValueError: the ticket is of another shape; ``fill`` does not fit or is missing; the values are sharded.

        Example:
            >>> import torch, pyeff
            >>> linear = torch.nn.Linear(32, 32)
            >>> layer = pyeff.nn.TicketLinear.from_linear(linear, torch.ones(32, 32, dtype=torch.bool), block=8)
            >>> optimizer = torch.optim.AdamW(layer.parameters())
            >>> layer(torch.randn(4, 32)).sum().backward()
            >>> optimizer.step()
            >>> half = pyeff.Ticket.from_blocks(torch.rand(4, 4) < 0.5, (32, 32), 8)
            >>> layer.set_ticket(half, optimizers=[optimizer])
            >>> optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape
            True
        """
        shape, device = (self.out_features, self.in_features), self.values.device
        if not isinstance(ticket, Ticket) or ticket.shape != shape:
            raise ValueError(f"TicketLinear.set_ticket: ticket is {ticket!r}, expected a pyeff.Ticket of {shape}")
        if type(self.values.data) is not Tensor:
            raise ValueError("TicketLinear.set_ticket: the values are sharded, expected a whole tensor")
        if fill is not None and not isinstance(fill, Tensor):
            raise ValueError(
                f"TicketLinear.set_ticket: fill is a {type(fill).__name__}, expected a tensor {list(shape)} or None"
            )
        if fill is not None and tuple(fill.shape) != shape:
            raise ValueError(f"TicketLinear.set_ticket: fill has shape {list(fill.shape)}, expected {list(shape)}")
        if rewind and fill is None:
            raise ValueError("TicketLinear.set_ticket: fill is None with rewind, expected a tensor [out, in]")
        old, new = self.ticket, ticket.to(device)
        carry = Carry(old, new)
        dense = None if fill is None else new.gather(fill.detach().to(device, self.values.dtype))
        values = dense if rewind and dense is not None else carry(self.values.data, dense)
        for optimizer in optimizers:
            state = optimizer.state.get(self.values, {})
            for name, moment in list(state.items()):
                if isinstance(moment, Tensor) and moment.dim() == 3:
                    moved = carry.state(moment)
                    if moved is None:
                        optimizer.state.pop(self.values)  # the optimizer begins anew, as with a fresh parameter
                        break
                    state[name] = moved
        self._replace(new.index.clone(), values)

    def _replace(self, index: Tensor, values: Tensor) -> None:
        self.index, self.values.grad = index, None
        self.values.data = values.contiguous()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        index, values = (state_dict.get(prefix + name) for name in ("index", "values"))
        if index is not None and (not isinstance(index, Tensor) or type(index) in (Tensor, nn.Parameter)):
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                self._check_loaded(index, self.values if values is None else values, assign or self.index.is_meta)
            except ValueError as error:
                error_msgs.append(f"{prefix}index: {error}")
                return
            whole = all(type(t) in (Tensor, nn.Parameter) for t in (self.values.data, values))
            if whole and values.shape != self.values.shape:
                self._replace(self.index.new_empty(index.shape), self.values.data.new_empty(values.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_loaded(self, index: Tensor, values: Tensor, bare: bool) -> None:
        """Raises ValueError unless the index is that of a ticket with these values; ``bare``: it may be on meta."""
        shape = (self.out_features, self.in_features)
        if values is self.values and values.dim() != 3:
            return  # sharded
        if not isinstance(values, Tensor) or values.dim() != 3 or 0 in values.shape[1:]:
            came = f"has shape {list(values.shape)}" if isinstance(values, Tensor) else f"is a {type(values).__name__}"
            raise ValueError(f"values {came}, expected [nnz, bo, bi]")
        if isinstance(index, Tensor) and index.is_meta:
            if not bare:
                raise ValueError("index is on meta, expected the positions of a ticket")
            found = trusted(index, shape, (values.shape[1], values.shape[2]))
        else:
            found = Ticket(index.cpu() if isinstance(index, Tensor) else index, shape, values.shape[1:])
        if found.nnz != values.shape[0]:
            raise ValueError(f"values has shape {list(values.shape)}, expected {[found.nnz, *found.block]}")

    def extra_repr(self) -> str:
        (bo, bi), nnz = self.block, self.values.shape[0]
        blocks = -(-self.out_features // bo) * -(-self.in_features // bi)
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, block={(bo, bi)}"]
        parts += [f"blocks={nnz} of {blocks}", f"bias={self.bias is not None}"]
        parts += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join(parts)
