"""What keylatch asks of its database: each question and each change, once for both databases.

The law of this file: whatever changes what a key may do is ONE transaction that advances
`meta.seq`, makes the change and writes the invalidation. Whatever is read to be cached carries
`as_of`, the `seq` of the very snapshot it was read in. Recording a use is neither.
"""

import secrets as csprng
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Row,
    Select,
    bindparam,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.engine import make_url

from keylatch.database import Database
from keylatch.errors import ConfigurationError
from keylatch.migrations import bring_up_to_date, is_up_to_date
from keylatch.model import KeyRecord
from keylatch.schema import invalidations, keys, members, meta, organizations, secrets
from keylatch.sqlite import SQLite

_KEPT_INVALIDATIONS: Final = 100_000
_MAX_CHANGES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Found:
    """A key, its hash, and the sequence number at which both were true."""

    record: KeyRecord
    hash: str = field(repr=False)
    as_of: int


@dataclass(frozen=True, slots=True)
class Absent:
    """There was no such key at that sequence number."""

    as_of: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened after a sequence number; `complete` is False where not all of it is told."""

    seq: int
    epoch: str
    complete: bool
    touched: tuple[tuple[int, str | None, str | None], ...] = ()
    """(seq, key id or None, organisation id or None)"""


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to a process that asks for a lease."""

    is_member: bool
    changes: Changes
    store_seconds: float | None
    """The store's own time, in seconds since the epoch; None where it has none."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The store's own secrets, newest first, so that they can rotate."""

    check_keys: tuple[bytes, ...] = field(repr=False)
    peppers: tuple[bytes, ...] = field(repr=False)


