"""Checks of replication: can a failover lose a revocation that was answered?

The statement, and what its row means; this file executes nothing.
"""

import re
from collections.abc import Iterator
from typing import Final

from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_NAMES: Final = re.compile(r"(?is)(?:(?:FIRST|ANY)\s+)?(?:(\d+)\s*\()?(.*?)\)?\s*")

REPLICATION: Final = """
    SELECT current_setting('synchronous_standby_names'), count(*)
    FROM pg_stat_replication
    WHERE coalesce(state, 'streaming') <> 'backup' AND pid NOT IN (
        SELECT active_pid FROM pg_replication_slots
        WHERE slot_type = 'logical' AND active_pid IS NOT NULL
    )
"""
"""The setting, and the number of connected standbys. Any role sees the rows of
`pg_stat_replication`; without `pg_read_all_stats` their state is NULL."""


def is_fenced(synchronous_names: str, standbys: int) -> bool:
    """Whether a primary cannot commit any more once one of its synchronous standbys is promoted:
    its commits wait for every standby that may be one.

    Args:
        synchronous_names: `synchronous_standby_names`, not empty.
        standbys: how many are connected.
    """
    match = _NAMES.fullmatch(synchronous_names.strip())
    waits_for, names = (match[1], match[2].split(",")) if match else (None, [])
    candidates = standbys if any(name.strip(' "') == "*" for name in names) else len(names)
    return candidates <= int(waits_for or 1)


def check_replication(
    synchronous_names: str, standbys: int, *, must_replicate: bool
) -> Iterator[Finding]:
    """Whether a change is on another server before it is confirmed.

    Args:
        synchronous_names: `synchronous_standby_names` of the primary.
        standbys: how many are connected to it.
        must_replicate: `KEYLATCH_DURABLE=replicated`.
    """
    if synchronous_names and standbys and is_fenced(synchronous_names, standbys):
        yield ok("replication", "changes and leases wait for a synchronous standby")
    elif synchronous_names and standbys:
        yield warning(
            "replication",
            "synchronous_standby_names has more standbys than a commit waits for: when one of them"
            " is promoted, another one can keep the old primary going, which then grants leases",
            "name as many standbys as a commit waits for, as Patroni does with synchronous_mode;"
            " or fence the old primary: docs/postgresql.md",
        )
    elif synchronous_names:
        yield failure(
            "replication",
            "no standby is connected, and synchronous_standby_names requires one: no change is"
            " confirmed and no lease is granted",
            "start the standby; with Patroni: patronictl list; or, to give it up:"
            " ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf();",
        )
    elif must_replicate:
        yield failure(
            "replication",
            "KEYLATCH_DURABLE is replicated, and there is no synchronous standby: a process"
            " that starts answers every check with 503",
            _how_to_be_synchronous(standbys),
        )
    elif standbys:
        yield warning(
            "replication",
            f"no standby is synchronous ({standbys} connected): a failover can lose revocations"
            " that were answered, and processes that still reach the old primary accept revoked"
            " keys",
            _how_to_be_synchronous(standbys),
        )
    else:
        yield ok("replication", "no standby is connected")


def _how_to_be_synchronous(standbys: int) -> str:
    # Of several standbys one can be promoted while another goes on confirming the old primary's
    # commits; so the one that takes over has to be the one that is waited for.
    names = "ANY 1 (*)" if standbys <= 1 else "FIRST 1 (NAME OF THE ONE THAT TAKES OVER)"
    return (
        "with Patroni: patronictl edit-config -s synchronous_mode=true; without:"
        f" ALTER SYSTEM SET synchronous_standby_names = '{names}'; SELECT pg_reload_conf();"
    )
