"""The multimask family's benchmark: its cases, and what their contenders compute, at small sizes."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

import pyeff
from benchmarks import multimask, multimask_paper, registry, results, runner
from benchmarks.registry import FORWARD, TRAINING, Selection
from tests import helpers

OPS = registry.ROWS["multimask"]
FORWARD_ONLY = ("multimask_targets", "block_mask", "ema_update_")
SMALL = {
    "image": multimask.Setting(2, 3, 2, (4, 5), 0.3, 0.1, 2, True, "layer", width=16),
    "audio": multimask.Setting(2, 2, 3, (30,), 0.5, 0.05, 3, False, width=8),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def small(op: str, dtype=torch.float32, name="image", moments=False):
    mode = FORWARD if op in FORWARD_ONLY else TRAINING
    return multimask.case(op, name, dtype, "cpu", mode, setting=SMALL[name], moments=moments, blocks=1)


def check(case, contender) -> list[torch.Tensor]:
    """A contender's outputs are the oracle's, for the set that no one has looked at yet."""
    with torch.set_grad_enabled(case.mode == TRAINING):
        sets = case.make(2, 0)
        reference = next(c for c in case.contenders if c.role == "reference")
        truth = [t.detach() for t in case.oracle(sets[1])]
        errors = [
            runner.relative_errors(case.comparable(sets[1], [t.detach() for t in c.prepare(sets)[1]()]), truth)
            for c in (reference, contender)
        ]
    limits = runner.error_limits(errors[0], case.dtype, case.reduction)
    verdict, reason = runner._verdict(errors[1], limits)
    assert verdict == results.TIMED, (contender.name, reason)
    return truth


@dtypes
@pytest.mark.parametrize("op", OPS)
def test_rivals_compute_the_same(op, dtype):
    """All that neither compile nor need a package."""
    case = small(op, dtype, moments=op == "multimask_loss")
    for contender in case.contenders:
        if contender.name in ("compiled", "paper c", "xformers", "FBGEMM", "fused"):
            continue
        if contender.name == "lerp" and dtype != torch.float32:
            with pytest.raises(registry.Unavailable):
                contender.prepare(case.make(2, 0))
            continue
        check(case, contender)


@pytest.mark.parametrize("op", ["multimask_gather", "multimask_scatter", "multimask_loss", "block_mask"])
def test_rivals_compute_the_same_of_a_sequence(op):
    case = small(op, name="audio")
    for contender in case.contenders:
        if contender.name in ("eager", "paper"):
            check(case, contender)


@dtypes
@pytest.mark.parametrize("op", OPS)
def test_ours_computes_the_same(op, dtype):
    helpers.need("multimask_loss", "cpu")
    case = small(op, dtype, moments=op == "multimask_loss")
    truth = check(case, next(c for c in case.contenders if c.role == "fused"))
    count = {"multimask_loss": 4, "multimask_step": 14, "ema_update_": 12}
    assert len(truth) == count.get(op, 1 if case.mode == FORWARD else 2)


def test_a_step_has_a_loss_and_gradients():
    """They are not compared, since each contender draws its own masks; all are there, and of the right size."""
    case = small("multimask_step", moments=True)
    sets = case.make(2, 0)
    losses = {}
    for contender in case.contenders:
        if contender.name in ("eager", "paper", "fused"):
            if contender.name == "fused":
                helpers.need("multimask_loss", "cpu")
            *_, loss, of_target, of_pred, dpred, dx = contender.prepare(sets)[0]()
            losses[contender.name] = loss.item()
            assert 0.5 < float(of_pred) < 1.5
            assert 0.3 < float(of_target) < 1.5
            assert dpred.shape == sets[0].pred.shape
            assert dx.shape == sets[0].x.shape
            assert dpred.any()
            assert dx.any()
    assert max(losses.values()) < 2 * min(losses.values())


def test_the_reference_does_not_pose_as_ours():
    case = small("multimask_gather")
    ours = next(c for c in case.contenders if c.role == "fused")
    with pyeff.backend("reference"), pytest.raises(registry.Unavailable):
        ours.prepare(case.make(2, 0))


@pytest.mark.parametrize("name", ["xformers", "fbgemm_gpu"])
def test_a_package_that_is_not_there_is_named(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    case = small("multimask_gather")
    contender = next(c for c in case.contenders if c.name == {"fbgemm_gpu": "FBGEMM"}.get(name, name))
    with pytest.raises(registry.Unavailable, match=f"{name}.* cannot be imported"):
        contender.prepare(case.make(2, 0))


def test_masks_of_the_paper():
    """Exactly as many as asked for, in blocks; and the three forms of one mask fit each other."""
    for setting in (*SMALL.values(), *(multimask.SETTINGS[n] for n in ("image", "text"))):
        hidden = multimask_paper.block_mask(2, 3, setting.shape, **setting.drawing)
        assert hidden.shape == (6, setting.tokens)
        assert (~hidden).sum(1).tolist() == [setting.kept] * 6
        masks = multimask_paper.Masks.of(hidden, setting.kept)
        assert torch.equal((~hidden).nonzero()[:, 1].view(6, -1), masks.keep)
        tokens = torch.arange(setting.tokens).expand(6, -1)
        shuffled = torch.cat([masks.keep, hidden.nonzero()[:, 1].view(6, -1)], 1)
        assert torch.equal(shuffled.gather(1, masks.restore), tokens)


def test_the_noise_of_the_paper():
    """The scatters have noise of the same size in the same places."""
    case = small("multimask_scatter")
    sets = case.make(2, 0)
    hidden = sets[0].plan.hidden().flatten(0, 1)
    for contender in case.contenders:
        if contender.name in ("eager", "paper"):
            (out, _) = contender.prepare(sets)[0]()
            assert abs(out[hidden].std() / 0.01 - 1) < 0.1


def test_work():
    """The bytes of the tables in the module's head, for the image encoder in bfloat16."""
    s = multimask.SETTINGS["image"]
    each, q, m = s.rows * s.tokens * 768, 39 / 196, 16

    def bytes_of(op, itemsize=2, training=True, **more):
        return multimask.work(op, s, itemsize, training, **more)[1] / each

    assert bytes_of("multimask_targets", training=False) == pytest.approx((2 * 10 + 4) / m)
    assert bytes_of("multimask_gather") == pytest.approx(4 * q + 4 / m)
    assert bytes_of("multimask_scatter") == pytest.approx(2 + 6 * q)
    assert bytes_of("multimask_loss") == pytest.approx(2 * (1 - q) + 2 + 4 / m)
    assert multimask.work("ema_update_", s, 4, False, parameters=100)[1] == 1200
    assert multimask.work("ema_update_", s, 2, False, parameters=100)[1] == 1200
    parts = sum(bytes_of(op, training=op != "multimask_targets") for op in OPS[:4])
    assert bytes_of("multimask_step") == pytest.approx(parts, rel=0.01)


