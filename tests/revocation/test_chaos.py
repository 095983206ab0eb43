"""The chaos run: it applies every fault, catches the twin, and finds keylatch's promises kept.

What judges and what draws is tested on its own first: a judge that sees nothing proves nothing.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import run
from faults import FAULTS
from judge import BUCKET_NS, SECOND_NS, Interval, Ledger, Loss, Revoke, percentiles
from proxy import Proxy
from schedule import FAILOVERS, WEIGHTS, draw
from tests.support.servers import require_program

pytestmark = pytest.mark.long

X = 500
ProxiedConnection = tuple[Proxy, asyncio.StreamReader, asyncio.StreamWriter]


def ledger_of(revoke: Revoke) -> Ledger:
    """A ledger with one revoked key."""
    return Ledger(X, {"key": revoke})


# The judge


@pytest.mark.parametrize(("start", "late"), [(299, {}), (300, {}), (301, {("key", "w"): 1})])
def test_what_starts_after_the_answer_must_be_refused(
    start: int, late: dict[tuple[str, str], int]
) -> None:
    """An acceptance counts by its START."""
    ledger = ledger_of(Revoke(requested=100, committed=200, answered=300, waited=True))
    ledger.observe("w", [["key", 1, 0, 0, start, 0]])
    ledger.close()
    assert ledger.after_answer == late


@pytest.mark.parametrize(("start", "late"), [(700, {}), (701, {("key", "w"): 1})])
def test_nothing_is_accepted_later_than_a_lease_after_the_commit(
    start: int, late: dict[tuple[str, str], int]
) -> None:
    """A caller that did not wait has the bound of the receipt; the commit counts anyway."""
    ledger = ledger_of(Revoke(requested=100, committed=200, answered=210, bound_ns=X))
    ledger.observe("w", [["key", 1, 0, 0, start, 0]])
    ledger.close()
    assert ledger.after_bound == late
    assert ledger.after_answer == {}


@pytest.mark.parametrize(("end", "wrong"), [(99, True), (101, False)])
def test_a_refusal_before_the_revoke_was_requested_is_wrong(end: int, wrong: bool) -> None:
    """A refusal counts by its END; a key that is never revoked is never refused."""
    ledger = ledger_of(Revoke(requested=100, committed=200, answered=300))
    ledger.observe("w", [["key", 1, 1, 0, 50, end], ["live", 0, 1, 0, 0, end]])
    ledger.close()
    assert (("key", "w") in ledger.refused_before) == wrong
    assert ("live", "w") in ledger.refused_before


def test_facts_of_several_reports_are_one_story() -> None:
    """The latest acceptance and the earliest refusal count, in whatever order they arrive."""
    ledger = ledger_of(Revoke(requested=100, committed=200, answered=300))
    ledger.observe("w", [["key", 2, 1, 0, 90, 250]])
    ledger.observe("w", [["key", 3, 4, 0, 80, 240]])
    ledger.close({"key"})
    assert (ledger.accepted, ledger.refused, ledger.observed_pairs) == (5, 5, 1)
    ledger.observe("w", [["key", 1, 0, 0, 305, 0]])  # reported late
    ledger.close()
    assert ledger.after_answer == {("key", "w"): 5}


@pytest.mark.parametrize(
    ("start", "late", "excused"),
    [
        (999, True, False),  # before the failover the members still had what was acknowledged
        (1_000, False, True),
        (1_000 + X + SECOND_NS, False, True),
        (1_001 + X + SECOND_NS, True, False),
    ],
)
def test_a_lost_revoke_is_repeated_within_a_lease(start: int, late: bool, excused: bool) -> None:
    """A failover lost the commit: from then on the processes have a lease period, and a second, to
    revoke the key again. A revoke whose commit was not lost has no such excuse."""
    ledger = ledger_of(Revoke(requested=100, committed=200, answered=300, waited=True))
    ledger.revokes["kept"] = Revoke(requested=1, committed=2, answered=3, waited=True)
    ledger.losses.append(Loss(150, 1_000))
    ledger.observe("w", [[key, 1, 0, 0, start, 0] for key in ("key", "kept")])
    ledger.close()
    assert (("key", "w") in ledger.after_answer) == late
    assert (("key", "w") in ledger.accepted_after_loss) == excused
    assert ("kept", "w") in ledger.after_answer


@pytest.mark.parametrize(
    ("created", "refused", "wrong"),
    [
        (1_000, 1_000 + X + SECOND_NS, False),
        (1_000, 1_001 + X + SECOND_NS, True),  # no lease of the old primary runs any more
        (999, 1_001, True),  # the old primary had it
    ],
)
def test_an_old_primary_does_not_know_a_new_key(created: int, refused: int, wrong: bool) -> None:
    """A key of the new primary may be refused by a process at the old one, for a lease period."""
    ledger = Ledger(X, created={"key": created}, splits=[1_000])
    ledger.observe("w", [["key", 0, 1, 0, 0, refused]])
    ledger.close()
    assert (("key", "w") in ledger.refused_before) == wrong
    assert (("key", "w") in ledger.unknown_after_split) != wrong


def test_a_key_whose_creation_was_lost_is_not_judged() -> None:
    """The new primary does not know it, so its refusal is right; a key from before is judged."""
    ledger = Ledger(X, created={"old": 1, "lost": 10 * SECOND_NS})
    ledger.losses.append(Loss(9 * SECOND_NS, 11 * SECOND_NS))
    ledger.observe("w", [[key, 1, 1, 0, 50, 60] for key in ("old", "lost")])
    ledger.close()
    assert set(ledger.refused_before) == {("old", "w")}
    assert ledger.lost_keys == {"lost"}


def test_a_503_needs_a_fault_of_that_process() -> None:
    """A fault of one worker excuses no other one, and no fault of Redis excuses any."""
    ledger = Ledger(X)
    faults = [
        Interval("store connections reset", 100 * BUCKET_NS, 110 * BUCKET_NS, "worker-0"),
        Interval("redis paused", 100 * BUCKET_NS, 300 * BUCKET_NS, ""),
        Interval("store restarted", 200 * BUCKET_NS, 201 * BUCKET_NS, "all"),
    ]
    ledger.count_undecided("worker-0#1", [(105, 1), (119, 2), (150, 4)])
    ledger.count_undecided("worker-1#2/4711", [(105, 8), (202, 16)])
    assert sum(ledger.unexplained(faults, 10 * BUCKET_NS).values()) == 4 + 8
    assert ledger.checks == 31


def test_percentiles_of_few() -> None:
    """Nothing is invented where there is nothing to order."""
    assert percentiles([]) == {"p50": None, "p99": None, "max": None}
    assert percentiles([1.0, 3.0])["p50"] == 2.0


# The schedule


def test_a_seed_reproduces_the_schedule() -> None:
    """The same seed, the same faults; another seed, others; every kind, and none in the calm."""
    faults = draw(7, 100, 120.0, 1.2)
    assert faults == draw(7, 100, 120.0, 1.2)
    assert faults != draw(8, 100, 120.0, 1.2)
    assert {fault.kind for fault in faults} == set(WEIGHTS)
    assert set(FAULTS) == set(WEIGHTS) | set(FAILOVERS)
    assert all(fault.at % 60 > 6 and 0.1 <= fault.seconds <= 1.2 for fault in faults)


def test_one_kind_can_be_chosen() -> None:
    """For looking into what it does."""
    assert {fault.kind for fault in draw(1, 9, 9.0, 1.2, only="restarted")} == {"store restarted"}


# The proxy


@pytest.fixture
async def proxied() -> AsyncIterator[ProxiedConnection]:
    """A proxy in front of an echo, and a connection through it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(server.sockets[0].getsockname()[1])
    await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    yield proxy, reader, writer
    writer.close()
    await proxy.stop()
    server.close()


