"""Store URLs: what libpq gets is what their author meant, and what cannot work is refused."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import Boolean, func, literal_column, select
from sqlalchemy.engine import make_url

from keylatch.errors import StoreUnavailable
from keylatch.storage.conninfo import connection_parameters, is_postgresql, parse
from keylatch.storage.database import Query
from keylatch.storage.store import database_of, file_of
from tests.support.servers import PostgresServer, eventually, free_port, require_program

PASSWORD = "p@ss/w:rd%? #&+é'\\"
QUOTED = quote(PASSWORD, safe="")
TWO = {"host": "a,b", "port": "1,2"}

SPELLINGS: dict[str, dict[str, str]] = {
    "postgresql://": {},
    "postgresql://h/d": {"host": "h", "dbname": "d"},
    "postgres://h": {"host": "h"},
    "PostgreSQL://h": {"host": "h"},
    "postgresql+psycopg://h": {"host": "h"},
    "postgres+psycopg://h": {"host": "h"},
    "postgresql://u:p@h:5/d": {
        "user": "u",
        "password": "p",
        "host": "h",
        "port": "5",
        "dbname": "d",
    },
    # Several hosts: libpq's spellings, then SQLAlchemy's.
    "postgresql://a:1,b:2": TWO,
    "postgresql://a,b": {"host": "a,b", "port": ","},
    "postgresql://?host=a,b&port=1,2": TWO,
    "postgresql:///?host=a:1&host=b:2": TWO,
    "postgresql:///?host=a&host=b&port=1&port=2": TWO,
    "postgresql:///?host=a:1,b:2": TWO,
    "postgresql:///?host=a&host=b:2": {"host": "a,b", "port": ",2"},
    "postgresql://c:3/?host=a:1&host=b:2": TWO,
    "postgresql:///?host=[::1]:1&host=[::2]": {"host": "::1,::2", "port": "1,"},
    "postgresql:///?host=fe80::1&port=1": {"host": "fe80::1", "port": "1"},
    "postgresql://[::1]:1": {"host": "::1", "port": "1"},
    "postgresql:///?hostaddr=1.1.1.1&hostaddr=2.2.2.2": {"hostaddr": "1.1.1.1,2.2.2.2"},
    # Sockets.
    "postgresql:///d?host=/run/pg&port=5": {"dbname": "d", "host": "/run/pg", "port": "5"},
    "postgresql:///?host=/run/a:b": {"host": "/run/a:b"},
    "postgresql://%2Frun%2Fpg:5/d": {"dbname": "d", "host": "/run/pg", "port": "5"},
    "postgresql://%40abstract": {"host": "@abstract"},
    # Service files.
    "postgresql://?service=keys": {"service": "keys"},
    "postgresql:///?service=keys": {"service": "keys"},
    # A plus is a plus; a blank is written %20.
    "postgresql://u:a+b%20c@h": {"user": "u", "password": "a+b c", "host": "h"},
    "postgresql://h?password=a+b%20c": {"host": "h", "password": "a+b c"},
    "postgresql://h?options=-c%20search_path%3Dx": {"host": "h", "options": "-c search_path=x"},
    "postgresql://h?options=-csearch_path%3Dx": {"host": "h", "options": "-csearch_path=x"},
    f"postgresql://u:{QUOTED}@h": {"user": "u", "password": PASSWORD, "host": "h"},
    # As libpq reads them.
    "postgresql://u:a?b#c@h": {"user": "u", "password": "a?b#c", "host": "h"},
    "postgresql://h/?user=me@azure": {"host": "h", "user": "me@azure"},
    "postgresql://h?sslmode=disable&sslmode=require": {"host": "h", "sslmode": "require"},
    "postgresql://h?&ssl=true&": {"host": "h", "sslmode": "require"},
    "postgresql://?port=1,2": {"port": "1,2"},  # the hosts may come from PGHOST
}


@pytest.mark.parametrize("url", SPELLINGS)
def test_every_spelling_says_what_its_author_meant(url: str) -> None:
    """Those of libpq, of SQLAlchemy and of hosting providers."""
    assert is_postgresql(url)
    assert parse(url) == SPELLINGS[url]


def test_what_is_not_postgresql_is_not() -> None:
    """Also where the word is a part of another one, and a SQLite file may have any name."""
    for url in ("sqlite:///postgresql://", "postgresqls://h", "postgresql:/h", "", "redis://h"):
        assert not is_postgresql(url)
        with pytest.raises(ValueError, match="not a PostgreSQL URL"):
            parse(url)
    assert file_of("postgresql://a:1,b:2/d") is None


DRIVER = "another driver than psycopg: the scheme is written postgresql://"
PARAMETER = (
    "libpq does not know parameter {} after the ?, or cannot decode its value"
    " (a blank is written %20, and an = %3D)"
)
PORT = "a port is a number from 1 to 65535"
COUNT = "neither one port nor one for each host"
AT = "an @ in a password is written %40, and a / is written %2F"
NOT_READ = "libpq cannot read it: in a password, special characters are written %XX"

REFUSED = {
    "postgresql+psycopg2://hunter2": DRIVER,
    "postgresql+asyncpg://hunter2": DRIVER,
    "postgresql://h?hunter2=1": PARAMETER.format(1),
    "postgresql://h?sslmode=require&hunter2=1": PARAMETER.format(2),
    "postgresql://h?hunter2": PARAMETER.format(1),
    "postgresql://h?user=%hunter2": PARAMETER.format(1),
    "postgresql://h?options=-c+search_path=hunter2": PARAMETER.format(1),
    "postgresql://h?user=hunter2%00": PARAMETER.format(1),
    "postgresql://h?user=hunter2%FF": PARAMETER.format(1),
    "postgresql://u:hunter2%@h": NOT_READ,
    "postgresql://u:\udc80hunter2@h": NOT_READ,
    "postgresql://[::1hunter2": NOT_READ,
    "postgresql://u:hunter2\0@h": "not a PostgreSQL URL",
    "postgresql://h:hunter2": PORT,
    "postgresql://h:0": PORT,
    "postgresql://h:65536": PORT,
    "postgresql://h:٣": PORT,
    "postgresql://h:-1": PORT,
    "postgresql://a:1,b:hunter2": PORT,
    "postgresql://?host=a:hunter2": PORT,
    "postgresql://?host=a,b&port=1,hunter2": PORT,
    "postgresql://a,b,c?port=1,2": COUNT,
    "postgresql://a?port=1,2": COUNT,
    "postgresql://?hostaddr=1.1.1.1&port=1,2": COUNT,
    "postgresql://?host=a:1&port=2": "ports beside the hosts and in a parameter of their own",
    "postgresql://u:a@hunter2@h": AT,
    "postgresql://u:5432/hunter2@h": AT,
    "postgresql://u:hunter2@@h": AT,
    "postgresql://h?user=me@azure&password=hunter2": (
        "an @ in a parameter is written %40, and a ? in a password %3F"
    ),
    "postgresql://h?options=-c+search_path%3Dhunter2": (
        "a blank in options is written %20, because libpq reads a + as a plus"
    ),
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    """With the reason, and without a part of it: any part may belong to a password."""
    with pytest.raises(ValueError, match=f"^{re.escape(REFUSED[url])}$") as caught:
        parse(url)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)
VALUES = st.fixed_dictionaries(
    {"user": TEXT, "password": TEXT, "host": st.just("h"), "dbname": TEXT, "options": TEXT}
).filter(lambda values: "-c+" not in values["options"])


def url_of(values: dict[str, str]) -> str:
    """A URL as RFC 3986 spells it."""
    quoted = {name: quote(value, safe="") for name, value in values.items()}
    user, password, host = quoted["user"], quoted["password"], quoted["host"]
    return f"postgresql://{user}:{password}@{host}/{quoted['dbname']}?options={quoted['options']}"


BLANKS = {"user": "a b", "password": "c d+e", "host": "h", "dbname": "f", "options": "-c a=b"}


@given(VALUES)
@example(BLANKS)
def test_libpq_gets_each_text_as_it_was_meant(values: dict[str, str]) -> None:
    """Whatever a user, a password, a database or options contain: psycopg gives it to libpq."""
    parameters = connection_parameters(url_of(values))
    received = conninfo_to_dict(make_conninfo(**parameters))
    assert values.items() <= {name: str(value) for name, value in received.items()}.items()


HOSTS = st.lists(
    st.tuples(
        st.sampled_from(["h", "1.2.3.4", "[::1]", "%2Frun", "%40abstract", ""]),
        st.one_of(st.just(""), st.integers(1, 65535).map(lambda port: f":{port}")),
    ).map("".join),
    max_size=3,
).map(",".join)
NAMES = st.sampled_from(["user", "dbname", "password", "sslmode", "application_name", "service"])
PARAMETERS = st.lists(st.tuples(NAMES, TEXT.map(quote)).map("=".join), max_size=3).map("&".join)


@given(HOSTS, PARAMETERS, st.sampled_from(["", "u@", "u:p%20w@"]), st.sampled_from(["", "/", "/d"]))
def test_what_libpq_can_read_is_read_as_libpq_does(
    hosts: str, parameters: str, user: str, database: str
) -> None:
    """For libpq's own spellings, an operator can try a URL with psql."""
    url = f"postgresql://{user}{hosts}{database}" + (f"?{parameters}" if parameters else "")
    assert parse(url) == conninfo_to_dict(url)


