"""A run from its first connection to its last revoked key, in the order in which it happens.

Tiers take turns, in another order in each round, so that whatever else the machine does falls on
all of them. Whatever ends a run, its keys are taken back before anything else is said.
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
from keylatch_bench import plan as plans
from keylatch_bench.connection import Address, Unusable
from keylatch_bench.key_factories import SidecarKeyFactory, StoreKeyFactory
from keylatch_bench.load_generator import Credential
from keylatch_bench.plan import Plan
from keylatch_bench.results import Results, Tier, machine
from keylatch_bench.revocation_probe import revoke_in_use
from keylatch_bench.scenarios import NEEDS, Tiers
from keylatch_bench.system_under_test import InProcess, Sidecar, Subject
from keylatch_bench.temporary_keys import KeyFactory, TemporaryKeys

_REVOKE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """What the operator pointed at.

    Args:
        address: of a sidecar; None: an engine in this process.
        settings: of store and Redis; None: neither was given.
        admin_key: a FULL key of the sidecar; None: keys are made in the store.
    """

    address: Address | None
    settings: Settings | None = field(repr=False)
    admin_key: Credential | None = None

    def __str__(self) -> str:
        where = "an engine in this process" if self.address is None else str(self.address)
        if self.settings is None:
            return where
        store = self.settings.store.partition(":")[0].partition("+")[0]
        return f"{where}, {store}{' and Redis' if self.settings.redis else ''}"


class Progress(Protocol):
    """Told how far a run is; only between measurements, because drawing takes time."""

    def step(self, what: str, done: float) -> None:
        """So much more is done (of `total`), and this comes next."""


class Failed(Exception):
    """A run that ended early; its keys were taken back, or are named in the results.

    Args:
        results: what there is of them.
        message: why, in one line.
        hint: what to do about it.
    """

    def __init__(self, results: Results, message: str, hint: str) -> None:
        super().__init__(message)
        self.results = results
        self.message = message
        self.hint = hint


def run(target: Target, plan: Plan, progress: Progress) -> Results:
    """Measure, and take back what was made for it.

    Raises:
        Failed: it could not be measured, was interrupted (Ctrl-C, SIGTERM), or took too long.
    """
    session = Session(target, plan, progress)
    with asyncio.Runner(loop_factory=selector_loop) as runner:
        try:
            runner.run(session.run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            wrong, hint = "it was interrupted", "nothing was written"
        except (Unusable, KeylatchError) as error:
            wrong, hint = error.message, error.hint
        except OSError as error:
            wrong, hint = f"the connection failed: {error.strerror or error}", "run it again"
        else:
            wrong = hint = ""
    session.record_keys()
    if wrong:
        raise Failed(session.results, wrong, hint)
    return session.results


def selector_loop() -> asyncio.AbstractEventLoop:
    """epoll waits in whole milliseconds, select in microseconds: requests are sent on time."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Session:
    """One run.

    Args:
        target: what to measure.
        plan: how long and how hard.
        progress: told how far it is.
    """

    def __init__(self, target: Target, plan: Plan, progress: Progress) -> None:
        self._target = target
        self._plan = plan
        self._progress = progress
        self.results = Results(str(target), settings_of(plan), version=keylatch.__version__)
        self._supplies: list[TemporaryKeys] = []
        self._keys_end_at = time.time() + plan.key_seconds

    async def run(self) -> None:
        """Everything, within the plan's time."""
        self.results.machine = machine()
        self.results.began_at = datetime.now(UTC).isoformat(timespec="seconds")
        with _sigterm_cancels():
            async with contextlib.AsyncExitStack() as stack:
                subject = self._subject()
                stack.push_async_callback(subject.close)
                await subject.open()
                limit = asyncio.timeout(self._plan.most_seconds)
                try:
                    async with limit:
                        await self._measure(subject, stack)
                except TimeoutError:
                    if not limit.expired():
                        raise
                    wrong = f"it took more than {self._plan.most_seconds:.0f} s"
                    raise Unusable(wrong, "fewer --keys, or a target that answers") from None

    def record_keys(self) -> None:
        """Note what was made, and what could not be taken back."""
        self.results.keys_made = sum(supply.created for supply in self._supplies)
        self.results.keys_left = [left for supply in self._supplies for left in supply.active]

    def _subject(self) -> Subject:
        target, connections = self._target, self._plan.connections
        if target.address is not None:
            return Sidecar(target.address, connections)
        if target.settings is None:
            raise Unusable("there is nothing to measure", "give a URL, --uds or --store")
        return InProcess(target.settings, connections)

    async def _measure(self, subject: Subject, stack: contextlib.AsyncExitStack) -> None:
        store, maker = await self._key_factories(subject, stack)
        supply = self._supply(maker, stack)
        self._skip_unavailable()
        tiers = Tiers(self._plan, subject, supply, store, self.results.skipped)
        self._progress.step("making keys", 0)
        await tiers.prepare(lambda made: self._progress.step("making keys", made * 0.03))
        for number in range(self._plan.rounds):
            await tiers.prepare_round()
            if store is not None:
                await store.stop_engine()
            names = tiers.names[number % len(tiers.names) :] + tiers.names
            for name in names[: len(tiers.names)]:
                self._progress.step(f"round {number + 1}: {name}", 0)
                await self._measure_tier(name, tiers)
                self._progress.step("", self._plan.round_seconds)
            self._progress.step(f"round {number + 1}: as fast as it goes", 0)
            self.results.add_saturated(await tiers.measure_saturated())
            self._progress.step("", self._plan.round_seconds)
        await self._probe(subject, supply, store, stack)

    async def _key_factories(
        self, subject: Subject, stack: contextlib.AsyncExitStack
    ) -> tuple[StoreKeyFactory | None, KeyFactory]:
        if self._target.settings is not None:
            engine = subject.engine if isinstance(subject, InProcess) else None
            store = StoreKeyFactory(self._target.settings, engine)
            stack.push_async_callback(store.close)
            return store, store
        if self._target.address is None or self._target.admin_key is None:
            raise Unusable("there is no key to make keys with", "set KEYLATCH_BENCH_KEY")
        return None, await self._sidecar_factory(self._target.admin_key, stack)

    async def _sidecar_factory(
        self, admin_key: Credential, stack: contextlib.AsyncExitStack
    ) -> SidecarKeyFactory:
        assert self._target.address is not None  # noqa: S101 - only sidecars have admin keys
        maker = SidecarKeyFactory(self._target.address, admin_key)
        stack.callback(maker.close)
        await maker.check()
        return maker

    def _supply(self, maker: KeyFactory, stack: contextlib.AsyncExitStack) -> TemporaryKeys:
        supply = TemporaryKeys(maker, self._plan.keys, self._keys_end_at)
        self._supplies.append(supply)
        stack.push_async_callback(self._revoke_keys, supply)
        return supply

    async def _revoke_keys(self, supply: TemporaryKeys) -> None:
        self._progress.step("revoking the keys", 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REVOKE_SECONDS):
                await supply.revoke_all()

    def _skip_unavailable(self) -> None:
        settings = self._target.settings
        if settings is None:
            self.results.skipped |= NEEDS
        elif not settings.redis:
            self.results.skipped[plans.L2] = "give --redis"

    async def _measure_tier(self, name: str, tiers: Tiers) -> None:
        figures = self.results.tiers.setdefault(name, Tier(self._plan.rate_of(name)))
        if name == plans.FLOOD:
            figures.add(*await tiers.measure_with_flood())
        else:
            figures.add(await tiers.measure(name))

    async def _probe(
        self,
        subject: Subject,
        supply: TemporaryKeys,
        store: StoreKeyFactory | None,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        if not self._plan.revocations:
            return
        if store is not None and self._target.address is not None:
            [admin_key] = await supply.create(1)
            try:
                managing = await self._sidecar_factory(admin_key.credential, stack)
                supply = self._supply(managing, stack)
                await store.stop_engine()
            except Unusable:
                note = "keys are not managed at that URL: the DELETE was done in the store"
                self.results.notes.append(note)
        for number in range(self._plan.revocations):
            self._progress.step(f"revocation {number + 1}", 0)
            [key] = await supply.create(1)
            revocation = await revoke_in_use(
                subject.clients,
                key.credential,
                lambda key=key: supply.revoke(key),  # type: ignore[misc]
                self._plan.probe_rate,
            )
            self.results.revocations.append(revocation)
            self._progress.step("", 1.0)


def settings_of(plan: Plan) -> dict[str, object]:
    """What a comparison must find equal."""
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
    """Be told to stop as by Ctrl-C: keys are taken back first."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - we are in it
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
