"""The databases find rows by an index: nothing reads all keys, or sorts them.

What is asked is not written down here again: the statements are run as the store runs them, and the
database is asked how it does that. PostgreSQL may sort where it has no statistics yet, so an import
ends with making them.
"""

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert

from keylatch.storage import leases, records
from keylatch.storage.audit import AuditRepository
from keylatch.storage.authorization import stored_key
from keylatch.storage.database import Database
from keylatch.storage.descendants import descendants_of
from keylatch.storage.invalidation_log import INVALIDATIONS_SINCE, InvalidationLog, advance
from keylatch.storage.keys import KeyRepository, analyze
from keylatch.storage.quotas import Quotas, check_changes, check_quota
from keylatch.storage.schema import invalidations
from keylatch.storage.store import Store, database_of
from keylatch.storage.usage import (
    DAY_MS,
    Client,
    UsageBatch,
    UsageRepository,
    add_batch,
    record_last_used,
)
from tests.storage.test_store import NOW, record
from tests.support.repositories import on, run
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio

KEYS, BIG, LOG = 12_000, 3_000, 5_000
ONE = "key_00077"
TODAY = NOW // DAY_MS
SEEN = Client("192.0.2.0/24", "curl", NOW)
TALLY = UsageBatch("another", 1, TODAY, {(ONE, TODAY, "allowed"): 7}, {ONE: SEEN})
ASKED: dict[str, Callable[[Connection], object]] = {
    "a cold look-up": lambda c: c.execute(
        records.FIND.statement, {"key_id": ONE, "anchor": 0}
    ).all(),
    "an uncached look-up of an imported token": lambda c: c.execute(
        records.FIND_BY_LOCATOR.statement,
        {"anchor": 0} | dict.fromkeys(records.LOCATOR_PARAMETERS, "seam:a_b"),
    ).all(),
    "imported keys": lambda c: on(c, KeyRepository).import_many(
        [(replace(record(f"key_imported{n}", "org1"), locator=f"seam:{n}"), "") for n in range(9)]
    ),
    "one of an organisation": lambda c: on(c, KeyRepository).get("org1", ONE),
    "the first page": lambda c: on(c, KeyRepository).page("big", 100),
    "the first page, oldest first": lambda c: on(c, KeyRepository).page(
        "big", 100, newest_first=False
    ),
    "a page": lambda c: on(c, KeyRepository).page("big", 100, after=2_000),
    "a page, oldest first": lambda c: on(c, KeyRepository).page(
        "big", 100, newest_first=False, after=2_000
    ),
    "a page with deleted keys": lambda c: on(c, KeyRepository).page(
        "big", 100, deleted=True, after=2_000
    ),
    "uses": lambda c: record_last_used(c, {ONE: NOW}),
    "counts of uses": lambda c: add_batch(c, {ONE: NOW}, TALLY),
    "uses of a key": lambda c: on(c, UsageRepository).of_key("org1", ONE, TODAY - 29),
    "keys that are not used": lambda c: on(c, KeyRepository).page(
        "big", 9, after=2_000, unused_since=NOW - 1
    ),
    "old counts": lambda c: on(c, UsageRepository).prune(TODAY),
    "a better hash": lambda c: on(c, KeyRepository).replace_hash(ONE, "old", "new"),
    "a change": lambda c: on(c, KeyRepository).change("org1", ONE, NOW, {"name": "new"}),
    "a new key": lambda c: on(c, KeyRepository).add(record("key_new", "org1"), "hashed"),
    "what happened": lambda c: c.execute(
        INVALIDATIONS_SINCE.statement, {"since": KEYS + LOG - 9}
    ).all(),
    "who lags": lambda c: (
        c.execute(leases.LAGGARDS.statement, {"seq": 5}).all()
        if c.dialect.name == "postgresql"  # SQLite has no leases
        else []
    ),
    "pruning": lambda c: on(c, InvalidationLog).prune(),
    "a key's audit log": lambda c: on(c, AuditRepository).events("big", 100, ONE),
    "more of a key's audit log": lambda c: on(c, AuditRepository).events("big", 100, ONE, 9_000),
    "a key's audit log, for an operator": lambda c: on(c, AuditRepository).events(None, 100, ONE),
    "the audit log": lambda c: on(c, AuditRepository).events("big", 100),
    "more of the audit log": lambda c: on(c, AuditRepository).events("big", 100, None, 9_000),
    "the audit log of an environment": lambda c: on(c, AuditRepository).events(
        "big", 9, environment="test"
    ),
    "keys of an environment": lambda c: on(c, KeyRepository).page(
        "big", 9, after=2_000, environment="test"
    ),
    "what a key created": lambda c: descendants_of(c, "org1", ONE),
    "the acting key": lambda c: stored_key(c, "org1", ONE),
    "limits": lambda c: check_quota(c, "big", NOW, Quotas(KEYS, 100), new_keys=1),
}
LOGS = [name for name in ASKED if "audit log" in name]
LISTS = [name for name in ASKED if "page" in name]
SCANS = re.compile(r"(SCAN|Seq Scan on) keylatch_(keys|invalidations|usage|clients|audit)")
SCANS_OF_KEYS = re.compile(r"(SCAN|Seq Scan on) keylatch_keys")
SORTS = re.compile(r"USE TEMP B-TREE|^ *(->  )?Sort")


