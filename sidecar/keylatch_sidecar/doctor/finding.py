"""What was found, how bad it is, and what to do about it. No finding ever holds a URL."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Args:
        check: what was looked at.
        grade: how bad it is.
        says: what was found.
        hint: what to do about it; empty where nothing has to be done.
    """

    check: str
    grade: Grade
    says: str
    hint: str = ""


def ok(check: str, says: str) -> Finding:
    """Nothing has to be done."""
    return Finding(check, Grade.OK, says)


def warning(check: str, says: str, hint: str) -> Finding:
    """It works, and will work better."""
    return Finding(check, Grade.WARNING, says, hint)


def failure(check: str, says: str, hint: str) -> Finding:
    """It does not work, or a promise of keylatch's does not hold."""
    return Finding(check, Grade.FAILURE, says, hint)


def worst(findings: Iterable[Finding]) -> Grade:
    """The worst grade of all."""
    grades = {finding.grade for finding in findings}
    return next((each for each in (Grade.FAILURE, Grade.WARNING) if each in grades), Grade.OK)
