"""The settings of the sidecar, in addition to those of its engine.

Also the environment variables of `keylatch bench` and of this project's tests, because a start
refuses unknown `KEYLATCH_*` variables.
"""

from typing import Any, Final, Literal

from pydantic import Field

from keylatch._variables import EnvironmentSettings
from keylatch.settings import load_settings

_HINTS: Final = {
    "verify_request": "none, forwarded (X-Forwarded-Method, -Uri), original (X-Original-…)",
    "ext_authz_request": "envoy (the request line), none, forwarded or original",
    "proxy_cache_ttl": "whole seconds, 0 to 3600",
    "drain": "seconds, 0 to 3600",
}


class ProxySettings(EnvironmentSettings):
    """Settings for reverse proxies; `load` explains every mistake."""

    verify_request: Literal["none", "forwarded", "original"] = "none"
    """Where `/verify` reads the method and path of the original request."""
    ext_authz_request: Literal["envoy", "none", "forwarded", "original"] = "envoy"
    """Where `/ext_authz` reads them."""
    proxy_cache_ttl: int = Field(default=0, ge=0, le=3600)
    """Seconds for which a proxy may cache an allow; a revocation does not reach that cache."""
    drain: float = Field(default=0, ge=0, le=3600)
    """Seconds from SIGTERM to the stop, while `/readyz` answers 503. None by default: only a load
    balancer that probes `/readyz`, or Kubernetes, makes use of them; else they delay each stop."""

    @classmethod
    def load(cls, **given: Any) -> "ProxySettings":
        """Settings from arguments (None: not given), then from the environment.

        Raises:
            ConfigurationError: naming every wrong setting, with a hint for each.
        """
        return load_settings(cls, given, _HINTS)


class BenchSettings(EnvironmentSettings):
    """The environment of `keylatch bench`: a key is never a command-line argument."""

    bench_key: str = Field(default="", repr=False)
    """The FULL key that creates the keys of the load."""


class TestSettings(EnvironmentSettings):
    """The environment of this project's tests."""

    __test__ = False  # for pytest: not a test class

    require_services: str = ""
    """`1`: a missing server fails the tests instead of skipping them."""
    pgbouncer: str = ""
    """The program of a second PgBouncer, newer than the distribution's."""
    valkey_server: str = ""
    """The program of Valkey that tests of Redis run with as well; empty: they are skipped."""
