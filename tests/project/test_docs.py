"""The documents say what is true: their code runs, and what they name exists."""

import math
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from flask import Flask

import keylatch
from keylatch.core.tokens import SCAN_PATTERN
from keylatch.django import get_asgi_application
from keylatch.settings import Settings
from keylatch_sidecar.app import ROUTES
from keylatch_sidecar.forward_auth import ext_authz, verify
from keylatch_sidecar.operations.doctor import connections
from keylatch_sidecar.settings import ProxySettings
from tests.support.servers import serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
POSTGRESQL = (ROOT / "docs/postgresql.md").read_text()
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[a-z]*/**/README.md")]
)


def examples() -> list[str]:
    """The README's programs: a block that imports begins one, the others go on with it."""
    programs: list[str] = []
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if block.startswith(("from ", "import ")):
            programs.append(block)
        else:
            programs[-1] += "\n" + block
    return programs


def status_of(names: dict[str, Any]) -> int:
    """What the program's app answers to a call without a key."""
    if isinstance(names.get("app"), Flask):
        return int(names["app"].test_client().post("/v1/emails").status_code)
    with serving(names["app"] if "app" in names else get_asgi_application()) as url:
        return httpx.post(f"{url}/v1/emails").status_code


@pytest.mark.long
@pytest.mark.parametrize(
    "program", [each for each in examples() if "MIDDLEWARE=" in each or "app =" in each]
)
def test_the_examples_in_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """As a reader would paste them into a file; and they protect their app."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(
        f"import sys; sys.path += [{str(ROOT)!r}]\n{program}\n"
        "from tests.project.test_docs import status_of\nprint(status_of(globals()))\n"
    )
    done = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "401\n"), done.stderr


def test_the_test_in_the_readme_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of `keylatch.testing`, run on the README's first app."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, test = (
        next(program for program in examples() if word in program)
        for word in ("Starlette(", "Keys()")
    )
    for number, program in enumerate((first, test)):
        (tmp_path / f"{number}.py").write_text(program)
        names |= runpy.run_path(f"{number}.py")
    names["test_a_revoked_key_is_gone_at_once"](names["app"])


@pytest.mark.long
def test_the_commands_for_operating_run(tmp_path: Path) -> None:
    """The block of "Operating", in a shell, on a store that it makes itself."""
    block = README.partition("## Operating")[2].partition("```\n")[2].partition("```")[0]
    assert block.count("keylatch ") >= 8
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", block], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert {"keys-1.db", "revocations.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_the_settings_in_the_readme_are_the_settings() -> None:
    """Every variable is described with its default, and nothing else is."""
    rows = re.findall(r"\| `KEYLATCH_(\w+)` \|.*\| (.*?) \|", README)
    described = {name.lower(): default.strip("`") for name, default in rows}
    real = {
        name: in_variable(field.default)
        for name, field in (Settings.model_fields | ProxySettings.model_fields).items()
    }
    assert described == real


def in_variable(default: object) -> str:
    """A default as a variable spells it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    return text or "empty"


def test_the_routes_in_the_readme_are_served() -> None:
    """The table names every route and no other."""
    section = README.partition("## Manage keys")[2].partition("##")[0]
    rows = "".join(re.findall(r"^\| (`/.*?) \|", section, re.MULTILINE))
    described = set(re.findall(r"`(/[^`?]*)", rows))
    served = {route.path.replace(":path", "") for route in ROUTES}
    served |= {verify.PATH, f"{ext_authz.PATH}/…"}
    assert described == served


def test_the_store_urls_in_the_documents_are_accepted() -> None:
    """Each form that the page on PostgreSQL shows is one that a start takes."""
    urls = re.findall(r"^postgresql://.*$", POSTGRESQL, re.MULTILINE)
    assert len(urls) > 5
    for url in urls:
        assert Settings.load(store=url).store == url


