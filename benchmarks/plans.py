"""What the plans of all families share: the resources of a kernel, the launches of Triton's, and what a family is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .gpus import ARCHITECTURES, MMA, TCGEN05, WGMMA, Card
from .model import Prediction
from .resource_table import RESOURCES, VERSIONS

_INSTRUCTIONS = {"": "", "mma": MMA, "wgmma": WGMMA, "tcgen05": TCGEN05}


class NoPlan(Exception):  # noqa: N818 (not an error: a finding)
    """There is no prediction for a backend; the message says why."""


@dataclass(frozen=True)
class Family:
    """The predictions for one operation.

    Args:
        op (str): the operation. page (str): the document with its floor.
        shapes (callable): the calls that are predicted. A call has ``dtype``, ``training``, ``label`` (its name in a
            table) and ``sizes`` (what a table's calls have in common).
        plan (callable): backend, shape, card -> the launches; raises :class:`NoPlan`.
        predict (callable): shape, plan, card -> a prediction for each launch.
        floor (callable): shape, card -> the least seconds.
        notes (callable): shapes, card -> lines that help to read their table.
    """

    op: str
    page: str
    shapes: Callable[[], Iterator[Any]]
    plan: Callable[[str, Any, Card], Sequence[Any]]
    predict: Callable[[Any, Any, Card], list[Prediction]]
    floor: Callable[[Any, Card], float]
    notes: Callable[[Sequence[Any], Card], list[str]] = lambda shapes, card: []


def sources(card: Card) -> list[str]:
    """Where registers and occupancy come from."""
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    return [f"blocks on an SM and matrix instructions: the resource report for sm_{card.cc} ({versions})"]


def resources(name: str, card: Card) -> tuple[int, int, str]:
    """(threads, blocks on an SM, matrix instruction) of a kernel.

    Raises:
        NoPlan: the resource table has no such kernel.
    """
    found = entry(name, card)
    if found is None:
        raise NoPlan(f"the resource table has no {name} on sm_{card.cc}")
    threads, blocks, instruction = found
    return threads, blocks, _INSTRUCTIONS[instruction]


def entry(name: str, card: Card) -> tuple[int, int, str] | None:
    """A kernel's line in the resource table, or None."""
    return RESOURCES[name][list(ARCHITECTURES).index(card.cc)] if name in RESOURCES else None


@contextlib.contextmanager
def recorded(stem: str, card: Card) -> Iterator[tuple[Any, list[Any]]]:
    """The module of a family's Triton kernels, and the list in which its calls put what they launch on the card.

    Raises:
        NoPlan: Triton is not here.
    """
    try:
        from pyeff import backends

        module, launch = backends.triton_kernels(stem), backends.triton_kernels("_launch")
    except ImportError as error:
        raise NoPlan(f"no Triton here ({error})") from None
    with launch.record(launch.Machine(card.cc, card.sms)) as launches:
        yield module, launches


def arguments(launch: Any) -> dict[str, Any]:
    """What a recorded launch gives its kernel, by name."""
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants


def ceil(a: int, b: int) -> int:
    return -(-a // b)
