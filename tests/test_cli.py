"""The command line as operators and scripts meet it: its streams and its exit codes."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import grpc
import pytest

from keylatch.tokens import CheckKeys, looks_minted
from keylatch_sidecar.cli import main
from servers import eventually, free_port
from wire import answer, exchange, send

SCRIPT = Path(sys.executable).parent / "keylatch"
STRANGER = CheckKeys([b"s" * 32]).mint("kl", "live").reveal()


@dataclass(frozen=True)
class Outcome:
    """How a run ended and what it wrote."""

    code: int
    out: str
    err: str


class Operator:
    """Somebody at a shell, with a store."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder = folder
        self.database = folder / "keys.db"
        self._monkeypatch = monkeypatch
        self._capture = capture
        self.set(STORE=f"sqlite:///{self.database}", HASHER="sha256", REDIS="")
        monkeypatch.setenv("COLUMNS", "200")

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            self._monkeypatch.setenv(f"KEYLATCH_{name}", value)

    def run(self, *words: str, typed: str = "") -> Outcome:
        """The command in this process, which saves Python's start; an exception fails the test."""
        self._monkeypatch.setattr(sys, "argv", ["keylatch", *words])
        self._monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(typed.encode())))
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return Outcome(code, *self._capture.readouterr())

    def start(self, *words: str, wrapper: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """The real console script, in a process of its own."""
        return subprocess.Popen(
            [*wrapper, str(SCRIPT), *words],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def create(self, *words: str) -> dict[str, Any]:
        """A key, as `--json` shows it."""
        created = self.run("keys", "create", "--name", "a key", "--json", *words)
        key: dict[str, Any] = json.loads(created.out)
        return key


def ended(process: "subprocess.Popen[str]") -> Outcome:
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


@pytest.fixture
def operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    return Operator(tmp_path, monkeypatch, capsys)


def test_the_token_is_caught_by_a_shell_and_piped_to_verify(operator: Operator) -> None:
    """`TOKEN=$(keylatch keys create …)` works, and a token gets nowhere but where it is sent."""
    line = 'TOKEN=$("$0" keys create --name ci) && echo "$TOKEN" && echo "$TOKEN" | "$0" verify'
    shell = subprocess.run(
        ["sh", "-c", line, SCRIPT], cwd=operator.folder, capture_output=True, text=True, check=True
    )
    token = shell.stdout.removesuffix("\n")
    assert looks_minted(token)
    key_id = "key_" + token.split("_")[2]
    created, allowed = shell.stderr.splitlines()
    assert created == f"Created {key_id} (FULL) for default. The token above is shown this once."
    assert allowed == f"Allowed: {key_id} (FULL)"


def test_a_key_is_created_listed_shown_and_revoked(operator: Operator) -> None:
    """The whole life of a key; for scripts, each step also speaks JSON."""
    created = operator.run("keys", "create", "--name", "ci", "--permission", "SENDING")
    token = created.out.removesuffix("\n")
    key_id = "key_" + token.split("_")[2]
    shown = operator.run("keys", "show", key_id, "--json")
    key = json.loads(shown.out)
    assert (key["id"], key["name"], key["permission"]) == (key_id, "ci", "SENDING")
    assert json.loads(operator.run("keys", "list", "--json").out) == [key]
    assert json.loads(operator.run("keys", "list", "--organization", "acme", "--json").out) == []
    for words in (["list"], ["show", key_id]):
        told = operator.run("keys", *words)
        assert told.code == 0
        assert key_id in told.out
        assert token not in told.out
    revoked = operator.run("keys", "revoke", key_id, "--json")
    assert revoked.code == 0
    assert json.loads(revoked.out)["active"] is False
    assert operator.run("keys", "revoke", key_id).code == 0, "repeating it is no mistake"
    assert json.loads(operator.run("keys", "list", "--json").out) == []
    assert operator.run("verify", typed=token) == Outcome(1, "", "Refused: invalid_token\n")


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
    verified = operator.run("verify", *words, typed=token + "\n")
    assert (verified.code, verified.out) == (code, "")
    assert token not in verified.err


def test_verify_that_cannot_decide_refuses_nobody(operator: Operator) -> None:
    """Exit 2 and not 1: a row that was damaged says nothing about the key."""
    token = operator.create()["token"]
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute("UPDATE keylatch_keys SET hash = '$argon2id$damaged'")
    assert operator.run("verify", typed=token) == Outcome(2, "", "Refused: unavailable\n")


def test_json_of_a_new_key_is_one_object(operator: Operator) -> None:
    """With the token this once, the id and the key's fields; in ASCII, whatever it is called."""
    created = operator.run(
        *("keys", "create", "--name", "Schlüssel 🔑", "--organization", "acme", "--json"),
        *("--environment", "test", "--prefix", "acme", "--hasher", "sha256"),
    )
    assert created.out.isascii()
    assert created.err == ""
    key = json.loads(created.out)
    token = key.pop("token")
    assert token.startswith("acme_test_")
    assert key["id"] == "key_" + token.split("_")[2]
    assert key["name"] == "Schlüssel 🔑"
    assert (key["organizationId"], key["environment"]) == ("acme", "test")


def test_an_operator_finds_a_key_of_any_organisation(operator: Operator) -> None:
    """In an emergency the id suffices; an organisation can be named to be sure."""
    key_id = operator.create("--organization", "acme")["id"]
    assert operator.run("keys", "show", key_id, "--organization", "default").code == 1
    assert operator.run("keys", "revoke", key_id, "--organization", "default").code == 1
    assert operator.run("keys", "revoke", key_id).code == 0


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
    "a made-up token": (["verify"], STRANGER, {}, 1, "Refused: invalid_token"),
    "no token": (["verify"], "", {}, 1, "no token on standard input"),
    "more than a token": (["verify"], "Bearer " + STRANGER, {}, 1, "no token on standard input"),
    "a token to verify as an argument": (["verify", STRANGER[:-1]], "", {}, 2, "never an argument"),
    "a token for an id": (["keys", "revoke", STRANGER], "", {}, 2, "never an argument"),
    "a token in an option": (["verify", f"--token={STRANGER}"], "", {}, 2, "never an argument"),
    "a missing folder": (
        *(["keys", "list"], "", {"STORE": "sqlite:////missing/folder/keys.db"}),
        *(2, "unable to open database file"),
    ),
    "a missing folder to verify in": (
        *(["verify"], STRANGER, {"STORE": "sqlite:////missing/folder/keys.db"}),
        *(2, "unable to open database file"),
    ),
    "a folder for a file": (["keys", "list"], "", {"STORE": "sqlite:////"}, 2, "unable to open"),
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
        *(["serve", "--admin-port", "8700"], "", {}, 2, "want to listen in the same place"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_a_hint(operator: Operator, mistake: str) -> None:
    """What is wrong and what to do about it; the exit code tells scripts the same."""
    words, typed, settings, code, told = MISTAKES[mistake]
    operator.set(**settings)
    outcome = operator.run(*words, typed=typed)
    assert (outcome.code, outcome.out) == (code, "")
    assert told in outcome.err
    assert STRANGER[:-1] not in outcome.err
    assert "hunter2secret" not in outcome.err
    if not told.startswith("Refused"):
        assert outcome.err.count("error: ") == outcome.err.count("hint: ") == 1


def test_all_wrong_settings_are_told_at_once(operator: Operator) -> None:
    """One run names every mistake, from variables and from options, and shows no traceback."""
    wrong = {"PREFIX": "k_l", "HASHER": "md5", "LEASE": "soon", "REDIS": "http://cache"}
    operator.set(**wrong)
    outcomes = [
        operator.run("keys", "create", "--name", "x", "--store", "mysql://db"),
        ended(operator.start("serve", "--store", "mysql://db")),
    ]
    for outcome in outcomes:
        assert (outcome.code, outcome.out) == (2, "")
        mistakes, hints = outcome.err.splitlines()[::2], outcome.err.splitlines()[1::2]
        named = {mistake.removeprefix("error: ").partition(":")[0] for mistake in mistakes}
        assert named == {f"KEYLATCH_{name}" for name in ("STORE", *wrong)}
        assert all(hint.startswith("hint: ") for hint in hints)


def test_a_file_that_is_no_database_is_left_as_it_is(operator: Operator) -> None:
    """A mistyped path must not cost anybody a file."""
    operator.database.write_text("my only copy of something else\n" * 100)
    operator.database.chmod(0o644)
    outcome = operator.run("keys", "create", "--name", "x")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: the store failed: file is not a database\nhint: is ")
    assert operator.database.read_text() == "my only copy of something else\n" * 100
    assert operator.database.stat().st_mode & 0o777 == 0o644


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
    outcome = ended(operator.start("keys", "create", "--name", "x", wrapper=wrapper))
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: the store failed: attempt to write a readonly database\n" in outcome.err
    assert f"hint: is {read_only} writable" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_server_that_cannot_listen_says_so(operator: Operator) -> None:
    """It names the address that it cannot have."""
    outcome = ended(operator.start("serve", "--host", "192.0.2.1"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: cannot listen on 192.0.2.1:8700: " in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("words", [["keys", "list"], ["serve"]])
def test_a_newer_store_stops_everything(operator: Operator, words: list[str]) -> None:
    """Neither a command nor the server works on tables that it does not understand."""
    operator.create()
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute("UPDATE keylatch_version SET version_num = '9999'")
    outcome = operator.run(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.endswith("hint: upgrade keylatch on this host\n")


def test_two_first_keys_at_once_do_no_harm(operator: Operator) -> None:
    """Both processes find an empty store; one sets it up and both keys work."""
    runs = [operator.start("keys", "create", "--name", f"key {n}", "--json") for n in (1, 2)]
    keys = [json.loads(ended(run).out) for run in runs]
    listed = json.loads(operator.run("keys", "list", "--json").out)
    assert {key["id"] for key in listed} == {key["id"] for key in keys}
    assert {key["name"] for key in listed} == {"key 1", "key 2"}
    assert [operator.run("verify", typed=key["token"]).code for key in keys] == [0, 0]


@contextmanager
def served(operator: Operator, *words: str) -> Iterator["subprocess.Popen[str]"]:
    process = operator.start("serve", *words)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(place: str | Path) -> bool:
    try:
        return send(place, b"GET /healthz").status == 200
    except OSError:
        return False


@pytest.mark.parametrize("way", ["port", "uds"])
def test_serve_answers_until_it_is_told_to_stop(operator: Operator, way: str) -> None:
    """It answers without server and date headers; SIGTERM ends it with nothing lost."""
    key = operator.create()
    port = free_port()
    place = f"http://127.0.0.1:{port}" if way == "port" else operator.folder / "keylatch.sock"
    where = ["--port", str(port)] if way == "port" else ["--uds", str(place)]
    with served(operator, *where) as process:
        eventually(lambda: answers(place) or process.poll() is not None)
        credential = f"Authorization: Bearer {key['token']}".encode()
        assert send(place, b"GET /verify", credential) == answer(
            200,
            {
                b"cache-control": b"no-store",
                b"x-keylatch-key-id": key["id"].encode(),
                b"x-keylatch-key-name": b"a%20key",
                b"x-keylatch-organization-id": b"default",
                b"x-keylatch-permission": b"FULL",
                b"x-keylatch-environment": b"live",
            },
            b"",
        )
        process.send_signal(signal.SIGTERM)
        stopped = ended(process)
    assert stopped.code == 0
    assert "Traceback" not in stopped.err
    assert key["token"] not in stopped.err
    with closing(sqlite3.connect(operator.database)) as raw:
        query = "SELECT last_used FROM keylatch_keys WHERE id = ?"
        (last_used,) = raw.execute(query, (key["id"],)).fetchone()
    assert last_used is not None, "what was used is stored before the process ends"
    assert way == "port" or not Path(place).exists(), "the socket is gone with its server"


def is_none_of_your_business(place: str | Path, path: str, credential: bytes) -> bool:
    """Whether it is answered as if there were no such thing."""
    return send(place, f"GET {path}".encode(), credential).status == 404


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("way", ["ports", "sockets"])
def test_management_may_have_a_listener_of_its_own(
    operator: Operator, way: str, workers: str
) -> None:
    """Then proxies, and whoever gets through them, find no key there to list, make or delete."""
    key = operator.create()
    credential = f"Authorization: Bearer {key['token']}".encode()
    ports = [free_port(), free_port()]
    sockets = [operator.folder / name for name in ("keylatch.sock", "admin.sock")]
    if way == "ports":
        words = ["--port", str(ports[0]), "--admin-port", str(ports[1])]
        asking, managing = (f"http://127.0.0.1:{port}" for port in ports)
    else:
        words = ["--uds", str(sockets[0]), "--admin-uds", str(sockets[1])]
        asking, managing = sockets  # type: ignore[assignment]
    with served(operator, "--workers", workers, *words) as process:
        eventually(lambda: answers(asking) or process.poll() is not None)
        for path in ("/v1/api-keys", "/v1/api_keys", f"/v1/api-keys/{key['id']}", "/openapi.json"):
            assert is_none_of_your_business(asking, path, credential)
            assert not is_none_of_your_business(managing, path, credential)
        for path in ("/verify", "/ext_authz/v1/api-keys", "/healthz", "/readyz"):
            assert send(asking, f"GET {path}".encode(), credential).status == 200
        assert len(json.loads(send(managing, b"GET /v1/api-keys", credential).body)) == 1
        if way == "sockets":
            modes = [place.stat().st_mode & 0o777 for place in sockets]
            assert modes == [0o666, 0o600]
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 0
    assert not any(place.exists() for place in sockets)


def test_a_socket_that_a_killed_server_left_is_replaced(operator: Operator) -> None:
    """One that is in use is not, and neither is a file that is no socket."""
    place = operator.folder / "keylatch.sock"
    for _ in range(2):
        with served(operator, "--uds", str(place)) as process:
            eventually(lambda: answers(place) or process.poll() is not None)
            second = ended(operator.start("serve", "--uds", str(place)))
            assert second.code == 2
            assert f"error: cannot listen on {place}: Address already in use" in second.err
            assert answers(place)
    file = operator.folder / "letter.txt"
    file.write_text("not a socket")
    assert ended(operator.start("serve", "--uds", str(file))).code == 2
    assert file.read_text() == "not a socket"


@pytest.mark.parametrize(("way", "workers"), [("port", "1"), ("port", "2"), ("socket", "1")])
def test_proxies_may_ask_over_grpc(operator: Operator, way: str, workers: str) -> None:
    """It answers as soon as HTTP does; SIGTERM ends both; a port that is taken is an error."""
    port, grpc_port, path = free_port(), free_port(), operator.folder / "grpc.sock"
    words, target = ["--grpc-port", str(grpc_port)], f"127.0.0.1:{grpc_port}"
    if way == "socket":
        words, target = ["--grpc-uds", str(path)], f"unix:{path}"
    with served(operator, "--port", str(port), "--workers", workers, *words) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None)
        with grpc.insecure_channel(target) as channel:
            ask: Any = channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")
            assert b"misconfigured" in ask(b"", timeout=20, wait_for_ready=True)
        if way == "port":
            second = ended(operator.start("serve", "--port", str(free_port()), *words))
            assert second.code == 2
            assert f"error: cannot listen on {target}: Address already in use" in second.err
        process.send_signal(signal.SIGTERM)
        stopped = ended(process)
        assert (stopped.code, "Traceback" in stopped.err) == (0, False)
    assert not path.exists()


def test_any_method_may_be_asked_about(operator: Operator) -> None:
    """On one connection, in any order; what looks like a request in a body is none."""
    key = operator.create()
    port = free_port()
    credential = b"\r\nHost: test\r\nAuthorization: Bearer " + key["token"].encode() + b"\r\n"
    with served(operator, "--port", str(port)) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None)
        with socket.create_connection(("127.0.0.1", port)) as connection:

            def asked(start: bytes, body: bytes = b"") -> bytes:
                length = b"Content-Length: %d\r\n" % len(body)
                connection.sendall(start + b" HTTP/1.1" + credential + length + b"\r\n")
                answered = connection.recv(65536)
                connection.sendall(body)
                return answered.partition(b"\r\n")[0]

            smuggled = b"FOO /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
            for method in (b"GET", b"PATCH", b"FOO", b"GET", b"VERSION-CONTROL", b"M-SEARCH"):
                assert asked(method + b" /ext_authz/v1/me") == b"HTTP/1.1 200 OK"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for body in (smuggled, b"", smuggled):
                assert asked(b"POST /ext_authz/v1/me", body) == b"HTTP/1.1 200 OK"
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(65536)
        for nonsense in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"FOO\r\n\r\n",
            b"G@T / HTTP/1.1\r\n\r\n",
        ):
            assert exchange(f"http://127.0.0.1:{port}", nonsense).startswith(b"HTTP/1.1 400 ")
