"""The statements: every question, and every change as a plain function of a connection.

The law of this file: whatever changes what a key may do is ONE transaction that advances
`meta.seq`, makes the change and writes the invalidation. Whatever is read to be cached carries
`as_of`, the `seq` of the very snapshot it was read in. Recording a use is neither. The same
statements run on SQLite and PostgreSQL.
"""

import json
import secrets as csprng
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Select,
    bindparam,
    func,
    insert,
    or_,
    select,
    true,
    update,
)

from keylatch.foreign import MOST_LOCATORS
from keylatch.model import PREVIOUS, KeyRecord
from keylatch.sql.database import Question, Rows
from keylatch.sql.deeds import OPERATOR, write_down, write_down_all
from keylatch.sql.schema import invalidations, keys, meta, organizations, secrets

_KEPT_INVALIDATIONS: Final = 100_000
_MAX_CHANGES: Final = 1_000
_MAX_NAMED: Final = 500  # parameters of one statement
_CAMEL: Final = {"expires_at": "expiresAt"}
NOBODY: Final = ""
"""The organisation of keys that are not there. An invalidation that names it makes everybody look
anew for what they remember as absent, and leaves all that is known of keys that exist as it is."""
VAULT: Final = "*"
"""The organisation of the store's own secrets, which no key belongs to. Secrets are remembered like
anything else: with `as_of`, and read again after an invalidation that names it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A key, its hash, and the sequence number at which both were true; and the hash of the secret
    before the last rotation, whose end is in the record."""

    record: KeyRecord
    hash: str = field(repr=False)
    as_of: int
    previous_hash: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Absent:
    """There was no such key at that sequence number."""

    as_of: int


@dataclass(frozen=True, slots=True)
class Page:
    """Some keys of a list, and the sequence number after which it goes on; None: that is all."""

    records: list[KeyRecord]
    goes_on_after: int | None


Touched = tuple[int, str | None, str | None]
"""A line of the log: seq, key id or None, organisation id or None."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A key that is refused: revoked at that time, or disabled (None)."""

    key_id: str
    deleted_at: int | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened after a sequence number; `complete` is False where not all of it is told."""

    seq: int
    epoch: str
    complete: bool
    touched: tuple[Touched, ...] = ()
    has_foreign: bool = False
    """Whether there is any key that was made elsewhere."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The store's own secrets, so that they can rotate: the first of each makes, all are read."""

    check_keys: tuple[bytes, ...] = field(repr=False)
    peppers: tuple[bytes, ...] = field(repr=False)
    as_of: int


_RECORD: Final = [
    organizations.c.active if name == "organization_active" else keys.c[name]
    for name in KeyRecord.__slots__
]
_STORED: Final = tuple(name for name in KeyRecord.__slots__ if name in keys.c)
RECORDS: Final[Select[Any]] = select(*_RECORD).join(
    organizations, organizations.c.id == keys.c.organization_id
)

_USED_AT: Final = bindparam("used_at", type_=BigInteger)
TOUCH: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        or_(keys.c.last_used.is_(None), keys.c.last_used < _USED_AT),
        or_(keys.c.deleted_at.is_(None), keys.c.deleted_at >= _USED_AT),
    )
    .values(last_used=_USED_AT)
)


TOUCH_PREVIOUS: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        keys.c.previous_hash.is_not(None),
        or_(keys.c.previous_last_used.is_(None), keys.c.previous_last_used < _USED_AT),
    )
    .values(previous_last_used=_USED_AT)
)


def changes_since() -> Select[Any]:
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
        # The greatest one, because that is one step into an index on both databases.
        select(func.max(keys.c.locator)).where(keys.c.locator.is_not(None)).scalar_subquery(),
    ).join_from(meta, newer, true(), isouter=True)


