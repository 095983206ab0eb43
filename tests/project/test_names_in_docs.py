"""The documents name what exists: files, classes and their members, modules, settings."""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.project.test_docs import DOCUMENTS, ROOT

PACKAGES = [ROOT / "middleware", ROOT / "sidecar"]
DESIGN = [ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("docs/design/*.md"))]
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("[a-z]*/**/*.py")
    if ".venvs" not in path.parts
]
OF_OTHERS = {"Authorization", "Date", "Security", "ThreadPoolExecutor", "Upgrade"}
"""Names of HTTP, FastAPI and Python that the design pages mention."""


FOLDERS = {
    path.parent.name: {each.stem for each in path.parent.iterdir()}
    for package in PACKAGES
    for path in package.glob("*/*/__init__.py")
}
"""The folders of the packages, with their modules."""


class Names(ast.NodeVisitor):
    """The names that a set of modules defines, and those in each class."""

    def __init__(self) -> None:
        self.all: set[str] = set(OF_OTHERS)
        self.members: defaultdict[str, set[str]] = defaultdict(set)
        self._class = ""

    def _add(self, name: str) -> None:
        self.all.add(name)
        self.members[self._class].add(name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._add(node.name)
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._add(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store):
            self._add(node.attr)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.all.add(node.arg)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.startswith("keylatch_"):
            self.all.add(node.value)  # a table


def names_of_the_packages() -> Names:
    names = Names()
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            names.all |= {*path.relative_to(package).parts, path.stem}
            names.visit(ast.parse(path.read_text()))
    return names


NAMES = names_of_the_packages()


def spans(text: str) -> list[str]:
    """The code spans of a document, without its code blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def unknown_files(text: str) -> list[str]:
    """Python files that do not exist: a name may omit leading folders."""
    named = [span for span in spans(text) if re.fullmatch(r"[\w./-]+\.py", span)]
    return [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)]


def misplaced_names(text: str) -> list[str]:
    """Names that are not in the file in which the document says they are: "`f` in `a/b.py`"."""
    said = re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", text)
    return [
        f"{name} in {file}"
        for name, file in said
        if not re.search(rf"\b{name}\b", (ROOT / file).read_text())
    ]


def is_known(first: str, others: list[str]) -> bool:
    if re.fullmatch(r"[A-Z]\w*[a-z]\w*", first):
        return first in NAMES.all and NAMES.members[first].issuperset(others)
    if not others or first in sys.stdlib_module_names:
        return True
    if first in FOLDERS and others[0] not in FOLDERS[first]:
        return False
    return NAMES.all.issuperset((first, *others))


def unknown_names(text: str) -> list[str]:
    """Classes, members of classes, and dotted names that no package defines."""
    names = [re.sub(r"\(.*\)$", "", span, flags=re.S) for span in spans(text)]
    dotted = [name for name in names if re.fullmatch(r"[A-Za-z_]\w*(\.(?!py$)\w+)*", name)]
    return [name for name in dotted if not is_known(*_split(name))]


def _split(name: str) -> tuple[str, list[str]]:
    first, *others = name.split(".")
    return first, others


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_files_that_a_document_names_exist(document: Path) -> None:
    """Also those that it names without their folders; and names are in the files that it says."""
    text = document.read_text()
    assert unknown_files(text) == []
    assert misplaced_names(text) == []


@pytest.mark.parametrize("document", DESIGN, ids=lambda path: path.name)
def test_the_names_in_the_design_exist(document: Path) -> None:
    """Classes, their methods and attributes, modules and functions with a dot in their names."""
    assert unknown_names(document.read_text()) == []


def test_the_design_names_many() -> None:
    """The search finds names: an empty one would pass."""
    found = [name for path in DESIGN for name in spans(path.read_text()) if name in NAMES.all]
    assert len(set(found)) > 40


@pytest.mark.parametrize(
    "planted",
    [
        "see `storage/queries.py`",
        "`_poll_interval` in `middleware/keylatch/revocation/lease.py`",
        "the `SecondLook` compares",
        "`Propagation.announce` waits",
        "`store.keys.fetch_everything`\nreads",
        "`revocation.feed` applies",
    ],
)
def test_a_name_that_is_gone_is_found(planted: str) -> None:
    """A file, a function that moved, a class, a method, a dotted name, a module."""
    assert [*unknown_files(planted), *misplaced_names(planted), *unknown_names(planted)]
