"""Sendook's dialect over a real socket: every call, every field of an answer, every error."""

import json
import re
import shutil
import subprocess
from typing import Any

import httpx
import pytest

from keylatch.management.keyring import Created
from tests.support.clock import Clock
from tests.support.servers import require_program
from tests.support.sidecars import Sidecar, sidecar_on

KEYS = "/v1/api_keys"
FIELDS = {"id", "_id", "name", "organizationId", "active", "createdAt", "updatedAt"}
CALLS = [
    ("GET", KEYS),
    ("POST", KEYS),
    ("GET", f"{KEYS}/key_1"),
    ("DELETE", f"{KEYS}/key_1"),
]


def error(code: str, message: str) -> dict[str, str]:
    return {"error": message, "message": message, "code": code}


def invalid_name(**value: Any) -> dict[str, Any]:
    fault = {"type": "field", "msg": "Invalid value", "path": "name", "location": "body"}
    return {"errors": [fault | value]}


def created(client: httpx.Client, name: str = "CI/CD Pipeline") -> dict[str, Any]:
    answer = client.post(KEYS, json={"name": name})
    assert answer.status_code == 200, answer.text
    key: dict[str, Any] = answer.json()
    return key


def bearer(key: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key['key']}"}


@pytest.mark.parametrize("name", ["Production API Key", "Development Key", "CI/CD Pipeline"])
def test_a_created_key_is_answered_with_all_its_fields(
    client: httpx.Client, admin_key: Created, name: str
) -> None:
    """200, not 201, as the real server: the page's seven fields, and `_id` for raw clients."""
    answer = client.post(KEYS, json={"name": f"  {name}\t"})
    assert answer.status_code == 200
    key = answer.json()
    assert key == {
        "id": key["id"],
        "_id": key["id"],
        "name": name,
        "key": key["key"],
        "organizationId": admin_key.record.organization_id,
        "active": True,
        "createdAt": key["createdAt"],
        "updatedAt": key["createdAt"],
    }
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key["id"])
    assert re.fullmatch(r"kl_live_[A-Za-z0-9]{12}_[A-Za-z0-9]{41}", key["key"])
    assert client.get(KEYS, headers=bearer(key)).status_code == 200


def test_times_are_what_the_clock_says(store_url: str, clock: Clock) -> None:
    """ISO 8601 in UTC, with milliseconds; deleting is an update."""
    with sidecar_on(store_url, clock) as sidecar, sidecar.client(sidecar.create()) as client:
        key = created(client)
        clock.tick(1.5)
        deleted = client.delete(f"{KEYS}/{key['id']}").json()
    assert key["createdAt"] == key["updatedAt"] == "2027-01-15T08:00:00.000Z"
    assert deleted["createdAt"] == "2027-01-15T08:00:00.000Z"
    assert deleted["updatedAt"] == "2027-01-15T08:00:01.500Z"


def test_the_key_is_in_the_create_answer_and_in_no_other(client: httpx.Client) -> None:
    """The real server returns it from list, get and delete; that is a fault."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    answers = [*client.get(KEYS).json(), client.get(path).json(), client.delete(path).json()]
    assert all(shown.keys() == FIELDS for shown in answers)
    assert key["key"].rpartition("_")[2] not in json.dumps(answers)


def test_the_list_is_oldest_first(client: httpx.Client, admin_key: Created) -> None:
    """A bare array in the order of creation, even within one millisecond."""
    names = [created(client, f"Key {number}")["name"] for number in range(5)]
    answer = client.get(KEYS)
    assert answer.status_code == 200
    assert [key["name"] for key in answer.json()] == [admin_key.record.name, *names]


def test_a_key_is_shown_as_it_is_listed(client: httpx.Client) -> None:
    """GET by id answers the object of the list, which is the create answer without `key`."""
    key = created(client)
    shown = client.get(f"{KEYS}/{key['id']}").json()
    assert shown == client.get(KEYS).json()[-1]
    key.pop("key")
    assert shown == key


def test_a_deleted_key_is_gone_and_deleting_it_again_answers_the_same(client: httpx.Client) -> None:
    """The object with `active: false` and a new `updatedAt`; the key is refused at once."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    assert client.get(KEYS, headers=bearer(key)).status_code == 200

    first, second = client.delete(path), client.delete(path)
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    deleted = first.json()
    assert deleted["updatedAt"] > key["updatedAt"]
    key_then = {name: key[name] for name in FIELDS}
    assert deleted == key_then | {"active": False, "updatedAt": deleted["updatedAt"]}

    assert client.get(KEYS, headers=bearer(key)).status_code == 401
    assert client.get(path).json() == deleted
    for query in ("", "?include=deleted"):
        assert key["id"] not in client.get(KEYS + query).text


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_foreign_unknown_and_malformed_ids_look_the_same(
    client: httpx.Client, sidecar: Sidecar, method: str
) -> None:
    """404, byte for byte the same; the real server answers `200 null` or 500."""
    other_id = sidecar.create(name="Foreign").record.id
    ids = [other_id, "key_000000000000", "65a1b2c3d4e5f60718293a4b", "null", "undefined", "%00"]
    ids += ["%0A", "a%0Ab", "a%2Fb", "..%2F", "%F0%9F%94%91", '{"$ne":1}', "x" * 4000, "a/b", ""]
    answers = [client.request(method, f"{KEYS}/{key_id}") for key_id in ids]
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (404, answers[0].content)
    }
    assert answers[0].json() == error("NOT_FOUND", "API key not found")
    assert {str(sorted(answer.headers.items())) for answer in answers} == {
        str(sorted(answers[0].headers.items()))
    }
    with sidecar.client() as anonymous:
        assert anonymous.request(method, f"{KEYS}/a%2Fb").status_code == 401