def _find() -> Select[Any]:
    return (
        select(meta.c.seq, keys.c.hash, keys.c.previous_hash, *_RECORD)
        .join_from(meta, keys, keys.c.id == bindparam("key_id"), isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )


def _find_foreign() -> Select[Any]:
    named: list[Any] = [bindparam(name) for name in LOCATORS]
    return (
        select(meta.c.seq, keys.c.hash, keys.c.previous_hash, *_RECORD)
        .join_from(meta, keys, keys.c.locator.in_(named), isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )


LOCATORS: Final = tuple(f"locator_{number}" for number in range(MOST_LOCATORS))


def _secrets() -> Select[Any]:
    # Those that nothing is made with yet come last, so that the first one makes.
    return (
        select(meta.c.seq, secrets.c.kind, secrets.c.value)
        .join_from(meta, secrets, true())
        .order_by(secrets.c.makes.desc(), secrets.c.id.desc())
    )


CHANGES: Final = Question(changes_since())
FIND: Final = Question(_find())
FIND_FOREIGN: Final = Question(_find_foreign())
SECRETS: Final = Question(_secrets())
SEQUENCE: Final = Question(select(meta.c.seq))


def read_changes(rows: Rows, since: int) -> Changes:
    seq, epoch, pruned, *_ = rows[0]
    complete = since >= pruned and len(rows) <= _MAX_CHANGES
    touched = tuple((row[3], row[4], row[5]) for row in rows if row[3] is not None)
    return Changes(seq, epoch, complete, touched if complete else (), rows[0][6] is not None)


def read_found(rows: Rows) -> Found | Absent:
    seq, hashed, previous, *record = rows[0]
    return Absent(seq) if hashed is None else Found(record_of(record), hashed, seq, previous)


def read_foreign(rows: Rows, locators: Sequence[str]) -> Found | Absent:
    found = [read_found([row]) for row in rows]
    keys_found = {each.record.locator: each for each in found if isinstance(each, Found)}
    # As a rule there is one; where a token fits several, the locator that says most counts.
    return next((keys_found[name] for name in locators if name in keys_found), Absent(rows[0][0]))


def record_of(columns: Sequence[Any]) -> KeyRecord:
    return KeyRecord(*columns)


def advance(
    connection: Connection,
    now_ms: int,
    key_id: str | None = None,
    organization_id: str | None = None,
    steps: int = 1,
) -> int:
    seq: int = connection.execute(
        update(meta).values(seq=meta.c.seq + steps).returning(meta.c.seq)
    ).scalar_one()
    connection.execute(
        insert(invalidations).values(
            seq=seq, key_id=key_id, organization_id=organization_id, at=now_ms
        )
    )
    return seq


def add_key(connection: Connection, record: KeyRecord, hashed: str, by: str = OPERATOR) -> int:
    # A new key is announced too: somebody may remember that there is no such key.
    return _add(connection, [(record, hashed)], by, "key.create", key_id=record.id)


def add_keys(
    connection: Connection, made: Sequence[tuple[KeyRecord, str]], by: str = OPERATOR
) -> int:
    """Insert many keys with their hashes, in this order; each takes a sequence number of its own,
    so that lists know it, and one invalidation tells of all of them."""
    return _add(connection, made, by, "key.import", organization_id=NOBODY)


def bring_keys(
    connection: Connection, made: Sequence[tuple[KeyRecord, str]], by: str = OPERATOR
) -> tuple[int, dict[str, tuple[str, bool]]]:
    """Insert keys that were made elsewhere, but for those whose locator is here already; these are
    told: locator → (id of its key, whether that is deleted)."""
    held = holders(connection, [str(record.locator) for record, _ in made])
    fresh = [each for each in made if each[0].locator not in held]
    seq = add_keys(connection, fresh, by) if fresh else sequence(connection)
    return seq, held


def holders(connection: Connection, locators: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Which locators are here: locator → (id of its key, whether that is deleted)."""
    held: dict[str, tuple[str, bool]] = {}
    for start in range(0, len(locators), _MAX_NAMED):
        asked = select(keys.c.locator, keys.c.id, keys.c.deleted_at).where(
            keys.c.locator.in_(locators[start : start + _MAX_NAMED])
        )
        for locator, key_id, deleted_at in connection.execute(asked):
            held[locator] = (key_id, deleted_at is not None)
    return held


def _add(
    connection: Connection,
    made: Sequence[tuple[KeyRecord, str]],
    by: str,
    action: str,
    key_id: str | None = None,
    organization_id: str | None = None,
) -> int:
    # Repeated after its answer was lost, it finds its own work done.
    last, hashed = made[-1]
    done = connection.execute(
        select(keys.c.created_seq).where(keys.c.id == last.id, keys.c.hash == hashed)
    ).scalar()
    if done is not None:
        return int(done)
    seq = advance(connection, last.created_at, key_id, organization_id, steps=len(made))
    _add_organizations(connection, {record.organization_id for record, _ in made}, last.created_at)
    first_seq = seq - len(made) + 1
    connection.execute(
        insert(keys),
        [
            {
                **{name: getattr(record, name) for name in _STORED},
                "hash": hashed,
                "created_seq": created_seq,
            }
            for created_seq, (record, hashed) in enumerate(made, first_seq)
        ],
    )
    done_to = [(record.organization_id, record.id, _birth(record)) for record, _ in made]
    write_down_all(connection, last.created_at, by, action, done_to)
    return seq


def _birth(record: KeyRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "permission": record.permission,
        "environment": record.environment,
        "expiresAt": record.expires_at,
    }


def _add_organizations(connection: Connection, named: set[str], now_ms: int) -> None:
    names = sorted(named)
    for start in range(0, len(names), _MAX_NAMED):
        some = names[start : start + _MAX_NAMED]
        asked = select(organizations.c.id).where(organizations.c.id.in_(some))
        missing = set(some).difference(connection.execute(asked).scalars())
        if missing:
            connection.execute(
                insert(organizations),
                [{"id": name, "active": True, "created_at": now_ms} for name in sorted(missing)],
            )


def locked_key(
    connection: Connection, organization_id: str, key_id: str
) -> tuple[KeyRecord, str, str | None] | None:
    """A key that nobody else changes until this transaction ends, its hash and the previous one."""
    row = connection.execute(
        RECORDS.add_columns(keys.c.hash, keys.c.previous_hash)
        .where(keys.c.id == key_id, keys.c.organization_id == organization_id)
        .with_for_update(of=keys)
    ).first()
    return None if row is None else (record_of(row[:-2]), row[-2], row[-1])


def change_key(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    values: Mapping[str, Any],
    by: str = OPERATOR,
) -> tuple[KeyRecord, int] | None:
    found = locked_key(connection, organization_id, key_id)
    if found is None:
        return None
    record, *_ = found
    if record.deleted_at is not None:
        return record, sequence(connection)
    changed = replace(record, **values, updated_at=max(now_ms, record.updated_at + 1))
    connection.execute(
        update(keys).where(keys.c.id == key_id).values(**values, updated_at=changed.updated_at)
    )
    action = "key.change" if changed.deleted_at is None else "key.delete"
    write_down(connection, now_ms, by, action, organization_id, key_id, _told(values))
    # Last: it locks the counter row until the commit, and every other change waits for that.
    return changed, advance(connection, now_ms, key_id=key_id)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """A change as the audit log has it, in the words of the HTTP API."""
    if "deleted_at" in values:
        reason = values.get("revoked_reason")
        return {} if reason is None else {"reason": reason}
    told = {_CAMEL.get(name, name): value for name, value in values.items()}
    if told.get("metadata"):
        told["metadata"] = json.loads(told["metadata"])
    return told


def set_organization_active(
    connection: Connection, organization_id: str, now_ms: int, active: bool, by: str = OPERATOR
) -> int | None:
    seq = advance(connection, now_ms, organization_id=organization_id)
    changed = connection.execute(
        update(organizations).where(organizations.c.id == organization_id).values(active=active)
    )
    if not changed.rowcount:
        return None
    action = "organization.enable" if active else "organization.disable"
    write_down(connection, now_ms, by, action, organization_id)
    return seq


def renew(connection: Connection, epoch: str, seq: int) -> None:
    row = connection.execute(select(meta.c.seq, meta.c.epoch)).one()
    if row.epoch != epoch:
        return  # somebody else was faster
    connection.execute(update(meta).values(seq=max(row.seq, seq), epoch=csprng.token_hex(8)))
    advance(connection, now_ms())  # it names nobody, so it concerns everybody


def now_ms() -> int:
    return int(time.time() * 1000)


def prune(connection: Connection) -> None:
    seq = sequence(connection)
    oldest = seq - _KEPT_INVALIDATIONS
    if oldest <= 0:
        return
    connection.execute(update(meta).values(pruned=oldest))
    connection.execute(invalidations.delete().where(invalidations.c.seq <= oldest))


def analyze(connection: Connection) -> None:
    """Let PostgreSQL count its rows, which it does by itself only minutes after many were added.
    SQLite takes the indexes without."""
    if connection.dialect.name == "postgresql":
        for table in (keys, organizations, invalidations):
            connection.exec_driver_sql(f"ANALYZE {table.name}")


def read_secrets(rows: Rows) -> Secrets:
    return Secrets(
        check_keys=tuple(value for _, kind, value in rows if kind == "check"),
        peppers=tuple(value for _, kind, value in rows if kind == "pepper"),
        as_of=rows[0][0],
    )


def secrets_of(connection: Connection) -> Secrets:
    """The store's secrets, in one snapshot."""
    return read_secrets([tuple(row) for row in connection.execute(SECRETS.statement)])


def sequence(connection: Connection) -> int:
    """The store's sequence number."""
    seq: int = connection.execute(SEQUENCE.statement).scalar_one()
    return seq


def touch(connection: Connection, uses: Mapping[str, int]) -> None:
    """Record uses, in the order of ids, so that two processes cannot deadlock."""
    newest: dict[str, int] = {}
    for secret, used_at in uses.items():
        key_id = secret.removesuffix(PREVIOUS)
        newest[key_id] = max(newest.get(key_id, 0), used_at)
    rows = [{"used_id": key_id, "used_at": newest[key_id]} for key_id in sorted(newest)]
    connection.execute(TOUCH, rows)
    previous = sorted(secret for secret in uses if secret.endswith(PREVIOUS))
    if previous:
        rows = [
            {"used_id": secret.removesuffix(PREVIOUS), "used_at": uses[secret]}
            for secret in previous
        ]
        connection.execute(TOUCH_PREVIOUS, rows)


def replace_hash(connection: Connection, key_id: str, old: str, new: str) -> None:
    """Exchange a hash, if it is still the old one."""
    connection.execute(update(keys).where(keys.c.id == key_id, keys.c.hash == old).values(hash=new))


def get_key(connection: Connection, organization_id: str, key_id: str) -> KeyRecord | None:
    """A key of an organisation."""
    row = connection.execute(
        RECORDS.where(keys.c.id == key_id, keys.c.organization_id == organization_id)
    ).first()
    return None if row is None else record_of(row)


def page_of_keys(
    connection: Connection,
    organization_id: str,
    limit: int,
    newest_first: bool,
    deleted: bool,
    after: int | None,
    unused_since: int | None = None,
) -> Page:
    """Some keys of an organisation in the order of their creation, from an index and unsorted."""
    at = keys.c.created_seq
    statement = RECORDS.add_columns(at).where(keys.c.organization_id == organization_id)
    if not deleted:
        statement = statement.where(keys.c.deleted_at.is_(None))
    if after is not None:
        statement = statement.where(at < after if newest_first else at > after)
    if unused_since is not None:
        statement = statement.where(
            func.coalesce(keys.c.last_used, keys.c.created_at) < unused_since
        )
    statement = statement.order_by(at.desc() if newest_first else at).limit(limit + 1)
    rows = connection.execute(statement).all()
    records = [record_of(row[:-1]) for row in rows[:limit]]
    return Page(records, rows[limit - 1][-1] if len(rows) > limit else None)


def ended_keys(connection: Connection) -> list[Ended]:
    """All keys that were revoked or disabled, of all organisations."""
    statement = select(keys.c.id, keys.c.deleted_at).where(
        or_(keys.c.deleted_at.is_not(None), keys.c.active.is_(False))
    )
    return [Ended(*row) for row in connection.execute(statement.order_by(keys.c.id))]
