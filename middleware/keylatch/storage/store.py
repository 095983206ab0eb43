"""The store: opens a database, brings its tables up to date, and holds the repositories.

Every method of a repository may raise `StoreUnavailable`; then nothing was changed that had been
answered.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from keylatch.errors import ConfigurationError
from keylatch.storage.audit import AuditRepository
from keylatch.storage.conninfo import is_postgresql
from keylatch.storage.database import Database, Durability
from keylatch.storage.descendants import DescendantRepository
from keylatch.storage.invalidation_log import (
    POSITION,
    Invalidation,
    InvalidationBatch,
    InvalidationLog,
    Position,
)
from keylatch.storage.keys import PAGE_SIZE, InactiveKey, KeyRepository, Page
from keylatch.storage.leases import Laggards, LeaseRepository, Poll
from keylatch.storage.memory import Memory
from keylatch.storage.migrations import is_up_to_date, upgrade, version_of
from keylatch.storage.organizations import OrganizationRepository
from keylatch.storage.records import Found, NotFound
from keylatch.storage.repository import MANY_ROWS_SECONDS, MonitoredDatabase
from keylatch.storage.rotation import RotationRepository
from keylatch.storage.secrets import SecretRepository, Secrets
from keylatch.storage.sqlite import SQLite
from keylatch.storage.store_file import StoreFile
from keylatch.storage.usage import DAY_MS, UsageRepository
from keylatch.telemetry.counters import Counter

_OPEN_SECONDS: Final = 10.0
"""From another continent, a connection with TLS takes two seconds. Checks are 503 meanwhile."""

__all__ = [
    "PAGE_SIZE",
    "Found",
    "InactiveKey",
    "Invalidation",
    "InvalidationBatch",
    "Laggards",
    "NotFound",
    "Page",
    "Poll",
    "Position",
    "Secrets",
    "Store",
    "database_of",
    "file_of",
]


def database_of(
    url: str, *, direct_url: str = "", read_url: str = "", durable: Durability = "local"
) -> Database:
    """The database of a store URL, not opened; the arguments are those of `Store`.

    Raises:
        ConfigurationError: PostgreSQL's driver is missing, or SQLite would lose changes there.
    """
    if not is_postgresql(url):
        file = make_url(url).database
        return SQLite(Path(file)) if file else Memory()
    for package in ("psycopg", "greenlet"):
        if find_spec(package) is None:
            wrong = f"KEYLATCH_STORE: postgresql needs the package {package}"
            raise ConfigurationError([(wrong, "pip install 'keylatch[postgres]'")])
    from keylatch.storage.postgresql import PostgreSQL  # asyncio support costs 0.1 s at import

    return PostgreSQL(url, direct_url, read_url, durable)


def file_of(url: str) -> Path | None:
    """The SQLite file of a store URL, with symbolic links resolved; None: it is not a file."""
    file = None if is_postgresql(url) else make_url(url).database
    return StoreFile(Path(file)).path if file else None


class Store:
    """The keys and their secrets, leases, audit log and usage, on SQLite or PostgreSQL.

    Args:
        url: `sqlite:///path.db`, `postgresql://…`, or `sqlite://` for one in memory (tests).
        upgrade_seconds: how long a server may take to bring old tables up to date.
        external_peppers: peppers from outside the store, newest first; see `pepper_file`.
        direct_url: for leases and notifications, if a pooler in transaction mode is at `url`.
        read_url: a standby of the server, which may answer look-ups.
        durable: `replicated`: refuse to work while the server has no synchronous standby.
    """

    def __init__(
        self,
        url: str,
        *,
        upgrade_seconds: float = MANY_ROWS_SECONDS,
        external_peppers: Sequence[bytes] = (),
        direct_url: str = "",
        read_url: str = "",
        durable: Durability = "local",
    ) -> None:
        self._database = database_of(url, direct_url=direct_url, read_url=read_url, durable=durable)
        self._monitored = MonitoredDatabase(self._database)
        self._upgrade_seconds = upgrade_seconds
        self.health = self._monitored.health
        self.set_lease_poll = self._monitored.set_lease_poll
        self.keys = KeyRepository(self._monitored)
        self.descendants = DescendantRepository(self._monitored)
        self.rotation = RotationRepository(self._monitored)
        self.organizations = OrganizationRepository(self._monitored)
        self.invalidations = InvalidationLog(self._monitored)
        self.leases = LeaseRepository(self._monitored, self.invalidations)
        self.secrets = SecretRepository(self._monitored, external_peppers)
        self.audit = AuditRepository(self._monitored)
        self.usage = UsageRepository(self._monitored)
        self.audit_days = 0
        """How long `run_maintenance` keeps the audit log; 0: for ever. The sidecar sets it: apps on
        the same database may have other settings and must not delete what the sidecar keeps."""
        self.data_version = self._database.data_version
        """Bytes that differ after every commit; None where `meta.seq` has to be read."""
        self.durability = self._database.durability
        """Where the last durable change was stored when it was answered."""
        self.has_standby = self._database.has_standby
        """Whether a standby may be queried before the primary."""

    @property
    def failed_writes(self) -> Counter:
        return self._monitored.failed_writes

    @property
    def is_shared(self) -> bool:
        """Whether several hosts use it, so that processes need leases."""
        return self._database.is_shared

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""
        return self._database.warnings

    async def version(self) -> str | None:
        """The version of its tables; None: it has none."""
        return await self._database.read(version_of)

    async def open(self, now_ms: int) -> Secrets:
        """Create the tables of an empty store, upgrade those of an old one, and return the secrets.

        One process does it; the others wait for it.

        Raises:
            StoreIncompatible: the store was upgraded by a newer keylatch.
        """

        def load_if_up_to_date(connection: Connection) -> Secrets | None:
            return self.secrets.load_in(connection) if is_up_to_date(connection) else None

        tracked = self._monitored.failures_tracked
        secrets = await tracked(self._database.read(load_if_up_to_date, seconds=_OPEN_SECONDS))
        if secrets is None:
            await self._database.write(
                lambda connection: upgrade(connection, now_ms), seconds=self._upgrade_seconds
            )
            secrets = await tracked(self._database.read(self.secrets.load_in))
        identity = await tracked(self._database.identity())
        self.invalidations.database_hash = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.health.record_success()
        return secrets

    async def ping(self) -> None:
        """Return if the store answers."""
        await self._monitored.fetch(POSITION)

    async def run_maintenance(self, now_ms: int) -> None:
        """Prune the invalidation log beyond 100,000 rows, usage after 400 days and the audit log
        after `audit_days`, and run the database's housekeeping."""
        await self.invalidations.prune()
        await self.usage.prune(now_ms // DAY_MS)
        if self.audit_days:
            await self.audit.prune(now_ms - self.audit_days * DAY_MS)
        await self._database.run_maintenance()

    def pools(self) -> Mapping[str, int]:
        """Work in progress by kind: see `Database.pools`."""
        return self._database.pools()

    async def close(self) -> None:
        await self._database.close()

    def before_fork(self) -> None:
        """Close what must not be open while the process forks."""
        self._database.before_fork()

    def after_fork_in_parent(self) -> None:
        self._database.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Drop what the parent has open."""
        self._database.after_fork_in_child()
        self._monitored.after_fork_in_child()
