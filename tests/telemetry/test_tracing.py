"""Spans of OpenTelemetry: for checks that need I/O, without secrets, and only if enabled."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from keylatch.core.decisions import ONLY_FULL, Allow, DeferredDeny, Deny, Reason
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created
from keylatch.storage.store import Found, NotFound, Store
from tests.support.engines import MakeEngine
from tests.support.servers import error_without_package

pytestmark = pytest.mark.anyio


class Broken(Store):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.keys.find = self.find  # type: ignore[method-assign]

    async def find(self, key_id: str, anchor: int = 0) -> Found | NotFound:
        raise StoreUnavailable("broken by the test, at a host that must stay secret")


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # the process has one, once and for all
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def exported(spans: InMemorySpanExporter) -> list[tuple[str, str | None, dict[str, object]]]:
    """Names, parents and attributes, in the order in which they ended."""
    finished = spans.get_finished_spans()
    names = {span.context.span_id: span.name for span in finished}
    return [
        (
            span.name,
            names.get(span.parent.span_id) if span.parent else None,
            dict(span.attributes or {}),
        )
        for span in finished
    ]


async def make(engine: Engine) -> Created:
    return await (await engine.keyring()).create("org", "a key")


def header(created: Created) -> list[bytes]:
    return [f"Bearer {created.token.reveal()}".encode()]


async def test_a_miss_has_spans_and_a_hit_has_none(
    make_engine: MakeEngine, spans: InMemorySpanExporter
) -> None:
    """One for the check, and one for each query; a caller that shares a flight has its own."""
    engine = make_engine(tracing=True)
    created = await make(engine)
    decisions = await asyncio.gather(*(engine.authenticate(header(created)) for _ in range(2)))
    assert all(isinstance(decision, Allow) for decision in decisions)
    let_in = {"keylatch.decision": "allow", "keylatch.key_id": created.record.id}
    assert exported(spans) == [
        ("keylatch.store", "keylatch.check", {}),
        ("keylatch.hash", "keylatch.check", {}),
        ("keylatch.check", None, let_in),
        ("keylatch.check", None, let_in),
    ]
    spans.clear()
    for _ in range(40):
        assert isinstance(await engine.authenticate(header(created)), Allow)
        assert isinstance(await engine.authenticate([b"Bearer kl_live_made_up"]), Deny)
    assert exported(spans) == []
    await engine.stop()


async def test_a_refusal_names_no_key_and_an_error_no_host(
    make_engine: MakeEngine, spans: InMemorySpanExporter, store_url: str
) -> None:
    """Reasons are included, because operators see spans; unverified ids are not."""
    engine, broken = make_engine(tracing=True), make_engine(tracing=True, store=Broken(store_url))
    created = await make(engine)
    await (await engine.keyring()).delete("org", created.record.id)
    assert await engine.authenticate(header(created)) == Deny(Reason.REVOKED)
    assert await broken.authenticate(header(created)) in (
        Deny(Reason.REVOKED),
        Deny(Reason.UNAVAILABLE),
    )
    assert exported(spans) == [
        ("keylatch.store", "keylatch.check", {}),
        ("keylatch.check", None, {"keylatch.decision": "revoked"}),
        ("keylatch.store", "keylatch.check", {"error.type": "StoreUnavailable"}),
        ("keylatch.check", None, {"keylatch.decision": "unavailable"}),
    ]
    everything = "".join(span.to_json() for span in spans.get_finished_spans())
    for word in (created.token.reveal()[-41:-14], created.record.id, "host that must"):
        assert word not in everything
    await engine.stop()
    await broken.stop()


async def test_a_check_that_a_view_will_settle_says_so(
    make_engine: MakeEngine, spans: InMemorySpanExporter
) -> None:
    """The span ends before the view's requirement is known: it is no refusal yet."""
    engine = make_engine(tracing=True)
    keyring = await engine.keyring()
    created = await keyring.create("org", "a key", permission="SENDING")
    decision = await engine.authenticate(header(created), replace(ONLY_FULL, is_final=False))
    assert isinstance(decision, DeferredDeny)
    assert exported(spans)[-1] == ("keylatch.check", None, {"keylatch.decision": "deferred"})
    await engine.stop()


async def test_without_the_switch_there_are_none(
    make_engine: MakeEngine, spans: InMemorySpanExporter
) -> None:
    """By default."""
    engine = make_engine()
    assert isinstance(await engine.authenticate(header(await make(engine))), Allow)
    assert exported(spans) == []
    await engine.stop()


@pytest.mark.long
def test_without_the_switch_nothing_is_imported_for_it() -> None:
    """redis-py imports the library where it is there; the one module of ours that does is not."""
    program = "import sys, keylatch.asgi, keylatch_sidecar.app; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "keylatch.engine" in imported.stdout
    assert "keylatch.telemetry.tracing" not in imported.stdout


@pytest.mark.long
def test_without_the_package_the_start_says_so(store_url: str) -> None:
    """With what to install."""
    program = f"from keylatch import Settings; Settings.load(store={store_url!r}, tracing='on')"
    said = error_without_package("opentelemetry", program)
    assert "KEYLATCH_TRACING: the package opentelemetry-api is missing" in said
    assert "pip install 'keylatch[otel]'" in said
