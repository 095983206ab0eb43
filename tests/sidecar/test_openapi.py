"""The OpenAPI document: valid, complete, and true of real answers."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from keylatch.core.validation import validate_name
from keylatch.errors import InvalidValue
from keylatch.management.keyring import Created
from keylatch_sidecar.api.schemas import NAME_PATTERN
from keylatch_sidecar.app import ROUTES
from keylatch_sidecar.forward_auth import ext_authz, verify
from tests.support.clock import Clock
from tests.support.sidecars import Sidecar, sidecar_on

AS_JSON = {"Content-Type": "application/json"}
EXT_AUTHZ = f"{ext_authz.PATH}/{{path}}"
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}


@pytest.fixture
def document(sidecar: Sidecar) -> dict[str, Any]:
    with sidecar.client(sidecar.create()) as manager:
        answer = manager.get("/openapi.json")
    assert answer.status_code == 200
    content: dict[str, Any] = answer.json()
    return content


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """OpenAPI 3.1, by the validator that the ecosystem uses."""
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    """A route that is added to the table must be added to the document."""
    served = {route.path_format for route in ROUTES} | {verify.PATH, EXT_AUTHZ}
    assert document["paths"].keys() == served


def test_what_is_described_is_served_and_nothing_else(
    document: dict[str, Any], client: httpx.Client
) -> None:
    """Described methods are answered by their operation, all others with 405."""
    for path in document["paths"]:
        described = {method for where, method, _ in operations(document) if where == path}
        answered = {
            method
            for method in METHODS
            if client.request(method, path.format(id="key_1", path="v1/me")).status_code != 405
        }
        assert answered == described - {"HEAD"}, path


def test_every_operation_has_a_name_of_its_own_and_a_summary(document: dict[str, Any]) -> None:
    """Generated clients are named after them."""
    described = [operation for _, _, operation in operations(document)]
    names = [operation["operationId"] for operation in described]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in described)


def test_what_is_left_out_of_a_change_has_no_default(document: dict[str, Any]) -> None:
    """A generated client that filled defaults in would enable keys and widen their rights."""
    fields = document["components"]["schemas"]["ChangeKey"]["properties"]
    assert fields.keys() == {
        "name",
        "active",
        "permission",
        "expiresAt",
        "expiresIn",
        "metadata",
    }
    assert all("default" not in field for field in fields.values())


def test_requests_are_described_as_strictly_as_they_are_read(document: dict[str, Any]) -> None:
    """Unknown fields are refused; the document says so. Alerts of others are read as they come."""
    schemas = document["components"]["schemas"]
    for path, _, operation in operations(document):
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            schema = schemas[schema["$ref"].rpartition("/")[2]]
            if path == "/leaked":
                report, alerts = schema["anyOf"]
                assert alerts["items"]["$ref"].endswith("/Alert")
                schema = schemas[report["$ref"].rpartition("/")[2]]
            assert schema["additionalProperties"] is False


def test_management_needs_a_key_and_the_rest_does_not(document: dict[str, Any]) -> None:
    """`security` is on the operations that answer 401 without one."""
    private = ("/v1/", "/verify", "/ext_authz", "/metrics", "/openapi.json")
    for path, _, operation in operations(document):
        assert ("security" in operation) == path.startswith(private)


def test_bodies_are_needed_where_they_are_called_so(
    document: dict[str, Any], sidecar: Sidecar
) -> None:
    """A client made from the document may leave out what is optional, and nothing else."""
    for path, method, operation in operations(document):
        if "requestBody" in operation:
            admin_key = sidecar.create()
            with sidecar.client(admin_key) as caller:
                answer = caller.request(method, path.replace("{id}", admin_key.record.id))
            assert (answer.status_code == 400) == operation["requestBody"]["required"], path


@pytest.mark.parametrize(
    ("seconds", "status"), [("60", 200), ("60.0", 200), ("6e1", 200), ("60.5", 400), ("true", 400)]
)
def test_whole_numbers_are_those_of_json_schema(
    client: httpx.Client, admin_key: Created, seconds: str, status: int
) -> None:
    """However they are written; found by schemathesis."""
    path = f"/v1/api-keys/{admin_key.record.id}/rotate"
    body = f'{{"graceSeconds": {seconds}}}'
    assert client.post(path, content=body, headers=AS_JSON).status_code == status


BLANKS = " \t\n\x1c\x85\xa0\u2028\u3000"
blanks_and_controls = st.sampled_from(BLANKS + "\0\x7f\u200e\u202e\ufeffCI\U0001f511")


@given(st.text(blanks_and_controls, max_size=12) | st.text(max_size=110))
def test_names_are_described_as_they_are_checked(name: str) -> None:
    """What the pattern lets through makes a key, and nothing else does."""
    try:
        validate_name(name)
        is_good = True
    except InvalidValue:
        is_good = False
    assert (re.search(NAME_PATTERN, name) is not None) == is_good


@pytest.mark.parametrize("length", [1, 2, 3, 99, 100, 101])
def test_names_of_every_length_are_described(length: int) -> None:
    """1 to 100 characters, not counting blanks around them."""
    for name in ("x" * length, " " + "x" * length + " "):
        assert (re.search(NAME_PATTERN, name) is not None) == (length <= 100)


def test_permissions_are_those_that_may_be_given(store_url: str, clock: Clock) -> None:
    """A sidecar with words of its own says which."""
    with (
        sidecar_on(store_url, clock, permissions="FULL,READ") as own,
        own.client(own.create()) as manager,
    ):
        schemas = manager.get("/openapi.json").json()["components"]["schemas"]
    for name in ("unsent.CreateKey", "ChangeKey"):
        assert schemas[name]["properties"]["permission"]["enum"] == ["FULL", "READ"]
    assert "enum" not in schemas["unsent.Key"]["properties"]["permission"]


MANAGED = [
    *("/v1/api-keys", "/v1/api-keys/{id}"),
    *("/v1/api_keys", "/v1/api_keys/{id}"),
]


class Transcript:
    """Calls, and which of the described answers they met."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._components = copy.deepcopy(document["components"])
        for schema in self._components["schemas"].values():
            schema["additionalProperties"] = False  # an answer that says more is caught
        self.met: set[tuple[str, str, int]] = set()

    def call(
        self, client: httpx.Client, method: str, path: str, template: str = "", **options: Any
    ) -> Any:
        template = template or path
        answer = client.request(method, path, **options)
        described = self._document["paths"][template][method.lower()]["responses"]
        content = described[str(answer.status_code)]["content"]["application/json"]
        body = answer.json()
        validator = OAS31Validator(content["schema"] | {"components": self._components})
        assert [error.message for error in validator.iter_errors(body)] == []
        self.met.add((template, method, answer.status_code))
        return body


