"""pgpool-II with load balancing and a standby that lags: a read there is no answer."""

import pytest

from tests.support.members import ACCEPTED, REFUSED, Deployment
from tests.support.poolers import Pgpool
from tests.support.postgresql_cluster import Machines
from tests.support.servers import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

LAG = "1s"
KEYS = 20


def test_a_load_balancer_with_a_lagging_standby_refuses_no_valid_key(
    machines: Machines, deployment: Deployment
) -> None:
    """New keys are asked for at once at the other member: none is 401. Revokes are immediate, and
    an old answer raises no alarm of a restore."""
    primary, standby = machines.pair(synchronous=False)
    standby.configure("recovery_min_apply_delay", LAG)
    pgpool = machines.add(Pgpool(primary, standby))
    a, b = deployment.start(A=pgpool.url, B=pgpool.url)
    keys, first = {}, []
    for number in range(KEYS):
        key_id, token = a.create_key(deployment.admin, f"key {number}")
        keys[key_id] = token
        first.append(b.check(token))
    deployment.check(keys)
    ends = b.revoke_all(deployment.admin, keys)
    deployment.wait_for_rounds()
    deployment.report(f"pgpool-II with a lag of {LAG}; first checks: {first}", ends)
    assert first == [ACCEPTED] * KEYS
    assert deployment.accepted_after(ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(keys) == {REFUSED: KEYS}
    assert a.alarms() + b.alarms() == []


def test_the_balancer_does_ask_the_standby(machines: Machines) -> None:
    """The twin: a read that does not say where it belongs gets the old answer."""
    primary, standby = machines.pair(synchronous=False)
    primary.query("CREATE TABLE counted (number integer)")
    eventually(lambda: standby.query("SELECT to_regclass('counted') IS NOT NULL") == [(True,)])
    standby.configure("recovery_min_apply_delay", "1min")
    pgpool = machines.add(Pgpool(primary, standby))
    with pgpool.connect() as client:
        client.execute("INSERT INTO counted VALUES (1)")
        assert client.execute("SELECT count(*) FROM counted").fetchall() == [(0,)]
        hinted = "/*NO LOAD BALANCE*/ SELECT count(*) FROM counted"
        assert client.execute(hinted).fetchall() == [(1,)]
