"""Several hosts in a store URL: the primary is found, whatever the others do."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from keylatch.storage.conninfo import connection_parameters, parameters_by_host
from keylatch.storage.hosts import Hosts
from keylatch.storage.store import NotFound, Store
from tests.support.servers import PostgresServer, free_port

pytestmark = pytest.mark.anyio

BOTH: dict[str, Any] = {"user": "u", "host": "a,b", "port": "1,2"}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [{}]),
        ({"host": "a"}, [{"host": "a"}]),
        (BOTH, [BOTH | {"host": "a", "port": "1"}, BOTH | {"host": "b", "port": "2"}]),
        ({"host": "a,b", "port": ","}, [{"host": "a", "port": ""}, {"host": "b", "port": ""}]),
        ({"host": "a,b", "port": "5"}, [{"host": "a", "port": "5"}, {"host": "b", "port": "5"}]),
        (
            {"host": "a,b", "hostaddr": "::1,::2"},
            [{"host": "a", "hostaddr": "::1"}, {"host": "b", "hostaddr": "::2"}],
        ),
    ],
)
async def test_each_host_has_its_own_parameters(
    parameters: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    """What has no list is the same for all hosts."""
    assert parameters_by_host(parameters) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"target_session_attrs": "prefer-standby"},
        {"load_balance_hosts": "random"},
        {"hostaddr": "::1"},  # libpq refuses it
    ],
)
async def test_where_the_order_is_another_one_psycopg_chooses(more: dict[str, Any]) -> None:
    """All standbys come before the primary, or the order is random."""
    parameters = BOTH | more
    assert parameters_by_host(parameters) == [parameters]


def target(url: str, **arguments: bool) -> object:
    return connection_parameters(url, **arguments).get("target_session_attrs")


async def test_of_several_hosts_the_primary_is_meant() -> None:
    """Unless the URL says something else, or a standby will do."""
    assert target("postgresql://a,b") == target("postgresql://?hostaddr=::1,::2") == "read-write"
    assert target("postgresql://a") is None
    assert target("postgresql://a,b?target_session_attrs=any") == "any"
    assert target("postgresql://a,b", needs_primary=False) is None


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A host that accepts connections and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        yield silent


@pytest.fixture
def url(postgres: PostgresServer, silent: socket.socket) -> str:
    """A store URL whose first host is silent."""
    port = silent.getsockname()[1]
    return postgres.new_database().replace("@", f"@127.0.0.1:{port},")


def connections(silent: socket.socket) -> int:
    """How many connections the silent host has got."""
    count = 0
    while True:
        try:
            silent.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


async def test_a_silent_host_delays_a_start_and_no_check(url: str, silent: socket.socket) -> None:
    """Its machine is gone, as after a failover. The host that answered is the first from then on,
    for look-ups, leases and changes."""
    store = Store(url)
    await store.open(0)
    assert connections(silent) == 1
    await store.leases.join("member", 0, seconds=1)
    assert (await store.leases.poll("member", 0, seconds=1)).is_member
    assert isinstance(await store.keys.find("key_unknown"), NotFound)
    await store.close()
    assert connections(silent) == 0


async def test_one_host_after_the_other_is_too_slow(url: str) -> None:
    """The broken twin: psycopg waits for a silent host until its time limit, which is as long as
    that of a look-up."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await psycopg.AsyncConnection.connect(url, connect_timeout=2)


async def test_an_attempt_that_is_not_needed_is_ended(url: str, silent: socket.socket) -> None:
    """The silent host sees the end of the connection, and no task is left."""
    hosts = Hosts(connection_parameters(url))
    before = asyncio.all_tasks()
    connection = await hosts.connect()
    abandoned, _ = silent.accept()
    abandoned.setblocking(True)
    abandoned.settimeout(20)
    with abandoned:
        while await asyncio.to_thread(abandoned.recv, 1024):  # the request of libpq, then the end
            pass
    assert asyncio.all_tasks() == before
    await connection.close()


async def test_a_caller_that_does_not_wait_leaves_nothing(silent: socket.socket) -> None:
    """Each query has a time limit of its own."""
    port = silent.getsockname()[1]
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await Hosts(connection_parameters(f"postgresql://127.0.0.1:{port}")).connect()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_the_error_tells_about_each_host() -> None:
    """In one line: only the first line of an error is shown."""
    ports = [free_port(), free_port()]
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    with pytest.raises(psycopg.OperationalError) as caught:
        await Hosts(connection_parameters(f"postgresql://u:secret@{hosts}")).connect()
    (line,) = str(caught.value).splitlines()
    assert [str(port) in line for port in ports] == [True, True]
    assert "secret" not in line


async def test_a_host_that_refuses_changes_is_passed_over(postgres: PostgresServer) -> None:
    """As a standby does: a role whose sessions are read-only stands for it."""
    url = postgres.new_database()
    database = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    both = url.replace("@", f"@127.0.0.1:{postgres.port},")
    with pytest.raises(psycopg.OperationalError, match="session is read-only"):
        await Hosts(connection_parameters(both)).connect()
    connection = await Hosts(connection_parameters(both, needs_primary=False)).connect()
    await connection.close()
