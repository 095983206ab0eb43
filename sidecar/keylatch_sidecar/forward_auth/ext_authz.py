"""`/ext_authz/…`: for Envoy, Istio and the Gateway API: they ask with the client's method and path.

Any method and any path below it, custom ones too; path, query and body are the client's and say
nothing. What the route asks of a key is in headers that the proxy sets: `X-Keylatch-Require`, and
`X-Keylatch-Require-Environment`.
"""

from collections.abc import Awaitable, Sequence
from typing import Final

from starlette.types import Receive, Scope, Send

from keylatch.core.decisions import Requirement
from keylatch_sidecar.forward_auth.decision import ForwardAuth, all_of
from keylatch_sidecar.forward_auth.original_request import RequestSource

PATH: Final = "/ext_authz"
REQUIRE: Final = b"x-keylatch-require"
REQUIRE_ENVIRONMENT: Final = b"x-keylatch-require-environment"


class ExtAuthz:
    """The endpoint.

    Args:
        forward_auth: answers.
        source: where proxies say what they were asked.
    """

    def __init__(self, forward_auth: ForwardAuth, source: RequestSource) -> None:
        self._forward_auth = forward_auth
        self._source = source

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        required = [value for name, value in scope["headers"] if name == REQUIRE]
        environments = [value for name, value in scope["headers"] if name == REQUIRE_ENVIRONMENT]
        requirement = requirement_from_lists(required, environments)
        return self._forward_auth.respond(scope, receive, send, requirement, self._source)


def requirement_from_lists(
    required: Sequence[bytes], environments: Sequence[bytes] = ()
) -> Requirement:
    """What lists of permissions ask for, one list or several, each separated by commas; and of
    which environment a key must be."""
    return all_of(
        [
            permission.strip(" \t")
            for value in required
            for permission in value.decode("latin-1").split(",")
        ],
        [value.decode("latin-1").strip(" \t") for value in environments],
    )


def matches(path: str) -> bool:
    """Whether a path is this endpoint's; behind the prefix it is the client's, dots and all."""
    return path == PATH or path.startswith(PATH + "/")
