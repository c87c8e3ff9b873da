"""One step of a pre-training: targets once, students under all masks, gradients as of one large batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import ops
from pyeff.nn import EMATeacher, MultimaskLoss, TargetRecorder
from pyeff.plans import MaskPlan
from pyeff.recipes._multimask_data import Batch
from pyeff.recipes._multimask_models import Parts, Students, embed, find_parts, idle_parameters, maximal_tokens
from pyeff.recipes._multimask_settings import Settings, key

DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """The modules of a pre-training, and what they do with a batch.

    Nothing of :meth:`accumulate` waits for the device, and what changes from step to step lies there: the seed as a
    tensor, the teacher's decay as a function of a counter.
    """

    def __init__(
        self, parts: Parts, decoder: nn.Module, settings: Settings, device: torch.device, compiled: bool | str
    ) -> None:
        self.parts, self.settings, self.device = parts, settings, device
        self.rank, self.world = place()
        self.students = Students(parts, decoder, settings.noise_std, settings.positions)
        self.idle = set(idle_parameters(self.students))
        named = self.students.named_parameters()
        self.named = [(n, p) for n, p in named if p.requires_grad and n not in self.idle]
        if not self.named:
            raise ValueError("model has no parameters that require a gradient, expected some to train")
        if compiled:
            self.students.compile(**({} if compiled is True else {"backend": compiled}))
        self.call: nn.Module = self.students
        if self.world > 1:
            parallel = nn.parallel.DistributedDataParallel
            parallel._set_params_and_buffers_to_ignore_for_model(self.students, sorted(self.idle))
            self.call = parallel(self.students, broadcast_buffers=False, gradient_as_bucket_view=True)
            # DDP sends around what it trains; the teacher averages the rest, too.
            trained = {id(p) for _, p in self.named}
            for module in (parts.base, decoder):
                for t in (*module.parameters(), *module.buffers()):
                    if id(t) not in trained:
                        torch.distributed.broadcast(t.data, 0)
        # After that: all processes start from the parameters of the first.
        self.teacher = EMATeacher(
            parts.base, decay=settings.ema_decay, end_decay=settings.ema_end, steps=settings.ema_steps,
            dtype=DTYPES[settings.teacher_dtype],
        )  # fmt: skip
        self._prepare_teacher()
        self.loss = MultimaskLoss(settings.loss, beta=settings.beta, cls_weight=settings.cls_loss)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.key = key(settings.seed, "masks and noise")
        self.usual = maximal_tokens(parts)

    def _prepare_teacher(self) -> None:
        teacher = find_parts(self.teacher.model, self.parts.modality)
        s = self.settings
        self._embeddings, self._stack = teacher.embeddings, teacher.stack
        self.recorder = TargetRecorder(
            teacher.targets(s.target)[-s.top_k_layers :], norm=s.norm, post_norm=s.post_norm, prefix=teacher.prefix
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = DTYPES[self.settings.amp]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @contextlib.contextmanager
    def random(self, step: int):
        """Dropout that is a function of seed, step and process; the caller's generators stay as they are."""
        with seeded(key(self.settings.seed, "dropout", step, self.rank), self.device):
            yield

    def plan(self, batch: Batch) -> MaskPlan:
        """The masks of a batch: a function of seed, step and the samples' names."""
        s = self.settings
        flat = len(batch.shape) == 1
        return ops.block_mask(
            batch.size, s.masks, batch.shape, keep=s.keep, adjust=s.adjust, length=s.length, inverse=s.inverse,
            seed=self.seed, sample_ids=batch.sample_ids, lengths=batch.lengths if flat else None, device=self.device,
        )  # fmt: skip

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """[B, T, D] float32 (float64): the teacher sees every sample once, and nothing is hidden from it."""
        inputs = batch.inputs
        dtype = DTYPES[self.settings.teacher_dtype]
        if dtype is not None:
            inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        lengths, mask = (batch.lengths, self._keys(batch)) if batch.ragged else (None, None)
        with contextlib.nullcontext() if dtype is not None else self.autocast():
            states = embed(self._embeddings, inputs)
            with self.recorder.record(lengths):
                self._stack(states, mask)
        return self.recorder.targets

    def _keys(self, batch: Batch) -> Tensor:
        """[B, 1, 1, T] bool; of a sample without tokens the first counts, or there would be NaN."""
        at = torch.arange(batch.shape[0], device=self.device)
        return (at < batch.lengths.clamp(min=1)[:, None])[:, None, None]

    def divisor(self, batch: Batch) -> tuple[float, bool]:
        """(what the loss is divided by, whether that is the number of tokens that are hidden in the whole step).

        It is part of the loss's own factor, which costs nothing. Where the number is not known before the step is over,
        since it is on the device or in other processes, it is a guess that is the same in all processes, and the
        gradients are put right by :meth:`correction`.
        """
        s = self.settings
        if self.world == 1 and batch.on_host is not None:
            hidden = sum(length - int(length * s.keep) for length in batch.on_host)
            return float(max(s.masks * hidden, 1)), True
        tokens = max(self.usual - int(self.usual * s.keep), 1)
        return float(s.masks * s.batch_size * tokens), False

    def correction(self, sums: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
        """(the loss over all processes, the factor of the gradients), after one all-reduce.

        Args:
            sums (Tensor): [2] float64, loss (divided) and count of this process.
        """
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        count = sums[1].clamp(min=1)
        # DDP takes the mean over processes; the loss is the sum.
        return sums[0] * divisor / count, self.world * divisor / count

    def accumulate(
        self, batches: Sequence[Batch], divisor: float, scaler: Any, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Adds up the gradients of the losses of several batches, divided by ``divisor``.

        Returns:
            (Tensor, Tensor or None): [2] float64, loss (divided) and hidden tokens of this process; and its moments.
        """
        self.loss.scale = self.settings.scale / divisor
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        moments: Tensor | None = None
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            hold = contextlib.nullcontext() if last or self.world == 1 else self.call.no_sync()  # type: ignore[operator]
            with hold:
                plan, target = self.plan(batch), self.targets(batch)
                with self.autocast():
                    pred, prefix = self.call(batch.inputs, plan, self.seed, batch.sample_ids, batch.ragged)
                cls = prefix[:, 0] if self.settings.cls_loss else None
                parts = self.loss(pred, target, plan, cls=cls, statistics=statistics)
                (parts.loss if scaler is None else scaler.scale(parts.loss)).backward()
            sums += torch.stack([parts.loss.detach().double(), parts.count.double()])
            if parts.moments is not None:
                moments = parts.moments if moments is None else moments + parts.moments
        return sums, moments


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Within it, what is drawn on the CPU and on ``device`` is a function of the seed; then generators are as before.

    Those of other GPUs are left alone: torch.manual_seed would seed them all.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def move(parts: Parts, decoder: nn.Module, device: torch.device) -> torch.dtype:
    """All of it on one device; the decoder in the dtype of the model, which is returned."""
    dtype = next(p.dtype for p in parts.base.parameters() if p.is_floating_point())
    if dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"model has parameters of {dtype}, expected float32 (amp= is for computing in less)")
    parts.base.to(device)
    parts.stack.to(device)
    decoder.to(device, dtype)
    return dtype