def test_organizations_see_their_own_keys_only(
    client: httpx.Client, sidecar: Sidecar, admin_key: Created
) -> None:
    """The organisation comes from the caller's key, never from query or body."""
    other = sidecar.create(name="Other")
    mine, theirs = admin_key.record.organization_id, other.record.organization_id
    query = {"organizationId": theirs, "organization_id": theirs}
    assert {key["organizationId"] for key in client.get(KEYS, params=query).json()} == {mine}
    key = client.post(KEYS, params=query, json={"name": "Mine"}).json()
    assert key["organizationId"] == mine
    assert client.post(KEYS, json={"name": "Spy", "organizationId": theirs}).status_code == 400
    with sidecar.client(other) as others:
        assert [key["name"] for key in others.get(KEYS).json()] == ["Other"]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_without_a_key_nothing_is_answered(sidecar: Sidecar, method: str, path: str) -> None:
    """401 "Missing or invalid API key"; no error is named where no key was sent."""
    with sidecar.client() as anonymous:
        answer = anonymous.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="keylatch"'
    message = "Send an API key: Authorization: Bearer <key>"
    assert answer.json() == error("UNAUTHORIZED", message)


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_key_that_is_no_good_is_unauthorized(
    client: httpx.Client, method: str, path: str
) -> None:
    """401 "Deleted or inactive API key", the same as for a made-up one."""
    deleted, inactive = created(client), created(client)
    client.delete(f"{KEYS}/{deleted['id']}")
    client.patch(f"/v1/api-keys/{inactive['id']}", json={"active": False})
    answers = [
        client.request(method, path, headers=bearer(key))
        for key in (deleted, inactive, {"key": "made-up"})
    ]
    assert {answer.status_code for answer in answers} == {401}
    challenges = {answer.headers["WWW-Authenticate"] for answer in answers}
    assert challenges == {'Bearer realm="keylatch", error="invalid_token"'}
    assert {answer.content for answer in answers} == {answers[0].content}
    assert answers[0].json() == error("UNAUTHORIZED", "The API key is not valid")


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_sending_key_may_not_manage_keys(
    client: httpx.Client, sidecar: Sidecar, admin_key: Created, method: str, path: str
) -> None:
    """401 "doesn't have permission", as the page says; the challenge names the difference."""
    sending = sidecar.create(admin_key.record.organization_id, permission="SENDING")
    with sidecar.client(sending) as sender:
        answer = sender.request(method, path)
    assert answer.status_code == 401
    challenge = 'Bearer realm="keylatch", error="insufficient_scope", scope="FULL"'
    assert answer.headers["WWW-Authenticate"] == challenge
    assert answer.json() == error("FORBIDDEN", "The API key may not do this")
    assert len(client.get(KEYS).json()) == 2


@pytest.mark.parametrize("value", ["Bearer", "Bearer a b", "Bearer a, Bearer b", "Bearer %41"])
def test_a_malformed_credential_is_a_bad_request(sidecar: Sidecar, value: str) -> None:
    """An ambiguous `Authorization` is answered with 400 and never guessed at."""
    with sidecar.client() as anonymous:
        answer = anonymous.get(KEYS, headers={"Authorization": value})
    assert answer.status_code == 400
    challenge = 'Bearer realm="keylatch", error="invalid_request"'
    assert answer.headers["WWW-Authenticate"] == challenge
    message = "Send exactly one Authorization header of the form: Bearer <key>"
    assert answer.json() == error("BAD_REQUEST", message)


def test_a_key_in_query_or_body_does_not_count(sidecar: Sidecar, admin_key: Created) -> None:
    """The real server takes `access_token` from both; that is a fault."""
    token = {"access_token": admin_key.token.reveal()}
    with sidecar.client() as anonymous:
        assert anonymous.get(KEYS, params=token).status_code == 401
        assert anonymous.post(KEYS, json={"name": "Spy", **token}).status_code == 401
        assert anonymous.post(KEYS, data={"name": "Spy", **token}).status_code == 401


