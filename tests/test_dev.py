"""The development module: kernels on NumPy arrays, in every instruction set that this processor has."""

from __future__ import annotations

import numpy as np
import pytest

dev = pytest.importorskip("pyeff_dev", reason="the development module was not built (make install builds it)")


@pytest.mark.parametrize("isa", dev.isa_usable())
@pytest.mark.parametrize("threads", [1, 3])
def test_stream_copy_and_read(isa, threads):
    source = np.random.default_rng(0).integers(0, 256, (2 << 20) + 77, dtype=np.uint8)
    target = np.zeros_like(source)
    dev.stream_copy(target, source, isa=isa, threads=threads)
    np.testing.assert_array_equal(target, source)
    assert dev.stream_read(target, isa=isa, threads=threads) == dev.stream_read(source, isa=isa, threads=1)


@pytest.mark.parametrize("isa", dev.isa_usable())
def test_fma_loop(isa):
    assert dev.fma_loop("float32", 20, isa=isa, threads=3) == 6 * dev.fma_loop("float32", 10, isa=isa) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"isa": "sse9"}, "isa is 'sse9', expected portable"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dev.fma_loop(**{"dtype": "float32", "iterations": 1, **arguments})


def test_nothing_is_converted_behind_the_back():
    with pytest.raises(TypeError):
        dev.stream_copy(np.zeros(8, np.float32), np.zeros(8, np.float32))
