"""Who may do what to whose keys: every operation of the sidecar x every role x every target.

The table is the rule. An operation that is added to the document needs a row here; one number is
the answer whatever the target is, three are those for a live key of one's own organisation, for one
of its test environment, and for whatever is none of the caller's: foreign, unknown, malformed.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from keylatch.core.timestamps import datetime_of
from keylatch.management.keyring import Created
from keylatch_sidecar.openapi.operations import OPERATIONS
from tests.support.clock import Clock
from tests.support.sidecars import Sidecar, sidecar_on

TABLE = """
                                | no key | dead | SENDING | FULL        | FULL of test
GET     /v1/api-keys            | 401    | 401  | 403     | 200         | 200
POST    /v1/api-keys            | 401    | 401  | 403     | 200         | 200
GET     /v1/api-keys/{id}       | 401    | 401  | 403     | 200 200 404 | 404 200 404
PATCH   /v1/api-keys/{id}       | 401    | 401  | 403     | 200 200 404 | 404 200 404
DELETE  /v1/api-keys/{id}       | 401    | 401  | 403     | 200 200 404 | 404 200 404
GET     …/{id}/usage            | 401    | 401  | 403     | 200 200 404 | 404 200 404
POST    …/{id}/rotate           | 401    | 401  | 403     | 200 200 404 | 404 200 404
POST    …/{id}/rotate/cancel    | 401    | 401  | 403     | 200 200 404 | 404 200 404
POST    …/{id}/rotate/finish    | 401    | 401  | 403     | 200 200 404 | 404 200 404
POST    /v1/api-keys/revoke-all | 401    | 401  | 403     | 200         | 403
DELETE  /v1/api-keys/self       | 401    | 401  | 200     | 200         | 200
GET     /v1/audit               | 401    | 401  | 403     | 200         | 200

GET     /v1/api_keys            | 401    | 401  | 401     | 200         | 200
POST    /v1/api_keys            | 401    | 401  | 401     | 200         | 200
GET     /v1/api_keys/{id}       | 401    | 401  | 401     | 200 200 404 | 404 200 404
DELETE  /v1/api_keys/{id}       | 401    | 401  | 401     | 200 200 404 | 404 200 404

GET     /verify                 | 401    | 401  | 200     | 200         | 200
HEAD    /verify                 | 401    | 401  | 200     | 200         | 200
GET     /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
HEAD    /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
POST    /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
PUT     /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
PATCH   /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
DELETE  /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
OPTIONS /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200
TRACE   /ext_authz/{path}       | 401    | 401  | 200     | 200         | 200

POST    /leaked                 | 202    | 202  | 202     | 202         | 202
GET     /healthz                | 200    | 200  | 200     | 200         | 200
GET     /readyz                 | 200    | 200  | 200     | 200         | 200
GET     /metrics                | 401    | 401  | 403     | 200         | 200
GET     /openapi.json           | 401    | 401  | 403     | 200         | 200
"""

BODIES: dict[str, Any] = {
    "POST /v1/api-keys": {"name": "new"},
    "PATCH /v1/api-keys/{id}": {"name": "renamed"},
    "POST /v1/api-keys/{id}/rotate": {"graceSeconds": 60},
    "POST /v1/api-keys/revoke-all": {"reason": "a drill"},
    "POST /v1/api_keys": {"name": "new"},
    "POST /leaked": {"token": "no token"},
}
"""What is sent along: a body that is good where the caller may do it."""

ROTATED = ("/rotate/cancel", "/rotate/finish")
"""Where a rotation has to be under way."""

SELF_REVOKING = ("/self", "/revoke-all")
"""What may end the caller's own key."""

MALFORMED = ["", "%2e", "%2e%2e%2f", "key_%00", "key_1%20", "a/b", "k%C3%A9y", "x" * 5_000]
OURS, TEST, NONE = "own live key", "own test key", "no key in the path"
OTHERS = ["foreign", "foreign test key", "unknown", *(f"malformed {each}" for each in MALFORMED)]

Row = dict[str, list[int]]


