"""The sidecar and its OpenAPI document against schemathesis: all checks, all operations.

It reads the document from the running sidecar, so an operation that is added there is tested here.
It runs in a process of its own, with what `schemathesis.toml` and `schemathesis_hooks.py` say.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.support.clock import Clock
from tests.support.engines import Times
from tests.support.servers import serving
from tests.support.sidecars import Sidecar, sidecar_on

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "schemathesis"
SHORT, FULL = 3, 400  # cases an operation and phase; the first phase takes what it needs


@pytest.fixture
def fuzzed(store_url: str, clock: Clock) -> Iterator[Sidecar]:
    """A sidecar of the test's own: thousands of keys are made there."""
    with sidecar_on(store_url, clock, max_changes=0, max_keys=0) as sidecar:
        yield sidecar


def ran(
    sidecar: Sidecar, url: str, store_url: str, folder: Path, *options: str
) -> "subprocess.CompletedProcess[str]":
    """A run against all that is documented there. The document is for keys that may manage, and
    schemathesis would send one key with everything, so it gets a copy."""
    with sidecar.client(sidecar.create()) as manager:
        document = folder / "openapi.json"
        document.write_bytes(manager.get("/openapi.json").content)
    return subprocess.run(
        [str(PROGRAM), "--config-file", str(TESTS / "schemathesis.toml")]
        + ["run", str(document), "--url", url, "--no-color"]
        + ["--suppress-health-check", "all", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS), "FUZZED_STORE": store_url, "no_proxy": "*"},
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(3_600)
def test_every_answer_is_as_documented(
    fuzzed: Sidecar, store_url: str, tmp_path: Path, times: Times
) -> None:
    """No 5xx, no undocumented status, header or shape; what the document allows is accepted, what
    it does not is refused; no method answers that is not there, and nothing without a key."""
    options = ("--max-examples", str(times(SHORT, FULL)), "--seed", "1")
    done = ran(fuzzed, fuzzed.url, store_url, tmp_path, *options)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    [generated] = re.findall(r"(\d+) generated, (?:\d+) passed", done.stdout)
    assert int(generated) > times(300, 5_000)


class Faulty:
    """The broken twin: one answer of another shape, and one that is a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        faults = {"/healthz": (200, b'{"state":"ok"}'), "/readyz": (500, b"{}")}
        if scope["type"] != "http" or scope["path"] not in faults:
            await self._app(scope, receive, send)
            return
        status, body = faults[scope["path"]]
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def test_an_answer_that_is_not_as_documented_is_found(
    fuzzed: Sidecar, store_url: str, tmp_path: Path
) -> None:
    """The broken twin of the run above."""
    app = Faulty(create_app(Engine(Settings.load(store=store_url, redis=""))))
    with serving(app) as url:
        options = ("--max-examples", "1", "--include-path-regex", "^/(healthz|readyz)$")
        done = ran(fuzzed, url, store_url, tmp_path, *options)
    assert done.returncode == 1
    assert "Response violates schema" in done.stdout
    assert "Server error" in done.stdout
