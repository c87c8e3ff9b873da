"""What READ does during one call of a stack: collect references and correct at the end, or stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyeff.nn import ReadAdapter

# Of a decoder layer's cross-attention: [B, T, S], or a function that computes them.
Probabilities = Tensor | Callable[[], Tensor] | None


class ReadSession:
    """One call of a stack.

    With ``streaming`` each layer output is consumed at once; else references are kept until the stack returns, and the
    whole recurrence runs as one operation.

    Args:
        adapter (ReadAdapter): the stack's.
        name (str): the layers' path, for messages.
        streaming (bool): see above.
        store (torch.dtype, optional): the dtype that layer outputs are kept in.
        joiner (Module, optional), encoded (Tensor, optional): of a decoder: the joiner and the encoder's
            correction [B, S, d].
        deliver (callable, optional): ``deliver(output, correction)`` takes the correction instead of the stack's
            output.
    """

    def __init__(
        self,
        adapter: ReadAdapter,
        name: str,
        *,
        streaming: bool,
        store: torch.dtype | None = None,
        joiner: nn.Module | None = None,
        encoded: Tensor | None = None,
        deliver: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.adapter, self.name, self.store = adapter, name, store
        self.joiner, self.encoded, self.deliver = joiner, encoded, deliver
        self.stream = adapter.stream() if streaming else None
        self.embedding: Tensor | None = None
        self.probabilities: Probabilities = None
        self._kept: list[tuple[Tensor, Probabilities]] = []

    @property
    def wants_probabilities(self) -> bool:
        """Whether cross-attention probabilities are to be computed."""
        return self.joiner is not None and self.encoded is not None

    def first_input(self, embedding: Tensor) -> None:
        """The first layer's input, which the first state is projected from."""
        self.embedding = embedding if self.store is None else embedding.to(self.store)
        if self.stream is not None:
            self.stream = self.adapter.stream(embedding=self.embedding)

    def layer(self, index: int, output: Tensor) -> None:
        if output.dim() == 0 or output.shape[-1] != self.adapter.width:
            raise ValueError(
                f"{self.name}[{index}] returns shape {list(output.shape)}, expected [*, {self.adapter.width}]; "
                "name the stack with stack=, or give its width"
            )
        phi = output if self.store is None else output.to(self.store)
        probabilities, self.probabilities = self.probabilities, None
        if self.wants_probabilities and probabilities is None:
            raise RuntimeError(
                f"{self.name}[{index}] ran without its cross-attention going through transformers' attention "
                "interface; use joiner=None"
            )
        if self.stream is not None:
            self.stream.push(self._join(phi, probabilities))
        else:
            # The joiner waits for the end: this layer may be in a checkpoint, which saves what its rerun will save too.
            self._kept.append((phi, probabilities))

    def close(self, output: Tensor) -> Tensor | None:
        if self.stream is not None:
            if self.stream.count == 0:
                return None
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.parameters()):
                raise RuntimeError(
                    f"{self.name}: gradients were disabled when the first layer ran and are enabled where the output "
                    "is corrected; a reentrant checkpoint around single layers does that, use use_reentrant=False"
                )
            correction = self.stream.correction()
        else:
            if not self._kept:
                return None
            phi = [self._join(phi, probabilities) for phi, probabilities in self._kept]
            self._kept.clear()
            correction = self.adapter(phi, embedding=self.embedding)
        if correction.shape != output.shape:
            raise ValueError(
                f"the output to correct has shape {list(output.shape)}, expected {list(correction.shape)} as the "
                f"outputs of {self.name}; name another module with output="
            )
        if self.deliver is not None:
            self.deliver(output, correction)
            return None
        return output + correction.to(output.dtype)

    def _join(self, phi: Tensor, probabilities: Probabilities) -> Tensor:
        if probabilities is None or self.joiner is None or self.encoded is None:
            return phi
        if callable(probabilities):
            probabilities = probabilities()
        e = probabilities.to(self.encoded.dtype) @ self.encoded
        return self.joiner(phi, e)