@pytest.mark.parametrize("value", ["", "   ", "\t\n", "\u3000", 1, None, True, ["CI"], {"a": 1}])
def test_a_bad_name_is_answered_as_the_real_server_does(client: httpx.Client, value: Any) -> None:
    """400 that quotes what was given; a blank name is no 500."""
    answer = client.post(KEYS, json={"name": value})
    assert answer.status_code == 400
    assert answer.json() == invalid_name(value=value)


def test_a_missing_name_has_no_value_to_quote(client: httpx.Client) -> None:
    """`value` is left out, as JavaScript leaves out what is undefined."""
    for answer in (client.post(KEYS, json={}), client.post(KEYS)):
        assert answer.status_code == 400
        assert answer.json() == invalid_name()


def test_a_key_has_its_makers_environment(client: httpx.Client, sidecar: Sidecar) -> None:
    """A key for test cannot make one for live, here neither."""
    tester = sidecar.create(environment="test")
    with sidecar.client(tester) as testing:
        assert created(testing)["key"].startswith("kl_test_")
        answer = testing.post(KEYS, json={"name": "More", "environment": "live"})
        assert answer.status_code == 400
        assert len(testing.get(KEYS).json()) == 2


def test_both_dialects_speak_of_the_same_keys(client: httpx.Client) -> None:
    """What one creates, the other lists, and deletes."""
    key = created(client)
    other = client.get(f"/v1/api-keys/{key['id']}").json()
    shared = FIELDS - {"_id"}
    assert {name: key[name] for name in shared} == {name: other[name] for name in shared}
    assert client.delete(f"/v1/api-keys/{key['id']}").json()["success"] is True
    assert client.get(f"{KEYS}/{key['id']}").json()["active"] is False


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b"\xff\x00"])
@pytest.mark.parametrize("media_type", ["application/json", "text/plain", None])
def test_no_body_is_needed_or_read_on_get_and_delete(
    client: httpx.Client, content: bytes, media_type: str | None
) -> None:
    """Whatever is sent there, and whatever it is called, does not matter."""
    path = f"{KEYS}/{created(client)['id']}"
    headers = {"Content-Type": media_type} if media_type else {}
    for method, where in (("GET", KEYS), ("GET", path), ("DELETE", path)):
        answer = client.request(method, where, content=content, headers=headers)
        assert answer.status_code == 200, (method, answer.text)


@pytest.mark.parametrize("path", [KEYS, f"{KEYS}/key_1"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    """The same status and headers, and no body, for good and bad keys."""
    for headers in ({}, {"Authorization": ""}):
        get, head = client.get(path, headers=headers), client.head(path, headers=headers)
        assert head.content == b""
        assert (head.status_code, head.headers) == (get.status_code, get.headers)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [(KEYS, {"GET", "HEAD", "POST"}), (f"{KEYS}/key_1", {"GET", "HEAD", "DELETE"})],
)
def test_other_methods_are_not_allowed(client: httpx.Client, path: str, allowed: set[str]) -> None:
    """405 that names the methods that are."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - allowed:
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["Allow"].split(", ")) == allowed
        assert answer.json() == error("METHOD_NOT_ALLOWED", "Method Not Allowed")


def test_no_answer_is_kept_on_the_way(client: httpx.Client) -> None:
    """Every answer is JSON with its length and `Cache-Control: no-store`."""
    path = f"{KEYS}/{created(client)['id']}"
    answers = [
        client.post(KEYS, json={"name": "CI"}),
        client.post(KEYS, json={}),
        client.post(KEYS, content="x" * 20_000),
        client.get(KEYS),
        client.get(path),
        client.delete(path),
        client.put(path),
        client.get(f"{KEYS}/unknown"),
        client.get(KEYS, headers={"Authorization": "Bearer made-up"}),
    ]
    for answer in answers:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Type"] == "application/json"
        assert int(answer.headers["Content-Length"]) == len(answer.content)


def test_the_calls_of_the_page_run_with_curl(sidecar: Sidecar, admin_key: Created) -> None:
    """Create, get, list and delete by the program that people try them with."""

    def curl(path: str, *arguments: str) -> Any:
        command = [require_program(shutil.which("curl"), "curl"), "--silent", "--show-error"]
        command += ["--noproxy", "*", "-H", f"Authorization: Bearer {admin_key.token.reveal()}"]
        command += ["-H", "Content-Type: application/json", sidecar.url + path, *arguments]
        ran = subprocess.run(command, capture_output=True, check=True, timeout=30)
        return json.loads(ran.stdout)

    key = curl(KEYS, "-d", '{"name": "Production API Key"}')
    path = f"{KEYS}/{key['id']}"
    key.pop("key")
    assert curl(path) == key
    assert curl(KEYS)[-1] == key
    assert curl(path, "-X", "DELETE")["active"] is False
    assert len(curl(KEYS)) == 1
