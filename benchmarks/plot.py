"""Draws the tables whose rows are numbers: python -m benchmarks.plot results.json latency.png"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot, ticker


def plot(document: dict, path: str) -> None:
    """One panel per table ("..., against the batch"), one line per column, milliseconds on a logarithmic axis."""
    tables: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in (line for bench in document["benchmarks"] for line in bench["extra_info"]["lines"]):
        for column, cell in line["cells"].items() if ", against " in line["table"] else ():
            if cell["correct"]:
                tables[line["table"]][column].append((int(line["row"]), 1e3 * cell["median"]))
    figure, panels = pyplot.subplots(1, len(tables), figsize=(6 * len(tables), 4), squeeze=False, layout="constrained")
    for panel, (title, lines) in zip(panels[0], tables.items(), strict=True):
        for column, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=column)
        panel.set(title=title, xscale="log", yscale="log", xlabel=title.rpartition("the ")[2], ylabel="milliseconds")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        panel.set_xticks(sizes, labels=sizes, minor=False)
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        for formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        panel.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
