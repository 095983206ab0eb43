"""After a fork the child starts over, and neither of the two harms the other or the store."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import worker_forks
from tests.support.servers import RedisServer, eventually

pytestmark = pytest.mark.long

Order = Callable[..., Any]


@contextlib.contextmanager
def forking(store: str, redis: str = "") -> Iterator[tuple[Order, Order]]:
    """A process and the child that it forks on command: both execute commands."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for ours, _ in pairs:
            stack.enter_context(ours)
            ours.settimeout(10)
        fds = [theirs.fileno() for _, theirs in pairs]
        process = subprocess.Popen(
            [sys.executable, worker_forks.__file__, store, redis, *map(str, fds)],
            pass_fds=fds,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(os.killpg, process.pid, signal.SIGKILL)  # the child too
        for _, theirs in pairs:
            theirs.close()
        parent, child = (stack.enter_context(ours.makefile("rw")) for ours, _ in pairs)
        yield _commander(parent), _commander(child)


def _commander(lines: Any) -> Order:
    def order(command: str, argument: object = None) -> Any:
        lines.write(json.dumps([command, argument]) + "\n")
        lines.flush()
        return json.loads(lines.readline())

    return order


def integrity(store_url: str) -> str:
    with contextlib.closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def test_parent_and_child_both_check_and_a_revoke_is_seen_by_both(store_url: str) -> None:
    """When either revokes a key that both have cached, the other refuses it at once."""
    with forking(store_url) as (parent, child):
        (one_id, one), (other_id, other), (_, third) = (parent("create", "key") for _ in range(3))
        assert {parent("check", token) for token in (one, other, third)} == {"accepted"}
        parent("fork")
        assert {child("check", token) for token in (one, other, third)} == {"accepted"}

        child("revoke", one_id)
        assert (parent("check", one), child("check", one)) == ("REVOKED", "REVOKED")
        parent("revoke", other_id)
        assert (parent("check", other), child("check", other)) == ("REVOKED", "REVOKED")

        assert (parent("check", third), child("check", third)) == ("accepted", "accepted")
        for process in (child, parent):
            process("stop")
    assert integrity(store_url) == "ok"


def test_the_child_does_not_store_the_uses_that_the_parent_noted(store_url: str) -> None:
    """A use is stored by the process that saw it, once."""
    with forking(store_url) as (parent, child):
        (used_id, used), (unused_id, _) = parent("create", "used"), parent("create", "unused")
        parent("check", used)
        parent("fork")
        child("stop")
        assert not parent("was_used", used_id)
        parent("stop")
        assert parent("was_used", used_id)
        assert not parent("was_used", unused_id)


@pytest.mark.parametrize("first", ["parent", "child"])
def test_who_stops_first_takes_nothing_from_the_other(store_url: str, first: str) -> None:
    """After one has stopped, the other's changes still reach the store, and it sees all others'."""
    with forking(store_url) as (parent, child), forking(store_url) as (unrelated, _):
        (one_id, one), (other_id, other) = (parent("create", "key") for _ in range(2))
        parent("fork")
        assert (child("check", one), parent("check", one)) == ("accepted", "accepted")
        left, stopping = (child, parent) if first == "parent" else (parent, child)
        stopping("stop")

        left("revoke", one_id)
        _, new = left("create", "new")
        assert (unrelated("check", one), unrelated("check", new)) == ("REVOKED", "accepted")
        assert left("check", other) == "accepted"
        unrelated("revoke", other_id)
        assert left("check", other) == "REVOKED"
    assert integrity(store_url) == "ok"


def test_a_fork_amid_writes_leaves_the_child_able_to_read_and_write(store_url: str) -> None:
    """Locks that other threads of the parent hold at that moment bind the parent alone."""
    with forking(store_url) as (parent, child):
        (key_id, key) = parent("create", "key")
        parent("fork_amid_writes", 40)
        assert child("check", key) == "accepted"
        child("revoke", key_id)
        assert (parent("check", key), child("check", key)) == ("REVOKED", "REVOKED")
    assert integrity(store_url) == "ok"


@pytest.mark.service("redis")
def test_the_parent_keeps_its_connection_to_redis(
    store_url: str, redis_server: RedisServer
) -> None:
    """The child drops the connection that it inherited without a word to the parent or Redis."""
    with (
        forking(store_url, redis_server.url) as (parent, child),
        forking(store_url, redis_server.url) as (unrelated, _),
        redis_server.client() as redis,
    ):
        tokens = [unrelated("create", "key")[1] for _ in range(5)]
        assert parent("check", tokens[0]) == "accepted"  # so the parent has a connection
        parent("fork")
        assert child("check", tokens[0]) == "accepted"
        assert {unrelated("check", token) for token in tokens} == {"accepted"}
        eventually(lambda: redis.dbsize() == len(tokens))

        for process in (parent, child):
            hits = redis.info("stats")["keyspace_hits"]
            assert {process("check", token) for token in tokens[1:]} == {"accepted"}
            assert redis.info("stats")["keyspace_hits"] == hits + len(tokens) - 1
