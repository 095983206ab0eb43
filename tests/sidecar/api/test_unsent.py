"""unsent's dialect over a real socket: every call, every field of an answer, every error."""

import json
import re
import shutil
import subprocess
from typing import Any

import httpx
import pytest

from keylatch.core.decisions import Decision
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.app import create_app
from tests.support.clock import Clock
from tests.support.servers import require_program, serving
from tests.support.sidecars import Sidecar, sidecar_on

KEYS = "/v1/api-keys"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
FIELDS = {"id", "name", "partialToken", "permission", "createdAt", "lastUsed"}
OUR_FIELDS = {"organizationId", "active", "environment", "expiresAt", "updatedAt"}
OUR_FIELDS |= {"metadata", "revokedReason", "rotatedAt", "previous", "createdBy"}
CALLS = [
    ("GET", KEYS),
    ("POST", KEYS),
    ("GET", f"{KEYS}/key_1"),
    ("PATCH", f"{KEYS}/key_1"),
    ("DELETE", f"{KEYS}/key_1"),
]
ONE_KEY = ["GET", "PATCH", "DELETE"]


def error(code: str, message: str) -> dict[str, Any]:
    """The superset that every official SDK can read."""
    return {"error": {"code": code, "message": message}, "code": code, "message": message}


def created(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(KEYS, json={"name": "CI", **body})
    assert answer.status_code == 200, answer.text
    key: dict[str, Any] = answer.json()
    return key


def listed(client: httpx.Client, include: str | None = None) -> list[dict[str, Any]]:
    """The list but for `lastUsed`, which the request itself changes soon."""
    keys = client.get(KEYS, params={"include": include} if include is not None else {}).json()
    return [key | {"lastUsed": ...} for key in keys]


def bearer(key: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key['token']}"}


def test_a_created_key_is_answered_with_all_its_fields(
    client: httpx.Client, admin_key: Created, sidecar: Sidecar
) -> None:
    """The answer holds id, token and every field of a key; times are in UTC, to the millisecond."""
    answer = client.post(KEYS, json={"name": "Production App"})
    assert answer.status_code == 200
    key = answer.json()
    now = key["createdAt"]
    assert key == {
        "id": key["id"],
        "token": key["token"],
        "name": "Production App",
        "partialToken": f"kl_...{key['token'][-4:]}",
        "permission": "FULL",
        "createdAt": now,
        "updatedAt": now,
        "lastUsed": None,
        "expiresAt": None,
        "organizationId": admin_key.record.organization_id,
        "active": True,
        "environment": "live",
        "metadata": {},
        "revokedReason": None,
        "rotatedAt": None,
        "previous": None,
        "createdBy": admin_key.record.id,
    }
    assert TIME.fullmatch(now)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key["id"])
    assert re.fullmatch(r"kl_live_[A-Za-z0-9]{12}_[A-Za-z0-9]{41}", key["token"])


def test_times_are_what_the_clock_says(store_url: str, clock: Clock) -> None:
    """1,800,000,000.25 seconds after the epoch are written as unsent writes them."""
    clock.tick(0.25)
    with sidecar_on(store_url, clock) as sidecar, sidecar.client(sidecar.create()) as client:
        assert created(client)["createdAt"] == "2027-01-15T08:00:00.250Z"


