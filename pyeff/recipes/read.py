"""READ on a real model: a frozen backbone, and a small recurrent network over its depth that corrects its output.

    attachment = read.attach(model)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-3)
    ...
    attachment.save("task.safetensors")

Source: Nguyen et al., 2023, arXiv 2305.15348, section 3.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyeff.nn import ReadAdapter
from pyeff.recipes import _files
from pyeff.recipes._cross import CROSS_ATTENTION, CrossJoiner, FFNJoiner
from pyeff.recipes._read_attachment import CHILD, Attachment
from pyeff.recipes._stacks import Stack, find_stacks, resolve

__all__ = ["Attachment", "attach", "from_file"]

_IN_FILE = (
    "rank", "cell", "norm", "eps", "reduce", "bias", "scale", "embed_state", "joiner", "train", "tasks",
)  # fmt: skip
# Of the configuration in a file: another number where what is read here would mean something else.
_VERSION = 1
_STORES = {None: None, "bf16": torch.bfloat16}


def attach(
    model: nn.Module | Sequence[nn.Module],
    rank: int = 256,
    cell: str = "gru",
    norm: str = "rms",
    reduce: str = "mean",
    layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    eps: float = 1e-6,
    bias: bool = True,
    scale: float = 1.0,
    zero_init: bool = True,
    joiner: str | None = "auto",
    train: Sequence[str | nn.Module] = (),
    recompute: bool = False,
    embed_state: bool = False,
    store: str | None = None,
    pack: bool = False,
    tasks: Sequence[str] | None = None,
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    output: str | nn.Module | None = None,
    width: int | None = None,
    cross_attention: str | None = None,
    dtype: torch.dtype | None = None,
) -> Attachment:
    """Freezes ``model`` and corrects its output by READ, through hooks; the model's own code stays as it is.

    Of an encoder or decoder, the module that owns the layers returns corrected states, so that poolers and heads see
    them. Of a Hugging Face encoder-decoder, only the decoder's output is corrected. The encoder's states stay the
    backbone's own, or gradients would have to pass through the frozen decoder; the encoder's correction instead reaches
    the decoder's recurrence through a joiner: ``e_j`` is that correction, averaged by the backbone's own
    cross-attention probabilities of decoder layer j (mean over the heads). **The joiner is a reconstruction**: the
    paper's exact one was not available to us.

    With gradients enabled, references to the layer outputs are kept and the recurrence runs as one operation. Without,
    the recurrence streams and no layer output is kept. Adapters are submodules of the model (named ``read_adapter``),
    so attach before wrapping in DistributedDataParallel or FSDP and before building the optimizer. Activation
    checkpointing works and gains nothing: autograd records nothing of a frozen backbone.

    Args:
        model (Module or sequence of Module): any model with a stack of layers, from Hugging Face or not; or the layers
            themselves, in their order, the last one's output being corrected.
        rank (int), cell (str), norm (str), reduce (str), eps (float), bias (bool), scale (float), zero_init (bool),
        recompute (bool), embed_state (bool): as in :class:`pyeff.nn.ReadAdapter`. With ``zero_init`` the first output
            is the backbone's own, exactly. ``embed_state`` projects the first layer's input to the first state.
        layers (sequence of int, or mapping, optional): the layers that are read; a mapping has one for ``"encoder"``
            and ``"decoder"``, or for one of them. Default: all.
        joiner (str, optional): of an encoder-decoder: ``"cross"`` for ``x_j = phi_j + P e_j``, ``"ffn"`` for
            ``x_j = phi_j + W2 gelu(W1 [phi_j; e_j])``, or None to read the decoder alone. Default: ``"cross"`` where
            there are an encoder and a decoder.
        train (sequence of str or Module): modules that stay trainable, such as the task's head; a name may be the end
            of a path, as ``"classifier"``.
        store (str, optional): ``"bf16"`` keeps (and computes on) layer outputs in bfloat16. Default: references.
        pack (bool): leave padding out of the recurrence, by the 2-D ``attention_mask`` that the model is called with;
            its tokens keep the backbone's output. Copies the layer outputs and waits for the device once a call, so it
            pays where much is padding.
        tasks (sequence of str, optional): one adapter for each of these over one pass of the backbone, their corrected
            outputs stacked along the first dimension. :attr:`Attachment.tasks` chooses some of them. Not for an
            encoder-decoder.
        stack (str, Module or mapping, optional): where the layers are, if not in the ModuleList of alike modules that
            holds most of the parameters. A mapping names ``"encoder"`` and ``"decoder"``.
        output (str or Module, optional): the module whose output is corrected. Default: the owner of the layers, or its
            final norm if it also has a pooler.
        width (int, optional): of the layer outputs. Default: the configuration's ``hidden_size``, or a guess that the
            first call checks.
        cross_attention (str, optional): regular expression for the names of the decoder layers' cross-attention
            modules. Default: the usual names.
        dtype (torch.dtype, optional): of the adapter. Default: the backbone's, and float32 for one in half precision.

    Returns:
        Attachment: parameters, saving and loading, and the way back.

    Raises:
        ValueError: no stack was found or several fit, an unknown name or option, an option that cannot apply, or the
            model has an attachment already.

    Example:
        >>> import torch
        >>> from pyeff.recipes import read
        >>> blocks = [torch.nn.Linear(16, 16) for _ in range(3)]
        >>> attachment = read.attach(blocks, rank=8)
        >>> y = blocks[2](blocks[1](blocks[0](torch.randn(5, 16))))
        >>> y.sum().backward()
        >>> sorted(name for name, p in attachment.named_parameters() if p.grad is not None)[:2]
        ['adapter.bias_hh_l0', 'adapter.bias_ih_l0']
        >>> attachment.detach()
        >>> all(p.requires_grad for block in blocks for p in block.parameters())
        True
    """
    if store not in _STORES:
        raise ValueError(f"store is {store!r}, expected None or 'bf16'")
    if joiner not in (None, "auto", "cross", "ffn"):
        raise ValueError(f"joiner is {joiner!r}, expected 'auto', 'cross', 'ffn' or None")
    if pack and not isinstance(model, nn.Module):
        raise ValueError("pack is True with a list of modules, expected a model that takes an attention_mask")
    stacks = find_stacks(model, stack, output)
    if joiner in ("cross", "ffn") and "encoder" not in stacks:
        raise ValueError(f"joiner is {joiner!r}, expected 'auto' or None: the model is no encoder-decoder")
    if joiner is None:
        stacks.pop("encoder", None)
    joiner = None if "encoder" not in stacks else "cross" if joiner == "auto" else joiner
    if cross_attention is not None and joiner is None:
        raise ValueError(f"cross_attention is {cross_attention!r}, expected None without a joiner")
    if isinstance(layers, Mapping) and not set(layers) <= set(stacks):
        raise ValueError(f"layers has the keys {list(layers)}, expected {' and '.join(map(repr, stacks))} at most")
    if isinstance(model, nn.Module):
        root = model
    else:
        root = nn.ModuleList([*model, output] if isinstance(output, nn.Module) else model)
    options: dict[str, Any] = {"cell": cell, "norm": norm, "eps": eps, "reduce": reduce, "bias": bias, "scale": scale}
    make = functools.partial(
        ReadAdapter, rank=rank, zero_init=zero_init, recompute=recompute, embed_state=embed_state, **options
    )
    read, adapters, heads = {}, {}, {}
    for label, found in stacks.items():
        if hasattr(found.home, CHILD):
            raise ValueError(f"{found.name} has an attachment already; detach it first")
        found.width = found.width if width is None else width
        if found.width is None:
            raise ValueError(f"the width of {found.name} could not be told, expected width=")
        read[label] = _chosen(layers, label, found)
        for name in _names(tasks, label):
            adapters[name] = make(width=found.width, **_placement(found, dtype))
    for item in train:
        module = resolve(root, item, "train")
        path = next((path for path, m in root.named_modules() if m is module), None)
        if path is None:
            raise ValueError(f"train: the {type(module).__name__} is not a module of the model")
        heads[path] = module
    join: nn.Module | None = None
    if "encoder" in stacks:
        sizes = adapters["decoder"].width, adapters["encoder"].width
        like = _placement(stacks["decoder"], dtype)
        join = CrossJoiner(*sizes, **like) if joiner == "cross" else FFNJoiner(*sizes, rank, **like)
    config = {
        "recipe": "read", "version": _VERSION, "rank": rank, **options, "embed_state": embed_state,
        "joiner": joiner,
        "stacks": {key: {"width": s.width, "of": len(s.layers), "layers": read[key]} for key, s in stacks.items()},
        "train": sorted(heads), "tasks": None if tasks is None else list(tasks),
    }  # fmt: skip
    return Attachment(
        root,
        stacks,
        read,
        adapters,
        join,
        heads,
        config,
        store=_STORES[store],
        pack=pack,
        cross_attention=CROSS_ATTENTION if cross_attention is None else cross_attention,
    )


def from_file(model: nn.Module | Sequence[nn.Module], path: str | os.PathLike, **where: Any) -> Attachment:
    """Attaches what a file holds: :func:`attach` with its configuration, then :meth:`Attachment.load`.

    Args:
        model (Module or sequence of Module): as in :func:`attach`.
        path (path): written by :meth:`Attachment.save`.
        **where: ``stack``, ``output``, ``width``, ``store``, ``pack``, ``recompute``, ``dtype`` or ``cross_attention``,
            which a file does not decide.

    Returns:
        Attachment: attached and loaded.

    Raises:
        ValueError: the file is broken, not of this recipe, or does not fit. Whatever is raised, the model is then as it
            was.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, torch
        >>> from pyeff.recipes import read
        >>> block = torch.nn.Linear(16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with read.attach([block], rank=8, cell="lstm") as attachment:
        ...         attachment.save(f"{folder}/task.safetensors")
        ...     attachment = read.from_file([block], f"{folder}/task.safetensors")
        >>> attachment.adapter.cell
        'lstm'
    """
    config = _files.read_config(path)
    if config.get("recipe") != "read":
        raise ValueError(f"{os.fspath(path)} is of the recipe {config.get('recipe')!r}, expected 'read'")
    if config.get("version") != _VERSION:
        raise ValueError(f"{os.fspath(path)} has version {config.get('version')!r}, expected {_VERSION}")
    missing = sorted({*_IN_FILE, "stacks"} - config.keys())
    if missing:
        raise ValueError(f"{os.fspath(path)} has a configuration without {', '.join(missing)}")
    options = {name: config[name] for name in _IN_FILE}
    kinds: dict[str, Any] = {"stacks": dict, "train": list, "tasks": (list, type(None))}
    wrong = [f"{name} {config[name]!r}" for name, kind in kinds.items() if not isinstance(config[name], kind)]
    wrong = wrong or [f"stack {s!r}" for s in config["stacks"].values() if not isinstance(s, dict) or "layers" not in s]
    if wrong:
        raise ValueError(f"{os.fspath(path)} has a configuration with {wrong[0]}, expected what save writes")
    layers = {label: stack["layers"] for label, stack in config["stacks"].items()}
    try:
        attachment = attach(model, layers=layers, **options, **where)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be attached: {error}") from error
    try:
        return attachment.load(path)
    except BaseException:
        attachment.detach()
        raise


def _names(tasks: Sequence[str] | None, label: str) -> list[str]:
    """What the adapters of a stack are called."""
    if tasks is None:
        return [label]
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if (
        not names
        or len(set(names)) != len(names)
        or not all(isinstance(name, str) and name.isidentifier() for name in names)
    ):
        raise ValueError(f"tasks is {tasks!r}, expected one or more different identifiers")
    if label != "adapter":
        raise ValueError(f"tasks is {tasks!r} with an encoder-decoder, expected None")
    return names


def _chosen(layers: Any, label: str, stack: Stack) -> list[int]:
    count = len(stack.layers)
    chosen = layers.get(label) if isinstance(layers, Mapping) else layers
    if chosen is None:
        return list(range(count))
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        raise ValueError(f"layers is {chosen!r}, expected a sequence of integers for {stack.name}")
    for i in chosen:
        if not isinstance(i, int) or isinstance(i, bool) or not -count <= i < count:
            raise ValueError(f"layers has {i!r}, expected integers from {-count} to {count - 1} for {stack.name}")
    chosen = sorted(i % count for i in chosen)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"layers is {chosen}, expected at least one layer of {stack.name}, and each once")
    return chosen


def _placement(stack: Stack, dtype: torch.dtype | None) -> dict[str, Any]:
    """Device and dtype for what is attached to a stack."""
    like = next((p for p in stack.layers[-1].parameters() if p.is_floating_point()), torch.empty(0))
    half = like.dtype in (torch.bfloat16, torch.float16)
    return {"device": like.device, "dtype": dtype or (torch.float32 if half else like.dtype)}
