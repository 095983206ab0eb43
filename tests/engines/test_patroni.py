"""Patroni with `synchronous_mode`: a switchover, and a primary whose Patroni was killed."""

from typing import Any

import pytest

from tests.support.members import REFUSED, Deployment
from tests.support.patroni import PatroniCluster
from tests.support.postgresql_cluster import Machines
from tests.support.servers import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture
def patroni(machines: Machines) -> PatroniCluster:
    return machines.add(PatroniCluster())


def test_a_switchover_is_no_event(patroni: PatroniCluster, deployment: Deployment) -> None:
    """Members with the list of hosts, and one behind HAProxy: revokes before and after it hold, all
    members are ready again without a restart, and none raises an alarm."""
    a, h = deployment.start(A=patroni.url_of_all, H=patroni.url)
    keys = a.create_keys(deployment.admin, 12)
    stays = a.create_keys(deployment.admin, 2)
    deployment.check(keys | stays)
    first, second = dict(list(keys.items())[:6]), dict(list(keys.items())[6:])
    ends = h.revoke_all(deployment.admin, first)
    patroni.switch_over()
    eventually(lambda: a.is_ready and h.is_ready)
    for member, chosen in ((a, list(second)[:3]), (h, list(second)[3:])):
        for key_id in chosen:
            ends[key_id] = revoke_until_answered(member, deployment.admin, key_id)
    deployment.wait_for_rounds()
    deployment.report("Patroni, switchover", ends)
    assert deployment.accepted_after(ends) == []
    assert not keys.keys() & patroni.primary.live_keys()
    for checks in deployment.checks:
        assert checks.last_statuses(keys) == {REFUSED: 12}
        assert checks.statuses(keys=stays)[REFUSED] == 0
    assert a.alarms() + h.alarms() == []


def revoke_until_answered(member: Any, admin: str, key_id: str) -> float:
    """When it was; a DELETE is repeated while the store cannot be reached."""
    answers = []

    def is_answered() -> bool:
        answers.append(member.delete(admin, key_id))
        return bool(answers[-1].status == 200)

    eventually(is_answered)
    return float(answers[-1].ended)


def test_an_orphaned_primary_grants_no_lease(
    patroni: PatroniCluster, deployment: Deployment
) -> None:
    """kill -9 of the primary's Patroni: PostgreSQL goes on, and after `ttl` there are two
    primaries. Members with the list of hosts stay at the orphan, the one behind HAProxy moves and
    revokes: no member accepts those keys after the answer."""
    a, _, h = deployment.start(A=patroni.url_of_all, B=patroni.url_of_all, H=patroni.url)
    keys = a.create_keys(deployment.admin, 3)
    deployment.check(keys)
    orphan = patroni.primary
    orphan.kill_patroni()
    primary = patroni.wait_for_another(orphan)
    assert orphan.query("SELECT pg_is_in_recovery()") == [(False,)]  # the trial is one
    eventually(lambda: h.is_ready)
    ends = {key_id: revoke_until_answered(h, deployment.admin, key_id) for key_id in keys}
    assert not keys.keys() & primary.live_keys()
    deployment.let_leases_pass(3)
    deployment.wait_for_rounds()
    deployment.report("Patroni, orphaned primary", ends)
    assert deployment.accepted_after(ends) == []
