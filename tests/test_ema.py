"""The moving average against its oracle: many tensors, dtypes, copies, and nothing written before all was checked."""

from __future__ import annotations

import math

import pytest
import torch

import pyeff
from tests import helpers, places
from tests.helpers import DTYPES, dtypes, says
from tests.multimask_calls import normal

OPERATION = "ema_update_"
SHAPES = [(), (1,), (7,), (0,), (3, 5), (64, 33), (1023,), (2, 0, 4), (3, 1, 2)]
DECAYS = [0.0, 0.5, 0.9999, 0.99999, 1.0]


def make(dtype=torch.float32, of_params=None, shapes=SHAPES) -> tuple[list, list]:
    """Averages and parameters on torch's default device."""
    device = torch.get_default_device()
    ema = [normal(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)]
    params = [normal(*shape, seed=90 + i, offset=0.5).to(device, of_params or dtype) for i, shape in enumerate(shapes)]
    return ema, params


def check(ema, params, decay, copies=None, what="") -> None:
    """One update, three ways."""
    truth = [decay * e.double() + (1 - decay) * p.double() for e, p in zip(ema, params, strict=True)]
    same = [e.clone() for e in ema]
    same_copies = None if copies is None else [c.clone() for c in copies]
    pyeff.reference.ema_update_(same, params, decay, copies=same_copies)
    pyeff.ops.ema_update_(ema, params, decay, copies=copies)
    for i, (found, expected) in enumerate(zip(ema, same, strict=True)):
        helpers.assert_three_way(f"ema[{i}] {what}", found, expected, truth[i], 1)
        if copies is not None:
            # A copy in a wider dtype has no more digits than the average.
            narrow = min(copies[i].dtype, found.dtype, key=lambda d: d.itemsize)
            a, b = copies[i].to(narrow), same_copies[i].to(narrow)
            helpers.assert_three_way(f"copies[{i}] {what}", a, b, truth[i], 1)


@dtypes
@pytest.mark.parametrize("decay", DECAYS)
def test_update(backend, decay, dtype):
    check(*make(dtype), decay)


@pytest.mark.parametrize("to", [None, *DTYPES], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of_params", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes_that_differ(of_params, to):
    """A float32 average of parameters in any dtype, with copies in any other, by whatever backend serves it."""
    ema, params = make(torch.float32, of_params)
    check(ema, params, 0.99, None if to is None else [torch.full_like(e, math.nan, dtype=to) for e in ema])


def test_a_float32_master_of_16_bits(kernels):
    half = next(d for d in places.here().dtypes if d.itemsize == 2)
    ema, params = make(torch.float32, half)
    copies = [torch.full_like(e, math.nan, dtype=half) for e in ema]
    check(ema, params, 0.999, copies)
    for average, copied in zip(ema, copies, strict=True):
        assert torch.equal(copied, average.to(half)), "a copy is the average, rounded once more"


def test_many_tensors(kernels):
    """More than one launch could name, of sizes from nothing to more than a block."""
    shapes = [(i * 7 % 301,) for i in range(700)] + [(70_001,)]
    check(*make(torch.float32, shapes=shapes), 0.95)


def test_one_minus_decay_in_double(backend):
    """1 - 0.99999 in float32 is off by a hundredth of a percent and more: a thousand updates would show it."""
    decay = 0.9999999
    ema, params = [torch.zeros(5)], [torch.ones(5)]
    pyeff.ops.ema_update_(ema, params, decay)
    torch.testing.assert_close(ema[0].double(), torch.full((5,), 1 - decay, dtype=torch.float64), rtol=1e-6, atol=0)
    # 1 - decay of a float32 decay would be 1.19e-7.
    assert abs(ema[0][0].item() / 1e-7 - 1) < 1e-4


def test_the_ends(backend):
    ema, params = make()
    before = [e.clone() for e in ema]
    pyeff.ops.ema_update_(ema, params, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ema, before, strict=True))
    pyeff.ops.ema_update_(ema, params, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema, params, strict=True))


def test_decay_as_a_tensor(backend):
    """The same bits as the number."""
    for shape in ((), (1,)):
        (a, params), (b, _) = make(), make()
        pyeff.ops.ema_update_(a, params, 0.9995)
        pyeff.ops.ema_update_(b, params, torch.full(shape, 0.9995, dtype=torch.float64))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_parameters_of_any_strides(backend):
    ema, params = make(shapes=[(4, 6), (3, 5, 7)])
    for kind in ("transposed", "sliced", "expanded"):
        check(ema, [helpers.lay_out(p, kind) for p in params], 0.9, what=kind)


def test_modules(backend):
    """Parameters of a module, which want gradients, into those of another; nothing is recorded, changes are noticed."""
    student, teacher = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    before, versions = [p.detach().clone() for p in teacher.parameters()], [p._version for p in teacher.parameters()]
    pyeff.ops.ema_update_(list(teacher.parameters()), list(student.parameters()), 0.75)
    for a, b, p in zip(teacher.parameters(), before, student.parameters(), strict=True):
        assert a.is_leaf
        assert a.grad_fn is None
        torch.testing.assert_close(a.detach(), 0.75 * b + 0.25 * p.detach())
    assert all(p._version > v for p, v in zip(teacher.parameters(), versions, strict=True))


def test_nothing_to_do(backend):
    pyeff.ops.ema_update_([], [], 0.5)
    pyeff.ops.ema_update_([], [], 0.5, copies=[])
    pyeff.ops.ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5)


def test_generators(backend):
    student = torch.nn.Linear(7, 5)
    teacher = [p.detach().clone() for p in student.parameters()]
    pyeff.ops.ema_update_(iter(teacher), student.parameters(), 0.5)
    assert all(torch.allclose(a, p) for a, p in zip(teacher, student.parameters(), strict=True))


