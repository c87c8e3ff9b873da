"""Fixtures of the whole suite: poisoned outputs, the backend under test, hypothesis's profile."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import pyeff
from tests import helpers

# The tests are small, and run side by side: threads would only wait for each other. Those about threads set their own.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "pyeff",
    deadline=None,
    max_examples=int(os.environ.get("PYEFF_TEST_EXAMPLES", "60")),
    # The same examples on every run of CI; new ones on every run elsewhere.
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("pyeff")


@pytest.fixture(autouse=True)
def poison():
    """Fills what torch.empty returns with NaN (the largest integer), so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=helpers.BACKENDS)
def backend(request):
    """Each implementation in turn, as ``pyeff.backend(...)`` around the test."""
    helpers.need("read_recurrence", request.param)
    with pyeff.backend(request.param):
        yield request.param


@pytest.fixture(params=helpers.KERNEL_BACKENDS)
def kernels(request):
    """Each implementation with kernels of its own, as ``pyeff.backend(...)`` around the test."""
    helpers.need("read_recurrence", request.param)
    with pyeff.backend(request.param):
        yield request.param
