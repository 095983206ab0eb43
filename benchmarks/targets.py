"""What is aimed at and what came out: ratios taken round by round, a table, and JSON.

A ratio of two things that took turns says more than either of them, on a machine that others use.
"""

import json
import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table

_IS_MET: Final = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, "=": operator.eq}


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and how far they were apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> "Spread":
        """Of one figure for each round."""
        each = sorted(figures)
        return cls(statistics.median(each), each[0], each[-1])

    @classmethod
    def ratio(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Spread":
        """Of ours ÷ theirs, round by round."""
        return cls.of(a / b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Args:
        what: was measured.
        measured: the median, with the range of its rounds.
        unit: of the figures; empty: it is a ratio.
        sense: how the measured has to be compared with the aim.
        aim: the target; None: it is for orientation.
    """

    what: str
    measured: Spread
    unit: str = ""
    sense: Literal["<=", ">=", "<", "="] = "<="
    aim: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the median is as aimed at; None: nothing was."""
        return None if self.aim is None else _IS_MET[self.sense](self.measured.median, self.aim)


def table_of(title: str, rows: Sequence[Row]) -> Table:
    """Rows, to read."""
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for heading in ("median", "rounds", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = (shown(value) for value in (row.measured.low, row.measured.high))
        aim = "" if row.aim is None else f"{row.sense} {shown(row.aim)}"
        outcome = {None: "", True: "[green]met[/]", False: "[bold red]missed[/]"}[row.is_met]
        median = f"{shown(row.measured.median)} {row.unit}".rstrip()
        table.add_row(row.what, median, f"{low} … {high}" if low != high else "", aim, outcome)
    return table


def shown(value: float) -> str:
    """As many digits as mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def report(title: str, rows: Sequence[Row], file: Path | None, **more: Any) -> None:
    """Print the table; write the JSON if a file is given.

    Args:
        title: of the table.
        rows: of it.
        file: to write.
        more: goes into the file as well.
    """
    console = Console()
    console.width = max(console.width, 110)  # in a file or a pipe
    console.print(table_of(title, rows))
    if file:
        values = [asdict(row) | {"met": row.is_met} for row in rows]
        file.write_text(json.dumps({"rows": values, **more}, indent=2, ensure_ascii=False) + "\n")
