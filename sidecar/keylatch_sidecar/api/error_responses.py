"""Turns the exceptions of a management endpoint into error responses of its dialect."""

import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.decisions import Deny
from keylatch.errors import (
    CallerRefused,
    InvalidKeyState,
    InvalidValue,
    KeylatchError,
    NotPermitted,
    QuotaExceeded,
)
from keylatch_sidecar.api.access import engine_of
from keylatch_sidecar.api.errors import (
    InvalidInput,
    Problem,
    insufficient_scope,
    invalid_input,
    quota_exceeded,
    refused,
    unavailable,
)

E = TypeVar("E")
Handler = Callable[[E, Request], Awaitable[Response]]
ErrorRenderer = Callable[[Problem], Response]


def errors_in(render: ErrorRenderer) -> Callable[[Handler[E]], Handler[E]]:
    """Decorator for an endpoint's method: renders each exception that it raises with `render`."""

    def decorate(handler: Handler[E]) -> Handler[E]:
        @functools.wraps(handler)
        async def answer(endpoint: E, request: Request) -> Response:
            try:
                return await handler(endpoint, request)
            except Problem as problem:
                return render(problem)
            except InvalidValue as error:
                return render(invalid_input([InvalidInput(error.field, error.message)]))
            except InvalidKeyState as error:
                return render(Problem(400, str(error)))
            except CallerRefused as error:
                return render(refused(Deny(error.reason), engine_of(request).settings.realm))
            except NotPermitted as error:
                return render(insufficient_scope(str(error), engine_of(request).settings.realm))
            except QuotaExceeded as error:
                engine_of(request).counters.limited[error.limit].add()
                return render(quota_exceeded(error.message, error.retry_after_seconds))
            except KeylatchError:
                return render(unavailable())

        return answer

    return decorate