def test_a_url_that_sqlalchemy_renders_does_not_say_the_same() -> None:
    """The broken twin: SQLAlchemy writes a blank as a plus, or leaves it as it is."""
    url = make_url("postgresql://u@h?options=-c%20a%3Db")
    assert conninfo_to_dict(url.render_as_string())["options"] == "-c+a=b"
    url = make_url("postgresql://u:a%20blank@h")
    with pytest.raises(psycopg.ProgrammingError, match="unexpected spaces"):
        conninfo_to_dict(url.render_as_string(hide_password=False))


UNQUOTED = st.text("a1 :/?#[]@!$&'()*+,;=%", max_size=12)


def host_of_unquoted(read: Any, password: str) -> str | None:
    """The host of a URL whose password is not percent-encoded; None: refused."""
    try:
        return str(read(f"postgresql://user:{password}@server/keys").get("host"))
    except (ValueError, psycopg.Error):
        return None


@given(UNQUOTED)
@example("a@b")
@example("5432/a")
def test_no_part_of_a_password_becomes_a_host(password: str) -> None:
    """It would be in every error message: a URL that is not encoded is refused, or understood."""
    assert host_of_unquoted(parse, password) in ("server", None)


def test_libpq_takes_a_part_of_a_password_for_a_host() -> None:
    """The broken twin: libpq's reading alone."""
    assert host_of_unquoted(conninfo_to_dict, "a@b") == "b@server"


