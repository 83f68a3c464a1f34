"""Loss curves, drawn once with matplotlib: loss.png of a run folder, and the same figure in report.html."""

import io
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)
_MAX_CURVES = 20
_MAX_POINTS = 300  # per curve; longer ones are averaged over intervals
_WIDTH, _HEIGHT = 4.4, 1.7  # inches per curve; a phone is about this wide, so that its text is readable there
_STYLE: Any = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "fastgen"}  # text stays text, ids are the same
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # which would put addresses into the page


class LossPlot(NamedTuple):
    """The curves of all losses, one below the other."""

    png: bytes
    svg: str
    """An <svg> element to be put into a page; its background is transparent."""


def plot_losses(records: Sequence[dict[str, Any]]) -> LossPlot | None:
    """Draws the losses in the records of metrics.jsonl; None, and a line in the log, if matplotlib is missing.

    matplotlib takes half a second to import, so it is imported here.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        _log.warning("no loss curves: matplotlib is not installed (pip install 'fastgen[demo]')")
        return None
    names = sorted({name for record in records for name in record["losses"]})[:_MAX_CURVES]
    png, svg = io.BytesIO(), io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * max(len(names), 1)), layout="constrained")
        for index, name in enumerate(names):
            axes = figure.add_subplot(len(names), 1, index + 1)
            axes.plot(*_points(records, name), linewidth=1)
            axes.set_title(name, loc="left", fontsize="medium", parse_math=False)
            axes.grid(alpha=0.3)
            axes.margins(x=0.01)
            if index == len(names) - 1:
                axes.set_xlabel("step")
        figure.savefig(png, format="png", dpi=200)
        figure.savefig(svg, format="svg", transparent=True, metadata=_NO_METADATA)
    return LossPlot(png.getvalue(), _for_html(svg.getvalue()))


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a loss, each the last step and the mean of an interval if there are many."""
    points = [(record["step"], record["losses"][name]) for record in records if name in record["losses"]]
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(value for _, value in group) / len(group) for group in groups]


def _for_html(svg: str) -> str:
    """The <svg> element of an SVG file without the namespaces, which HTML implies, and without a fixed size."""
    element = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    opening, rest = element.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest
