"""Rounds of pruning on disk, so that a long run can go on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pyeff.nn import TicketLinear
from pyeff.plans import Ticket
from pyeff.recipes import _files
from pyeff.recipes._ticket_install import install
from pyeff.recipes._ticket_masks import mask, masks

_RECIPE, _VERSION = "ticket.prune", 1


def write(path: str | os.PathLike, model: nn.Module, run: Mapping[str, Any], history: Sequence[Mapping]) -> None:
    """The model as it is after a round, and what led there. The file before is replaced at once, or not at all."""
    blocks = {name: m.block for name, m in model.named_modules() if isinstance(m, TicketLinear)}
    config = {"recipe": _RECIPE, "version": _VERSION, "run": dict(run), "history": list(history), "blocks": blocks}
    config = json.loads(json.dumps(config, default=str))
    _files.save(f"{os.fspath(path)}.part", model.state_dict(), config)
    os.replace(f"{os.fspath(path)}.part", path)


def read(path: str | os.PathLike, model: nn.Module, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Puts the model where a run was stopped; returns the rounds that are done: none where there is no file.

    Raises:
        ValueError: the file is broken, or of a run with other options.
    """
    if not os.path.exists(path):
        return []
    from safetensors.torch import load_file

    config, where = _files.read_config(path), os.fspath(path)
    if config.get("recipe") != _RECIPE or config.get("version") != _VERSION:
        raise ValueError(f"prune: checkpoint {where} is of the recipe {config.get('recipe')!r}, expected {_RECIPE!r}")
    mine = json.loads(json.dumps(dict(run)))
    for key, value in mine.items():
        came = config["run"].get(key)
        if came != value:
            raise ValueError(f"prune: checkpoint {where} is of a run with {key} {came!r}, expected {value!r}")
    state = load_file(where)
    modules: dict[str, Any] = dict(model.named_modules())
    try:
        found = {
            name: Ticket(state[f"{name}.index"], (modules[name].out_features, modules[name].in_features), block)
            for name, block in config["blocks"].items()
        }
        install(model, found)
        if any(name.endswith(".weight_mask") for name in state):
            mask(model, masks(state))
        model.load_state_dict(state)
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"prune: checkpoint {where} does not fit the model: {error}") from error
    return config["history"]
