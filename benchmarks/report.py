"""Turns pytest-benchmark's JSON into tables: python -m benchmarks.report results.json > results.md"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path


def report(document: dict) -> str:
    """Markdown: a table for each `table`, a line for each `row`, a cell for each `column` (see benchmarks/conftest.py)."""
    machine, commit = document["machine_info"], document["commit_info"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads ({machine['capability']}), torch {machine['torch']}, "
        f"{machine['date']}, commit {commit.get('id', 'unknown')[:12]}. "
        f"Peak: {machine['peak_gflops']} GFLOP/s, the best of a float32 matrix product and a convolution.",
        "",
        "Milliseconds: median (half the interquartile range); bold the fastest. A wrong result is no peer. "
        "Ratio: the best peer's median over the best of fastgen's; below 1 fastgen loses. "
        "GFLOP/s: fastgen's best, counted as the direct algorithm, of which Winograd's does a part; %: of the peak.",
    ]
    tables: dict[str, dict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for bench in document["benchmarks"]:
        facts = bench["extra_info"]
        tables[facts["table"]][facts["row"]][facts["column"]] = facts | bench["stats"]
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        lines += [
            "",
            f"## {title}",
            "",
            "| | " + " | ".join(columns) + " | ratio | GFLOP/s | % |",
            "|---" * (len(columns) + 4) + "|",
        ]
        ratios = []
        for row, cells in rows.items():
            right = {column: cell["median"] for column, cell in cells.items() if cell["correct"]}
            ours = {column: median for column, median in right.items() if column.startswith("fastgen")}
            peers = {column: median for column, median in right.items() if column not in ours}
            texts = [_cell(cells.get(column), right and min(right.values())) for column in columns]
            if ours and peers:
                best = min(ours.values())
                ratios.append(min(peers.values()) / best)
                flops = next(iter(cells.values()))["flops"] / best / 1e9
                texts += [f"{ratios[-1]:.2f}", f"{flops:.0f}", f"{100 * flops / machine['peak_gflops']:.0f}"]
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines += ["", f"Geometric mean of the ratios: {mean:.2f}; lowest: {min(ratios):.2f}."]
        if any("mebibytes" in cell for cells in rows.values() for cell in cells.values()):
            lines += [
                "",
                "Peak memory of tensors that the call allocates, MiB:",
                "",
                "| | " + " | ".join(columns) + " |",
            ]
            lines.append("|---" * (len(columns) + 1) + "|")
            for row, cells in rows.items():
                texts = [f"{cells[column]['mebibytes']:.0f}" if column in cells else "" for column in columns]
                lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict | None, best: float) -> str:
    if cell is None:
        return ""
    if not cell["correct"]:
        return f"wrong ({cell['error']:.0e})"
    text = f"{1e3 * cell['median']:.2f} ({500 * cell['iqr']:.2f})"
    return f"**{text}**" if cell["median"] == best else text


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())), end="")