def test_the_sums_on_connections_are_right() -> None:
    """`7 x 30 + 40 + 3 + 10 = 263`, with the figure that `keylatch doctor` multiplies by."""
    sums = re.findall(r"^ +(\d[\dx+ ]+?) += +(\d+)$", POSTGRESQL, re.MULTILINE)
    assert len(sums) == 2
    for terms, total in sums:
        products = [each.split("x") for each in terms.split("+")]
        assert sum(math.prod(map(int, factors)) for factors in products) == int(total)
    assert f">=  {connections.CONNECTIONS_IN_USE} x processes" in POSTGRESQL
    row = r"^\| one process: .* \| \d \| (\d) \|$"
    assert re.findall(row, POSTGRESQL, re.MULTILINE) == [str(connections.CONNECTIONS_IN_USE)]


def test_the_scan_pattern_in_the_readme_is_the_published_one() -> None:
    """Whoever copies it into a scanner finds what we mint."""
    assert SCAN_PATTERN in README


def test_every_verb_in_the_documents_exists() -> None:
    """`make` commands that the documents name are in the Makefile."""
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        verb
        for document in DOCUMENTS
        for verb in re.findall(r"(?:`|^)make ([a-z]+)(?:`|,| +#)", document.read_text(), re.M)
    }
    assert {"demo", "test", "check", "bench"} <= named <= verbs


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    """Tests that hold a promise, benchmarks that make a number, and linked pages are there."""
    text = document.read_text()
    named = re.findall(r"`((?:tests|benchmarks|middleware|sidecar|deploy)/[\w./-]*)`", text)
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (document.parent / name).exists()]
    assert missing == []


def named_tests(text: str) -> set[tuple[str, str]]:
    """File and function of each test that a document names."""
    return set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))


def unknown_tests(text: str) -> list[str]:
    """Those that are not there."""
    return [
        f"{file}::{name}"
        for file, name in sorted(named_tests(text))
        if not (ROOT / file).exists()
        or not re.search(rf"^ *(?:async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]


def test_the_requirements_that_are_claimed_have_their_tests() -> None:
    """OWASP's numbers, each once, each with tests that exist; a made-up one is seen."""
    security = (ROOT / "SECURITY.md").read_text()
    section = security.partition("## OWASP ASVS 5.0\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|.*\| (.*) \|$", section, re.MULTILINE)
    numbers = [tuple(map(int, number.split("."))) for number, _ in rows]
    assert len(rows) >= 12
    assert numbers == sorted(set(numbers))
    assert all(named_tests(shown) for _, shown in rows)
    assert unknown_tests(security) == []
    made_up = "`tests/test_canaries.py::test_all_is_well` `tests/none.py::test_x`"
    assert len(unknown_tests(made_up)) == 2


@pytest.mark.parametrize("package", ["middleware/keylatch", "sidecar/keylatch_sidecar"])
def test_every_package_is_in_the_architecture(package: str) -> None:
    """The tables of "Boundaries" have each folder, and no other."""
    rows = set(re.findall(r"^\| `(\w+)` \|", _table_of(package), re.MULTILINE))
    assert rows == {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


def _table_of(package: str) -> str:
    """The table below the line that begins with the package's name."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return text.partition(f"\n`{Path(package).name}`, ")[2].partition("|\n\n")[0]


def test_every_design_page_is_linked_from_the_architecture() -> None:
    """A page without a link is not found; a link without a page is another test's."""
    linked = set(re.findall(r"\]\((docs/[\w./-]+)\)", (ROOT / "ARCHITECTURE.md").read_text()))
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/design").glob("*.md")}
    assert len(pages) > 10
    assert pages | {"docs/glossary.md"} <= linked


def test_every_word_of_the_glossary_has_a_source() -> None:
    """One row for each word, in alphabetical order; what it names in the code exists."""
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE
    )[2:]
    words = [re.sub(r"\W", "", word).lower() for word, _, _ in rows]
    assert 30 <= len(words) == len(set(words))
    assert words == sorted(words)
    code = "".join(path.read_text() for path in (ROOT / "middleware").rglob("*.py"))
    code += "".join(path.read_text() for path in (ROOT / "sidecar").rglob("*.py"))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0] + row[1])}
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", code)] == []


def test_one_version() -> None:
    """The package, its metadata and the changelog agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == keylatch.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## Unreleased$", changelog, re.MULTILINE)
    released = re.findall(r"^## (\d\S*)", changelog, re.MULTILINE)
    assert not released or released[0] == keylatch.__version__
