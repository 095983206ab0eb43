"""API keys for web applications: checked in microseconds, revoked everywhere.

The middlewares are imported from their modules: `keylatch.asgi.APIKeyMiddleware`. The names below
are imported on first use, because an app that imports a middleware needs few of them: SQLAlchemy
and pydantic alone take 0.2 s.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keylatch.core.decisions import KeyRecord, Principal
    from keylatch.core.tokens import SCAN_PATTERN, Token
    from keylatch.engine import Engine
    from keylatch.errors import (
        ConfigurationError,
        HashingBusy,
        HashingFailed,
        KeylatchError,
        StoreIncompatible,
        StoreUnavailable,
    )
    from keylatch.management.keyring import Created, InvalidValue, Keyring, NotPermitted
    from keylatch.settings import Settings

__all__ = [
    "SCAN_PATTERN",
    "ConfigurationError",
    "Created",
    "Engine",
    "HashingBusy",
    "HashingFailed",
    "InvalidValue",
    "KeyRecord",
    "KeylatchError",
    "Keyring",
    "NotPermitted",
    "Principal",
    "Settings",
    "StoreIncompatible",
    "StoreUnavailable",
    "Token",
]

__version__ = "0.1.0"

_MODULES = {
    "keylatch.core.decisions": ("KeyRecord", "Principal"),
    "keylatch.core.tokens": ("SCAN_PATTERN", "Token"),
    "keylatch.engine": ("Engine",),
    "keylatch.errors": (
        "ConfigurationError",
        "HashingBusy",
        "HashingFailed",
        "KeylatchError",
        "StoreIncompatible",
        "StoreUnavailable",
    ),
    "keylatch.management.keyring": ("Created", "InvalidValue", "Keyring", "NotPermitted"),
    "keylatch.settings": ("Settings",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> object:
        """Imports a public name (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
