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

from keylatch.authentication.lookup import Owner
from keylatch.core import credentials
from keylatch.core.tokens import Token, is_native
from keylatch.engine import Engine
from keylatch.errors import HashingFailed, InvalidKeyState, KeylatchError, StoreUnavailable
from keylatch.management.keyring import Keyring
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.api import schemas, unsent
from keylatch_sidecar.api.dialects import errors_in
from keylatch_sidecar.api.errors import Problem
from keylatch_sidecar.api.schemas import JSON, Body, ResponseBody

REASON: Final = "leaked"
_ACTOR: Final = "leak report"  # in the audit log
_MAX_PENDING: Final = 10_000  # more than 16 KiB can report at once; 3 MB
_MAX_PENDING_IMPORTED: Final = 1_000
_RETRY_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 1.0

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


class Accepted(ResponseBody):
    """`accepted`, whatever the tokens are."""

    status: str


class Leaked(HTTPEndpoint):
    """`/leaked`"""

    @errors_in(unsent.render_error)
    async def post(self, request: Request) -> Response:
        """Report leaked tokens. The answer is always the same; keys that are real are revoked."""
        reports: ReportQueue = request.app.state.reports
        await reports.check_capacity()
        tokens = _reported_tokens(await schemas.read_json(request))
        answer = JSON(Accepted(status="accepted"), 202)
        answer.background = BackgroundTask(reports.enqueue, tokens)  # begins when all is sent
        return answer


def _reported_tokens(content: Any) -> list[Token]:
    if isinstance(content, dict):
        return [Token(schemas.validated(content, Report).token)]
    try:
        return [Token(alert.token) for alert in _Alerts.model_validate(content).root]
    except ValidationError:
        message = 'The body must be {"token": "…"}, or a list of such objects'
        raise Problem(400, message) from None


class _Alerts(RootModel[list[Alert]]):
    pass


class ReportQueue:
    """What was reported to this process and is not looked into yet.

    Args:
        engine: tells whose tokens they are.
        retry_seconds: how long to wait for a store that does not answer.
        max_pending: how many may wait.
    """

    def __init__(
        self, engine: Engine, retry_seconds: float = _RETRY_SECONDS, max_pending: int = _MAX_PENDING
    ) -> None:
        self._engine = engine
        self._retry_seconds = retry_seconds
        self._max_pending = max_pending
        # By fingerprint: repeating a report costs nothing.
        self._pending: dict[bytes, Token] = {}
        self._pending_imported: dict[bytes, Token] = {}
        self._worker: asyncio.Task[None] | None = None
        self._dropped = RepeatedWarning(
            log, "the queue of possibly imported keys is full: a leak report was dropped"
        )
        self._not_revoked = RepeatedWarning(
            log,
            "a possibly imported key was reported as leaked and may not be revoked: %s",
            logging.ERROR,
        )

    async def check_capacity(self) -> None:
        """Return if reports can be taken.

        Raises:
            StoreUnavailable: the store does not answer, or too many reports wait for it.
        """
        await self._engine.ensure_available()
        if len(self._pending) >= self._max_pending:
            raise StoreUnavailable("too many leak reports are pending", "")

    async def enqueue(self, tokens: Sequence[Token]) -> None:
        """Put those whose key the store could have into the line."""
        for token in filter(_is_valid_credential, tokens):
            if not self._engine.may_exist(token):
                continue
            if is_native(token):
                self._pending.setdefault(token.fingerprint, token)
            elif len(self._pending_imported) < _MAX_PENDING_IMPORTED:
                self._pending_imported.setdefault(token.fingerprint, token)
            else:
                self._dropped.add()
        is_idle = self._worker is None or self._worker.done()
        if is_idle and (self._pending or self._pending_imported):
            self._worker = asyncio.create_task(self._process(), name="keylatch-leaks")

    async def close(self) -> None:
        """Give the line a second, and name those whose turn did not come."""
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=_SHUTDOWN_SECONDS)
            self._worker.cancel()
            await asyncio.wait([self._worker])
        # Many tokens can be made from one that look like the same key: each key is named once.
        keys = {token.key_id: token for token in self._pending.values()}
        for token in (*keys.values(), *self._pending_imported.values()):
            self._log_not_revoked(token, "this process is stopping")
        self._pending, self._pending_imported = {}, {}

    async def _process(self) -> None:
        while pending := self._pending or self._pending_imported:
            fingerprint, token = next(iter(pending.items()))
            try:
                await _revoke_reported(self._engine, token)
            except InvalidKeyState:  # the key was rotated or deleted in between
                continue
            except HashingFailed as error:  # asking again would not help
                self._log_not_revoked(token, error.message)
            except KeylatchError as error:
                log.warning("leak reports are pending: %s", error.message)
                await asyncio.sleep(self._retry_seconds)
                continue
            except Exception as error:  # a report that breaks us must not hold up the others
                log.exception("a leak report failed")
                self._log_not_revoked(token, type(error).__name__)
            del pending[fingerprint]

    def _log_not_revoked(self, token: Token, reason: str) -> None:
        """Say whose key may not be revoked; a token from elsewhere has no id that may be told."""
        if is_native(token):
            log.error("%s was reported as leaked and may not be revoked: %s", token.key_id, reason)
            log.error("hint: keylatch keys revoke ID")
        else:
            self._not_revoked.add(reason)


def _is_valid_credential(token: Token) -> bool:
    """Whether it could stand in a header: a report may hold any text."""
    value = b"Bearer " + token.reveal().encode("ascii", "replace")
    return isinstance(credentials.read([value], allow_pipe=True), Token)


async def _revoke_reported(engine: Engine, token: Token) -> None:
    owner = await engine.identify(token)
    if owner is not None and owner.is_usable:
        await revoke((await engine.keyring()).as_operator(_ACTOR), owner)
        log.warning("%s was reported as leaked and is revoked", owner.record.id)


async def revoke(keyring: Keyring, owner: Owner) -> None:
    """End a token that was found where it should not be, also if its key is disabled or expired:
    either could be taken back. A secret that was rotated away ends alone, and its key goes on.

    Raises:
        InvalidKeyState: the key was rotated or deleted meanwhile; look again.
        StoreUnavailable: it may not have been revoked; repeat it.
    """
    await keyring.revoke_secret(owner.record, owner.secret, reason=REASON)
