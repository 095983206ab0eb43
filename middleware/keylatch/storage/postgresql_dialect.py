"""SQLAlchemy's dialect of psycopg, without the queries that it sends when a connection is opened.

libpq learns the version while it connects; the rest are constants here, or not used. Every
statement begins with the comment that tells pgpool-II to send it to the primary.
"""

from typing import Any, Final

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg
from sqlalchemy.engine.interfaces import Dialect, IsolationLevel

PRIMARY_HINT: Final = "/*NO LOAD BALANCE*/ "
SERVER_STARTED: Final = "extract(epoch FROM pg_postmaster_start_time())::text"
DRIVER_NAME: Final = "postgresql+keylatch"


class QuietDialect(PGDialectAsync_psycopg):
    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[Dialect]:
        return cls

    def _get_server_version_info(self, connection: Any) -> tuple[int, ...]:
        version = connection.connection.driver_connection.info.server_version
        return version // 10_000, version % 10_000

    def _get_default_schema_name(self, connection: Any) -> str:
        return ""  # tables are found by the search path

    def get_default_isolation_level(self, dbapi_conn: Any) -> IsolationLevel:
        return "READ COMMITTED"  # what transactions say when they begin

    def _set_backslash_escapes(self, connection: Any) -> None:
        info = connection.connection.driver_connection.info
        self._backslash_escapes = info.parameter_status("standard_conforming_strings") == "off"

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        cursor.execute(PRIMARY_HINT + statement, parameters)

    def do_executemany(
        self, cursor: Any, statement: str, parameters: Any, context: Any = None
    ) -> None:
        cursor.executemany(PRIMARY_HINT + statement, parameters)

    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        cursor.execute(PRIMARY_HINT + statement)


registry.register("postgresql.keylatch", __name__, QuietDialect.__name__)
