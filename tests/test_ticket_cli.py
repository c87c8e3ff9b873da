"""``pyeff prune`` on a tiny encoder: what it writes, what it prints, and what it refuses."""

import json

import pytest
import torch

from pyeff import cli
from pyeff.demo import data
from pyeff.recipes import ticket
from tests.test_demo import library

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder with its tokenizer, as Hugging Face has them."""
    root = tmp_path_factory.mktemp("model")
    words = ("a", "the", "return", "do", "what", "with", "of", "file", "package", "method", "thing", "first", "red")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(root)
    return root


def invoke(*arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(cli.build(), ["prune", *map(str, arguments)], env={"COLUMNS": "100"})


QUICK = ("--block", "8", "--batch", "2", "--max-length", "8")


def test_one_shot_writes_a_ticket_that_loads(folder, tmp_path):
    done = invoke(folder, *QUICK, "--density", "0.5", "--regroup", "--fuse", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    for words in ("density", "magnitude", "forward ms", "step ms", "0.attention.self.query", "times as fast", "MiB"):
        assert words in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "one_shot"
    assert report["pruning"]["density"] == pytest.approx(0.5, abs=0.02)
    assert report["pruning"]["retained"] > 0.5
    assert len(report["layers"]["layers"]) == 12  # the pooler is not asked, and not pruned
    assert report["training_bytes"]["ticket"] < report["training_bytes"]["dense"]
    fresh = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    ticket.load(fresh, tmp_path / "ticket.safetensors")
    assert len(ticket.tickets(fresh)) == 2 * 4
    assert hasattr(fresh.encoder.layer[0].attention.self, "ticket_qkv")
    fresh(input_ids=torch.tensor([[2, 5, 3]]))


@pytest.mark.parametrize("method", ["block_imp", "projection", "random"])
def test_training_rounds(folder, tmp_path, monkeypatch, method):
    from pyeff.cli import _prune_task

    corpus = data.standard_library(2, library(tmp_path / "library"))
    monkeypatch.setattr(_prune_task, "corpus", lambda *arguments: corpus)
    done = invoke(
        folder, *QUICK, "--task", "docstrings", "--method", method, "--density", "0.6", "--steps", "2", "--out",
        tmp_path / "out", *(["--rounds", "2"] if method != "random" else []), "--choose", "training",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "the ticket, trained:" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [round(r["density"], 2) for r in report["rounds"]] == ([0.8, 0.6] if method != "random" else [0.6])
    assert all(0 <= r["accuracy_before"] <= 1 for r in report["rounds"])
    assert report["pruning"]["density"] == pytest.approx(0.6, abs=0.02)
    assert (tmp_path / "out" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "imp"), "--method is 'imp', expected one of one_shot, block_imp, projection, random"),
        (("--method", "block_imp"), "--method block_imp trains, expected --task or --data"),
        (("--block", "8by8"), "--block is '8by8', expected a positive number, or two as 16x32"),
        (("--task", "poems"), "--task is 'poems', expected one of docstrings"),
        (("--task", "docstrings", "--data", "x"), "--task and --data exclude each other"),
        (("--choose", "speed"), "--choose is 'speed', expected one of inference, training"),
        (("--rounds", "3"), "--rounds is 3 with --method one_shot, expected block_imp or projection with it"),
        (("--rounds", "3", "--method", "random"), "--rounds is 3 with --method random"),
        (("--scope", "model"), "scope is 'model', expected one of"),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, arguments, message):
    done = invoke(folder, *arguments, "--out", tmp_path)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "report.json").exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
    done = invoke(tmp_path)
    assert done.exit_code == 1
    assert f"the model '{tmp_path}' cannot be loaded" in done.output.replace("\n", " ")
