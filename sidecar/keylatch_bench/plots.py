"""Plots of a run: latency, throughput and revocation.

The title states the finding, and axes name their units. The colours are Okabe and Ito's, which are
distinguishable with colour blindness, in a light and a dark theme.
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from keylatch_bench import report
from keylatch_bench.plan import COLD, DESCRIPTIONS, L1, SCENARIOS
from keylatch_bench.results import Results, median, percentiles, readable

_DPI: Final = 130
_TITLE_LETTERS: Final = 76
_LAST: Final = "last accepted check began"


@dataclass(frozen=True, slots=True)
class Theme:
    paper: str
    ink: str
    faint: str
    good: str
    more: str
    most: str
    bad: str


LIGHT: Final = Theme("#ffffff", "#1b1f24", "#d5dae0", "#0072b2", "#56b4e9", "#e69f00", "#d55e00")
DARK: Final = Theme("#14181d", "#e6e9ee", "#3a424c", "#56b4e9", "#2f7fb5", "#f0b429", "#ff7a45")


def _blank(theme: Theme, title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, height), dpi=_DPI, facecolor=theme.paper, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    lines = [textwrap.fill(line, _TITLE_LETTERS) for line in title.split("\n")]
    figure.suptitle(
        "\n".join(lines), x=0.01, ha="left", fontsize=12, fontweight="bold", color=theme.ink
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(axis="x", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Axes, theme: Theme) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    legend = axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.6 / (axes.figure.bbox.height / _DPI - 1.2)),
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _log_time(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def latency(results: Results, theme: Theme = LIGHT) -> Figure:
    """Percentiles of each scenario, on a logarithmic axis."""
    names = [scenario for scenario in SCENARIOS if scenario in results.scenarios]
    figure, axes = _blank(theme, _costs(results), 1.9 + 0.62 * max(1, len(names)))
    _log_time(axes)
    for row, name in enumerate(names):
        times = percentiles(results.scenarios[name].latencies)
        known: dict[str, int] = {key: value for key, value in times.items() if value is not None}
        if not known:
            continue
        low, high = known["p50"], known["max"]
        axes.hlines(row, low, high, color=theme.faint, linewidth=1.5, zorder=1)
        last = known.get("p99", known.get("p90", low))
        axes.hlines(row, low, last, color=theme.more, linewidth=7, zorder=2)
        marks = (("p50", "o", theme.good), ("p90", "|", theme.ink), ("p99", "D", theme.most))
        for which, mark, colour in (*marks, ("max", "x", theme.bad)):
            if which in known:
                name_once = which if row == 0 else None
                axes.scatter(
                    known[which], row, marker=mark, color=colour, label=name_once, zorder=3, s=52
                )
        axes.annotate(
            readable(low), (low, row), (6, 9), textcoords="offset points", ha="right",
            fontsize=10, fontweight="bold", color=theme.good,
        )  # fmt: skip
        if "p99" in known:
            axes.annotate(
                readable(known["p99"]), (known["p99"], row), (-6, 9), textcoords="offset points",
                ha="left", fontsize=9, color=theme.ink,
            )  # fmt: skip
    _rows(axes, [f"{name}\n{_short(name)}" for name in names])
    axes.set_xlabel("time from when a check was due until its response (log)", color=theme.ink)
    axes.margins(x=0.12)
    _legend(axes, theme)
    return figure


def _costs(results: Results) -> str:
    """The title: the cost of a cached key, and of one that no cache has."""
    title = report.cost(results)
    if COLD not in results.scenarios:
        return title
    cold = percentiles(results.scenarios[COLD].latencies)["p50"]
    return f"{title};\n{readable(cold)} at the median for the first check of a key"


def _short(scenario: str) -> str:
    return textwrap.fill(DESCRIPTIONS[scenario], 32)


def throughput(results: Results, theme: Theme = LIGHT) -> Figure:
    """Responses per second of each scenario, the rate that was due, and the maximum."""
    names = [scenario for scenario in SCENARIOS if scenario in results.scenarios]
    most = median(results.saturated)
    slow = [name for name in names if not results.scenarios[name].keeps_up]
    title = f"At most {most:,.0f} checks of cached keys per second" if most else "Throughput"
    title += f"; {', '.join(slow)} did not keep up" if slow else "; every scenario kept up"
    figure, axes = _blank(theme, title, 1.7 + 0.46 * (len(names) + bool(most)))
    axes.set_xscale("log")
    labels = []
    if most:
        axes.barh(0, most, color=theme.good, height=0.55)
        axes.scatter(results.saturated, [0] * len(results.saturated), color=theme.most, s=16,
                     zorder=3, label="a round")  # fmt: skip
        _at_the_end(axes, theme, max(most, *results.saturated), 0, f"{most:,.0f}/s")
        labels.append(f"{L1}, unlimited rate")
    for row, name in enumerate(names, start=len(labels)):
        scenario = results.scenarios[name]
        colour = theme.more if scenario.keeps_up else theme.bad
        axes.barh(row, scenario.per_second, color=colour, height=0.55)
        axes.scatter(scenario.rate, row, marker="|", s=260, color=theme.ink, zorder=3, linewidths=2,
                     label="due" if row == len(names) else None)  # fmt: skip
        text = f"{scenario.per_second:,.0f}/s of {scenario.rate:,.0f}/s due"
        _at_the_end(axes, theme, max(scenario.per_second, scenario.rate), row, text)
        labels.append(name)
    _rows(axes, labels)
    axes.set_xlim(1, 12 * max([most or 1, *(results.scenarios[name].rate for name in names)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("responses per second (log)", color=theme.ink)
    _legend(axes, theme)
    return figure


def _at_the_end(axes: Axes, theme: Theme, x: float, row: int, text: str) -> None:
    axes.annotate(
        text, (x, row), (7, 0), textcoords="offset points", va="center", fontsize=10,
        color=theme.ink,
    )  # fmt: skip


def revocation(results: Results, theme: Theme = LIGHT) -> Figure:
    """For each DELETE the times of its response, the last accepted check, and the last refusal."""
    title = report.capitalize(report.revocation(results))
    promise = report.capitalize(report.acceptance_after_delete(results))
    figure, axes = _blank(theme, f"{title}\n{promise}", 2.2 + 0.3 * len(results.revocations))
    for row, each in enumerate(results.revocations):
        once: Callable[[str], Any] = lambda text, row=row: text if row == 0 else None  # type: ignore[misc]  # noqa: E731
        answered = each.delete_ns / 1e6
        axes.barh(row, answered, color=theme.more, height=0.5, label=once("DELETE in progress"))
        began = (each.delete_ns + each.last_accepted_ns) / 1e6
        colour = theme.bad if each.accepted_after else theme.good
        axes.scatter(
            began, row, color=colour, zorder=3, s=40, label=once("last accepted check began")
        )
        if each.everywhere_ns is not None:
            axes.scatter(each.everywhere_ns / 1e6, row, marker="D", color=theme.most, zorder=3,
                         s=34, label=once("refused on every connection"))  # fmt: skip
    axes.axvline(0, color=theme.ink, linewidth=1)
    _rows(axes, [f"{number + 1}" for number in range(len(results.revocations))])
    axes.set_ylabel("revocation", color=theme.ink)
    axes.set_xlabel("ms since the DELETE was sent", color=theme.ink)
    _legend(axes, theme)
    return figure


PLOTS: Final[dict[str, Callable[[Results, Theme], Figure]]] = {
    "latency": latency,
    "throughput": throughput,
    "revocation": revocation,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot in both themes, as PNG."""

    name: str
    light: bytes
    dark: bytes


def pictures(results: Results) -> list[Picture]:
    """All plots of a run."""
    return [
        Picture(name, _png(draw(results, LIGHT)), _png(draw(results, DARK)))
        for name, draw in PLOTS.items()
    ]


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=figure.get_facecolor())
    return out.getvalue()


def write(pictures: Sequence[Picture], folder: Path) -> None:
    """One file for each, in the light theme."""
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.light)