def test_the_token_is_in_the_create_answer_and_in_no_other(client: httpx.Client) -> None:
    """Afterwards there are the six fields of the page and keylatch's own, never the token."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    answers = [
        *client.get(KEYS).json(),
        client.get(path).json(),
        client.patch(path, json={"name": "CD"}).json(),
        *client.get(KEYS, params={"include": "deleted"}).json(),
    ]
    assert all(shown.keys() == FIELDS | OUR_FIELDS for shown in answers)
    secret = key["token"].rpartition("_")[2]
    assert secret not in json.dumps(answers)


def test_the_token_works_at_once(client: httpx.Client) -> None:
    """A key that was just created opens the doors that its permission names."""
    full, sending = created(client), created(client, permission="SENDING")
    assert sending["permission"] == "SENDING"
    assert client.get(KEYS, headers=bearer(full)).status_code == 200
    query = {"permission": "SENDING"}
    assert client.get("/verify", params=query, headers=bearer(sending)).status_code == 200
    assert client.get("/verify", params=query, headers=bearer(full)).status_code == 200


def test_the_list_is_newest_first(client: httpx.Client, admin_key: Created) -> None:
    """A bare array in the order of creation, newest first, even within one millisecond."""
    names = [created(client, name=f"Key {number}")["name"] for number in range(5)]
    answer = client.get(KEYS)
    assert answer.status_code == 200
    assert [key["name"] for key in answer.json()] == [*reversed(names), admin_key.record.name]


def test_a_key_is_shown_as_it_is_listed(client: httpx.Client) -> None:
    """GET by id answers the same object as the list, and the create answer without its token."""
    key = created(client, permission="SENDING", environment="test")
    shown = client.get(f"{KEYS}/{key['id']}").json()
    assert shown == client.get(KEYS).json()[0]
    key.pop("token")
    assert shown == key


def test_a_deleted_key_is_gone_and_deleting_it_again_answers_the_same(client: httpx.Client) -> None:
    """Deleting is final and at once, and repeating it is no error."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    assert client.get(KEYS, headers=bearer(key)).status_code == 200

    first, second = client.delete(path), client.delete(path)
    assert first.status_code == second.status_code == 200
    assert first.content.startswith(b'{"success":true,"revocation":{')
    assert first.content == second.content

    assert client.get(KEYS, headers=bearer(key)).status_code == 401
    assert key["id"] not in [one["id"] for one in listed(client)]
    shown = client.get(path).json()
    assert shown["active"] is False
    assert shown["updatedAt"] > shown["createdAt"]
    assert listed(client, "deleted")[0] == shown | {"lastUsed": ...}


def test_a_key_may_delete_itself(client: httpx.Client, admin_key: Created) -> None:
    """Its own deletion is the last thing that it may do."""
    assert client.delete(f"{KEYS}/{admin_key.record.id}").json()["success"] is True
    answer = client.delete(f"{KEYS}/{admin_key.record.id}")
    assert answer.status_code == 401
    assert answer.json() == error("UNAUTHORIZED", "The API key is not valid")


@pytest.mark.parametrize("include", ["", "all", "DELETED", "deleted,active"])
def test_only_the_word_deleted_includes_deleted_keys(client: httpx.Client, include: str) -> None:
    """Any other value of `include` shows what no value shows."""
    client.delete(f"{KEYS}/{created(client)['id']}")
    assert listed(client, include) == listed(client)
    assert len(listed(client, "deleted")) == len(listed(client)) + 1


@pytest.mark.parametrize("method", ONE_KEY)
def test_foreign_unknown_and_malformed_ids_look_the_same(
    client: httpx.Client, sidecar: Sidecar, method: str
) -> None:
    """No answer shows whether another organisation has a key: 404, byte for byte the same."""
    other_id = sidecar.create(name="Foreign").record.id
    ids = [
        other_id,
        "key_000000000000",
        "1",
        "%00",
        "%0A",
        "a%0Ab",
        "a%2Fb",
        "..%2F",
        "%F0%9F%94%91",
    ]
    ids += ["key_'%20OR%201=1--", "%25", "*", "x" * 4000, "a/b", ""]
    body = {"name": "Mine"} if method == "PATCH" else None
    answers = [client.request(method, f"{KEYS}/{key_id}", json=body) for key_id in ids]
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (404, answers[0].content)
    }
    assert answers[0].json() == error("NOT_FOUND", "API key not found")
    assert {str(sorted(answer.headers.items())) for answer in answers} == {
        str(sorted(answers[0].headers.items()))
    }


