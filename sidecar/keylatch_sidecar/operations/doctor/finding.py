"""The result of one check. Findings never contain URLs, which may have passwords."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table.

    Args:
        check: what was checked.
        status: the severity.
        message: what was found.
        hint: what to do about it; empty if nothing has to be done.
    """

    check: str
    status: Status
    message: str
    hint: str = ""


def ok(check: str, message: str) -> Finding:
    """Nothing has to be done."""
    return Finding(check, Status.OK, message)


def warning(check: str, message: str, hint: str) -> Finding:
    """It works, and could be better."""
    return Finding(check, Status.WARNING, message, hint)


def failure(check: str, message: str, hint: str) -> Finding:
    """It does not work, or keylatch cannot keep one of its guarantees."""
    return Finding(check, Status.FAILURE, message, hint)


def worst_status(findings: Iterable[Finding]) -> Status:
    """The worst status of all findings."""
    statuses = {finding.status for finding in findings}
    return next((each for each in (Status.FAILURE, Status.WARNING) if each in statuses), Status.OK)