def rows() -> dict[str, Row]:
    """The table by operation, and by role."""
    first, *lines = [line.split("|") for line in TABLE.splitlines() if line]
    roles = [cell.strip() for cell in first[1:]]
    return {
        " ".join(operation.replace("…", "/v1/api-keys").split()): {
            role: [int(status) for status in cell.split()]
            for role, cell in zip(roles, cells, strict=True)
        }
        for operation, *cells in lines
    }


def operations() -> list[str]:
    """Every operation in the document."""
    return [
        f"{method.upper()} {path}" for path, methods in OPERATIONS.items() for method in methods
    ]


def expected(statuses: list[int], target: str) -> int:
    if len(statuses) == 1:
        return statuses[0]
    ours, test, none_of_theirs = statuses
    return {OURS: ours, TEST: test}.get(target, none_of_theirs)


@dataclass(frozen=True)
class Organization:
    """An organisation with a caller in every role."""

    name: str
    callers: dict[str, list[Created | None]]


@dataclass(frozen=True)
class World:
    """A sidecar with two organisations, and the file that it keeps them in."""

    sidecar: Sidecar
    database: Path
    organizations: tuple[Organization, Organization]

    def snapshot(self) -> list[Any]:
        """All that a refused call must not change; when a key was used is no part of it."""
        tables = ("meta", "organizations", "invalidations", "audit", "keys")
        with closing(sqlite3.connect(self.database)) as connection:
            connection.row_factory = sqlite3.Row
            found = [
                [dict(row) for row in connection.execute(f"SELECT * FROM keylatch_{table}")]
                for table in tables
            ]
        for row in found[-1]:
            del row["last_used"], row["previous_last_used"]
        return found

    def target(self, operation: str, kind: str, ours: str, theirs: str) -> str:
        """An id of this kind; that of an existing key is new, so that it may be revoked."""
        if kind.startswith("malformed "):
            return kind.removeprefix("malformed ")
        if kind == "unknown":
            return "key_" + "0" * 12
        organization = theirs if kind.startswith("foreign") else ours
        environment = "test" if kind in (TEST, "foreign test key") else "live"
        key = self.sidecar.create(organization, environment=environment)
        if operation.endswith(ROTATED):
            with self.sidecar.client(self.sidecar.create(organization)) as client:
                path = f"/v1/api-keys/{key.record.id}/rotate"
                assert client.post(path, json={"graceSeconds": 60}).status_code == 200
        return key.record.id


