"""What all of the proxies' endpoints share: one question, one answer, whatever it came in.

An allow is `200` with an empty body and every identity header, every time: a proxy that copies
only what it gets would otherwise let the client's own copy through. Permissions can only add up,
because some proxies append the client's query to ours. A malformed credential is 401 and not 400,
because nginx's `auth_request` turns 400 into 500. What cannot be decided within the deadline is
503: no proxy shall wait longer than its client.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Final
from urllib.parse import quote

from starlette.types import Message, Receive, Scope, Send

from keylatch.asgi import client_info_of, refuse
from keylatch.authentication.authenticator import Authenticator, CacheMiss, TracedAuthenticator
from keylatch.core.decisions import (
    ONLY_FULL,
    PERMISSION_PATTERN,
    Allow,
    ClientGetter,
    Decision,
    Deny,
    Principal,
    Requirement,
)
from keylatch.core.refusals import Header, Refusal, Refusals
from keylatch.engine import Engine
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.forward_auth.original_request import (
    NO_REQUEST,
    OriginalRequest,
    RequestSource,
)

DEADLINE_SECONDS: Final = 0.8

_NO_CONTENT: Final = (b"content-length", b"0")
_NO_STORE: Final = (b"cache-control", b"no-store")
_NO_CALLER: Final[ClientGetter] = lambda: (None, None)  # noqa: E731 - where no one asks for it
_NO_BODY: Final[Message] = {"type": "http.response.body", "body": b""}

_MISCONFIGURED_BODY: Final = (
    b'{"error":"misconfigured","error_description":'
    b'"The proxy does not send the original request where the sidecar expects it"}'
)
_MISCONFIGURED: Final = Refusal(
    403,
    (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_MISCONFIGURED_BODY)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-keylatch-error", b"misconfigured"),
    ),
    _MISCONFIGURED_BODY,
)

log = logging.getLogger("keylatch.proxies")


class ForwardAuth:
    """Answers proxies.

    Args:
        engine: judges the tokens.
        cache_seconds: how long a proxy may remember an allow, never beyond the key's expiry; 0: not
            at all. A revoke does not reach what a proxy remembers.
    """

    def __init__(self, engine: Engine, cache_seconds: int = 0) -> None:
        self._engine = engine
        self._authenticator: Authenticator | TracedAuthenticator = engine.authenticator
        if engine.settings.traces_requests:
            self._authenticator = TracedAuthenticator(engine.authenticator)
        self._cache_seconds = cache_seconds
        self._refusals = Refusals(engine.settings.realm, 401, engine.log_failure)
        self._misconfigured = RepeatedWarning(
            log, "a proxy does not send the original request where it is expected: refused with 403"
        )

    async def respond(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        requirement: Requirement,
        source: RequestSource,
    ) -> None:
        """Answer a question that came as an HTTP request; its body is never awaited.

        Args:
            scope: of the request.
            receive: not asked for anything.
            send: takes the answer.
            requirement: what the request behind it asks of a key.
            source: where the facts about that request are.
        """
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        original = source(scope)
        caller = _NO_CALLER if self._engine.log_failure is None else partial(client_info_of, scope)
        outcome = self._check_cached(original, values, requirement, caller)
        if isinstance(outcome, CacheMiss):
            outcome = await self._check(original, outcome, requirement, caller)
        if isinstance(outcome, Refusal):
            await refuse(outcome, scope, receive, send)
            return
        await send(allow_start(outcome.principal, self._max_age(outcome)))
        await send(_NO_BODY)

    async def decide(
        self,
        original: OriginalRequest | None,
        values: Sequence[bytes],
        requirement: Requirement,
        caller: ClientGetter,
    ) -> Allow | Refusal:
        """What the proxy is answered, in whatever protocol it asks.

        Args:
            original: what it says of the request that it asks about; None: it does not say.
            values: of that request's `Authorization` fields.
            requirement: what the request asks of a key.
            caller: whence it came, as far as the proxy can be believed.
        """
        outcome = self._check_cached(original, values, requirement, caller)
        if isinstance(outcome, CacheMiss):
            return await self._check(original, outcome, requirement, caller)
        return outcome

    def _check_cached(
        self,
        original: OriginalRequest | None,
        values: Sequence[bytes],
        requirement: Requirement,
        caller: ClientGetter,
    ) -> Allow | Refusal | CacheMiss:
        """`decide` without waiting."""
        if original is None:
            self._misconfigured.add()
            return _MISCONFIGURED
        decision = self._authenticator.check_cached(values, requirement)
        if isinstance(decision, CacheMiss):
            return decision
        return self._to_outcome(original, decision, caller)

    async def _check(
        self,
        original: OriginalRequest | None,
        miss: CacheMiss,
        requirement: Requirement,
        caller: ClientGetter,
    ) -> Allow | Refusal:
        """`decide` within the deadline."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                decision = await self._authenticator.check(miss, requirement)
        except TimeoutError:
            decision = self._engine.authenticator.deny_unavailable(
                f"no decision within {DEADLINE_SECONDS} s"
            )
        return self._to_outcome(original or NO_REQUEST, decision, caller)

    def _to_outcome(
        self, original: OriginalRequest, decision: Decision, caller: ClientGetter
    ) -> Allow | Refusal:
        if log.isEnabledFor(logging.DEBUG):  # no query, which may hold secrets, and no token
            outcome = "allowed" if isinstance(decision, Allow) else decision.reason.value
            log.debug("%s %s: %s", original.method, original.uri.partition("?")[0], outcome)
        return self._refusals.refuse(decision, caller) if isinstance(decision, Deny) else decision

    def _max_age(self, allow: Allow) -> int:
        seconds = self._cache_seconds
        if seconds and allow.expires_at is not None:
            seconds = min(seconds, (allow.expires_at - self._engine.now_ms()) // 1000)
        return seconds


def all_of(permissions: Sequence[str], environments: Sequence[str] = ()) -> Requirement:
    """Permissions add up, and a malformed one leaves only FULL. Of environments nothing is left
    where two differ, or one is malformed: no key is for it.

    An empty one is malformed: it is what a proxy sends whose variable was never set.
    """
    requirement = ONLY_FULL
    if all(re.fullmatch(PERMISSION_PATTERN, permission) for permission in permissions):
        requirement = Requirement.all_of(permissions)
    if not environments:
        return requirement
    distinct = set(environments)
    environment = distinct.pop() if len(distinct) == 1 else ""
    return replace(requirement, environment=environment)


@lru_cache(maxsize=10_000)
def allow_start(principal: Principal, max_age: int) -> Message:
    """The beginning of an allow, which a proxy may remember for so long. All answers for a key are
    this very object: whoever adds to it copies it first, as servers do."""
    cache_control = (b"cache-control", b"max-age=%d" % max_age) if max_age > 0 else _NO_STORE
    headers = (_NO_CONTENT, cache_control, *identity_headers(principal))
    return {"type": "http.response.start", "status": 200, "headers": headers}


@lru_cache(maxsize=10_000)
def identity_headers(principal: Principal) -> tuple[Header, ...]:
    """Names in lower case, values in ASCII, the key's name percent-encoded."""
    return (
        (b"x-keylatch-key-id", principal.key_id.encode()),
        (b"x-keylatch-key-name", quote(principal.key_name, safe="").encode()),
        (b"x-keylatch-organization-id", principal.organization_id.encode()),
        (b"x-keylatch-permission", principal.permission.encode()),
        (b"x-keylatch-environment", principal.environment.encode()),
    )
