"""`/leaked`: revokes keys whose tokens were found in public. The endpoint needs no authentication.

The law of this file: the response does not depend on the token. It is sent before the token is
examined, so neither its bytes nor its time distinguish an active key from a revoked or unknown one.
Only the complete token authorizes the revocation: a key id alone, or with another secret, has no
effect.

Tokens that this store did not mint are discarded by their MAC, microseconds after the response.
Tokens that it minted enter a bounded queue and are processed one by one, with retries until the
store answers; those that are left when the process stops are logged by their key ids. If the store
has imported keys, any client can send tokens that may be one: such tokens have a queue of their
own, which is processed last and drops reports while it is full, so they never delay the others.
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
from keylatch.errors import HashingFailed, InvalidKeyState, OperationalError, StoreUnavailable
from keylatch.management.keyring import Keyring
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.api import request_body, unsent
from keylatch_sidecar.api.error_responses import errors_in
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
    """One leaked token."""

    token: str


class Alert(BaseModel):
    """One of several leaked tokens, as GitHub's secret scanning sends them. Other fields are
    ignored, so that a field which GitHub adds later does not cause the report to be lost."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    token: str


class Reported(RootModel[Report | list[Alert]]):
    """A token, or a list of alerts."""


class Accepted(ResponseBody):
    """`accepted`, for any tokens."""

    status: str


class Leaked(HTTPEndpoint):
    """`/leaked`"""

    @errors_in(unsent.render_error)
    async def post(self, request: Request) -> Response:
        """Report leaked tokens. The response is always the same; existing keys are revoked."""
        reports: ReportQueue = request.app.state.reports
        await reports.check_capacity()
        tokens = _reported_tokens(await request_body.read_json(request))
        response = JSON(Accepted(status="accepted"), 202)
        response.background = BackgroundTask(reports.enqueue, tokens)  # runs after it was sent
        return response


def _reported_tokens(content: Any) -> list[Token]:
    if isinstance(content, dict):
        return [Token(request_body.validated(content, Report).token)]
    try:
        return [Token(alert.token) for alert in _Alerts.model_validate(content).root]
    except ValidationError:
        message = 'The body must be {"token": "…"}, or a list of such objects'
        raise Problem(400, message) from None


class _Alerts(RootModel[list[Alert]]):
    pass


class ReportQueue:
    """Leak reports that this process has accepted and not yet processed.

    Args:
        engine: identifies tokens.
        retry_seconds: between two attempts while the store does not answer.
        max_pending: the limit of tokens that this store minted.
    """

    def __init__(
        self, engine: Engine, retry_seconds: float = _RETRY_SECONDS, max_pending: int = _MAX_PENDING
    ) -> None:
        self._engine = engine
        self._retry_seconds = retry_seconds
        self._max_pending = max_pending
        # By fingerprint: a repeated report takes no further place.
        self._pending: dict[bytes, Token] = {}
        self._pending_imported: dict[bytes, Token] = {}
        self._worker: asyncio.Task[None] | None = None
        self._dropped = RepeatedWarning(
            log, "dropped a leak report: the queue for tokens of imported keys is full"
        )
        self._not_revoked = RepeatedWarning(
            log,
            "a key, perhaps imported, was reported as leaked and may still be active: %s",
            logging.ERROR,
        )

    async def check_capacity(self) -> None:
        """Return if the queue accepts reports.

        Raises:
            StoreUnavailable: the store does not answer, or the queue is full.
        """
        await self._engine.authenticator.ensure_available()
        if len(self._pending) >= self._max_pending:
            raise StoreUnavailable("too many leak reports are pending", "")

    async def enqueue(self, tokens: Sequence[Token]) -> None:
        """Queue the tokens that the store may have minted or imported, and discard the others."""
        for token in filter(_is_valid_credential, tokens):
            if not self._engine.authenticator.may_exist(token):
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
        """Wait up to 1 s for the queue, then log the reports that are left."""
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=_SHUTDOWN_SECONDS)
            self._worker.cancel()
            await asyncio.wait([self._worker])
        # From one token many others with its key id can be made: each key is logged once.
        keys = {token.key_id: token for token in self._pending.values()}
        for token in (*keys.values(), *self._pending_imported.values()):
            self._log_not_revoked(token, "this process is stopping")
        self._pending, self._pending_imported = {}, {}

    async def _process(self) -> None:
        while pending := self._pending or self._pending_imported:
            fingerprint, token = next(iter(pending.items()))
            try:
                await _revoke_reported(self._engine, token)
            except InvalidKeyState:  # the key was rotated or deleted since it was identified
                continue
            except HashingFailed as error:  # a retry would not help
                self._log_not_revoked(token, error.message)
            except OperationalError as error:
                log.warning("leak reports wait for the store or the hasher: %s", error.message)
                await asyncio.sleep(self._retry_seconds)
                continue
            except Exception as error:  # a bug that one report triggers must not block the others
                log.exception("processing a leak report failed")
                self._log_not_revoked(token, type(error).__name__)
            del pending[fingerprint]

    def _log_not_revoked(self, token: Token, reason: str) -> None:
        """Log the id of a key that may still be active; an imported token has no id to log."""
        if is_native(token):
            log.error("%s was reported as leaked and may still be active: %s", token.key_id, reason)
            log.error("hint: keylatch keys revoke %s", token.key_id)
        else:
            self._not_revoked.add(reason)


def _is_valid_credential(token: Token) -> bool:
    """Whether a request could send the token in a header field: a report may contain any text."""
    value = b"Bearer " + token.reveal().encode("ascii", "replace")
    return isinstance(credentials.read([value], allow_pipe=True), Token)


async def _revoke_reported(engine: Engine, token: Token) -> None:
    owner = await engine.authenticator.identify(token)
    if owner is not None and owner.is_usable:
        await revoke((await engine.keyring()).as_operator(_ACTOR), owner)
        log.warning("revoked %s, which was reported as leaked", owner.record.id)


async def revoke(keyring: Keyring, owner: Owner) -> None:
    """Revoke a leaked key, also if it is disabled or expired, because both can be undone. A
    previous secret is revoked alone: the key's new secret stays valid.

    Raises:
        InvalidKeyState: the key was rotated or deleted meanwhile; identify the token again.
        StoreUnavailable: the key may not be revoked; retry.
    """
    await keyring.revoke_secret(owner.record, owner.secret, reason=REASON)