def plan_of(connection: Connection, operation: Callable[[Connection], object]) -> list[str]:
    """How the database does it, line by line."""
    explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with statements_of(connection) as statements:
        outcome = operation(connection)
        if isinstance(outcome, Coroutine):
            run(outcome)
    return [
        str(row[-1])
        for statement, parameters in statements
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH"))
        for row in connection.exec_driver_sql(explain + statement, parameters)
    ]


@contextmanager
def statements_of(connection: Connection) -> Iterator[list[tuple[str, Any]]]:
    statements: list[tuple[str, Any]] = []

    def keep(*args: Any) -> None:
        _, _, statement, parameters, _, is_many = args
        statements.append((statement, parameters[0] if is_many else parameters))

    event.listen(connection, "before_cursor_execute", keep)
    yield statements
    event.remove(connection, "before_cursor_execute", keep)


def slow_steps(
    connection: Connection, operation: Callable[[Connection], object], *slow: re.Pattern[str]
) -> list[str]:
    plan = plan_of(connection, operation)
    return [line for line in plan if any(pattern.search(line) for pattern in slow)]


async def full(url: str) -> Database:
    """A store with many keys, a long log, and one organisation that has a quarter of all keys."""
    store = Store(url)
    await store.open(NOW)
    for start in range(0, KEYS, 1_000):
        organizations = ["big" if n < BIG else f"org{n % 300}" for n in range(start, start + 1_000)]
        made = [
            (record(f"key_{n:05}", organization), "hashed")
            for n, organization in enumerate(organizations, start)
        ]
        await store.keys.add_many(made)
    await store.close()
    database = database_of(url)
    log = [{"seq": KEYS + n + 2, "key_id": f"key_{n:05}", "at": NOW} for n in range(LOG)]

    def lengthen(connection: Connection) -> None:
        connection.execute(insert(invalidations), log)
        advance(connection, NOW, steps=LOG + 9)
        used = [f"key_{n:05}" for n in range(500)]
        counts = {(key_id, TODAY - day, "allowed"): 1 for key_id in used for day in range(9)}
        seen = {f"key_{n:05}": SEEN for n in range(KEYS)}
        add_batch(connection, {}, UsageBatch("a process", 1, TODAY, counts, seen))

    await database.write(lengthen)
    return database


