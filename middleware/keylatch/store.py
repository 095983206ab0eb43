"""What keylatch asks of its database: the questions of engine, witnesses and management.

The statements are in `statements`, each written once; here they are run, on SQLite or PostgreSQL.
Every method may raise `StoreUnavailable`; then nothing was changed that had been answered.
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from keylatch import statements as sql
from keylatch.database import Database
from keylatch.errors import ConfigurationError
from keylatch.memory import Memory
from keylatch.migrations import bring_up_to_date, is_up_to_date
from keylatch.model import KeyRecord
from keylatch.sqlite import SQLite
from keylatch.statements import BELL, Absent, Changes, Found, Page, Poll, Secrets, Touched

# A silent server is given up soon and asked anew: checks are 503 until it has answered.
_OPEN_SECONDS: Final = 1.0
# An index of a million keys takes two seconds.
_UPGRADE_SECONDS: Final = 60.0
PAGE: Final = 500
"""Keys that are read at once: they keep an event loop for a few milliseconds."""

T = TypeVar("T")
P = ParamSpec("P")
Statement = Callable[Concatenate[Connection, P], T]

__all__ = [
    "Absent",
    "Changes",
    "Found",
    "Page",
    "Poll",
    "Secrets",
    "Store",
    "Touched",
    "database_of",
]


def database_of(url: str) -> Database:
    """The database that a store URL names; nothing is opened yet.

    Raises:
        ConfigurationError: PostgreSQL's driver is missing, or a SQLite file lies on a network.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return SQLite(Path(parsed.database)) if parsed.database else Memory()
    for package in ("psycopg", "greenlet"):
        if find_spec(package) is None:
            wrong = f"KEYLATCH_STORE: postgresql needs the package {package}"
            raise ConfigurationError([(wrong, "pip install 'keylatch[postgres]'")])
    from keylatch.postgresql import PostgreSQL  # asyncio support costs 0.1 s at import

    return PostgreSQL(parsed)


