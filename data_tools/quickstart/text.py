"""Text of the Python installation: docstrings of the standard library, pages of its language reference."""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}
REFERENCE = "/pydoc_data/topics.py"
MIN_DOCUMENT, MAX_DOCUMENT = 200, 1500  # characters
MIN_ANSWER, MAX_ANSWER = 20, 120  # characters

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One documented object (`name` is its dotted name, empty for a paragraph of prose) and its text."""

    name: str
    heading: str
    documentation: str

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.heading, self.documentation)))


@dataclass(frozen=True)
class Document:
    """Neighbouring entries of one module or reference page, as one text."""

    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(entry.text for entry in self.entries)


@dataclass(frozen=True)
class Question:
    """A question about a documented object and the first line of its documentation."""

    question: str
    answer: str


def installation_documents(folder: Path | None = None) -> list[Document]:
    """The distinct documents of the Python files below `folder`, by path (default: Python's own library)."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, Document] = {}
    for path in _python_files(folder):
        tree = ast.parse(path.read_bytes())
        relative = path.relative_to(folder)
        is_reference = path.as_posix().endswith(REFERENCE)
        pages = _reference_pages(tree) if is_reference else [_entries(tree, _module_name(relative))]
        for document in chain.from_iterable(map(_documents, pages)):
            documents.setdefault(document.text, document)
    return list(documents.values())


def common_words(texts: Iterable[str], count: int, max_letters: int) -> list[str]:
    """The `count` most frequent lower-case words of two to `max_letters` letters, most frequent first."""
    pattern = re.compile(rf"(?<![\w.-])[a-z]{{2,{max_letters}}}(?![\w(=-])")
    counts = Counter(word for text in texts for word in pattern.findall(text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]


def questions(document: Document) -> Iterator[Question]:
    """What the functions and classes of a document do, where a docstring's first line says so in full."""
    for entry in document.entries:
        line = entry.documentation.partition("\n")[0]
        if entry.heading and line.endswith(".") and MIN_ANSWER <= len(line) <= MAX_ANSWER:
            yield Question(f"What does {entry.name} do?", line)


def _python_files(folder: Path) -> list[Path]:
    files = folder.rglob("*.py")
    return sorted(path for path in files if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _entries(tree: ast.Module, module: str) -> Iterator[Entry]:
    documentation = ast.get_docstring(tree)
    if documentation:
        yield Entry(module, "", documentation)
    yield from _definitions(tree.body, module)


def _definitions(body: Sequence[ast.stmt], parent: str) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        name = f"{parent}.{node.name}"
        documentation = ast.get_docstring(node)
        if documentation:
            yield Entry(name, _heading(node, name), documentation)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, name)


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _reference_pages(tree: ast.Module) -> list[Iterable[Entry]]:
    """The pages of the language reference: the file assigns one dictionary of them."""
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    pages: dict[str, str] = ast.literal_eval(values[0])
    return [[Entry("", "", part) for part in page.strip().split("\n\n")] for page in pages.values()]


def _documents(entries: Iterable[Entry]) -> Iterator[Document]:
    """Consecutive entries joined up to MAX_DOCUMENT characters; a document under MIN_DOCUMENT is left out."""
    group: list[Entry] = []
    length = 0
    for entry in entries:
        if length + len(entry.text) > MAX_DOCUMENT and length >= MIN_DOCUMENT:
            yield Document(tuple(group))
            group, length = [], 0
        group.append(entry)
        length += len(entry.text)
    if length >= MIN_DOCUMENT:
        yield Document(tuple(group))
