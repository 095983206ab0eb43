"""Checks of keylatch's tables in either database: version, secrets, members.

The statements, and what their rows mean; this file executes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from keylatch.storage.schema import VERSION
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_MAX_SECRETS: Final = 12

Rows = Sequence[tuple[Any, ...]]

STORED_VERSION: Final = "SELECT version_num FROM keylatch_version"
SECRETS: Final = "SELECT kind, enabled FROM keylatch_secrets"
MEMBERS: Final = "SELECT id, grants FROM keylatch_members"
"""Number of leases granted to each process so far."""


def check_version(version: str | None) -> Finding:
    """Whether the tables have the version that this keylatch needs."""
    if version is None:
        return warning("tables", "there are none yet", "the first start creates them")
    if version > VERSION:
        message = f"at version {version}, this keylatch knows up to {VERSION}"
        return failure("tables", message, "upgrade keylatch on this host")
    if version < VERSION:
        message = f"at version {version}, this keylatch needs {VERSION}"
        return warning("tables", message, "keylatch migrate; the next start does it as well")
    return ok("tables", f"at version {version}")


def check_secrets(secrets: Rows) -> Iterator[Finding]:
    """Whether there are a MAC key and a pepper, and no rotation is unfinished."""
    missing = {"mac", "pepper"} - {kind for kind, is_primary in secrets if is_primary}
    if missing:
        names = " and ".join(sorted(missing))
        yield failure("secrets", f"there is no {names}", "restore the store from a backup")
    elif not all(enabled for _, enabled in secrets):
        yield warning("secrets", "a rotation is unfinished", "keylatch secrets rotate")
    elif len(secrets) > _MAX_SECRETS:
        message = f"{len(secrets)} stored: every forged token is verified with each MAC key"
        yield warning(
            "secrets", message, "keylatch secrets list, then retire MAC keys; peppers cost nothing"
        )
    else:
        yield ok("secrets", f"{len(secrets)} stored")


def check_members(before: Mapping[str, int], after: Mapping[str, int]) -> Finding:
    """Which processes were granted no lease for longer than the lease duration."""
    silent = [member for member, count in before.items() if after.get(member) == count]
    if silent:
        return warning(
            "processes",
            f"{len(silent)} of {len(after)} do not renew their lease: killed, stopped, or cut off",
            "nothing has to be done: the next revocation waits for them once and removes them",
        )
    return ok("processes", f"{len(after)} renew their leases")