class PlanContract:
    """What both databases promise."""

    @pytest.fixture
    def url(self) -> str:
        raise AssertionError("each database has its own")

    @pytest.fixture
    async def database(self, url: str) -> AsyncIterator[Database]:
        database = await full(url)
        yield database
        await database.close()

    @pytest.mark.long
    async def test_nothing_reads_all_keys_or_sorts_them(self, database: Database) -> None:
        """Every statement that is run while keys are checked, listed and changed."""

        def slow(connection: Connection) -> dict[str, list[str]]:
            analyze(connection)
            steps = {name: slow_steps(connection, ASKED[name], SCANS, SORTS) for name in ASKED}
            return {name: found for name, found in steps.items() if found}

        assert await database.write(slow) == {}

    @pytest.mark.long
    async def test_nothing_reads_all_keys_before_there_are_statistics(
        self, database: Database
    ) -> None:
        """A database that knows nothing of its tables yet uses the indexes as well."""

        def slow(connection: Connection) -> dict[str, list[str]]:
            steps = {name: slow_steps(connection, ASKED[name], SCANS_OF_KEYS) for name in ASKED}
            return {name: found for name, found in steps.items() if found}

        assert await database.write(slow) == {}

    @pytest.mark.long
    async def test_without_their_indexes_the_logs_would_be_slow(self, database: Database) -> None:
        """The twin: a page of the audit log would walk or sort all of it."""

        def slow(connection: Connection) -> list[str]:
            for part in ("organization", "environment", "key"):
                index = f"keylatch_audit_of_{part}"
                connection.exec_driver_sql(f"DROP INDEX {index}")
            return [
                name for name in LOGS if "audit_of" not in str(plan_of(connection, ASKED[name]))
            ]

        assert await database.write(slow) == LOGS

    @pytest.mark.long
    async def test_the_log_of_a_key_is_read_by_the_index_of_keys(self, database: Database) -> None:
        """And not by that of the organisation, which has a thousand times as many lines."""

        def used(connection: Connection) -> set[bool]:
            plans = ["\n".join(plan_of(connection, ASKED[name])) for name in LOGS[:3]]
            return {
                "keylatch_audit_of_key" in plan and "audit_of_organization" not in plan
                for plan in plans
            }

        assert await database.write(used) == {True}
        await database.write(analyze)
        assert await database.write(used) == {True}

    @pytest.mark.long
    async def test_changes_are_counted_by_the_index_of_their_organisation(
        self, database: Database
    ) -> None:
        """Also of one that has most of the lines: PostgreSQL would rather walk the log of all."""

        def plan(connection: Connection) -> str:
            everything = "UPDATE keylatch_audit SET organization_id = 'big' WHERE id > 900"
            connection.exec_driver_sql(everything)
            analyze(connection)
            return "\n".join(plan_of(connection, lambda c: check_changes(c, "big", NOW, 10)))

        steps = await database.write(plan)
        assert "keylatch_audit_of_organization" in steps
        assert not SORTS.search(steps)

    @pytest.mark.long
    async def test_old_audit_events_are_found_by_their_number(self, database: Database) -> None:
        """However many there are: no more of them is read than may be deleted at once."""

        def plan(connection: Connection) -> list[str]:
            analyze(connection)
            return plan_of(connection, lambda c: on(c, AuditRepository).prune(NOW - 1))

        steps = await database.write(plan)
        assert not any(SORTS.search(step) for step in steps)
        assert "PRIMARY KEY (rowid<?)" in str(steps) or "Index Cond: (id < " in str(steps)

    @pytest.mark.long
    async def test_without_the_indexes_lists_would_be_slow(self, database: Database) -> None:
        """The twin: this test would notice, for every list."""

        def slow(connection: Connection) -> list[str]:
            for index in (
                "keylatch_keys_of_organization",
                "keylatch_live_keys_of_organization",
                "keylatch_keys_of_environment",
            ):
                connection.exec_driver_sql(f"DROP INDEX {index}")
            analyze(connection)
            return [name for name in LISTS if slow_steps(connection, ASKED[name], SCANS, SORTS)]

        assert await database.write(slow) == LISTS

    @pytest.mark.long
    async def test_a_list_does_not_wade_through_deleted_keys(self, database: Database) -> None:
        """They stay for ever; the live ones have an index of their own."""

        def plan(connection: Connection) -> str:
            connection.exec_driver_sql(
                f"UPDATE keylatch_keys SET deleted_at = {NOW} WHERE id < 'key_02990'"
            )
            analyze(connection)
            return "\n".join(plan_of(connection, ASKED["the first page"]))

        assert "keylatch_live_keys_of_organization" in await database.write(plan)


class TestSQLite(PlanContract):
    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(PlanContract):
    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()
