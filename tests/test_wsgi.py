"""The WSGI middleware: the same answers as over ASGI, from any number of threads."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keylatch.adapters.portal import Portal
from keylatch.asgi import APIKeyMiddleware as ASGIMiddleware
from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.core.decisions import Principal
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.management.keyring import Created
from keylatch.wsgi import APIKeyMiddleware
from tests.support import worker_wsgi
from tests.support.clock import Clock
from tests.support.engines import MakeEngine, Times
from tests.support.raw_http import Header, asgi_request
from tests.support.servers import eventually, free_port

RULES = {"SENDING": ["POST /v1/emails", "GET /v1/emails/{id}"]}


def echo(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """An app that returns the principal."""
    principal = environ["keylatch.principal"]
    body = f"{principal.display_name or 'anonymous'}".encode()
    length = str(len(body))
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", length)])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]


Answer = tuple[int, dict[str, str], bytes]


def call(app: Any, path: str = "/", method: str = "GET", **variables: str) -> Answer:
    """Status, headers and body of one call."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method, **variables}
    environ["QUERY_STRING"] = ""
    setup_testing_defaults(environ)
    said: list[Any] = []
    body = app(environ, lambda status, headers: said.extend((status, headers)))
    return int(said[0][:3]), {k.lower(): v for k, v in said[1]}, b"".join(body)


def bearer(key: Created) -> str:
    return f"Bearer {key.token.reveal()}"


class Protected:
    """A protected app, and the management of its keys."""

    def __init__(self, engine: Engine, manager: Engine, runner: asyncio.Runner) -> None:
        self.engine = engine
        self.app = APIKeyMiddleware(echo, engine=engine, public=["/healthz"], permissions=RULES)
        self._manager = manager
        self._runner = runner

    def create(self, name: str = "my key", **fields: Any) -> Created:
        keyring = self._runner.run(self._manager.keyring())
        return self._runner.run(keyring.create("default", name, **fields))

    def revoke(self, key: Created) -> None:
        keyring = self._runner.run(self._manager.keyring())
        assert self._runner.run(keyring.delete("default", key.record.id)) is not None

    def last_used(self, key: Created) -> int | None:
        found = self._runner.run(self._manager.store.keys.get("default", key.record.id))
        return None if found is None else found.last_used


@pytest.fixture
def protected(make_engine: MakeEngine) -> Iterator[Protected]:
    with asyncio.Runner() as runner:
        manager = make_engine()
        protected = Protected(make_engine(), manager, runner)
        yield protected
        protected.app.close()
        runner.run(manager.stop())


def test_the_app_learns_who_is_calling(protected: Protected) -> None:
    """`environ["keylatch.principal"]` is the principal; the second call needs no I/O."""
    key = protected.create(permission="SENDING")
    seen: list[Any] = []

    def inner(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ["keylatch.principal"])
        return echo(environ, start_response)

    app = APIKeyMiddleware(inner, engine=protected.engine, permissions=RULES)
    for _ in range(2):
        status, _, body = call(app, "/v1/emails", "POST", HTTP_AUTHORIZATION=bearer(key))
        assert (status, body) == (200, b"my key")
    assert seen[0] == Principal(key.record.id, "my key", "default", "SENDING", "live")
    assert seen[0] is seen[1]
    app.close()


def test_it_keeps_to_the_protocol(protected: Protected) -> None:
    """The standard library's validator finds nothing wrong, on either side of the middleware."""
    inner = validator(echo)
    app = validator(APIKeyMiddleware(inner, engine=protected.engine, public=["/healthz"]))
    for path, value in (("/healthz", ""), ("/x", ""), ("/x", bearer(protected.create()))):
        environ: dict[str, Any] = {"PATH_INFO": path, "HTTP_AUTHORIZATION": value}
        environ |= {"SCRIPT_NAME": "", "QUERY_STRING": ""}
        setup_testing_defaults(environ)
        body = app(environ, lambda status, headers, exc_info=None: print)
        b"".join(body)
        body.close()  # type: ignore[attr-defined]


