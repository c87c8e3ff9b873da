"""Launches turned into what Triton's ahead-of-time compiler takes, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ._launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class AotCase(NamedTuple):
    """One compilation, for ``triton.compile(ASTSource(kernel, signature, constexprs, attrs), target, options)``."""

    name: str
    arch: int
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, int]
    matrix: bool  # 16-bit operands are multiplied: a matrix instruction is expected


def _argument(value: Any, specialized: bool) -> tuple[Any, Any, bool]:
    """(type, constant, divisible by 16) of one argument, as Triton's own launcher would find it."""
    if value is None or (specialized and type(value) is int and value == 1):
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], None, True
    if isinstance(value, float):
        return "fp32", None, False
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64", None, specialized and value % 16 == 0
    raise TypeError(f"an argument is a {type(value).__name__}")


def cases(launches: list[Launch], arch: int, label: str) -> Iterator[AotCase]:
    """A case for each launch; the kernels must not be those of the interpreter."""
    for launch in launches:
        kernel = launch.kernel
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attrs: dict[tuple[int, ...], Any] = {}
        for i, (parameter, value) in enumerate(zip(kernel.params, launch.args, strict=False)):
            if isinstance(value, tuple):
                found = [_argument(item, True) for item in value]
                signature[parameter.name] = tuple(kind for kind, _, _ in found)
                attrs |= {(i, j): [["tt.divisibility", 16]] for j, (_, _, even) in enumerate(found) if even}
                continue
            kind, constant, even = _argument(value, not parameter.do_not_specialize)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = constant
            elif even:
                attrs[(i,)] = [["tt.divisibility", 16]]
        for name, value in launch.constants.items():
            signature[name] = "constexpr"
            constants[name] = value
        halves = any(kind in ("*bf16", "*fp16") for kind in signature.values())
        yield AotCase(
            name=f"{launch.config.name} {label}",
            arch=arch,
            kernel=kernel,
            signature=signature,
            constexprs=constants,
            attrs=attrs,
            options=launch.config.options(),
            matrix=halves and "BLOCK_K" in constants,
        )


def key(case: AotCase) -> Any:
    """Equal for cases that compile to the same code."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, tl.dtype) else value

    return (
        case.arch,
        case.kernel.__name__,
        tuple(case.signature.items()),
        tuple((name, plain(value)) for name, value in case.constexprs.items()),
        tuple(case.attrs),
        tuple(case.options.items()),
    )
