"""The sidecar's own settings, beside its engine's: how proxies ask, and what they may keep."""

from typing import Any, Final, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from keylatch.settings import loaded

_HINTS: Final = {
    "verify_facts": "none, forwarded (X-Forwarded-Method, -Uri), original (X-Original-…)",
    "ext_authz_facts": "envoy (the request line), none, forwarded or original",
    "proxy_cache_ttl": "whole seconds, 0 to 3600",
}


class ProxySettings(BaseSettings):
    """Build it with `load`, which explains every mistake."""

    model_config = SettingsConfigDict(
        env_prefix="KEYLATCH_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    verify_facts: Literal["none", "forwarded", "original"] = "none"
    """Where proxies that call `/verify` say what they were asked."""
    ext_authz_facts: Literal["envoy", "none", "forwarded", "original"] = "envoy"
    """Where proxies that call `/ext_authz` say it."""
    proxy_cache_ttl: int = Field(default=0, ge=0, le=3600)
    """Seconds a proxy may remember an allow; a revoke does not reach it there."""

    @classmethod
    def load(cls, **given: Any) -> "ProxySettings":
        """Settings from arguments (None: not given) over the environment.

        Raises:
            ConfigurationError: naming every wrong setting, with a hint for each.
        """
        return loaded(cls, given, _HINTS)