def test_organizations_see_their_own_keys_only(
    client: httpx.Client, sidecar: Sidecar, admin_key: Created
) -> None:
    """No list, and no parameter, shows or creates another organisation's keys."""
    other = sidecar.create(name="Other")
    mine, theirs = admin_key.record.organization_id, other.record.organization_id
    for name in ("organizationId", "organization", "teamId"):
        keys = client.get(KEYS, params={name: theirs, "include": "deleted"}).json()
        assert {key["organizationId"] for key in keys} == {mine}
        key = client.post(KEYS, params={name: theirs}, json={"name": "Mine"}).json()
        assert key["organizationId"] == mine
        assert client.post(KEYS, json={"name": "Spy", name: theirs}).status_code == 400
    with sidecar.client(other) as others:
        assert [key["name"] for key in others.get(KEYS).json()] == ["Other"]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_without_a_key_nothing_is_answered(sidecar: Sidecar, method: str, path: str) -> None:
    """401 with a bare challenge, because no error is named where no key was sent (RFC 6750 3)."""
    with sidecar.client() as anonymous:
        answer = anonymous.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="keylatch"'
    message = "Send an API key: Authorization: Bearer <key>"
    assert answer.json() == error("UNAUTHORIZED", message)


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_key_that_is_no_good_is_unauthorized(
    client: httpx.Client, sidecar: Sidecar, method: str, path: str
) -> None:
    """Made-up, deleted, disabled and expired keys get one and the same 401."""
    soon = iso(int(sidecar.clock() * 1000) + 60_000)
    deleted, disabled, expired = created(client), created(client), created(client, expiresAt=soon)
    client.delete(f"{KEYS}/{deleted['id']}")
    client.patch(f"{KEYS}/{disabled['id']}", json={"active": False})
    assert client.get(KEYS, headers=bearer(expired)).status_code == 200
    sidecar.clock.tick(60)  # at the same time
    made_up = {"token": "unsent_live_1234567890abcdef1234567890abcdef"}
    answers = [
        client.request(method, path, headers=bearer(key))
        for key in (made_up, deleted, disabled, expired)
    ]
    assert {answer.status_code for answer in answers} == {401}
    challenges = {answer.headers["WWW-Authenticate"] for answer in answers}
    assert challenges == {'Bearer realm="keylatch", error="invalid_token"'}
    assert {answer.content for answer in answers} == {answers[0].content}
    assert answers[0].json() == error("UNAUTHORIZED", "The API key is not valid")


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_sending_key_may_not_manage_keys(client: httpx.Client, method: str, path: str) -> None:
    """403 FORBIDDEN on every call, before its body is read."""
    sending = created(client, permission="SENDING")
    answer = client.request(method, path, headers=bearer(sending))
    assert answer.status_code == 403
    challenge = 'Bearer realm="keylatch", error="insufficient_scope", scope="FULL"'
    assert answer.headers["WWW-Authenticate"] == challenge
    assert answer.json() == error("FORBIDDEN", "The API key may not do this")


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


def test_a_key_outside_the_authorization_header_does_not_count(
    sidecar: Sidecar, admin_key: Created
) -> None:
    """Query, cookie, body and other headers are not looked at."""
    token = admin_key.token.reveal()
    with sidecar.client() as anonymous:
        places: list[dict[str, Any]] = [
            {"params": {"access_token": token, "key": token, "api_key": token}},
            {"headers": {"Cookie": f"access_token={token}; key={token}"}},
            {"headers": {"X-API-Key": token, "Proxy-Authorization": f"Bearer {token}"}},
            {"json": {"access_token": token, "key": token}},
        ]
        answers = [anonymous.request("GET", KEYS, **place) for place in places]
    assert [answer.status_code for answer in answers] == [401, 401, 401, 401]


@pytest.mark.parametrize("environment", ["live", "staging"])
def test_no_caller_creates_a_key_with_more_rights_than_its_own(
    client: httpx.Client, environment: str
) -> None:
    """A key for test makes keys for test only; a way into live would be a new right."""
    tester = bearer(created(client, environment="test"))
    mine = client.post(KEYS, json={"name": "Mine"}, headers=tester).json()
    assert mine["environment"] == "test"
    assert mine["token"].startswith("kl_test_")
    before = listed(client)
    body = {"name": "More", "environment": environment}
    answer = client.post(KEYS, json=body, headers=tester)
    assert answer.status_code == 403
    message = f"a key for test cannot manage one for {environment}"
    assert answer.json() == error("FORBIDDEN", message)
    challenge = 'Bearer realm="keylatch", error="insufficient_scope"'
    assert answer.headers["WWW-Authenticate"] == challenge
    assert listed(client) == before


def test_a_live_key_makes_keys_for_any_environment(client: httpx.Client) -> None:
    """Live is the larger right."""
    assert created(client, environment="test")["token"].startswith("kl_test_")
    assert created(client, environment=None)["environment"] == "live"


def test_a_key_may_expire(client: httpx.Client) -> None:
    """`expiresAt` takes any offset and is answered in UTC."""
    key = created(client, expiresAt="2099-12-31T23:30:00.5-01:00")
    assert key["expiresAt"] == "2100-01-01T00:30:00.500Z"
    assert created(client, expiresAt=None)["expiresAt"] is None


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"name": " Renamed "}, {"name": "Renamed"}),
        ({"active": False}, {"active": False}),
        ({"permission": "SENDING"}, {"permission": "SENDING"}),
        ({"expiresAt": "2100-01-01T00:00:00Z"}, {"expiresAt": "2100-01-01T00:00:00.000Z"}),
        ({"expiresAt": None}, {"expiresAt": None}),
        ({"name": "A", "active": True, "permission": "FULL"}, {"name": "A", "active": True}),
    ],
)
def test_a_key_can_be_changed(
    client: httpx.Client, sidecar: Sidecar, change: dict[str, Any], shown: dict[str, Any]
) -> None:
    """PATCH changes what it names and `updatedAt`, and nothing else."""
    key = created(client, expiresAt="2099-01-01T00:00:00Z")
    key.pop("token")
    sidecar.clock.tick(1)
    answer = client.patch(f"{KEYS}/{key['id']}", json=change)
    assert answer.status_code == 200
    changed = answer.json()
    assert changed["updatedAt"] > key["updatedAt"]
    assert changed == key | shown | {"updatedAt": changed["updatedAt"]}
    assert changed == client.get(f"{KEYS}/{key['id']}").json()


