"""Where tokens travel readable, `keylatch serve` says so once, and `keylatch doctor` sees it."""

import json
import os
import signal
from pathlib import Path

import pytest

from keylatch_sidecar.http_server import loopback
from keylatch_sidecar.operations.doctor import listeners
from tests.sidecar.test_server import answers, served
from tests.support.command_line import Operator, wait_for_exit
from tests.support.servers import eventually, free_port

WARNING = "plain HTTP: tokens are sent in cleartext"


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *(("127.0.0.1", True), ("127.9.8.7", True), ("::1", True), ("localhost", True)),
        ("::ffff:127.0.0.1", True),
        *(("0.0.0.0", False), ("::", False), ("", False), ("192.0.2.1", False)),
        *(("::ffff:192.0.2.1", False), ("fe80::1%lo", False), ("10.0.0.1", False)),
    ],
)
def test_what_is_loopback(host: str, is_loopback: bool) -> None:
    """127.0.0.0/8 and ::1, also in IPv6's spelling of IPv4; "all addresses" are not."""
    assert loopback.is_host(host) is is_loopback


def words_for(operator: Operator) -> list[str]:
    return ["--store", f"sqlite:///{operator.database}", "--port", str(free_port())]


def found(operator: Operator) -> list[tuple[str, str]]:
    """What the doctor says of listeners."""
    findings = json.loads(operator.run("doctor", "--json").stdout)["findings"]
    return [(each["status"], each["message"]) for each in findings if each["check"] == "listeners"]


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("log", ["text", "json"])
def test_all_addresses_are_said_once(operator: Operator, workers: str, log: str) -> None:
    """However many workers there are: one line, with every listener that takes tokens."""
    main, admin, grpc, metrics = (free_port() for _ in range(4))
    words = ["--host", "0.0.0.0", "--port", str(main), "--admin-host", "0.0.0.0"]
    words += ["--admin-port", str(admin), "--grpc-port", str(grpc), "--log", log]
    words += ["--metrics-host", "0.0.0.0", "--metrics-port", str(metrics)]
    with served(operator, *words, "--workers", workers) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{main}"))
        [(status, message)] = found(operator)
        process.send_signal(signal.SIGTERM)
        said = wait_for_exit(process).stderr
    [line] = [line for line in said.splitlines() if WARNING in line]
    for port in (main, admin, grpc):
        assert f"0.0.0.0:{port}" in line
    assert f":{metrics}" not in line, "no token goes there"
    assert status == "warning"
    assert WARNING in message
    assert f"{process.pid} on 0.0.0.0:{main}" in message
    assert f":{metrics}" not in message


@pytest.mark.long
@pytest.mark.parametrize("way", ["127.0.0.1", "127.0.0.9", "localhost", "socket"])
def test_loopback_is_nothing_to_speak_of(operator: Operator, way: str) -> None:
    """Neither is a Unix socket."""
    port, path = free_port(), operator.folder / "keylatch.sock"
    words = ["--uds", str(path)] if way == "socket" else ["--host", way, "--port", str(port)]
    place = path if way == "socket" else f"http://{way}:{port}"
    with served(operator, *words) as process:
        eventually(lambda: answers(place))
        assert found(operator) == [("ok", "loopback and Unix sockets only")]
        process.send_signal(signal.SIGTERM)
        said = wait_for_exit(process).stderr
    assert "listening on" in said
    assert WARNING not in said


@pytest.mark.long
@pytest.mark.parametrize("how", ["variable", "option", "file", "default", "relative"])
def test_the_doctor_speaks_of_its_own_store_only(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It finds the sidecars of the same file, however that is named, and no others."""
    monkeypatch.chdir(operator.folder)
    port = free_port()
    words = ["--host", "0.0.0.0", "--port", str(port)]
    database = Path("keylatch.db" if how == "default" else "keys.db").resolve()
    monkeypatch.delenv("KEYLATCH_STORE")
    if how in ("option", "relative"):
        words += ["--store", "sqlite:///keys.db" if how == "relative" else f"sqlite:///{database}"]
    elif how == "variable":
        operator.set(STORE="sqlite:///./keys.db")
    elif how == "file":
        Path("store.url").write_text("sqlite:///keys.db\n")
        operator.set(STORE_FILE="store.url")
    with served(operator, *words):
        eventually(lambda: answers(f"http://127.0.0.1:{port}"))
        monkeypatch.delenv("KEYLATCH_STORE_FILE", raising=False)
        operator.set(STORE=f"sqlite:///{database}")
        assert [status for status, _ in found(operator)] == ["warning"]
        operator.set(STORE=f"sqlite:///{operator.folder}/another.db")
        assert found(operator) == []


def test_a_process_that_serves_something_else_is_left_aside() -> None:
    """This one: it runs tests."""
    assert os.getpid() not in {server.pid for server in listeners._servers()}
