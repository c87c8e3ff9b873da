"""What of a pre-training goes into a file, and comes out of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.recipes import _multimask_files as files
from pyeff.recipes._multimask_settings import LAYOUT, Settings

if TYPE_CHECKING:
    from pyeff.recipes.multimask import Pretrainer

# What a configuration says of where a model is from, not of what it computes.
_ORIGIN = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id")
_KINDS = ("encoder", "decoder", "teacher", "teacher_updates")


def _tensors(trainer: Pretrainer) -> dict[str, Tensor]:
    teacher = trainer._engine.teacher
    return {
        **files.module_tensors("encoder", trainer.encoder), **files.module_tensors("decoder", trainer.decoder),
        **files.module_tensors("teacher", teacher.average), "teacher_updates.count": teacher.updates,
    }  # fmt: skip


def _names(trainer: Pretrainer) -> dict[nn.Parameter, str]:
    """Of what the optimizer may have states of."""
    return {p: name for name, p in trainer._engine.students.named_parameters()}


def _model_config(encoder: nn.Module) -> dict[str, Any]:
    """The encoder's configuration: dropout leaves no trace in shapes, and yet the numbers depend on it."""
    config: Any = encoder.config
    given = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kinds = (str, int, float, bool, list, type(None))
    return {k: v for k, v in given.items() if k not in _ORIGIN and isinstance(v, kinds)}


def save(trainer: Pretrainer, path: str | os.PathLike, wait: bool = True) -> None:
    """:meth:`pyeff.recipes.multimask.Pretrainer.save`; without ``wait`` other processes may be anywhere."""
    if trainer._engine.rank == 0:
        moments, numbers = files.optimizer_tensors(trainer.optimizer, _names(trainer))
        scaler = None if trainer._scaler is None else trainer._scaler.state_dict()
        config = {
            "recipe": "multimask", "version": files.VERSION, "model": type(trainer.encoder).__name__,
            "optimizer": type(trainer.optimizer).__name__, "settings": trainer.settings.as_json(),
            "config": _model_config(trainer.encoder),
            "steps_done": trainer.steps_done, "samples_done": trainer.samples_done, "numbers": numbers,
            "scaler": scaler,
        }  # fmt: skip
        files.write(path, {**_tensors(trainer), **moments}, config)
    if wait and trainer._engine.world > 1:
        torch.distributed.barrier()


def check_kind(path: str | os.PathLike, config: Mapping[str, Any], what: str, mine: object) -> None:
    """Raises ValueError unless the file has the same class for it."""
    if config.get(what) != type(mine).__name__:
        raise ValueError(f"{os.fspath(path)}: {what} is {config.get(what)!r}, expected {type(mine).__name__!r}")


def check_model(path: str | os.PathLike, config: Mapping[str, Any], encoder: nn.Module) -> None:
    """Raises ValueError unless the file is of such an encoder."""
    check_kind(path, config, "model", encoder)
    files.check_same(path, "model configuration", config["config"], _model_config(encoder))


def resume(
    trainer: Pretrainer,
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    compare: bool,
) -> None:
    """:meth:`pyeff.recipes.multimask.Pretrainer.resume`; everything is looked at before anything is written."""
    check_kind(path, config, "model", trainer.encoder)
    check_kind(path, config, "optimizer", trainer.optimizer)
    if compare:
        own = {name: value for name, value in trainer.settings.as_json().items() if name not in LAYOUT}
        theirs = {name: value for name, value in config["settings"].items() if name not in LAYOUT}
        files.check_same(path, "settings", theirs, own)
    check_model(path, config, trainer.encoder)
    into = _tensors(trainer)
    files.check(path, tensors, into, _KINDS)
    state = files.optimizer_state(path, tensors, config["numbers"], trainer.optimizer, _names(trainer))
    teacher = trainer._engine.teacher
    with torch.no_grad():
        for name, t in into.items():
            t.copy_(tensors[name])
    # A teacher that computes in another dtype makes its copy when it is given a state.
    teacher.load_state_dict(teacher.state_dict())
    trainer.optimizer.load_state_dict(state)
    if trainer._scaler is not None and config["scaler"]:
        trainer._scaler.load_state_dict(config["scaler"])
    trainer.steps_done, trainer.samples_done = config["steps_done"], config["samples_done"]
    trainer._meter.reset()


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trainer as a file's."""
    settings = {name: value for name, value in config["settings"].items() if name in Settings.__dataclass_fields__}
    # None is the preset's; no limit is 0.
    return settings | {"clip": settings["clip"] or 0}
