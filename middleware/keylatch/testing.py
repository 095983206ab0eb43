"""For an app's own tests: real keys in memory, a clock that the test moves, and requests without a
key where a test does not care about keys.

    pytest_plugins = ["keylatch.testing"]                  # in conftest.py: the fixture `api_keys`

    def test_who_calls(api_keys):
        with api_keys.behind(app):                         # a Starlette, FastAPI, Flask, … app
            key = api_keys.create(permission="SENDING")
            answer = client.get("/v1/me", headers=key.headers)

It is the real engine over a real store, so the app behaves as in production. Only the hashes are
cheap, and time stands still until the test moves it.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from keylatch.adapters.middleware import BaseMiddleware
from keylatch.authentication.authenticator import Authenticator, CacheMiss
from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import (
    ANY_KEY,
    FULL,
    Allow,
    Decision,
    DeferredDeny,
    Principal,
    Requirement,
)
from keylatch.core.decisions import missing_scope as _missing_scope
from keylatch.core.decisions import principal_of as _principal
from keylatch.core.keys import Key as StoredKey
from keylatch.core.keys import Metadata
from keylatch.core.timestamps import datetime_of
from keylatch.engine import Engine
from keylatch.management.keyring import UNSET, Keyring, Unset
from keylatch.settings import Settings
from keylatch.storage.store import Store

try:
    import pytest
except ImportError:  # the module works with unittest as well
    pytest = None  # type: ignore[assignment]

T = TypeVar("T")

__all__ = ["Clock", "Key", "Keys"]


class Clock:
    """Seconds since the Unix epoch. They pass only when `tick` is called."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = time.time() if seconds is None else seconds

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        """Let this many seconds pass."""
        self.seconds += seconds


@dataclass(frozen=True)
class Key:
    """A key that a test created.

    Args:
        id: `key_…`.
        token: the whole key, as a client sends it.
        principal: what the app finds in `request.user`.
    """

    id: str
    token: str = field(repr=False)
    principal: Principal

    @property
    def headers(self) -> dict[str, str]:
        """The `Authorization` header with this key."""
        return {"Authorization": f"Bearer {self.token}"}


