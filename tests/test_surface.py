"""The public surface, enumerated: every name is documented, its examples run, and every op has all of its parts."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyeff
from pyeff import backends
from tests.helpers import make_read
from tests.multimask_calls import MAKERS, make_plan, normal
from tests.test_backends import output
from tests.ticket_calls import make_call

ROOT = Path(pyeff.__file__).resolve().parents[1]
FOLDERS = ("pyeff", "csrc", "tests", "benchmarks", "kernels", "cmake", "scripts")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cmake", ".sh")
OPTIONAL = ("rich", "typer", "matplotlib", "transformers", "safetensors", "triton", "numpy")

MULTIMASK = (
    "block_mask", "ema_update_", "multimask_accumulate_", "multimask_gather", "multimask_loss",
    "multimask_relative_bias", "multimask_scatter", "multimask_spread", "multimask_targets",
)  # fmt: skip

# What others build on: it may grow, never shrink.
PROMISED = {
    "pyeff": ("MaskPlan", "Ticket", "backend", "info", "nn", "ops", "recipes", "reference"),
    "pyeff.ops": ("read_recurrence", "read_step", "ticket_linear", *MULTIMASK),
    "pyeff.reference": ("read_recurrence", "read_step", "ticket_linear", *MULTIMASK),
    "pyeff.nn": (
        "ReadAdapter", "TicketLinear", "MultimaskStudent", "ConvDecoder1d", "ConvDecoder2d", "EMATeacher", "LayerStack",
        "MultimaskLoss", "MultimaskTargets", "TargetRecorder", "CollapseWatch", "RelativeBias",
    ),
    "pyeff.recipes": ("read", "ticket", "multimask"),
    "pyeff.recipes.read": ("attach",),
    "pyeff.recipes.ticket": ("prune", "project", "regroup", "sparsify", "fuse_qkv", "save", "load"),
    "pyeff.recipes.multimask": (
        "Pretrainer", "apply_masks", "repeat_interleave_batch", "ijepa_loss", "vjepa_loss", "mae_loss",
        "mae_decoder_input", "ibot_loss",
    ),
}  # fmt: skip


def read_example():
    call = make_read("gru", "rms", dtype=torch.float32)
    return (call.phi, call.tensors["w_ih"], call.tensors["w_hh"]), {"h0": call.tensors["h0"]}


def read_step_example():
    call = make_read("gru", "rms", dtype=torch.float32)
    return (call.phi[0], call.tensors["h0"], call.tensors["w_ih"], call.tensors["w_hh"]), {}


def ticket_example():
    call = make_call(dtype=torch.float32, traps=False)
    return (call.tensors["x"], call.tensors["values"], call.ticket, call.tensors["bias"]), {"activation": "gelu"}


def multimask_example(op):
    """Where rows keep different numbers, a bias has slots of -inf, which have no square."""

    def example():
        traps = {} if op in ("multimask_relative_bias", "multimask_targets") else {"traps": False}
        plan = {} if op == "multimask_targets" else {"plan": make_plan(ragged=False)}
        call = MAKERS[op](dtype=torch.float32, **plan, **traps)
        given = list(call.tensors.values())
        if op == "multimask_targets":
            return ([t.nan_to_num() for t in given],), call.options
        if op == "multimask_relative_bias":
            return (call.plan, *given), call.options
        if op == "multimask_loss":
            return (*given, call.plan), call.options
        return (given[0], call.plan), {**dict(zip(["fill"], given[1:], strict=False)), **call.options}

    return example


def accumulate_example():
    return (torch.zeros(2, 5, 3), normal(2, 5, 3, seed=1).float()), {"weight": 0.5}


def ema_example():
    return ([torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)], 0.75), {}


# A valid call of each function of pyeff.ops: (arguments, keywords).
EXAMPLES = {
    "read_recurrence": read_example,
    "read_step": read_step_example,
    "ticket_linear": ticket_example,
    "block_mask": lambda: ((2, 3, (4, 5)), {"keep": 0.4, "adjust": 0.1, "length": 2}),
    "ema_update_": ema_example,
    "multimask_accumulate_": accumulate_example,
    "multimask_spread": lambda: ((torch.cat([torch.tensor([7.0]), torch.rand(12)]).double(),), {}),
    **{op: multimask_example(op) for op in MAKERS},
}
# What a function takes in one form (of one op alone, where the name is another's too), and its op as plain arguments.
UNPACKED = {
    "state": {"h", "c"}, "ticket": {"index", "out_features"}, "plan": {"keep_len"}, "seed": {"seed"}, "B": {"lengths"},
    "M": {"masks"}, "shape": {"tokens", "grid_width"}, "adjust": {"share"}, "device": {"lengths"},
    "inverse": {"inverse"}, "multimask_relative_bias.scale": {"slopes"},
}  # fmt: skip
OPERATIONS = pyeff.ops.__all__
# Plain PyTorch on the few numbers that an op has given: nothing for a backend.
PLAIN = ("multimask_spread",)
REGISTERED = [op for op in OPERATIONS if op not in PLAIN]
# Draws, and changes in place, have no derivative.
DIFFERENTIABLE = [op for op in REGISTERED if op not in ("block_mask", "ema_update_", "multimask_accumulate_")]


def public_names():
    """(module, name, object) for everything in an ``__all__``; test_promised_names fails for what does not import."""
    for module_name, promised in PROMISED.items():
        for name in dict.fromkeys((*getattr(attempt(module_name), "__all__", ()), *promised)):
            value = attempt(f"{module_name}.{name}")
            if value is not None and not isinstance(value, str):
                yield module_name, name, value


def attempt(path: str):
    """The object at a dotted path; None where there is none."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


