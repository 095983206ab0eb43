"""One run of the benchmark, from its first connection to its last revoked key.

Scenarios are measured in every round, each time in another order, so that other load on the machine
affects all of them alike. However a run ends, its keys are revoked before the result is reported.
"""

import asyncio
import contextlib
import selectors
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol

import keylatch
from keylatch.errors import KeylatchError
from keylatch.settings import Settings
from keylatch.storage.conninfo import is_postgresql
from keylatch_bench import plan as plans
from keylatch_bench.connection import Address
from keylatch_bench.errors import BenchError
from keylatch_bench.key_factories import SidecarKeyFactory, StoreKeyFactory
from keylatch_bench.load_generator import Credential
from keylatch_bench.plan import Plan
from keylatch_bench.results import Results, ScenarioResult, machine
from keylatch_bench.revocation_probe import revoke_in_use
from keylatch_bench.scenarios import NEEDS, Scenarios
from keylatch_bench.system_under_test import InProcess, Sidecar, SystemUnderTest
from keylatch_bench.temporary_keys import KeyFactory, TemporaryKeys

_REVOKE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """What the operator wants to measure.

    Args:
        address: of a sidecar; None: an engine in this process.
        settings: of store and Redis; None: neither was given.
        admin_key: a FULL key of the sidecar; None: keys are created in the store.
    """

    address: Address | None
    settings: Settings | None = field(repr=False)
    admin_key: Credential | None = None

    def __str__(self) -> str:
        where = "an engine in this process" if self.address is None else str(self.address)
        if self.settings is None:
            return where
        store = "postgresql" if is_postgresql(self.settings.store) else "sqlite"
        return f"{where}, {store}{' and Redis' if self.settings.redis else ''}"


class Progress(Protocol):
    """Shows the progress of a run; called only between measurements, because drawing takes time."""

    def step(self, what: str, done: float) -> None:
        """Add `done` seconds; `what` comes next (empty: unchanged)."""


class BenchmarkFailed(Exception):
    """A run that ended early. Its keys are revoked, or listed in the results.

    Args:
        results: incomplete.
        message: why, in one line.
        hint: what to do about it.
    """

    def __init__(self, results: Results, message: str, hint: str) -> None:
        super().__init__(message)
        self.results = results
        self.message = message
        self.hint = hint


