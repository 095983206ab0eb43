"""The HTML report: a single file without scripts, in a light and a dark theme.

The plots are embedded, and the page's Content-Security-Policy forbids requests to other hosts.
"""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import jinja2

from keylatch_bench import report
from keylatch_bench.comparison import Change
from keylatch_bench.plots import Picture
from keylatch_bench.results import Results


def render(
    results: Results,
    pictures: Sequence[Picture],
    moves: Sequence[Change] = (),
    differences: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        results: of this run.
        pictures: its plots.
        moves: changes since an earlier run.
        differences: what makes that comparison unreliable.
    """
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string((Path(__file__).parent / "html_report.html").read_text())
    return template.render(
        summary=report.summary(results),
        warnings=report.warnings(results),
        remarks=report.remarks(results),
        rows=report.rows(results),
        headings=report.HEADINGS,
        results=results,
        pictures=[(each.name, _data_url(each.light), _data_url(each.dark)) for each in pictures],
        moves=moves,
        moved=report.change_summary(moves),
        differences=differences,
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"
