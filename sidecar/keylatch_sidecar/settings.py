"""The sidecar's own settings, beside its engine's: how proxies ask, and what they may keep.

And the variables of commands and of this project's tests: a start refuses those that are unknown.
"""

from typing import Any, Final, Literal

from pydantic import Field

from keylatch._variables import EnvironmentSettings
from keylatch.settings import load_settings

_HINTS: Final = {
    "verify_request": "none, forwarded (X-Forwarded-Method, -Uri), original (X-Original-…)",
    "ext_authz_request": "envoy (the request line), none, forwarded or original",
    "proxy_cache_ttl": "whole seconds, 0 to 3600",
}


class ProxySettings(EnvironmentSettings):
    """Build it with `load`, which explains every mistake."""

    verify_request: Literal["none", "forwarded", "original"] = "none"
    """Where proxies that call `/verify` say what they were asked."""
    ext_authz_request: Literal["envoy", "none", "forwarded", "original"] = "envoy"
    """Where proxies that call `/ext_authz` say it."""
    proxy_cache_ttl: int = Field(default=0, ge=0, le=3600)
    """Seconds a proxy may remember an allow; a revoke does not reach it there."""

    @classmethod
    def load(cls, **given: Any) -> "ProxySettings":
        """Settings from arguments (None: not given) over the environment.

        Raises:
            ConfigurationError: naming every wrong setting, with a hint for each.
        """
        return load_settings(cls, given, _HINTS)


class BenchSettings(EnvironmentSettings):
    """What `keylatch bench` takes from the environment: a key is never an argument."""

    bench_key: str = Field(default="", repr=False)
    """A FULL key, to make the keys of the load with."""


class TestSettings(EnvironmentSettings):
    """What this project's own tests take from the environment."""

    __test__ = False  # pytest: it is no test

    require_services: str = ""
    """`1`: a missing server fails the tests instead of skipping them."""
