"""Text with labels: the standard library's docstrings and their packages, or a Hugging Face dataset.

The docstrings are read from the source files without importing anything, so the corpus is the same wherever the same
Python is installed. No test docstring has a twin in the training set: normalised duplicates are removed first, a source
file (a top-level definition, for a package of one file) is wholly on one side, and what still shares most of its words
with a test docstring leaves the training set.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config", "lib-dynload"}
TEST_SHARE = 0.2
MIN_WORDS = 4
# Word sets that overlap this much (intersection over union) tell the same thing.
NEAR = 0.7
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """A text, its label as an index, and where it comes from."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class Corpus:
    """A labelled text collection with its split."""

    name: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]

    def majority(self) -> float:
        """The test accuracy of always answering the most frequent label."""
        return Counter(e.label for e in self.test).most_common(1)[0][1] / len(self.test)


def words(text: str) -> list[str]:
    """The lower-case words of a text, numbers and punctuation dropped."""
    return re.findall(r"[a-z]+", text.lower())


def docstrings(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (top-level package, ``file`` or ``file:definition``, docstring) for every docstring under ``root``."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts) or relative.stem.startswith("test_"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files of lib2to3's data are Python 2
            continue
        package = relative.parts[0].removesuffix(".py")
        for top in [tree, *tree.body]:
            name = getattr(top, "name", "")
            for node in [tree] if top is tree else ast.walk(top):
                if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
                    yield package, f"{relative.as_posix()}:{name}", text


def deduplicated(found: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """One of each text up to case, numbers and punctuation; none that two packages share, none that says too little."""
    first: dict[tuple[str, ...], tuple[str, str, str]] = {}
    packages: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for package, source, text in found:
        key = tuple(words(text))
        first.setdefault(key, (package, source, text))
        packages[key].add(package)
    return [kept for key, kept in first.items() if len(key) >= MIN_WORDS and len(packages[key]) == 1]


def split(group_sizes: dict[str, int]) -> set[str]:
    """The groups of one package that make its test set: in the order of their hash, while the test share lasts."""
    quota, taken = TEST_SHARE * sum(group_sizes.values()), set()
    for group in sorted(group_sizes, key=lambda g: hashlib.sha256(g.encode()).hexdigest()):
        if group_sizes[group] <= quota:
            quota -= group_sizes[group]
            taken.add(group)
    return taken


def group(source: str) -> str:
    """What is wholly on one side of a split: a file; of a package of one file, a top-level definition."""
    return source.partition(":")[0] if "/" in source else source


def divide(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """What to learn from, and what is held out of each label; what is near to the latter is in neither."""
    sizes: dict[int, Counter] = defaultdict(Counter)
    for example in examples:
        sizes[example.label][group(example.source)] += 1
    out = {label: split(counts) for label, counts in sizes.items()}
    held_out = [e for e in examples if group(e.source) in out[e.label]]
    rest = [e for e in examples if group(e.source) not in out[e.label]]
    leaks = near([e.text for e in rest], [e.text for e in held_out])
    return [example for example, leak in zip(rest, leaks, strict=True) if not leak], held_out


def near(texts: list[str], others: list[str], share: float = NEAR) -> list[bool]:
    """For each text, whether some other text has nearly the same set of words."""
    sets = [set(words(t)) for t in (*texts, *others)]
    index = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    table = torch.zeros(len(sets), len(index))
    for row, found in zip(table, sets, strict=True):
        row[[index[w] for w in found]] = 1
    a, b = table[: len(texts)], table[len(texts) :]
    both = a @ b.T
    return (both >= share * (a.sum(1)[:, None] + b.sum(1) - both)).any(1).tolist()


def standard_library(classes: int = 16, root: Path | None = None) -> Corpus:
    """The docstrings of the ``classes`` packages that have most of them.

    Args:
        classes (int): how many packages to keep.
        root (Path, optional): a folder of top-level packages. Default: the running Python's standard library.

    Raises:
        ValueError: fewer than two packages have docstrings on both sides of the split.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = deduplicated(docstrings(root))
    sizes: dict[str, Counter] = defaultdict(Counter)
    for package, source, _ in found:
        sizes[package][group(source)] += 1
    tests = {package: split(counts) for package, counts in sizes.items()}
    usable = [p for p in sizes if 0 < sum(sizes[p][g] for g in tests[p]) < sum(sizes[p].values())]
    labels = sorted(sorted(usable, key=lambda p: (-sum(sizes[p].values()), p))[:classes])
    if len(labels) < 2:
        raise ValueError(f"{root} has {len(labels)} packages with docstrings to split, expected at least 2")
    examples = [Example(text, labels.index(package), source) for package, source, text in found if package in labels]
    return Corpus("standard-library docstrings", tuple(labels), *divide(examples))


def validation(corpus: Corpus) -> Corpus:
    """What to choose settings on: the training texts alone, split as the whole corpus is. Its test set is not in it.

    Raises:
        ValueError: the training texts cannot be split.
    """
    train, held_out = divide(corpus.train)
    if not train or not held_out:
        raise ValueError(f"{corpus.name} has {len(corpus.train)} texts to learn from, which cannot be split")
    return Corpus(f"{corpus.name}, validation", corpus.labels, train, held_out)


def hugging_face(
    name: str, config: str | None, text_column: str, label_column: str, limit: int = 4000, seed: int = 0
) -> Corpus:
    """A dataset of the Hugging Face hub, or a local folder that ``datasets`` can load.

    Args:
        name (str), config (str, optional): as in ``datasets.load_dataset``.
        text_column (str), label_column (str): the columns to learn from and to predict.
        limit (int): the most training examples; the test set has at most a quarter of it.
        seed (int): of the choice among them.

    Raises:
        RuntimeError: ``datasets`` is not installed, or the dataset cannot be loaded.
        ValueError: it lacks a column, a training split or a labelled split to test on.
    """
    try:
        import datasets
    except ImportError:
        raise RuntimeError("--dataset needs the package datasets: pip install datasets") from None
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:  # no network, no such name: whatever the library makes of it, in one line
        raise RuntimeError(f"the dataset {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    held_out = next(
        (s for s in ("test", "validation", "validation_matched") if _labelled(splits, s, label_column)), None
    )
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"{name!r} has the splits {', '.join(splits)}, expected train and a labelled test or validation"
        )
    parts = []
    for side, count in (("train", limit), (held_out, limit // 4)):
        rows = splits[side].shuffle(seed=seed)
        for column in (text_column, label_column):
            if column not in rows.column_names:
                raise ValueError(f"{name!r} has the columns {', '.join(rows.column_names)}, not {column!r}")
        parts.append(rows.select(range(min(count, len(rows)))))
    names = getattr(parts[0].features[label_column], "names", None)
    values = sorted({str(v) for part in parts for v in part[label_column]})
    labels = tuple(names) if names else tuple(values)
    place = {value: i for i, value in enumerate(values)}
    train, test = (
        [
            # Named classes are stored as their indices.
            Example(str(row[text_column]), row[label_column] if names else place[str(row[label_column])], f"{name}/{i}")
            for i, row in enumerate(part)
        ]
        for part in parts
    )
    return Corpus(name, labels, train, test)


def _labelled(splits, side: str, label_column: str) -> bool:
    """Whether a split is there with real labels; hidden ones are -1."""
    return side in splits and label_column in splits[side].column_names and splits[side][0][label_column] != -1