def database_of(url: str) -> Database:
    """The database that a store URL names; nothing is opened yet.

    Raises:
        ConfigurationError: PostgreSQL's driver is missing, or a SQLite file lies on a network.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return SQLite(Path(parsed.database or ""))
    for package in ("psycopg", "greenlet"):
        if find_spec(package) is None:
            wrong = f"KEYLATCH_STORE: postgresql needs the package {package}"
            raise ConfigurationError([(wrong, "pip install 'keylatch[postgres]'")])
    from keylatch.postgresql import PostgreSQL  # asyncio support costs 0.1 s at import

    return PostgreSQL(parsed)


class Store:
    """Keys and what belongs to them, on SQLite or PostgreSQL.

    Every method may raise `StoreUnavailable`; then nothing was changed that had been answered.

    Args:
        url: `sqlite:///path.db` or `postgresql://…`.
    """

    def __init__(self, url: str) -> None:
        self._database = database_of(url)

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
        if not await self._database.read(is_up_to_date):
            await self._database.write(lambda connection: bring_up_to_date(connection, now_ms))
        return await self._database.read(_secrets)

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
        await self._database.read(lambda connection: connection.execute(_SEQUENCE).all())

    # What the engine asks

    async def find(self, key_id: str) -> Found | Absent:
        """The key with this id, deleted ones included."""
        return await self._database.read(lambda connection: _find(connection, key_id))

    async def changes(self, since: int) -> Changes:
        """What happened after the sequence number `since`."""
        rows = await self._database.read(
            lambda connection: connection.execute(_CHANGES, {"since": since}).all()
        )
        return _read_changes([tuple(row) for row in rows], since)

    def sequence_now(self) -> int | None:
        """`meta.seq` without waiting (SQLite), or None where it cannot be had that way."""
        rows = self._database.read_now(_SEQUENCE_NOW.text)
        return rows[0][0] if rows else None

    def changes_now(self, since: int) -> Changes | None:
        """`changes` without waiting (SQLite), or None where it cannot be had that way."""
        rows = self._database.read_now(_CHANGES_NOW.text, *_CHANGES_NOW.parameters(since=since))
        return _read_changes(rows, since) if rows else None

    # What witnesses ask

    @property
    def is_shared(self) -> bool:
        """Whether many hosts use it, so that it has to be asked and cannot just be read."""
        return self._database.is_shared

    async def join(self, member: str) -> None:
        """A process will ask for leases under this name."""
        await self._database.write(
            lambda connection: connection.execute(
                insert(members).values(id=member, grants=0, acked_seq=0, joined_at=_now_ms())
            )
        )

    async def poll(self, member: str, seq: int) -> Poll:
        """Acknowledge `seq`, count a grant, and tell what happened since, in one transaction."""
        return await self._database.write(lambda connection: _poll(connection, member, seq))

    async def leave(self, member: str) -> None:
        """A process holds no lease any more and will ask for none."""
        await self._database.write(
            lambda connection: connection.execute(members.delete().where(members.c.id == member))
        )

    async def laggards(self, seq: int) -> tuple[dict[str, int], int]:
        """Members that have not acknowledged `seq` (name → grants so far), and how many there
        are in all."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                select(members.c.id, members.c.grants, members.c.acked_seq)
            ).all()
        )
        return {row.id: row.grants for row in rows if row.acked_seq < seq}, len(rows)

    async def remove_members(self, silent: Mapping[str, int], seq: int) -> int:
        """Remove those that still have not acknowledged `seq` and were granted nothing since;
        return how many."""
        return await self._database.write(
            lambda connection: sum(
                connection.execute(
                    members.delete().where(
                        members.c.id == member,
                        members.c.grants == silent[member],
                        members.c.acked_seq < seq,
                    )
                ).rowcount
                for member in sorted(silent)
            )
        )

    async def ring(self) -> None:
        """Ring the store's own bell (PostgreSQL)."""
        await self._database.read(
            lambda connection: connection.execute(select(func.pg_notify(BELL, "")))
        )

    async def listen(self, heard: Callable[[], None]) -> None:
        """Hear the store's own bell (PostgreSQL), until the line breaks."""
        await self._database.listen(BELL, heard)

    async def renew(self, epoch: str, seq: int) -> None:
        """After a restore from a backup: a new epoch, and sequence numbers beyond all that were
        given out, so that nothing that anybody remembers is believed."""
        await self._database.write(lambda connection: _renew(connection, epoch, seq))

    async def replace_hash(self, key_id: str, old: str, new: str) -> None:
        """Exchange a hash for another one of the same token. No answer about the key changes."""
        statement = update(keys).where(keys.c.id == key_id, keys.c.hash == old).values(hash=new)
        await self._database.write(lambda connection: connection.execute(statement))

    async def touch(self, uses: Mapping[str, int]) -> None:
        """Record when keys were last used (id → milliseconds); never backwards.

        It writes that one column and nothing else: saving a whole row back from a cache would
        bring a revoked key to life. Sorted by id, so that two processes cannot deadlock.
        """
        if not uses:
            return
        rows = [{"used_id": key_id, "used_at": uses[key_id]} for key_id in sorted(uses)]
        await self._database.write(
            lambda connection: connection.execute(_TOUCH, rows), durable=False
        )

    async def tidy(self, now_ms: int) -> None:
        """Prune the invalidation log beyond 100,000 rows, and let the database tidy up."""
        await self._database.write(_prune)
        await self._database.tidy()

    # What management asks

    async def add(self, record: KeyRecord, hashed: str) -> int:
        """Insert a key, and its organisation if it is new; return the sequence number."""
        return await self._database.write(lambda connection: _add(connection, record, hashed))

    async def get(self, organization_id: str, key_id: str) -> KeyRecord | None:
        """The key if it belongs to the organisation: a foreign key is an unknown key."""
        statement = _RECORDS.where(keys.c.id == key_id, keys.c.organization_id == organization_id)
        rows = await self._database.read(lambda connection: connection.execute(statement).all())
        return _record(rows[0]) if rows else None

    async def list(
        self, organization_id: str, *, newest_first: bool = True, deleted: bool = False
    ) -> list[KeyRecord]:
        """The organisation's keys in the order of their creation; deleted ones if asked for."""
        order = keys.c.created_seq.desc() if newest_first else keys.c.created_seq
        statement = _RECORDS.where(keys.c.organization_id == organization_id).order_by(order)
        if not deleted:
            statement = statement.where(keys.c.deleted_at.is_(None))
        rows = await self._database.read(lambda connection: connection.execute(statement).all())
        return [_record(row) for row in rows]

    async def change(
        self, organization_id: str, key_id: str, now_ms: int, values: Mapping[str, Any]
    ) -> tuple[KeyRecord, int] | None:
        """Change columns of a key, unless it was deleted: that is final, and comes back as it is.

        Returns:
            the record and a sequence number at which it is true; None: no such key here.
        """
        return await self._database.write(
            lambda connection: _change(connection, organization_id, key_id, now_ms, values)
        )

    async def change_organization(
        self, organization_id: str, now_ms: int, active: bool
    ) -> int | None:
        """Enable or disable an organisation; the sequence number of it, or None: no such one."""
        return await self._database.write(
            lambda connection: _change_organization(connection, organization_id, now_ms, active)
        )


