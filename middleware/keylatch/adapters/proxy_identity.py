"""Behind a proxy that asks the sidecar: the principal is read from the proxy's headers.

A client that reaches the app without the proxy could send these headers itself. So they are read
only from trusted peers, each must occur exactly once, and a request without one of them is refused:
the proxy may have removed it (by RFC 9110 section 7.6.1 a client can name any header in
`Connection`).

The law of this file: a missing value grants nothing. A peer without an address is not therefore a
Unix socket: a TCP connection that is reset before the server reads its peer has none either.
"""

import ipaddress
import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar
from urllib.parse import unquote

from keylatch.core.credentials import is_identity_header
from keylatch.core.decisions import (
    Allow,
    Decision,
    Deny,
    Principal,
    Reason,
    Requirement,
    missing_scope,
)
from keylatch.core.policy import Policy
from keylatch.core.refusals import Header, Refusals
from keylatch.core.routes import Router
from keylatch.errors import ConfigurationError
from keylatch.telemetry.repeated_warning import RepeatedWarning

App = TypeVar("App")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX: Final = "unix"
"""`Peer.UNIX_SOCKET` in `trusted`."""


class Peer(Enum):
    """A peer that has no address."""

    UNIX_SOCKET = "a Unix socket"
    """The server reports a Unix socket."""
    UNKNOWN = "a peer that the server does not report"


_PREFIX: Final = b"x-keylatch-"
_IDENTITY_FIELDS: Final = (
    b"key-id",
    b"key-name",
    b"organization-id",
    b"permission",
    b"environment",
)

log = logging.getLogger("keylatch")


class ProxyIdentity(Generic[App]):
    """Passes a request to the app if a trusted proxy has sent its principal; the principal is the
    same as behind `APIKeyMiddleware`.

    Args:
        app: the application.
        trusted: the proxy's addresses or networks (`10.0.0.7`, `10.0.0.0/24`), and `unix` for a
            Unix socket, on servers that report one: uvicorn, granian, gunicorn and waitress;
            hypercorn and daphne do not. Requests from other peers are refused.
        public: paths that need no key, as for `APIKeyMiddleware`.
        permissions: as for `APIKeyMiddleware`; None: the proxy requires them, route by route.
        realm: named in challenges.

    Raises:
        ConfigurationError: names every wrong peer and rule.
    """

    def __init__(
        self,
        app: App,
        *,
        trusted: Iterable[str],
        public: Iterable[str] = (),
        permissions: Mapping[str, Iterable[str]] | None = None,
        realm: str = "keylatch",
    ) -> None:
        mistakes: list[tuple[str, str]] = []
        self._networks, self._trusts_unix_sockets = _parse_trusted(trusted, mistakes)
        try:
            self._policy = Policy(public, permissions)
        except ConfigurationError as error:
            mistakes += error.mistakes
        if mistakes:
            raise ConfigurationError(mistakes)
        self._app = app
        self._router = self._make_router(app)
        self._checks_permissions = permissions is not None
        self._refusals = Refusals(realm)
        self._is_trusted = lru_cache(maxsize=1024)(self._is_trusted_uncached)
        self._untrusted_peers = RepeatedWarning(
            log, "%s is not a trusted peer: its identity headers are ignored"
        )

    def evaluate(
        self,
        peer: str | Peer,
        headers: Sequence[Header],
        method: str,
        path: str,
        request: Any,
    ) -> Decision | None:
        """The decision on a request; None on a public path.

        Args:
            peer: the peer's address; a `Peer` if it has none.
            headers: of the request.
            method: of the request.
            path: relative to the place where the app is mounted, as its router sees it.
            request: scope or environ, for the router.
        """
        requirement = self._policy.requirement_for(method, path, request, self._router)
        if requirement is None:
            return None
        if not self._is_trusted(peer):
            self._untrusted_peers.add(peer.value if isinstance(peer, Peer) else peer)
            return Deny(Reason.MISSING)
        principal = principal_from_headers(headers)
        if isinstance(principal, Reason):
            return Deny(principal)
        if not self._checks_permissions:
            requirement = Requirement()
        elif missing_scope(principal.permission, requirement) and not requirement.is_final:
            requirement = self._policy.routed_requirement(method, path, request, self._router)
        return missing_scope(principal.permission, requirement) or Allow(principal)

    def _make_router(self, app: App) -> Router[Any]:
        """The router that says which view a request of this protocol reaches."""
        raise NotImplementedError

    def _is_trusted_uncached(self, peer: str | Peer) -> bool:
        if isinstance(peer, Peer):
            return peer is Peer.UNIX_SOCKET and self._trusts_unix_sockets
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def principal_from_headers(headers: Sequence[Header]) -> Principal | Reason:
    """The principal in the identity headers.

    Returns:
        `Reason.MISSING` if one of them is missing or empty, `Reason.MALFORMED` if one occurs twice
        (or is joined by a comma) or is spelled differently: then the proxy did not write it.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if is_identity_header(name):
            field = name.lower().removeprefix(_PREFIX)
            if field in found or b"_" in name or b"," in value:
                return Reason.MALFORMED
            found[field] = value
    if not all(found.get(field) for field in _IDENTITY_FIELDS):
        return Reason.MISSING  # every key has all of them; an app could accept an empty one
    key_id, key_name, organization_id, permission, environment = (
        found[field].decode("latin-1") for field in _IDENTITY_FIELDS
    )
    return Principal(key_id, unquote(key_name), organization_id, permission, environment)


def _parse_trusted(
    trusted: Iterable[str], mistakes: list[tuple[str, str]]
) -> tuple[tuple[Network, ...], bool]:
    if isinstance(trusted, str):
        mistakes.append((f"trusted={trusted!r} is one string", f"write trusted=[{trusted!r}]"))
        return (), False
    networks: list[Network] = []
    names = set(trusted)
    for name in sorted(names - {UNIX}):
        try:
            networks.append(ipaddress.ip_network(name))
        except ValueError:
            hint = "an address, a network such as 10.0.0.0/24, or unix"
            mistakes.append((f"trusted peer {name!r}", hint))
    if not names:
        mistakes.append(("`trusted` is empty", "name the proxy's address, or unix"))
    return tuple(networks), UNIX in names
