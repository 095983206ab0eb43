"""Bad request bodies on a real socket: the exact refusal, nothing changed, the connection kept."""

import contextlib
import http.client
import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from keylatch.management.keyring import Created
from keylatch_sidecar.api import request_body
from tests.support.sidecars import Sidecar

UNSENT, SENDOOK = "/v1/api-keys", "/v1/api_keys"
JSON = "application/json"
BEYOND_LIMITS = "The body has a number that is too large, or is nested too deeply"
NOT_GIVEN = object()

BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: Any


class RawConnection:
    """One TCP connection that is never opened a second time."""

    def __init__(self, sidecar: Sidecar, admin_key: Created) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(sidecar.url).netloc, timeout=30)
        self._connection.connect()
        self._connection.auto_open = 0
        self._authorization = {"Authorization": f"Bearer {admin_key.token.reveal()}"}

    def send(self, method: str, path: str, body: Any = None, *types: str, **options: Any) -> Answer:
        headers = self._authorization | dict(zip(["Content-Type"], types, strict=False))
        headers |= options.pop("headers", {})
        with contextlib.suppress(ConnectionError):  # hung up on while sending: there is an answer
            self._connection.request(method, path, body, headers, **options)
        response = self._connection.getresponse()
        return Answer(response.status, response.headers, json.loads(response.read()))

    def all_keys(self) -> Any:
        """Every key of the organisation, deleted ones too; a request changes `lastUsed` only."""
        keys = self.send("GET", f"{UNSENT}?include=deleted").body
        return [key | {"lastUsed": ...} for key in keys]

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="module")
def admin_key(sidecar: Sidecar) -> Created:
    """One organisation for all: what these tests compare is before and after."""
    return sidecar.create()


@pytest.fixture
def raw_connection(sidecar: Sidecar, admin_key: Created) -> Iterator[RawConnection]:
    raw_connection = RawConnection(sidecar, admin_key)
    yield raw_connection
    raw_connection.close()


@pytest.fixture(params=["create in unsent", "create in Sendook", "change in unsent"])
def call(request: pytest.FixtureRequest, admin_key: Created) -> tuple[str, str]:
    """Each call that reads a body: method and path."""
    calls = {
        "create in unsent": ("POST", UNSENT),
        "create in Sendook": ("POST", SENDOOK),
        "change in unsent": ("PATCH", f"{UNSENT}/{admin_key.record.id}"),
    }
    return calls[request.param]


def unsent_error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}, "code": code, "message": message}


def error(path: str, code: str, message: str) -> dict[str, Any]:
    """The error in the path's dialect."""
    if path == SENDOOK:
        return {"error": message, "message": message, "code": code}
    return unsent_error(code, message)


def field_error(path: str, value: Any = NOT_GIVEN) -> dict[str, Any]:
    given = {} if value is NOT_GIVEN else {"value": value}
    fault = {"type": "field", "msg": "Invalid value", "path": path, "location": "body"}
    return {"errors": [fault | given]}


