"""The command line as operators and scripts meet it: its streams and its exit codes."""

import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing

import pytest

from keylatch.core.tokens import MacKeys, has_valid_checksum
from tests.support.command_line import SCRIPT, Operator, Result, wait_for_exit

UNKNOWN_TOKEN = MacKeys([b"s" * 32]).mint("kl", "live").reveal()


@pytest.mark.long
def test_the_token_is_caught_by_a_shell_and_piped_to_verify(operator: Operator) -> None:
    """`TOKEN=$(keylatch keys create …)` works, and a token gets nowhere but where it is sent."""
    line = 'TOKEN=$("$0" keys create --name ci) && echo "$TOKEN" && echo "$TOKEN" | "$0" verify'
    shell = subprocess.run(
        ["sh", "-c", line, SCRIPT], cwd=operator.folder, capture_output=True, text=True, check=True
    )
    token = shell.stdout.removesuffix("\n")
    assert has_valid_checksum(token)
    key_id = "key_" + token.split("_")[2]
    created, allowed = shell.stderr.splitlines()
    assert created == f"Created {key_id} (FULL) for default. The token is not shown again."
    assert allowed == f"Allowed: {key_id} (FULL)"


@pytest.mark.long
def test_a_key_is_created_listed_shown_and_revoked(operator: Operator) -> None:
    """The whole life of a key; for scripts, each step also speaks JSON."""
    created = operator.run("keys", "create", "--name", "ci", "--permission", "SENDING")
    token = created.stdout.removesuffix("\n")
    key_id = "key_" + token.split("_")[2]
    shown = operator.run("keys", "show", key_id, "--json")
    key = json.loads(shown.stdout)
    assert (key["id"], key["name"], key["permission"]) == (key_id, "ci", "SENDING")
    assert json.loads(operator.run("keys", "list", "--json").stdout) == [key]
    assert json.loads(operator.run("keys", "list", "--organization", "acme", "--json").stdout) == []
    for words in (["list"], ["show", key_id]):
        outcome = operator.run("keys", *words)
        assert outcome.exit_code == 0
        assert key_id in outcome.stdout
        assert token not in outcome.stdout
    revoked = operator.run("keys", "revoke", key_id, "--json")
    assert revoked.exit_code == 0
    assert json.loads(revoked.stdout)["active"] is False
    assert operator.run("keys", "revoke", key_id).exit_code == 0, "repeating it is no mistake"
    assert json.loads(operator.run("keys", "list", "--json").stdout) == []
    assert operator.run("verify", stdin=token) == Result(1, "", "Refused: invalid_token\n")


@pytest.mark.parametrize(
    ("permissions", "code"),
    [
        ([], 0),
        (["SENDING"], 0),
        (["SENDING", "SENDING"], 0),
        (["FULL"], 1),
        (["READING"], 1),
        (["SENDING", "READING"], 1),
        ([""], 1),
        (["sending"], 1),
        (["SENDING&x="], 1),
        (["%53ENDING"], 1),
        (["\udcff"], 1),
    ],
)
def test_verify_asks_for_permissions(operator: Operator, permissions: list[str], code: int) -> None:
    """They add up, and a malformed one leaves only FULL, as with `/verify`."""
    token = operator.create("--permission", "SENDING")["token"]
    words = [word for permission in permissions for word in ("--permission", permission)]
    verified = operator.run("verify", *words, stdin=token + "\n")
    assert (verified.exit_code, verified.stdout) == (code, "")
    assert token not in verified.stderr


def test_verify_that_cannot_decide_is_no_refusal(operator: Operator) -> None:
    """Exit 2 and not 1: a damaged row is no decision on the key."""
    token = operator.create()["token"]
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute("UPDATE keylatch_keys SET hash = '$argon2id$damaged'")
    assert operator.run("verify", stdin=token) == Result(2, "", "Refused: unavailable\n")


