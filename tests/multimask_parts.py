"""What several test files of the multimask family need besides calls: small calls, masks, the Triton kernels."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from pyeff import backends
from tests.multimask_calls import MAKERS, Call, make_bias, make_plan, make_targets

WIDTH, TOKENS = 16, 12
# Of the files that test the Triton kernels by themselves: under the interpreter, or on a GPU.
TRITON = [
    pytest.mark.emulated,
    pytest.mark.skipif(not (backends.EMULATED or torch.cuda.is_available()), reason="no GPU, and not PYEFF_EMULATE=1"),
]


def small(op: str) -> Call:
    """Finite, for finite differences."""
    if op == "multimask_targets":
        return make_targets(2, 5, 3, 2, norm="instance", post_norm="layer", lengths=None)
    if op == "multimask_relative_bias":
        return make_bias(make_plan(1, 2, 5), 2)
    return MAKERS[op](plan=make_plan(2, 2, 5), width=3, traps=False)


def hidden_tokens(batch=2, masks=3, tokens=TOKENS, ragged=True):
    if not ragged:
        order = torch.rand(batch, masks, tokens).argsort(-1)
        return order >= tokens // 2
    hidden = torch.rand(batch, masks, tokens) < 0.5
    hidden[0, 0] = True  # a student that sees nothing
    hidden[0, 1] = False  # and one from whom nothing is hidden
    return hidden


def triton_kernels():
    """The modules of the kernels; their package has its name from pyeff."""
    family = backends.triton_kernels("multimask")
    return SimpleNamespace(
        **{name: getattr(family, name) for name in family.__all__},
        launch=importlib.import_module("pyeff.kernels._launch"),
        configs=importlib.import_module("pyeff.kernels.multimask_configs"),
        averages=importlib.import_module("pyeff.kernels._multimask_ema"),
    )
