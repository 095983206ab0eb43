"""What keylatch asks of its database: the questions of engine, witnesses and management.

The statements are in `sql`, each written once; here they are run, on SQLite or PostgreSQL.
Every method may raise `StoreUnavailable`; then nothing was changed that had been answered.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from keylatch.core.decisions import AuditEvent, KeyRecord
from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.storage import authorization, changes, leases, listing, queries, rotation, secrets
from keylatch.storage.audit import OPERATOR, page_of_events, prune_events
from keylatch.storage.authorization import Actor
from keylatch.storage.database import Database, Query, Rows
from keylatch.storage.leases import NOTIFY_CHANNEL, Poll
from keylatch.storage.listing import Page
from keylatch.storage.memory import Memory
from keylatch.storage.migrations import is_up_to_date, upgrade, version_of
from keylatch.storage.pepper_file import combine
from keylatch.storage.queries import Found, Invalidation, InvalidationBatch, NotFound, Secrets
from keylatch.storage.quotas import Quotas, check_quota
from keylatch.storage.secrets import SecretInfo
from keylatch.storage.sqlite import SQLite
from keylatch.storage.store_file import StoreFile
from keylatch.storage.usage import DAY_MS, KeyUsage, UsageBatch, add_batch, prune_usage, usage_of
from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import Health

# A silent server is given up soon and asked anew: checks are 503 until it has answered.
_OPEN_SECONDS: Final = 1.0
# An index of a million keys takes two seconds.
_UPGRADE_SECONDS: Final = 60.0
_EPOCH_SEPARATOR: Final = "."
"""Between an epoch and the database that it is told of."""
PAGE_SIZE: Final = 500
"""Keys that are read at once: they keep an event loop for a few milliseconds."""

T = TypeVar("T")
P = ParamSpec("P")
Statement = Callable[Concatenate[Connection, P], T]

__all__ = [
    "Found",
    "Invalidation",
    "InvalidationBatch",
    "NotFound",
    "Page",
    "Poll",
    "Secrets",
    "Store",
    "database_of",
]


def database_of(url: str) -> Database:
    """The database that a store URL names; nothing is opened yet.

    Raises:
        ConfigurationError: PostgreSQL's driver is missing, or SQLite would lose changes there.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return SQLite(Path(parsed.database)) if parsed.database else Memory()
    for package in ("psycopg", "greenlet"):
        if find_spec(package) is None:
            wrong = f"KEYLATCH_STORE: postgresql needs the package {package}"
            raise ConfigurationError([(wrong, "pip install 'keylatch[postgres]'")])
    from keylatch.storage.postgresql import PostgreSQL  # asyncio support costs 0.1 s at import

    return PostgreSQL(parsed)


def file_of(url: str) -> Path | None:
    """The SQLite file that a store URL names, if it names one; symbolic links are resolved."""
    parsed = make_url(url)
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return StoreFile(Path(parsed.database or "")).path if is_file else None