@pytest.mark.anyio
async def test_what_is_held_arrives_later(proxied: ProxiedConnection) -> None:
    """A partition that heals loses nothing."""
    proxy, reader, writer = proxied
    with proxy.held():
        writer.write(b"late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(4), 0.1)
    assert await reader.readexactly(4) == b"late"


@pytest.mark.anyio
async def test_what_is_swallowed_never_arrives(proxied: ProxiedConnection) -> None:
    """A connection that lost bytes stays dead; a new one lives."""
    proxy, reader, writer = proxied
    with proxy.blackholing():
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
    writer.write(b"more")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    fresh, again = await asyncio.open_connection("127.0.0.1", proxy.port)
    again.write(b"anew")
    assert await fresh.readexactly(4) == b"anew"
    again.close()


@pytest.mark.anyio
async def test_what_is_refused_is_reset(proxied: ProxiedConnection) -> None:
    """The connection breaks at once, and each new one too."""
    proxy, reader, _ = proxied
    with proxy.resetting():
        assert await is_broken(reader)
        fresh, again = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await is_broken(fresh)
        again.close()


async def is_broken(reader: asyncio.StreamReader) -> bool:
    """Whether nothing comes any more."""
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


@pytest.mark.anyio
async def test_answers_can_be_slow(proxied: ProxiedConnection) -> None:
    """The request is not delayed."""
    proxy, reader, writer = proxied
    with proxy.slow(0.1):
        began = time.monotonic()
        writer.write(b"slow")
        assert await reader.readexactly(4) == b"slow"
        assert time.monotonic() - began >= 0.1


# The run


def chaos(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a run and what it found."""
    require_program(shutil.which("redis-server"), "redis-server")
    postgres = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    require_program(str(postgres[-1]) if postgres else None, "postgresql")
    found = folder / "found.json"
    ran = subprocess.run(
        [sys.executable, run.__file__, "--json", str(found), *options],
        stdout=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    assert found.exists(), ran.stdout
    return ran.returncode, json.loads(found.read_text())


def test_no_promise_breaks_under_any_kind_of_fault(tmp_path: Path) -> None:
    """Every kind is applied, and goes as planned; nothing is accepted late or refused wrongly."""
    code, found = chaos(tmp_path, "--quick")
    assert set(found["faults"]) == set(WEIGHTS)
    assert found["faults that did not go as planned"] == []
    assert found["broken"] == []
    assert found["sides"]["keylatch"]["accepted after the answer"] == 0
    assert found["sides"]["keylatch"]["accepted after commit + X"] == 0
    assert found["sides"]["keylatch"]["false 401"] == 0
    assert found["sides"]["keylatch"]["pairs of revoke and process seen before and after"] > 0
    assert code == 0


def test_a_lost_notice_is_enough_to_catch_the_twin(tmp_path: Path) -> None:
    """Workers without notices: the twin goes on accepting, keylatch only takes longer."""
    code, found = chaos(tmp_path, "--faults=12", "--seconds=6", "--only=worker cut from redis")
    assert found["sides"]["naive"]["accepted after the answer"] > 0
    assert found["sides"]["keylatch"]["accepted after the answer"] == 0
    assert found["sides"]["keylatch"]["false 401"] == 0
    assert code == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", sorted(FAILOVERS))
def test_no_promise_breaks_at_a_failover(kind: str, tmp_path: Path) -> None:
    """Three nodes of PostgreSQL, and the standby takes over: with every commit, beside an old
    primary that lives on, and without the last commits. `make chaos` has them among all others."""
    _, found = chaos(tmp_path, "--faults=2", "--seconds=14", f"--only={kind}", "--workers=2")
    assert found["faults that did not go as planned"] == []
    assert found["broken"] == []
    assert found["sides"]["keylatch"]["pairs of revoke and process seen before and after"] > 0
    assert found["twin caught"] or kind == "store failed over, nothing lost"