def test_the_url_has_the_last_word() -> None:
    """keylatch's time limits and its name are defaults."""
    own = connection_parameters("postgresql://h")
    assert (own["application_name"], own["connect_timeout"]) == ("keylatch", 4)
    given = connection_parameters(
        "postgresql://h?application_name=shop&connect_timeout=7&tcp_user_timeout=1"
    )
    assert (given["application_name"], given["connect_timeout"]) == ("shop", "7")
    assert given["tcp_user_timeout"] == "1"


@pytest.mark.long
def test_psycopg_is_imported_for_a_postgresql_url_only() -> None:
    """A process with a SQLite store does not need it."""
    program = (
        "import sys; from keylatch.storage.conninfo import *; is_postgresql('postgresql://h')\n"
        "from keylatch.settings import Settings; Settings.load(store='sqlite:///x.db')\n"
        "assert 'psycopg' not in sys.modules; parse('postgresql://h'); sys.modules['psycopg']"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("KEYLATCH_")}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


# With a real server


class Subscribed(Exception):
    """LISTEN works."""


async def reached(url: str, what: Any = None) -> set[Any]:
    """What a server answers on each way of connecting: changes, look-ups, leases, LISTEN."""
    query = Query(select(func.current_database() if what is None else what))
    database = database_of(url)

    def on_notification(_: str) -> None:
        raise Subscribed

    try:
        with pytest.raises(Subscribed):
            await database.listen("keylatch_test", on_notification)
        found = [
            *await database.fetch(query),
            *await database.fetch(query, seconds=5.0),
            await database.read(lambda connection: connection.execute(query.statement).one()),
        ]
        return {value for (value,) in found}
    finally:
        await database.close()


