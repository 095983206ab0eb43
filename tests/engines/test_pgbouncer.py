"""PgBouncer in front of the store, in each of its modes, in the distribution's version and a newer
one.

Broken twin: a program that says `SET` on a pooled connection is found by the same look at the pool.
"""

from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.engines import Times
from tests.support.members import ACCEPTED, REFUSED, Deployment, Member
from tests.support.poolers import NEWER_PGBOUNCER, PgBouncer
from tests.support.postgresql_cluster import Machines, Node
from tests.support.servers import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

EVERY_VERSION = pytest.mark.parametrize("version", ["distribution", "newer"])


def program(version: str) -> str:
    """Of this PgBouncer; without the newer one the test is skipped, also in CI, where its sources
    cannot always be downloaded."""
    if version == "newer" and not NEWER_PGBOUNCER:
        pytest.skip("KEYLATCH_PGBOUNCER names no program")
    return NEWER_PGBOUNCER if version == "newer" else ""


def revoke_some(deployment: Deployment, title: str, revokes: int) -> None:
    """Revoke keys through two members that check them: none is accepted after the answer."""
    a, b = deployment.members[:2]
    keys = a.create_keys(deployment.admin, revokes)
    stays = a.create_keys(deployment.admin, 2)
    deployment.check(keys | stays)
    ends: dict[str, float] = {}
    for number, key_id in enumerate(keys):
        ends |= (a, b)[number % 2].revoke_all(deployment.admin, [key_id])
    deployment.wait_for_rounds()
    deployment.report(title, ends)
    assert deployment.accepted_after(ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(keys) == {REFUSED: revokes}
        assert checks.statuses(keys=stays)[REFUSED] == 0
    assert a.alarms() + b.alarms() == []


def record_commits(node: Node) -> None:
    """From now on the server notes with which `synchronous_commit` keys are revoked."""
    node.query("CREATE TABLE noted (setting text)")
    node.query(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO noted VALUES (current_setting('synchronous_commit'));"
        " RETURN NEW; END$$"
    )
    node.query(
        "CREATE TRIGGER note AFTER UPDATE OF deleted_at ON keylatch_keys"
        " FOR EACH ROW EXECUTE FUNCTION note()"
    )


@EVERY_VERSION
def test_session_pooling_works(
    version: str, machines: Machines, deployment: Deployment, times: Times
) -> None:
    """It is like no pooler at all: revokes are immediate, notifications arrive, and no setting
    stays on a server connection."""
    primary = machines.primary()
    bouncer = machines.add(PgBouncer(primary, "session", program(version)))
    deployment.start(A=bouncer.url, B=bouncer.url)
    revoke_some(deployment, f"PgBouncer, session, {version}", times(30, 1_000))
    deployment.end()
    assert bouncer.settings_left() == {}


@EVERY_VERSION
def test_transaction_pooling_works_with_a_direct_url(
    version: str, machines: Machines, deployment: Deployment, times: Times
) -> None:
    """Leases and notifications take the direct connection. Revokes are immediate, each one is
    committed durably, and another program finds no setting of keylatch in the pool."""
    primary = machines.primary()
    bouncer = machines.add(PgBouncer(primary, "transaction", program(version)))
    deployment.settings["STORE_DIRECT"] = primary.url
    deployment.start(A=bouncer.url, B=bouncer.url)
    record_commits(primary)
    revoke_some(deployment, f"PgBouncer, transaction, {version}", times(30, 1_000))
    deployment.end()
    assert bouncer.settings_left() == {}
    assert primary.query("SELECT DISTINCT setting FROM noted") == [("on",)]


def test_a_setting_that_stays_in_the_pool_is_found(machines: Machines) -> None:
    """The twin of the tests above: a client says `SET` in transaction mode, and goes."""
    bouncer = machines.add(PgBouncer(machines.primary(), "transaction"))
    assert bouncer.settings_left() == {}
    with bouncer.connect() as careless:
        careless.execute("SET synchronous_commit = off")
    assert bouncer.settings_left() == {"synchronous_commit = off": 1}


@EVERY_VERSION
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_mode_that_cannot_work_is_refused_with_its_reason(
    mode: str, version: str, machines: Machines, deployment: Deployment
) -> None:
    """Without a direct URL leases and notifications cannot work in transaction mode, and in
    statement mode there are no transactions: the process does not become ready and says why."""
    bouncer = machines.add(PgBouncer(machines.primary(), mode, program(version)))
    a = deployment.add("A", bouncer.url, waits=False)
    a.wait_until_alive()
    reason = "KEYLATCH_STORE_DIRECT" if mode == "transaction" else "statement pooling"
    eventually(lambda: reason in a.log() or a.is_ready, seconds=30)
    deployment.report(f"PgBouncer, {mode}, {version}", {})
    assert not a.is_ready
    assert reason in a.log()
    if mode == "transaction":
        a.stop()
        assert bouncer.settings_left() == {}


def test_a_pool_that_is_too_small_is_named(machines: Machines, deployment: Deployment) -> None:
    """Four members need more connections than a session pool of four has: those that get none say
    what is too small."""
    bouncer = machines.add(PgBouncer(machines.primary(), "session", default_pool_size=4))
    for name in "ABCD":
        deployment.add(name, bouncer.url, waits=False)

    def says_so(member: Member) -> bool:
        return "default_pool_size" in member.log()

    with suppress(AssertionError):
        eventually(lambda: any(map(says_so, deployment.members)), seconds=40)
    deployment.report("PgBouncer with a pool of four", {})
    assert any(map(says_so, deployment.members))
    assert not all(member.is_ready for member in deployment.members)


def test_a_pooler_that_restarts_is_not_noticed(machines: Machines, tmp_path: Path) -> None:
    """PgBouncer is killed and started again within a lease period: checks go on, and so do
    revokes."""
    deployment = machines.add(Deployment(tmp_path, lease_seconds=10))
    primary = machines.primary()
    bouncer = machines.add(PgBouncer(primary, "session"))
    a, b = deployment.start(A=bouncer.url, B=bouncer.url)
    keys = a.create_keys(deployment.admin, 5)
    deployment.check(keys)
    bouncer.kill()
    bouncer.start()
    deployment.wait_for_rounds()
    assert [set(checks.statuses()) for checks in deployment.checks] == [{ACCEPTED}] * 2
    ends = b.revoke_all(deployment.admin, keys)
    deployment.wait_for_rounds()
    deployment.report("PgBouncer restarted", ends)
    assert deployment.accepted_after(ends) == []
    for checks in deployment.checks:
        assert checks.last_statuses(keys) == {REFUSED: 5}


# Durability

UNDURABLE = {"synchronous_commit": "off", "wal_writer_delay": "10s"}
"""Of a server: it answers commits that say nothing else before they are on the disk, and writes
them there ten seconds later."""


@pytest.mark.parametrize("way", ["direct", "transaction"])
def test_an_answered_revoke_survives_kill_9(
    way: str, machines: Machines, tmp_path: Path, times: Times
) -> None:
    """Each commit of a change says itself that it is durable, whatever the server's setting or the
    pool's connections say: kill -9 right after the answer loses none."""
    primary = machines.primary(**UNDURABLE)
    deployment = machines.add(Deployment(tmp_path))
    url = primary.url
    if way == "transaction":
        require_newer = program("newer")
        url = machines.add(PgBouncer(primary, "transaction", require_newer)).url
        deployment.settings["STORE_DIRECT"] = primary.url
    (a,) = deployment.start(A=url)
    revoked = alive = 0
    for _ in range(times(4, 60)):
        (key_id,) = a.create_keys(deployment.admin, 1)
        a.revoke_all(deployment.admin, [key_id], Prefer="respond-async")
        primary.kill()
        primary.start()
        revoked += 1
        alive += key_id in primary.live_keys()
        eventually(lambda: a.is_ready)
    print(f"{way}: {alive} of {revoked} answered revokes were lost")
    assert alive == 0


def test_a_commit_that_does_not_say_so_is_lost(machines: Machines) -> None:
    """The twin of the test above: the same kill -9 loses what a careless program committed."""
    primary = machines.primary(**UNDURABLE)
    primary.query("CREATE TABLE careless (id integer)")
    primary.query("SET synchronous_commit = on; INSERT INTO careless VALUES (1)")
    primary.query("INSERT INTO careless VALUES (2)")
    primary.kill()
    primary.start()
    assert primary.query("SELECT id FROM careless") == [(1,)]
