"""What READ does during one call of a stack: collect references and correct at the end, or stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyeff.nn import ReadAdapter

# Of a decoder layer's cross-attention: [B, T, S], or a function that computes them.
Probabilities = Tensor | Callable[[], Tensor] | None


class ReadSession:
    """One call of a stack.

    With ``streaming`` each layer output is consumed at once; else references are kept until the stack returns, and each
    adapter's recurrence runs as one operation.

    Args:
        adapters (sequence of ReadAdapter): the stack's, one for each task; with several, the corrected outputs are
            stacked along the first dimension.
        name (str): the layers' path, for messages.
        streaming (bool): see above.
        store (torch.dtype, optional): the dtype that layer outputs are kept in.
        joiner (Module, optional), encoded (Tensor, optional): of a decoder: the joiner and the encoder's
            correction [B, S, d].
        deliver (callable, optional): ``deliver(output, correction)`` takes the correction instead of the stack's
            output.
        mask (Tensor, optional): [B, T or more], 0 for padding, whose tokens are left out; its last columns count.
        may_skip (bool): that no layer runs is no error, as with LayerDrop.
    """

    def __init__(
        self,
        adapters: Sequence[ReadAdapter],
        name: str,
        *,
        streaming: bool,
        store: torch.dtype | None = None,
        joiner: nn.Module | None = None,
        encoded: Tensor | None = None,
        deliver: Callable[[Tensor, Tensor], None] | None = None,
        mask: Tensor | None = None,
        may_skip: bool = False,
    ) -> None:
        self.adapters, self.name, self.store = adapters, name, store
        self.joiner, self.encoded, self.deliver = joiner, encoded, deliver
        self.mask, self.may_skip, self.rows, self.shape = mask, may_skip, None, None
        self.streams = [adapter.stream() for adapter in adapters] if streaming else []
        self.embedding: Tensor | None = None
        self.probabilities: Probabilities = None
        self._kept: list[tuple[Tensor, Probabilities]] = []

    mask: Tensor | None
    rows: Tensor | None
    shape: torch.Size | None

    @property
    def wants_probabilities(self) -> bool:
        """Whether cross-attention probabilities are to be computed."""
        return self.joiner is not None and self.encoded is not None

    def first_input(self, embedding: Tensor) -> None:
        """The first layer's input, which the first state is projected from."""
        self.embedding = self._keep(embedding)
        if self.streams:
            self.streams = [adapter.stream(embedding=self.embedding) for adapter in self.adapters]

    def layer(self, index: int, output: Tensor) -> None:
        width = self.adapters[0].width
        if output.dim() == 0 or output.shape[-1] != width:
            raise ValueError(
                f"{self.name}[{index}] returns shape {list(output.shape)}, expected [*, {width}]; "
                "name the stack with stack=, or give its width"
            )
        phi = self._keep(output)
        probabilities, self.probabilities = self.probabilities, None
        if self.wants_probabilities and probabilities is None:
            raise RuntimeError(
                f"{self.name}[{index}] ran without its cross-attention going through transformers' attention "
                "interface; use joiner=None"
            )
        if self.streams:
            x = self._join(phi, probabilities)
            for stream in self.streams:
                stream.push(x)
        else:
            # The joiner waits for the end: this layer may be in a checkpoint, which saves what its rerun will save too.
            self._kept.append((phi, probabilities))

    def close(self, output: Tensor) -> Tensor | None:
        corrections = self._corrections()
        if not corrections or self.shape is None:
            if self.may_skip:
                return None
            raise RuntimeError(
                f"{self.name}: no layer that is read was called as a module, so none was seen; some releases of "
                "transformers call layers' forward directly under gradient checkpointing, which a frozen model does "
                "not need"
            )
        if output.shape != self.shape:
            raise ValueError(
                f"the output to correct has shape {list(output.shape)}, expected {list(self.shape)} as the "
                f"outputs of {self.name}; name another module with output="
            )
        spread = [self._spread(correction) for correction in corrections]
        if self.deliver is not None:
            self.deliver(output, spread[0])
            return None
        corrected = [output + correction.to(output.dtype) for correction in spread]
        return corrected[0] if len(corrected) == 1 else torch.cat(corrected)

    def _corrections(self) -> list[Tensor]:
        if not self.streams:
            phi = [self._join(phi, probabilities) for phi, probabilities in self._kept]
            self._kept.clear()
            return [adapter(phi, embedding=self.embedding) for adapter in self.adapters] if phi else []
        if self.streams[0].count == 0:
            return []
        if torch.is_grad_enabled() and any(p.requires_grad for adapter in self.adapters for p in adapter.parameters()):
            raise RuntimeError(
                f"{self.name}: gradients were disabled when the first layer ran and are enabled where the output "
                "is corrected; a reentrant checkpoint around single layers does that, use use_reentrant=False"
            )
        return [stream.correction() for stream in self.streams]

    def _keep(self, phi: Tensor) -> Tensor:
        """A layer output as it is read: without padding, in the dtype of ``store``; else itself."""
        if self.shape is None:
            self.shape = phi.shape
            mask = self.mask
            if mask is not None and phi.dim() == 3 and mask.shape[0] == phi.shape[0] and mask.shape[1] >= phi.shape[1]:
                mask = mask[:, mask.shape[1] - phi.shape[1] :].reshape(-1) != 0
                self.rows = None if bool(mask.all()) else mask.nonzero()[:, 0]
        return self._pack(phi if self.store is None else phi.to(self.store))

    def _pack(self, t: Tensor) -> Tensor:
        return t if self.rows is None else t.reshape(-1, t.shape[-1]).index_select(0, self.rows)

    def _spread(self, correction: Tensor) -> Tensor:
        """The correction of every token; none for padding."""
        if self.rows is None or self.shape is None:
            return correction
        whole = correction.new_zeros(self.shape[:-1].numel(), correction.shape[-1])
        return whole.index_copy(0, self.rows, correction).reshape(self.shape)

    def _join(self, phi: Tensor, probabilities: Probabilities) -> Tensor:
        if probabilities is None or self.joiner is None or self.encoded is None:
            return phi
        if callable(probabilities):
            probabilities = probabilities()
        return self.joiner(phi, self._pack(probabilities.to(self.encoded.dtype) @ self.encoded))