def test_refusals(protected: Protected) -> None:
    """Each with its status, its challenge and a body with a Content-Length; none on HEAD."""
    small = protected.create(permission="SENDING")
    revoked = protected.create()
    protected.revoke(revoked)
    for variables, expected, word in (
        ({}, 401, "unauthorized"),
        ({"HTTP_AUTHORIZATION": "Bearer a,Bearer b"}, 400, "invalid_request"),
        ({"HTTP_AUTHORIZATION": "Bearer \x80"}, 400, "invalid_request"),
        ({"HTTP_AUTHORIZATION": "Bearer kl_live_nonsense"}, 401, "invalid_token"),
        ({"HTTP_AUTHORIZATION": bearer(revoked)}, 401, "invalid_token"),
        ({"HTTP_AUTHORIZATION": bearer(small)}, 403, "insufficient_scope"),
    ):
        status, headers, body = call(protected.app, "/v1/domains", **variables)
        assert (status, headers["x-keylatch-error"]) == (expected, word)
        assert headers["content-length"] == str(len(body))
        assert headers["www-authenticate"].startswith('Bearer realm="keylatch"')
        head = call(protected.app, "/v1/domains", "HEAD", **variables)
        assert head == (status, headers, b"")


def test_public_paths_and_parameters(protected: Protected) -> None:
    """The same rules as over ASGI, also for paths beyond ASCII."""
    key = bearer(protected.create(permission="SENDING"))
    assert call(protected.app, "/healthz")[::2] == (200, b"anonymous")
    assert call(protected.app, "/v1/emails/7", HTTP_AUTHORIZATION=key)[0] == 200
    wsgi_path = "/v1/emails/grüße".encode().decode("latin-1")
    assert call(protected.app, wsgi_path, HTTP_AUTHORIZATION=key)[0] == 200
    assert call(protected.app, "/v1/emails/7/8", HTTP_AUTHORIZATION=key)[0] == 403


def test_identity_comes_from_no_header(protected: Protected) -> None:
    """A client's header in any spelling of keylatch's does not reach the app."""
    seen: list[dict[str, Any]] = []

    def inner(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ)
        return echo(environ, start_response)

    app = APIKeyMiddleware(inner, engine=protected.engine, public=["/healthz"])
    call(app, "/healthz", HTTP_X_KEYLATCH_KEY_ID="key_boss", HTTP_X_KEYLATCHER="mine")
    assert "HTTP_X_KEYLATCH_KEY_ID" not in seen[0]
    assert seen[0]["HTTP_X_KEYLATCHER"] == "mine"


@pytest.mark.long
def test_a_revoke_holds_at_once_in_every_thread(protected: Protected) -> None:
    """Threads that answer from memory all the time stop when the delete has returned."""
    keys = [protected.create(f"key {number}") for number in range(20)]
    revoked: set[str] = set()
    wrong: list[str] = []
    done = threading.Event()

    def check() -> None:
        while not done.is_set():
            for key in keys:
                gone = key.record.id in revoked
                status, _, _ = call(protected.app, HTTP_AUTHORIZATION=bearer(key))
                if gone and status != 401:
                    wrong.append(f"{status} after the delete")
                if status not in (200, 401):
                    wrong.append(str(status))

    with ThreadPoolExecutor(8) as threads:
        checks = [threads.submit(check) for _ in range(8)]
        for key in keys:
            protected.revoke(key)
            revoked.add(key.record.id)
        done.set()
        for each in checks:
            each.result()
    assert wrong == []