def kinds(operation: str) -> list[str]:
    """The kinds of targets that an operation can be called with."""
    if "{id}" not in operation:
        return [NONE]
    if operation.endswith("{id}"):
        return [OURS, TEST, *OTHERS]
    # A path with a slash more, or with none, is none of those that go on behind the id.
    slashed = {"malformed ", "malformed a/b", "malformed %2e%2e%2f"}
    return [OURS, TEST, *(kind for kind in OTHERS if kind not in slashed)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A sidecar of this file's own."""
    database = tmp_path_factory.mktemp("authorisation") / "keys.db"
    with sidecar_on(f"sqlite:///{database}", Clock()) as sidecar:
        yield World(
            sidecar,
            database,
            (make_organization(sidecar, "ours"), make_organization(sidecar, "theirs")),
        )


def make_organization(sidecar: Sidecar, name: str) -> Organization:
    soon = int(sidecar.clock.seconds * 1000) + 1_000
    full, revoked, disabled = (sidecar.create(name) for _ in range(3))
    expired = sidecar.create(name, expires_at=datetime_of(soon))
    with sidecar.client(full) as client:
        assert client.delete(f"/v1/api-keys/{revoked.record.id}").status_code == 200
        path = f"/v1/api-keys/{disabled.record.id}"
        assert client.patch(path, json={"active": False}).status_code == 200
    sidecar.clock.tick(2)
    return Organization(
        name,
        {
            "no key": [None],
            "dead": [revoked, disabled, expired],
            "SENDING": [sidecar.create(name, permission="SENDING")],
            "FULL": [full],
            "FULL of test": [sidecar.create(name, environment="test")],
        },
    )


def call(world: World, caller: Created | None, operation: str, target: str) -> httpx.Response:
    method, path = operation.split(" ")
    path = path.replace("{id}", target).replace("{path}", "v1/emails")
    sent: dict[str, Any] = {}
    if operation in BODIES:
        sent = {
            "content": json.dumps(BODIES[operation]),
            "headers": {"Content-Type": "application/json"},
        }
    with world.sidecar.client(caller) as client:
        return client.request(method, path, **sent)


def test_every_operation_has_a_row_and_every_row_an_operation() -> None:
    """A new endpoint needs a row that says who may call it."""
    assert sorted(rows()) == sorted(operations())
    takers = {
        f"{method.upper()} {path}"
        for path, methods in OPERATIONS.items()
        for method, operation in methods.items()
        if operation.body is not None
    }
    assert BODIES.keys() == takers


@pytest.mark.long
@pytest.mark.parametrize("operation", operations())
def test_the_table_is_true(world: World, operation: str) -> None:
    """Every cell; a refused call changes nothing, and does not show whether a key exists."""
    organizations = world.organizations
    if operation.endswith(SELF_REVOKING):
        names = f"{uuid4().hex}-ours", f"{uuid4().hex}-theirs"
        organizations = (
            make_organization(world.sidecar, names[0]),
            make_organization(world.sidecar, names[1]),
        )
    for ours, theirs in (organizations, organizations[::-1]):
        cells = [
            (role, caller, kind, expected(rows()[operation][role], kind))
            for role, callers in ours.callers.items()
            for caller in callers
            for kind in kinds(operation)
        ]
        refused = [cell for cell in cells if cell[-1] >= 400]
        allowed = [cell for cell in cells if cell[-1] < 400]
        ids = {
            kind: world.target(operation, kind, ours.name, theirs.name)
            for kind in {kind for _, _, kind, _ in refused} - {NONE}
        }
        before = world.snapshot()
        answers = [
            (role, kind, status, call(world, caller, operation, ids.get(kind, "")))
            for role, caller, kind, status in refused
        ]
        assert world.snapshot() == before
        assert differences(answers) == []
        for status in {status for _, _, status, _ in answers}:
            for expected_role in ours.callers:
                shown = {
                    (answer.content, tuple(sorted(answer.headers.multi_items())))
                    for role, _, expected_status, answer in answers
                    if (role, expected_status) == (expected_role, status)
                }
                assert len(shown) <= 1, (expected_role, status)
        answers = []
        for role, caller, kind, status in allowed:
            target = "" if kind == NONE else world.target(operation, kind, ours.name, theirs.name)
            answers.append((role, kind, status, call(world, caller, operation, target)))
        assert differences(answers) == []


def differences(answers: list[tuple[str, str, int, httpx.Response]]) -> list[tuple[str, str, int]]:
    """The cells that are not as the table has them: role, target, and the real status."""
    return [
        (role, kind, answer.status_code)
        for role, kind, status, answer in answers
        if answer.status_code != status
    ]


def test_one_answer_for_whatever_is_not_the_callers(world: World) -> None:
    """Byte for byte, over all operations of a dialect: foreign, unknown, malformed are alike."""
    ours, theirs = world.organizations
    [full] = ours.callers["FULL"]
    for prefix in ("/v1/api-keys/", "/v1/api_keys/"):
        answers = set()
        for operation in operations():
            if f"{prefix}{{id}}" in operation:
                for kind in set(kinds(operation)) - {OURS, TEST}:
                    target = world.target(operation, kind, ours.name, theirs.name)
                    answer = call(world, full, operation, target)
                    answers.add((answer.status_code, answer.content))
        [(status, _)] = answers
        assert status == 404


def test_a_call_that_changes_something_would_be_noticed(world: World) -> None:
    """The twin: the snapshot sees what an allowed call changes."""
    ours, theirs = world.organizations
    [full] = ours.callers["FULL"]
    for operation, statuses in rows().items():
        if "{id}" in operation and not operation.startswith("GET"):
            target = world.target(operation, OURS, ours.name, theirs.name)
            before = world.snapshot()
            answer = call(world, full, operation, target)
            assert answer.status_code == expected(statuses["FULL"], OURS)
            assert world.snapshot() != before


@pytest.mark.parametrize("index", range(3))
def test_three_numbers_are_for_three_kinds_of_target(index: int) -> None:
    """The table is read as it says."""
    targets = ([OURS], [TEST], OTHERS)[index]
    numbers = {expected([200, 201, 404], target) for target in targets}
    assert numbers == {[200, 201, 404][index]}
