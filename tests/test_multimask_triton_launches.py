"""The launches of the multimask family's Triton kernels: how many, and what Triton compiles for. Nothing runs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.multimask_parts import TRITON, triton_kernels

pytestmark = TRITON


@pytest.fixture(scope="module")
def kernels():
    return triton_kernels()


def recorded(kernels, batch, masks, tokens, dtype=torch.bfloat16):
    """What a step launches on an H200, by the op."""

    def empty(*shape, kind=dtype):
        return torch.empty(shape, device="meta", dtype=kind)

    rows, slots, width = batch * masks, tokens // 2, 768
    ids, inverse, counts, lengths = (
        empty(*shape, kind=torch.int32) for shape in ((rows, slots), (rows, tokens), (rows,), (batch,))
    )
    x, kept, large = empty(batch, tokens, width), empty(rows, slots, width), empty(rows, tokens, width)
    wide, number = empty(batch, tokens, width, kind=torch.float32), empty(kind=torch.float32)
    seed, none = empty(1, kind=torch.int64), empty(0)
    calls = {
        "gather": lambda: kernels.gather(x, ids, counts, kept),
        "gather_backward": lambda: kernels.gather_backward(kept, inverse, x),
        "scatter": lambda: kernels.scatter(kept, inverse, lengths, x, seed, None, 0.01, large),
        "targets": lambda: kernels.targets([x] * 10, lengths, 1, 0, 1e-5, 0.1, False, wide),
        "loss": lambda: kernels.loss(
            large, wide, inverse, lengths, None, 0, 0.0, 1.0, number, large, empty(1 + 4 * width, kind=torch.float64)
        ),
        "backward": lambda: kernels.loss_backward(
            number, large, wide, inverse, lengths, None, 0, 0.0, 1.0, large, none
        ),
        "bias": lambda: kernels.relative_bias(
            ids, counts, empty(12, kind=torch.float32), 0, empty(rows, 12, slots, slots)
        ),
        "mask": lambda: kernels.block_mask(seed, None, lengths, masks, 0, 0.5, 0.1, 5, True, ids, counts, inverse),
    }
    found = {}
    for name, call in calls.items():
        with kernels.launch.record(kernels.launch.Machine(90, 132)) as found[name]:
            call()
    return found


def test_launches(kernels):
    """Few of them; and what differs between two calls is nothing that Triton compiles for."""
    first, second = recorded(kernels, 8, 16, 200), recorded(kernels, 6, 11, 248)
    for name, launches in first.items():
        assert len(launches) == (2 if name == "loss" else 1), name
        for before, after in zip(launches, second[name], strict=True):
            assert (before.kernel, before.config, before.constants) == (after.kernel, after.config, after.constants)
            kernel = before.kernel
            free = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"] or []
            for argument, a, b in zip(kernel.arg_names, before.args, after.args, strict=False):
                if type(a) is int and a != b:
                    assert argument in free or (a % 16, b % 16) == (0, 0), f"{name}: {argument} is {a}, then {b}"
                assert type(a) is type(b), argument


def test_moving_averages_are_one_launch(kernels):
    """However many tensors there are."""
    many = [torch.empty(n, device="meta") for n in range(1, 3000)]
    with kernels.launch.record(kernels.launch.Machine(90, 132)) as launches:
        kernels.ema_update(many, many, torch.empty(1, dtype=torch.float64, device="meta"), [])
    assert [launch.grid for launch in launches] == [(2999,)]


def test_every_pair_of_norms_is_served(kernels):
    """By the launches alone."""
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    layer, out = torch.empty(2, 50, 8, device="meta"), torch.empty(2, 50, 8, device="meta")
    for norm, post in product(range(4), repeat=2):
        with kernels.launch.record(kernels.launch.Machine(90, 132)) as launches:
            kernels.targets([layer] * 3, lengths, norm, post, 1e-5, 1 / 3, False, out)
        assert len(launches) == 1 + (post != 0) + (norm == 3) + (post == 3)
