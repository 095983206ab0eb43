"""Importing a middleware imports what a check needs: no database toolkit, no command line."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import keylatch
from keylatch_sidecar.__main__ import _PACKAGES
from tests.support.servers import error_without_package

HEAVY = {
    *("alembic", "sqlalchemy", "redis", "psycopg", "pydantic", "pydantic_settings"),
    *("prometheus_client", "opentelemetry", "typer", "rich", "uvicorn", "httptools", "uvloop"),
    *("keylatch_sidecar", "keylatch_bench"),
}
MODULES = ["", ".asgi", ".wsgi", ".flask", ".django", ".fastapi", ".logs"]


def loaded_by(program: str) -> set[str]:
    """The modules of a fresh process after a program."""
    program = f"{program}\nimport sys; print(*sys.modules)"
    # A KEYLATCH_* variable that the engine does not know is looked up among those of the sidecar.
    env = {name: value for name, value in os.environ.items() if not name.startswith("KEYLATCH_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_a_middleware_imports_what_a_check_needs(module: str) -> None:
    """SQLAlchemy, pydantic and their like are imported when a middleware is built."""
    own = loaded_by("import fastapi") if module == ".fastapi" else set()
    assert loaded_by(f"import keylatch{module}") & HEAVY <= own


def test_the_store_decides_what_is_imported() -> None:
    """SQLite without Redis needs neither a client of Redis nor PostgreSQL's driver; an existing
    store needs no Alembic, and no engine needs the sidecar's packages."""
    build = "APIKeyMiddleware(None, store='sqlite:////nowhere/keys.db', redis='')"
    loaded = loaded_by(f"from keylatch.asgi import APIKeyMiddleware\n{build}")
    assert loaded & HEAVY == {"sqlalchemy", "pydantic", "pydantic_settings"}


def test_every_public_name_is_imported_on_first_use() -> None:
    """And none before; any other name is an error."""
    names = {*keylatch.__all__, "__version__"}
    assert names <= set(dir(keylatch))
    assert all(getattr(keylatch, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'Stroe'"):
        keylatch.Stroe  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_without_its_packages_says_what_to_install(package: str) -> None:
    """An app needs none of them, so they are an extra."""
    said = error_without_package(package, "from keylatch_sidecar.__main__ import main; main()")
    assert said == "hint: pip install 'keylatch[sidecar]'"


def test_the_packages_of_the_command_are_those_of_the_extra() -> None:
    """So that the hint helps; another missing package is an error of its own."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["sidecar"]
    names = {requirement.partition(">")[0].replace("-", "_") for requirement in extra}
    assert names == _PACKAGES
    assert "argon2 halted" in error_without_package(
        "argon2", "import keylatch_sidecar.__main__ as m; m.main()"
    )