def test_repeats_and_threads(cpu_kernels):
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            ema, params = make(shapes=[(50_000,), (3,), (999,)])
            pyeff.ops.ema_update_(ema, params, 0.997)
            found.append(ema)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def at(index, t):
    def change(given):
        given = list(given)
        given[index] = t(given[index]) if callable(t) else t
        return given

    return change


# name of the argument: how it is changed; what is said.
BAD = {
    "fewer params": ({"params": lambda p: p[:-1]}, "params has 2 tensors", "expected 3"),
    "more copies": ({"copies": lambda c: [*c, c[0]]}, "copies has 4 tensors", "expected 3"),
    "no copies": ({"copies": lambda c: []}, "copies has 0 tensors", "expected 3"),
    "another shape": ({"params": at(2, lambda t: t[:-1])}, "params[2] is", "[3]", "[4]"),
    "a shape that would broadcast": ({"params": at(2, lambda t: t[:1])}, "params[2] is", "[1]", "[4]"),
    "copies of another shape": ({"copies": at(1, lambda t: t.mT)}, "copies[1] is", "[5, 2]", "[2, 5]"),
    "ema of integers": ({"ema": at(2, lambda t: t.long())}, "ema[2] is torch.int64", "expected one of"),
    "params of integers": ({"params": at(2, lambda t: t.long())}, "params[2] is torch.int64", "expected one of"),
    "copies of bool": ({"copies": at(0, lambda t: t > 0)}, "copies[0] is torch.bool", "expected one of"),
    "params no tensor": ({"params": at(1, 3.0)}, "params[1] is a float", "expected a tensor"),
    "ema elsewhere": ({"ema": at(2, lambda t: t.to("meta"))}, "ema[2] is", "meta"),
    "params elsewhere": ({"params": at(2, lambda t: t.to("meta"))}, "params[2] is", "meta"),
    "params sparse": ({"params": at(1, lambda t: t.to_sparse())}, "params[1] is torch.sparse_coo"),
    "ema not contiguous": (
        {"ema": at(1, lambda t: torch.zeros(5, 2).mT)}, "ema[1] is not contiguous", "expected a contiguous tensor",
    ),
    "copies not contiguous": ({"copies": at(1, lambda t: torch.zeros(5, 2).mT)}, "copies[1] is not contiguous"),
    "decay above one": ({"decay": lambda d: 1.5}, "decay is 1.5", "from 0 to 1"),
    "decay negative": ({"decay": lambda d: -0.1}, "decay is -0.1", "from 0 to 1"),
    "decay no number": ({"decay": lambda d: math.nan}, "decay is nan", "from 0 to 1"),
    "decay true": ({"decay": lambda d: True}, "decay is True", "from 0 to 1"),
    "decay a string": ({"decay": lambda d: "0.5"}, "decay is '0.5'", "from 0 to 1"),
    "decay of float32": ({"decay": lambda d: torch.tensor(0.5)}, "decay is torch.float32", "float64"),
    "decays": ({"decay": lambda d: torch.ones(2, dtype=torch.float64)}, "decay is torch.float64 [2]", "a number"),
    "a tensor above one": (
        {"decay": lambda d: torch.tensor(1.5, dtype=torch.float64)}, "decay is 1.5", "from 0 to 1",
    ),
    "a tensor that is no number": (
        {"decay": lambda d: torch.tensor(math.nan, dtype=torch.float64)}, "decay is nan", "from 0 to 1",
    ),
    "decay elsewhere": (
        {"decay": lambda d: torch.ones((), dtype=torch.float64, device="meta")}, "decay is", "meta", "expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_written_by_a_bad_call(native, case):
    """The last tensor is wrong, and the first ones are what they were."""
    changes, *said = BAD[case]
    ema, params = make(shapes=[(3,), (2, 5), (4,)])
    copies = [torch.full_like(e, 7.0) for e in ema]
    before = [t.clone() for t in (*ema, *params, *copies)]
    given = {"ema": ema, "params": params, "decay": 0.5, "copies": copies}
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(ValueError, match=says("ema_update_", *said)):
        pyeff.ops.ema_update_(given["ema"], given["params"], given["decay"], copies=given["copies"])
    assert all(torch.equal(a, b) for a, b in zip((*ema, *params, *copies), before, strict=True))


def test_modules_for_their_parameters():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=says("ema_update_", "params is a Linear", "list(module.parameters())")):
        pyeff.ops.ema_update_([p.detach().clone() for p in module.parameters()], module, 0.5)


@pytest.mark.parametrize("what", ["twice", "overlapping", "the parameter", "a copy"])
def test_memory_that_is_shared(native, what):
    """What is written may overlap nothing."""
    whole = torch.arange(12.0)
    ema, params, copies = [whole[:6], torch.zeros(6)], [torch.ones(6), torch.ones(6)], None
    if what == "twice":
        ema[1] = ema[0]
    elif what == "overlapping":
        ema[1] = whole[5:11]
    elif what == "the parameter":
        params[1] = whole[2:8]
    else:
        copies = [whole[4:10], torch.zeros(6)]
    before = whole.clone()
    with pytest.raises(ValueError, match=says("ema_update_", "shares memory with", "do not overlap")):
        pyeff.ops.ema_update_(ema, params, 0.5, copies=copies)
    assert torch.equal(whole, before)


def test_parameters_may_be_tied(backend):
    """The same parameter for two averages is only read."""
    tied = torch.ones(6)
    ema = [torch.zeros(6), torch.zeros(6)]
    pyeff.ops.ema_update_(ema, [tied, tied], 0.5)
    assert all((e == 0.5).all() for e in ema)
