"""A pre-training in one safetensors file: what is learned and averaged, the optimizer's moments, and where it was."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.recipes import _files

# Another number where what is read here would mean something else.
VERSION = 1


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that the module's own state dict leaves out."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {f"{prefix}.{name}": t.detach() for name, t in tensors.items()}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Any, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of an optimizer's state, by the names of its parameters.

    Raises:
        ValueError: it keeps something else than tensors and numbers.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for what, value in state.items():
            name = f"optimizer.{names[parameter]}.{what}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[name] = value
            else:
                raise ValueError(
                    f"optimizer: its state has {what!r}, a {type(value).__name__}, expected tensors and numbers"
                )
    return tensors, numbers


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes a file, or leaves what is there as it is: what was begun beside it takes its place when it is whole."""
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=".part")
    os.close(handle)
    try:
        _files.save(temporary, tensors, config)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # What mkstemp makes is for its owner alone; a file of ours is for whom the process's other files are.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) of a file.

    Raises:
        ValueError: it is no file of a pre-training, or of another version.
    """
    from safetensors.torch import load_file

    config = _files.read_config(path)
    if config.get("recipe") != "multimask":
        raise ValueError(f"{os.fspath(path)} is a file of {config.get('recipe')!r}, expected one of 'multimask'")
    if config.get("version") != VERSION:
        raise ValueError(f"{os.fspath(path)} is of version {config.get('version')!r}, expected {VERSION}")
    with _files._readable(path):
        return load_file(os.fspath(path)), config


def check(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], kinds: Iterable[str]
) -> None:
    """Raises ValueError unless the tensors whose names begin with one of ``kinds`` are those of ``into``."""
    kinds = tuple(f"{kind}." for kind in kinds)
    theirs = {name: t for name, t in tensors.items() if name.startswith(kinds)}
    wrong = [f"{name} is missing" for name in sorted(into.keys() - theirs.keys())]
    wrong += [f"{name} was not expected" for name in sorted(theirs.keys() - into.keys())]
    for name, t in sorted(into.items()):
        if name in theirs and (theirs[name].shape, theirs[name].dtype) != (t.shape, t.dtype):
            came = f"{theirs[name].dtype} {list(theirs[name].shape)}"
            wrong.append(f"{name} is {came} in the file, expected {t.dtype} {list(t.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(f"{os.fspath(path)} does not fit the model: {'; '.join(wrong[:5])}{more}")


def check_same(path: str | os.PathLike, what: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError unless the file's settings, or what else is named alike, are the trainer's."""
    mine = json.loads(json.dumps(mine))
    wrong = [
        f"{name} is {theirs.get(name)!r} in the file, expected {mine.get(name)!r}"
        for name in sorted({*theirs, *mine})
        if theirs.get(name) != mine.get(name)
    ]
    if wrong:
        raise ValueError(f"{os.fspath(path)} has another {what}: {'; '.join(wrong)}")


def optimizer_state(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes.

    Raises:
        ValueError: there is a state of a parameter that the optimizer does not have, or of another size.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {names[p]: i for i, p in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    found = [(n, v) for n, v in tensors.items() if n.startswith("optimizer.")]
    for name, value in [*found, *numbers.items()]:
        parameter, _, what = name.removeprefix("optimizer.").rpartition(".")
        if parameter not in places:
            raise ValueError(f"{os.fspath(path)} has {name}, expected states of the optimizer's parameters only")
        place = places[parameter]
        if isinstance(value, Tensor) and value.dim() and value.shape != parameters[place].shape:
            raise ValueError(
                f"{os.fspath(path)}: {name} has shape {list(value.shape)}, expected {list(parameters[place].shape)}"
            )
        if isinstance(value, Tensor) and value.dim():
            # Files are contiguous, moments have their parameter's strides; fused optimizers do not look.
            value = torch.empty_like(parameters[place], dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(place, {})[what] = value
    return {"state": state, "param_groups": own["param_groups"]}
