"""The teacher and the recorder of its targets: schedules, precision, resuming, and what is missing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.nn import EMATeacher, MultimaskTargets, TargetRecorder
from tests.multimask_parts import WIDTH


class Teacher(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("collect", [False, True], ids=["streamed", "collected"])
@pytest.mark.parametrize("post_norm", ["none", "layer"])
def test_recorder_is_the_mean_of_what_the_modules_gave(collect, post_norm):
    teacher, x, lengths = Teacher(), torch.randn(2, 1 + 7, WIDTH, dtype=torch.float64), torch.tensor([7, 4])
    recorder = TargetRecorder(list(teacher.layers)[-3:], post_norm=post_norm, prefix=1, collect=collect)
    with torch.no_grad(), recorder.record(lengths) as same:
        teacher(x)
    assert same is recorder
    kept = []
    handles = [m.register_forward_hook(lambda m, a, out: kept.append(out[:, 1:])) for m in teacher.layers]
    teacher(x)
    for handle in handles:
        handle.remove()
    expected = MultimaskTargets(post_norm=post_norm)(kept[-3:], lengths)
    torch.testing.assert_close(recorder.targets, expected)
    assert not any(m._forward_hooks for m in teacher.modules())
    assert not recorder.targets.requires_grad
    # By an explicit call.
    with recorder.record(lengths):
        for layer in kept[-3:]:
            recorder.add((F.pad(layer, (0, 0, 1, 0)), None))
    torch.testing.assert_close(recorder.targets, expected)


def test_recorder_says_what_is_missing():
    teacher, x = Teacher(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    recorder = TargetRecorder(teacher.layers)
    with pytest.raises(RuntimeError, match="nothing has been recorded"):
        _ = recorder.targets
    with pytest.raises(RuntimeError, match="0 outputs came"), recorder.record():
        pass
    with pytest.raises(RuntimeError, match="more outputs"), recorder.record():
        teacher(teacher(x))
    # A recording that failed leaves nothing behind.
    assert not any(m._forward_hooks for m in teacher.modules())
    with recorder.record():
        copy.deepcopy(teacher)
        teacher(x)
    assert recorder.targets.shape == x.shape
    for arguments, match in (
        (([],), "modules"), (([teacher, teacher],), "modules"), (([teacher],), "norm"), (([teacher],), "prefix"),
    ):  # fmt: skip
        options = {"norm": "group"} if match == "norm" else {"prefix": -1} if match == "prefix" else {}
        with pytest.raises(ValueError, match=match):
            TargetRecorder(*arguments, **options)


def model_with_everything():
    """Shared and frozen parameters, and buffers: a batch norm counts in integers."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
    model[3].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    return model


def train(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p.dtype))
    model.train()(torch.randn(5, 6).to(next(model.parameters()).dtype))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_teacher_follows_the_schedule(dtype):
    student = model_with_everything()
    teacher = EMATeacher(student, decay=0.9, end_decay=0.99, steps=4, dtype=dtype)
    expected = {n: p.detach().double().clone() for n, p in student.named_parameters()}
    for step in range(1, 7):
        train(student, step)
        teacher.update(student)
        decay = 0.99 - 0.09 * max(0.0, 1 - step / 4)
        assert float(teacher.decay) == pytest.approx(decay, abs=1e-15)
        for name, p in student.named_parameters():
            held = p.detach().double()
            expected[name] = held if name == "2.weight" else decay * expected[name] + (1 - decay) * held
    assert int(teacher.updates) == 6
    for name, p in teacher.average.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)
        working = dict(teacher.model.named_parameters())[name]
        assert torch.equal(working, p.to(working.dtype))
    for name, b in student.named_buffers():
        assert torch.equal(dict(teacher.average.named_buffers())[name], b)
    assert teacher.average[3].weight is teacher.average[0].weight
    assert not teacher.training
    assert not teacher.train().model.training
    out = teacher(torch.randn(2, 6).to(dtype or torch.float32))
    assert out.dtype == (dtype or torch.float32)
    assert not out.requires_grad


def test_teacher_of_half_precision_averages_in_single():
    student = nn.Linear(4, 4).bfloat16()
    teacher = EMATeacher(student, decay=0.9999, dtype=torch.bfloat16)
    before = teacher.average.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    for _ in range(10):
        teacher.update(student)
    # In bfloat16 none of these steps would have moved anything.
    torch.testing.assert_close(
        (teacher.average.weight - before).double(), torch.full((4, 4), 1 - 0.9999**10).double(), rtol=0.02, atol=1e-6
    )
    assert teacher.model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_teacher_resumes_exactly(dtype):
    student = model_with_everything()
    teacher = EMATeacher(student, decay=0.9, end_decay=0.99, steps=4, dtype=dtype)
    train(student, 1)
    teacher.update(student)
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    twin = EMATeacher(model_with_everything(), decay=0.9, end_decay=0.99, steps=4, dtype=dtype)
    twin.load_state_dict(torch.load(file))
    third = copy.deepcopy(teacher)
    for step in (2, 3):
        train(student, step)
        for each in (teacher, twin, third):
            each.update(student)
    for each in (twin, third):
        assert int(each.updates) == 3
        for a, b in ((teacher.average, each.average), (teacher.model, each.model)):
            for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                assert torch.equal(p, q), name
    assert third.model is not teacher.model


def test_teacher_of_a_wrapped_student_and_of_another():
    student = nn.Linear(4, 4)
    teacher = EMATeacher(student, decay=0.5)
    teacher.update(torch.compile(nn.DataParallel(student)))
    with pytest.raises(ValueError, match="bias"):
        teacher.update(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="weight"):
        teacher.update(nn.Linear(5, 4))
    with pytest.raises(ValueError, match="meta"):
        teacher.update(nn.Linear(4, 4, device="meta"))
    assert int(teacher.updates) == 1
    for options in ({"decay": 1.5}, {"end_decay": -1.0}, {"steps": 0}, {"dtype": torch.int8}, {"decay": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            EMATeacher(student, **options)
