"""Fixtures of the whole suite: poisoned outputs, the place under test, hypothesis's profile."""

from __future__ import annotations

import os
import types

# cuBLAS gives bitwise equal repeats only with this, and torch asks for it; it is read once, when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests import helpers, places

try:
    import hypothesis
except ImportError:  # a bare machine: the tests of properties are left out
    hypothesis = None
    collect_ignore = [
        "test_read_properties.py", "test_read_fuzz.py", "test_ticket_properties.py", "test_ticket_fuzz.py"
    ]  # fmt: skip

# The tests are small, and run side by side: threads would only wait for each other. Those about threads set their own.
torch.set_num_threads(1)
# On a GPU the definition is to be as good as its dtype allows: its own error is the others' limit.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

if hypothesis:
    hypothesis.settings.register_profile(
        "pyeff",
        deadline=None,
        max_examples=int(os.environ.get("PYEFF_TEST_EXAMPLES", "60")),
        # The same examples on every run of CI; new ones on every run elsewhere.
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("pyeff")

NO_PARAMETERS = types.SimpleNamespace(params={})


def pytest_configure(config):
    if problems := places.unmet():
        raise pytest.UsageError("PYEFF_TEST_REQUIRE is not met:\n" + "\n".join(problems))


def pytest_collection_modifyitems(config, items):
    """Leaves out what does not apply at a test's place; thousands of skips would hide the others."""
    dropped = [
        item for item in items
        if places.does_not_apply(
            getattr(item, "callspec", NO_PARAMETERS).params, item.get_closest_marker("emulated") is not None
        )
    ]  # fmt: skip
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        left = set(items) - set(dropped)
        items[:] = [item for item in items if item in left]
    if "PYEFF_TEST_PLACES" in os.environ:  # where time may be short: the most with the fewest calls first
        items.sort(key=lambda item: item.get_closest_marker("emulated") is None)


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


def tested_operation(request):
    """The operation that a test is about: its parameter ``op``, or what its module names as ``OPERATION``."""
    parameters = getattr(request.node, "callspec", NO_PARAMETERS).params
    return parameters.get("op") or getattr(request.module, "OPERATION", "read_recurrence")


def place_fixture(chosen):
    """A fixture that runs a test at each of the places, with the place in force, and gives it the backend's name."""

    @pytest.fixture(params=chosen, ids=str)
    def place(request):
        helpers.need(tested_operation(request), request.param.backend)
        with places.at(request.param):
            yield request.param.backend

    return place


# Every implementation, those with kernels of their own, of both the ones that compute in float64; the CPU's, a GPU's.
backend = place_fixture(places.PLACES)
kernels = place_fixture(places.KERNELS)
backend64 = place_fixture([place for place in places.PLACES if torch.float64 in place.dtypes])
kernels64 = place_fixture([place for place in places.KERNELS if torch.float64 in place.dtypes])
cpu_kernels = place_fixture([place for place in places.KERNELS if place.backend == "cpu"])
gpu_kernels = place_fixture([place for place in places.KERNELS if place.device == "cuda"])
# The same without emulated ones, for tests that are too large for them.
native = place_fixture([place for place in places.PLACES if not place.emulated])
native_kernels = place_fixture([place for place in places.KERNELS if not place.emulated])
native64 = place_fixture([place for place in places.PLACES if torch.float64 in place.dtypes and not place.emulated])


@pytest.fixture(autouse=True)
def no_older_graphs(request):
    """No graph of another test: torch gives a function up that has been compiled too often, and tests share some."""
    if request.module.__name__.endswith("_transforms"):
        torch._dynamo.reset()