def test_the_papers_settings():
    found = {name: (s.batch, s.tokens, s.masks, s.layers, s.kept) for name, s in multimask.SETTINGS.items()}
    assert found == {"image": (8, 196, 16, 10, 39), "audio": (2, 1000, 8, 8, 500), "text": (4, 512, 8, 12, 266)}


def test_sets_share_parameters_alone():
    one, other = small("multimask_step").make(2, 0)
    assert one.params[0] is other.params[0]
    assert not torch.equal(one.x, other.x)
    assert not torch.equal(one.plan.inverse, other.plan.inverse)
    again = small("multimask_step").make(1, 0)[0]
    assert torch.equal(one.x, again.x)


def test_averages_are_a_contenders_own():
    case = small("ema_update_")
    sets = case.make(2, 0)
    before = [t.clone() for t in sets[0].ema]
    for contender in case.contenders:
        if contender.name in ("eager", "paper", "lerp"):
            contender.prepare(sets)[1]()
    assert all(torch.equal(a, b) for a, b in zip(sets[0].ema, before, strict=True))


def test_what_is_measured():
    default = registry.cases("multimask", Selection())
    assert {case.op for case in default} == set(OPS)
    trained = {(c.op, c.group, c.point) for c in default if c.mode == TRAINING and c.dtype == torch.float32}
    for name in multimask.SETTINGS:
        assert {("multimask_gather", name), ("multimask_step", name), ("multimask_loss", name)} <= {
            t[:2] for t in trained
        }
    assert {c.dtype for c in default} == {torch.float32, torch.bfloat16}
    quick = registry.cases("multimask", Selection("quick"))
    assert len(quick) <= 6
    assert {c.op for c in quick} >= {"multimask_step", "multimask_targets"}
    assert len(registry.cases("multimask", Selection("full"))) > len(default)
    assert all(len(c.name) <= 9 for case in default for c in case.contenders)


def test_a_gpu_case_has_each_backend():
    for case in registry.cases("multimask", Selection("default", "cuda")):
        names = {c.name for c in case.contenders}
        assert {"triton", "cuda", "eager", "paper"} <= names
        assert {c.name for c in case.contenders if c.role == "fused"} <= {"triton", "cuda"}


def test_settings_may_be_changed():
    wide = dataclasses.replace(SMALL["image"], width=24)
    assert multimask.case("multimask_gather", "image", torch.float32, "cpu", FORWARD, setting=wide).shape["D"] == 24


@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_sets_are_no_more_than_fill_the_cache(size, monkeypatch):
    """Masks alone are small; of the others few sets are enough, and many would not fit into memory."""
    monkeypatch.setattr(runner.machine, "last_cache_bytes", lambda: 32 << 20)
    for case in registry.cases("multimask", Selection(size, "cpu")):
        assert case.op == "block_mask" or runner._set_count(case) <= 8, (case.op, case.label)
