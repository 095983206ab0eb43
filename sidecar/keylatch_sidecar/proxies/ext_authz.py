"""`/ext_authz/…`: for Envoy, Istio and the Gateway API: they ask with the client's method and path.

Any method and any path below it, custom ones too; path, query and body are the client's and say
nothing. What the route asks of a key is in headers that the proxy sets: `X-Keylatch-Require`, and
`X-Keylatch-Require-Environment`.
"""

from collections.abc import Awaitable, Sequence
from typing import Final

from starlette.types import Receive, Scope, Send

from keylatch.model import Wanted
from keylatch_sidecar.proxies.answers import Proxies, wanted_of
from keylatch_sidecar.proxies.facts import Profile

PATH: Final = "/ext_authz"
REQUIRE: Final = b"x-keylatch-require"
REQUIRE_ENVIRONMENT: Final = b"x-keylatch-require-environment"


class ExtAuthz:
    """The endpoint.

    Args:
        proxies: answers.
        profile: where proxies say what they were asked.
    """

    def __init__(self, proxies: Proxies, profile: Profile) -> None:
        self._proxies = proxies
        self._profile = profile

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        required = [value for name, value in scope["headers"] if name == REQUIRE]
        places = [value for name, value in scope["headers"] if name == REQUIRE_ENVIRONMENT]
        wanted = wanted_by(required, places)
        return self._proxies.answer(scope, receive, send, wanted, self._profile)


def wanted_by(required: Sequence[bytes], environments: Sequence[bytes] = ()) -> Wanted:
    """What lists of permissions ask for, one list or several, each separated by commas; and of
    which environment a key must be."""
    return wanted_of(
        [
            permission.strip(" \t")
            for value in required
            for permission in value.decode("latin-1").split(",")
        ],
        [value.decode("latin-1").strip(" \t") for value in environments],
    )


def is_asked(path: str) -> bool:
    """Whether a path is this endpoint's; behind the prefix it is the client's, dots and all."""
    return path == PATH or path.startswith(PATH + "/")