class TLSServer:
    """A PostgreSQL that accepts TLS and asks the role `app` for a password, and the database
    `certificates` for a client certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._make_certificates()
        self.server = PostgresServer()
        self.port = self.server.port
        with self.connect() as connection:
            for statement in (
                "CREATE DATABASE keys",
                "CREATE DATABASE certificates",
                "CREATE ROLE app LOGIN",
                "ALTER SYSTEM SET ssl = on",
                "ALTER SYSTEM SET ssl_ca_file = 'ca.crt'",
            ):
                connection.execute(statement)
            self.set_password("word")
            self.data = Path(self._show("data_directory"))
            self.sockets = self._show("unix_socket_directories")
            self._install("server.crt", "server.key", "ca.crt")
            access = self.data / "pg_hba.conf"
            rules = (
                "hostssl certificates app 127.0.0.1/32 cert\n"
                "hostssl all app 127.0.0.1/32 scram-sha-256\nhostnossl all app all reject\n"
            )
            access.write_text(rules + access.read_text())
            connection.execute("SELECT pg_reload_conf()")
        eventually(self._accepts_tls)

    def connect(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}", autocommit=True)

    def set_password(self, password: str) -> None:
        statement = sql.SQL("ALTER ROLE app PASSWORD {}").format(sql.Literal(password))
        with self.connect() as connection:
            connection.execute(statement)

    def url(self, more: str = "", *, host: str = "localhost", password: str = "word") -> str:
        return f"postgresql://app:{quote(password, safe='')}@{host}:{self.port}/keys?{more}"

    def _show(self, name: str) -> str:
        with self.connect() as connection:
            (value,) = connection.execute(f"SHOW {name}").fetchone() or ("",)
        return str(value)

    def _accepts_tls(self) -> bool:
        try:
            psycopg.connect(self.url("sslmode=require")).close()
        except psycopg.OperationalError:
            return False
        return True

    def _install(self, *names: str) -> None:
        """Files that the server reads: of its account and of no other."""
        owner = self.data.stat()
        for name in names:
            target = self.data / name
            target.write_bytes((self.folder / name).read_bytes())
            target.chmod(0o600)
            os.chown(target, owner.st_uid, owner.st_gid)

    def _make_certificates(self) -> None:
        for name in ("ca", "other"):
            self._openssl(
                *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"),
            )
        (self.folder / "names").write_text("subjectAltName=DNS:localhost\n")
        for name, subject, more in (
            ("server", "localhost", ("-extfile", "names")),
            ("client", "app", ()),
        ):
            self._openssl(
                *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={subject}"),
                *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
            )
            self._openssl(
                *("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", "-days", "2"),
                *("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", *more),
            )
        (self.folder / "client.key").chmod(0o600)

    def _openssl(self, *words: str) -> None:
        program = require_program(shutil.which("openssl"), "openssl")
        subprocess.run([program, *words], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TLSServer]:
    server = TLSServer(tmp_path_factory.mktemp("tls"))
    yield server
    server.server.remove()


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres@127.0.0.1:{port}/keys",
        "postgresql+psycopg://postgres@127.0.0.1:{port}/keys",
        "postgres://postgres@127.0.0.1:{port}/keys",
        "postgresql://postgres@127.0.0.1:{closed},127.0.0.1:{port}/keys",
        "postgresql://postgres@/keys?host=127.0.0.1,127.0.0.1&port={closed},{port}",
        "postgresql://postgres@/keys?host=127.0.0.1:{closed}&host=127.0.0.1:{port}",
        "postgresql://postgres@/keys?host=127.0.0.1&host=127.0.0.1&port={closed}&port={port}",
        "postgresql:///keys?host={sockets}&port={port}&user=postgres",
        "postgresql://postgres@{quoted_sockets}:{port}/keys",
        "postgresql://postgres@127.0.0.1:{port}/keys?connect_timeout=7",
        "postgresql://?service=keys",
        "postgresql:///?service=keys",
        "postgresql://",
        "postgresql://app@localhost:{port}/keys?passfile={passfile}",
    ],
)
async def test_every_way_of_connecting_reaches_the_server(
    server: TLSServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes, look-ups, leases and LISTEN, with one spelling for all of them."""
    service, passfile = tmp_path / "services", tmp_path / "passfile"
    service.write_text(f"[keys]\nhost=127.0.0.1\nport={server.port}\nuser=postgres\ndbname=keys\n")
    passfile.write_text(f"localhost:{server.port}:keys:app:word\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    if url == "postgresql://":
        for name, value in (("HOST", "127.0.0.1"), ("PORT", str(server.port))):
            monkeypatch.setenv(f"PG{name}", value)
        for name, value in (("USER", "postgres"), ("DATABASE", "keys")):
            monkeypatch.setenv(f"PG{name}", value)
    found = await reached(
        url.format(
            port=server.port,
            closed=free_port(),
            sockets=server.sockets,
            quoted_sockets=quote(server.sockets, safe=""),
            passfile=passfile,
        )
    )
    assert found == {"keys"}


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parameters", "setting", "value"),
    [
        ("options=-c%20search_path%3Da%20-c%20geqo%3Doff", "search_path", "a"),
        ("options=-csearch_path%3Db", "search_path", "b"),
        ("application_name=a%20shop", "application_name", "a shop"),
        ("application_name=a+shop", "application_name", "a+shop"),
        ("", "application_name", "keylatch"),
    ],
)
async def test_every_connection_has_the_parameters(
    server: TLSServer, parameters: str, setting: str, value: str
) -> None:
    """Blanks are blanks, and a plus is a plus."""
    url = f"postgresql://postgres@127.0.0.1:{server.port}/keys?{parameters}"
    assert await reached(url, func.current_setting(setting)) == {value}


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize("password", [PASSWORD, "with blank", "plus+", "per%cent", "word"])
async def test_a_password_may_have_any_character(server: TLSServer, password: str) -> None:
    """The server checks it on each connection. Another password is refused."""
    server.set_password(password)
    try:
        assert await reached(server.url("sslmode=require", password=password)) == {"keys"}
        with pytest.raises(StoreUnavailable):
            await reached(server.url("sslmode=require", password=f"{password}x"))
    finally:
        server.set_password("word")


