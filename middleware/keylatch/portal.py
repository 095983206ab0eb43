"""The way from threads to the event loop: for WSGI, where no loop runs.

Each process has one loop on one thread, started by the first who needs it, so after any fork. It
hosts the engine's background work, and many threads that miss on one key meet there in one flight.
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
from typing import Any, Final, TypeVar

from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.model import ANY_KEY, Verdict, Wanted
from keylatch.tokens import Token

T = TypeVar("T")

_FAREWELL_SECONDS: Final = 10.0

log = logging.getLogger("keylatch")


class Portal:
    """An event loop on a thread of its own, for one engine.

    What was used is stored when the process exits in order: at the end of the interpreter, or of a
    worker that `multiprocessing` started.

    Args:
        engine: runs on that loop alone.

    Raises:
        ConfigurationError: threads are not threads in this process.
    """

    def __init__(self, engine: Engine) -> None:
        _refuse_green_threads()
        self._engine = engine
        self._forget()
        reference = weakref.ref(self)

        def forget() -> None:
            alive = reference()
            if alive is not None:
                alive._forget()

        os.register_at_fork(after_in_child=forget)

    @classmethod
    def of(cls, engine: Engine) -> "Portal":
        """The one of this engine: several middlewares may share it, and so meet on one loop."""
        portal = _PORTALS.get(engine)
        if portal is None:
            portal = _PORTALS[engine] = cls(engine)
        return portal

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._under_way: set[concurrent.futures.Future[Any]] = set()

    def check(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict:
        """`Engine.check` for a thread: a hit is answered in it, without any hop."""
        known = self._engine.glance(values, wanted)
        return self.resolve(known, wanted) if isinstance(known, Token) else known

    def resolve(self, token: Token, wanted: Wanted) -> Verdict:
        """`Engine.resolve` for a thread, which waits."""
        return self.run(self._engine.resolve(token, wanted))

    async def check_from_loop(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict:
        """The same for an event loop that is not the engine's own; it never waits."""
        known = self._engine.glance(values, wanted)
        if not isinstance(known, Token):
            return known
        return await asyncio.wrap_future(self.submit(self._engine.resolve(known, wanted)))

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run work on the loop; never waits."""
        with self._lock:  # or `close` could stop the loop before the work is on it
            if self._loop is None:
                self._loop = self._open()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work on the loop, and wait for its result."""
        return self.submit(work).result()

    def close(self) -> None:
        """Stop the engine, storing what was used, and end the thread; a later call begins anew."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        concurrent.futures.wait(tuple(self._under_way), _FAREWELL_SECONDS)
        try:
            asyncio.run_coroutine_threadsafe(self._engine.stop(), loop).result(_FAREWELL_SECONDS)
        except TimeoutError:
            log.warning("the store did not take the last uses in time")
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        atexit.unregister(self.close)
        self._at_exit.cancel()

    def _open(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_run, args=(loop,), name="keylatch-portal", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)
        # A child of multiprocessing leaves without atexit.
        self._at_exit = Finalize(None, self.close, exitpriority=100)
        return loop


_PORTALS: Final = weakref.WeakValueDictionary[Engine, Portal]()


def close_all() -> None:
    """Store what was used in this process; each engine begins anew with the next request."""
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
                        f"{library} replaced Python's threads, and no event loop runs in those",
                        "use gunicorn's gthread workers, or an ASGI server",
                    )
                ]
            )
