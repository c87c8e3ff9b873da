"""Targets from a teacher as it runs, or from the outputs that it gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import ops
from pyeff.plans.mask import checked_lengths
from pyeff.reference.multimask import NORMS, wide


def _check(name: str, norm: str, post_norm: str) -> None:
    for argument, value in (("norm", norm), ("post_norm", post_norm)):
        if value not in NORMS:
            raise ValueError(f"{name}: {argument} is {value!r}, expected one of {', '.join(map(repr, NORMS))}")


class MultimaskTargets(nn.Module):
    """The mean over layers, each of them normalised: :func:`pyeff.ops.multimask_targets` with its options at hand.

    Args:
        norm (str), post_norm (str): ``"instance"``, ``"layer"``, ``"batch"`` or ``"none"``: of each layer, and of the
            mean.
        eps (float): added to the variances.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> import torch, pyeff
        >>> targets = pyeff.nn.MultimaskTargets(norm="instance", post_norm="layer")
        >>> targets([torch.randn(2, 20, 16) for _ in range(4)]).shape
        torch.Size([2, 20, 16])
    """

    def __init__(self, norm: str = "instance", post_norm: str = "none", *, eps: float = 1e-5) -> None:
        super().__init__()
        _check("MultimaskTargets", norm, post_norm)
        self.norm, self.post_norm, self.eps = norm, post_norm, eps

    def forward(self, layers: Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Targets [B, T, D] of K layers [B, T, D]; ``lengths`` [B] where samples have padding."""
        return ops.multimask_targets(layers, lengths=lengths, norm=self.norm, post_norm=self.post_norm, eps=self.eps)

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, post_norm={self.post_norm!r}, eps={self.eps}"


class TargetRecorder:
    """Targets of a teacher's modules while it runs: each output is added to the mean when it is there, none is kept.

    The modules say what is taken: blocks for their outputs, or their MLPs for what these give before the residual is
    added, as data2vec 2.0 does (:meth:`LayerStack.mlps` lists them). Hooks are there only while recording, so that the
    teacher can be copied, saved and trained at any other time. A teacher under torch.compile does not see hooks that
    come later: take its outputs and :class:`MultimaskTargets`, or call :meth:`add` where it makes them.

    Args:
        modules (sequence of Module): K modules, each of which is called once in a pass.
        norm (str), post_norm (str), eps (float): as for :func:`pyeff.ops.multimask_targets`.
        prefix (int): leading tokens of the outputs that are no targets.
        collect (bool): keep the outputs and make the targets at the end. That reads each layer once and writes once,
            and needs the memory of K outputs.

    Attributes:
        targets (Tensor): [B, T, D] of the last recording.

    Raises:
        ValueError: no modules, one of them twice, or an unknown norm.

    Example:
        >>> import torch, pyeff
        >>> teacher = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
        >>> recorder = pyeff.nn.TargetRecorder(list(teacher)[-3:], post_norm="layer")
        >>> with torch.no_grad(), recorder.record():
        ...     output = teacher(torch.randn(2, 20, 16))
        >>> recorder.targets.shape
        torch.Size([2, 20, 16])
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        norm: str = "instance",
        post_norm: str = "none",
        eps: float = 1e-5,
        prefix: int = 0,
        collect: bool = False,
    ) -> None:
        self.modules = list(modules)
        if not self.modules or len({id(m) for m in self.modules}) != len(self.modules):
            raise ValueError(f"TargetRecorder: modules has {len(self.modules)} modules, expected some, each once")
        _check("TargetRecorder", norm, post_norm)
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(f"TargetRecorder: prefix is {prefix!r}, expected an integer of at least 0")
        self.norm, self.post_norm, self.eps, self.prefix, self.collect = norm, post_norm, eps, prefix, collect
        self._lengths: Tensor | None = None
        self._total: Tensor | None = None
        self._targets: Tensor | None = None
        self._layers: list[Tensor] = []
        self._count = 0

    @property
    def targets(self) -> Tensor:
        if self._targets is None:
            raise RuntimeError("TargetRecorder: nothing has been recorded yet")
        return self._targets

    @contextlib.contextmanager
    def record(self, lengths: Tensor | None = None) -> Iterator[TargetRecorder]:
        """Records what runs within; ``targets`` are there afterwards.

        Args:
            lengths (Tensor, optional): [B] integers, the tokens of each sample that are no padding (and no prefix).

        Raises:
            RuntimeError: a module was called more than once, or not at all.
        """
        self._begin(lengths)
        handles = [m.register_forward_hook(self._hook) for m in self.modules]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        self._finish()

    def add(self, output: Any) -> None:
        """Takes one output into the mean, as a hook does while :meth:`record` is open.

        Args:
            output (Tensor or tuple): [B, prefix + T, D], or a tuple that begins with it.
        """
        layer = output if isinstance(output, Tensor) else output[0]
        layer = layer.detach()[:, self.prefix :]
        self._count += 1
        if self._count > len(self.modules):
            raise RuntimeError(f"TargetRecorder: more outputs came than the {len(self.modules)} of modules")
        if self._lengths is None:
            self._lengths = checked_lengths("TargetRecorder", None, layer.shape[0], layer.shape[1], layer.device)
        if self.collect:
            self._layers.append(layer)
            return
        if self._total is None:
            self._total = torch.zeros(layer.shape, dtype=wide(layer.dtype), device=layer.device)
        ops.multimask_accumulate_(
            self._total, layer, weight=1 / len(self.modules), lengths=self._lengths, norm=self.norm, eps=self.eps
        )

    def _hook(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        self.add(output)

    def _begin(self, lengths: Tensor | None) -> None:
        self._lengths, self._total, self._layers, self._count = lengths, None, [], 0

    @torch.no_grad()
    def _finish(self) -> None:
        if self._count != len(self.modules):
            raise RuntimeError(
                f"TargetRecorder: {self._count} outputs came, expected those of {len(self.modules)} modules; a teacher "
                "under torch.compile calls no hooks"
            )
        total, layers, lengths = self._total, self._layers, self._lengths
        self._begin(None)
        if self.collect:
            self._targets = ops.multimask_targets(
                layers, lengths=lengths, norm=self.norm, post_norm=self.post_norm, eps=self.eps
            )
        elif self.post_norm == "none":
            self._targets = total
        else:
            assert total is not None
            self._targets = ops.multimask_targets([total], lengths=lengths, norm=self.post_norm, eps=self.eps)