PUBLIC = list(public_names())
public = pytest.mark.parametrize(("module", "name", "value"), PUBLIC, ids=[f"{m}.{n}" for m, n, _ in PUBLIC])


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names(module):
    found = importlib.import_module(module)
    for name in PROMISED[module]:
        assert hasattr(found, name), f"{module}.{name}"
        if hasattr(found, "__all__"):
            assert name in found.__all__, f"{module}.__all__ lacks {name}"
    assert set(getattr(found, "__all__", ())) <= set(dir(found))


@public
def test_docstrings(module, name, value):
    text = inspect.getdoc(value)
    assert text, f"{module}.{name} has no docstring"
    if isinstance(value, types.ModuleType):
        return
    assert ">>> " in text, f"{module}.{name} has no example"
    signature = inspect.signature(value)
    if inspect.isclass(value) or not signature.parameters:
        return
    # The definitions share the arguments of the ops, and point there.
    if module == "pyeff.reference":
        assert f":func:`pyeff.ops.{name}`" in text
        return
    assert "Args:" in text, f"{module}.{name}"
    for parameter in signature.parameters:
        assert re.search(rf"\b{re.escape(parameter)}\b", text), f"{module}.{name}: {parameter} is not documented"
    if signature.return_annotation not in (None, "None", inspect.Signature.empty) and name != "backend":
        assert re.search(r"^Returns:", text, re.M), f"{module}.{name} does not say what it returns"


@public
def test_classes_document_their_arguments(module, name, value):
    if not inspect.isclass(value):
        pytest.skip("not a class")
    text = (inspect.getdoc(value) or "") + (inspect.getdoc(value.__init__) or "")
    for parameter in list(inspect.signature(value.__init__).parameters)[1:]:
        assert re.search(rf"\b{re.escape(parameter)}\b", text), f"{module}.{name}: {parameter} is not documented"
    for attribute, member in vars(value).items():
        if not attribute.startswith("_") and callable(member):
            assert inspect.getdoc(getattr(value, attribute)), f"{module}.{name}.{attribute} has no docstring"


def modules():
    # __main__ is a program; the kernels' package is imported by its own name.
    yield "pyeff"
    for found in pkgutil.walk_packages(pyeff.__path__, "pyeff."):
        if not found.name.endswith(("__main__", "._C")):
            yield found.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name in OPTIONAL:
            pytest.skip(f"{missing.name} is not installed")
        raise
    assert module.__doc__, f"{name} has no docstring"
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={}):
        runner.run(example)
    assert not runner.summarize(verbose=False).failed


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda p: p.name)
def test_examples_in_pages_run(page):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert not doctest.testfile(str(page), module_relative=False, optionflags=flags).failed


@pytest.mark.parametrize("op", REGISTERED)
def test_op_is_registered(op):
    packet = getattr(torch.ops.pyeff, op)
    assert packet.overloads() == ["default"]
    assert op in backends.OPS
    assert "reference" in backends.OPS[op]


@pytest.mark.parametrize("op", OPERATIONS)
def test_op_has_a_definition_of_the_same_signature(op):
    """The definition takes the op's arguments, in their order and with their defaults; the op may know more."""
    ours = inspect.signature(getattr(pyeff.ops, op)).parameters
    definition = inspect.signature(getattr(pyeff.reference, op)).parameters
    shared = [name for name in ours if name in definition]
    assert shared == list(definition)
    for name, parameter in definition.items():
        assert parameter.kind == ours[name].kind, name
        assert parameter.default == ours[name].default, name
    more = [p for name, p in ours.items() if name not in definition]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more), more


