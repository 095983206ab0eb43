"""Draining: after SIGTERM only readiness changes, for a while; then the sidecar stops as ever."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from keylatch_sidecar.app import create_app
from keylatch_sidecar.drain import Drain
from tests.sidecar.test_server import answers, served
from tests.support.clock import Clock
from tests.support.command_line import Operator, wait_for_exit
from tests.support.engines import MakeEngine
from tests.support.raw_http import exchange, expected_response, send
from tests.support.servers import eventually, free_port, serving

DRAINING = expected_response(
    503,
    {
        b"cache-control": b"no-store",
        b"content-type": b"application/json",
        b"retry-after": b"1",
    },
    b'{"status":"draining"}',
)
KEPT_ALIVE = b"GET %s HTTP/1.1\r\nHost: test\r\n\r\nGET /healthz HTTP/1.0\r\nHost: test\r\n\r\n"
HEALTH = "/grpc.health.v1.Health/Check"
SERVICE = "envoy.service.auth.v3.Authorization"


def test_it_begins_once_and_ends(clock: Clock) -> None:
    """A second call does not prolong it; with 0 seconds SIGTERM does not start it."""
    drain = Drain(5, timer=clock)
    assert (drain.is_configured, drain.has_begun, drain.is_over) == (True, False, False)
    drain.begin()
    clock.tick(4)
    drain.begin()
    assert (drain.has_begun, drain.is_over) == (True, False)
    clock.tick(1)
    assert drain.is_over
    assert not Drain().is_configured


@pytest.mark.anyio
async def test_the_workers_learn_of_it(tmp_path: Path) -> None:
    """From their parent, also a worker that was started later; they never end it themselves."""
    parent, worker = Drain(60, tmp_path), Drain(60, tmp_path)
    watching = asyncio.create_task(worker.watch())
    await asyncio.sleep(0)
    assert not worker.has_begun
    parent.begin()
    later = Drain(60, tmp_path)
    async with asyncio.timeout(60):
        await asyncio.gather(watching, later.watch())
    assert [each.has_begun for each in (worker, later)] == [True, True]
    async with asyncio.timeout(60):
        await asyncio.gather(Drain(0, tmp_path).watch(), Drain(60).watch())  # nothing to wait for


@pytest.mark.parametrize("drains", [True, False])
def test_a_draining_sidecar_serves_and_closes(make_engine: MakeEngine, *, drains: bool) -> None:
    """Readiness is refused, every other request is answered, and each connection is closed with
    its answer, so that the client's next request is on another one. The twin that does not drain
    keeps them."""
    drain = Drain(60)
    with serving(create_app(make_engine(), drain=drain)) as url:
        if drains:
            drain.begin()
        assert (send(url, b"GET /readyz") == DRAINING) is drains
        for path, status in ((b"/healthz", b"200"), (b"/verify", b"401")):
            answered = exchange(url, KEPT_ALIVE % path)
            assert answered.startswith(b"HTTP/1.1 " + status)
            assert answered.count(b"HTTP/1.1 ") == (1 if drains else 2)


def health(target: str, service: str) -> bytes:
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        check: Any = channel.unary_unary(HEALTH)
        request = b"\n" + bytes([len(service)]) + service.encode() if service else b""
        return bytes(check(request, timeout=20, wait_for_ready=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "workers"), [("port", "1"), ("port", "2"), ("socket", "1"), ("socket", "2")]
)
def test_sigterm_drains_and_another_one_stops(operator: Operator, way: str, workers: str) -> None:
    """HTTP on ports and Unix sockets, gRPC, one worker or several. The drain would outlast the
    test."""
    key = operator.create()
    credential = f"Authorization: Bearer {key['token']}".encode()
    port, grpc_port, socket = free_port(), free_port(), operator.folder / "keylatch.sock"
    place: str | Path = f"http://127.0.0.1:{port}" if way == "port" else socket
    where = ["--port", str(port)] if way == "port" else ["--uds", str(socket)]
    more = ["--workers", workers, "--grpc-port", str(grpc_port), "--drain", "600"]
    target = f"127.0.0.1:{grpc_port}"
    with served(operator, *where, *more) as process:
        eventually(lambda: answers(place) or process.poll() is not None)
        assert send(place, b"GET /readyz").status == 200
        assert health(target, SERVICE) == b"\x08\x01"
        process.send_signal(signal.SIGTERM)
        eventually(lambda: health(target, SERVICE) == b"\x08\x02")
        eventually(lambda: all(send(place, b"GET /readyz") == DRAINING for _ in range(20)))
        assert {send(place, b"GET /verify", credential).status for _ in range(20)} == {200}
        assert send(place, b"GET /v1/api-keys", credential).status == 200
        assert health(target, "") == b"\x08\x01"
        process.send_signal(signal.SIGTERM)
        stopped = wait_for_exit(process)
    assert (stopped.exit_code, "Traceback" in stopped.stderr) == (0, False)
    assert stopped.stderr.count("draining for 600 s: /readyz answers 503") == 1


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_stops_when_the_drain_is_over(operator: Operator, workers: str) -> None:
    """Without another signal."""
    place = f"http://127.0.0.1:{(port := free_port())}"
    words = ["--port", str(port), "--workers", workers, "--drain", "0.2"]
    with served(operator, *words) as process:
        eventually(lambda: answers(place) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        stopped = wait_for_exit(process)
    assert (stopped.exit_code, "Traceback" in stopped.stderr) == (0, False)
    assert "draining for 0.2 s" in stopped.stderr


@pytest.mark.long
def test_sigint_does_not_drain(operator: Operator) -> None:
    """At a terminal, Ctrl-C stops at once, also during a drain."""
    place = f"http://127.0.0.1:{(port := free_port())}"
    operator.set(DRAIN="600")
    for signals in ([signal.SIGINT], [signal.SIGTERM, signal.SIGINT]):
        with served(operator, "--port", str(port)) as process:
            eventually(lambda: answers(place) or process.poll() is not None)
            for each in signals:
                process.send_signal(each)
            assert wait_for_exit(process).exit_code == 0


@pytest.mark.parametrize("seconds", ["-1", "3601", "nan", "soon"])
def test_a_drain_without_sense_stops_the_start(operator: Operator, seconds: str) -> None:
    """With a hint that has the limits."""
    refused = operator.run("serve", "--drain", seconds)
    assert refused.exit_code == 2
    assert "error: KEYLATCH_DRAIN: " in refused.stderr
    assert "hint: seconds, 0 to 3600" in refused.stderr
