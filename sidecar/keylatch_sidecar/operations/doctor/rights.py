"""Checks of what the role may do with keylatch's tables, and whether it sees all of their rows.

The statement, and what its rows mean; this file executes nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_READ: Final = frozenset({"SELECT"})
_ALL: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"})
_TO_CHECK: Final = {
    "keylatch_meta": _READ,
    "keylatch_organizations": _READ,
    "keylatch_secrets": _READ,
    "keylatch_invalidations": _READ,
    "keylatch_version": _READ,
    "keylatch_keys": _READ | {"UPDATE of last_used"},
    "keylatch_members": _ALL,
    "keylatch_usage": _ALL,
    "keylatch_clients": _ALL,
}
"""What a process needs that checks keys, holds leases and counts uses."""
_SEQUENCES: Final = ("keylatch_audit_id_seq", "keylatch_secrets_id_seq")
HIDDEN_ROWS: Final = "row-level security"
"""The check that fails where the role does not see all rows: no store is opened then."""

RELATIONS: Final = """
    SELECT relname::text, relkind::text,
           relkind <> 'S' AND has_table_privilege(oid, 'SELECT'),
           relkind <> 'S' AND has_table_privilege(oid, 'INSERT'),
           relkind <> 'S' AND has_table_privilege(oid, 'UPDATE'),
           relkind <> 'S' AND has_any_column_privilege(oid, 'UPDATE'),
           relkind <> 'S' AND has_table_privilege(oid, 'DELETE'),
           relkind = 'S' AND has_sequence_privilege(oid, 'USAGE'),
           relkind <> 'S' AND row_security_active(oid)
    FROM pg_class
    WHERE starts_with(relname::text, 'keylatch_') AND relkind IN ('r', 'p', 'S')
        AND pg_table_is_visible(oid)
    ORDER BY relname
"""


class Relation(NamedTuple):
    """A row of `RELATIONS`: a table or sequence, and what the role may do with it."""

    name: str
    kind: str
    may_select: bool
    may_insert: bool
    may_update: bool
    may_update_a_column: bool
    may_delete: bool
    may_use: bool
    hides_rows: bool

    @property
    def granted(self) -> set[str]:
        """The privileges, as in GRANT."""
        return {
            privilege
            for privilege, is_granted in [
                ("SELECT", self.may_select),
                ("INSERT", self.may_insert),
                ("UPDATE", self.may_update),
                ("UPDATE of last_used", self.may_update_a_column),
                ("DELETE", self.may_delete),
                ("USAGE", self.may_use),
            ]
            if is_granted
        }

    @property
    def needed_to_check(self) -> Iterable[str]:
        """The privileges that checks need."""
        return _TO_CHECK.get(self.name, ())

    @property
    def needed_to_manage(self) -> Iterable[str]:
        """The privileges that changes of keys need."""
        if self.name == "keylatch_version":
            return _READ
        if self.kind == "S":
            return {"USAGE"} if self.name in _SEQUENCES else ()
        return _ALL

    def missing(self, needed: Iterable[str]) -> list[str]:
        """The privileges that the role lacks, as text."""
        return [f"{privilege} on {self.name}" for privilege in sorted({*needed} - self.granted)]


def check_rights(relations: Iterable[Relation]) -> Iterator[Finding]:
    """What this role may do, and whether row-level security hides rows from it."""
    relations = list(relations)
    hidden = [relation.name for relation in relations if relation.hides_rows]
    if hidden:
        yield failure(
            HIDDEN_ROWS,
            f"active for this role on {', '.join(hidden)}: a key whose row is hidden is refused as"
            " unknown",
            f"ALTER TABLE {hidden[0]} DISABLE ROW LEVEL SECURITY, or ALTER ROLE … BYPASSRLS",
        )
    missing = [each for one in relations for each in one.missing(one.needed_to_check)]
    if missing:
        message = f"this role cannot check keys: it lacks {', '.join(missing)}"
        yield failure(
            "rights", message, "GRANT them as the tables' owner: docs/postgresql-roles.md"
        )
        return
    missing = [each for one in relations for each in one.missing(one.needed_to_manage)]
    keys = [one for one in relations if one.name == "keylatch_keys"]
    if not missing:
        yield ok("rights", "this role may check and change keys")
    elif any(one.may_insert or one.may_update for one in keys):
        message = f"changes of keys fail: this role lacks {', '.join(missing)}"
        yield warning(
            "rights", message, "GRANT them as the tables' owner: docs/postgresql-roles.md"
        )
    else:
        yield ok("rights", "this role may check keys, and can neither create nor change one")