@pytest.mark.parametrize("op", REGISTERED)
def test_schema_has_the_arguments_of_the_function(op):
    """torch.ops.pyeff.<op> knows every option of the function, with the same default."""
    schema = {a.name: a for a in getattr(torch.ops.pyeff, op).default._schema.arguments}
    for name, parameter in inspect.signature(getattr(pyeff.ops, op)).parameters.items():
        plain = UNPACKED.get(f"{op}.{name}", UNPACKED.get(name))
        if plain:
            assert plain <= set(schema)
            continue
        assert name in schema, name
        if parameter.default is not parameter.empty and parameter.default is not None:
            assert schema[name].default_value == parameter.default, name


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_op_is_differentiable(op, backend):
    arguments, keywords = EXAMPLES[op]()
    given = torch.utils._pytree.tree_leaves((arguments, keywords))
    leaves = [t.requires_grad_() for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()]
    out = getattr(pyeff.ops, op)(*arguments, **keywords)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(g.abs().sum() > 0 for g in grads)


def parts(value) -> list[torch.Tensor]:
    """The tensors of a result: one, those of a plan, or none of what works in place."""
    if isinstance(value, pyeff.MaskPlan):
        return [value.ids_keep, value.keep_len, value.inverse, value.lengths]
    return [] if value is None else [value]


@pytest.mark.parametrize("op", REGISTERED)
def test_op_runs_on_fake_tensors(op, backend):
    arguments, keywords = EXAMPLES[op]()
    expected = getattr(pyeff.ops, op)(*arguments, **keywords)
    with FakeTensorMode() as mode:

        def to_fake(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            if isinstance(value, pyeff.MaskPlan):
                return pyeff.MaskPlan(*map(mode.from_tensor, parts(value)), value.prefix)
            fake = copy.copy(value)
            fake.index = mode.from_tensor(value.index)
            return fake

        kinds = (torch.Tensor, pyeff.Ticket, pyeff.MaskPlan)
        fake = torch.utils._pytree.tree_map_only(kinds, to_fake, (arguments, keywords))
        found = getattr(pyeff.ops, op)(*fake[0], **fake[1])
    for mine, real in zip(parts(found), parts(expected), strict=True):
        assert type(mine).__name__ == "FakeTensor"
        assert (mine.shape, mine.dtype, mine.device) == (real.shape, real.dtype, real.device)


def test_no_banners():
    """Comments say why; a file that needs signposts between its parts is two files."""
    sources = [ROOT / "CMakeLists.txt", *(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in SOURCES)]
    assert len(sources) > 50
    for path in sources:
        found = re.findall(r"^\s*(?:#|//) ?[-=*#]{3,}.*$", path.read_text(), re.M)
        assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize("op", OPERATIONS)
def test_op_has_its_pages(op):
    """A stem names the same thing in every folder; the masks and the averages belong to multimask."""
    page = stem = getattr(pyeff.ops, op).__module__.rsplit(".", 1)[-1]
    assert op.startswith((stem, "multimask", "legonn"))
    if op in MULTIMASK:
        stem = "multimask"
    for folder in ("pyeff/reference", "pyeff/ops", "pyeff/nn", "pyeff/recipes", "benchmarks"):
        assert (ROOT / folder / f"{stem}.py").exists(), f"{folder}/{stem}.py"
    assert (ROOT / "docs" / f"{stem}.md").exists()
    if "cpu" in backends.OPS.get(op, ()):
        for folder in ("csrc/cpu", "csrc/ops"):
            assert (ROOT / folder / f"{stem}.cpp").exists(), f"{folder}/{stem}.cpp"
    pages = {path for name in (stem, page) for path in (ROOT / "tests").glob(f"test_{name}*.py")}
    tests = " ".join(path.read_text() for path in pages)
    assert op in tests, f"no test names {op}"
    assert op in EXAMPLES


def test_importing_pyeff_registers_every_op():
    """torch.ops.pyeff.<name> is there as soon as pyeff is, without a look at pyeff.ops."""
    code = f"import pyeff, torch; print(*(hasattr(torch.ops.pyeff, name) for name in {REGISTERED}))"
    assert set(output(code).split()) == {"True"}


# Each layer may import those to its right.
LAYERS = ("cli", "recipes", "nn", "ops", "backends", "reference")


def imported(path: Path) -> set[str]:
    """Modules that a file imports from pyeff, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "pyeff"}


@pytest.mark.parametrize("layer", ["recipes", "nn", "ops", "reference", "kernels"])
def test_layers_know_only_what_is_below(layer):
    folder = ROOT / ("kernels" if layer == "kernels" else f"pyeff/{layer}")
    above = LAYERS if layer == "kernels" else LAYERS[: LAYERS.index(layer)]
    for path in folder.rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[1:2] not in [[a] for a in above], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("also", ["", ", pyeff.ops, pyeff.reference", ", pyeff.nn, pyeff.recipes, pyeff.recipes.read"])
def test_import_pulls_in_nothing_optional(also):
    """Importing pyeff, its ops, modules and recipes loads no optional package that torch had not loaded itself."""
    new = output(
        "import sys, torch; before = set(sys.modules)\n"
        f"import pyeff{also}\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert "pyeff" in new
    assert not set(new) & {"rich", "typer", "matplotlib", "transformers", "safetensors", "triton"}, new