class CountingHasher(Hasher):
    """Counts its verifications, and blocks them until released."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST)
        self.verified = 0
        self.go = threading.Event()

    async def verify(self, hashed: str, token: Token) -> VerifyResult:
        self.verified += 1
        await asyncio.to_thread(self.go.wait)
        return await super().verify(hashed, token)


def test_many_threads_that_miss_on_one_key_cost_one_hash(make_engine: MakeEngine) -> None:
    """They meet in one flight, although none of them has an event loop."""
    hasher = CountingHasher()
    app = APIKeyMiddleware(echo, engine=make_engine(hasher=hasher))
    with asyncio.Runner() as runner:
        manager = make_engine()
        keyring = runner.run(manager.keyring())
        key = runner.run(keyring.create("default", "cold"))
        runner.run(manager.stop())
    waiting = threading.Barrier(33)

    def request() -> int:
        waiting.wait()
        return call(app, HTTP_AUTHORIZATION=bearer(key))[0]

    with ThreadPoolExecutor(32) as threads:
        calls = [threads.submit(request) for _ in range(32)]
        waiting.wait()
        eventually(lambda: len(app._portal._pending) == 32)
        hasher.go.set()
        assert {each.result() for each in calls} == {200}
    assert hasher.verified == 1
    app.close()


def test_uses_are_stored_when_it_is_closed(protected: Protected) -> None:
    """`close` loses nothing, and the next request begins anew."""
    key = protected.create()
    for _ in range(2):
        assert call(protected.app, HTTP_AUTHORIZATION=bearer(key))[0] == 200
        protected.app.close()
        assert protected.last_used(key) is not None


def test_an_outage_is_no_refusal(tmp_path: Path, clock: Clock) -> None:
    """A store that cannot be opened is a 503, and the app still starts."""
    app = APIKeyMiddleware(echo, store=f"sqlite:///{tmp_path}/missing/keys.db", redis="")
    status, headers, _ = call(app, HTTP_AUTHORIZATION="Bearer kl_live_nonsense")
    assert (status, headers["retry-after"]) == (503, "1")
    app.close()


def test_green_threads_are_refused(
    monkeypatch: pytest.MonkeyPatch, make_engine: MakeEngine
) -> None:
    """gevent's threads run no event loop: the start says so instead of hanging later."""

    class Monkey:
        @staticmethod
        def is_module_patched(name: str) -> bool:
            return name == "threading"

    monkeypatch.setitem(sys.modules, "gevent.monkey", Monkey)
    with pytest.raises(ConfigurationError, match="gthread"):
        Portal(make_engine())


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["authorization", "x-keylatch-key-id", "x_keylatch_permission", "cookie"]),
        st.one_of(
            st.sampled_from(["Bearer ", "bearer GOOD", "Bearer  GOOD ", "Basic x", "GOOD", ""]),
            st.lists(
                st.sampled_from(
                    ["Bearer", " ", "GOOD", "\t", ",", "Basic x", '"', "\xff", "=", "a=b"]
                )
            ).map("".join),
        ),
    ),
    max_size=4,
)


@pytest.mark.long
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    headers=HEADERS,
    method=st.sampled_from(["GET", "HEAD", "POST", "OPTIONS"]),
    path=st.sampled_from(["/healthz", "/v1/emails", "/v1/emails/7", "/", "/v1/domains"]),
)
def test_both_adapters_give_the_same_answer(
    protected: Protected, headers: list[tuple[str, str]], method: str, path: str
) -> None:
    """Whatever is sent: the same status, headers and body over ASGI and WSGI."""
    if not hasattr(protected, "key"):
        protected.key = bearer(protected.create(permission="SENDING")).split()[1]  # type: ignore[attr-defined]
    sent = [(name, value.replace("GOOD", protected.key)) for name, value in headers]  # type: ignore[attr-defined]
    variables: dict[str, str] = {}
    for name, value in sent:  # as gunicorn, granian and waitress do it
        folded = "HTTP_" + name.upper().replace("-", "_")
        variables[folded] = f"{variables[folded]},{value}" if folded in variables else value
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append([name for name, _ in scope["headers"] if name[:1] == b"x"])
        body = (scope["user"].display_name or "anonymous").encode()
        start = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        body = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": body})

    app = ASGIMiddleware(inner, engine=protected._manager, public=["/healthz"], permissions=RULES)
    raw: list[Header] = [(name.encode(), value.encode("latin-1")) for name, value in sent]
    over_asgi = protected._runner.run(asgi_request(app, path, raw, method=method))
    status, said, body = call(protected.app, path, method, **variables)
    asgi_headers = {name.decode(): value.decode() for name, value in over_asgi.headers}
    assert (status, said, body) == (over_asgi.status, asgi_headers, over_asgi.body)
    assert seen in ([], [[]])


