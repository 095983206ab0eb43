"""Two primaries: a standby was promoted while the old primary lives on with a member beside it."""

import pytest

from tests.support.members import ACCEPTED, REFUSED, UNAVAILABLE, Deployment
from tests.support.postgresql_cluster import Machines
from tests.support.servers import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def split(machines: Machines, deployment: Deployment, *, synchronous: bool) -> dict[str, float]:
    """A stays with the old primary and B goes with the new one, where it revokes all keys; key id →
    when that was answered."""
    primary, standby = machines.pair(synchronous=synchronous)
    ways = [machines.way(primary) for _ in "AB"]
    a, b = deployment.start(A=ways[0].url, B=ways[1].url)
    keys = a.create_keys(deployment.admin, 5)
    deployment.check(keys)
    standby.stop_replication()
    standby.promote()
    ways[1].lead_to(standby.port)
    eventually(lambda: b.is_ready)
    deployment.let_leases_pass(0.5)
    ends = b.revoke_all(deployment.admin, keys)
    deployment.let_leases_pass(3)
    deployment.wait_for_rounds()
    deployment.report(f"split brain, {'' if synchronous else 'a'}synchronous", ends)
    return ends


def test_an_old_primary_with_a_synchronous_standby_grants_no_lease(
    machines: Machines, deployment: Deployment
) -> None:
    """A lease waits for the standby as every commit does, so the old primary can grant none. The
    member beside it accepts no key that the new primary revoked, and says that it is not ready."""
    ends = split(machines, deployment, synchronous=True)
    a, b = deployment.members
    assert deployment.accepted_after(ends) == []
    at_a, at_b = deployment.checks
    assert at_a.last_statuses(ends) == {UNAVAILABLE: 5}
    assert at_b.last_statuses(ends) == {REFUSED: 5}
    assert not a.is_ready
    assert b.is_ready


def test_an_old_primary_without_one_cannot_be_told_from_the_primary(
    machines: Machines, deployment: Deployment
) -> None:
    """The twin of the test above, and a limit that is documented: nothing inside of PostgreSQL
    stops an old primary that commits on its own. The doctor warns of such a deployment."""
    ends = split(machines, deployment, synchronous=False)
    assert deployment.accepted_after(ends) != []
    assert deployment.checks[0].last_statuses(ends) == {ACCEPTED: 5}


def test_the_doctor_warns_of_a_standby_that_commits_do_not_wait_for(
    machines: Machines, deployment: Deployment
) -> None:
    """A primary has a standby, and none is synchronous: then a failover can lose what was answered.
    With a synchronous one there is nothing to warn of."""
    primary, _ = machines.pair(synchronous=False)
    (a,) = deployment.start(A=primary.url)

    def warnings() -> list[str]:
        return [said for said in a.findings("warning") if "synchronous" in said]

    assert warnings() != []
    primary.wait_for_standby()
    assert warnings() == []
