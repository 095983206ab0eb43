"""Receipts: what a DELETE says of how far it has spread, on both databases and in both dialects."""

from collections.abc import Iterator

import pytest

from tests.support.clock import Clock
from tests.support.servers import PostgresServer
from tests.support.sidecars import Sidecar, sidecar_on

DIALECTS = ["/v1/api-keys", "/v1/api_keys"]


@pytest.fixture
def many(postgres: PostgresServer, clock: Clock) -> Iterator[Sidecar]:
    """A sidecar on PostgreSQL."""
    with sidecar_on(postgres.new_database(), clock) as sidecar:
        yield sidecar


def test_unsents_answer_carries_the_receipt_after_success(sidecar: Sidecar) -> None:
    """On SQLite there is no process to wait for: the bound is zero at once."""
    admin_key = sidecar.create()
    key = sidecar.create(admin_key.record.organization_id)
    with sidecar.client(admin_key) as client:
        answer = client.delete(f"/v1/api-keys/{key.record.id}").json()
    assert list(answer) == ["success", "revocation"]
    assert answer["success"] is True
    receipt = answer["revocation"]
    assert receipt == {
        "seq": receipt["seq"],
        "acknowledged": 0,
        "members": 0,
        "boundSeconds": 0.0,
        "durability": "local",
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_dialects_carry_it_in_a_header(sidecar: Sidecar, dialect: str) -> None:
    """A dictionary of RFC 9651, for dialects whose body another API defines."""
    admin_key = sidecar.create()
    key = sidecar.create(admin_key.record.organization_id)
    with sidecar.client(admin_key) as client:
        answer = client.delete(f"{dialect}/{key.record.id}")
    fields = dict(part.split("=") for part in answer.headers["X-Keylatch-Revocation"].split(", "))
    assert int(fields.pop("seq")) > 0
    assert fields == {"acknowledged": "0", "members": "0", "bound": "0.000", "durability": "local"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_who_does_not_want_to_wait_gets_202_and_a_bound(many: Sidecar, dialect: str) -> None:
    """`Prefer: respond-async` answers right after the commit: never later than the lease."""
    admin_key = many.create()
    key = many.create(admin_key.record.organization_id)
    with many.client(admin_key) as client:
        answer = client.delete(
            f"{dialect}/{key.record.id}", headers={"Prefer": "wait=10, Respond-Async; x=1"}
        )
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert "bound=1.000" in answer.headers["X-Keylatch-Revocation"]


def test_on_postgresql_it_names_who_acknowledged(many: Sidecar) -> None:
    """The sidecar itself is a member, and knows before it answers."""
    admin_key = many.create()
    key = many.create(admin_key.record.organization_id)
    with many.client(admin_key) as client:
        receipt = client.delete(f"/v1/api-keys/{key.record.id}").json()["revocation"]
    assert (receipt["acknowledged"], receipt["members"]) == (1, 1)
    assert receipt["boundSeconds"] == 0.0
