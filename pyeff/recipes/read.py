"""READ on a real model: a frozen backbone, and a small recurrent network over its depth that corrects its output.

    attachment = read.attach(model)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-3)
    ...
    attachment.save("task.safetensors")

Source: Nguyen et al., 2023, arXiv 2305.15348, section 3.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.nn import ReadAdapter
from pyeff.recipes import _files
from pyeff.recipes._cross import CROSS_ATTENTION, CrossCapture, CrossJoiner, FFNJoiner
from pyeff.recipes._hooks import Freeze, Local, Watcher
from pyeff.recipes._read_sessions import Probabilities, ReadSession
from pyeff.recipes._stacks import Stack, find_stacks, resolve

_CHILD, _JOINER = "read_adapter", "read_joiner"
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
    joiner: str | None = "cross",
    train: Sequence[str | nn.Module] = (),
    recompute: bool = False,
    embed_state: bool = False,
    store: str | None = None,
    stack: str | nn.Module | Mapping[str, str | nn.Module] | None = None,
    output: str | nn.Module | None = None,
    width: int | None = None,
    cross_attention: str = CROSS_ATTENTION,
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
    so attach before wrapping in DistributedDataParallel or building the optimizer.

    Args:
        model (Module or sequence of Module): any model with a stack of layers, from Hugging Face or not; or the layers
            themselves, in their order, the last one's output being corrected.
        rank (int), cell (str), norm (str), reduce (str), eps (float), bias (bool), scale (float), zero_init (bool),
        recompute (bool), embed_state (bool): as in :class:`pyeff.nn.ReadAdapter`. With ``zero_init`` the first output
            is the backbone's own, exactly. ``embed_state`` projects the first layer's input to the first state.
        layers (sequence of int, or mapping, optional): the layers that are read; a mapping has one for ``"encoder"``
            and ``"decoder"``. Default: all.
        joiner (str, optional): of an encoder-decoder: ``"cross"`` for ``x_j = phi_j + P e_j``, ``"ffn"`` for
            ``x_j = phi_j + W2 gelu(W1 [phi_j; e_j])``, or None to read the decoder alone.
        train (sequence of str or Module): modules that stay trainable, such as the task's head; a name may be the end
            of a path, as ``"classifier"``.
        store (str, optional): ``"bf16"`` keeps (and computes on) layer outputs in bfloat16. Default: references.
        stack (str, Module or mapping, optional): where the layers are, if not in the ModuleList of alike modules that
            holds most of the parameters. A mapping names ``"encoder"`` and ``"decoder"``.
        output (str or Module, optional): the module whose output is corrected. Default: the owner of the layers, or its
            final norm if it also has a pooler.
        width (int, optional): of the layer outputs. Default: the configuration's ``hidden_size``, or a guess that the
            first call checks.
        cross_attention (str): regular expression for the names of the decoder layers' cross-attention modules.
        dtype (torch.dtype, optional): of the adapter. Default: the backbone's, and float32 for one in half precision.

    Returns:
        Attachment: parameters, saving and loading, and the way back.

    Raises:
        ValueError: no stack was found or several fit, an unknown name or option, or the model has an attachment
            already.

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
    if joiner not in (None, "cross", "ffn"):
        raise ValueError(f"joiner is {joiner!r}, expected 'cross', 'ffn' or None")
    stacks = find_stacks(model, stack, output)
    if joiner is None:
        stacks.pop("encoder", None)
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
        if hasattr(found.home, _CHILD):
            raise ValueError(f"{found.name} has an attachment already; detach it first")
        found.width = found.width if width is None else width
        if found.width is None:
            raise ValueError(f"the width of {found.name} could not be told, expected width=")
        read[label] = _chosen(layers, label, found)
        adapters[label] = make(width=found.width, **_placement(found, dtype))
    for item in train:
        module = resolve(root, item, "train")
        name = next((name for name, m in root.named_modules() if m is module), None)
        if name is None:
            raise ValueError(f"train: the {type(module).__name__} is not a module of the model")
        heads[name] = module
    join: nn.Module | None = None
    if "encoder" in stacks:
        sizes = adapters["decoder"].width, adapters["encoder"].width
        like = _placement(stacks["decoder"], dtype)
        join = CrossJoiner(*sizes, **like) if joiner == "cross" else FFNJoiner(*sizes, rank, **like)
    config = {
        "recipe": "read", "version": 1, "rank": rank, **options, "embed_state": embed_state,
        "joiner": joiner if join else None,
        "stacks": {key: {"width": s.width, "of": len(s.layers), "layers": read[key]} for key, s in stacks.items()},
        "train": sorted(heads),
    }  # fmt: skip
    return Attachment(root, stacks, read, adapters, join, heads, config, _STORES[store], cross_attention)


def _chosen(layers: Any, label: str, stack: Stack) -> list[int]:
    count = len(stack.layers)
    chosen = layers.get(label) if isinstance(layers, Mapping) else layers
    if chosen is None:
        return list(range(count))
    chosen = list(chosen)
    for i in chosen:
        if not isinstance(i, int) or not -count <= i < count:
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


class Attachment:
    """READ attached to a model: what :func:`attach` returns.

    As a context manager it detaches at the end.

    Attributes:
        adapters (dict of ReadAdapter): ``"adapter"``, or ``"encoder"`` and ``"decoder"``.
        joiner (Module, optional): of an encoder-decoder.
        config (dict): what a saved file is checked against.

    Example:
        >>> import torch
        >>> from pyeff.recipes import read
        >>> block = torch.nn.Linear(16, 16)
        >>> with read.attach([block], rank=8) as attachment:
        ...     attachment
        Attachment(layers: 1 of 1 layers, 16 wide; gru, rank 8; 784 trainable parameters)
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: dict[str, Stack],
        layers: dict[str, list[int]],
        adapters: dict[str, ReadAdapter],
        joiner: nn.Module | None,
        heads: dict[str, nn.Module],
        config: dict[str, Any],
        store: torch.dtype | None,
        cross_attention: str,
    ) -> None:
        self.adapters, self.joiner, self.config = adapters, joiner, config
        self._stacks, self._heads, self._store = stacks, heads, store
        self._local, self._watchers = Local(), {}
        # First what may fail, then what changes the model.
        self._capture: CrossCapture | None = None
        if joiner is not None:
            decoder = stacks["decoder"]
            self._capture = CrossCapture([decoder.layers[i] for i in layers["decoder"]], self._sink, cross_attention)
            self._signature = inspect.signature(decoder.opener.forward)
        self._freeze = Freeze(model.parameters(), (p for module in heads.values() for p in module.parameters()))
        for label, stack in stacks.items():
            stack.home.add_module(_CHILD, adapters[label].train(stack.home.training))
            first_input = ReadSession.first_input if config["embed_state"] else None
            begin = functools.partial(self._begin, label)
            self._watchers[label] = Watcher(stack, begin, layers[label], first_input)
        if joiner is not None:
            stacks["decoder"].home.add_module(_JOINER, joiner)

    @property
    def adapter(self) -> ReadAdapter:
        """The adapter that corrects the output: the only one, or the decoder's."""
        return self.adapters.get("adapter") or self.adapters["decoder"]

    @property
    def enabled(self) -> bool:
        """Whether the output is corrected; set it to False for the backbone's own output."""
        return bool(self._watchers) and all(watcher.active for watcher in self._watchers.values())

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for watcher in self._watchers.values():
            watcher.active = bool(value)

    def modules(self) -> dict[str, nn.Module]:
        """What trains, by name: adapters, joiner, and the modules kept trainable as ``train.<path>``."""
        named: dict[str, nn.Module] = dict(self.adapters)
        if self.joiner is not None:
            named["joiner"] = self.joiner
        return named | {f"train.{name}": module for name, module in self._heads.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter once, with its name in saved files."""
        seen: set[int] = set()
        for prefix, module in self.modules().items():
            for name, p in module.named_parameters(prefix):
                if id(p) not in seen:
                    seen.add(id(p))
                    yield name, p

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter, for an optimizer."""
        return (p for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of everything that trains, and nothing of the backbone."""
        named = self.modules().items()
        return {name: t for prefix, module in named for name, t in module.state_dict(prefix=f"{prefix}.").items()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes :meth:`state_dict` as safetensors, with the configuration in its metadata."""
        _files.save(path, self.state_dict(), self.config)

    def load(self, path: str | os.PathLike) -> Attachment:
        """Reads what :meth:`save` wrote.

        Returns:
            Attachment: self.

        Raises:
            ValueError: configuration, names or shapes differ; the message says which, and nothing was changed.
        """
        _files.load(path, self.state_dict(), self.config)
        return self

    def train(self, mode: bool = True) -> Attachment:
        """Training mode for everything that trains; the backbone's mode is the model's own affair."""
        for module in self.modules().values():
            module.train(mode)
        return self

    def eval(self) -> Attachment:
        """Evaluation mode for everything that trains."""
        return self.train(False)

    def detach(self) -> None:
        """Takes hooks and adapters off the model and restores every ``requires_grad``. The parameters stay usable."""
        if not self._watchers:
            return
        for label, watcher in self._watchers.items():
            watcher.remove()
            delattr(self._stacks[label].home, _CHILD)
        if self._capture is not None:
            delattr(self._stacks["decoder"].home, _JOINER)
            self._capture.remove()
        self._watchers = {}
        self._local = Local()
        self._freeze.restore()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        stacks = ", ".join(
            f"{self._stacks[key].name}: {len(s['layers'])} of {s['of']} layers, {s['width']} wide"
            for key, s in self.config["stacks"].items()
        )
        count = sum(p.numel() for p in self.parameters())
        return (
            f"Attachment({stacks}; {self.config['cell']}, rank {self.config['rank']}; {count:,} trainable parameters)"
        )

    def _begin(self, label: str, args: tuple, kwargs: dict) -> ReadSession:
        trained = [
            p for module in (*self.adapters.values(), self.joiner) if module is not None for p in module.parameters()
        ]
        streaming = not (torch.is_grad_enabled() and any(p.requires_grad for p in trained))
        session = functools.partial(
            ReadSession, self.adapters[label], self._stacks[label].name, streaming=streaming, store=self._store
        )
        if label == "encoder":
            return session(deliver=self._deliver)
        if label == "adapter" or self.joiner is None:
            return session()
        states = self._signature.bind_partial(*args, **kwargs).arguments.get("encoder_hidden_states")
        return session(joiner=self.joiner, encoded=None if states is None else self._encoded(states))

    def _deliver(self, states: Tensor, correction: Tensor) -> None:
        self._local.encoded = (states, correction)

    def _encoded(self, states: Tensor) -> Tensor:
        """The correction of the encoder states that a decoder was given; those of the last encoder call in this thread.

        Generation calls the encoder once and the decoder for every token, with the states repeated for each beam.
        """
        known: tuple[Tensor, Tensor] | None = getattr(self._local, "encoded", None)
        if known is not None:
            own, correction = known
            if states is own:
                return correction
            beams = states.shape[0] // max(own.shape[0], 1)
            same = states.shape == (beams * own.shape[0], *own.shape[1:])
            if same and torch.equal(states, own.repeat_interleave(beams, 0)):
                correction = correction.repeat_interleave(beams, 0)
                self._local.encoded = (states, correction)
                return correction
        raise RuntimeError(
            "the decoder was given encoder states whose correction is not known; run the attached model's encoder in "
            "this thread right before, or attach with joiner=None"
        )

    def _sink(self, *probabilities: Probabilities) -> bool:
        """Whether probabilities are wanted now; takes them if they are given."""
        session: ReadSession | None = self._watchers["decoder"].session if "decoder" in self._watchers else None
        if session is None or not session.wants_probabilities:
            return False
        if probabilities:
            session.probabilities = probabilities[0]
        return True
