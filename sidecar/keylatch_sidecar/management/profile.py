"""How a management endpoint turns what went wrong into its dialect's error."""

import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from keylatch.drafts import (
    CallerRefused,
    InvalidValue,
    NotPermitted,
    NotPossible,
    QuotaExceeded,
)
from keylatch.errors import KeylatchError
from keylatch.model import Deny
from keylatch_sidecar.management.access import engine_of
from keylatch_sidecar.management.bodies import invalid
from keylatch_sidecar.management.problems import (
    Fault,
    Problem,
    beyond_limit,
    beyond_rights,
    refused,
    unavailable,
)

E = TypeVar("E")
Handler = Callable[[E, Request], Awaitable[Response]]
Spelling = Callable[[Problem], Response]


def speaking(spell: Spelling) -> Callable[[Handler[E]], Handler[E]]:
    """Decorates an endpoint's method: whatever it raises is answered in this spelling."""

    def decorate(handler: Handler[E]) -> Handler[E]:
        @functools.wraps(handler)
        async def answer(endpoint: E, request: Request) -> Response:
            try:
                return await handler(endpoint, request)
            except Problem as problem:
                return spell(problem)
            except InvalidValue as error:
                return spell(invalid([Fault(error.field, error.message)]))
            except NotPossible as error:
                return spell(Problem(400, str(error)))
            except CallerRefused as error:
                return spell(refused(Deny(error.reason), engine_of(request).settings.realm))
            except NotPermitted as error:
                return spell(beyond_rights(str(error), engine_of(request).settings.realm))
            except QuotaExceeded as error:
                engine_of(request).meter.limited[error.limit].add()
                return spell(beyond_limit(error.message, error.retry_after_seconds))
            except KeylatchError:
                return spell(unavailable())

        return answer

    return decorate
