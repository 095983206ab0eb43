"""unsent's own Python SDK, as it comes from PyPI, against the sidecar."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from unsent import unsent, unsentHTTPError

from keylatch.management.keyring import Created
from tests.support.sidecars import Sidecar


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def sdk(sidecar: Sidecar, admin_key: Created, session: requests.Session) -> Any:
    """The SDK as its own page shows it, but for the address."""
    return unsent(admin_key.token.reveal(), url=sidecar.url, session=session)


def test_create_list_and_revoke(sdk: Any) -> None:
    """The three calls of the SDK do what its page says."""
    key, error = sdk.api_keys.create({"name": "Production App"})
    assert error is None
    assert key["token"].startswith("kl_live_")
    listed, error = sdk.api_keys.list()
    assert error is None
    assert [one["name"] for one in listed] == ["Production App", "Admin key"]
    assert listed[0]["id"] == key["id"]
    assert listed[0]["partialToken"].endswith(key["token"][-4:])
    for _ in range(2):
        answer, error = sdk.api_keys.revoke(key["id"])
        assert (answer["success"], error) == (True, None)
    listed, error = sdk.api_keys.list()
    assert [one["name"] for one in listed] == ["Admin key"]


@pytest.mark.parametrize("permission", ["FULL", "SENDING"])
def test_create_with_a_permission(sdk: Any, permission: str) -> None:
    """FULL and SENDING are taken; without one it is FULL."""
    sdk.api_keys.create({"name": "CI", "permission": permission})
    sdk.api_keys.create({"name": "CD"})
    listed, _ = sdk.api_keys.list()
    assert [key["permission"] for key in listed[:2]] == ["FULL", permission]


def test_a_created_key_works_in_the_sdk(
    sdk: Any, sidecar: Sidecar, session: requests.Session
) -> None:
    """Until it is revoked."""
    key, _ = sdk.api_keys.create({"name": "CI"})
    other: Any = unsent(key["token"], url=sidecar.url, session=session)
    assert len(other.api_keys.list()[0]) == 2
    sdk.api_keys.revoke(key["id"])
    with pytest.raises(unsentHTTPError) as raised:
        other.api_keys.list()
    assert raised.value.status_code == 401


FAILURES = [
    ("UNAUTHORIZED", 401, "The API key is not valid"),
    ("FORBIDDEN", 403, "The API key may not do this"),
    ("NOT_FOUND", 404, "API key not found"),
    ("BAD_REQUEST", 400, "name: must not be empty or blank"),
]


def failing_call(code: str, sdk: Any) -> Any:
    """A call of the SDK that is answered with this code."""
    if code == "UNAUTHORIZED":
        sdk.headers["Authorization"] = "Bearer unsent_live_1234567890abcdef1234567890abcdef"
    if code == "FORBIDDEN":
        sending, _ = sdk.api_keys.create({"name": "Sender", "permission": "SENDING"})
        sdk.headers["Authorization"] = f"Bearer {sending['token']}"
    if code == "NOT_FOUND":
        return sdk.api_keys.revoke("key_unknown")
    return sdk.api_keys.create({"name": "  "})


@pytest.mark.parametrize(("code", "status", "message"), FAILURES)
def test_an_error_is_raised_with_its_code(sdk: Any, code: str, status: int, message: str) -> None:
    """With `raise_on_error`, the SDK's default, code and message reach the exception."""
    with pytest.raises(unsentHTTPError) as raised:
        failing_call(code, sdk)
    assert raised.value.status_code == status
    assert raised.value.error == {"code": code, "message": message}
    assert f"{status} {code}: {message}" in str(raised.value)


@pytest.mark.parametrize(("code", "status", "message"), FAILURES)
def test_an_error_is_returned_with_its_code(sdk: Any, code: str, status: int, message: str) -> None:
    """Without it, the error is the second of the pair."""
    sdk.raise_on_error = False
    assert failing_call(code, sdk) == (None, {"code": code, "message": message})