_RECORDS: Final[Select[Any]] = select(
    keys, organizations.c.active.label("organization_active")
).join(organizations, organizations.c.id == keys.c.organization_id)

_USED_AT: Final = bindparam("used_at", type_=BigInteger)
_TOUCH: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        or_(keys.c.last_used.is_(None), keys.c.last_used < _USED_AT),
        or_(keys.c.deleted_at.is_(None), keys.c.deleted_at >= _USED_AT),
    )
    .values(last_used=_USED_AT)
)


def _changes() -> Select[Any]:
    # One statement, so one snapshot: the counter and the log cannot disagree.
    newer = (
        select(invalidations)
        .where(invalidations.c.seq > bindparam("since", type_=BigInteger))
        .order_by(invalidations.c.seq)
        .limit(_MAX_CHANGES + 1)
        .subquery()
    )
    return select(
        meta.c.seq,
        meta.c.epoch,
        meta.c.pruned,
        newer.c.seq,
        newer.c.key_id,
        newer.c.organization_id,
    ).join_from(meta, newer, true(), isouter=True)


_CHANGES: Final = _changes()
_SEQUENCE: Final = select(meta.c.seq)
_STORE_TIME: Final = select(func.extract("epoch", func.clock_timestamp()))
BELL: Final = "keylatch_bell"


class _Now:
    """A statement as SQLite's own interface takes it, for `Database.read_now`."""

    def __init__(self, statement: Select[Any]) -> None:
        compiled = statement.compile(dialect=sqlite_dialect())
        self.text = str(compiled)
        self._order = tuple(compiled.positiontup or ())
        self._fixed = compiled.params

    def parameters(self, **given: Any) -> list[Any]:
        """The values for the question marks, in their order."""
        values = {**self._fixed, **given}
        return [values[name] for name in self._order]


_SEQUENCE_NOW: Final = _Now(_SEQUENCE)
_CHANGES_NOW: Final = _Now(_CHANGES)


def _read_changes(rows: Sequence[tuple[Any, ...]], since: int) -> Changes:
    seq, epoch, pruned, *_ = rows[0]
    complete = since >= pruned and len(rows) <= _MAX_CHANGES
    touched = tuple((row[3], row[4], row[5]) for row in rows if row[3] is not None)
    return Changes(seq, epoch, complete, touched if complete else ())


def _record(row: Row[Any]) -> KeyRecord:
    columns = row._mapping
    return KeyRecord(**{name: columns[name] for name in KeyRecord.__slots__})


