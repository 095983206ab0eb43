"""What an operator does to keys at a shell: each command, and what the audit log says of it."""

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.command_line import Operator


def verify(operator: "Operator", token: str) -> int:
    return operator.run("verify", stdin=token).exit_code


def shown(operator: "Operator", key: dict[str, Any]) -> dict[str, Any]:
    of_now: dict[str, Any] = json.loads(operator.run("keys", "show", key["id"], "--json").stdout)
    return of_now


def test_a_rotation_prints_the_new_token_alone(operator: "Operator") -> None:
    """`TOKEN=$(keylatch keys rotate …)` works; both secrets are good for the grace."""
    key = operator.create()
    done = operator.run("keys", "rotate", key["id"], "--grace", "1h")
    token = done.stdout.strip()
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 1)
    assert "is valid until" in done.stderr
    assert token not in done.stderr
    assert verify(operator, key["token"]) == verify(operator, token) == 0
    assert shown(operator, key)["previous"]["partialToken"] == key["partialToken"]


@pytest.mark.parametrize(("command", "old", "new"), [("cancel", 0, 1), ("finish", 1, 0)])
def test_a_rotation_ends_either_way(operator: "Operator", command: str, old: int, new: int) -> None:
    """Back, or on; a second time there is nothing to end."""
    key = operator.create()
    token = operator.run("keys", "rotate", key["id"]).stdout.strip()
    assert operator.run("keys", f"{command}-rotation", key["id"]).exit_code == 0
    assert (verify(operator, key["token"]), verify(operator, token)) == (old, new)
    again = operator.run("keys", f"{command}-rotation", key["id"])
    assert again.exit_code == 1
    assert "No rotation" in again.stderr


def test_without_a_grace_the_old_secret_has_ended(operator: "Operator") -> None:
    """`--grace 0`; and `--json` has the token in the object."""
    key = operator.create()
    new = json.loads(operator.run("keys", "rotate", key["id"], "--grace", "0", "--json").stdout)
    assert new["previous"] is None
    assert (verify(operator, key["token"]), verify(operator, new["token"])) == (1, 0)


def test_a_key_is_disabled_and_enabled(operator: "Operator") -> None:
    """Reversible, unlike a revoke; what was deleted stays so."""
    key = operator.create()
    assert operator.run("keys", "disable", key["id"]).exit_code == 0
    assert verify(operator, key["token"]) == 1
    assert operator.run("keys", "enable", key["id"]).exit_code == 0
    assert verify(operator, key["token"]) == 0
    assert operator.run("keys", "revoke", key["id"], "--reason", "laptop stolen").exit_code == 0
    assert shown(operator, key)["revokedReason"] == "laptop stolen"
    assert operator.run("keys", "enable", key["id"]).exit_code == 1
    assert verify(operator, key["token"]) == 1


@pytest.mark.long
def test_what_is_said_of_a_key_changes(operator: "Operator") -> None:
    """Name, permission, expiry, metadata; only what is given."""
    words = ("--expires-in", "90d", "--metadata", "team=pay", "--metadata", "tier=a=b")
    key = operator.create(*words)
    assert key["metadata"] == {"team": "pay", "tier": "a=b"}
    assert key["expiresAt"] is not None
    done = operator.run("keys", "change", key["id"], "--name", "new", "--permission", "SENDING")
    assert done.exit_code == 0
    now = shown(operator, key)
    assert (now["name"], now["permission"]) == ("new", "SENDING")
    assert (now["expiresAt"], now["metadata"]) == (key["expiresAt"], key["metadata"])
    operator.run("keys", "change", key["id"], "--expires-at", "2099-01-01T00:00:00Z")
    assert shown(operator, key)["expiresAt"] == "2099-01-01T00:00:00.000Z"
    operator.run("keys", "change", key["id"], "--never-expires")
    assert shown(operator, key)["expiresAt"] is None


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--name", ""),
        ("--permission", "ADMIN"),
        ("--expires-in", "soon"),
        ("--expires-at", "2000-01-01T00:00:00Z"),
        ("--expires-at", "tomorrow"),
        ("--expires-in", "1d", "--expires-at", "2099-01-01T00:00:00Z"),
        ("--metadata", "nothing"),
    ],
)
def test_what_no_key_may_have_is_refused(operator: "Operator", words: tuple[str, ...]) -> None:
    """Exit code 2, an error and a hint, and the key as it was."""
    key = operator.create()
    before = shown(operator, key)
    done = operator.run("keys", "change", key["id"], *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert shown(operator, key) == before


@pytest.mark.long
def test_an_organisation_ends_only_for_who_says_yes(operator: "Operator") -> None:
    """All of its keys, and no key of another organisation."""
    keys = [operator.create() for _ in range(3)]
    other = operator.create("--organization", "other")
    assert operator.run("organizations", "revoke", "default").exit_code == 2
    assert verify(operator, keys[0]["token"]) == 0
    done = operator.run("organizations", "revoke", "default", "--yes", "--reason", "over")
    assert "Revoked 3 keys" in done.stderr
    assert [verify(operator, key["token"]) for key in (*keys, other)] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "rotate"),
        ("keys", "cancel-rotation"),
        ("keys", "finish-rotation"),
        ("keys", "change", "--name", "new"),
        ("keys", "disable"),
        ("keys", "enable"),
        ("keys", "revoke"),
    ],
)
def test_an_unknown_key_is_reported(operator: "Operator", words: tuple[str, ...]) -> None:
    """Also one that is not the organisation's that was named."""
    key = operator.create()
    for named in (["key_unknown"], [key["id"], "--organization", "other"]):
        done = operator.run(*words, *named)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no such key" in done.stderr


def test_the_audit_log_is_shown_and_exported(operator: "Operator") -> None:
    """Who: the account at the shell. As JSON lines it is complete, with no secret in it."""
    key = operator.create()
    operator.create("--organization", "other")
    token = operator.run("keys", "rotate", key["id"]).stdout.strip()
    operator.run("keys", "revoke", key["id"])
    operator.run("organizations", "disable", "other")
    exported = operator.run("audit", "--json-lines").stdout
    lines = [json.loads(line) for line in exported.splitlines()]
    assert [line["action"] for line in lines] == [
        "organization.disable",
        "key.delete",
        "key.rotate",
        "key.create",
        "key.create",
    ]
    assert all(line["actor"].startswith("cli:") for line in lines)
    for secret in (key["token"], token):
        assert secret.rpartition("_")[2] not in exported
    of_key = operator.run("audit", "--key", key["id"], "--json-lines", "--limit", "2").stdout
    assert [json.loads(line)["action"] for line in of_key.splitlines()] == [
        "key.delete",
        "key.rotate",
    ]
    table = operator.run("audit", "--organization", "other").stdout
    assert "organization.disable" in table
    assert key["id"] not in table