def test_json_of_a_new_key_is_one_object(operator: Operator) -> None:
    """With the token this once, the id and the key's fields; in ASCII, whatever it is called."""
    created = operator.run(
        *("keys", "create", "--name", "Schlüssel 🔑", "--organization", "acme", "--json"),
        *("--environment", "test", "--prefix", "acme", "--hasher", "sha256"),
    )
    assert created.stdout.isascii()
    assert created.stderr == ""
    key = json.loads(created.stdout)
    token = key.pop("token")
    assert token.startswith("acme_test_")
    assert key["id"] == "key_" + token.split("_")[2]
    assert key["name"] == "Schlüssel 🔑"
    assert (key["organizationId"], key["environment"]) == ("acme", "test")


def test_an_operator_finds_a_key_of_any_organisation(operator: Operator) -> None:
    """In an emergency the id suffices; an organisation can be named to be sure."""
    key_id = operator.create("--organization", "acme")["id"]
    assert operator.run("keys", "show", key_id, "--organization", "default").exit_code == 1
    assert operator.run("keys", "revoke", key_id, "--organization", "default").exit_code == 1
    assert operator.run("keys", "revoke", key_id).exit_code == 0


MISTAKES = {
    "an unknown id": (["keys", "show", "key_unknown"], "", {}, 1, "no such key"),
    "revoking an unknown id": (["keys", "revoke", "key_unknown"], "", {}, 1, "no such key"),
    "an id that is none": (["keys", "show", "\udcff"], "", {}, 1, "no such key"),
    "a bad name": (["keys", "create", "--name", " "], "", {}, 2, "name: must not be empty"),
    "bytes for a name": (["keys", "create", "--name", "\udcff"], "", {}, 2, "name: "),
    "a bad permission": (
        ["keys", "create", "--name", "x", "--permission", "ROOT"],
        *("", {}, 2, "permission: must be one of FULL, SENDING"),
    ),
    "a bad organisation": (["keys", "list", "--organization", "\udcff"], "", {}, 2, "organisation"),
    "a made-up token": (["verify"], UNKNOWN_TOKEN, {}, 1, "Refused: invalid_token"),
    "no token": (["verify"], "", {}, 1, "no token on standard input"),
    "more than a token": (
        ["verify"],
        "Bearer " + UNKNOWN_TOKEN,
        {},
        1,
        "no token on standard input",
    ),
    "a token to verify as an argument": (
        ["verify", UNKNOWN_TOKEN[:-1]],
        "",
        {},
        2,
        "never an argument",
    ),
    "a token for an id": (["keys", "revoke", UNKNOWN_TOKEN], "", {}, 2, "never an argument"),
    "a token in an option": (
        ["verify", f"--token={UNKNOWN_TOKEN}"],
        "",
        {},
        2,
        "never an argument",
    ),
    "a missing folder": (
        *(["keys", "list"], "", {"STORE": "sqlite:////missing/folder/keys.db"}),
        *(2, "unable to open database file"),
    ),
    "a missing folder to verify in": (
        *(["verify"], UNKNOWN_TOKEN, {"STORE": "sqlite:////missing/folder/keys.db"}),
        *(2, "unable to open database file"),
    ),
    "a folder for a file": (
        ["keys", "list"],
        "",
        {"STORE": "sqlite:////"},
        2,
        "is not a regular file",
    ),
    "unreachable PostgreSQL": (
        *(["keys", "list"], "", {"STORE": "postgresql://u:hunter2secret@127.0.0.1:1/keys"}),
        *(2, "the store failed"),
    ),
    "a socket in a missing folder": (
        *(["serve", "--uds", "/missing/folder/keylatch.sock"], "", {}, 2, "cannot listen on"),
    ),
    "a Unix socket for gRPC and several workers": (
        *(["serve", "--grpc-uds", "/tmp/grpc.sock", "--workers", "2"], "", {}),
        *(2, "cannot share a Unix socket for gRPC"),
    ),
    "one listener for two": (
        *(["serve", "--admin-port", "8700"], "", {}, 2, "listeners have the same address"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_with_a_hint(operator: Operator, mistake: str) -> None:
    """What is wrong and what to do about it; the exit code has the same for scripts."""
    words, typed, settings, code, message = MISTAKES[mistake]
    operator.set(**settings)
    outcome = operator.run(*words, stdin=typed)
    assert (outcome.exit_code, outcome.stdout) == (code, "")
    assert message in outcome.stderr
    assert UNKNOWN_TOKEN[:-1] not in outcome.stderr
    assert "hunter2secret" not in outcome.stderr
    if not message.startswith("Refused"):
        assert outcome.stderr.count("error: ") == outcome.stderr.count("hint: ") == 1


@pytest.mark.long
def test_all_wrong_settings_are_reported_at_once(operator: Operator) -> None:
    """One run names every mistake, from variables and from options, and shows no traceback."""
    wrong = {"PREFIX": "k_l", "HASHER": "md5", "LEASE": "soon", "REDIS": "http://cache"}
    operator.set(**wrong)
    outcomes = [
        operator.run("keys", "create", "--name", "x", "--store", "mysql://db"),
        wait_for_exit(operator.start("serve", "--store", "mysql://db")),
    ]
    for outcome in outcomes:
        assert (outcome.exit_code, outcome.stdout) == (2, "")
        mistakes, hints = outcome.stderr.splitlines()[::2], outcome.stderr.splitlines()[1::2]
        named = {mistake.removeprefix("error: ").partition(":")[0] for mistake in mistakes}
        assert named == {f"KEYLATCH_{name}" for name in ("STORE", *wrong)}
        assert all(hint.startswith("hint: ") for hint in hints)


def test_a_file_that_is_no_database_is_left_as_it_is(operator: Operator) -> None:
    """A mistyped path must not overwrite a file."""
    operator.database.write_text("my only copy of something else\n" * 100)
    operator.database.chmod(0o644)
    outcome = operator.run("keys", "create", "--name", "x")
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: the store failed: file is not a database\nhint: is ")
    assert operator.database.read_text() == "my only copy of something else\n" * 100
    assert operator.database.stat().st_mode & 0o777 == 0o644


@pytest.mark.long
def test_a_read_only_store_is_named(operator: Operator) -> None:
    """A file that may not be written, also for a root without its usual powers."""
    operator.create()
    read_only = operator.folder / "read-only.db"
    shutil.copy(operator.database, read_only)
    read_only.chmod(0o400)
    wrapper = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is missing: apt-get install util-linux")
        wrapper = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    operator.set(STORE=f"sqlite:///{read_only}")
    outcome = wait_for_exit(operator.start("keys", "create", "--name", "x", wrapper=wrapper))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "error: the store failed: attempt to write a readonly database\n" in outcome.stderr
    assert f"hint: is {read_only} writable" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("words", [["keys", "list"], ["serve"]])
def test_a_newer_store_stops_everything(operator: Operator, words: list[str]) -> None:
    """Neither a command nor the server works on tables that it does not understand."""
    operator.create()
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute("UPDATE keylatch_version SET version_num = '9999'")
    outcome = operator.run(*words)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.endswith("hint: upgrade keylatch on this host\n")


@pytest.mark.long
def test_two_first_keys_at_once_do_no_harm(operator: Operator) -> None:
    """Both processes find an empty store; one sets it up and both keys work."""
    runs = [operator.start("keys", "create", "--name", f"key {n}", "--json") for n in (1, 2)]
    keys = [json.loads(wait_for_exit(run).stdout) for run in runs]
    listed = json.loads(operator.run("keys", "list", "--json").stdout)
    assert {key["id"] for key in listed} == {key["id"] for key in keys}
    assert {key["name"] for key in listed} == {"key 1", "key 2"}
    assert [operator.run("verify", stdin=key["token"]).exit_code for key in keys] == [0, 0]
