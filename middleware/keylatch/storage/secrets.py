"""The store's own secrets: the MAC keys of tokens, and the peppers of values in Redis.

The law of this file: a change of the secrets is ONE transaction that advances `meta.seq`, makes the
change and writes the invalidation that names them. It can be repeated: after a lost answer, or a
crash between two steps, no second secret is created.
"""

import secrets as csprng
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    exists,
    func,
    insert,
    or_,
    select,
    true,
    update,
)

from keylatch.storage.audit import OPERATOR, record_event
from keylatch.storage.database import Query, Rows
from keylatch.storage.invalidation_log import advance
from keylatch.storage.pepper_file import combine
from keylatch.storage.repository import MonitoredDatabase, Repository, reads, writes
from keylatch.storage.schema import STORE_SECRETS_ID, keys, meta, secrets

KINDS: Final = ("mac", "pepper")
Status = Literal["primary", "enabled", "pending"]
_BYTES: Final = 32
_SECRETS: Final = Query(
    select(meta.c.seq, secrets.c.kind, secrets.c.value)
    .join_from(meta, secrets, true())
    # Pending secrets come last, so that the first of each kind is the primary one.
    .order_by(secrets.c.enabled.desc(), secrets.c.id.desc())
)


@dataclass(frozen=True, slots=True)
class Secrets:
    """The store's own secrets: of each kind the first one is primary, all are accepted."""

    mac_keys: tuple[bytes, ...] = field(repr=False)
    peppers: tuple[bytes, ...] = field(repr=False)
    as_of: int


@dataclass(frozen=True, slots=True)
class SecretInfo:
    """A secret without its value."""

    id: int
    kind: str
    status_since: int
    """Milliseconds since the epoch: when it was added, or enabled."""
    status: Status
    """Creates new values; accepted for older values; not used until every process has it."""


class SecretRepository(Repository):
    """The secrets of a store.

    Args:
        database: of the store.
        external_peppers: peppers from outside the store, newest first; see `pepper_file`.
    """

    def __init__(self, database: MonitoredDatabase, external_peppers: Sequence[bytes] = ()) -> None:
        super().__init__(database)
        self._external_peppers = tuple(external_peppers)

    async def load(self) -> Secrets:
        """The secrets as they are now."""
        return self._secrets_of(await self._database.fetch(_SECRETS))

    def load_in(self, connection: Connection) -> Secrets:
        """The secrets, in the transaction of a connection."""
        return self._secrets_of([tuple(row) for row in connection.execute(_SECRETS.statement)])

    def _secrets_of(self, rows: Rows) -> Secrets:
        peppers = [value for _, kind, value in rows if kind == "pepper"]
        return Secrets(
            mac_keys=tuple(value for _, kind, value in rows if kind == "mac"),
            peppers=combine(peppers, self._external_peppers),
            as_of=rows[0][0],
        )

    @reads
    def infos(self, connection: Connection) -> Sequence[SecretInfo]:
        """All secrets without their values, newest first."""
        infos, kinds_with_primary = [], set()
        columns = secrets.c.id, secrets.c.kind, secrets.c.status_since, secrets.c.enabled
        for row in connection.execute(select(*columns).order_by(secrets.c.id.desc())):
            status: Status = "enabled" if row.kind in kinds_with_primary else "primary"
            if row.enabled:
                kinds_with_primary.add(row.kind)
            infos.append(
                SecretInfo(row.id, row.kind, row.status_since, status if row.enabled else "pending")
            )
        return infos

    @writes
    def add_pending(
        self, connection: Connection, kinds: Sequence[str], now_ms: int, *, by: str = OPERATOR
    ) -> int:
        """Add a pending secret of each kind that has none; the sequence number. The invalidation is
        also for those that are pending already: the process that added them may have crashed before
        all others acknowledged them."""
        seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)  # first: it locks
        _record(connection, now_ms, by, "secrets.introduce", {"kinds": list(kinds)})
        pending = set(
            connection.execute(select(secrets.c.kind).where(secrets.c.enabled.is_(False))).scalars()
        )
        for kind in kinds:
            if kind not in pending:
                value = csprng.token_bytes(_BYTES)
                connection.execute(
                    insert(secrets).values(
                        kind=kind, value=value, status_since=now_ms, enabled=False
                    )
                )
        return seq

    @writes
    def promote(
        self, connection: Connection, kinds: Sequence[str], now_ms: int, *, by: str = OPERATOR
    ) -> int:
        """Enable the pending secrets, which become primary; the sequence number."""
        seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)
        connection.execute(
            update(secrets)
            .where(secrets.c.kind.in_(kinds), secrets.c.enabled.is_(False))
            .values(enabled=True, status_since=now_ms)
        )
        _record(connection, now_ms, by, "secrets.rotate", {"kinds": list(kinds)})
        return seq

    @writes
    def retire(
        self,
        connection: Connection,
        secret_id: int,
        before_ms: int,
        now_ms: int,
        *,
        by: str = OPERATOR,
    ) -> int | None:
        """Delete a secret if a newer one was enabled before that time; the sequence number, or
        None: there is no such secret."""
        successor = secrets.alias()
        replaced = exists().where(
            successor.c.kind == secrets.c.kind,
            successor.c.id > secrets.c.id,
            successor.c.enabled,
            successor.c.status_since <= before_ms,
        )
        seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)
        deleted = connection.execute(
            secrets.delete().where(secrets.c.id == secret_id, secrets.c.enabled, replaced)
        )
        if not deleted.rowcount:
            return None
        _record(connection, now_ms, by, "secrets.retire", {"id": secret_id})
        return seq

    @reads
    def count_issued_before(self, connection: Connection, time_ms: int, now_ms: int) -> int:
        """How many live keys have a token that this store created before that time."""
        issued_at = func.coalesce(keys.c.rotated_at, keys.c.created_at)
        count: int = connection.execute(
            select(func.count()).select_from(keys).where(_is_live(now_ms), issued_at < time_ms)
        ).scalar_one()
        return count


def _record(
    connection: Connection, now_ms: int, by: str, action: str, details: dict[str, Any]
) -> None:
    record_event(connection, now_ms, by, action, None, None, details)


def _is_live(now_ms: int) -> ColumnElement[Any]:
    return and_(
        keys.c.deleted_at.is_(None),
        keys.c.locator.is_(None),  # not imported
        or_(keys.c.expires_at.is_(None), keys.c.expires_at > now_ms),
    )
