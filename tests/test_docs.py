"""The Markdown files: links and paths lead somewhere, names resolve, constants are the code's, README's code runs, and
tables are what the committed results give."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import pyeff
from benchmarks import predictions, report, results

ROOT = Path(pyeff.__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RESULTS = tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").glob("cpu*.json")))
# Made by pyeff bench and pyeff demo from what is measured on one machine.
GENERATED = (*RESULTS, "docs/figures/read.png", "docs/figures/demo.png", "docs/figures/ticket_density.png")
FOLDERS = ("pyeff", "csrc", "tests", "benchmarks", "docs", "kernels", "cmake", "scripts", "requirements")
FILE = re.compile(r"[\w.-]+\.(?:py|h|cpp|cu|md|toml|cmake|txt)|Makefile|LICENSE")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="these are not the sources")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def quoted(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    names = {page.name for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "architecture.md", "read.md", "numerics.md"} <= names


@each_page
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"[a-z]+:", link)]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_paths_in_backticks_exist(page):
    """Paths from the root; a bare file name may be that of any file. Patterns with <stem> or * stand for several."""
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    for text in quoted(page):
        if FILE.fullmatch(text):
            assert text in names or (ROOT / text).exists(), text
        elif re.fullmatch(r"[\w./-]+", text) and text.partition("/")[0] in FOLDERS and "/" in text:
            assert (ROOT / text).exists(), text


@each_page
def test_dotted_names_resolve(page):
    for text in quoted(page):
        name = re.fullmatch(r"((?:torch\.ops\.)?pyeff(?:\.\w+)+)(?:\(.*\))?", text)
        if name and not name[1].startswith("torch.ops.pyeff_"):
            importlib.import_module("pyeff.ops")
            pkgutil.resolve_name(name[1])


@each_page
def test_constants_are_those_of_the_code(page):
    """`kReadBlock = 96` in a page is in a kernel, `SUM_CONSTANT = 2.0` in a module."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cpp", ".py")]
    sources = "\n".join(path.read_text() for path in files if path != Path(__file__))
    for text in quoted(page):
        if re.fullmatch(r"(k[A-Z]\w*|[A-Z][A-Z_]+) = [\d.e-]+", text):
            assert re.search(rf"\b{re.escape(text)}(?![\w.])", sources), text


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make +([a-z]+)", page.read_text(), re.M)) | {
        text.split()[1] for text in quoted(page) if re.fullmatch(r"make [a-z]+", text)
    }
    assert named <= targets, named - targets


def blocks(page: Path):
    """The Python blocks of a page that are not doctests, with the packages that `<!-- needs: ... -->` asks for."""
    fence = re.compile(r"^(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)^```", re.M | re.S)
    for found in fence.finditer(page.read_text()):
        if not found[2].startswith(">>>"):
            yield pytest.param(found[1] or "", found[2], id=f"{page.stem}-{found.start()}")


@pytest.mark.parametrize(("needs", "code"), [block for page in PAGES for block in blocks(page)])
def test_code_runs(needs, code, tmp_path, monkeypatch):
    for package in needs.split():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(code, "<README>", "exec"), {"__name__": "example"})


@each_page
def test_places_for_tables_are_well_formed(page):
    """Every place opens and closes, on lines of their own, one after another, and asks for something that is timed."""
    text = prose(page)
    lines = [line for line in text.splitlines() if re.match(r"<!-- /?bench", line)]
    for opening, closing in zip(lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(r"<!-- bench:[\w+. ]+ -->", opening), opening
        assert closing == "<!-- /bench -->", closing
    assert len(report._MARKED.findall(page.read_text())) * 2 == len(lines)
    marks = re.findall(r"^<!-- /?predict.*", text, re.M)
    assert len(predictions.MARKED.findall(page.read_text())) * 2 == len(marks)


def test_tables_and_pictures_are_those_of_the_results(tmp_path):
    """A table is what the committed result gives, neither typed nor of another run; pictures are there."""
    assert [name for name in GENERATED if not (ROOT / name).exists()] == []
    for name in RESULTS:
        run, filled = results.load(ROOT / name), 0
        for page in PAGES:
            if report._MARKED.search(page.read_text()):
                copy = tmp_path / page.name
                copy.write_text(page.read_text())
                filled += report.write_into(run, copy)
                assert copy.read_text() == page.read_text(), f"pyeff bench --from {name} --into {page}"
        assert filled, name


def test_predictions_are_those_of_the_model(tmp_path):
    """And they are marked as predictions."""
    pytest.importorskip("triton")
    filled = 0
    for page in PAGES:
        if predictions.MARKED.search(page.read_text()):
            copy = tmp_path / page.name
            copy.write_text(page.read_text())
            filled += predictions.write_into(copy)
            assert copy.read_text() == page.read_text(), f"pyeff bench read --predict h200 --into {page}"
            for found in predictions.MARKED.finditer(page.read_text()):
                assert found[0].count(predictions.HEADING) == found[0].count("\n| case |") > 0
    assert filled
