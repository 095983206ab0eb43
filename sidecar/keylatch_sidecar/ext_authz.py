"""`/ext_authz/…`: for Envoy, Istio and the Gateway API: they ask with the client's method and path.

Any method and any path below it, custom ones too; path, query and body are the client's and say
nothing. What the route asks of a key is in a header that the proxy sets: `X-Keylatch-Require`.
"""

from collections.abc import Awaitable, Sequence
from typing import Final

from starlette.types import Receive, Scope, Send

from keylatch.model import Wanted
from keylatch_sidecar.facts import Profile
from keylatch_sidecar.proxies import Proxies, wanted_of

PATH: Final = "/ext_authz"
REQUIRE: Final = b"x-keylatch-require"


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
        wanted = wanted_by(required)
        return self._proxies.answer(scope, receive, send, wanted, self._profile)


def wanted_by(required: Sequence[bytes]) -> Wanted:
    """What lists of permissions ask for: one list or several, each separated by commas."""
    return wanted_of(
        [
            permission.strip(" \t")
            for value in required
            for permission in value.decode("latin-1").split(",")
        ]
    )


def is_asked(path: str) -> bool:
    """Whether a path is this endpoint's; behind the prefix it is the client's, dots and all."""
    return path == PATH or path.startswith(PATH + "/")
