"""What an app's own tests need: real keys in memory, a clock to move, and nobody who asks for one.

    pytest_plugins = ["keylatch.testing"]                  # in conftest.py: the fixture `api_keys`

    def test_who_calls(api_keys):
        with api_keys.behind(app):                         # a Starlette, FastAPI, Flask, … app
            key = api_keys.create(permission="SENDING")
            answer = client.get("/v1/me", headers=key.headers)

It is the real engine over a real store, so whatever a test learns is true in production; only the
hashes are cheap, and time stands still until it is moved.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from keylatch.adapters.middleware import BaseMiddleware
from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import (
    ANY_KEY,
    FULL,
    Allow,
    Decision,
    DeferredDeny,
    KeyRecord,
    Principal,
    Requirement,
)
from keylatch.core.decisions import missing_scope as _missing_scope
from keylatch.core.decisions import principal_of as _principal
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from keylatch.storage.store import Store

try:
    import pytest
except ImportError:  # unittest is welcome
    pytest = None  # type: ignore[assignment]

T = TypeVar("T")

__all__ = ["Clock", "Key", "Keys"]


class Clock:
    """Seconds since the Unix epoch, moved by hand."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = time.time() if seconds is None else seconds

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.seconds += seconds


@dataclass(frozen=True)
class Key:
    """A key that was made for a test.

    Args:
        id: `key_…`.
        token: what a caller sends.
        principal: what the app finds in `request.user`.
    """

    id: str
    token: str = field(repr=False)
    principal: Principal

    @property
    def headers(self) -> dict[str, str]:
        """The header that sends it."""
        return {"Authorization": f"Bearer {self.token}"}


class Keys:
    """The keys of one test; nothing of them is left when it is gone.

    Args:
        settings: those of `keylatch.Settings`, such as `permissions="FULL,SENDING,READING"`;
            the environment's are not looked at for store and Redis.
    """

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self._settings = Settings.load(**{"store": None, "redis": "", **settings})
        self._store = Store("sqlite://")
        self._everyone: Principal | None = None
        self._management_engine = self.engine()
        self._management_lock = threading.Lock()

    def engine(self) -> Engine:
        """An engine that accepts these keys: `APIKeyMiddleware(app, engine=keys.engine())`."""
        return _Engine(self)

    @contextlib.contextmanager
    def behind(self, app: Any) -> Iterator["Keys"]:
        """The app's middleware decides by these keys until the end of the block.

        Args:
            app: a Starlette or FastAPI app, a Flask or Quart app, or the middleware itself. For
                Django: `override_settings(KEYLATCH={…, "engine": keys.engine()})`.

        Raises:
            LookupError: there is no keylatch middleware in it.
        """
        with contextlib.ExitStack() as stack:
            if not any(
                [
                    _replace_in_middleware_list(stack, app, self.engine),
                    *_replace_in_wrappers(stack, app, self.engine),
                ]
            ):
                raise LookupError(f"no keylatch middleware was found in {type(app).__name__}")
            yield self

    def create(
        self,
        name: str = "test key",
        *,
        organization: str = "default",
        permission: str = FULL,
        environment: str = "live",
        expires_in: float | None = None,
    ) -> Key:
        """Make a key.

        Args:
            name: as an operator would call it.
            organization: whose key it is.
            permission: one of the settings' `permissions`.
            environment: such as `live` or `test`.
            expires_in: seconds from now on the movable clock; None: never.
        """
        expires_at = None if expires_in is None else int((self.clock() + expires_in) * 1000)
        made = self._manage(
            lambda keyring: keyring.create(
                organization,
                name,
                permission=permission,
                environment=environment,
                expires_at=expires_at,
            )
        )
        record = made.record
        return Key(record.id, made.token.reveal(), _principal(record))

    def revoke(self, key: Key) -> None:
        """Delete the key; the next request with it is refused."""
        self._manage(lambda keyring: keyring.delete(key.principal.organization_id, key.id))

    def rotate(self, key: Key, grace: float = 0) -> Key:
        """The key with a new secret; the old one stays good for so many seconds."""
        made = self._manage(
            lambda keyring: keyring.rotate(
                key.principal.organization_id, key.id, grace=timedelta(seconds=grace)
            )
        )
        return Key(key.id, made.token.reveal(), _principal(made.record))

    def change(self, key: Key, **values: Any) -> None:
        """Change `name`, `active`, `permission`, `expires_at` or `metadata` of a key."""
        self._manage(
            lambda keyring: keyring.change(key.principal.organization_id, key.id, **values)
        )

    def records(self, organization: str = "default") -> list[KeyRecord]:
        """What is stored of the organisation's keys, the newest first."""
        found: list[KeyRecord] = self._manage(lambda keyring: keyring.list(organization))
        return found

    @contextlib.contextmanager
    def everyone_is(self, principal: Principal | None = None) -> Iterator[Principal]:
        """Until the end of the block every request is allowed as this principal, with any key or
        none; its permission still decides what it may call.

        Args:
            principal: None: one with FULL.
        """
        principal = principal or Principal("key_test", "test key", "default", FULL, "live")
        before, self._everyone = self._everyone, principal
        try:
            yield principal
        finally:
            self._everyone = before

    def _manage(self, work: Any) -> Any:
        async def managed() -> Any:
            keyring: Keyring = await self._management_engine.keyring()
            try:
                return await work(keyring)
            finally:
                await self._management_engine.stop()

        with self._management_lock:
            return _run_in_thread(managed())


