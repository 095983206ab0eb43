"""Decides on reverse proxies' requests, independent of the protocol that a proxy uses.

An allow is `200` with an empty body and always all identity headers: a proxy that copies only the
headers it receives would otherwise forward the client's own value of a missing one. A key needs all
permissions of a request, because some proxies append the client's query to the sidecar's. A
malformed credential is answered with 401 instead of 400, because nginx's `auth_request` turns 400
into 500. A check that exceeds the deadline is answered with 503, so that a proxy's client does not
time out first.
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
_NO_CALLER: Final[ClientGetter] = lambda: (None, None)  # noqa: E731 - where it is not needed
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
    """Answers reverse proxies.

    Args:
        engine: checks tokens.
        cache_seconds: for how long a proxy may cache an allow, but not beyond the key's expiry; 0:
            not at all. A revocation does not reach a proxy's cache.
    """

    def __init__(self, engine: Engine, cache_seconds: int = 0) -> None:
        self._engine = engine
        self._authenticator: Authenticator | TracedAuthenticator = engine.authenticator
        if engine.settings.traces_requests:
            self._authenticator = TracedAuthenticator(engine.authenticator)
        self._cache_seconds = cache_seconds
        self._refusals = Refusals(engine.settings.realm, 401, engine.log_failure)
        self._misconfigured = RepeatedWarning(
            log,
            "refused a proxy's request with 403: KEYLATCH_VERIFY_REQUEST or "
            "KEYLATCH_EXT_AUTHZ_REQUEST names fields that the proxy does not send",
        )

    async def respond(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        requirement: Requirement,
        source: RequestSource,
    ) -> None:
        """Answer a proxy's HTTP request; its body is never read.

        Args:
            scope: of the proxy's request.
            receive: of the proxy's request; never awaited.
            send: of the proxy's request.
            requirement: of the original request.
            source: reads the original request from the scope.
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
        """Decide on an original request.

        Args:
            original: its method and URI; None: the proxy does not send them.
            values: of its `Authorization` fields.
            requirement: of the request.
            caller: the client's address and agent, for the log of failures.
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
        """`decide` from the local cache."""
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
        if log.isEnabledFor(
            logging.DEBUG
        ):  # without the query, which may contain secrets, and without the token
            outcome = "allowed" if isinstance(decision, Allow) else decision.reason.value
            log.debug("%s %s: %s", original.method, original.uri.partition("?")[0], outcome)
        return self._refusals.refuse(decision, caller) if isinstance(decision, Deny) else decision

    def _max_age(self, allow: Allow) -> int:
        seconds = self._cache_seconds
        if seconds and allow.expires_at is not None:
            seconds = min(seconds, (allow.expires_at - self._engine.now_ms()) // 1000)
        return seconds


def all_of(permissions: Sequence[str], environments: Sequence[str] = ()) -> Requirement:
    """The requirement of all permissions; FULL if one of them is malformed. Environments that
    differ, or a malformed one, are a requirement that no key meets.

    Empty values are malformed: a proxy sends them if its variable is not set.
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
    """The `http.response.start` of an allow that a proxy may cache for `max_age` seconds. All
    responses for a key share this object, so it must not be changed; servers copy it."""
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
