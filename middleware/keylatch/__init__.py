"""API keys for web applications: checked in microseconds, revoked everywhere.

The adapters are imported from where they live: `keylatch.asgi.APIKeyMiddleware`.
"""

from keylatch.engine import Engine
from keylatch.errors import (
    ConfigurationError,
    HashingBusy,
    HashingFailed,
    KeylatchError,
    StoreIncompatible,
    StoreUnavailable,
)
from keylatch.keyring import Created, InvalidValue, Keyring, NotPermitted
from keylatch.model import KeyRecord, Principal
from keylatch.settings import Settings
from keylatch.tokens import SCAN_PATTERN, Token

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
