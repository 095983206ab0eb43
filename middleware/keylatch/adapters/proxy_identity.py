"""Behind a proxy that asks the sidecar: the key's identity comes in headers, and only from there.

Whoever can reach the app without the proxy could write these headers himself. So they count only
from named peers, each spelled exactly once, and a request that lacks one of them is refused: a
proxy may have dropped it (RFC 9110 section 7.6.1 lets a client name any header in `Connection`).

The law of this file: a missing value grants nothing. That a peer has no address does not make it a
Unix socket: a TCP connection that is reset before the server asks for its peer has none either.
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
"""The name of `Peer.UNIX_SOCKET` in `trusted`."""


class Peer(Enum):
    """A peer that has no address."""

    UNIX_SOCKET = "a Unix socket"
    """The server says that the request came over one."""
    UNKNOWN = "a peer that the server does not name"


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
    """Lets a request pass if a proxy says whose it is; the app finds the same principal as behind
    `APIKeyMiddleware`.

    Args:
        app: the application.
        trusted: the proxy's addresses or networks (`10.0.0.7`, `10.0.0.0/24`), and `unix` for a
            Unix socket, on servers that say that a request came over one: uvicorn, granian,
            gunicorn and waitress; hypercorn and daphne do not. Identity from others is ignored.
        public: what needs no key, as for `APIKeyMiddleware`.
        permissions: as for `APIKeyMiddleware`; None: the proxy asks for them, route by route.
        realm: named in challenges.

    Raises:
        ConfigurationError: naming every wrong peer and rule.
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
        """Whose request it is; None on a public path.

        Args:
            peer: the address at the other end, or what is known of one that has none.
            headers: of the request.
            method: of the request.
            path: as the app's own router sees it.
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
        """What tells which view a request of this protocol will get to."""
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
    """The principal that identity headers speak of.

    Returns:
        `Reason.MISSING` where one of them is missing or empty, `Reason.MALFORMED` where a header
        came twice (joined by a comma, too) or is spelled in another way: the proxy did not
        write it.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if is_identity_header(name):
            field = name.lower().removeprefix(_PREFIX)
            if field in found or b"_" in name or b"," in value:
                return Reason.MALFORMED
            found[field] = value
    if not all(found.get(field) for field in _IDENTITY_FIELDS):
        return Reason.MISSING  # no key is without: an app could take "" for what it allows
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
