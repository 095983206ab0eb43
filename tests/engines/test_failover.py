"""Failover of PostgreSQL: what a DELETE answered stays true, whichever server takes over.

Each test prints what it counted. `--full` repeats the failovers that depend on chance 20 times.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import worker_numbers
from tests.support.engines import Times
from tests.support.members import ACCEPTED, REFUSED, UNAVAILABLE, Deployment, Member
from tests.support.postgresql_cluster import Machines, Node, url_of_all
from tests.support.servers import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def assert_alarm_names(member: Member, keys: Iterable[str]) -> None:
    """The log of a member has an alarm that names each of these keys."""
    alarms = "\n".join(member.alarms())
    assert [key_id for key_id in keys if key_id not in alarms] == [], f"{member.name}: {alarms}"


# Revokes that a standby never received


def test_an_acknowledged_revoke_survives_an_asynchronous_failover(
    machines: Machines, deployment: Deployment
) -> None:
    """Revokes were answered, and the standby that took over has none of them. The members remember
    them: none accepts such a key for a moment, they name the keys, and they revoke them again in
    the new primary, so that a new process refuses them as well."""
    primary, standby = machines.pair(synchronous=False)
    url = url_of_all(primary, standby)
    a, b = deployment.start(A=url, B=url)
    lost = a.create_keys(deployment.admin, 5)
    stays = a.create_keys(deployment.admin, 3)
    deployment.check(lost | stays)
    standby.stop_replication()
    ends = b.revoke_all(deployment.admin, lost)
    deployment.wait_for_rounds()
    assert lost.keys() <= standby.live_keys()  # the trial is one: the standby lacks the revokes
    primary.kill()
    killed = time.monotonic() - max(ends.values())
    standby.promote()
    promoted = time.monotonic() - max(ends.values())
    eventually(lambda: a.is_ready and b.is_ready)
    deployment.let_leases_pass()
    deployment.wait_for_rounds(4)
    c = deployment.add("C", url)
    when = f"killed {killed:.2f} s and promoted {promoted:.2f} s after the last answer"
    deployment.report(f"asynchronous failover, {when}", ends)
    assert not lost.keys() & standby.live_keys()
    assert deployment.accepted_after(ends) == []
    assert [checks.last_statuses(lost) for checks in deployment.checks] == [{REFUSED: 5}] * 2
    assert c.statuses(lost.values()) == {REFUSED: 5}
    assert c.statuses(stays.values()) == {ACCEPTED: 3}
    for member in (a, b):
        assert_alarm_names(member, lost)
        assert member.metric("keylatch_store_restored_total", deployment.admin) == 1


@dataclass(frozen=True)
class Overtaken:
    """A new primary that has given out again the numbers that were lost.

    Args:
        primary: the new one.
        ends: key id → when its revoke was answered, by the old primary or by the new one.
        lost: key ids of those whose revoke was lost.
        stays: key ids that nothing has revoked.
    """

    primary: Node
    ends: dict[str, float]
    lost: list[str]
    stays: list[str]


def overtake(machines: Machines, deployment: Deployment) -> Overtaken:
    """Two members come to the new primary late, when it has made more changes than were lost."""
    primary, standby = machines.pair(synchronous=False)
    ways = [machines.way(primary) for _ in "AB"]
    a, b = deployment.start(A=ways[0].url, B=ways[1].url)
    keys = a.create_keys(deployment.admin, 3)
    others = a.create_keys(deployment.admin, 5)
    stays = a.create_keys(deployment.admin, 2)
    deployment.check(keys | others | stays)
    standby.stop_replication()
    ends = b.revoke_all(deployment.admin, keys)
    seq = primary.seq()
    primary.kill()
    standby.promote()
    d = deployment.add("D", standby.url)
    ends |= d.revoke_all(deployment.admin, others)
    assert standby.seq() > seq  # the trial is one: it has overtaken what was known
    for way in ways:
        way.lead_to(standby.port)
    eventually(lambda: a.is_ready and b.is_ready)
    deployment.let_leases_pass(2)
    deployment.wait_for_rounds(4)
    deployment.report("overtaken", ends)
    return Overtaken(standby, ends, list(keys), list(stays))


def test_a_new_primary_that_gives_out_the_numbers_again_is_noticed(
    machines: Machines, deployment: Deployment
) -> None:
    """The members refuse what the new primary revoked and what was lost, and raise the alarm."""
    found = overtake(machines, deployment)
    assert deployment.accepted_after(found.ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(found.ends) == {REFUSED: len(found.ends)}
        assert checks.last_statuses(found.stays) == {ACCEPTED: 2}
        assert_alarm_names(checks.member, found.lost)
    assert not found.ends.keys() & found.primary.live_keys()


def test_members_that_trust_numbers_do_not_notice(
    machines: Machines, deployment: Deployment
) -> None:
    """The twin: it compares sequence numbers only. It goes on accepting what the new primary has
    revoked, and raises no alarm."""
    deployment.command = (sys.executable, worker_numbers.__file__)
    found = overtake(machines, deployment)
    assert deployment.accepted_after(found.ends) != []
    assert [checks.member.alarms() for checks in deployment.checks] == [[], []]


@pytest.mark.timeout(1_800)
def test_a_busy_deployment_notices_every_failover(times: Times, tmp_path: Path) -> None:
    """No address is moved: three members have both hosts in their URL, and one of them makes
    keys from four threads all the while, so the lost numbers are given out again at once. All
    members notice in each failover, and none accepts what either primary revoked."""
    rounds = times(2, 20)
    seen = []
    for number in range(rounds):
        with Machines() as machines:
            deployment = machines.add(Deployment(tmp_path / str(number)))
            seen.append(fail_over_while_busy(machines, deployment))
    print("noticed by members, accepted after the answer:", seen)
    assert [noticed for noticed, _ in seen] == [3] * rounds
    assert [accepted for _, accepted in seen] == [[]] * rounds


def fail_over_while_busy(machines: Machines, deployment: Deployment) -> tuple[int, list[str]]:
    """How many members raised the alarm, and what was accepted after its revoke was answered."""
    primary, standby = machines.pair(synchronous=False)
    url = url_of_all(primary, standby)
    a, b, c = deployment.start(A=url, B=url, C=url)
    keys = a.create_keys(deployment.admin, 2)
    others = a.create_keys(deployment.admin, 2)
    deployment.check(keys | others, a, b)
    standby.stop_replication()
    ends = b.revoke_all(deployment.admin, keys)
    primary.kill()
    with creating_keys(c, deployment.admin, threads=4) as created:
        standby.promote()
        eventually(lambda: created[ACCEPTED] > 20)
        ends |= c.revoke_all(deployment.admin, others)
        deployment.let_leases_pass(2)
    eventually(lambda: a.is_ready and b.is_ready)
    deployment.wait_for_rounds(4)
    deployment.report(f"busy: {dict(created)} keys made meanwhile", ends)
    for checks in deployment.checks:
        assert checks.last_statuses(ends) == {REFUSED: 4}
    return sum(bool(member.alarms()) for member in (a, b, c)), deployment.accepted_after(ends)


@contextmanager
def creating_keys(member: Member, admin: str, threads: int) -> Iterator[Counter[int]]:
    """Keys are made without a pause until the end of the block; how often with which status."""
    is_over = threading.Event()
    made: Counter[int] = Counter()

    def create() -> None:
        while not is_over.is_set():
            body = {"name": "busy", "permission": "FULL"}
            made[member.request("POST", "/v1/api-keys", admin, body).status] += 1

    creating = [threading.Thread(target=create) for _ in range(threads)]
    for thread in creating:
        thread.start()
    try:
        yield made
    finally:
        is_over.set()
        for thread in creating:
            thread.join()


# Nothing is lost


@pytest.mark.parametrize("is_planned", [False, True], ids=["kill -9", "switchover"])
def test_a_synchronous_failover_loses_no_revoke(
    is_planned: bool, machines: Machines, deployment: Deployment
) -> None:
    """The primary goes amid revokes and its synchronous standby takes over: no answered revoke is
    undone, no revoked key is accepted, the members are ready again without a restart, and none of
    them raises an alarm."""
    primary, standby = machines.pair(synchronous=True)
    url = url_of_all(primary, standby)
    a, b = deployment.start(A=url, B=url)
    keys = a.create_keys(deployment.admin, 40)
    stays = a.create_keys(deployment.admin, 2)
    deployment.check(keys | stays)
    ends: dict[str, float] = {}
    statuses: Counter[int] = Counter()

    def revoke() -> None:
        for key_id in keys:
            while (answer := b.delete(deployment.admin, key_id)).status != ACCEPTED:
                statuses[answer.status] += 1
                deployment.let_leases_pass(0.05)
            ends[key_id] = answer.ended

    revoking = threading.Thread(target=revoke)
    revoking.start()
    eventually(lambda: len(ends) >= 10)
    if is_planned:
        primary.shut_down()
    else:
        primary.kill()
    before = dict(ends)
    standby.promote()
    assert not before.keys() & standby.live_keys()
    revoking.join(60)
    assert len(ends) == 40
    deployment.wait_for_rounds(4)
    deployment.report(f"synchronous failover ({len(before)} before it, {dict(statuses)})", ends)
    assert deployment.accepted_after(ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(keys) == {REFUSED: 40}
        assert checks.last_statuses(stays) == {ACCEPTED: 2}
        assert checks.statuses(keys=stays)[REFUSED] == 0
    assert a.is_ready
    assert b.is_ready
    assert a.alarms() + b.alarms() == []


# Leases that the new primary does not know


def test_a_membership_that_was_not_replicated_is_waited_for(
    machines: Machines, tmp_path: Path
) -> None:
    """A member joined after the standby had stopped to receive anything, and is cut off before the
    failover: the new primary has never heard of it, and its lease still runs. A DELETE there waits
    until it is over."""
    deployment = machines.add(Deployment(tmp_path, lease_seconds=5))
    primary, standby = machines.pair(synchronous=False)
    (seed,) = deployment.start(seed=primary.url)
    keys = seed.create_keys(deployment.admin, 1)
    seed.stop()
    eventually(lambda: keys.keys() <= standby.live_keys())
    standby.stop_replication()
    way = machines.way(primary)
    a = deployment.add("A", way.url)
    deployment.check(keys, a)
    way.close()
    primary.kill()
    standby.promote()
    b = deployment.add("B", standby.url)
    ends = b.revoke_all(deployment.admin, keys)
    deployment.let_leases_pass()
    deployment.wait_for_rounds()
    deployment.report("a member that was not replicated", ends)
    assert deployment.accepted_after(ends) == []
    assert deployment.checks[0].last_statuses(ends) == {UNAVAILABLE: 1}


# Connections that lead to the wrong server


def test_a_process_that_was_led_to_a_standby_recovers(
    machines: Machines, deployment: Deployment
) -> None:
    """A name that still leads to a standby: checks are 503 and never 401, `/readyz` is 503. When it
    leads to the primary again, checks and changes work without a restart, though the connections to
    the standby are not cut; also for a process that was started there."""
    primary, standby = machines.pair(synchronous=False)
    (seed,) = deployment.start(seed=primary.url)
    ((key_id, token),) = seed.create_keys(deployment.admin, 1).items()
    eventually(lambda: key_id in standby.live_keys())
    way = machines.way(standby)
    a = deployment.add("A", way.url, waits=False)
    a.wait_until_alive()
    assert a.statuses([token] * 10) == {UNAVAILABLE: 10}
    way.lead_to(primary.port, cut=False)
    a.wait_until_ready()
    eventually(lambda: a.check(token) == ACCEPTED)
    assert change(a, deployment.admin, times=8) == {ACCEPTED: 8}

    (checks,) = deployment.check({key_id: token}, a)
    way.lead_to(standby.port)
    eventually(lambda: not a.is_ready)
    deployment.let_leases_pass(2)
    answers = change(a, deployment.admin, times=4)
    way.lead_to(primary.port, cut=False)
    a.wait_until_ready()
    deployment.let_leases_pass()
    deployment.report(f"led to a standby; changes there: {dict(answers)}", {})
    assert answers == {UNAVAILABLE: 4}
    assert set(checks.statuses()) == {ACCEPTED, UNAVAILABLE}
    assert change(a, deployment.admin, times=8) == {ACCEPTED: 8}


def change(member: Member, admin: str, times: int) -> Counter[int]:
    """The statuses of so many keys that are to be made."""
    body = {"name": "a key", "permission": "FULL"}
    return Counter(member.request("POST", "/v1/api-keys", admin, body).status for _ in range(times))


# A synchronous standby that is gone

MOST_CONNECTIONS = 6
"""Of one process, as the documentation states them."""


def test_a_missing_synchronous_standby_piles_up_no_server_processes(
    machines: Machines, deployment: Deployment
) -> None:
    """Nothing can be committed while the only synchronous standby is gone: changes are 503, and the
    server's processes stay bounded. No key is refused with 401. When the operator gives the standby
    up, the members go on, and so does one that was started meanwhile."""
    primary, standby = machines.pair(synchronous=True)
    a, b = deployment.start(A=primary.url, B=primary.url)
    keys = a.create_keys(deployment.admin, 20)
    (checks,) = deployment.check(a.create_keys(deployment.admin, 3), a)
    at_rest = primary.connections()
    standby.kill()
    c = deployment.add("C", primary.url, waits=False)
    peak = [at_rest]
    deleting = [
        threading.Thread(target=b.delete, args=(deployment.admin, key_id)) for key_id in keys
    ]
    for thread in deleting:
        thread.start()
        deployment.let_leases_pass(0.4)
        peak.append(primary.connections())
    for thread in deleting:
        thread.join()
    deployment.let_leases_pass(3)
    left = primary.connections()
    waiting = primary.query("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
    primary.configure("synchronous_standby_names", "")
    for member in (a, b, c):
        member.wait_until_ready()
    deployment.wait_for_rounds()
    deployment.report(
        f"connections: {at_rest} at rest, {max(peak)} at most, {left} after the DELETEs; {waiting}",
        {},
    )
    assert max(peak) <= 3 * MOST_CONNECTIONS
    assert left <= at_rest + MOST_CONNECTIONS
    assert set(checks.statuses()) <= {ACCEPTED, UNAVAILABLE}