class _Engine(Engine):
    """The real one on the test's store and clock; and everybody may be somebody."""

    def __init__(self, keys: Keys) -> None:
        super().__init__(
            keys._settings,
            clock=keys.clock,
            timer=keys.clock,
            store=keys._store,
            hasher=Hasher("sha256"),
        )
        self._keys = keys

    def check_cached(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision | Token:
        principal = self._keys._everyone
        if principal is None:
            return super().check_cached(values, requirement)
        return _evaluate(principal, requirement)


def _evaluate(principal: Principal, requirement: Requirement) -> Decision:
    deny = _missing_scope(principal.permission, requirement)
    if deny is None:
        return Allow(principal)
    decide = functools.partial(_evaluate, principal)
    return deny if requirement.is_final else DeferredDeny(deny.reason, deny.scope, decide=decide)


def _replace_in_wrappers(stack: contextlib.ExitStack, app: Any, engine: Any) -> list[bool]:
    """Replace the engine of every middleware that wraps the app or hangs on it."""
    found = []
    for middleware in (app, *(getattr(app, name, None) for name in ("wsgi_app", "asgi_app"))):
        while isinstance(middleware, BaseMiddleware):
            stack.callback(middleware.use_engine, middleware.engine)
            middleware.use_engine(engine())
            if hasattr(middleware, "close"):  # a portal's thread ends with the test
                stack.callback(middleware.close)
            found.append(True)
            middleware = middleware._app
    return found


def _replace_in_middleware_list(stack: contextlib.ExitStack, app: Any, engine: Any) -> bool:
    """Replace the engine in Starlette's list of middlewares to build."""
    listed = getattr(app, "user_middleware", None)
    if not isinstance(listed, list):
        return False
    before = list(listed)
    ours = [
        each
        for each in before
        if isinstance(each.cls, type) and issubclass(each.cls, BaseMiddleware)
    ]

    def rebuild(middlewares: list[Any]) -> None:
        app.user_middleware[:] = middlewares
        app.middleware_stack = None

    stack.callback(rebuild, before)
    rebuild(
        [
            type(each)(each.cls, *each.args, **{**each.kwargs, "engine": engine()})
            if each in ours
            else each
            for each in before
        ]
    )
    return bool(ours)


def _run_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of work, from any test: on a thread of its own, because a loop may run in this."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


if pytest is not None:

    @pytest.fixture
    def api_keys() -> Keys:
        """Keys in memory, for one test."""
        return Keys()
