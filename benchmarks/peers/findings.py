"""What was found: medians of ratios that were taken round by round; as tables and as JSON."""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from catalogue import Peer
from rounds import CONNECTIONS, Rounds


@dataclass(frozen=True)
class Finding:
    """One peer's figures.

    Args:
        name: of the peer.
        title: of the peer.
        framework: its app's.
        versions: of the packages that its list names.
        revoked: see `Peer`.
        last_used: see `Peer`.
        scopes: see `Peer`.
        rounds: requests a second, open and protected.
    """

    name: str
    title: str
    framework: str
    versions: dict[str, str]
    revoked: str
    last_used: str
    scopes: str
    rounds: Rounds

    @property
    def is_keylatch(self) -> bool:
        return self.name.startswith("keylatch_")

    @property
    def ratios(self) -> list[float]:
        """Protected ÷ open of each round."""
        return [protected / open_ for open_, protected in self.rounds]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def open(self) -> float:
        return statistics.median(open_ for open_, _ in self.rounds)

    @property
    def protected(self) -> float:
        return statistics.median(protected for _, protected in self.rounds)


def finding(peer: Peer, versions: dict[str, str], rounds: Rounds) -> Finding:
    """The peer with its figures."""
    own = peer.name, peer.title, peer.framework, versions, peer.revoked
    return Finding(*own, peer.last_used, peer.scopes, rounds)


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Who keeps most comes first."""
    return sorted(findings, key=lambda each: each.ratio, reverse=True)


def shown(ratio: float) -> str:
    """As many digits as count: 0.95, 0.062, 0.0007."""
    if ratio >= 0.1:
        return f"{ratio:.2f}"
    return f"{ratio:.2g}" if ratio >= 0.001 else f"{ratio:.1g}"


def as_tables(findings: Sequence[Finding]) -> Group:
    """What it costs and what one gets for it, to read; keylatch's rows are bold."""
    looks: dict[str, Any] = {"box": SIMPLE, "padding": 0, "show_edge": False}
    costs = Table(title="Throughput left when keys are checked: protected ÷ open", **looks)
    offers = Table(title="\nWhat it is paid for: when a revoked key is refused everywhere", **looks)
    for heading in ("", "on"):
        costs.add_column(heading, no_wrap=True)
    for heading in ("open/s", "with key", "÷", "from", "to"):
        costs.add_column(heading, justify="right", no_wrap=True)
    for heading in ("", "on", "revoked", "lastUsed", "scopes"):
        offers.add_column(heading, no_wrap=True)
    for each in ordered(findings):
        style = "bold" if each.is_keylatch else None
        ratios = (shown(ratio) for ratio in (each.ratio, min(each.ratios), max(each.ratios)))
        speeds = f"{each.open:,.0f}", f"{each.protected:,.0f}"
        costs.add_row(each.title, each.framework, *speeds, *ratios, style=style)
        offered = each.revoked, each.last_used, each.scopes
        offers.add_row(each.title, each.framework, *offered, style=style)
    return Group(costs, offers)


def write(path: Path, findings: Sequence[Finding], failed: dict[str, str], seconds: int) -> None:
    """All rounds, so that the plot can be drawn again."""
    about = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "connections": CONNECTIONS,
        "seconds": seconds,
    }
    peers = [
        {"ratio": round(each.ratio, 6), **dataclasses.asdict(each)} for each in ordered(findings)
    ]
    result = {"about": about, "peers": peers, "not measured": failed}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[list[Finding], dict[str, str]]:
    """What `write` wrote."""
    result: dict[str, Any] = json.loads(path.read_text())
    fields = [field.name for field in dataclasses.fields(Finding)]
    findings = [Finding(**{name: each[name] for name in fields}) for each in result["peers"]]
    return findings, result["not measured"]