@pytest.mark.parametrize(
    "media_type",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("application/jsonp", "application/javascript", "text/json", "json", "", "*/*"),
    ],
)
def test_a_body_of_another_type_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], media_type: str
) -> None:
    """415, even where the bytes are JSON: what a browser sends unasked is none of these calls."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(*call, b'{"name":"CI"}', media_type)
    assert answer.status == 415
    message = "Send JSON: Content-Type: application/json"
    assert answer.body == error(call[1], "UNSUPPORTED_MEDIA_TYPE", message)
    assert raw_connection.all_keys() == before


def test_a_body_without_a_type_is_refused(
    raw_connection: RawConnection, call: tuple[str, str]
) -> None:
    """415: nothing is guessed."""
    before = raw_connection.all_keys()
    assert raw_connection.send(*call, b'{"name":"CI"}').status == 415
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize(
    "body",
    [
        *(b"name=CI", b"{'name':'CI'}", b'{"name":"CI"', b'{"name":"CI",}', b"{name:1}", b" "),
        *(b'{"name":"CI"}{"name":"CI"}', b'{"name":"CI"}x', b'{"name":"a\x00b"}', b"\x00"),
        *(b'{"name":"\xff"}', b'{"name":"\xed\xa0\x80"}', b'{"name":"\xc0\xaf"}', b'"\xf4\x90"'),
        *('{"name":"CI"}'.encode("utf-16"), b'\xef\xbb\xbf{"name":"CI"}', b'{"name":"C\nI"}'),
        *(b'{"name":NaN}', b'{"name":"CI","x":Infinity}', b'{"name":-Infinity}', b'{"name":01}'),
    ],
)
def test_a_body_that_is_not_json_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], body: bytes
) -> None:
    """415 for broken JSON, broken UTF-8, other encodings, and Python's own NaN and Infinity."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(*call, body, JSON)
    assert answer.status == 415
    assert answer.body == error(call[1], "UNSUPPORTED_MEDIA_TYPE", answer.body["message"])
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize("body", [b"[]", b'[{"name":"CI"}]', b'"CI"', b"1", b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], body: bytes
) -> None:
    """400: these calls take objects."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(*call, body, JSON)
    assert answer.status == 400
    assert answer.body == error(call[1], "BAD_REQUEST", "The body must be a JSON object")
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize(
    "value",
    [
        *(b"1" * 4301, b"-" + b"1" * 16_000, b"1e999", b"-1e999"),
        *(b"[" * depth + b"]" * depth for depth in (32, 100, 960, 970, 980, 990, 1000, 8000)),
        *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (32, 320, 330, 980, 1000, 2700)),
    ],
    ids=lambda value: f"{value[:4].decode()}... {len(value)}",
)
def test_numbers_and_nesting_beyond_reason_are_refused(
    raw_connection: RawConnection, call: tuple[str, str], value: bytes
) -> None:
    """400, never 500 and never a crash, at every depth and in every field."""
    before = raw_connection.all_keys()
    for field in (b"name", b"other"):
        answer = raw_connection.send(*call, b'{"%s":%s}' % (field, value), JSON)
        assert answer.status == 400
        assert answer.body == error(call[1], "BAD_REQUEST", BEYOND_LIMITS)
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize("size", [16 * 1024 + 1, 100_000, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_16_kib_is_refused(
    raw_connection: RawConnection,
    sidecar: Sidecar,
    admin_key: Created,
    call: tuple[str, str],
    size: int,
    chunked: bool,
) -> None:
    """413, with or without a length, and the connection is closed instead of read to its end."""
    before = raw_connection.all_keys()
    body = b'{"name":"CI"}'.ljust(size)
    pieces = (body[at : at + 5000] for at in range(0, size, 5000))
    answer = raw_connection.send(*call, pieces if chunked else body, JSON, encode_chunked=chunked)
    assert answer.status == 413
    message = "The body must not exceed 16384 bytes"
    assert answer.body == error(call[1], "PAYLOAD_TOO_LARGE", message)
    assert answer.headers["Connection"] == "close"
    another = RawConnection(sidecar, admin_key)
    assert another.all_keys() == before
    another.close()


def test_a_body_has_to_arrive_in_time(
    sidecar: Sidecar, admin_key: Created, call: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """408 in the dialect's words, the connection is closed, and nothing was changed."""
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.1)
    raw_connection = RawConnection(sidecar, admin_key)
    before = raw_connection.all_keys()
    body = (piece for piece in [b'{"name":', b'"CI"'])  # and not what ends it
    answer = raw_connection.send(*call, body, JSON, headers={"Content-Length": "13"})
    assert answer.status == 408
    message = "The body did not arrive in 0.1 s"
    assert answer.body == error(call[1], "REQUEST_TIMEOUT", message)
    assert answer.headers["Connection"] == "close"
    another = RawConnection(sidecar, admin_key)
    assert another.all_keys() == before
    another.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_16_kib_is_accepted(
    raw_connection: RawConnection, call: tuple[str, str], chunked: bool
) -> None:
    """The limit itself is within the limit."""
    body = b'{"name":"CI"}'.ljust(16 * 1024)
    pieces = (body[at : at + 100] for at in range(0, len(body), 100))
    answer = raw_connection.send(*call, pieces if chunked else body, JSON, encode_chunked=chunked)
    assert answer.status == 200
    assert answer.body["name"] == "CI"


@pytest.mark.parametrize(
    "media_type",
    [JSON, "Application/JSON", "application/json; charset=utf-8", "application/merge-patch+json"],
)
def test_every_spelling_of_json_is_accepted(
    raw_connection: RawConnection, call: tuple[str, str], media_type: str
) -> None:
    """Letter case, parameters and the `+json` family."""
    assert raw_connection.send(*call, b'{"name":"CI"}', media_type).status == 200


NO_STRINGS: list[Any] = [1, 1.5, True, None, [], {}, ["CI"], {"$gt": ""}, 10**4000]
NO_NAMES: list[tuple[Any, str]] = [
    *((text, "must not be empty or blank") for text in ("", " ", "\t\r\n", "\u3000\xa0")),
    *((text, "must have at most 100 characters") for text in ("x" * 101, "\U0001f511" * 101)),
    *((f"C{sign}I", "must not hold control characters") for sign in BIDI_CONTROLS),
    *((f"C{sign}I", "must not hold control characters") for sign in "\0\a\n\r\t\x1b\x7f\x85"),
    *((f"C{sign}I", "must not hold control characters") for sign in "\u2028\u2029"),
    *((f"C{sign}I", "must not hold control characters") for sign in "\ud800\udfff"),
    *((value, "Input should be a valid string") for value in NO_STRINGS),
]


