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

from keylatch.asgi import caller_of, refuse
from keylatch.engine import Engine
from keylatch.model import ONLY_FULL, Allow, Caller, Deny, Principal, Verdict, Wanted
from keylatch.refusals import Header, Refusal, Refusals
from keylatch.settings import PERMISSION_PATTERN
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch.telemetry.trail import Checks, Followed
from keylatch.tokens import Token
from keylatch_sidecar.proxies.facts import NOTHING, Facts, Profile

DEADLINE_SECONDS: Final = 0.8

_NO_CONTENT: Final = (b"content-length", b"0")
_NO_STORE: Final = (b"cache-control", b"no-store")
_NO_CALLER: Final[Caller] = lambda: (None, None)  # noqa: E731 - where no one asks for it
_NO_BODY: Final[Message] = {"type": "http.response.body", "body": b""}

_MISCONFIGURED_BODY: Final = (
    b'{"error":"misconfigured","error_description":'
    b'"The proxy does not say what it was asked, as the sidecar is told to expect"}'
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


class Proxies:
    """Answers proxies.

    Args:
        engine: judges the tokens.
        cache_seconds: how long a proxy may remember an allow, never beyond the key's expiry; 0: not
            at all. A revoke does not reach what a proxy remembers.
    """

    def __init__(self, engine: Engine, cache_seconds: int = 0) -> None:
        self._engine = engine
        self._checks: Checks = Followed(engine) if engine.settings.is_followed else engine
        self._cache_seconds = cache_seconds
        self._refusals = Refusals(engine.settings.realm, 401, engine.failures)
        self._misconfigured = RepeatedWarning(
            log, "a proxy does not say what it was asked as it should: refused with 403"
        )

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, wanted: Wanted, profile: Profile
    ) -> None:
        """Answer a question that came as an HTTP request; its body is never awaited.

        Args:
            scope: of the request.
            receive: not asked for anything.
            send: takes the answer.
            wanted: what the request behind it asks of a key.
            profile: where the facts about that request are.
        """
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        facts = profile(scope)
        caller = _NO_CALLER if self._engine.failures is None else partial(caller_of, scope)
        verdict = self._glance(facts, values, wanted, caller)
        if isinstance(verdict, Token):
            verdict = await self._resolve(facts, verdict, wanted, caller)
        if isinstance(verdict, Refusal):
            await refuse(verdict, scope, receive, send)
            return
        await send(allowing(verdict.principal, self._seconds_to_remember(verdict)))
        await send(_NO_BODY)

    async def judge(
        self, facts: Facts | None, values: Sequence[bytes], wanted: Wanted, caller: Caller
    ) -> Allow | Refusal:
        """What the proxy is answered, in whatever protocol it asks.

        Args:
            facts: what it says of the request that it asks about; None: it does not say.
            values: of that request's `Authorization` fields.
            wanted: what the request asks of a key.
            caller: whence it came, as far as the proxy can be believed.
        """
        verdict = self._glance(facts, values, wanted, caller)
        if isinstance(verdict, Token):
            return await self._resolve(facts, verdict, wanted, caller)
        return verdict

    def _glance(
        self, facts: Facts | None, values: Sequence[bytes], wanted: Wanted, caller: Caller
    ) -> Allow | Refusal | Token:
        """`judge` without waiting; the token where that does not suffice."""
        if facts is None:
            self._misconfigured.add()
            return _MISCONFIGURED
        known = self._checks.glance(values, wanted)
        return known if isinstance(known, Token) else self._answered(facts, known, caller)

    async def _resolve(
        self, facts: Facts | None, token: Token, wanted: Wanted, caller: Caller
    ) -> Allow | Refusal:
        """`judge` within the deadline."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                verdict = await self._checks.resolve(token, wanted)
        except TimeoutError:
            verdict = self._engine.gave_up(f"nothing could be decided in {DEADLINE_SECONDS} s")
        return self._answered(facts or NOTHING, verdict, caller)

    def _answered(self, facts: Facts, verdict: Verdict, caller: Caller) -> Allow | Refusal:
        if log.isEnabledFor(logging.DEBUG):  # no query, which may hold secrets, and no token
            said = "allowed" if isinstance(verdict, Allow) else verdict.reason.value
            log.debug("%s %s: %s", facts.method, facts.uri.partition("?")[0], said)
        return self._refusals.refuse(verdict, caller) if isinstance(verdict, Deny) else verdict

    def _seconds_to_remember(self, allow: Allow) -> int:
        seconds = self._cache_seconds
        if seconds and allow.expires_at is not None:
            seconds = min(seconds, (allow.expires_at - self._engine.now_ms()) // 1000)
        return seconds


def wanted_of(permissions: Sequence[str], environments: Sequence[str] = ()) -> Wanted:
    """Permissions add up, and a malformed one leaves only FULL. Of environments nothing is left
    where two differ, or one is malformed: no key is for it.

    An empty one is malformed: it is what a proxy sends whose variable was never set.
    """
    wanted = ONLY_FULL
    if all(re.fullmatch(PERMISSION_PATTERN, permission) for permission in permissions):
        wanted = Wanted.all_of(permissions)
    if not environments:
        return wanted
    asked = set(environments)
    environment = asked.pop() if len(asked) == 1 else ""
    return replace(wanted, environment=environment)


@lru_cache(maxsize=10_000)
def allowing(principal: Principal, seconds: int) -> Message:
    """The beginning of an allow, which a proxy may remember for so long. All answers for a key are
    this very object: whoever adds to it copies it first, as servers do."""
    remember = (b"cache-control", b"max-age=%d" % seconds) if seconds > 0 else _NO_STORE
    headers = (_NO_CONTENT, remember, *identity_headers(principal))
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