IS_ENCRYPTED = literal_column(
    "(SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid())", type_=Boolean
)


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize(
    "parameters",
    [
        "sslmode=verify-full&sslrootcert={folder}/ca.crt",
        "sslmode=verify-full&sslrootcert={folder}/ca.crt&channel_binding=require",
        "sslmode=require&ssl_min_protocol_version=TLSv1.3",
    ],
)
async def test_every_connection_is_encrypted(server: TLSServer, parameters: str) -> None:
    """By the server's own account."""
    url = server.url(parameters.format(folder=server.folder))
    assert await reached(url, IS_ENCRYPTED) == {True}


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parameters", "host", "reason"),
    [
        ("sslmode=verify-full&sslrootcert={folder}/ca.crt", "127.0.0.1", "does not match host"),
        ("sslmode=verify-full&sslrootcert={folder}/other.crt", "localhost", "verify failed"),
        ("sslmode=verify-full&sslrootcert={folder}/no.crt", "localhost", "does not exist"),
        ("sslmode=disable", "localhost", "rejects connection"),
        ("sslmode=require&channel_binding=bogus", "localhost", "invalid channel_binding value"),
    ],
)
async def test_no_way_of_connecting_checks_less(
    server: TLSServer, parameters: str, host: str, reason: str
) -> None:
    """Another name, another CA, a missing one, no TLS: every connection is refused."""
    database = database_of(server.url(parameters.format(folder=server.folder), host=host))
    query = Query(select(func.current_database()))
    try:
        for connect in (
            lambda: database.fetch(query),
            lambda: database.fetch(query, seconds=5.0),
            lambda: database.read(lambda connection: connection.execute(query.statement).one()),
        ):
            with pytest.raises(StoreUnavailable, match=reason):
                await connect()
        with pytest.raises(StoreUnavailable, match="LISTEN on the store failed"):
            await database.listen("keylatch_test", lambda _: None)
    finally:
        await database.close()


@pytest.mark.long
@pytest.mark.anyio
async def test_a_client_certificate_is_used_by_every_connection(server: TLSServer) -> None:
    """Instead of a password; without it the server refuses."""
    folder = server.folder
    url = (
        f"postgresql://app@localhost:{server.port}/certificates"
        f"?sslmode=verify-full&sslrootcert={folder}/ca.crt"
    )
    certificate = f"&sslcert={folder}/client.crt&sslkey={folder}/client.key"
    assert await reached(url + certificate, IS_ENCRYPTED) == {True}
    with pytest.raises(StoreUnavailable):
        await reached(url)
