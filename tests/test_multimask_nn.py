"""pyeff.nn of the multimask family: each module against loops in plain PyTorch, and as a module among others."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyeff
from pyeff.nn import (
    CollapseWatch,
    ConvDecoder1d,
    ConvDecoder2d,
    EMATeacher,
    LayerStack,
    MultimaskLoss,
    MultimaskStudent,
    MultimaskTargets,
    RelativeBias,
    TargetRecorder,
    key_mask,
    slopes_of,
)
from tests import helpers

OPERATION = "multimask_gather"
WIDTH, TOKENS = 16, 12


class Attention(nn.Module):
    """An encoder by the protocol: one layer of attention of several heads, and an MLP."""

    def __init__(self, width=WIDTH, heads=4, dtype=torch.float64):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, dtype=dtype), nn.Linear(width, width, dtype=dtype)

    def forward(self, tokens, attn_mask):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return tokens + self.out(out.transpose(1, 2).flatten(2))


def hidden_tokens(batch=2, masks=3, tokens=TOKENS, ragged=True):
    if not ragged:
        order = torch.rand(batch, masks, tokens).argsort(-1)
        return order >= tokens // 2
    hidden = torch.rand(batch, masks, tokens) < 0.5
    hidden[0, 0] = True  # a student that sees nothing
    hidden[0, 1] = False  # and one from whom nothing is hidden
    return hidden


def plain_student(student, x, hidden, lengths, positions=None, bias=None):
    """Row by row, without padding: what each student sees is a sequence of its own."""
    prefix, rows, prefixes = student.prefix, [], []
    for b, m in [(b, m) for b in range(hidden.shape[0]) for m in range(hidden.shape[1])]:
        length = int(lengths[b])
        kept = (~hidden[b, m, :length]).nonzero().flatten()
        seen = torch.cat([torch.arange(prefix), prefix + kept])
        mask = None
        if bias is not None:
            gap = (kept[:, None] - kept).abs().to(x.dtype)
            gap = F.pad(gap, (prefix, 0, prefix, 0))
            mask = (-bias.slopes.to(x.dtype) * bias.scale.to(x.dtype))[:, None, None] * gap
            mask = mask[None]
        out = x.new_zeros(1, prefix, x.shape[-1])
        if len(seen):
            out = student.encoder(x[b, seen][None], mask)
        prefixes.append(out[0, :prefix])
        between = x.new_zeros(length, x.shape[-1]) if positions is None else positions[:length]
        whole = between.clone()
        whole[kept] = out[0, prefix:]
        done = student.decoder(whole[None])[0] if student.decoder is not None else whole
        rows.append(F.pad(done, (0, 0, 0, hidden.shape[2] - length)))
    return torch.stack(rows), torch.stack(prefixes)


def valid_rows(lengths, masks, tokens=TOKENS):
    return (torch.arange(tokens) < lengths[:, None]).repeat_interleave(masks, 0)[..., None]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_student_is_row_after_row(prefix, biased, ragged):
    bias = RelativeBias(4).double() if biased else None
    if bias is not None:
        bias.scale.data.uniform_(0.5, 2.0)
    decoder = ConvDecoder1d(WIDTH, hidden=8, kernel=3, groups=2, layers=3).double()
    student = MultimaskStudent(Attention(), decoder, prefix=prefix, noise_std=0.0, bias=bias)
    hidden, lengths = hidden_tokens(ragged=ragged), torch.tensor([TOKENS, 7 if ragged else TOKENS])
    plan = pyeff.MaskPlan.from_mask(hidden, lengths)
    x = torch.randn(2, prefix + TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, positions, *student.parameters()]
    found, first = student(x, plan, seed=3, positions=positions, with_prefix=True)
    expected, plain_first = plain_student(student, x, hidden, lengths, positions, bias)
    valid = valid_rows(lengths, 3)
    # A decoder's last layer is linear: what it says about padding is its bias, and counts nowhere.
    torch.testing.assert_close(found.masked_fill(~valid, 0), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first, plain_first, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected) * valid
    grads = torch.autograd.grad((found * weights).sum() + first.sum(), leaves, materialize_grads=True)
    truth = torch.autograd.grad((expected * weights).sum() + plain_first.sum(), leaves, materialize_grads=True)
    for g, t in zip(grads, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-8, atol=1e-10)


def test_student_on_kernels(native_kernels):
    """In a dtype of the kernels: no further from float64 than the definitions in that dtype, but for rounding."""
    dtype = torch.float32
    decoder = ConvDecoder1d(WIDTH, hidden=8, kernel=3, groups=2, layers=2)
    student = MultimaskStudent(Attention(dtype=dtype), decoder, prefix=1, noise_std=0.5, bias=RelativeBias(4))
    plan = pyeff.MaskPlan.from_mask(hidden_tokens().cpu(), torch.tensor([TOKENS, 7], device="cpu"))
    device = torch.get_default_device()
    plan, x = plan.to(device), torch.randn(2, 1 + TOKENS, WIDTH)
    valid = valid_rows(plan.lengths, 3)

    def run(backend, kind):
        student.to(device, kind).zero_grad()
        with pyeff.backend(backend):
            own = x.to(kind, copy=True).requires_grad_()
            out = student(own, plan, seed=5)[valid.expand(-1, -1, WIDTH)]
            out.square().sum().backward()
        # Copies: the next dtype writes into the same parameters.
        return [out.detach(), own.grad, *(p.grad.clone() for p in student.parameters())]

    # Noise is of single precision, whatever it is added to.
    fused, same, oracle = run(native_kernels, dtype), run("reference", dtype), run("reference", torch.float64)
    for i, (a, b, c) in enumerate(zip(fused, same, oracle, strict=True)):
        helpers.assert_three_way(f"tensor {i}", a, b, c, 64)


def test_noise_is_that_of_the_op_and_of_the_sample():
    student = MultimaskStudent(lambda tokens, mask: tokens, noise_std=0.3)
    plan = pyeff.ops.block_mask(3, 2, (TOKENS,), keep=0.5, adjust=0.1, length=2, sample_ids=torch.tensor([7, 8, 9]))
    x = torch.randn(3, TOKENS, WIDTH)
    out = student(x, plan, seed=11, sample_ids=torch.tensor([7, 8, 9]))
    kept = pyeff.ops.multimask_gather(x, plan)
    assert torch.equal(
        out, pyeff.ops.multimask_scatter(kept, plan, noise_std=0.3, seed=11, sample_ids=torch.tensor([7, 8, 9]))
    )
    last = pyeff.ops.block_mask(1, 2, (TOKENS,), keep=0.5, adjust=0.1, length=2, sample_ids=torch.tensor([9]))
    assert torch.equal(student(x[2:], last, seed=11, sample_ids=torch.tensor([9])), out[4:])


def test_full_rows_get_no_mask_and_ragged_ones_do():
    seen = []

    def encoder(tokens, attn_mask):
        seen.append(attn_mask)
        return tokens

    student = MultimaskStudent(encoder, prefix=1)
    x = torch.randn(2, 1 + TOKENS, WIDTH)
    full = pyeff.MaskPlan.from_mask(hidden_tokens(ragged=False))
    student(x, full)
    student(x, full, ragged=True)
    student(x, pyeff.MaskPlan.from_mask(hidden_tokens()))
    student(x, full, ragged=False)
    assert [None if m is None else (tuple(m.shape), m.dtype) for m in seen] == [
        None, ((6, 1, 1, 7), torch.bool), ((6, 1, 1, 1 + TOKENS), torch.bool), None,
    ]  # fmt: skip


def test_key_mask_lets_an_empty_row_attend():
    plan = pyeff.MaskPlan.from_mask(torch.tensor([[[True, True], [False, False], [True, False]]]))
    assert key_mask(plan).flatten(1).tolist() == [[True, True], [True, True], [True, False]]


def test_bridge_and_wrong_arguments():
    student = MultimaskStudent(Attention(), nn.Identity(), prefix=1, bridge=nn.Linear(WIDTH, 5, dtype=torch.float64))
    plan = pyeff.MaskPlan.from_mask(hidden_tokens())
    x = torch.randn(2, 1 + TOKENS, WIDTH, dtype=torch.float64)
    assert student(x, plan).shape == (6, TOKENS, 5)
    with pytest.raises(ValueError, match="x has shape"):
        student(x[:, 1:], plan)
    with pytest.raises(ValueError, match="plan"):
        student(x, plan.with_prefix(1))
    with pytest.raises(ValueError, match="encoder gave"):
        MultimaskStudent(lambda tokens, mask: tokens[:, :2])(x[:, 1:], plan)
    for options in ({"prefix": -1}, {"prefix": True}, {"noise_std": -1.0}, {"noise_std": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MultimaskStudent(Attention(), **options)
    with pytest.raises(ValueError, match="cannot be called"):
        MultimaskStudent(None)


def test_compiled_student_takes_new_masks():
    decoder = ConvDecoder2d(WIDTH, (3, 4), hidden=8, groups=2, layers=2)
    student = MultimaskStudent(Attention(dtype=torch.float32), decoder, prefix=1, bias=RelativeBias(4))
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1 + TOKENS, WIDTH, requires_grad=True)
    for seed in (1, 2):
        plan = pyeff.MaskPlan.from_mask(hidden_tokens(), width=TOKENS)
        found, expected = compiled(x, plan, seed=torch.tensor(seed)), student(x, plan, seed=torch.tensor(seed))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, image_size=6, patch_size=2, num_channels=1)
        return transformers.ViTModel(config).eval(), config
    if kind == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        return transformers.DistilBertModel(config).eval(), config
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=40)
    return getattr(transformers, f"{kind}ForMaskedLM")(config).eval(), config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "distilbert", "vit"])
def test_stacks_of_hugging_face(kind, attention):
    """A student of whole sequences is the model; a ragged one is the layers on each row by itself."""
    model, _ = hugging_face(kind)
    model.set_attn_implementation(attention)
    stack = LayerStack.of(model)
    assert len(stack.layers) == len(stack.mlps()) == 2
    base = model.base_model
    if kind == "vit":
        inputs = torch.randn(2, 1, 6, 6)
        x = base.embeddings(inputs)
    else:
        inputs = torch.randint(3, 40, (2, 9))
        x = base.embeddings(input_ids=inputs) if kind != "distilbert" else base.embeddings(inputs)
    whole = base(inputs).last_hidden_state
    torch.testing.assert_close(stack(x), whole, rtol=1e-4, atol=1e-5)
    prefix = x.shape[1] - 9
    student = MultimaskStudent(stack, prefix=prefix, noise_std=0.0)
    hidden = hidden_tokens(tokens=9)
    plan = pyeff.MaskPlan.from_mask(hidden)
    expected, _ = plain_student(student, x, hidden, torch.tensor([9, 9]))
    torch.testing.assert_close(student(x, plan), expected, rtol=1e-4, atol=1e-5)
    # With a bias, too.
    student.bias = RelativeBias(2)
    expected, _ = plain_student(student, x, hidden, torch.tensor([9, 9]), bias=student.bias)
    torch.testing.assert_close(student(x, plan), expected, rtol=1e-4, atol=1e-5)


def test_mlps_give_what_comes_before_the_residual():
    model, _ = hugging_face("vit")
    stack, seen = LayerStack.of(model), {}
    layer = stack.layers[0]
    stack.mlps()[0].register_forward_hook(lambda module, arguments, output: seen.update(mlp=output))
    x = torch.randn(2, 5, 16)
    out = layer(x, None)
    attended = layer.attention(layer.layernorm_before(x), None)[0] + x
    torch.testing.assert_close(out - attended, seen["mlp"])


def test_stacks_that_are_none():
    with pytest.raises(ValueError, match="empty"):
        LayerStack([])
    with pytest.raises(ValueError, match="no layers at"):
        LayerStack.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer 0"):
        LayerStack([nn.Linear(2, 2)]).mlps()
    model, config = hugging_face("vit")
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        LayerStack.of(model)(torch.randn(1, 3, 16), torch.ones(1, 1, 1, 3, dtype=torch.bool))


@pytest.mark.parametrize("kernel", [3, 4])
def test_decoders_are_stacks_of_convolutions(kernel):
    decoder = ConvDecoder1d(8, hidden=12, kernel=kernel, groups=4, layers=3, out=5).double()
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    y = x.transpose(1, 2)
    for layer in decoder.layers:
        weight = layer.convolution.weight[:, :, 0]
        z = F.conv1d(y, weight, layer.convolution.bias, padding="same", groups=4)
        z = F.gelu(F.layer_norm(z.transpose(1, 2), (12,))).transpose(1, 2)
        y = z + y if z.shape == y.shape else z
    torch.testing.assert_close(decoder(x), decoder.projection(y.transpose(1, 2)))
    grid = ConvDecoder2d(8, (3, 5), hidden=8, kernel=kernel, groups=2, layers=2).double()
    x = torch.randn(4, 15, 8, dtype=torch.float64)
    y = x.transpose(1, 2).unflatten(2, (3, 5))
    for layer in grid.layers:
        z = F.conv2d(y, layer.convolution.weight, layer.convolution.bias, padding="same", groups=2)
        y = y + F.gelu(F.layer_norm(z.permute(0, 2, 3, 1), (8,))).permute(0, 3, 1, 2)
    torch.testing.assert_close(grid(x), grid.projection(y.flatten(2).transpose(1, 2)))


def test_decoder_does_not_see_how_much_padding_there_is():
    decoder = ConvDecoder1d(8, hidden=8, kernel=5, groups=2, layers=3).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    x[1, 6:] = float("nan")
    found = decoder(x, lengths=torch.tensor([9, 6]))
    torch.testing.assert_close(found[1, :6], decoder(x[1:, :6])[0])
    torch.testing.assert_close(found[0], decoder(x[:1])[0])


def test_decoders_refuse_what_does_not_fit():
    for options in ({"hidden": 9}, {"layers": 0}, {"kernel": 0}, {"groups": 3}, {"out": 0}):
        with pytest.raises(ValueError, match="ConvDecoder1d: "):
            ConvDecoder1d(8, **{"hidden": 8, "groups": 2} | options)
    with pytest.raises(ValueError, match="grid"):
        ConvDecoder2d(8, (0, 2), hidden=8, groups=2)
    with pytest.raises(ValueError, match="x has shape"):
        ConvDecoder2d(8, (2, 2), hidden=8, groups=2)(torch.randn(1, 5, 8))


def test_slopes():
    assert slopes_of(1) == [2.0**-8]
    assert slopes_of(8) == [2.0**-i for i in range(1, 9)]
    # As the code of ALiBi has them for twelve heads.
    assert slopes_of(12) == pytest.approx([*slopes_of(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    with pytest.raises(ValueError, match="heads"):
        slopes_of(0)
    with pytest.raises(ValueError, match="slopes"):
        RelativeBias(3, slopes=[1.0])
    assert RelativeBias(3, scale=False).scale is None


def test_negative_scales_count_as_zero():
    bias = RelativeBias(2)
    bias.scale.data[:] = torch.tensor([-1.0, 2.0])
    out = bias(pyeff.MaskPlan.from_mask(hidden_tokens(ragged=False)))
    assert not out[:, 0].any()
    assert (out[:, 1] <= 0).all()
    out.sum().backward()
    assert bias.scale.grad[0] == 0 != bias.scale.grad[1]


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


def test_a_training_step_of_all_parts():
    """Student, teacher, recorder, loss and watch together: the loss falls, and copies and files work."""
    model, _ = hugging_face("vit")
    model.train()
    stack = LayerStack.of(model)
    decoder = ConvDecoder2d(16, (3, 3), hidden=16, groups=4, layers=2)
    student = MultimaskStudent(stack, decoder, prefix=1)
    teacher = EMATeacher(nn.ModuleDict({"embeddings": model.embeddings, "stack": stack}), decay=0.9)
    recorder = TargetRecorder(teacher.model["stack"].mlps(), post_norm="layer", prefix=1)
    objective, watch = MultimaskLoss(cls_weight=0.1), CollapseWatch(16)
    parameters = [*model.embeddings.parameters(), *student.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    images, losses = torch.randn(8, 1, 6, 6), []
    for step in range(30):
        plan = pyeff.ops.block_mask(8, 4, (3, 3), keep=0.4, adjust=0.1, length=2, seed=step)
        with torch.no_grad(), recorder.record():
            teacher.model["stack"](teacher.model["embeddings"](images))
        pred, first = student(model.embeddings(images), plan, seed=step, with_prefix=True)
        parts = objective(pred, recorder.targets, plan, cls=first[:, 0], statistics=True)
        optimizer.zero_grad()
        (parts.loss / parts.count).backward()
        optimizer.step()
        teacher.update(nn.ModuleDict({"embeddings": model.embeddings, "stack": stack}))
        watch.add(parts.moments)
        losses.append(float(parts.loss.detach() / parts.count))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert min(watch.spread()) > 0.05
    twin = copy.deepcopy(student)
    twin.load_state_dict(student.state_dict())
    x = model.embeddings(images)
    assert torch.equal(twin(x, plan, seed=1), student(x, plan, seed=1))