def _find(connection: Connection, key_id: str) -> Found | Absent:
    statement = (
        select(meta.c.seq, keys, organizations.c.active.label("organization_active"))
        .join_from(meta, keys, keys.c.id == key_id, isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )
    row = connection.execute(statement).one()
    if row._mapping["id"] is None:
        return Absent(row.seq)
    return Found(_record(row), row.hash, row.seq)


def _advance(
    connection: Connection,
    now_ms: int,
    key_id: str | None = None,
    organization_id: str | None = None,
) -> int:
    seq: int = connection.execute(
        update(meta).values(seq=meta.c.seq + 1).returning(meta.c.seq)
    ).scalar_one()
    connection.execute(
        insert(invalidations).values(
            seq=seq, key_id=key_id, organization_id=organization_id, at=now_ms
        )
    )
    return seq


def _add(connection: Connection, record: KeyRecord, hashed: str) -> int:
    # A new key is announced too: somebody may remember that there is no such key.
    seq = _advance(connection, record.created_at, key_id=record.id)
    if not connection.execute(
        select(organizations.c.id).where(organizations.c.id == record.organization_id)
    ).all():
        connection.execute(
            insert(organizations).values(
                id=record.organization_id, active=True, created_at=record.created_at
            )
        )
    values = {name: getattr(record, name) for name in KeyRecord.__slots__ if name in keys.c}
    connection.execute(insert(keys).values(**values, hash=hashed, created_seq=seq))
    return seq


def _change(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    values: Mapping[str, Any],
) -> tuple[KeyRecord, int] | None:
    row = connection.execute(
        _RECORDS.where(
            keys.c.id == key_id, keys.c.organization_id == organization_id
        ).with_for_update(of=keys)
    ).first()
    if row is None:
        return None
    record = _record(row)
    if record.deleted_at is not None:
        return record, connection.execute(_SEQUENCE).scalar_one()
    seq = _advance(connection, now_ms, key_id=key_id)
    changed = replace(record, **values, updated_at=max(now_ms, record.updated_at + 1))
    connection.execute(
        update(keys).where(keys.c.id == key_id).values(**values, updated_at=changed.updated_at)
    )
    return changed, seq


def _change_organization(
    connection: Connection, organization_id: str, now_ms: int, active: bool
) -> int | None:
    seq = _advance(connection, now_ms, organization_id=organization_id)
    changed = connection.execute(
        update(organizations).where(organizations.c.id == organization_id).values(active=active)
    )
    return seq if changed.rowcount else None


def _poll(connection: Connection, member: str, seq: int) -> Poll:
    # The row first: once it is locked, nobody can remove it before this grant is counted.
    counted = connection.execute(
        update(members)
        .where(members.c.id == member)
        .values(grants=members.c.grants + 1, acked_seq=seq)
    ).rowcount
    rows = connection.execute(_CHANGES, {"since": seq}).all()
    store_seconds = None
    if connection.dialect.name == "postgresql":
        store_seconds = float(connection.execute(_STORE_TIME).scalar_one())
    changes = _read_changes([tuple(row) for row in rows], seq)
    return Poll(counted == 1, changes, store_seconds)


def _renew(connection: Connection, epoch: str, seq: int) -> None:
    row = connection.execute(select(meta.c.seq, meta.c.epoch)).one()
    if row.epoch != epoch:
        return  # somebody else was faster
    connection.execute(update(meta).values(seq=max(row.seq, seq), epoch=csprng.token_hex(8)))
    _advance(connection, _now_ms())  # it names nobody, so it concerns everybody


def _now_ms() -> int:
    return int(time.time() * 1000)


def _prune(connection: Connection) -> None:
    seq = connection.execute(_SEQUENCE).scalar_one()
    oldest = seq - _KEPT_INVALIDATIONS
    if oldest <= 0:
        return
    connection.execute(update(meta).values(pruned=oldest))
    connection.execute(invalidations.delete().where(invalidations.c.seq <= oldest))


def _secrets(connection: Connection) -> Secrets:
    rows = connection.execute(
        select(secrets.c.kind, secrets.c.value).order_by(secrets.c.id.desc())
    ).all()
    return Secrets(
        check_keys=tuple(row.value for row in rows if row.kind == "check"),
        peppers=tuple(row.value for row in rows if row.kind == "pepper"),
    )
