"""API keys for web applications: checked in microseconds, revoked everywhere.

Public are the names in `__all__` and the modules in this folder whose names have no underscore;
`docs/public-api.md` lists them. Everything else may change without notice.

A name is imported from its module when it is first used (PEP 562), so that `import keylatch` and
the middlewares do not load what they do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keylatch.adapters.sync_keyring import SyncKeyring
    from keylatch.core.decisions import (
        Allow,
        AuditEvent,
        DeferredDeny,
        Deny,
        Principal,
        Reason,
        Requirement,
    )
    from keylatch.core.keys import Key, PreviousSecret
    from keylatch.core.tokens import SCAN_PATTERN, Token, has_valid_checksum
    from keylatch.core.validation import NewKey
    from keylatch.engine import Engine
    from keylatch.errors import (
        BackupError,
        CallerRefused,
        ChangeRefused,
        ConfigurationError,
        HashingBusy,
        HashingFailed,
        InvalidKeyState,
        InvalidValue,
        KeylatchError,
        NotPermitted,
        OperationalError,
        QuotaExceeded,
        Refused,
        SecretInUse,
        StoreIncompatible,
        StoreUnavailable,
        WrongEventLoop,
    )
    from keylatch.management.keyring import UNSET, Keyring
    from keylatch.management.results import Changed, Created, Revoked, Rotated
    from keylatch.revocation.propagation import Receipt
    from keylatch.settings import Settings
    from keylatch.storage.keys import Page
    from keylatch.storage.usage import Client, DayUsage, KeyUsage

__all__ = [
    "SCAN_PATTERN",
    "UNSET",
    "Allow",
    "AuditEvent",
    "BackupError",
    "CallerRefused",
    "ChangeRefused",
    "Changed",
    "Client",
    "ConfigurationError",
    "Created",
    "DayUsage",
    "DeferredDeny",
    "Deny",
    "Engine",
    "HashingBusy",
    "HashingFailed",
    "InvalidKeyState",
    "InvalidValue",
    "Key",
    "KeyUsage",
    "KeylatchError",
    "Keyring",
    "NewKey",
    "NotPermitted",
    "OperationalError",
    "Page",
    "PreviousSecret",
    "Principal",
    "QuotaExceeded",
    "Reason",
    "Receipt",
    "Refused",
    "Requirement",
    "Revoked",
    "Rotated",
    "SecretInUse",
    "Settings",
    "StoreIncompatible",
    "StoreUnavailable",
    "SyncKeyring",
    "Token",
    "WrongEventLoop",
    "has_valid_checksum",
]

__version__ = "0.1.0"

_MODULE_OF = {
    "Allow": "core.decisions",
    "AuditEvent": "core.decisions",
    "BackupError": "errors",
    "CallerRefused": "errors",
    "ChangeRefused": "errors",
    "Changed": "management.results",
    "Client": "storage.usage",
    "ConfigurationError": "errors",
    "Created": "management.results",
    "DayUsage": "storage.usage",
    "DeferredDeny": "core.decisions",
    "Deny": "core.decisions",
    "Engine": "engine",
    "HashingBusy": "errors",
    "HashingFailed": "errors",
    "InvalidKeyState": "errors",
    "InvalidValue": "errors",
    "Key": "core.keys",
    "KeyUsage": "storage.usage",
    "KeylatchError": "errors",
    "Keyring": "management.keyring",
    "NewKey": "core.validation",
    "NotPermitted": "errors",
    "OperationalError": "errors",
    "Page": "storage.keys",
    "PreviousSecret": "core.keys",
    "Principal": "core.decisions",
    "QuotaExceeded": "errors",
    "Reason": "core.decisions",
    "Receipt": "revocation.propagation",
    "Refused": "errors",
    "Requirement": "core.decisions",
    "Revoked": "management.results",
    "Rotated": "management.results",
    "SCAN_PATTERN": "core.tokens",
    "SecretInUse": "errors",
    "Settings": "settings",
    "StoreIncompatible": "errors",
    "StoreUnavailable": "errors",
    "SyncKeyring": "adapters.sync_keyring",
    "Token": "core.tokens",
    "UNSET": "management.keyring",
    "WrongEventLoop": "errors",
    "has_valid_checksum": "core.tokens",
}


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"keylatch.{_MODULE_OF[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