def test_a_disabled_key_is_listed_and_can_be_enabled_again(client: httpx.Client) -> None:
    """Unlike deleting, disabling is not final; both take effect at once."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    seen = []
    for active in (False, True, False, True):
        assert client.patch(path, json={"active": active}).json()["active"] is active
        assert client.get(KEYS).json()[0]["active"] is active
        seen.append(client.get(KEYS, headers=bearer(key)).status_code)
    assert seen == [401, 200, 401, 200]


@pytest.mark.parametrize("change", [{"active": True}, {"name": "Back"}, {"expiresAt": None}])
def test_a_deleted_key_stays_deleted(client: httpx.Client, change: dict[str, Any]) -> None:
    """No change re-activates it."""
    key = created(client)
    path = f"{KEYS}/{key['id']}"
    client.delete(path)
    before = client.get(path).json()
    answer = client.patch(path, json=change)
    assert answer.status_code == 400
    assert answer.json() == error("BAD_REQUEST", "The API key was deleted; that is final")
    assert client.get(path).json() == before
    assert client.get(KEYS, headers=bearer(key)).status_code == 401


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b"\xff\x00", b'{"name":1}'])
@pytest.mark.parametrize("media_type", ["application/json", "text/plain", None])
def test_no_body_is_needed_or_read_on_get_and_delete(
    client: httpx.Client, content: bytes, media_type: str | None
) -> None:
    """All SDKs name a media type there and send nothing; whatever is sent does not matter."""
    key = created(client)
    headers = {"Content-Type": media_type} if media_type else {}
    calls = [("GET", KEYS), ("GET", f"{KEYS}/{key['id']}"), ("DELETE", f"{KEYS}/{key['id']}")]
    for method, path in calls:
        answer = client.request(method, path, content=content, headers=headers)
        assert answer.status_code == 200, (method, answer.text)


@pytest.mark.parametrize("authorization", ["good", ""])
def test_head_is_get_without_the_body(client: httpx.Client, authorization: str) -> None:
    """The same status and headers, and no body, for good and bad keys."""
    paths = [f"{KEYS}/{created(client)['id']}", f"{KEYS}/key_1"]
    headers = {} if authorization else {"Authorization": ""}
    for path in paths:
        get, head = client.get(path, headers=headers), client.head(path, headers=headers)
        assert head.content == b""
        assert (head.status_code, head.headers) == (get.status_code, get.headers)
    assert client.head(KEYS, headers=headers).status_code == (200 if authorization else 401)


@pytest.mark.parametrize(
    ("path", "allowed"), [(KEYS, "GET, HEAD, POST"), (f"{KEYS}/key_1", "GET, HEAD, PATCH, DELETE")]
)
def test_other_methods_are_not_allowed(client: httpx.Client, path: str, allowed: str) -> None:
    """405 that names the methods that are."""
    names = set(allowed.split(", "))
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - names:
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["Allow"].split(", ")) == names
        assert answer.json() == error("METHOD_NOT_ALLOWED", "Method Not Allowed")


def test_no_answer_is_kept_on_the_way(client: httpx.Client) -> None:
    """Every answer is JSON with its length and `Cache-Control: no-store`, and sets no cookie."""
    path = f"{KEYS}/{created(client)['id']}"
    answers = [
        client.post(KEYS, json={"name": "CI"}),
        client.post(KEYS, json={}),
        client.post(KEYS, content="x" * 20_000),
        client.get(KEYS),
        client.get(path),
        client.patch(path, json={"name": "CD"}),
        client.delete(path),
        client.put(path),
        client.get(f"{KEYS}/unknown"),
        client.get(KEYS, headers={"Authorization": "Bearer made-up"}),
        client.get("/nowhere"),
    ]
    for answer in answers:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Type"] == "application/json"
        assert int(answer.headers["Content-Length"]) == len(answer.content)
        assert "Set-Cookie" not in answer.headers
        assert "Location" not in answer.headers


@pytest.mark.long
def test_last_used_is_null_until_the_key_is_used(store_url: str, clock: Clock) -> None:
    """`lastUsed` is there from the start, and a graceful stop loses no use."""
    with sidecar_on(store_url, clock) as sidecar:
        admin_key = sidecar.create()
        with sidecar.client(admin_key) as client:
            used, unused = created(client, name="Used"), created(client, name="Unused")
            assert [key["lastUsed"] for key in (used, unused)] == [None, None]
            clock.tick(5)
            assert client.get(KEYS, headers=bearer(used)).status_code == 200
    with sidecar_on(store_url, clock) as sidecar, sidecar.client(admin_key) as client:
        last_used = {key["name"]: key["lastUsed"] for key in client.get(KEYS).json()}
    assert last_used["Used"] == "2027-01-15T08:00:05.000Z"
    assert last_used["Unused"] is None
    assert used["updatedAt"] == "2027-01-15T08:00:00.000Z"


def test_tokens_with_the_prefix_unsent_look_like_the_seeds(
    store_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`KEYLATCH_PREFIX=unsent`: `unsent_live_…` and `unsent_...a1b2`."""
    monkeypatch.setenv("KEYLATCH_PREFIX", "unsent")
    with sidecar_on(store_url, clock) as sidecar, sidecar.client(sidecar.create()) as client:
        key = created(client)
        assert re.fullmatch(r"unsent_live_\w+", key["token"])
        assert re.fullmatch(r"unsent_\.\.\.[A-Za-z0-9]{4}", key["partialToken"])
        assert key["token"].endswith(key["partialToken"].removeprefix("unsent_..."))
        assert client.get(KEYS, headers=bearer(key)).status_code == 200


