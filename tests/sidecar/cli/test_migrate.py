"""`keylatch migrate`: what would be done, and that it is done, on both databases."""

import os
import sqlite3
from contextlib import closing
from importlib.resources import files

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from keylatch.storage.migrations import steps_after
from keylatch.storage.schema import VERSION
from tests.support.command_line import Operator, Result
from tests.support.servers import PostgresServer


def old_store(url: str, version: str) -> None:
    """A store as an earlier keylatch left it, with a key in it."""
    config = Config()
    config.set_main_option("script_location", str(files("keylatch.storage.migrations")))
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
        for statement in (
            "INSERT INTO keylatch_meta VALUES (1, 1, 0, 'epoch')",
            "INSERT INTO keylatch_organizations VALUES ('default', true, 0)",
            "INSERT INTO keylatch_secrets (kind, value, created_at)"
            " VALUES ('check', '0123456789abcdef', 0), ('pepper', '0123456789abcdef', 0)",
            "INSERT INTO keylatch_keys (id, organization_id, name, permission, environment,"
            " partial_token, hash, active, created_seq, created_at, updated_at) VALUES"
            " ('key_a', 'default', 'old', 'FULL', 'live', 'kl_...abcd', 'x', true, 1, 0, 0)",
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, operator: Operator) -> str:
    """An empty store of the operator's."""
    if request.param == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        operator.set(STORE=postgres.new_database())
    return os.environ["KEYLATCH_STORE"]


@pytest.mark.parametrize("version", ["0002", "0003"])
def test_an_old_store_is_brought_up_to_date(operator: Operator, url: str, version: str) -> None:
    """The steps are listed first, then run; the keys are as they were."""
    old_store(url, version)
    checked = operator.run("migrate", "--check")
    assert (checked.exit_code, checked.stdout) == (1, "")
    lines = checked.stderr.splitlines()
    assert lines[0] == f"The store is at version {version}, this keylatch needs {VERSION}:"
    assert [line.split()[0] for line in lines[1:]] == [
        step.version for step in steps_after(version)
    ]
    assert all("Blocked meanwhile: " in line for line in lines[1:])
    done = operator.run("migrate")
    assert (done.exit_code, f"is at version {VERSION} now" in done.stderr) == (0, True)
    for words in (["migrate"], ["migrate", "--check"]):
        assert operator.run(*words) == Result(
            0, "", f"The store is at version {VERSION}: there is nothing to do.\n"
        )
    assert "key_a" in operator.run("keys", "list").stdout
    assert operator.run("secrets", "list").stdout.count("used for new tokens and values") == 2


def test_a_migration_gives_way_to_a_long_transaction(
    operator: Operator, postgres: PostgresServer
) -> None:
    """A backup reads the keys for an hour: a migration that waited for it would have every check
    wait behind it. It says so and can be repeated; nothing was changed."""
    url = postgres.new_database()
    operator.set(STORE=url)
    old_store(url, "0003")
    with psycopg.connect(url) as backup:
        backup.execute("SELECT * FROM keylatch_keys").fetchall()
        outcome = operator.run("migrate")
        assert (outcome.exit_code, "lock timeout" in outcome.stderr) == (2, True)
        assert operator.run("migrate", "--check").exit_code == 1
    assert operator.run("migrate").exit_code == 0


def test_looking_sets_nothing_up(operator: Operator, url: str) -> None:
    """An empty store is set up by `migrate`, and by any start, but not by `--check`."""
    for _ in range(2):
        checked = operator.run("migrate", "--check")
        assert (checked.exit_code, checked.stderr.startswith("The store is empty")) == (1, True)
    assert not operator.database.exists()
    assert operator.run("migrate").exit_code == 0
    assert operator.run("migrate", "--check").exit_code == 0
    assert operator.run("keys", "create", "--name", "x").exit_code == 0


def test_a_newer_store_is_refused(operator: Operator, url: str) -> None:
    """With a clear word, and left as it is."""
    operator.run("migrate")
    change = "UPDATE keylatch_version SET version_num = '9999'"
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
            raw.execute(change)
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(change)
    for words in (["migrate"], ["migrate", "--check"], ["secrets", "list"]):
        outcome = operator.run(*words)
        assert (outcome.exit_code, outcome.stdout) == (2, "")
        assert outcome.stderr == (
            f"error: the store is at version 9999, this keylatch knows up to {VERSION}\n"
            "hint: upgrade keylatch on this host\n"
        )


def test_a_store_that_is_gone_is_reported(operator: Operator) -> None:
    """At once, and without its password."""
    operator.set(STORE="postgresql://u:hunter2secret@127.0.0.1:1/keys")
    outcome = operator.run("migrate")
    assert (outcome.exit_code, "hunter2secret" in outcome.stderr) == (2, False)


def test_every_migration_says_who_waits() -> None:
    """Each step states what it locks."""
    assert [step.version for step in steps_after(None)][-1] == VERSION
    assert all(step.blocks and step.purpose for step in steps_after(None))