class Keys:
    """The keys of one test, in memory.

    Args:
        settings: those of `keylatch.Settings`, such as `permissions="FULL,SENDING,READING"`. The
            environment variables for store and Redis have no effect.
    """

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self._settings = Settings.load(**{"store": None, "redis": "", **settings})
        self._store = Store("sqlite://")
        self._every_principal: Principal | None = None
        self._management_engine = self.engine()
        self._management_lock = threading.Lock()

    def engine(self) -> Engine:
        """An engine that accepts these keys: `APIKeyMiddleware(app, engine=keys.engine())`."""
        return _Engine(self)

    @contextlib.contextmanager
    def behind(self, app: Any) -> Iterator["Keys"]:
        """The app's middleware accepts these keys, and no others, until the end of the block.

        Args:
            app: a Starlette or FastAPI app, a Flask or Quart app, or the middleware itself. For
                Django: `override_settings(KEYLATCH={…, "engine": keys.engine()})`.

        Raises:
            LookupError: the app has no keylatch middleware.
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
        """Create a key.

        Args:
            name: what the key is for.
            organization: the id of its owner.
            permission: one of the settings' `permissions`.
            environment: such as `live` or `test`.
            expires_in: seconds from now by `clock`; None: it does not expire.
        """
        now_ms = int(self.clock() * 1000)
        expires_at = None if expires_in is None else datetime_of(now_ms + int(expires_in * 1000))
        created = self._manage(
            lambda keyring: keyring.create(
                organization,
                name,
                permission=permission,
                environment=environment,
                expires_at=expires_at,
            )
        )
        return Key(created.record.id, created.secret, _principal(created.record))

    def revoke(self, key: Key) -> None:
        """Delete the key. The next request with it is refused."""
        self._manage(lambda keyring: keyring.delete(key.principal.organization_id, key.id))

    def rotate(self, key: Key, grace: float = 0) -> Key:
        """The key with a new secret. The old one is accepted for another `grace` seconds."""
        rotated = self._manage(
            lambda keyring: keyring.rotate(
                key.principal.organization_id, key.id, grace=timedelta(seconds=grace)
            )
        )
        if rotated is None:
            raise LookupError(f"{key.id} is not one of these keys")
        return Key(key.id, rotated.secret, _principal(rotated.record))

    def change(
        self,
        key: Key,
        *,
        name: str | Unset = UNSET,
        active: bool | Unset = UNSET,
        permission: str | Unset = UNSET,
        expires_at: datetime | Unset | None = UNSET,
        metadata: Metadata | Unset | None = UNSET,
    ) -> None:
        """Change the given fields of a key, as `Keyring.change`."""
        self._manage(
            lambda keyring: keyring.change(
                key.principal.organization_id,
                key.id,
                name=name,
                active=active,
                permission=permission,
                expires_at=expires_at,
                metadata=metadata,
            )
        )

    def records(self, organization: str = "default") -> list[StoredKey]:
        """The organisation's keys in the store, the newest first."""
        return self._manage(lambda keyring: keyring.list(organization))

    @contextlib.contextmanager
    def everyone_is(self, principal: Principal | None = None) -> Iterator[Principal]:
        """Authenticate every request as this principal, with any key or none, until the end of
        the block. Its permission still decides what it may call.

        Args:
            principal: None: one with FULL.
        """
        principal = principal or Principal("key_test", "test key", "default", FULL, "live")
        before, self._every_principal = self._every_principal, principal
        try:
            yield principal
        finally:
            self._every_principal = before

    def _manage(self, work: Callable[[Keyring], Coroutine[Any, Any, T]]) -> T:
        async def managed() -> T:
            try:
                return await work(await self._management_engine.keyring())
            finally:
                await self._management_engine.stop()

        with self._management_lock:
            return _run_in_thread(managed())


class _Authenticator(Authenticator):
    """The real authenticator; inside `everyone_is` it allows every request."""

    keys: Keys

    def _check_cached(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY, /
    ) -> Decision | CacheMiss:
        principal = self.keys._every_principal
        if principal is None:
            return super()._check_cached(values, requirement)
        return _evaluate(principal, requirement)


class _Engine(Engine):
    """The real engine on the test's store and clock."""

    authenticator_class = _Authenticator
    authenticator: _Authenticator

    def __init__(self, keys: Keys) -> None:
        super().__init__(
            keys._settings,
            clock=keys.clock,
            timer=keys.clock,
            store=keys._store,
            hasher=Hasher("sha256"),
        )
        self.authenticator.keys = keys


def _evaluate(principal: Principal, requirement: Requirement) -> Decision:
    deny = _missing_scope(principal.permission, requirement)
    if deny is None:
        return Allow(principal)
    decide = functools.partial(_evaluate, principal)
    return deny if requirement.is_final else DeferredDeny(deny.reason, deny.scope, decide=decide)


def _replace_in_wrappers(stack: contextlib.ExitStack, app: Any, engine: Any) -> list[bool]:
    """Replace the engine of every middleware around the app, its `wsgi_app` or its `asgi_app`."""
    found = []
    for middleware in (app, *(getattr(app, name, None) for name in ("wsgi_app", "asgi_app"))):
        while isinstance(middleware, BaseMiddleware):
            stack.callback(middleware.use_engine, middleware.engine)
            middleware.use_engine(engine())
            if hasattr(middleware, "close"):  # ends the portal's thread with the test
                stack.callback(middleware.close)
            found.append(True)
            middleware = middleware._app
    return found


def _replace_in_middleware_list(stack: contextlib.ExitStack, app: Any, engine: Any) -> bool:
    """Replace the engine in Starlette's list of middlewares that are not built yet."""
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
    """The result of a coroutine. It runs on a new thread, because a loop may run on this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


if pytest is not None:

    @pytest.fixture
    def api_keys() -> Keys:
        """The keys of this test, in memory."""
        return Keys()
