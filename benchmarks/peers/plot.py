"""The findings as one picture: who keeps how much of the throughput, on a logarithmic scale.

Each bar is a median, the thin line on it the spread of the rounds.
"""

from collections.abc import Sequence
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise SystemExit("error: --plot needs matplotlib\nhint: pip install matplotlib") from error

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from findings import Finding, ordered

OURS, OTHERS, FAINT = "#0b6e4f", "#b4bdc7", "#52606d"
OFFERS = (("revoked:\nrefused by all", 8.0), ("lastUsed", 27.0), ("scopes", 65.0))
FIGURES_AT, RIGHT = 1.6, 100.0
FRAMEWORKS = {"DRF": "Django REST"}
TICKS = (0.0001, 0.001, 0.01, 0.1, 1.0)


def draw(findings: Sequence[Finding], path: Path) -> None:
    """Write the PNG."""
    rows = ordered(findings)[::-1]  # the first row is the lowest
    left = min(min(each.ratios) for each in rows) / 2
    figure, axes = pyplot.subplots(figsize=(12, 1.7 + 0.4 * len(rows)), layout="constrained")
    axes.set_xscale("log")
    axes.set_xlim(left, RIGHT)
    axes.set_ylim(-0.6, len(rows) + 0.3)
    for row, each in enumerate(rows):
        bar(axes, row, each, left)
        offers(axes, row, each)
    headings(axes, len(rows))
    ticks(axes, left, rows)
    title = "What is left of an app's throughput once it checks API keys"
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, weight="bold")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bar(axes: Axes, row: int, each: Finding, left: float) -> None:
    """The median as a bar from the left edge, its figure beside it, the spread as a line."""
    colour, weight = (OURS, "bold") if each.is_keylatch else (OTHERS, "normal")
    axes.barh(row, each.ratio - left, left=left, height=0.66, color=colour)
    axes.plot([min(each.ratios), max(each.ratios)], [row, row], color="#1f2933", linewidth=1.2)
    for end in (min(each.ratios), max(each.ratios)):
        axes.plot([end, end], [row - 0.12, row + 0.12], color="#1f2933", linewidth=1.2)
    color = OURS if each.is_keylatch else "#1f2933"
    label = axes.text(FIGURES_AT, row, percent(each.ratio), va="center", color=color)
    label.set_fontweight(weight)
    label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 2})  # above a wild spread


def percent(ratio: float) -> str:
    """95 %, 6.2 %, 0.07 %."""
    if ratio >= 0.1:
        return f"{ratio:.0%}".replace("%", " %")
    return f"{100 * ratio:.2g} %" if ratio >= 0.001 else f"{100 * ratio:.1g} %"


def offers(axes: Axes, row: int, each: Finding) -> None:
    """What the peer does for it; what it does not do stands back."""
    for (_, at), text in zip(OFFERS, (each.revoked, each.last_used, each.scopes), strict=True):
        lacks = text == "no" or text.startswith("after")
        axes.text(
            at,
            row,
            text,
            va="center",
            ha="center",
            fontsize=9.5,
            color="#b3261e" if lacks else FAINT,
        )


def headings(axes: Axes, top: int) -> None:
    """Above the figures and what is offered."""
    for text, at in OFFERS:
        axes.text(at, top - 0.35, text, ha="center", va="bottom", fontsize=9, color=FAINT)
    axes.text(FIGURES_AT, top - 0.35, "left", va="bottom", fontsize=9, color=FAINT)


def ticks(axes: Axes, left: float, rows: Sequence[Finding]) -> None:
    """Only what the bars need."""
    places = [each for each in TICKS if each >= left]
    axes.set_xticks(places, [percent(each) for each in places], color=FAINT)
    axes.minorticks_off()
    axes.set_yticks(
        range(len(rows)),
        [f"{each.title}  ·  {FRAMEWORKS.get(each.framework, each.framework)}" for each in rows],
    )
    for label, each in zip(axes.get_yticklabels(), rows, strict=True):
        if each.is_keylatch:
            label.set_color(OURS)
            label.set_fontweight("bold")
    axes.tick_params(length=0)
    axes.vlines(places, -0.6, len(rows) - 0.4, color="#e4e7eb", linewidth=0.8, zorder=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "requests a second with keys ÷ without, logarithmic; median of "
        f"{len(rows[0].rounds)} rounds, black: the rounds; one worker, 16 connections",
        color=FAINT,
        loc="left",
    )