def run(target: Target, plan: Plan, progress: Progress) -> Results:
    """Measure, and revoke the keys that were created for it.

    Raises:
        BenchmarkFailed: the target cannot be measured, or the run was interrupted (Ctrl-C, SIGTERM)
            or took too long.
    """
    benchmark = Benchmark(target, plan, progress)
    with asyncio.Runner(loop_factory=selector_loop) as runner:
        try:
            runner.run(benchmark.run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            wrong, hint = "the run was interrupted", "no results were written"
        except (BenchError, KeylatchError) as error:
            wrong, hint = error.message, error.hint
        except OSError as error:
            wrong, hint = f"the connection failed: {error.strerror or error}", "run it again"
        else:
            wrong = hint = ""
    benchmark.record_keys()
    if wrong:
        raise BenchmarkFailed(benchmark.results, wrong, hint)
    return benchmark.results


def selector_loop() -> asyncio.AbstractEventLoop:
    """A loop that waits with microsecond resolution; with epoll it would be milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Benchmark:
    """One run.

    Args:
        target: what to measure.
        plan: duration, rates and numbers of keys.
        progress: shows the progress.
    """

    def __init__(self, target: Target, plan: Plan, progress: Progress) -> None:
        self._target = target
        self._plan = plan
        self._progress = progress
        self.results = Results(str(target), settings_of(plan), version=keylatch.__version__)
        self._temporary_keys: list[TemporaryKeys] = []
        self._keys_end_at = time.time() + plan.key_seconds

    async def run(self) -> None:
        """Measure within the time limit of the plan."""
        self.results.machine = machine()
        self.results.began_at = datetime.now(UTC).isoformat(timespec="seconds")
        with _sigterm_cancels():
            async with contextlib.AsyncExitStack() as stack:
                system = self._system()
                stack.push_async_callback(system.close)
                await system.open()
                limit = asyncio.timeout(self._plan.max_seconds)
                try:
                    async with limit:
                        await self._measure(system, stack)
                except TimeoutError:
                    if not limit.expired():
                        raise
                    wrong = f"the run took more than {self._plan.max_seconds:.0f} s"
                    raise BenchError(wrong, "fewer --keys, or a faster target") from None

    def record_keys(self) -> None:
        """Record the number of keys created, and the ids of those that could not be revoked."""
        self.results.keys_created = sum(keys.created for keys in self._temporary_keys)
        self.results.keys_left = [left for keys in self._temporary_keys for left in keys.active]

    def _system(self) -> SystemUnderTest:
        target, connections = self._target, self._plan.connections
        if target.address is not None:
            return Sidecar(target.address, connections)
        if target.settings is None:
            raise BenchError("there is nothing to measure", "give a URL, --uds or --store")
        return InProcess(target.settings, connections)

    async def _measure(self, system: SystemUnderTest, stack: contextlib.AsyncExitStack) -> None:
        store, factory = await self._key_factories(system, stack)
        keys = self._new_keys(factory, stack)
        self._skip_unavailable()
        scenarios = Scenarios(self._plan, system, keys, store, self.results.skipped)
        self._progress.step("creating keys", 0)
        await scenarios.prepare(lambda count: self._progress.step("creating keys", count * 0.03))
        for number in range(self._plan.rounds):
            await scenarios.prepare_round()
            if store is not None:
                await store.stop_engine()
            names = scenarios.names[number % len(scenarios.names) :] + scenarios.names
            for name in names[: len(scenarios.names)]:
                self._progress.step(f"round {number + 1}: {name}", 0)
                await self._measure_scenario(name, scenarios)
                self._progress.step("", self._plan.round_seconds)
            self._progress.step(f"round {number + 1}: unlimited rate", 0)
            self.results.add_saturated(await scenarios.measure_saturated())
            self._progress.step("", self._plan.round_seconds)
        await self._probe(system, keys, store, stack)

    async def _key_factories(
        self, system: SystemUnderTest, stack: contextlib.AsyncExitStack
    ) -> tuple[StoreKeyFactory | None, KeyFactory]:
        if self._target.settings is not None:
            engine = system.engine if isinstance(system, InProcess) else None
            store = StoreKeyFactory(self._target.settings, engine)
            stack.push_async_callback(store.close)
            return store, store
        if self._target.address is None or self._target.admin_key is None:
            raise BenchError("there is no key to create keys with", "set KEYLATCH_BENCH_KEY")
        return None, await self._sidecar_factory(self._target.admin_key, stack)

    async def _sidecar_factory(
        self, admin_key: Credential, stack: contextlib.AsyncExitStack
    ) -> SidecarKeyFactory:
        assert self._target.address is not None  # noqa: S101 - only sidecars have admin keys
        factory = SidecarKeyFactory(self._target.address, admin_key)
        stack.callback(factory.close)
        await factory.check()
        return factory

    def _new_keys(self, factory: KeyFactory, stack: contextlib.AsyncExitStack) -> TemporaryKeys:
        keys = TemporaryKeys(factory, self._plan.keys, self._keys_end_at)
        self._temporary_keys.append(keys)
        stack.push_async_callback(self._revoke_keys, keys)
        return keys

    async def _revoke_keys(self, keys: TemporaryKeys) -> None:
        self._progress.step("revoking the keys", 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REVOKE_SECONDS):
                await keys.revoke_all()

    def _skip_unavailable(self) -> None:
        settings = self._target.settings
        if settings is None:
            self.results.skipped |= NEEDS
        elif not settings.redis:
            self.results.skipped[plans.L2] = "give --redis"

    async def _measure_scenario(self, name: str, scenarios: Scenarios) -> None:
        figures = self.results.scenarios.setdefault(name, ScenarioResult(self._plan.rate_of(name)))
        if name == plans.FLOOD:
            figures.add(*await scenarios.measure_with_flood())
        else:
            figures.add(await scenarios.measure(name))

    async def _probe(
        self,
        system: SystemUnderTest,
        keys: TemporaryKeys,
        store: StoreKeyFactory | None,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        if not self._plan.revocations:
            return
        if store is not None and self._target.address is not None:
            [admin_key] = await keys.create(1)
            try:
                managing = await self._sidecar_factory(admin_key.credential, stack)
                keys = self._new_keys(managing, stack)
                await store.stop_engine()
            except BenchError:
                message = "keys are not managed at that URL: they were revoked in the store instead"
                self.results.notes.append(message)
        for number in range(self._plan.revocations):
            self._progress.step(f"revocation {number + 1}", 0)
            [key] = await keys.create(1)
            revocation = await revoke_in_use(
                system.clients,
                key.credential,
                lambda key=key: keys.revoke(key),  # type: ignore[misc]
                self._plan.probe_rate,
            )
            self.results.revocations.append(revocation)
            self._progress.step("", 1.0)


def settings_of(plan: Plan) -> dict[str, object]:
    """The settings that must be equal for a comparison."""
    return {
        "seconds": plan.seconds,
        "rounds": plan.rounds,
        "ratePerSecond": plan.rate,
        "floodPerSecond": plan.flood_rate,
        "connections": plan.connections,
        "keys": plan.keys,
        "revocations": plan.revocations,
    }


@contextlib.contextmanager
def _sigterm_cancels() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that the keys are revoked before the process ends."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - always called in a task
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