class Store:
    """Keys and what belongs to them, on SQLite or PostgreSQL.

    The epoch that it tells names the database as well: copies of a store have the same tables, and
    what Redis holds for one must not be taken for the other's.

    Args:
        url: `sqlite:///path.db`, `postgresql://…`, or `sqlite://` for one in memory (tests).
        upgrade_seconds: how long a server may take to bring old tables up to date.
        external_peppers: peppers from outside the store, newest first; see `peppers`.
    """

    def __init__(
        self,
        url: str,
        *,
        upgrade_seconds: float = _UPGRADE_SECONDS,
        external_peppers: Sequence[bytes] = (),
    ) -> None:
        self._database = database_of(url)
        self._external_peppers = tuple(external_peppers)
        self._database_hash = ""
        self._upgrade_seconds = upgrade_seconds
        self.health = Health("the store does not answer", "the store answers again")
        """Of what is read: changes may fail while that goes on."""
        self.failed_writes = Counter()
        self.audit_days = 0
        """How long `run_maintenance` keeps the audit log; 0: for ever. Set by the sidecar: apps on
        the same database may have other settings, and must not delete what the sidecar keeps."""
        self.data_version = self._database.data_version
        """Bytes that differ after every commit; None where `sequence_nowait` has to be asked."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""
        return self._database.warnings

    async def version(self) -> str | None:
        """The version of its tables; None: there are none yet."""
        return await self._database.read(version_of)

    async def open(self, now_ms: int) -> Secrets:
        """Set an empty store up, bring an old one up to date, and return its secrets.

        Whichever process comes first does it; the others wait for it and find it done.

        Raises:
            StoreIncompatible: the store was made by a newer keylatch.
        """

        def load_if_up_to_date(connection: Connection) -> Secrets | None:
            return queries.load_secrets(connection) if is_up_to_date(connection) else None

        secrets = await self._track_health(
            self._database.read(load_if_up_to_date, seconds=_OPEN_SECONDS)
        )
        if secrets is None:
            await self._database.write(
                lambda connection: upgrade(connection, now_ms),
                seconds=self._upgrade_seconds,
            )
            secrets = await self._read(queries.load_secrets)
        identity = await self._track_health(self._database.identity())
        self._database_hash = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return self._with_external_peppers(secrets)

    def _with_external_peppers(self, secrets: Secrets) -> Secrets:
        peppers = combine(secrets.peppers, self._external_peppers)
        return replace(secrets, peppers=peppers)

    def _with_database_hash(self, batch: InvalidationBatch) -> InvalidationBatch:
        return replace(batch, epoch=f"{batch.epoch}{_EPOCH_SEPARATOR}{self._database_hash}")

    def pools(self) -> Mapping[str, int]:
        """Work under way by kind: see `Database.pools`."""
        return self._database.pools()

    async def close(self) -> None:
        """Let connections and threads go."""
        await self._database.close()

    def before_fork(self) -> None:
        """Close whatever must not be open while the process forks."""
        self._database.before_fork()

    def after_fork_in_parent(self) -> None:
        """In the parent: go on."""
        self._database.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """In the child: drop what the parent has open."""
        self._database.after_fork_in_child()
        self.health.clear()
        self.failed_writes = Counter()

    async def ping(self) -> None:
        """Return if the store answers."""
        await self._fetch(queries.SEQUENCE)

    # What the engine asks

    async def find(self, key_id: str) -> Found | NotFound:
        """The key with this id, deleted ones included."""
        return queries.read_found(await self._fetch(queries.FIND, key_id=key_id))

    async def find_by_locator(self, locators: Sequence[str]) -> Found | NotFound:
        """The key that a token from elsewhere finds by one of these, deleted ones included."""
        parameters: dict[str, Any] = dict.fromkeys(queries.LOCATOR_PARAMETERS, locators[0])
        parameters |= zip(queries.LOCATOR_PARAMETERS, locators, strict=False)
        return queries.read_found_by_locator(
            await self._fetch(queries.FIND_BY_LOCATOR, **parameters), locators
        )

    async def invalidations_since(
        self, since: int, seconds: float | None = None
    ) -> InvalidationBatch:
        """What happened after the sequence number `since`; `seconds`: see `Database.fetch`."""
        rows = await self._fetch(queries.INVALIDATIONS_SINCE, seconds=seconds, since=since)
        return self._with_database_hash(queries.read_invalidations(rows, since))

    async def secrets(self) -> Secrets:
        """The store's own secrets, as they are now."""
        return self._with_external_peppers(queries.read_secrets(await self._fetch(queries.SECRETS)))

    def sequence_nowait(self) -> int | None:
        """`meta.seq` without waiting (SQLite), or None where it cannot be had that way."""
        rows = self._database.fetch_nowait(queries.SEQUENCE)
        return rows[0][0] if rows else None

    def invalidations_since_nowait(self, since: int) -> InvalidationBatch | None:
        """`invalidations_since` without waiting (SQLite); None where that is impossible."""
        rows = self._database.fetch_nowait(queries.INVALIDATIONS_SINCE, since=since)
        return self._with_database_hash(queries.read_invalidations(rows, since)) if rows else None

    # What witnesses ask

    @property
    def is_shared(self) -> bool:
        """Whether many hosts use it, so that it has to be asked and cannot just be read."""
        return self._database.is_shared

    async def join(self, member: str, seconds: float) -> None:
        """A process will ask for leases under this name."""
        await self._database.write(
            lambda connection: leases.join(connection, member),
            seconds=seconds,
            is_urgent=True,
        )

    async def poll(
        self, member: str, seq: int, seconds: float, pending: tuple[Invalidation, ...] = ()
    ) -> Poll:
        """Acknowledge `seq`, count a grant, and tell what happened since, in one statement
        (PostgreSQL).

        Args:
            member: who asks.
            seq: up to where it knows the log.
            seconds: see `Database.fetch`.
            pending: what it has received of the log after that; acknowledged too if it is all there
                is in the log, up to the last of them.
        """
        rows = await self._database.fetch(
            leases.POLL,
            seconds=seconds,
            member=member,
            since=seq,
            pending_seq=pending[-1][0] if pending else seq,
            pending=json.dumps(pending),
        )
        poll = leases.read_poll(rows, seq)
        return replace(poll, batch=self._with_database_hash(poll.batch))

    async def leave(self, member: str) -> None:
        """A process holds no lease any more and will ask for none."""
        await self._write(leases.leave, member)

    async def laggards(self, seq: int, seconds: float) -> tuple[dict[str, int], int]:
        """Members that have not acknowledged `seq` (name → grants so far), and how many there
        are in all."""
        rows = await self._database.fetch(leases.LAGGARDS, seconds=seconds, seq=seq)
        laggards = {member: grants for _, member, grants in rows if member is not None}
        return laggards, rows[0][0]

    async def remove_members(self, laggards: Mapping[str, int], seq: int, seconds: float) -> int:
        """Remove those that still have not acknowledged `seq` and were granted nothing since;
        return how many."""
        return await self._database.write(
            lambda connection: leases.remove_members(connection, laggards, seq),
            seconds=seconds,
            is_urgent=True,
        )

    async def notify(self, payload: str) -> None:
        """Ring the store's own bell (PostgreSQL), with less than 8,000 bytes."""
        await self._database.fetch(leases.NOTIFY, payload=payload)

    async def listen(self, on_notification: Callable[[str], None]) -> None:
        """Hear the store's own bell (PostgreSQL) and what it says, until the line breaks."""
        await self._database.listen(NOTIFY_CHANNEL, on_notification)

    async def start_new_epoch(self, epoch: str, seq: int) -> None:
        """After a restore from a backup: a new epoch, and sequence numbers beyond all that were
        given out, so that nothing that anybody remembers is believed."""
        await self._write(changes.start_new_epoch, epoch.partition(_EPOCH_SEPARATOR)[0], seq)

    async def replace_hash(self, key_id: str, old: str, new: str) -> None:
        """Exchange a hash for another one of the same token. No answer about the key changes."""
        await self._write(changes.replace_hash, key_id, old, new)

    async def record_last_used(
        self, last_used: Mapping[str, int], batch: UsageBatch | None = None
    ) -> None:
        """Record when keys were last used (id → milliseconds), never backwards; and what was
        counted, once: see `tally`.

        It writes that one column and nothing else of a key: saving a whole row back from a cache
        would bring a revoked key to life. Sorted by id, so that two processes cannot deadlock.
        """

        def work(connection: Connection) -> None:
            if batch is not None:
                add_batch(connection, last_used, batch)
            else:
                changes.record_last_used(connection, last_used)

        if last_used or batch is not None:
            await self._database.write(work, durable=False)

    async def run_maintenance(self, now_ms: int) -> None:
        """Prune the invalidation log beyond 100,000 rows, counts of uses after 400 days and the
        audit log after `audit_days`, and let the database tidy up."""
        await self._write(changes.prune_invalidations)
        await self._write(prune_usage, now_ms // DAY_MS)
        if self.audit_days:
            await self._write(prune_events, now_ms - self.audit_days * DAY_MS)
        await self._database.run_maintenance()

    # What management asks

    async def check_quota(
        self, organization_id: str, now_ms: int, quotas: Quotas, *, new_keys: int = 0
    ) -> None:
        """Whether a change by a key, which may add keys, would be within the limits now.

        Raises:
            QuotaExceeded: it would not.
        """
        await self._read(check_quota, organization_id, now_ms, quotas, new_keys=new_keys)

    async def add(
        self, record: KeyRecord, hashed: str, *, by: Actor = authorization.OPERATOR
    ) -> tuple[KeyRecord, int]:
        """Insert a key, and its organisation if it is new; return it and the sequence number.

        A key without an end gets that of the key that creates it.

        Raises:
            CallerRefused, NotPermitted, QuotaExceeded: as all changes by a key do, see
                `authorization` and `quotas`.
        """
        return await self._write(changes.add_key, record, hashed, by)

    async def add_many(
        self, new_keys: Sequence[tuple[KeyRecord, str]], *, by: Actor = authorization.OPERATOR
    ) -> tuple[list[KeyRecord], int]:
        """Insert keys with their hashes, all or none, in this order; return them and the sequence
        number.

        Every other change waits meanwhile, and PostgreSQL is given up after five seconds: a
        thousand keys take about a tenth of a second.
        """
        return await self._write(changes.add_keys, new_keys, by)

    async def import_many(
        self, new_keys: Sequence[tuple[KeyRecord, str]], *, by: Actor = authorization.OPERATOR
    ) -> tuple[int, dict[str, tuple[str, bool]]]:
        """Insert keys that were made elsewhere, all or none, but for those that are here already.

        Returns:
            the sequence number, and which locators were here: locator → (id of its key, whether
            that is deleted). The caller's own ids among them were inserted by an earlier attempt
            whose answer was lost.
        """
        return await self._write(changes.import_keys, new_keys, by)

    async def keys_by_locator(self, locators: Sequence[str]) -> dict[str, tuple[str, bool]]:
        """Which locators are here: locator → (id of its key, whether that is deleted)."""
        return await self._read(listing.keys_by_locator, locators)

    async def analyze(self) -> None:
        """After many were added: let the database learn how many there are."""
        await self._database.write(changes.analyze, seconds=_UPGRADE_SECONDS)

    async def get(
        self, organization_id: str, key_id: str, environment: str | None = None
    ) -> KeyRecord | None:
        """The key if it belongs to the organisation, and to the environment if one is given: a
        foreign key is an unknown key."""
        return await self._read(listing.get_key, organization_id, key_id, environment)

    async def page(
        self,
        organization_id: str,
        limit: int = PAGE_SIZE,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        unused_since: int | None = None,
        environment: str | None = None,
    ) -> Page:
        """At most `limit` of the organisation's keys in the order of their creation, deleted ones
        if asked for, from the page that follows this `next_cursor`; and only those that were
        neither used nor made since a time in milliseconds, and those of an environment, if one is
        given."""
        return await self._read(
            listing.page_of_keys,
            organization_id,
            limit,
            newest_first,
            deleted,
            after,
            unused_since,
            environment,
        )

    async def pages(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        unused_since: int | None = None,
        environment: str | None = None,
    ) -> AsyncIterator[Page]:
        """All of them, page by page: no transaction is held in between, so keys that are made
        meanwhile may be missing and those that are deleted may be there; no key is there twice."""
        while True:
            page = await self.page(
                organization_id,
                newest_first=newest_first,
                deleted=deleted,
                after=after,
                unused_since=unused_since,
                environment=environment,
            )
            yield page
            if page.next_cursor is None:
                return
            after = page.next_cursor

    async def list(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        environment: str | None = None,
    ) -> list[KeyRecord]:
        """The organisation's keys in the order of their creation; deleted ones if asked for."""
        pages = self.pages(
            organization_id, newest_first=newest_first, deleted=deleted, environment=environment
        )
        return [record async for page in pages for record in page.records]

    async def usage(
        self, organization_id: str, key_id: str, since_day: int, environment: str | None = None
    ) -> KeyUsage | None:
        """How a key of the organisation was used since a day; None: it has no such key."""
        return await self._read(usage_of, organization_id, key_id, since_day, environment)

    async def change(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        values: Mapping[str, Any],
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """Change columns of a key, unless it was deleted: that is final, and comes back as it is.
        So does one that has these values already.

        Returns:
            the record and a sequence number at which it is true; None: no such key here.

        Raises:
            CallerRefused, NotPermitted, QuotaExceeded: as in `add`.
        """
        return await self._change(
            key_id,
            now_ms,
            lambda c: changes.change_key(c, organization_id, key_id, now_ms, values, by),
        )

    async def rotate(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        hashed: str,
        partial_token: str,
        ends_at: int | None,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """Give a key another hash, and let the present one be good until `ends_at` (milliseconds
        since the epoch) or its own expiry; None: it ends now.

        Raises:
            InvalidKeyState: the key was deleted.
        """
        named = organization_id, key_id, now_ms
        return await self._change(
            key_id,
            now_ms,
            lambda c: rotation.rotate_key(c, *named, hashed, partial_token, ends_at, by),
        )

    async def end_grace(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        restore_previous: bool,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """While two secrets of a key are good: keep the previous one only, or the present one.

        Raises:
            InvalidKeyState: the key was deleted, or has one secret.
        """
        return await self._change(
            key_id,
            now_ms,
            lambda c: rotation.end_grace(c, organization_id, key_id, now_ms, restore_previous, by),
        )

    async def revoke_secret(
        self,
        organization_id: str,
        key_id: str,
        secret: int,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """End one of a key's secrets: with the present one the key is deleted, the one before the
        last rotation ends alone.

        Raises:
            InvalidKeyState: it is not one of its secrets any more, or the key was deleted.
        """
        named = organization_id, key_id, secret, now_ms
        return await self._change(
            key_id, now_ms, lambda c: rotation.revoke_secret(c, *named, reason, by)
        )

    async def delete_with_descendants(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[KeyRecord, int, int] | None:
        """Delete a key and all that it created, directly and indirectly.

        Returns:
            the key, how many were deleted, and the sequence number; None: no such key here.
        """
        named = organization_id, key_id, now_ms
        return await self._change(
            None,
            now_ms,
            lambda c: rotation.delete_with_descendants(c, *named, reason, by),
            seconds=_UPGRADE_SECONDS,
        )

    async def revoke_all(
        self,
        organization_id: str,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> tuple[int, int]:
        """Delete every key of an organisation; how many, and the sequence number of it."""
        return await self._change(
            organization_id,
            now_ms,
            lambda c: rotation.revoke_all(c, organization_id, now_ms, reason, by),
            seconds=_UPGRADE_SECONDS,
        )

    async def change_organization(
        self,
        organization_id: str,
        now_ms: int,
        active: bool,
        *,
        by: Actor = authorization.OPERATOR,
    ) -> int | None:
        """Enable or disable an organisation; the sequence number of it, or None: no such one."""
        return await self._change(
            organization_id,
            now_ms,
            lambda c: changes.set_organization_active(c, organization_id, now_ms, active, by),
        )

    async def events(
        self,
        organization_id: str | None,
        limit: int,
        key_id: str | None = None,
        before: int | None = None,
        environment: str | None = None,
    ) -> Sequence[AuditEvent]:
        """The audit log, the newest first; see `Keyring.events`."""
        return await self._read(page_of_events, organization_id, limit, key_id, before, environment)

    async def inactive_keys(self) -> Sequence[listing.InactiveKey]:
        """All keys that were revoked or disabled: what must not live again after a restore."""
        return await self._database.read(listing.inactive_keys, seconds=_UPGRADE_SECONDS)

    # What the vault asks

    async def list_secrets(self) -> Sequence[SecretInfo]:
        """What there is to know of the store's own secrets, without them."""
        return await self._read(secrets.list_secrets)

    async def add_pending_secrets(
        self, kinds: Sequence[str], now_ms: int, *, by: str = OPERATOR
    ) -> int:
        """Add a secret of each kind that nothing is made with yet; the sequence number of it."""
        return await self._write(secrets.add_pending, kinds, now_ms, by)

    async def promote_secrets(
        self, kinds: Sequence[str], now_ms: int, *, by: str = OPERATOR
    ) -> int:
        """From now on, everything is made with what was introduced."""
        return await self._write(secrets.promote, kinds, now_ms, by)

    async def retire_secret(
        self, secret_id: int, before_ms: int, now_ms: int, *, by: str = OPERATOR
    ) -> int | None:
        """Delete a secret that another one replaced before that time; None: there is none."""
        return await self._write(secrets.retire, secret_id, before_ms, now_ms, by)

    async def count_issued_before(self, time_ms: int, now_ms: int) -> int:
        """How many keys are live whose tokens were made here and before that time."""
        return await self._read(secrets.count_issued_before, time_ms, now_ms)

    async def _read(self, statement: "Statement[P, T]", *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._track_health(
            self._database.read(lambda connection: statement(connection, *args, **kwargs))
        )

    async def _write(self, statement: "Statement[P, T]", *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await self._database.write(
                lambda connection: statement(connection, *args, **kwargs)
            )
        except StoreUnavailable:
            self.failed_writes.add()
            raise

    async def _change(
        self,
        invalidated_id: str | None,
        now_ms: int,
        change: Callable[[Connection], T],
        *,
        seconds: float | None = None,
    ) -> T:
        """Run a change. Where it is repeated because the answer to its commit was lost, it may have
        been made: then the acting key may be gone, and must not be judged by its own work."""
        result: list[T] = []

        def work(connection: Connection) -> T:
            if result and changes.is_committed(
                connection, _sequence_of(result[0]), now_ms, invalidated_id
            ):
                return result[0]
            result[:] = [change(connection)]
            return result[0]

        try:
            return await self._database.write(work, seconds=seconds)
        except StoreUnavailable:
            self.failed_writes.add()
            raise

    async def _fetch(
        self, query: Query, *, seconds: float | None = None, **parameters: Any
    ) -> Rows:
        return await self._track_health(self._database.fetch(query, seconds=seconds, **parameters))

    async def _track_health(self, reading: Awaitable[T]) -> T:
        """What was read; whether it could be is the store's condition."""
        try:
            value = await reading
        except StoreUnavailable as error:
            self.health.record_failure(error.message, error.hint)
            raise
        self.health.record_success()
        return value


def _sequence_of(result: object) -> int:
    """The sequence number of a change; 0: it changed nothing."""
    number = result[-1] if isinstance(result, tuple) else result
    return number if isinstance(number, int) else 0
