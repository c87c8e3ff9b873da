"""The loss with and without a class token, and the watch for collapse, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyeff
from pyeff.nn import CollapseWatch, MultimaskLoss
from tests.multimask_parts import TOKENS, WIDTH, hidden_tokens


@pytest.mark.parametrize("kind", ["l2", "smooth_l1", "cosine"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_with_a_class_token(kind, reduction):
    hidden, lengths = hidden_tokens(), torch.tensor([TOKENS, 7])
    plan = pyeff.MaskPlan.from_mask(hidden, lengths)
    pred, cls = (torch.randn(6, *more, WIDTH, dtype=torch.float64, requires_grad=True) for more in ((TOKENS,), ()))
    target = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    target[1, 7:] = 0  # as targets are
    beta = 0.5 if kind == "smooth_l1" else 0.0
    parts = MultimaskLoss(kind, beta=beta, scale=0.7, reduction=reduction, cls_weight=0.3)(
        pred, target, plan, cls=cls, statistics=True
    )
    means = torch.stack([target[0].mean(0), target[1, :7].mean(0)]).repeat_interleave(3, 0)
    x, y = pred[plan.hidden().flatten(0, 1)], target.repeat_interleave(3, 0)[plan.hidden().flatten(0, 1)]

    def distance(a, b):
        if kind == "cosine":
            return 1 - F.cosine_similarity(a, b, -1)
        d = a - b
        each = d.square() if kind == "l2" else F.smooth_l1_loss(a, b, beta=beta, reduction="none")
        return each.mean(-1) if reduction == "mean" else each.sum(-1)

    token, row = 0.7 * distance(x, y), 0.7 * distance(cls, means).mean()
    whole = token.mean() + 0.3 * row if reduction == "mean" else token.sum() + 0.3 * row * len(x)
    torch.testing.assert_close(parts.loss, whole)
    torch.testing.assert_close(parts.cls, row.detach())
    assert int(parts.count) == len(x) == int(parts.moments[0])
    for g, t in zip(*(torch.autograd.grad(v, [pred, cls]) for v in (parts.loss, whole)), strict=True):
        torch.testing.assert_close(g, t)


def test_loss_without_one():
    plan = pyeff.MaskPlan.from_mask(hidden_tokens())
    pred, target = torch.randn(6, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH)
    parts = MultimaskLoss()(pred, target, plan)
    assert torch.equal(parts.loss, pyeff.ops.multimask_loss(pred, target, plan))
    assert parts.cls is None
    assert parts.moments is None
    with pytest.raises(ValueError, match="cls"):
        MultimaskLoss()(pred, target, plan, cls=pred[:, 0])
    with pytest.raises(ValueError, match="cls"):
        MultimaskLoss(cls_weight=0.1)(pred, target, plan)
    with pytest.raises(ValueError, match="cls has shape"):
        MultimaskLoss(cls_weight=0.1)(pred, target, plan, cls=pred[:1, 0])
    for options in ({"kind": "l3"}, {"reduction": "none"}, {"cls_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MultimaskLoss(**options)


def test_watch_adds_up_over_steps():
    watch, seen = CollapseWatch(WIDTH), []
    for step in range(3):
        plan = pyeff.MaskPlan.from_mask(hidden_tokens())
        pred, target = 30 + 0.01 * torch.randn(6, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH) * (1 + step)
        watch.add(MultimaskLoss()(pred, target, plan, statistics=True).moments)
        hidden = plan.hidden().flatten(0, 1)
        seen.append((target.repeat_interleave(3, 0)[hidden].double(), pred[hidden].double()))
    targets, predictions = (torch.cat(each) for each in zip(*seen, strict=True))
    expected = [float((t.var(0) + 1e-6).sqrt().mean()) for t in (targets, predictions)]
    assert watch.spread(reset=False) == pytest.approx(expected, rel=1e-5)
    assert watch.half().moments.dtype == torch.float64
    assert watch.spread() == pytest.approx(expected, rel=1e-5)
    assert not watch.moments.any()
    assert not watch.state_dict()
    with pytest.raises(ValueError, match="moments"):
        watch.add(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="width"):
        CollapseWatch(0)
