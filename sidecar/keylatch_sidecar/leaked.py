"""`/leaked`: whoever finds a token reports it here, and its key is revoked. Nobody needs a key.

The law of this file: the answer does not depend on the token. It is on its way before anybody looks
at the token, so neither its bytes nor its time tell a live key from a dead or made-up one. Holding
the whole token is what entitles to the revoke: an id alone, or an id with another secret, does
nothing.

What strangers send ends at the keyed check, microseconds after the answer. What this
store minted waits in a bounded line, is looked into one by one, and again until the store has
answered; what is left when the process ends is logged by its id. Where the store has keys that were
made elsewhere, strangers can send what looks like one: such tokens have a line of their own, come
last, and are left out while that is full, so that they hold up none of the others.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch import credentials
from keylatch.drafts import NotPossible
from keylatch.engine import Engine
from keylatch.errors import HashingFailed, KeylatchError, StoreUnavailable
from keylatch.keyring import Keyring
from keylatch.lookup import Owner
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch.tokens import Token, is_native
from keylatch_sidecar.management import bodies, unsent
from keylatch_sidecar.management.bodies import JSON, Body, Shape
from keylatch_sidecar.management.problems import Problem
from keylatch_sidecar.management.profile import speaking

REASON: Final = "leaked"
_ACTOR: Final = "leak report"  # in the audit log
_ROOM: Final = 10_000  # more than 16 KiB can report at once; 3 MB
_FOREIGN_ROOM: Final = 1_000
_RETRY_SECONDS: Final = 0.5
_LAST_SECONDS: Final = 1.0

log = logging.getLogger("keylatch")


class Report(Body):
    """One token that was found somewhere."""

    token: str


class Alert(BaseModel):
    """One of several, as GitHub's secret scanning sends them. What else an alert says, now or in
    years to come, is left aside: a report must not be lost over a field."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    token: str


class Reported(RootModel[Report | list[Alert]]):
    """A token, or a list of alerts."""


class Accepted(Shape):
    """`accepted`, whatever the tokens are."""

    status: str


class Leaked(HTTPEndpoint):
    """`/leaked`"""

    @speaking(unsent.spell)
    async def post(self, request: Request) -> Response:
        """Report leaked tokens. The answer is always the same; keys that are real are revoked."""
        reports: Reports = request.app.state.reports
        await reports.expect()
        tokens = _tokens(await bodies.read_json(request))
        answer = JSON(Accepted(status="accepted"), 202)
        answer.background = BackgroundTask(reports.take, tokens)  # begins when all is sent
        return answer


def _tokens(content: Any) -> list[Token]:
    if isinstance(content, dict):
        return [Token(bodies.checked(content, Report).token)]
    try:
        return [Token(alert.token) for alert in _Alerts.model_validate(content).root]
    except ValidationError:
        wanted = 'The body must be {"token": "…"}, or a list of such objects'
        raise Problem(400, wanted) from None


class _Alerts(RootModel[list[Alert]]):
    pass


class Reports:
    """What was reported to this process and is not looked into yet.

    Args:
        engine: tells whose tokens they are.
        retry_seconds: how long to wait for a store that does not answer.
        room: how many may wait.
    """

    def __init__(
        self, engine: Engine, retry_seconds: float = _RETRY_SECONDS, room: int = _ROOM
    ) -> None:
        self._engine = engine
        self._retry_seconds = retry_seconds
        self._room = room
        # By fingerprint: repeating a report costs nothing.
        self._line: dict[bytes, Token] = {}
        self._foreign_line: dict[bytes, Token] = {}
        self._at_work: asyncio.Task[None] | None = None
        self._left_out = RepeatedWarning(
            log, "a report of a leaked key, made elsewhere if it is one, is left out"
        )
        self._not_revoked = RepeatedWarning(
            log,
            "a key that was made elsewhere, if it is one, was reported as leaked and may not be"
            " revoked: %s",
            logging.ERROR,
        )

    async def expect(self) -> None:
        """Return if reports can be taken.

        Raises:
            StoreUnavailable: the store does not answer, or too many reports wait for it.
        """
        await self._engine.reach()
        if len(self._line) >= self._room:
            raise StoreUnavailable("too many reports of leaked keys are waiting", "")

    async def take(self, tokens: Sequence[Token]) -> None:
        """Put those whose key the store could have into the line."""
        for token in filter(_could_be_sent, tokens):
            if not self._engine.may_know(token):
                continue
            if is_native(token):
                self._line.setdefault(token.fingerprint, token)
            elif len(self._foreign_line) < _FOREIGN_ROOM:
                self._foreign_line.setdefault(token.fingerprint, token)
            else:
                self._left_out.add()
        is_idle = self._at_work is None or self._at_work.done()
        if is_idle and (self._line or self._foreign_line):
            self._at_work = asyncio.create_task(self._work(), name="keylatch-leaks")

    async def end(self) -> None:
        """Give the line a second, and name those whose turn did not come."""
        if self._at_work is not None:
            await asyncio.wait([self._at_work], timeout=_LAST_SECONDS)
            self._at_work.cancel()
            await asyncio.wait([self._at_work])
        # Many tokens can be made from one that look like the same key: each key is named once.
        keys = {token.key_id: token for token in self._line.values()}
        for token in (*keys.values(), *self._foreign_line.values()):
            self._tell(token, "this process ends")
        self._line, self._foreign_line = {}, {}

    async def _work(self) -> None:
        while line := self._line or self._foreign_line:
            fingerprint, token = next(iter(line.items()))
            try:
                await _look_into(self._engine, token)
            except NotPossible:  # the key was rotated or deleted in between
                continue
            except HashingFailed as error:  # asking again would not help
                self._tell(token, error.message)
            except KeylatchError as error:
                log.warning("reports of leaked keys are waiting: %s", error.message)
                await asyncio.sleep(self._retry_seconds)
                continue
            except Exception as error:  # a report that breaks us must not hold up the others
                log.exception("a report of a leaked key failed")
                self._tell(token, type(error).__name__)
            del line[fingerprint]

    def _tell(self, token: Token, why: str) -> None:
        """Say whose key may not be revoked; a token from elsewhere has no id that may be told."""
        if is_native(token):
            log.error("%s was reported as leaked and may not be revoked: %s", token.key_id, why)
            log.error("hint: keylatch keys revoke ID")
        else:
            self._not_revoked.add(why)


def _could_be_sent(token: Token) -> bool:
    """Whether it could stand in a header: a report may hold any text."""
    value = b"Bearer " + token.reveal().encode("ascii", "replace")
    return isinstance(credentials.read([value], barred=True), Token)


async def _look_into(engine: Engine, token: Token) -> None:
    owner = await engine.identify(token)
    if owner is not None and owner.is_of_use:
        await revoke((await engine.keyring()).used_by(_ACTOR), owner)
        log.warning("%s was reported as leaked and is revoked", owner.record.id)


async def revoke(keyring: Keyring, owner: Owner) -> None:
    """End a token that was found where it should not be, also if its key is disabled or expired:
    either could be taken back. A secret that was rotated away ends alone, and its key goes on.

    Raises:
        NotPossible: the key was rotated or deleted meanwhile; look again.
        StoreUnavailable: it may not have been revoked; repeat it.
    """
    await keyring.end_secret(owner.record, owner.secret, reason=REASON)
