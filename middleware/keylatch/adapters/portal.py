"""Runs the engine on an event loop in a thread, as anyio's BlockingPortal, for WSGI and Django.

The first cache miss starts the thread, so it starts after a fork. The engine's background tasks
run on its loop, and threads that miss on the same key share one look-up there.
"""

import asyncio
import atexit
import concurrent.futures
import logging
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Sequence
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keylatch.authentication.authenticator import CacheMiss
from keylatch.core.decisions import ANY_KEY, Decision, Requirement
from keylatch.errors import ConfigurationError, WrongEventLoop

if TYPE_CHECKING:
    from keylatch.engine import Engine

T = TypeVar("T")

_SHUTDOWN_SECONDS: Final = 10.0

log = logging.getLogger("keylatch")


class Portal:
    """An event loop in a thread, for one engine.

    Usage counts are stored when the process exits normally: when the interpreter ends, or a worker
    of `multiprocessing`.

    Args:
        engine: runs on this loop only.

    Raises:
        ConfigurationError: gevent or eventlet has replaced Python's threads.
    """

    def __init__(self, engine: "Engine") -> None:
        _refuse_green_threads()
        self._engine = engine
        self._reset_state()
        reference = weakref.ref(self)

        def after_fork_in_child() -> None:
            alive = reference()
            if alive is not None:
                alive._reset_state()

        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=after_fork_in_child)

    @classmethod
    def for_engine(cls, engine: "Engine") -> "Portal":
        """The portal of an engine: middlewares that share an engine share its loop."""
        portal = _PORTALS.get(engine)
        if portal is None:
            portal = _PORTALS[engine] = cls(engine)
        return portal

    def _reset_state(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pending: set[concurrent.futures.Future[Any]] = set()

    def authenticate(self, values: Sequence[bytes], requirement: Requirement = ANY_KEY) -> Decision:
        """`Engine.authenticate` for a thread: a hit is answered in it, without any hop."""
        outcome = self._engine.authenticator.check_cached(values, requirement)
        return self.check(outcome, requirement) if isinstance(outcome, CacheMiss) else outcome

    def check(self, miss: CacheMiss, requirement: Requirement) -> Decision:
        """`Authenticator.check` for a thread, which waits."""
        return self.run(self._engine.authenticator.check(miss, requirement))

    async def authenticate_from_loop(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision:
        """The same for an event loop that is not the engine's own; it never waits."""
        authenticator = self._engine.authenticator
        outcome = authenticator.check_cached(values, requirement)
        if not isinstance(outcome, CacheMiss):
            return outcome
        return await asyncio.wrap_future(self.submit(authenticator.check(outcome, requirement)))

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run a coroutine on the loop; does not wait for it."""
        with self._lock:  # otherwise `close` could stop the loop before the coroutine is scheduled
            if self._loop is None:
                self._loop = self._start_loop()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result."""
        return self.submit(coroutine).result()

    def close(self) -> None:
        """Stop the engine, which stores usage counts, and the thread; a later call starts both."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        concurrent.futures.wait(tuple(self._pending), _SHUTDOWN_SECONDS)
        try:
            asyncio.run_coroutine_threadsafe(self._engine.stop(), loop).result(_SHUTDOWN_SECONDS)
        except TimeoutError:
            log.warning(
                "the engine did not stop within %g s: its last usage counts may be lost",
                _SHUTDOWN_SECONDS,
            )
        except WrongEventLoop:
            pass  # it runs on the loop of an ASGI app, which stops it
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        atexit.unregister(self.close)
        self._exit_finalizer.cancel()

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_run, args=(loop,), name="keylatch-portal", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)
        # A child of multiprocessing exits without atexit.
        self._exit_finalizer = Finalize(None, self.close, exitpriority=100)
        return loop


_PORTALS: Final["weakref.WeakValueDictionary[Engine, Portal]"] = weakref.WeakValueDictionary()


def close_all() -> None:
    """Stop all engines of this process, which stores usage counts; a request starts them again."""
    for portal in tuple(_PORTALS.values()):
        portal.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _refuse_green_threads() -> None:
    for library, module in (("gevent", "gevent.monkey"), ("eventlet", "eventlet.patcher")):
        patched = getattr(sys.modules.get(module), "is_module_patched", None)
        patched = patched or getattr(sys.modules.get(module), "is_monkey_patched", None)
        if patched is not None and patched("threading" if library == "gevent" else "thread"):
            raise ConfigurationError(
                [
                    (
                        f"{library} has replaced Python's threads; its own run no event loop",
                        "use gunicorn's gthread workers, or an ASGI server",
                    )
                ]
            )