class _Broken(Engine):
    async def authenticate(self, *_: Any) -> Decision:
        raise RuntimeError("the secret of the house")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (KEYS, error("INTERNAL_SERVER_ERROR", "Internal error; the sidecar has logged it")),
        (
            "/v1/api_keys",
            {
                "error": "Internal error; the sidecar has logged it",
                "message": "Internal error; the sidecar has logged it",
                "code": "INTERNAL_SERVER_ERROR",
            },
        ),
    ],
)
def test_our_own_fault_is_a_500_that_says_nothing(
    store_url: str, path: str, body: dict[str, Any]
) -> None:
    """In the dialect's shape, and without a stack trace."""
    with serving(create_app(_Broken(Settings.load(store=store_url, redis="")))) as url:
        answer = httpx.get(url + path, trust_env=False)
    assert answer.status_code == 500
    assert answer.json() == body


# The page's own examples, by the program that people try them with.


def curl(*arguments: str) -> Any:
    program = require_program(shutil.which("curl"), "curl")
    command = [program, "--silent", "--show-error", "--noproxy", "*", *arguments]
    ran = subprocess.run(command, capture_output=True, check=True, timeout=30)
    return json.loads(ran.stdout)


def test_the_examples_of_the_page_run_with_curl(sidecar: Sidecar, admin_key: Created) -> None:
    """Create, list and delete, as unsent's page shows them."""
    authorized = ("-H", f"Authorization: Bearer {admin_key.token.reveal()}")
    keys = f"{sidecar.url}{KEYS}"
    as_json = ("-H", "Content-Type: application/json")
    body = ("-d", '{"name": "Production App", "permission": "SENDING"}')
    key = curl("-X", "POST", keys, *authorized, *as_json, *body)
    assert key["token"].startswith("kl_live_")
    shown = [(one["name"], one["permission"]) for one in curl(keys, *authorized)]
    assert shown == [("Production App", "SENDING"), ("Admin key", "FULL")]
    assert curl("-X", "DELETE", f"{keys}/{key['id']}", *authorized)["success"] is True
    assert [one["name"] for one in curl(keys, *authorized, *as_json)] == ["Admin key"]


def test_curl_without_a_json_content_type_gets_415(sidecar: Sidecar, admin_key: Created) -> None:
    """curl's default is a form: 415 that says what to send."""
    authorized = ("-H", f"Authorization: Bearer {admin_key.token.reveal()}")
    answer = curl(f"{sidecar.url}{KEYS}", *authorized, "-d", '{"name": "CI"}')
    message = "Send JSON: Content-Type: application/json"
    assert answer == error("UNSUPPORTED_MEDIA_TYPE", message)
