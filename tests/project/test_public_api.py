"""What is public, as `docs/public-api.md` lists it, and the one tree of exceptions."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keylatch
from keylatch import errors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "middleware/keylatch"
PAGE = (ROOT / "docs/public-api.md").read_text()
NOT_RAISED_TO_CALLERS = {"Contended", "ConnectionLost"}
"""`storage` catches these itself."""
REFINED = {"OtherServer"}
"""Internal refinements of a public exception: callers catch that one."""


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, up to the next heading of the same level."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [line.split(" | ") for line in lines]


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", cell))


MODULES = {cells[0].strip("`"): names_in(cells[1]) for cells in rows("Modules")}
MODULES["keylatch"] = set(keylatch.__all__)
MODULES["keylatch.errors"] = {
    name for name, each in vars(errors).items() if isinstance(each, type) and name in dir(keylatch)
}


def names_defined_in(module: str) -> set[str]:
    """By the source: Django's modules cannot be imported before a project is configured."""
    if module == "keylatch":
        return set(dir(keylatch))
    tree = ast.parse((PACKAGE / f"{module.partition('.')[2]}.py").read_text())
    names = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(each.name)
        elif isinstance(each, ast.ImportFrom):
            names |= {alias.name for alias in each.names}
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            names.add(each.id)
    return names


def test_the_page_lists_the_exported_names() -> None:
    """Each once, and no other."""
    listed = [cells[0].strip("`") for cells in rows("Names in `keylatch`")]
    assert sorted(listed) == sorted(keylatch.__all__)


def test_the_page_lists_the_modules_in_the_root() -> None:
    """All whose names have no underscore; every listed name exists."""
    public = {path.stem for path in PACKAGE.glob("*.py") if path.stem[0] != "_"}
    assert {f"keylatch.{name}" for name in public} | {"keylatch"} == MODULES.keys()
    for module, names in MODULES.items():
        assert names, module
        for name in names:
            assert name in names_defined_in(module), f"{module}.{name}"


def test_exported_names_are_those_that_type_checkers_see() -> None:
    """The imports for type checkers and the imports at run time are the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(each for each in tree.body if isinstance(each, ast.If))
    seen = {
        alias.name: str(each.module)
        for each in checked.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    assert {name: f"keylatch.{module}" for name, module in keylatch._MODULE_OF.items()} == seen
    assert sorted(seen) == sorted(keylatch.__all__)
    assert set(keylatch.__all__) <= set(dir(keylatch))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        keylatch.Nothing  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.long
def test_importing_the_package_loads_no_dependency() -> None:
    """`import keylatch` takes milliseconds; a name loads what it needs."""
    program = "import sys, keylatch; print(*sys.modules); keylatch.Settings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, after = (set(line.split()) for line in done.stdout.splitlines())
    dependencies = {"sqlalchemy", "alembic", "pydantic", "redis", "starlette", "prometheus_client"}
    assert not before & dependencies
    assert {name for name in before if name.startswith("keylatch")} == {"keylatch"}
    assert "pydantic" in after


@pytest.mark.long
@pytest.mark.parametrize("program", code_blocks(PAGE))
def test_the_examples_on_the_page_run(tmp_path: Path, program: str) -> None:
    """As a reader would paste them into a file; they print no error."""
    (tmp_path / "example.py").write_text(program)
    command = [sys.executable, "-W", "error", "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()


def private_imports(program: str) -> Iterator[str]:
    """The names of keylatch that a program imports although the page does not list them."""
    for each in ast.walk(ast.parse(program)):
        if isinstance(each, ast.Import):
            for alias in each.names:
                if alias.name.split(".")[0] == "keylatch" and alias.name not in MODULES:
                    yield alias.name
        elif isinstance(each, ast.ImportFrom) and str(each.module).split(".")[0] == "keylatch":
            for alias in each.names:
                module = f"{each.module}.{alias.name}"
                if module not in MODULES and alias.name not in MODULES.get(str(each.module), ()):
                    yield module


def test_examples_import_public_names_only() -> None:
    """Those of the README, of this page, in deploy/example and of the comparison with peers."""
    files = [*ROOT.glob("deploy/example/*.py"), *ROOT.glob("benchmarks/peers/apps/**/*.py")]
    programs = [path.read_text() for path in files]
    programs += code_blocks(PAGE) + code_blocks((ROOT / "README.md").read_text())
    assert len(programs) > 30
    assert [name for program in programs for name in private_imports(program)] == []
    assert list(private_imports("from keylatch.core.tokens import MacKeys")) == [
        "keylatch.core.tokens.MacKeys"
    ]


def drawn_tree() -> dict[str, str]:
    """The tree in the docstring of `errors`: each name and the name of its parent."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r" {4}([│ ├└─]*)(\w+) {2,}\S", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_errors_are_the_tree_in_the_docstring() -> None:
    """Each class below the parent that is drawn; wrong calls are `ValueError` as well."""
    drawn = drawn_tree()
    assert drawn.keys() == MODULES["keylatch.errors"]
    for name, parent in drawn.items():
        assert getattr(errors, name).__bases__[0].__name__ == parent
    assert issubclass(errors.InvalidValue, ValueError)
    assert issubclass(errors.ConfigurationError, ValueError)
    assert drawn.keys() <= set(keylatch.__all__)


def test_no_other_module_defines_an_exception() -> None:
    """A program that catches `KeylatchError` misses none."""
    defined = set()
    for path in PACKAGE.rglob("*.py"):
        for each in ast.walk(ast.parse(path.read_text())):
            if isinstance(each, ast.ClassDef) and path.name != "errors.py" and each.name[0] != "_":
                bases = {ast.unparse(base) for base in each.bases}
                if bases & {"Exception", "ValueError", "TypeError", "RuntimeError"} or any(
                    base in MODULES["keylatch.errors"] for base in bases
                ):
                    defined.add(each.name)
    assert defined == NOT_RAISED_TO_CALLERS | REFINED