@pytest.mark.parametrize(("given", "message"), NO_NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], given: Any, message: str
) -> None:
    """400 in the dialect's shape; Sendook's quotes what was given, lone surrogates too."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(*call, json.dumps({"name": given}), JSON)
    assert answer.status == 400
    if call[1] == SENDOOK:
        assert answer.body == field_error("name", given)
    else:
        assert answer.body == unsent_error("BAD_REQUEST", f"name: {message}")
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 100, "\U0001f511" * 100, "CI/CD Pipeline", "<b>&\"'\\"),
        *("مفتاح", "מפתח", "鍵", "clé", "123", "name: x"),
        *("👩\u200d👩\u200d👧", "'; DROP TABLE keys; --", "${jndi:ldap://x}", "{{7*7}}", "null"),
    ],
)
def test_a_name_in_any_script_is_accepted(
    raw_connection: RawConnection, call: tuple[str, str], name: str
) -> None:
    """Up to 100 characters, kept as they came, without the blanks around them."""
    answer = raw_connection.send(*call, json.dumps({"name": f" \t{name}\n"}), JSON)
    assert answer.status == 200
    assert answer.body["name"] == name
    assert name in [key["name"] for key in raw_connection.all_keys()]


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ('{"name":"CI","name":"CD"}', "name", "CD"),
        ('{"name":"CI","name":"CI"}', "name", "CI"),
        ('{"name":"CI","n\\u0061me":"CD"}', "name", "CD"),
        ('{"name":"CI","x":{"y":1,"y":2}}', "y", 2),
    ],
)
def test_a_name_that_is_there_twice_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], body: str, name: str, value: Any
) -> None:
    """Parsers disagree on which one counts, so neither does."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(*call, body, JSON)
    assert answer.status == 400
    if call[1] == SENDOOK:
        assert answer.body == field_error(name, value)
    else:
        assert answer.body == unsent_error("BAD_REQUEST", f"{name}: is there twice")
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize(
    "field",
    [
        *("organizationId", "organization_id", "id", "_id", "key", "token", "createdAt"),
        *("lastUsed", "expires_at", "deletedAt", "hash", "role", "__proto__", "Name", "name "),
    ],
)
def test_an_unknown_field_is_refused(
    raw_connection: RawConnection, call: tuple[str, str], field: str
) -> None:
    """400: a field that is ignored now could have a meaning later, and clients assign no ids."""
    before = raw_connection.all_keys()
    for value in ("x", None, {"a": [1]}):
        answer = raw_connection.send(*call, json.dumps({"name": "CI", field: value}), JSON)
        assert answer.status == 400
        if call[1] == SENDOOK:
            assert answer.body == field_error(field, value)
        else:
            message = f"{field}: is no field of this body"
            assert answer.body == unsent_error("BAD_REQUEST", message)
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize("field", ["permission", "environment", "expiresAt", "active"])
def test_sendooks_keys_have_nothing_but_a_name_to_choose(
    raw_connection: RawConnection, field: str
) -> None:
    """keylatch's extensions are on the other dialect."""
    answer = raw_connection.send("POST", SENDOOK, json.dumps({"name": "CI", field: "x"}), JSON)
    assert answer.status == 400
    assert answer.body == field_error(field, "x")


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_an_empty_body_lacks_the_name(raw_connection: RawConnection, body: bytes) -> None:
    """400 that names what is missing, whatever the empty body is called."""
    before = raw_connection.all_keys()
    for media_type in (JSON, "text/plain", "") if not body else (JSON,):
        unsent, sendook = (
            raw_connection.send("POST", path, body, media_type) for path in (UNSENT, SENDOOK)
        )
        assert unsent.status == sendook.status == 400
        assert unsent.body == unsent_error("BAD_REQUEST", "name: Field required")
        assert sendook.body == field_error("name")
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_a_change_of_nothing_is_refused(
    raw_connection: RawConnection, admin_key: Created, body: bytes
) -> None:
    """400 that says what could be changed."""
    before = raw_connection.all_keys()
    answer = raw_connection.send("PATCH", f"{UNSENT}/{admin_key.record.id}", body, JSON)
    message = "Nothing to change: send a field of the key"
    assert (answer.status, answer.body) == (400, unsent_error("BAD_REQUEST", message))
    assert raw_connection.all_keys() == before


