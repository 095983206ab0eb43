"""API keys for web applications: checked in microseconds, revoked everywhere.

The adapters are imported from where they live: `keylatch.asgi.APIKeyMiddleware`.
"""

from keylatch.core.decisions import KeyRecord, Principal
from keylatch.core.tokens import SCAN_PATTERN, Token
from keylatch.engine import Engine
from keylatch.errors import (
    ConfigurationError,
    HashingBusy,
    HashingFailed,
    InvalidValue,
    KeylatchError,
    NotPermitted,
    StoreIncompatible,
    StoreUnavailable,
)
from keylatch.management.keyring import Created, Keyring
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