@contextlib.contextmanager
def served(store_url: str, *options: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A protected app on a real server: gunicorn, or what the options begin with."""
    port = free_port()
    place = ["--bind", f"127.0.0.1:{port}"]
    if options[0] == "granian":
        place = ["--host", "127.0.0.1", "--port", str(port)]
    else:
        options = ("gunicorn", *options)
    process = subprocess.Popen(
        [sys.executable, "-m", *options, *place, "tests.support.worker_wsgi:app"],
        env={"KEYLATCH_STORE": store_url, "KEYLATCH_HASHER": "sha256", "PATH": ""},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        eventually(lambda: worker_wsgi.status_of(port, "/healthz") == 200)
        yield str(port), process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it stopped in order
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2"),
        ("--workers", "2", "--preload"),
        ("--workers", "1", "--worker-class", "gthread", "--threads", "4"),
        # One: it forgets to stop a worker that gets the signal before it has started.
        ("granian", "--interface", "wsgi", "--workers", "1"),
    ],
    ids=["sync", "preload", "gthread", "granian"],
)
def test_pre_fork_workers_stop_in_order(
    protected: Protected, store_url: str, options: tuple[str, ...]
) -> None:
    """Workers check keys, see a revoke at once, and store their uses at SIGTERM."""
    key, other = protected.create(), protected.create()
    with served(store_url, *options) as (port, process):
        for _ in range(8):
            assert worker_wsgi.status_of(int(port), "/", bearer(key)) == 200
            assert worker_wsgi.status_of(int(port), "/", bearer(other)) == 200
        protected.revoke(other)
        for _ in range(8):
            assert worker_wsgi.status_of(int(port), "/", bearer(other)) == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert protected.last_used(key) is not None


@pytest.mark.long
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["late", "preload"])
def test_workers_are_replaced_under_load(
    protected: Protected, store_url: str, preload: tuple[str, ...], times: Times
) -> None:
    """Four workers are forked anew again and again while others call: no wrong answer, and each
    use that only a worker on its way out knew of is stored."""
    good, gone = protected.create("good"), protected.create("gone")
    protected.revoke(gone)
    answers: Counter[tuple[str, int]] = Counter()
    done = threading.Event()

    def load(port: int, key: Created) -> None:
        while not done.is_set():
            answers[key.record.name, worker_wsgi.status_of(port, "/", bearer(key))] += 1

    def is_accepted(port: str, key: Created) -> bool:
        # gunicorn resets what a worker on its way out has accepted and not begun.
        status = worker_wsgi.status_of(int(port), "/", bearer(key))
        assert status in (0, 200)
        return status == 200

    with served(store_url, "--workers", "4", *preload) as (port, process):
        with ThreadPoolExecutor(4) as threads:
            callers = [threads.submit(load, int(port), key) for key in (good, gone) * 2]
            try:
                for number in range(times(2, 25)):
                    key = protected.create(f"used once {number}")
                    eventually(lambda port=port, key=key: is_accepted(port, key))  # type: ignore[misc]
                    process.send_signal(signal.SIGHUP)
                    eventually(lambda key=key: protected.last_used(key) is not None)  # type: ignore[misc]
            finally:
                done.set()
        for caller in callers:
            caller.result()
        last = protected.create("last")
        eventually(lambda: is_accepted(port, last))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert protected.last_used(last) is not None
    assert {("good", 200), ("gone", 401)} <= set(answers)
    assert set(answers) <= {("good", 200), ("gone", 401), ("good", 0), ("gone", 0)}
