"""Rows and columns in another order, so that survivors cluster, with the order folded into the neighbouring layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes import _ticket_grouping as grouping
from pyeff.recipes._ticket_select import block_sums, densities, pair
from pyeff.recipes._ticket_targets import dense_weight

# Inside of one layer: what makes the hidden units, what reads them. The activation in between works on each by itself.
_FEED_FORWARD = (
    (("intermediate.dense",), "output.dense"),
    (("ffn.lin1",), "ffn.lin2"),
    (("ffn",), "ffn_output"),
    (("fc1",), "fc2"),
    (("linear1",), "linear2"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)
# Query, key, value, output, and where the number of heads is. Only attentions that do nothing else to queries and keys.
_ATTENTION = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
     "attention.self.num_attention_heads"),
    ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
     "attention.attn.num_attention_heads"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "attention.n_heads"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Regrouping:
    """What :func:`regroup` did.

    Args:
        orders (dict of Tensor): by the path of a layer whose rows were moved: the new order, int64.
        retained (dict): by the path of what was regrouped together: the share of the magnitude in the best blocks,
            (before, after).

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> ticket.Regrouping({}, {"0": (0.3, 0.4)}).retained["0"]
        (0.3, 0.4)
    """

    orders: dict[str, Tensor]
    retained: dict[str, tuple[float, float]]


@dataclasses.dataclass
class _Units:
    """Hidden units that some layers make (rows) and some read (columns), in consecutive slices that are free."""

    name: str
    rows: list[tuple[str, Any]]
    columns: list[tuple[str, Any]]
    slices: list[range]
    # Neighbouring rows that move as one.
    width: int = 1


@torch.no_grad()
def regroup(model: nn.Module, block: int | Sequence[int] = 32, *, density: float | None = None) -> Regrouping:
    """Orders hidden units so that what survives shares blocks; the model computes what it did.

    The units of a feed-forward layer may stand in any order, if the rows that make them, their biases, and the columns
    that read them move together. So may the inner dimensions of each head, the same for query and key, and the same for
    value and output, and with blocks larger than a head, the heads. The sums over them are rounded in another order;
    nothing else changes. Units stay as they are where anything beside these layers has numbers of their width, such as
    a norm between the two of a feed-forward layer. The method is that of Coarsening the Granularity (2022, arXiv
    2202.04736) in kind: our grouping is by exchange against the kept blocks.

    Args:
        model (Module): linear layers, or layers masked by :func:`mask`, whose survivors then count; changed in place.
            Regroup before :func:`prune`, since that remembers the weights to go back to, or between :func:`prune` with
            ``"imp"`` and :func:`blockify`.
        block (int or (int, int)): (bo, bi), or one number for both, of the tickets to come.
        density (float, optional): the share of the blocks that will be kept. Default: that of the masks, or 0.3.

    Returns:
        Regrouping: the orders, and what they gained.

    Raises:
        ValueError: nothing in the model can be regrouped, or an option is out of its range.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0).eval()
        >>> x = torch.randn(5, 1, 16)
        >>> before = model(x)
        >>> before_share, share = ticket.regroup(model, block=8).retained["feed-forward"]
        >>> share >= before_share, torch.allclose(model(x), before, atol=1e-5)
        (True, True)
    """
    bo, bi = pair(block)
    if density is not None:
        densities(density, "one_shot", None)
    orders: dict[str, Tensor] = {}
    gains: dict[str, tuple[float, float]] = {}
    found = False
    for units in _units(model, bo, bi):
        found = True
        profile = _profile(units, bo, bi)
        share = _density(units) if density is None else density
        size = max(bo, bi) // units.width
        places = []
        worth = [0.0, 0.0, 0.0]
        for part in units.slices:
            order, before, after = grouping.order(profile[part.start : part.stop], size, share)
            places.append(order + part.start)
            whole = float(profile[part.start : part.stop].sum())
            worth = [worth[0] + whole, worth[1] + before * whole, worth[2] + after * whole]
        gains[units.name] = (worth[1] / worth[0], worth[2] / worth[0]) if worth[0] else (1.0, 1.0)
        order = torch.cat(places)
        if units.width > 1:
            order = (order[:, None] * units.width + torch.arange(units.width)).flatten()
        if torch.equal(order, torch.arange(len(order))):
            continue
        for path, layer in units.rows:
            _move(layer, order, 0)
            orders[path] = order if path not in orders else orders[path][order]
        for _, layer in units.columns:
            _move(layer, order, 1)
    if not found:
        raise ValueError(
            f"regroup: nothing in the {type(model).__name__} has hidden units that fill blocks of {bo} x {bi}, "
            "expected feed-forward layers or attentions of known names, of linear layers, "
            "and nothing else of their width"
        )
    return Regrouping(orders, gains)


def _units(model: nn.Module, bo: int, bi: int) -> Iterator[_Units]:
    size = max(bo, bi)
    for path, layer in model.named_modules():
        prefix = f"{path}." if path else ""
        for ups, down in _FEED_FORWARD:
            above, below = [_linear(layer, name) for name in ups], _linear(layer, down)
            if below is None or any(up is None for up in above):
                continue
            hidden = below.in_features
            if any(_tells_apart(layer, (*ups, down), (*above, below), {hidden})):
                continue
            if all(up is not None and up.out_features == hidden for up in above) and hidden % size == 0:
                rows = [(prefix + name, up) for name, up in zip(ups, above, strict=True)]
                yield _Units(prefix + "feed-forward", rows, [(prefix + down, below)], [range(hidden)])
        for *names, count in _ATTENTION:
            q, k, v, o = (_linear(layer, name) for name in names)
            heads = _attribute(layer, count)
            if None in (q, k, v, o) or not isinstance(heads, int) or "relative" in _positions(layer, names[0]):
                continue
            named = dict(zip("qkvo", ((prefix + n, m) for n, m in zip(names, (q, k, v, o), strict=True)), strict=True))
            inner = v.out_features // heads
            if any(_tells_apart(layer, names[:3], (q, k, v, o), {inner, v.out_features})):
                continue
            if inner % size == 0 and inner > size:
                each = [range(h * inner, (h + 1) * inner) for h in range(heads)]
                yield _Units(prefix + "query and key", [named["q"], named["k"]], [], each)
                yield _Units(prefix + "value and output", [named["v"]], [named["o"]], each)
            elif size % inner == 0 and size > inner and heads % (size // inner) == 0:
                rows = [named["q"], named["k"], named["v"]]
                yield _Units(prefix + "heads", rows, [named["o"]], [range(heads)], inner)


def _tells_apart(layer: nn.Module, paths: Sequence[str], known: Sequence[Any], widths: set[int]) -> Iterator[bool]:
    """Whether something else beside the layers may treat each unit in its own way, for each thing that has a width.

    A norm with weights, a convolution over the units or a group norm between the layers would meet units in another
    order. Where it is called cannot be seen from outside, so that its width alone decides.
    """
    owner = layer
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        owner = getattr(owner, names[0])
    for module in owner.modules():
        if not any(module is one for one in known):
            tensors = (*module._parameters.values(), *module._buffers.values())
            yield any(t is not None and not widths.isdisjoint(t.shape) for t in tensors)
            yield getattr(module, "num_channels", None) in widths


def _profile(units: _Units, bo: int, bi: int) -> Tensor:
    """[units, K]: what each adds to the blocks of its rows and of its columns."""
    parts = [block_sums(_worth(layer), (units.width, bi)) for _, layer in units.rows]
    parts += [block_sums(_worth(layer), (bo, units.width)).T for _, layer in units.columns]
    return torch.cat([part.cpu() for part in parts], 1)


def _worth(layer: Any) -> Tensor:
    return dense_weight(layer).float().abs()


def _density(units: _Units) -> float:
    masks = [layer.weight_mask for _, layer in (*units.rows, *units.columns) if hasattr(layer, "weight_mask")]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) if masks else 0.3


def _move(layer: Any, order: Tensor, dim: int) -> None:
    order = order.to(next(layer.parameters()).device)
    for name in ("weight", "weight_orig", "weight_mask") + (("bias",) if dim == 0 else ()):
        t = getattr(layer, name, None)
        if isinstance(t, Tensor):
            t.copy_(t.index_select(dim, order))
            t.grad = None


def _linear(module: nn.Module, path: str) -> Any:
    found = _attribute(module, path)
    return found if type(found) is nn.Linear else None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _positions(layer: nn.Module, query: str) -> str:
    """How an attention knows of positions, where its configuration says so."""
    owner = _attribute(layer, query.rpartition(".")[0])
    config = getattr(owner, "config", None)
    return str(getattr(owner, "position_embedding_type", getattr(config, "position_embedding_type", "")))
