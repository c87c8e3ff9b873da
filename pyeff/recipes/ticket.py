"""Tickets in a real model: pruning by blocks, so that what is left is fast.

    pruning = ticket.prune(model, train, density=0.3, block=32)     # block IMP with rewinding
    train(model)                                                    # the ticket, from its pre-trained weights
    ticket.save(model, "ticket.safetensors")

Source: Chen, Frankle, Chang, Liu, Zhang, Wang, Carbin, "The Lottery Ticket Hypothesis for Pre-trained BERT Networks",
2020, arXiv 2007.12223, section 3; blocks instead of elements are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.nn import TicketLinear
from pyeff.recipes import _ticket_resume
from pyeff.recipes import _ticket_select as selection
from pyeff.recipes._ticket_activations import fuse_activations, split_activations
from pyeff.recipes._ticket_files import dense_state_dict, load, save
from pyeff.recipes._ticket_gradual import Gradual
from pyeff.recipes._ticket_install import install, rank, select, tickets, to_dense
from pyeff.recipes._ticket_masks import load_masked, mask, masks, refresh
from pyeff.recipes._ticket_qkv import fuse_qkv, split_qkv
from pyeff.recipes._ticket_regroup import Regrouping, regroup
from pyeff.recipes._ticket_report import Pruning, describe
from pyeff.recipes._ticket_select import Projection, project
from pyeff.recipes._ticket_sparsify import Sparsification, sparsify
from pyeff.recipes._ticket_targets import Prunable, backbone, check_untied, dense_weight, element_scores, targets

__all__ = [
    "Gradual", "Projection", "Pruning", "Regrouping", "Sparsification", "blockify", "dense_state_dict",
    "fuse_activations", "fuse_qkv", "install", "load", "load_masked", "mask", "masks", "project", "prune", "regroup",
    "save", "select", "sparsify", "split_activations", "split_qkv", "targets", "tickets", "to_dense",
]  # fmt: skip

METHODS = ("block_imp", "imp", "one_shot", "random")


def prune(
    model: nn.Module,
    train: Callable[[nn.Module], Any] | None = None,
    *,
    density: float = 0.3,
    block: int | Sequence[int] = 32,
    method: str | None = None,
    scope: str = "global",
    floor: float = 0.0,
    schedule: str | None = None,
    rounds: int | None = None,
    rewind: bool | Mapping[str, Tensor] = True,
    head: Sequence[str | nn.Module] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    score: Callable[[str, Any], Tensor] | None = None,
    seed: int = 0,
    after_round: Callable[[int, nn.Module], Any] | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> Pruning:
    """Prunes the linear layers of a model to a ticket, in place.

    A round calls ``train(model)``, ranks what is still alive, takes away the least, and rewinds: the backbone goes back
    to its weights before the call, the task's head stays as it was trained. After the last round the model is the
    ticket at its pre-trained weights, to be trained once more by the caller.

    Args:
        model (Module): a pre-trained model, with its head.
        train (callable, optional): ``train(model)`` trains in place, about three epochs in the paper, and makes its own
            optimizer and schedule: parameters change between rounds. What it returns is kept in the result. Not needed
            by ``"one_shot"`` and ``"random"``: with it, they rank after one training.
        density (float): the share of the elements of the pruned layers that is left at the end.
        block (int or (int, int)): (bo, bi), or one number for both. Not used by ``"imp"``.
        method (str, optional): ``"block_imp"`` is iterative magnitude pruning of blocks, by the mean magnitude of a
            block; ``"imp"`` that of elements as in the paper, and leaves torch's ``weight_orig`` and ``weight_mask``
            (:func:`blockify` makes blocks of them); ``"one_shot"`` blocks in a single round; ``"random"`` takes blocks
            at random, as a baseline. Default: ``"block_imp"``, and ``"one_shot"`` without ``train``.
        scope (str): ``"global"`` ranks all layers together, as in the paper; ``"scaled"`` too, but by the magnitude
            over the mean of what lives in its layer, since the mean of a block tells layers apart more than blocks, and
            a layer of small weights would vanish; ``"layer"`` each layer by itself.
        floor (float): the share of every layer that survives in any case. Default: none.
        schedule (str, optional): ``"imp"`` takes the same share of the original weights each round, ``"cubic"`` much at
            first and little at the end, ``"one_shot"`` all at once. Default: as the method says.
        rounds (int, optional): how many. Default: as many as take a tenth of the weights each.
        rewind (bool or mapping): False leaves what was trained; a state dict of the model gives other weights to go
            back to, such as those after a few steps. Needs ``train``, and so does ``head``.
        head (sequence of str or Module, optional): what is not rewound, to whatever weights. Default: of a model of
            Hugging Face, or with one inside, all that is not its base model; of others nothing.
        include, exclude, stack: which layers, as of :func:`targets`. Default: the linear layers of the stack, and the
            pooler.
        score (callable, optional): ``score(path, layer)`` gives what each element [out, in] is worth, after training.
            Default: its magnitude. Not with ``"random"``.
        seed (int): of ``"random"``.
        after_round (callable, optional): called as ``after_round(round, model)``, from 1, after each rewinding.
        checkpoint (path, optional): a file that is written after each round, and from which the same call on the same
            pre-trained model goes on; needs the package safetensors.

    Returns:
        Pruning: density and retained magnitude of every layer, and what each training returned.

    Raises:
        ValueError: an option is unknown, out of its range or cannot apply; no layer is left to prune.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        >>> def train(model):
        ...     optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 16)).square().mean().backward()
        ...         optimizer.step()
        >>> pruning = ticket.prune(model, train, density=0.5, block=8)
        >>> [round["density"] for round in pruning.rounds]
        [0.9, 0.8, 0.7, 0.6, 0.5]
        >>> model[0]
        TicketLinear(in_features=16, out_features=32, block=(8, 8), blocks=... of 8, bias=True)
    """
    method = ("one_shot" if train is None else "block_imp") if method is None else method
    if method not in METHODS:
        raise ValueError(f"prune: method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    if train is not None and not callable(train):
        raise ValueError(f"prune: train is a {type(train).__name__}, expected a callable that takes the model, or None")
    if train is None and method in ("block_imp", "imp"):
        raise ValueError(f"prune: train is None with method {method!r}, expected a callable that trains the model")
    default = "imp" if method in ("block_imp", "imp") else "one_shot"
    steps = selection.densities(density, default if schedule is None else schedule, rounds)
    selection.check(scope, floor, density)
    sides = selection.pair(block)
    _check_together(method, train, rewind, head, score)
    layers = targets(model, include=include, exclude=exclude, stack=stack)
    _check_layers(model, layers, method, sides)
    before = {name: dense_weight(layer).clone() for name, layer in layers.items()}
    origin = _origin(model, layers, before, rewind, head) if train is not None else None
    run = {"method": method, "densities": steps, "block": sides, "scope": scope, "floor": floor, "layers": list(layers)}
    history = [] if checkpoint is None else _ticket_resume.read(checkpoint, model, run)
    layers = {name: model.get_submodule(name) for name in layers}  # type: ignore[misc]
    for number, share in list(enumerate(steps, 1))[len(history) :]:
        returned = train(model) if train is not None else None
        worth = _random(layers, sides, torch.Generator().manual_seed(seed + number)) if method == "random" else score
        if method == "imp":
            mask(model, _elements(layers, share, scope, floor, worth))
        else:
            fill = {name: origin[f"{name}.weight"] for name in layers} if origin else {}
            install(model, rank(layers, share, sides, scope, floor, worth), weights=fill, rewind=bool(origin))
            layers = {name: model.get_submodule(name) for name in layers}  # type: ignore[misc]
        if origin:
            _rewind(model, origin, set(layers))
        history.append({"density": share, "returned": returned})
        if checkpoint is not None:
            _ticket_resume.write(checkpoint, model, run, history)
        if after_round is not None:
            after_round(number, model)
    return describe(method, layers, before, history)


def blockify(
    model: nn.Module,
    block: int | Sequence[int] = 32,
    *,
    density: float | None = None,
    scope: str = "global",
    floor: float = 0.0,
) -> Pruning:
    """Puts tickets of blocks in the place of masks of elements: :func:`project` for a whole model.

    Args:
        model (Module): with ``weight_orig`` and ``weight_mask``, as :func:`prune` with ``"imp"`` or :func:`mask` leaves
            it; changed in place. Kept blocks are filled from ``weight_orig``, also where the mask was False.
        block (int or (int, int)): (bo, bi), or one number for both.
        density (float, optional): the share of the elements that is kept. Default: that of the masks.
        scope (str), floor (float): as of :func:`project`.

    Returns:
        Pruning: its ``method`` is ``"projection"``.

    Raises:
        ValueError: the model has no masks, or an option is out of its range.

    Example:
        >>> import torch
        >>> from pyeff.recipes import ticket
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> ticket.mask(model, {"0": model[0].weight.abs() > 0.1})
        >>> ticket.blockify(model, block=8, density=0.25).density
        0.25
    """
    once = dict(model.named_modules())
    # The state dict names a shared layer once for each place.
    found = {name: m for name, m in masks(model).items() if name in once}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in found}
    originals = {name: layer.weight_orig.detach().clone() for name, layer in layers.items()}
    projected = project(found, originals, block, density=density, scope=scope, floor=floor)
    install(model, {name: p.ticket for name, p in projected.items()}, weights=originals)
    now: dict[str, Any] = {name: model.get_submodule(name) for name in found}
    return describe("projection", now, originals, [])


def _check_together(method: str, train: Any, rewind: Any, head: Any, score: Any) -> None:
    """Raises ValueError where an option would be without effect."""
    if score is not None and not callable(score):
        raise ValueError(f"prune: score is a {type(score).__name__}, expected a callable that takes a path and a layer")
    if score is not None and method == "random":
        raise ValueError("prune: score was given with method 'random', expected one of the two")
    if train is None and (head is not None or isinstance(rewind, Mapping)):
        name = "rewind" if head is None else "head"
        raise ValueError(f"prune: {name} was given without train, expected both: nothing is rewound without training")


def _check_layers(model: nn.Module, layers: Mapping[str, Prunable], method: str, block: tuple[int, int]) -> None:
    if method != "imp":  # masks leave the weight where it is
        try:
            check_untied(model, layers)
        except ValueError as error:
            raise ValueError(f"prune: {error}") from None
    for name, layer in layers.items():
        if isinstance(layer, TicketLinear):
            if method == "imp":
                raise ValueError(f"prune: {name} is a ticket of blocks, expected method 'block_imp' or 'one_shot'")
            if layer.block != block:
                raise ValueError(f"prune: block is {block}, expected {layer.block} as {name} has it")
        elif method != "imp" and (block[0] > layer.out_features or block[1] > layer.in_features):
            raise ValueError(
                f"prune: block is {block}, expected no more than the layer, {name} is "
                f"[{layer.out_features}, {layer.in_features}]; leave it out by exclude="
            )
        elif hasattr(layer, "weight_mask") and method != "imp":
            raise ValueError(f"prune: {name} has a mask of elements, expected method 'imp', or blockify")


def _elements(
    layers: Mapping[str, Prunable],
    density: float,
    scope: str,
    floor: float,
    score: Callable[[str, Any], Tensor] | None,
) -> dict[str, Tensor]:
    """Masks of the elements that survive one more round."""
    scores = {name: element_scores(score, name, layer) for name, layer in layers.items()}
    sizes = {name: torch.ones_like(s, dtype=torch.uint8) for name, s in scores.items()}
    allowed = {
        name: getattr(layer, "weight_mask", sizes[name]) != 0  # a uint8 table of ones where there is no mask yet
        for name, layer in layers.items()
    }
    return selection.choose(scores, sizes, density, scope, allowed, floor)


def _random(
    layers: Mapping[str, Prunable], block: tuple[int, int], generator: torch.Generator
) -> Callable[[str, Any], Tensor]:
    """A score that is one random number a block."""

    def score(name: str, layer: Any) -> Tensor:
        rows, columns = -(-layer.out_features // block[0]), -(-layer.in_features // block[1])
        drawn = torch.rand(rows, columns, generator=generator)
        wide = drawn.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return wide[: layer.out_features, : layer.in_features].to(dense_weight(layer).device)

    return score


def _origin(
    model: nn.Module,
    layers: Mapping[str, Prunable],
    before: Mapping[str, Tensor],
    rewind: bool | Mapping[str, Tensor],
    head: Sequence[str | nn.Module] | None,
) -> dict[str, Tensor] | None:
    """What rewinding goes back to, by the names of the model before pruning; None where nothing is rewound."""
    if not rewind and not isinstance(rewind, Mapping):
        return None
    kept = {name: t.detach().clone() for name, t in backbone(model, head).items()}
    kept |= {f"{name}.weight": weight for name, weight in before.items()}
    if not isinstance(rewind, Mapping):
        return kept
    missing = [name for name in layers if f"{name}.weight" not in rewind]
    if missing:
        raise ValueError(f"prune: rewind has no {missing[0]}.weight, expected a state dict of the model")
    given = {name: rewind[name] for name in (n.removesuffix("_orig") for n in kept) if name in rewind}
    for name, t in given.items():
        shape = list(kept[name if name in kept else f"{name}_orig"].shape)
        if not isinstance(t, Tensor) or list(t.shape) != shape:
            came = f"shape {list(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(f"prune: rewind has {came} for {name}, expected a tensor {shape} as the model has it")
    return {name: t.detach().clone() for name, t in given.items()}


@torch.no_grad()
def _rewind(model: nn.Module, origin: Mapping[str, Tensor], pruned: set[str]) -> None:
    """Copies weights back; those of tickets among the pruned layers were, with their blocks."""
    for path, module in model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            source = origin.get(f"{path}.{name.removesuffix('_orig')}" if path else name)
            done = path in pruned and name in ("values", "index", "weight_mask")
            if t is not None and source is not None and not done:
                t.copy_(source)
                t.grad = None
        if hasattr(module, "weight_mask"):
            refresh(module)
