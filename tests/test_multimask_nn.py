"""Students and stacks of layers against loops in plain PyTorch, and all modules of the family together."""

from __future__ import annotations

import copy

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
    RelativeBias,
    TargetRecorder,
    key_mask,
)
from tests import helpers
from tests.multimask_parts import TOKENS, WIDTH, hidden_tokens

OPERATION = "multimask_gather"


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
