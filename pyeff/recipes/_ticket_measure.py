"""Times of one layer, dense and as a ticket, on this machine, with inputs like those that it gets in its model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Each contender runs at least so often and so long, in seconds, and at most so often; they take turns.
LEAST, SECONDS, MOST = 3, 0.05, 30
WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Input:
    """What a layer was called with: the tensor's shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """How many rows it has."""
        return int(torch.Size(self.shape[:-1]).numel())

    def draw(self) -> Tensor:
        """A random tensor like it."""
        return torch.randn(self.shape, dtype=self.dtype, device=self.device)


def inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], sample: Any) -> dict[str, Input]:
    """What each layer gets when the model is called with a sample; the last call counts. A layer that is not called is
    left out.

    Args:
        model (Module), layers (mapping of Module): some of its modules, by name.
        sample: a tensor, a tuple of arguments, a mapping of named arguments, or a function that takes the model.
    """
    found: dict[str, Input] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            found[name] = Input(tuple(args[0].shape), args[0].dtype, args[0].device)

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with modes_kept(model), torch.no_grad():
            call(model.eval(), sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Inside, modules may be put in training or evaluation; afterwards each is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, sample: Any) -> Any:
    """The model on a sample, as :func:`inputs_of` takes it."""
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, (tuple, list)):
        return model(*sample)
    return sample(model) if callable(sample) else model(sample)


def race(contenders: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The least seconds of each of some functions, called in turns: what else the machine does only adds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP):
        for run in contenders.values():
            run()
    while not all(len(t) >= MOST or (len(t) >= LEAST and sum(t) >= SECONDS) for t in times.values()):
        for name, run in contenders.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: min(t) for name, t in times.items()}


def compare(layers: Mapping[str, nn.Module], given: Input) -> dict[str, tuple[float, float]]:
    """(forward without gradients, forward and backward) of each of some layers, in seconds.

    The backward is for the input and for the parameters.
    """
    x = given.draw()
    grad = torch.randn_like(next(iter(layers.values()))(x).detach())

    def forward(layer: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                layer(x)

        return run

    def step(layer: nn.Module) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_(), *(p for p in layer.parameters())]

        def run() -> None:
            with torch.enable_grad():
                torch.autograd.grad(layer(leaves[0]), leaves, grad)

        return run

    flags = {p: p.requires_grad for layer in layers.values() for p in layer.parameters()}
    try:
        for p in flags:
            p.requires_grad_(True)
        forwards = race({name: forward(layer) for name, layer in layers.items()}, given.device)
        steps = race({name: step(layer) for name, layer in layers.items()}, given.device)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return {name: (forwards[name], steps[name]) for name in layers}


def compare_models(
    models: Mapping[str, nn.Module], sample: Any, device: torch.device
) -> dict[str, tuple[float, float]]:
    """(forward in evaluation and without gradients, forward and backward in training) of some models, in seconds.

    The models take turns. The backward is that of the sum of the means of the outputs, for the parameters.
    """

    def forward(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                call(model, sample)

        return run

    def step(model: nn.Module) -> Callable[[], Any]:
        trained = [p for p in model.parameters() if p.requires_grad]

        def run() -> None:
            with torch.enable_grad():
                loss = sum(t.float().mean() for t in _tensors(call(model, sample)))
                torch.autograd.grad(loss, trained, allow_unused=True)  # type: ignore[arg-type]

        return run

    with modes_kept(*models.values()):
        forwards = race({name: forward(model.eval()) for name, model in models.items()}, device)
        steps = race({name: step(model.train()) for name, model in models.items()}, device)
    return {name: (forwards[name], steps[name]) for name in models}


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output
    return [t for t in items if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