@pytest.mark.long
def test_real_answers_are_as_described(
    document: dict[str, Any],
    client: httpx.Client,
    admin_key: Created,
    sidecar: Sidecar,
    clock: Clock,
    tmp_path: Path,
) -> None:
    """Every described answer is met at least once, and holds exactly what is described."""
    organization = admin_key.record.organization_id
    transcript = Transcript(document)
    with (
        sidecar_on(f"sqlite:///{tmp_path}/missing/keys.db", clock) as down,
        sidecar_on(f"sqlite:///{tmp_path}/keys.db", clock, max_changes=1) as narrow,
        narrow.client(narrow.create()) as limited,
        sidecar.client() as anonymous,
        sidecar.client(sidecar.create(organization, permission="SENDING")) as sending,
        down.client(admin_key) as waiting,
    ):
        for keys in ("/v1/api-keys", "/v1/api_keys"):
            one = f"{keys}/{{id}}"
            key = transcript.call(client, "POST", keys, json={"name": "CI"})
            path = f"{keys}/{key['id']}"
            later = {"Prefer": "respond-async"}
            spare = transcript.call(client, "POST", keys, json={"name": "spare"})
            transcript.call(client, "DELETE", f"{keys}/{spare['id']}", one, headers=later)
            for template, method, operation in operations(document):
                if template not in (keys, one):
                    continue
                where = path if template == one else keys
                for caller in (anonymous, sending, waiting):
                    transcript.call(caller, method, where, template)
                bad = {"Authorization": "Bearer"}
                transcript.call(client, method, where, template, headers=bad)
                if template == one:
                    transcript.call(client, method, f"{keys}/x", one, json={"name": "CD"})
                if "requestBody" in operation:
                    transcript.call(client, method, where, template, json={"name": "CD"})
                    for body in (b"{}", b"[]", b'{"name":1}', b"x", b"x" * 20_000):
                        sent: dict[str, Any] = {"content": body, "headers": AS_JSON}
                        transcript.call(client, method, where, template, **sent)
                else:
                    transcript.call(client, method, where, template)
        for template, method, _ in operations(document):
            if template.startswith("/v1/") and template not in MANAGED:
                its_admin_key = sidecar.create()
                its_key = sidecar.create(its_admin_key.record.organization_id)
                where = template.replace("{id}", its_key.record.id)
                callers = [anonymous, waiting]
                if "403" in document["paths"][template][method.lower()]["responses"]:
                    callers.append(sending)
                for caller in callers:
                    transcript.call(caller, method, where, template)
                with sidecar.client(its_admin_key) as caller:
                    malformed: dict[str, Any] = {"headers": {"Authorization": "Bearer"}}
                    for options in [
                        malformed,
                        {"content": b"x", "headers": AS_JSON},
                        {"content": b"x" * 20_000, "headers": AS_JSON},
                        {"content": b'{"no":1}', "headers": AS_JSON},
                        {"params": {"reason": " "}},
                        {"params": {"limit": "0"}},
                        {"params": {"key": "!"}},
                    ]:
                        transcript.call(caller, method, where, template, **options)
                    unknown = template.replace("{id}", "x")
                    if unknown != template:
                        transcript.call(caller, method, unknown, template)
                    if template.endswith(("/cancel", "/finish")):
                        caller.post(f"/v1/api-keys/{its_key.record.id}/rotate")
                    if "202" in document["paths"][template][method.lower()]["responses"]:
                        spare = sidecar.create(its_admin_key.record.organization_id)
                        with sidecar.client(spare) as last:
                            transcript.call(last, method, where, template, headers=later)
                    transcript.call(caller, method, where, template)
        its_id = limited.post("/v1/api-keys", json={"name": "CI"}).json()["id"]
        for template, method, operation in operations(document):
            if "429" in operation["responses"]:
                where = template.replace("{id}", its_id)
                asked_for = {} if template.endswith("/rotate") else {"name": "CD"}
                transcript.call(limited, method, where, template, json=asked_for)
        for caller, needed in ((anonymous, ""), (sending, "FULL"), (waiting, "")):
            query = {"permission": needed} if needed else {}
            transcript.call(caller, "GET", "/verify", params=query)
            required = {"X-Keylatch-Require": needed} if needed else {}
            for method in sorted(METHODS):
                transcript.call(caller, method, "/ext_authz/x", EXT_AUTHZ, headers=required)
        transcript.call(waiting, "POST", "/leaked", json={"token": "x"})
        for body in (b'{"token":"x"}', b"{}", b"x", b"x" * 20_000):
            transcript.call(anonymous, "POST", "/leaked", content=body, headers=AS_JSON)
        for path in ("/metrics", "/openapi.json"):
            for caller in (anonymous, sending, waiting):
                transcript.call(caller, "GET", path)
            transcript.call(client, "GET", path, headers={"Authorization": "Bearer"})
        transcript.call(client, "GET", "/healthz")
        transcript.call(client, "GET", "/readyz")
        transcript.call(waiting, "GET", "/readyz")
    described = {
        (path, method, int(status))
        for path, method, operation in operations(document)
        for status, answer in operation["responses"].items()
        if "content" in answer
    }
    assert described - transcript.met == set()


@pytest.mark.parametrize(
    "more", [{"token": "kl_live_1"}, {"hash": "x"}, {"lastUsed": 1}, {"id": None}]
)
def test_an_answer_that_says_something_else_would_be_noticed(
    document: dict[str, Any], client: httpx.Client, more: dict[str, Any]
) -> None:
    """The twin of the test above: a list that gives the token away does not pass."""
    key = client.get("/v1/api-keys").json()[0]
    leaky = httpx.MockTransport(lambda _: httpx.Response(200, json=[key | more]))
    twin = httpx.Client(transport=leaky, base_url="http://leaky")
    with twin, pytest.raises(AssertionError):
        Transcript(document).call(twin, "GET", "/v1/api-keys")
