"""data2vec 2.0 on a real model: one pass of a slow teacher, many masked students that predict what it sees.

    trainer = multimask.Pretrainer(model, preset="text", tokenizer=tokenizer, steps=10_000)
    trainer.fit(texts)
    trainer.save("pretrained.safetensors")

Beside it, the helpers and losses of I-JEPA, V-JEPA, MAE and iBOT on the same ops.

Source: Baevski, Babu, Hsu, Auli, "Efficient Self-supervised Learning with Contextualized Target Representations for
Vision, Speech and Language", 2022, arXiv 2212.07525.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes import _multimask_files as files
from pyeff.recipes import _multimask_fit, _multimask_resume
from pyeff.recipes._multimask_adapters import (
    apply_masks,
    ibot_loss,
    ijepa_loss,
    mae_decoder_input,
    mae_loss,
    repeat_interleave_batch,
    vjepa_loss,
)
from pyeff.recipes._multimask_data import Batch, Collate, prepare
from pyeff.recipes._multimask_models import find_parts, make_decoder
from pyeff.recipes._multimask_optim import Rates, adamw, scale_and_clip
from pyeff.recipes._multimask_parts import check_parts
from pyeff.recipes._multimask_progress import CollapseWarning, Meter
from pyeff.recipes._multimask_settings import Settings, key, resolve
from pyeff.recipes._multimask_step import Engine, move, seeded

__all__ = [
    "CollapseWarning",
    "Pretrainer",
    "apply_masks",
    "ibot_loss",
    "ijepa_loss",
    "mae_decoder_input",
    "mae_loss",
    "repeat_interleave_batch",
    "vjepa_loss",
]


class Pretrainer:
    """Pre-trains an encoder of Hugging Face, for text or images, by predicting what a moving average of it sees.

    The teacher sees each sample once, whole; M students see what M masks leave of it, and only that: embeddings are
    made once for a sample, the students' tokens are gathered from them, and the encoder's layers run on [B*M, K, D]. A
    small decoder of convolutions predicts the teacher's top layers, averaged, where tokens are hidden.

    The masks, the noise, dropout and the order of samples are functions of ``seed``, the step and the sample: a
    pre-training that is saved and resumed gives the same bits as one that was not interrupted, and masks and noise do
    not depend on how samples are spread over batches and processes. Of a dataset that draws at random itself, such as
    one that augments images, that is true if a sample is a function of its index: what it draws comes from generators
    that are in no file. The loss is divided by the hidden tokens of the
    whole step, so that neither ``accumulate`` nor the number of processes changes the update, but for rounding (with
    ``norm="batch"``, whose statistics are those of each process's batch, they do).

    Under torch.distributed the students are wrapped in DistributedDataParallel; every process makes its own Pretrainer,
    after ``init_process_group``. Nothing in :meth:`step` waits for the device, if batches come from the host.

    Args:
        model (Module): a Hugging Face encoder like BertModel, RobertaModel, DistilBertModel or ViTModel, or a model
            around one; in float32 or float64. It is trained in place. Poolers and heads stay as they are. Others are
            refused, by two short samples: embeddings and layers have to compute what the encoder does.
        preset (str, optional): ``"text"`` (BERT-like, base), ``"image"`` (ViT-B/16) or ``"audio"`` (sequences of
            features, which come as ``inputs_embeds``): the paper's settings. Default: that of the modality. Each
            argument that is None below is the preset's.
        modality (str): ``"text"``, ``"image"``, or ``"auto"``, which looks at what the embeddings take.
        masks (int): M, students of each sample. 8; images 16.
        keep (float): the share of tokens that a student sees. Text .52, images .2, audio .5.
        adjust (float), length (int), inverse (bool): of the masks, see :func:`pyeff.ops.block_mask`.
        top_k_layers (int): K, how many of the last layers the targets are made of. 12, 10, 8; at most all there are.
        norm (str), post_norm (str): of each layer, and of their mean, see :func:`pyeff.ops.multimask_targets`.
        target (str): what is taken of a layer: ``"ffn"`` (its feed-forward part before the residual, as in the paper),
            ``"layer"`` (its output), or ``"auto"``: the first where it is found.
        noise_std (float): of the noise in hidden places of the decoder's input.
        positions (bool): also put the model's position embeddings there.
        decoder (Module, optional): [B*M, T, D] -> [B*M, T, D], instead of the convolutions that the next four describe.
        decoder_width (int), decoder_layers (int), decoder_kernel (int), decoder_groups (int): of
            :class:`pyeff.nn.ConvDecoder1d` or :class:`pyeff.nn.ConvDecoder2d`. The width is the model's by default.
        loss (str), beta (float), scale (float): kind and factor of :func:`pyeff.ops.multimask_loss`; the factor is 1
            for text and 1/sqrt(D) elsewhere. Of each hidden token; summed over channels.
        cls_loss (float): weight of the loss of the class token against the mean of the targets; images only.
        ema_decay (float), ema_end (float), ema_steps (int): the teacher's decay at first, at last, and the steps until
            then.
        teacher_dtype (str): ``"bf16"`` or ``"fp16"`` for a teacher that computes in a copy of the average in that
            dtype, written when the average is. Default: the average itself, under autocast if there is ``amp``.
        optimizer (callable, optional): parameters -> torch.optim.Optimizer. Default: AdamW, matrices decayed.
        lr (float), betas (pair of float), eps (float), weight_decay (float): of AdamW.
        schedule (callable, optional): step, from 0 -> factor of the learning rates. Default: up in a line for
            ``warmup`` steps (a twentieth of all), then down to zero with a cosine at ``steps``.
        steps (int), warmup (int): of the schedule, and of :meth:`fit` where it is not told another number.
        clip (float): limit of the gradient's norm; 0 for none.
        batch_size (int): samples of a step in each process, where :meth:`fit` makes the batches.
        accumulate (int): in how many parts a batch is worked on, to save memory.
        amp (str): ``"bf16"`` or ``"fp16"`` (with a gradient scaler) for autocast. Default: none.
        seed (int): of everything that is random.
        device (device, optional): Default: the model's.
        compile (bool or str): run the students under torch.compile, or under that backend of it.
        tokenizer (callable, optional): of Hugging Face, for batches of texts.
        max_length (int): tokens at which the samples that ``fit`` reads are cut off; batches are taken as they are.
            Default: what the model can take.

    Attributes:
        model (Module): what was given, being trained; :attr:`encoder` is the encoder in it, :attr:`teacher` the
            average of that, which is as a rule the better one to keep.
        settings: all of the above, resolved.
        steps_done (int), samples_done (int): so far, over all processes.
        decoder (Module), optimizer: parts of the training.

    Raises:
        ValueError: an argument that is unknown or out of range, or a model that is not understood; the message says
            which, what came and what was expected; of a model its type, and which are supported.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from pyeff.recipes import multimask
        >>> config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=64)
        >>> trainer = multimask.Pretrainer(BertModel(config), masks=4, batch_size=4, steps=2, decoder_layers=1)
        >>> data = [torch.randint(3, 100, (n,)) for n in range(6, 16)]
        >>> history = trainer.fit(data, every=2, progress=False)
        >>> trainer.steps_done, sorted(history[-1])[:3]
        (2, ['decay', 'grad_norm', 'loss'])
        >>> trainer.encoder(input_ids=data[-1][None]).last_hidden_state.shape
        torch.Size([1, 15, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preset: str | None = None,
        modality: str = "auto",
        masks: int | None = None,
        keep: float | None = None,
        adjust: float | None = None,
        length: int | None = None,
        inverse: bool | None = None,
        top_k_layers: int | None = None,
        norm: str | None = None,
        post_norm: str | None = None,
        target: str | None = None,
        noise_std: float | None = None,
        positions: bool | None = None,
        decoder: nn.Module | None = None,
        decoder_width: int | None = None,
        decoder_layers: int | None = None,
        decoder_kernel: int | None = None,
        decoder_groups: int | None = None,
        loss: str | None = None,
        beta: float | None = None,
        scale: float | None = None,
        cls_loss: float | None = None,
        ema_decay: float | None = None,
        ema_end: float | None = None,
        ema_steps: int | None = None,
        teacher_dtype: str | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        lr: float | None = None,
        betas: Sequence[float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        schedule: Callable[[int], float] | None = None,
        steps: int | None = None,
        warmup: int | None = None,
        clip: float | None = None,
        batch_size: int | None = None,
        accumulate: int | None = None,
        amp: str | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        compile: bool | str = False,
        tokenizer: Callable[..., Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k in Settings.__dataclass_fields__ and k != "modality"}
        parts = find_parts(model, modality)
        self.model, self.parts = model, parts
        self.settings = s = resolve(preset, given, parts.modality, len(parts.stack.layers), parts.width)
        for name, value in (("optimizer", optimizer), ("schedule", schedule), ("tokenizer", tokenizer)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} is a {type(value).__name__}, expected a callable")
        device = torch.device(device) if device is not None else next(parts.base.parameters()).device
        if decoder is None:
            cpu = torch.device("cpu")
            with seeded(key(s.seed, "decoder"), cpu), cpu:
                decoder = make_decoder(parts, s)
        self.decoder = decoder
        self.dtype = move(parts, decoder, device)
        check_parts(parts, s.target, device)
        model.train()
        self._engine = Engine(parts, decoder, s, device, compile)
        named = self._engine.named
        self.optimizer = adamw(named, s) if optimizer is None else optimizer([p for _, p in named])
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._schedule, self._rates = schedule or s.rate, Rates(self.optimizer)
        self._scaler = torch.amp.GradScaler(device.type) if s.amp == "fp16" else None
        pad = getattr(parts.base.config, "pad_token_id", None)
        usual = None if parts.patch else self._engine.usual
        if s.max_length is not None and parts.positions() is not None and s.max_length > self._engine.usual:
            raise ValueError(
                f"max_length is {s.max_length}, expected at most {self._engine.usual}: the model has so many positions"
            )
        limit = s.max_length or usual
        known = inspect.signature(parts.embeddings.forward).parameters
        self._collate = Collate(parts.modality, tokenizer, pad or 0, limit, known)
        self._meter = Meter(parts.width, device)
        self.steps_done, self.samples_done = 0, 0
        self._last_rate = self._rates.base[0]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._engine.device

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is trained, without what a model may have around it."""
        return self.parts.base

    @property
    def teacher(self) -> nn.Module:
        """The encoder whose parameters are the moving average; it changes with every step."""
        return self._engine.teacher.average

    def step(self, batch: Any, *, statistics: bool = True) -> Tensor:
        """One step of the optimizer, and one of the teacher after it.

        Args:
            batch: for text, a mapping with ``input_ids`` [B, T] or ``inputs_embeds`` [B, T, D], and if there is padding
                ``attention_mask`` [B, T] (padding on the right), or a list of texts; for images, ``pixel_values``
                [B, C, H, W] in a mapping, or such a tensor. ``sample_ids`` [B] int64 may name the samples; by default
                they are counted. Of several processes, each gets its own samples. ``token_type_ids`` and
                ``position_ids`` [B, T] go to the embeddings; other entries that these know are refused, and what they
                do not know, such as labels, is left out.
            statistics (bool): whether this step counts in the next :meth:`metrics`' spreads.

        Returns:
            Tensor: the loss for each hidden token, over all processes; a number on the device, which nobody waited for.

        Raises:
            ValueError: the batch is something else, or has fewer samples than ``accumulate``.
        """
        engine, s = self._engine, self.settings
        # Of batches that count their samples themselves, all processes have as many.
        placed = prepare(batch, self._collate, self.parts.patch, self.device, self.dtype, 0)
        if not (isinstance(batch, Mapping) and batch.get("sample_ids") is not None):
            placed.sample_ids += self.samples_done + engine.rank * placed.size
        if placed.size < s.accumulate:
            raise ValueError(f"batch has {placed.size} samples, expected at least accumulate, {s.accumulate}")
        engine.seed.fill_((engine.key + self.steps_done) % 2**63)
        self._last_rate = self._rates.set(self._schedule(self.steps_done))
        with engine.random(self.steps_done):
            loss, norm, moments = self._compute(placed, statistics)
        self.steps_done += 1
        self.samples_done += placed.size * engine.world
        self._meter.add(loss, norm, moments, placed.size * engine.world, scaled=self._scaler is not None)
        return loss

    def _compute(self, placed: Batch, statistics: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, norm of the gradient, moments) of a step on the device, from tensors that are there: nothing in here
        asks the host, and it may be captured in a CUDA graph."""
        engine, s = self._engine, self.settings
        divisor, exact = engine.divisor(placed)
        self.optimizer.zero_grad(set_to_none=True)
        sums, moments = engine.accumulate(placed.split(s.accumulate), divisor, self._scaler, statistics)
        loss, factor = engine.correction(sums, divisor)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm = scale_and_clip(self._parameters, None if exact else factor, s.clip)
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        engine.teacher.update(self.parts.base)
        return loss, norm, moments

    def metrics(self) -> dict[str, float]:
        """The means since this was last asked for; waits for the device, and every process has to ask.

        Returns:
            dict: ``step``, ``loss``, ``grad_norm`` (before clipping), ``skipped_steps`` (how many the scaler of
            ``amp="fp16"`` left out, since their gradients were not finite: those are not in ``grad_norm``, which is 0
            if all were; 0 without a scaler), ``target_spread`` and ``prediction_spread`` (mean over channels of the
            deviation over hidden tokens: near zero, the training has collapsed), ``lr``, ``decay``,
            ``samples_per_second``.
        """
        found = {"step": float(self.steps_done), **self._meter.read(self._engine.world)}
        return found | {"lr": self._last_rate, "decay": self.settings.decay(self.steps_done)}

    def fit(
        self,
        data: Any,
        steps: int | None = None,
        *,
        every: int = 10,
        progress: str | bool = "auto",
        callbacks: Iterable[Callable[[Pretrainer, dict[str, float]], Any]] = (),
        floor: float = 0.01,
        stop: bool = False,
        workers: int = 0,
        path: str | os.PathLike | None = None,
        save_every: int | None = None,
    ) -> list[dict[str, float]]:
        """Trains for a number of steps.

        Args:
            data: a dataset or sequence of samples: texts, ``input_ids`` of any length, images, mappings with what
                :meth:`step` takes for one sample, or pairs that begin with one of these. It is read in an order that
                ``seed`` and the epoch decide, from where the training is. Or an iterable of batches for :meth:`step`,
                such as a DataLoader, taken from its beginning.
            steps (int, optional): how many; fewer if batches run out. Default: up to ``settings.steps``; where these
                are done, nothing is trained, with a warning that says how to go on.
            every (int): steps from one record to the next; only then is the device waited for.
            progress (str or bool): ``"auto"`` (a bar in a terminal if rich is installed, else lines), ``"bar"``,
                ``"lines"``, or False. The first process alone shows any.
            callbacks (iterable of callable): called as ``callback(trainer, record)`` with every record; one that
                returns False ends the training. In all processes.
            floor (float): a spread of targets or predictions below it is a collapse; after the warmup, it is warned of.
            stop (bool): end the training then.
            workers (int): processes that load samples of a dataset.
            path (path, optional), save_every (int, optional): where to :meth:`save`, and how often; with a path, also
                at the end, and when the training is interrupted.

        Returns:
            list of dict: the records, see :meth:`metrics`.

        Raises:
            ValueError: an argument out of range, or data that are not understood, or empty.
            KeyboardInterrupt: after Ctrl-C, at the end of the step (at once after a second one); the message says what
                is saved. With a ``path`` that is the last whole step.
        """
        return _multimask_fit.fit(
            self, data, steps, every=every, progress=progress, callbacks=list(callbacks), floor=floor, stop=stop,
            workers=workers, path=path, save_every=save_every,
        )  # fmt: skip

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything that a later :meth:`resume` needs into one safetensors file, which is there whole or not.

        Every process calls it, the first one writes; the others wait for it.

        Args:
            path (path): a file that may be there already; it is then replaced.

        Raises:
            ValueError: the optimizer keeps a state that is neither tensor nor number.
        """
        _multimask_resume.save(self, path)

    def resume(self, path: str | os.PathLike) -> Pretrainer:
        """Continues where a file was written, bit by bit as if it had not been.

        Settings must be the same but for batch_size and accumulate, which change the order of sums. Of a loader of the
        caller's own, batches are to go on where they were; a dataset is read from there.

        Args:
            path (path): what :meth:`save` wrote.

        Returns:
            Pretrainer: itself.

        Raises:
            ValueError: the file is of something else, or of another model or settings. Then nothing has been changed.
        """
        _multimask_resume.resume(self, path, *files.read(path), compare=True)
        return self

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module, **changes: Any) -> Pretrainer:
        """A trainer as the one that a file is of, resumed.

        Args:
            path (path): what :meth:`save` wrote.
            model (Module): of the kind and the sizes that were trained; it gets the file's parameters.
            changes: arguments that are to be others than they were, and those that are in no file: ``optimizer``,
                ``schedule``, ``decoder``, ``tokenizer``, ``device``, ``compile``.

        Returns:
            Pretrainer: ready for :meth:`fit` or :meth:`step`.

        Raises:
            ValueError: as for :meth:`resume`.
        """
        tensors, config = files.read(path)
        # Before settings of another model are held against this one.
        _multimask_resume.check_model(path, config, find_parts(model).base)
        trainer = cls(model, **{**_multimask_resume.arguments(config), **changes})
        _multimask_resume.resume(trainer, path, tensors, config, compare=False)
        return trainer
