"""JEPA's, MAE's and iBOT's helpers and losses on the ops, against what their users have: gathers, repeats, indexing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyeff
from pyeff.recipes import _multimask_adapters as adapters
from tests import helpers

OPERATION = "multimask_gather"
BATCH, TOKENS, WIDTH = 3, 10, 8


def index_lists(sizes=(4, 4), batch=BATCH, sort=False):
    drawn = [torch.rand(batch, TOKENS).argsort(1)[:, :k] for k in sizes]
    return [m.sort(1).values for m in drawn] if sort else drawn


def plain_apply(x, masks):
    return torch.cat([torch.gather(x, 1, m[..., None].expand(-1, -1, x.shape[-1])) for m in masks])


def plain_repeat(x, batch, repeat):
    return torch.cat([torch.cat([x[i : i + batch]] * repeat) for i in range(0, len(x), batch)])


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def compare(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((found * weights).sum(), leaves)
    truth = torch.autograd.grad((expected * weights).sum(), leaves, retain_graph=True)
    for g, t in zip(grads, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sort", [True, False], ids=["ascending", "any order"])
@pytest.mark.parametrize("count", [1, 3])
def test_apply_masks(count, sort):
    x, masks = draw(BATCH, TOKENS, WIDTH), index_lists((4,) * count, sort=sort)
    compare(adapters.apply_masks(x, masks), plain_apply(x, masks), [x])
    compare(adapters.apply_masks(x, [m.int() for m in masks]), plain_apply(x, masks), [x])


def test_apply_masks_of_several_sizes():
    x, masks = draw(BATCH, TOKENS, WIDTH), index_lists((4, 7, 1))
    found = adapters.apply_masks(x, masks, concat=False)
    for each, mask in zip(found, masks, strict=True):
        assert torch.equal(each, plain_apply(x, [mask]))
    expected = [plain_apply(x, [mask]) for mask in masks]
    total, plain = (sum(t.square().sum() for t in each) for each in (adapters.apply_masks(x, masks, False), expected))
    compare(total, plain, [x])
    with pytest.raises(ValueError, match=r"\[4, 7, 1\]"):
        adapters.apply_masks(x, masks)


def test_kernels_apply_masks_as_the_definition(native_kernels):
    x, masks = draw(BATCH, TOKENS, WIDTH, dtype=torch.float32), index_lists((4, 6))
    weights = torch.randn(2, BATCH, 6, WIDTH)

    def run(backend, kind):
        own = x.detach().to(kind).requires_grad_()
        with pyeff.backend(backend):
            found = adapters.apply_masks(own, masks, concat=False)
            sum((t * weights[i, :, : t.shape[1]]).sum() for i, t in enumerate(found)).backward()
        return [*(t.detach() for t in found), own.grad]

    runs = run(native_kernels, torch.float32), run("reference", torch.float32), run("reference", torch.float64)
    for i, (a, b, c) in enumerate(zip(*runs, strict=True)):
        helpers.assert_three_way(f"tensor {i}", a, b, c, 2)


def test_repeat_interleave_batch():
    x = draw(4, 2, 5)
    compare(adapters.repeat_interleave_batch(x, 2, 3), plain_repeat(x, 2, 3), [x])
    for batch, repeat in ((3, 1), (0, 1), (2, 0)):
        with pytest.raises(ValueError, match="expected a multiple"):
            adapters.repeat_interleave_batch(x, batch, repeat)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_ijepa_loss(contexts, beta):
    masks, target = index_lists((4, 4, 4)), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    pred = draw(3 * contexts * BATCH, 4, WIDTH)
    h = plain_repeat(plain_apply(F.layer_norm(target, (WIDTH,)), masks), BATCH, contexts)
    expected = F.smooth_l1_loss(pred, h, beta=beta)
    compare(adapters.ijepa_loss(pred, target, masks, contexts=contexts, beta=beta), expected, [pred])
    plain = F.smooth_l1_loss(pred, plain_repeat(plain_apply(target, masks), BATCH, contexts))
    compare(adapters.ijepa_loss(pred, target, masks, contexts=contexts, norm=False), plain, [pred])
    with pytest.raises(ValueError, match="pred has shape"):
        adapters.ijepa_loss(pred[1:], target, masks, contexts=contexts)
    with pytest.raises(ValueError, match="contexts is a list, expected how many"):
        adapters.ijepa_loss(pred, target, masks, contexts=masks)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_vjepa_loss(exponent):
    sizes = (4, 7)
    masks, target = index_lists(sizes), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    preds = [draw(BATCH, k, WIDTH) for k in sizes]
    h = [plain_apply(F.layer_norm(target, (WIDTH,)), [m]) for m in masks]
    expected = sum((z - y).abs().pow(exponent).mean() / exponent for z, y in zip(preds, h, strict=True)) / 2
    compare(adapters.vjepa_loss(preds, target, masks, loss_exp=exponent), expected, preds)
    with pytest.raises(ValueError, match="preds have shapes"):
        adapters.vjepa_loss(preds[::-1], target, masks)
    with pytest.raises(ValueError, match="loss_exp"):
        adapters.vjepa_loss(preds, target, masks, loss_exp=3)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_loss(norm_pix_loss):
    pred, target = draw(BATCH, TOKENS, WIDTH), torch.rand(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    target[0, 0] = 0.5  # a patch of one colour
    mask = (torch.rand(BATCH, TOKENS) < 0.75).double()
    mask[0, 0] = 1
    y = target
    if norm_pix_loss:
        y = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = ((pred - y).square().mean(-1) * mask).sum() / mask.sum()
    compare(adapters.mae_loss(pred, target, mask, norm_pix_loss=norm_pix_loss), expected, [pred])
    compare(adapters.mae_loss(pred, target, mask.bool(), norm_pix_loss=norm_pix_loss), expected, [pred])
    if not norm_pix_loss:  # the default of MAE's code
        compare(adapters.mae_loss(pred, target, mask), expected, [pred])
    # Several students of each image.
    hidden = torch.rand(BATCH, 2, TOKENS) < 0.5
    pred = draw(2 * BATCH, TOKENS, WIDTH)
    each = (pred - y.repeat_interleave(2, 0)).square().mean(-1)[hidden.flatten(0, 1)]
    plan = pyeff.MaskPlan.from_mask(hidden)
    compare(adapters.mae_loss(pred, target, plan, norm_pix_loss=norm_pix_loss), each.mean(), [pred])
    with pytest.raises(ValueError, match="mask has shape"):
        adapters.mae_loss(pred, target, mask[:, 1:])


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_mae_decoder_input(prefix):
    kept = 4
    x, token = draw(BATCH, prefix + kept, WIDTH), draw(1, 1, WIDTH)
    positions = draw(1, prefix + TOKENS, WIDTH)
    ids_restore = torch.rand(BATCH, TOKENS).argsort(1).argsort(1)
    whole = torch.cat([x[:, prefix:], token.expand(BATCH, TOKENS - kept, -1)], 1)
    whole = torch.gather(whole, 1, ids_restore[..., None].expand(-1, -1, WIDTH))
    expected = torch.cat([x[:, :prefix], whole], 1) + positions
    found = adapters.mae_decoder_input(x, token, ids_restore, pos_embed=positions, prefix=prefix)
    compare(found, expected, [x, token, positions])
    found = adapters.mae_decoder_input(x, token.view(-1), ids_restore.int(), prefix=prefix)
    compare(found, expected - positions, [x, token])


def test_mae_decoder_input_of_positions_without_the_class_token():
    x, ids_restore = draw(BATCH, 1 + 4, WIDTH), torch.rand(BATCH, TOKENS).argsort(1).argsort(1)
    with pytest.raises(ValueError, match=r"pos_embed has shape .*, expected \[1, .* 1 tokens of the prefix"):
        adapters.mae_decoder_input(x, draw(WIDTH), ids_restore, pos_embed=draw(1, TOKENS, WIDTH))


def test_mae_decoder_input_by_a_plan():
    plan = pyeff.ops.block_mask(BATCH, 2, (TOKENS,), keep=0.4, adjust=0.1, length=2)
    x, token = draw(2 * BATCH, 1 + plan.width, WIDTH), draw(WIDTH)
    found = adapters.mae_decoder_input(x, token, plan)
    plain = torch.where(plan.hidden().flatten(0, 1)[..., None], token, 0.0)
    rows = plan.inverse.long()
    own = torch.gather(x[:, 1:], 1, rows.clamp(min=0)[..., None].expand(-1, -1, WIDTH))
    compare(found, torch.cat([x[:, :1], torch.where(rows[..., None] < 0, plain, own)], 1), [x, token])
    with pytest.raises(ValueError, match="ids_restore"):
        adapters.mae_decoder_input(x, token, torch.zeros(BATCH, TOKENS))
    with pytest.raises(ValueError, match="patches"):
        adapters.mae_decoder_input(x, token, torch.zeros(2 * BATCH, 2, dtype=torch.long))


def test_ibot_loss():
    pred, target = draw(BATCH, TOKENS, WIDTH), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    mask = torch.rand(BATCH, TOKENS) < 0.5
    mask[0] = False
    each = (1 - F.cosine_similarity(pred, target, dim=-1)) * mask
    expected = (each.sum(1) / mask.sum(1).clamp(min=1)).mean()
    compare(adapters.ibot_loss(pred, target, mask), expected, [pred])


def test_what_is_wrong_with_masks():
    x, masks = torch.randn(BATCH, TOKENS, WIDTH), index_lists()
    for wrong, match in (
        ([], "expected a list"), (masks[0], "expected a list"), ([masks[0][1:]], r"masks\[0\]"),
        ([masks[0], masks[1].float()], r"masks\[1\]"), ([masks[0] + TOKENS], "outside"),
        ([masks[0][:, [0, 0]]], "twice"), ([masks[0] - TOKENS], "outside"), ([masks[0][:, :0]], r"masks\[0\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            adapters.apply_masks(x, wrong)
    with pytest.raises(ValueError, match=r"\[B, T, D\]"):
        adapters.apply_masks(x[0], masks)


def test_they_compile():
    x, masks = draw(BATCH, TOKENS, WIDTH, dtype=torch.float32), index_lists((4, 4))
    target = torch.randn(BATCH, TOKENS, WIDTH)

    def loss(x, target, masks):
        return adapters.ijepa_loss(adapters.apply_masks(x, masks), target, masks)

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, target, masks)
    torch.testing.assert_close(found, loss(x, target, masks))
