"""`/ext_authz/…`: for Envoy, Istio and the Gateway API, which call it with the client's method and
path.

Any method and any path after the prefix are served. Path, query and body are the client's, so the
requirement is never read from them, but from header fields that the proxy sets:
`X-Keylatch-Require` and `X-Keylatch-Require-Environment`.
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
        forward_auth: answers the proxy.
        source: reads the original request.
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
    """The requirement of lists of permissions, each separated by commas, and of environments."""
    return all_of(
        [
            permission.strip(" \t")
            for value in required
            for permission in value.decode("latin-1").split(",")
        ],
        [value.decode("latin-1").strip(" \t") for value in environments],
    )


def matches(path: str) -> bool:
    """Whether this endpoint serves a path: after the prefix it is the client's path, unchanged."""
    return path == PATH or path.startswith(PATH + "/")
