"""The keyring for threads: WSGI and Django views, management commands, scripts.

    with SyncKeyring(Settings.load()) as keyring:        # a script
        print(keyring.create("acme", "ci").secret)

    keyring = SyncKeyring(engine=engine)                 # an app that has an engine

The law of this file: every method runs the method of `Keyring` with the same name on the engine's
portal (see `portal`) and waits for it. Nothing is implemented twice.
"""

import builtins
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from keylatch.adapters.portal import Portal
from keylatch.core.validation import NewKey
from keylatch.engine import Engine
from keylatch.errors import InvalidValue
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

_END: Final = object()


def _waiting(
    method: Callable[Concatenate[Keyring, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[SyncKeyring, P], T]":
    """The method of a `Keyring`, for a thread that waits for its result."""

    @functools.wraps(method)
    def call(self: "SyncKeyring", /, *args: P.args, **kwargs: P.kwargs) -> T:
        async def run() -> T:
            return await method(await self._keyring(), *args, **kwargs)

        return self._portal.run(run())

    return call


def _iterating(
    method: Callable[Concatenate[Keyring, P], AsyncIterator[T]],
) -> "Callable[Concatenate[SyncKeyring, P], Iterator[T]]":
    """The same for a method that returns an iterator."""

    @functools.wraps(method)
    def call(self: "SyncKeyring", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        async def begin() -> AsyncIterator[T]:
            return method(await self._keyring(), *args, **kwargs)

        async def following() -> Any:
            return await anext(iterator, _END)

        iterator = self._portal.run(begin())
        while (item := self._portal.run(following())) is not _END:
            yield item

    return call


class SyncKeyring:
    """`Keyring` for threads, with the same methods, arguments and results.

    A call in an event loop would block that loop: use `await engine.keyring()` there.

    Args:
        settings: of an engine for this keyring alone; None: those of the environment.
        engine: the engine of a WSGI or Django app, instead of settings. It must not run on the
            event loop of an ASGI app at the same time.
    """

    def __init__(self, settings: Settings | None = None, *, engine: Engine | None = None) -> None:
        self._owns_engine = engine is None
        self._engine = engine or Engine(settings or Settings.load())
        self._portal = Portal.for_engine(self._engine)
        self._operator = ""

    def __enter__(self) -> "SyncKeyring":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine, unless it is an app's. The next call starts it again."""
        if self._owns_engine:
            self._portal.close()

    def as_operator(self, operator: str) -> "SyncKeyring":
        """As `Keyring.as_operator`."""
        keyring = SyncKeyring(engine=self._engine)
        keyring._operator = operator
        return keyring

    def validate(self, new_key: NewKey) -> builtins.list[InvalidValue]:
        """As `Keyring.validate`."""
        return self._portal.run(self._keyring()).validate(new_key)

    create = _waiting(Keyring.create)
    create_many = _waiting(Keyring.create_many)
    list = _waiting(Keyring.list)
    page = _waiting(Keyring.page)
    pages = _iterating(Keyring.pages)
    get = _waiting(Keyring.get)
    usage = _waiting(Keyring.usage)
    events = _waiting(Keyring.events)
    change = _waiting(Keyring.change)
    set_organization_active = _waiting(Keyring.set_organization_active)
    rotate = _waiting(Keyring.rotate)
    cancel_rotation = _waiting(Keyring.cancel_rotation)
    finish_rotation = _waiting(Keyring.finish_rotation)
    delete = _waiting(Keyring.delete)
    revoke_all = _waiting(Keyring.revoke_all)
    revoke_own_secret = _waiting(Keyring.revoke_own_secret)

    async def _keyring(self) -> Keyring:
        keyring = await self._engine.keyring()
        return keyring.as_operator(self._operator) if self._operator else keyring
