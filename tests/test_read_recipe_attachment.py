"""What pyeff.recipes.read.attach returns, on plain lists of modules: files, switches, errors, and the way back."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyeff.recipes import read

safetensors_torch = pytest.importorskip("safetensors.torch")
from safetensors import safe_open  # noqa: E402


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class Pair(NamedTuple):
    states: torch.Tensor
    extra: str


class Model(nn.Module):
    """A stack inside, a pair as its output, and a head that may train."""

    def __init__(self, count=3):
        super().__init__()
        self.body = Body(count)
        self.head = nn.Linear(16, 4)
        self.spare = nn.ModuleList([nn.Linear(16, 1) for _ in range(8)])

    def forward(self, x):
        return self.head(self.body(x).states)


class Body(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(count)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return Pair(self.norm(x), "extra")


def make(seed=0, **kw):
    torch.manual_seed(seed)
    return Model(**kw)


def randomise(attachment, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn_like(p) * 0.2)


X = torch.linspace(-2, 2, 80).reshape(5, 16).sin()


def chain(blocks, x=X):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("kind", ["list", "ModuleList", "Sequential", "Sequentials"])
def test_modules_as_layers(kind):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) if kind == "Sequentials" else Block() for _ in range(3)]
    given = {"ModuleList": nn.ModuleList, "Sequential": lambda b: nn.Sequential(*b)}.get(kind, list)(blocks)

    def run():
        return given(X) if kind == "Sequential" else chain(blocks)

    own = run().detach()
    states = [chain(blocks[: i + 1]).detach() for i in range(3)]
    attachment = read.attach(given, rank=8)
    assert torch.equal(run(), own)
    randomise(attachment)
    expected = own + attachment.adapter(states)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
    run().sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())
    assert all(p.grad is None for block in blocks for name, p in block.named_parameters() if "read_" not in name)
    attachment.detach()
    assert torch.equal(run(), own)
    assert all(p.requires_grad for block in blocks for p in block.parameters())


def test_output_module_of_a_list():
    torch.manual_seed(0)
    blocks, norm = [Block() for _ in range(3)], nn.LayerNorm(16)
    own = norm(chain(blocks)).detach()
    states = [chain(blocks[: i + 1]).detach() for i in range(3)]
    attachment = read.attach(blocks, 8, output=norm)
    randomise(attachment)
    expected = own + attachment.adapter(states)
    torch.testing.assert_close(norm(chain(blocks)), expected, rtol=1e-5, atol=1e-6)
    # Checkpointed layers run again outside of any call of the stack.
    x = X
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    got = norm(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert not norm.weight.requires_grad
    assert attachment.adapter.weight_ih_l0.grad.abs().sum() > 0


def test_checkpoints_that_cannot_work_say_so():
    blocks = [Block() for _ in range(3)]
    attachment = read.attach(blocks, 8)
    x = X
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="name a module outside of the checkpoint with output="):
        x.sum().backward()
    attachment.detach()
    norm = nn.LayerNorm(16)
    read.attach(blocks, 8, output=norm)
    with torch.no_grad():
        x = chain(blocks)
    with pytest.raises(RuntimeError, match="gradients were disabled when the first layer ran"):
        norm(x)


def test_finds_the_stack_of_any_model():
    model = make()
    attachment = read.attach(model, 8)
    assert "body.blocks: 3 of 3 layers, 16 wide" in repr(attachment)
    randomise(attachment)
    assert isinstance(model.body(X), Pair)
    assert model.body(X).extra == "extra"


def test_stack_can_be_named():
    model, x = make(), X
    own = model(x).detach()
    for stack in ("body", "body.blocks", "blocks", model.body, model.body.blocks):
        with read.attach(model, 8, stack=stack) as attachment:
            randomise(attachment)
            corrected = model(x).detach()
        assert not torch.allclose(corrected, own)
    with read.attach(model, 8, stack="body", output="body.norm") as attachment:
        randomise(attachment)
        torch.testing.assert_close(model(x), corrected)
    assert torch.equal(model(x), own)


@pytest.mark.parametrize("as_module", [False, True])
def test_heads_train_if_asked(as_module, tmp_path):
    model = make()
    attachment = read.attach(model, 8, train=(model.head if as_module else "head",))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "read_" not in name} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    names = dict(attachment.named_parameters())
    assert names["train.head.weight"] is model.head.weight
    assert len(list(attachment.parameters())) == len(names)
    randomise(attachment)
    attachment.save(tmp_path / "a.safetensors")
    other = make(seed=1)
    other.body.load_state_dict({k: v for k, v in model.body.state_dict().items() if "read_" not in k})
    read.attach(other, 8, train=("head",)).load(tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
    attachment.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_mixed_requires_grad_comes_back():
    model = make()
    model.body.blocks[0].inner.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    with read.attach(model, 8, train=("head",)):
        assert model.head.bias.requires_grad
        assert not model.body.norm.weight.requires_grad
    assert [p.requires_grad for p in model.parameters()] == before
    assert [name for name, _ in model.named_parameters()] == names


def test_only_the_adapter_is_saved_and_loads(tmp_path):
    model, path = make(), tmp_path / "adapter.safetensors"
    attachment = read.attach(model, 8, "lstm", "layer", layers=[0, 2])
    randomise(attachment)
    out = model(X)
    attachment.save(path)
    assert set(safetensors_torch.load_file(path)) == set(attachment.state_dict())
    assert sum(t.numel() for t in safetensors_torch.load_file(path).values()) == sum(
        p.numel() for p in attachment.parameters()
    )
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["pyeff"]) == attachment.config
    attachment.detach()
    again = read.attach(model, 8, "lstm", "layer", layers=[0, 2])
    assert again.load(path) is again
    assert torch.equal(model(X), out)


def test_enabled_switch_and_modes():
    model = make()
    own = model(X).detach()
    attachment = read.attach(model, 8)
    randomise(attachment)
    corrected = model(X)
    attachment.enabled = False
    assert not attachment.enabled
    assert torch.equal(model(X), own)
    attachment.enabled = True
    assert torch.equal(model(X), corrected)
    assert not attachment.eval().adapter.training
    assert model.body.training
    assert attachment.train().adapter.training
    model.eval()
    assert not attachment.adapter.training
    attachment.detach()
    attachment.detach()
    assert not attachment.enabled
    assert torch.equal(model(X), own)


def test_layers_that_are_not_seen_are_an_error(monkeypatch):
    model = make()
    read.attach(model, 8)

    def around_the_hooks(x):
        for block in model.body.blocks:
            x = block.forward(x)
        return Pair(x, "extra")

    monkeypatch.setattr(model.body, "forward", around_the_hooks)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="no layer that is read was called"):
            model(X)
    # With LayerDrop a layer may be left out: there is nothing to read then.
    model.body.layerdrop = 0.5
    own = model.head(around_the_hooks(X).states)
    assert torch.equal(model(X), own)


def test_a_call_that_raises_leaves_nothing_open():
    model = make()
    attachment = read.attach(model, 8)
    randomise(attachment)
    expected = model(X)
    with contextlib.suppress(RuntimeError):
        model(torch.randn(5, 15))
    assert attachment._watchers["adapter"].session is None
    assert torch.equal(model(X), expected)


def test_threads_do_not_mix():
    model = make()
    randomise(read.attach(model, 8))
    batches = [X * (i + 1) for i in range(4)]
    expected = [model(x).detach() for x in batches]
    barrier, results, failures = threading.Barrier(4), {}, []

    def meet(module, args, output):
        barrier.wait(30)

    model.body.blocks[1].register_forward_hook(meet)

    def work(i):
        try:
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    results[i, grad] = model(batches[i]).detach()
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for (i, _), got in results.items():
        torch.testing.assert_close(got, expected[i], rtol=1e-5, atol=1e-6)


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Body(2), Body(2)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Linear(16, 16), {}, "looked for a ModuleList whose modules share a class"),
        (Twins(), {}, r"left.blocks \(2 x Block\), right.blocks \(2 x Block\); name one with stack="),
        ([], {}, "the list of modules is empty"),
        ([nn.Linear(16, 16), 3], {}, "item 1 is a int"),
        ([nn.Identity()], {}, "expected width="),
        ([nn.Linear(16, 16)], {"stack": "x"}, "stack was given with a list"),
        (make(), {"train": ("hat",)}, r"'hat' names no module of the model.*body, head, spare"),
        (make(), {"train": ("norm",)}, "'norm' names several modules"),
        (make(), {"train": (nn.Linear(2, 2),)}, "train: the Linear is not a module of the model"),
        (make(), {"stack": nn.Linear(2, 2)}, "stack: the Linear is not a module of the model"),
        (make(), {"layers": [3]}, "layers has 3, expected integers from -3 to 2"),
        (make(), {"layers": [0, -3]}, "each once"),
        (make(), {"layers": []}, "at least one layer"),
        (make(), {"layers": [True]}, "layers has True, expected integers from -3 to 2"),
        (make(), {"layers": 1}, "layers is 1, expected a sequence of integers"),
        (make(), {"layers": {"encodr": [0]}}, r"layers has the keys \['encodr'\], expected 'adapter' at most"),
        (make(), {"cell": "elman"}, "cell is 'elman'"),
        (make(), {"joiner": "glue"}, "joiner is 'glue'"),
        (make(), {"joiner": "ffn"}, "joiner is 'ffn', expected 'auto' or None: the model is no encoder-decoder"),
        (make(), {"joiner": "cross"}, "joiner is 'cross', expected 'auto' or None"),
        (make(), {"cross_attention": "x"}, "cross_attention is 'x', expected None without a joiner"),
        (make(), {"store": "fp8"}, "store is 'fp8'"),
    ],
)
def test_errors_leave_the_model_alone(model, kwargs, message):
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    with pytest.raises(ValueError, match=message):
        read.attach(model, **kwargs)
    assert all(p.requires_grad for p in parameters)
    if isinstance(model, nn.Module):
        assert not any(m._forward_hooks or hasattr(m, "read_adapter") for m in model.modules())


def test_errors_of_calls_and_twice():
    block = Block()
    with pytest.raises(ValueError, match="module twice"):
        read.attach([block, block])
    model = make()
    attachment = read.attach(model, 8, width=12)
    with pytest.raises(ValueError, match=r"body.blocks\[0\] returns shape \[5, 16\], expected \[\*, 12\]"):
        model(X)
    with pytest.raises(ValueError, match="has an attachment already; detach it first"):
        read.attach(model, 8)
    attachment.detach()
    narrow = [nn.Linear(16, 16), nn.Linear(16, 16)]
    read.attach(narrow, 8, output=(last := nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=r"shape \[5, 4\], expected \[5, 16\]"):
        last(chain(narrow))


def test_optional_packages_load_on_first_use():
    code = (
        "import sys, torch; from pyeff.recipes import read; a = read.attach([torch.nn.Linear(4, 4)], 2); a.detach();"
        "print([m for m in ('transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
