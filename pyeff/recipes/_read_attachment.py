"""READ attached to a model: its parameters, its files, its switches and the way back."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyeff.nn import ReadAdapter
from pyeff.recipes import _files
from pyeff.recipes._cross import CrossCapture
from pyeff.recipes._hooks import Freeze, Local, Watcher
from pyeff.recipes._read_sessions import Probabilities, ReadSession
from pyeff.recipes._stacks import Stack

CHILD, JOINER = "read_adapter", "read_joiner"
# How the models' own calls name the padding mask of each stack.
_MASKS = {"adapter": "attention_mask", "encoder": "attention_mask", "decoder": "decoder_attention_mask"}


def _is_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _repeats(states: Tensor, own: Tensor) -> bool:
    """Whether ``states`` are ``own``, each row as often as there are beams."""
    beams = states.shape[0] // max(own.shape[0], 1)
    same = states.shape == (beams * own.shape[0], *own.shape[1:])
    return same and torch.equal(states, own.repeat_interleave(beams, 0))


class Attachment:
    """READ attached to a model: what :func:`attach` returns.

    As a context manager it detaches at the end.

    Args:
        model (Module): what is frozen, but for ``heads``.
        stacks (dict of Stack), layers (dict of list of int): by stack: where it is, and which of its layers are read.
        adapters (dict of ReadAdapter): by stack, or by task.
        joiner (Module, optional): of an encoder-decoder.
        heads (dict of Module): by path: modules of the model that stay trainable.
        config (dict): what a saved file is checked against.
        store (torch.dtype, optional), pack (bool), cross_attention (str): as of :func:`attach`.

    Attributes:
        adapters (dict of ReadAdapter): ``"adapter"``, or ``"encoder"`` and ``"decoder"``, or one for each task.
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
        *,
        store: torch.dtype | None,
        pack: bool,
        cross_attention: str,
    ) -> None:
        self.adapters, self.joiner, self.config = adapters, joiner, config
        self._stacks, self._heads, self._store, self._pack = stacks, heads, store, pack
        self._active = tuple(config["tasks"] or ())
        self._local, self._watchers = Local(), {}
        self._signatures = {label: inspect.signature(stack.opener.forward) for label, stack in stacks.items()}
        # First what may fail, then what changes the model.
        self._capture: CrossCapture | None = None
        if joiner is not None:
            decoder = stacks["decoder"]
            self._capture = CrossCapture([decoder.layers[i] for i in layers["decoder"]], self._sink, cross_attention)
        self._freeze = Freeze(model.parameters(), (p for module in heads.values() for p in module.parameters()))
        for label, stack in stacks.items():
            child = nn.ModuleDict(adapters) if config["tasks"] else adapters[label]
            stack.home.add_module(CHILD, child.train(stack.home.training))
            first_input = ReadSession.first_input if config["embed_state"] else None
            begin = functools.partial(self._begin, label)
            self._watchers[label] = Watcher(stack, begin, layers[label], first_input)
        if joiner is not None:
            stacks["decoder"].home.add_module(JOINER, joiner)
        self._handles = []
        if pack or joiner is not None:
            self._handles.append(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._leave_model, always_call=True))
            self._model_signature = inspect.signature(model.forward)

    @property
    def adapter(self) -> ReadAdapter:
        """The adapter that corrects the output: the only one, the decoder's, or the first active task's."""
        label = next(iter(self._active), "decoder" if "decoder" in self.adapters else "adapter")
        return self.adapters[label]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The active tasks, in the order in which their corrected outputs are stacked along the first dimension.

        Raises:
            ValueError: on setting something else than one or more of the tasks that were attached, each once.
        """
        return self._active

    @tasks.setter
    def tasks(self, names: Sequence[str]) -> None:
        known, names = self.config["tasks"] or (), (names,) if isinstance(names, str) else tuple(names)
        if not names or len(set(names)) != len(names) or not set(names) <= set(known):
            raise ValueError(f"tasks is {names}, expected one or more of {tuple(known)}, each once")
        self._active = names

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

    def save(self, path: str | os.PathLike, task: str | None = None) -> None:
        """Writes :meth:`state_dict` as safetensors, with the configuration in its metadata.

        Args:
            path (path): the file.
            task (str, optional): write this task's adapter alone, as that of a model with one.
        """
        _files.save(path, *self._file(task))

    def load(self, path: str | os.PathLike, task: str | None = None) -> Attachment:
        """Reads what :meth:`save` wrote, cast to the dtypes of the modules here.

        Args:
            path (path): the file.
            task (str, optional): read an adapter that was alone in its model as this task's.

        Returns:
            Attachment: self.

        Raises:
            ValueError: configuration, names or shapes differ, or a dtype that is not floating-point; the message says
                which, and nothing was changed.
        """
        _files.load(path, *self._file(task))
        return self

    def _file(self, task: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if task is None:
            return self.state_dict(), self.config
        if task not in (self.config["tasks"] or ()):
            raise ValueError(f"task is {task!r}, expected one of {tuple(self.config['tasks'] or ())}")
        return self.adapters[task].state_dict(prefix="adapter."), self.config | {"tasks": None, "train": []}

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
            delattr(self._stacks[label].home, CHILD)
        if self._capture is not None:
            delattr(self._stacks["decoder"].home, JOINER)
            self._capture.remove()
        for handle in self._handles:
            handle.remove()
        self._watchers, self._handles = {}, []
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
        adapters = [self.adapters[name] for name in (self._active or (label,))]
        trained = (p for module in (*self.adapters.values(), self.joiner) if module for p in module.parameters())
        streaming = not (torch.is_grad_enabled() and any(p.requires_grad for p in trained))
        stack = self._stacks[label]
        drops = stack.opener.training and getattr(stack.opener, "layerdrop", 0) > 0
        session = functools.partial(
            ReadSession, adapters, stack.name, streaming=streaming, store=self._store, may_skip=drops
        )
        if self._pack:
            own = self._signatures[label].bind_partial(*args, **kwargs).arguments.get("attention_mask")
            masks = getattr(self._local, "masks", {})
            session.keywords["mask"] = own if _is_mask(own) else masks.get(_MASKS[label])
        if label == "encoder":
            return session(deliver=self._deliver)
        if label != "decoder" or self.joiner is None:
            return session()
        states = self._signatures[label].bind_partial(*args, **kwargs).arguments.get("encoder_hidden_states")
        return session(joiner=self.joiner, encoded=None if states is None else self._encoded(states))

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._local.before = getattr(self._local, "known", None)
        if self._pack:
            arguments = self._model_signature.bind_partial(*args, **kwargs).arguments
            named = {**arguments.get("kwargs", {}), **arguments}
            self._local.masks = {name: named.get(name) for name in _MASKS.values() if _is_mask(named.get(name))}

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        local = self._local
        local.masks = {}
        known, before, local.before = getattr(local, "known", None), getattr(local, "before", None), None
        # The encoder ran within this call. A graph may hold the states too, so that they would not die by themselves.
        if known is not before and known is not None and any(t.requires_grad for t in known.values()):
            local.known, local.fresh = None, None

    def _deliver(self, states: Tensor, correction: Tensor) -> None:
        self._local.known = WeakTensorKeyDictionary({states: correction})
        # Generation repeats the states for its beams and drops these before a decoder has seen any.
        self._local.fresh = None if correction.requires_grad else states

    def _encoded(self, states: Tensor) -> Tensor:
        """The correction of the encoder states that a decoder was given; those of the last encoder call in this thread.

        Generation calls the encoder once and the decoder for every token, with the states repeated for each beam. A
        correction is kept as long as somebody else keeps the states that it belongs to.
        """
        known = getattr(self._local, "known", None) or {}
        correction = known.get(states)
        if correction is None:
            correction = next((c for own, c in known.items() if _repeats(states, own)), None)
            if correction is None:
                raise RuntimeError(
                    "the decoder was given encoder states whose correction is not known; run the attached model's "
                    "encoder in this thread right before, or attach with joiner=None"
                )
            correction = correction.repeat_interleave(states.shape[0] // max(correction.shape[0], 1), 0)
            known[states] = correction
        self._local.fresh = None
        return correction

    def _sink(self, *probabilities: Probabilities) -> bool:
        """Whether probabilities are wanted now; takes them if they are given."""
        session: ReadSession | None = self._watchers["decoder"].session if "decoder" in self._watchers else None
        if session is None or not session.wants_probabilities:
            return False
        if probabilities:
            session.probabilities = probabilities[0]
        return True