NO_TIMES: list[Any] = [1, 4102444800, "4102444800", "tomorrow", "2100-01-01", "", True, [], {}]
NO_PERMISSIONS: list[Any] = [None, 1, True, ["FULL"]]
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"permission": word}, "permission: must be one of FULL, SENDING")
        for word in ("", "full", "ROOT", "FULL,SENDING", "FULL ", "SENDING\u0000")
    ),
    *(({"permission": value}, "permission: Input should") for value in NO_PERMISSIONS),
    *(
        ({"expiresAt": value}, "expiresAt: must be an ISO 8601 time with an offset")
        for value in NO_TIMES
    ),
    ({"expiresAt": "2100-01-01T00:00:00"}, "expiresAt: Input should have timezone info"),
    ({"expiresAt": "2100-02-30T00:00:00Z"}, "expiresAt: Input should be a valid datetime"),
    ({"expiresAt": "9999-12-31T23:59:59-01:00"}, "expiresAt: must lie between the years"),
    ({"expiresAt": "0001-01-01T00:00:00+01:00"}, "expiresAt: must lie between the years"),
    *(
        ({"expiresAt": time}, "expiresAt: must lie in the future")
        for time in ("2027-01-15T08:00:00Z", "1970-01-01T00:00:00Z", "0001-01-01T00:00:00Z")
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=ascii)
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_bad_value_is_refused_by_name(
    raw_connection: RawConnection,
    admin_key: Created,
    method: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    """Permission and expiry are checked on create and on change."""
    before = raw_connection.all_keys()
    path = UNSENT if method == "POST" else f"{UNSENT}/{admin_key.record.id}"
    answer = raw_connection.send(method, path, json.dumps({"name": "CI", **fields}), JSON)
    assert answer.status == 400
    assert answer.body["message"].startswith(message)
    assert answer.body == unsent_error("BAD_REQUEST", answer.body["message"])
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize("word", ["", "LIVE", "li_ve", "1st", "x" * 17, "live\n", "é", " live"])
def test_a_bad_environment_is_refused(raw_connection: RawConnection, word: str) -> None:
    """It becomes a part of the token, so it must be of the token's grammar."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(
        "POST", UNSENT, json.dumps({"name": "CI", "environment": word}), JSON
    )
    message = "environment: must match [a-z][a-z0-9]{0,15}"
    assert (answer.status, answer.body) == (400, unsent_error("BAD_REQUEST", message))
    assert raw_connection.all_keys() == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"active": "false"}, "active"), ({"active": None}, "active"), ({"active": 0}, "active")],
)
def test_a_key_is_active_or_not(
    raw_connection: RawConnection, admin_key: Created, fields: dict[str, Any], named: str
) -> None:
    """Only `true` and `false` are; a word that looks like one disables nothing."""
    before = raw_connection.all_keys()
    answer = raw_connection.send(
        "PATCH", f"{UNSENT}/{admin_key.record.id}", json.dumps(fields), JSON
    )
    message = f"{named}: Input should be a valid boolean"
    assert (answer.status, answer.body) == (400, unsent_error("BAD_REQUEST", message))
    assert raw_connection.all_keys() == before


def test_every_fault_of_a_body_is_named_at_once(raw_connection: RawConnection) -> None:
    """The answer lists all mistakes at once."""
    body = json.dumps({"name": 1, "permission": None, "spy": 1})
    unsent, sendook = (raw_connection.send("POST", path, body, JSON) for path in (UNSENT, SENDOOK))
    assert [part.partition(":")[0] for part in unsent.body["message"].split("; ")] == [
        *("name", "permission", "spy")
    ]
    assert [fault["path"] for fault in sendook.body["errors"]] == ["name", "permission", "spy"]


def test_no_body_is_read_for_a_caller_without_a_key(sidecar: Sidecar, admin_key: Created) -> None:
    """The response is sent before the body arrives: an unauthenticated upload costs nothing."""
    host, port = urlsplit(sidecar.url).netloc.split(":")
    for path in (UNSENT, SENDOOK):
        with socket.create_connection((host, int(port)), timeout=30) as raw_connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
            raw_connection.sendall(head.encode())
            assert raw_connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_ends_early_changes_nothing(
    raw_connection: RawConnection,
    sidecar: Sidecar,
    admin_key: Created,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that disconnects in the middle creates no key and leaves no stack trace."""
    before = raw_connection.all_keys()
    host, port = urlsplit(sidecar.url).netloc.split(":")
    head = (
        f"POST {UNSENT} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 100\r\n"
        f"Authorization: Bearer {admin_key.token.reveal()}\r\n\r\n"
    )
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=30) as caller:
            caller.sendall(head.encode() + b'{"name":"CI"}')
    assert raw_connection.all_keys() == before
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