class Store:
    """Keys and what belongs to them, on SQLite or PostgreSQL.

    Args:
        url: `sqlite:///path.db`, `postgresql://…`, or `sqlite://` for one in memory (tests).
    """

    def __init__(self, url: str) -> None:
        self._database = database_of(url)
        self.mark_now = self._database.mark_now
        """Bytes that differ after every commit; None where `sequence_now` has to be asked."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""
        return self._database.warnings

    async def open(self, now_ms: int) -> Secrets:
        """Set an empty store up, bring an old one up to date, and return its secrets.

        Whichever process comes first does it; the others wait for it and find it done.

        Raises:
            StoreIncompatible: the store was made by a newer keylatch.
        """

        def secrets_of(connection: Connection) -> Secrets | None:
            return sql.read_secrets(connection) if is_up_to_date(connection) else None

        secrets = await self._database.read(secrets_of, seconds=_OPEN_SECONDS)
        if secrets is None:
            await self._database.write(
                lambda connection: bring_up_to_date(connection, now_ms), seconds=_UPGRADE_SECONDS
            )
            secrets = await self._read(sql.read_secrets)
        return secrets

    async def close(self) -> None:
        """Let connections and threads go."""
        await self._database.close()

    def before_fork(self) -> None:
        """Close whatever must not be open while the process forks."""
        self._database.before_fork()

    def after_fork(self) -> None:
        """In the parent: go on."""
        self._database.after_fork()

    def forget(self) -> None:
        """In the child: drop what the parent has open."""
        self._database.forget()

    async def ping(self) -> None:
        """Return if the store answers."""
        await self._database.ask(sql.SEQUENCE)

    # What the engine asks

    async def find(self, key_id: str) -> Found | Absent:
        """The key with this id, deleted ones included."""
        return sql.read_found(await self._database.ask(sql.FIND, key_id=key_id))

    async def changes(self, since: int, seconds: float | None = None) -> Changes:
        """What happened after the sequence number `since`; `seconds`: see `Database.ask`."""
        rows = await self._database.ask(sql.CHANGES, seconds=seconds, since=since)
        return sql.read_changes(rows, since)

    def sequence_now(self) -> int | None:
        """`meta.seq` without waiting (SQLite), or None where it cannot be had that way."""
        rows = self._database.ask_now(sql.SEQUENCE)
        return rows[0][0] if rows else None

    def changes_now(self, since: int) -> Changes | None:
        """`changes` without waiting (SQLite), or None where it cannot be had that way."""
        rows = self._database.ask_now(sql.CHANGES, since=since)
        return sql.read_changes(rows, since) if rows else None

    # What witnesses ask

    @property
    def is_shared(self) -> bool:
        """Whether many hosts use it, so that it has to be asked and cannot just be read."""
        return self._database.is_shared

    async def join(self, member: str, seconds: float) -> None:
        """A process will ask for leases under this name."""
        await self._database.write(lambda connection: sql.join(connection, member), seconds=seconds)

    async def poll(
        self, member: str, seq: int, seconds: float, heard: tuple[Touched, ...] = ()
    ) -> Poll:
        """Acknowledge `seq`, count a grant, and tell what happened since, in one statement
        (PostgreSQL).

        Args:
            member: who asks.
            seq: up to where it knows the log.
            seconds: see `Database.ask`.
            heard: what it has heard of the log after that; acknowledged too if that is all there
                is in the log, up to the last of them.
        """
        rows = await self._database.ask(
            sql.POLL,
            seconds=seconds,
            member=member,
            since=seq,
            heard_seq=heard[-1][0] if heard else seq,
            heard=json.dumps(heard),
        )
        return sql.read_poll(rows, seq)

    async def leave(self, member: str) -> None:
        """A process holds no lease any more and will ask for none."""
        await self._write(sql.leave, member)

    async def laggards(self, seq: int, seconds: float) -> tuple[dict[str, int], int]:
        """Members that have not acknowledged `seq` (name → grants so far), and how many there
        are in all."""
        rows = await self._database.ask(sql.LAGGARDS, seconds=seconds, seq=seq)
        late = {member: grants for _, member, grants in rows if member is not None}
        return late, rows[0][0]

    async def remove_members(self, silent: Mapping[str, int], seq: int, seconds: float) -> int:
        """Remove those that still have not acknowledged `seq` and were granted nothing since;
        return how many."""
        return await self._database.write(
            lambda connection: sql.remove_members(connection, silent, seq), seconds=seconds
        )

    async def ring(self, said: str) -> None:
        """Ring the store's own bell (PostgreSQL), with less than 8,000 bytes."""
        await self._database.ask(sql.RING, said=said)

    async def listen(self, heard: Callable[[str], None]) -> None:
        """Hear the store's own bell (PostgreSQL) and what it says, until the line breaks."""
        await self._database.listen(BELL, heard)

    async def renew(self, epoch: str, seq: int) -> None:
        """After a restore from a backup: a new epoch, and sequence numbers beyond all that were
        given out, so that nothing that anybody remembers is believed."""
        await self._write(sql.renew, epoch, seq)

    async def replace_hash(self, key_id: str, old: str, new: str) -> None:
        """Exchange a hash for another one of the same token. No answer about the key changes."""
        await self._write(sql.replace_hash, key_id, old, new)

    async def touch(self, uses: Mapping[str, int]) -> None:
        """Record when keys were last used (id → milliseconds); never backwards.

        It writes that one column and nothing else: saving a whole row back from a cache would
        bring a revoked key to life. Sorted by id, so that two processes cannot deadlock.
        """
        if uses:
            await self._database.write(
                lambda connection: sql.touch(connection, uses), durable=False
            )

    async def tidy(self, now_ms: int) -> None:
        """Prune the invalidation log beyond 100,000 rows, and let the database tidy up."""
        await self._write(sql.prune)
        await self._database.tidy()

    # What management asks

    async def add(self, record: KeyRecord, hashed: str) -> int:
        """Insert a key, and its organisation if it is new; return the sequence number."""
        return await self._write(sql.add_key, record, hashed)

    async def add_many(self, made: Sequence[tuple[KeyRecord, str]]) -> int:
        """Insert keys with their hashes, all or none, in this order; return the sequence number.

        Every other change waits meanwhile, and PostgreSQL is given up after five seconds: a
        thousand keys take about a tenth of a second.
        """
        return await self._write(sql.add_keys, made)

    async def analyze(self) -> None:
        """After many were added: let the database learn how many there are."""
        await self._database.write(sql.analyze, seconds=_UPGRADE_SECONDS)

    async def get(self, organization_id: str, key_id: str) -> KeyRecord | None:
        """The key if it belongs to the organisation: a foreign key is an unknown key."""
        return await self._read(sql.get_key, organization_id, key_id)

    async def page(
        self,
        organization_id: str,
        limit: int = PAGE,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
    ) -> Page:
        """At most `limit` of the organisation's keys in the order of their creation, deleted ones
        if asked for, from the page on that `goes_on_after` this number."""
        return await self._read(
            sql.page_of_keys, organization_id, limit, newest_first, deleted, after
        )

    async def pages(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
    ) -> AsyncIterator[Page]:
        """All of them, page by page: no transaction is held in between, so keys that are made
        meanwhile may be missing and those that are deleted may be there; no key is there twice."""
        while True:
            page = await self.page(
                organization_id, newest_first=newest_first, deleted=deleted, after=after
            )
            yield page
            if page.goes_on_after is None:
                return
            after = page.goes_on_after

    async def list(
        self, organization_id: str, *, newest_first: bool = True, deleted: bool = False
    ) -> list[KeyRecord]:
        """The organisation's keys in the order of their creation; deleted ones if asked for."""
        pages = self.pages(organization_id, newest_first=newest_first, deleted=deleted)
        return [record async for page in pages for record in page.records]

    async def change(
        self, organization_id: str, key_id: str, now_ms: int, values: Mapping[str, Any]
    ) -> tuple[KeyRecord, int] | None:
        """Change columns of a key, unless it was deleted: that is final, and comes back as it is.

        Returns:
            the record and a sequence number at which it is true; None: no such key here.
        """
        return await self._write(sql.change_key, organization_id, key_id, now_ms, values)

    async def change_organization(
        self, organization_id: str, now_ms: int, active: bool
    ) -> int | None:
        """Enable or disable an organisation; the sequence number of it, or None: no such one."""
        return await self._write(sql.set_organization_active, organization_id, now_ms, active)

    async def _read(self, statement: "Statement[P, T]", *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._database.read(lambda connection: statement(connection, *args, **kwargs))

    async def _write(self, statement: "Statement[P, T]", *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._database.write(lambda connection: statement(connection, *args, **kwargs))
