"""Members far from the primary: 20 to 250 ms of round trip between them and PostgreSQL."""

import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.members import ACCEPTED, REFUSED, Deployment, Member, at_once
from tests.support.postgresql_cluster import Machines

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROUND_TRIPS_MS = (0, 20, 50, 100, 250)


def test_members_at_a_distance_start_check_and_revoke(machines: Machines, tmp_path: Path) -> None:
    """All start at the same time on an empty store's schema, check keys that they have not seen,
    and revoke; a revoke through any of them is true at all of them when it is answered."""
    primary = machines.primary()
    deployment = machines.add(Deployment(tmp_path, lease_seconds=3))
    near = deployment.start(near=primary.url)[0]
    keys = near.create_keys(deployment.admin, 8)
    began = time.monotonic()
    far = {
        ms: deployment.add(f"{ms} ms", machines.way(primary, ms / 1000).url, waits=False)
        for ms in ROUND_TRIPS_MS
    }
    ready = times_until_ready(far, began)
    cold = {}
    for ms, member in far.items():
        began = time.monotonic()
        statuses = member.statuses(list(keys.values())[:3])
        assert statuses == {ACCEPTED: 3}, f"{ms} ms: {statuses}: {member.log()}"
        cold[ms] = (time.monotonic() - began) / 3
    stays = near.create_keys(deployment.admin, 2)
    deployment.check(keys | stays)
    took, ends = {}, {}
    for key_id, (ms, member) in zip(keys, [(-1, near), *far.items()], strict=False):
        answer = member.delete(deployment.admin, key_id)
        assert answer.status == ACCEPTED, f"{ms} ms: {answer.body}"
        took[ms], ends[key_id] = answer.ended - answer.began, answer.ended
    deployment.wait_for_rounds()
    deployment.report("members at a distance", ends)
    print("round trip | ready after | cold check | DELETE through it")
    for ms in ROUND_TRIPS_MS:
        print(f"{ms:7} ms | {ready[ms]:9.1f} s | {cold[ms] * 1e3:7.0f} ms | {took[ms]:.2f} s")
    assert deployment.accepted_after(ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(ends) == {REFUSED: len(ends)}
        assert set(checks.statuses(keys=stays)) == {ACCEPTED}


def times_until_ready(members: dict[int, Member], began: float) -> dict[int, float]:
    """Distance in ms → seconds until the member was ready."""

    def wait(ms: int, member: Member) -> tuple[int, float]:
        try:
            member.wait_until_ready()
        except AssertionError:
            pytest.fail(f"a member {ms} ms from the primary is not ready: {member.log()}")
        return ms, time.monotonic() - began

    return dict(at_once([partial(wait, *each) for each in members.items()]))
