"""What a run says: while it runs, and at its end."""

from collections import Counter
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from hub import Hub
from judge import SECOND_NS, Interval, Ledger, percentiles

_SHOWN: Final = 20


def progress(hub: Hub, applied: int, planned: int, seconds: float) -> Table:
    """The state of a run that goes on."""
    table = Table(title=f"chaos, {seconds:.0f} s", title_justify="left")
    for column in "", "faults", "revokes", "checks", "accepted after the answer", "false 401":
        table.add_column(column, justify="right" if column else "left")
    for side, ledger in hub.ledgers.items():
        answered = sum(1 for revoke in ledger.revokes.values() if revoke.answered)
        table.add_row(
            side,
            f"{applied}/{planned}",
            f"{answered:,}",
            f"{ledger.checks:,}",
            str(len(ledger.after_answer)),
            str(len(ledger.refused_before)),
        )
    return table


def results(
    hub: Hub, faults: list[Interval], grace_ns: int, crashes: list[str], failed: list[str]
) -> dict[str, Any]:
    """Everything that was found, as it goes into the JSON file."""
    sides = {side: _side(ledger, faults, grace_ns) for side, ledger in hub.ledgers.items()}
    product = sides["keylatch"]
    broken = [name for name in PROMISES if product[name]]
    if crashes:
        broken.append("unexpected errors")
    if not product["pairs of revoke and process seen before and after"]:
        broken.append("nothing was seen")
    return {
        "faults": dict(sorted(Counter(fault.kind for fault in faults).items())),
        "longest fault, s": _longest(faults),
        "sides": sides,
        "unexpected errors": crashes[:_SHOWN],
        "faults that did not go as planned": failed[:_SHOWN],
        "broken": broken,
        "twin caught": sides["naive"]["accepted after the answer"] > 0,
    }


PROMISES: Final = (
    "accepted after the answer",
    "accepted after commit + X",
    "false 401",
)


def _side(ledger: Ledger, faults: list[Interval], grace_ns: int) -> dict[str, Any]:
    answered = [revoke for revoke in ledger.revokes.values() if revoke.answered]
    durations = ledger.durations(faults, grace_ns)
    unexplained = ledger.unexplained(faults, grace_ns)
    return {
        "revokes": len(answered),
        "of these waited": sum(revoke.waited for revoke in answered),
        "DELETE answered 503, repeated": sum(revoke.refused for revoke in answered),
        "checks": ledger.checks,
        "pairs of revoke and process seen before and after": ledger.observed_pairs,
        "accepted after the answer": len(ledger.after_answer),
        "accepted after commit + X": len(ledger.after_bound),
        "accepted until they were revoked again": len(ledger.accepted_after_loss),
        "new keys unknown to an old primary": len(ledger.unknown_after_split),
        "keys whose creation was lost": len(ledger.lost_keys),
        "latest by, s": max(ledger.after_answer.values(), default=0) / SECOND_NS,
        "false 401": len(ledger.refused_before),
        "503": sum(ledger.undecided.values()),
        "503 far from any fault that explains it": sum(unexplained.values()),
        **{f"DELETE ms, {state}": percentiles(each) for state, each in durations.items()},
        "evidence": {
            "accepted after the answer": _first(ledger.after_answer),
            "accepted after commit + X": _first(ledger.after_bound),
            "false 401": _first(ledger.refused_before),
            "503": _most(unexplained),
        },
    }


def _longest(faults: list[Interval]) -> dict[str, float]:
    longest: dict[str, float] = {}
    for fault in faults:
        seconds = (fault.end - fault.start) / SECOND_NS
        longest[fault.kind] = max(seconds, longest.get(fault.kind, 0.0))
    return longest


def _first(found: dict[tuple[str, str], int]) -> list[list[Any]]:
    return [[*pair, number] for pair, number in list(found.items())[:_SHOWN]]


def _most(found: dict[tuple[str, str, float], int]) -> list[list[Any]]:
    most = sorted(found.items(), key=lambda item: -item[1])[:_SHOWN]
    return [[*where, checks] for where, checks in most]


def tables(found: dict[str, Any]) -> Group:
    """The same for people."""
    faults = Table(title="Faults", title_justify="left")
    faults.add_column("kind")
    faults.add_column("times", justify="right")
    faults.add_column("longest, s", justify="right")
    for kind, times in found["faults"].items():
        faults.add_row(kind, f"{times:,}", f"{found['longest fault, s'][kind]:.1f}")
    faults.add_section()
    faults.add_row("all", f"{sum(found['faults'].values()):,}")
    sides = Table(title="Promises", title_justify="left")
    sides.add_column("")
    for side in found["sides"]:
        sides.add_column(side, justify="right")
    for name in found["sides"]["keylatch"]:
        if name != "evidence":
            sides.add_row(name, *(_cell(side[name]) for side in found["sides"].values()))
    unexpected = [*found["unexpected errors"], *found["faults that did not go as planned"]]
    return Group(faults, sides, *unexpected)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join("-" if each is None else f"{each:.1f}" for each in value.values())
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
