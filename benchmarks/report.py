"""Turns pytest-benchmark's JSON into tables: python -m benchmarks.report results.json > results.md"""

import json
import math
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

_CEILINGS = {
    "flops": ("GFLOP/s", "peak_gflops"),
    "bytes": ("GB/s", "peak_bandwidth"),
}  # fact of a cell: unit, fact of the machine
_LEGEND = (
    "The process keeps freed memory in all columns (`fastgen.training.keep_freed_memory`), except in rows of stock "
    "memory (`pytest --stock-memory`), where all have PyTorch's own allocator. Cells are milliseconds: the median "
    "(half the interquartile range), the fastest in bold; a column whose result is wrong does not count. Ratio: the "
    "best peer's median over the best of fastgen's; below 1 fastgen loses. GFLOP/s: fastgen's best, counted as the "
    "direct algorithm, of which Winograd's computes a part. GB/s: what the layers read and write, each its input, "
    "weights and output once. %: of the peak."
)


def report(document: dict) -> str:
    """Markdown: one table per `table`, one line per `row`, one cell per `column` (see benchmarks/conftest.py)."""
    machine, commit = document["machine_info"], document["commit_info"]
    about = (
        f"{machine['cpu']}, {machine['threads']} threads ({machine['capability']}), torch {machine['torch']}, "
        f"{machine['date']}, commit {commit.get('id', 'unknown')[:12]}. Peak: {machine['peak_gflops']} GFLOP/s (the "
        f"better of a float32 matrix product and a convolution) and {machine['peak_bandwidth']} GB/s (a copy)."
    )
    lines = [*textwrap.wrap(about, 120, break_on_hyphens=False), "", *textwrap.wrap(_LEGEND, 120)]
    tables: dict[str, list[dict]] = defaultdict(list)
    for bench in document["benchmarks"]:
        for line in bench["extra_info"]["lines"]:
            tables[line["table"]].append(line)
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row["cells"]))
        ceilings = {fact: ceiling for fact, ceiling in _CEILINGS.items() if fact in rows[0]}
        head = ["", *columns, "ratio", *(text for unit, _ in ceilings.values() for text in (unit, "%"))]
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        ratios = []
        for row in rows:
            cells = row["cells"]
            right = {column: cell["median"] for column, cell in cells.items() if cell["correct"]}
            fastgen = {column: median for column, median in right.items() if column.startswith("fastgen")}
            peers = {column: median for column, median in right.items() if column not in fastgen}
            texts = [_cell(cells.get(column), right and min(right.values())) for column in columns]
            if fastgen and peers:
                best = min(fastgen.values())
                ratios.append(min(peers.values()) / best)
                texts.append(f"{ratios[-1]:.2f}")
                for fact, (_, ceiling) in ceilings.items():
                    reached = row[fact] / best / 1e9
                    texts += [f"{reached:.0f}", f"{100 * reached / machine[ceiling]:.0f}"]
            lines.append(f"| {row['row']} | " + " | ".join(texts) + " |")
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines += ["", f"Geometric mean of the ratios: {mean:.2f}; lowest: {min(ratios):.2f}."]
        if any("mebibytes" in cell for cell in rows[0]["cells"].values()):
            lines += [
                "",
                "Peak memory of tensors that the call allocates, MiB:",
                "",
                "| | " + " | ".join(columns) + " |",
            ]
            lines.append("|---" * (len(columns) + 1) + "|")
            for row in rows:
                cells = row["cells"]
                texts = [f"{cells[column]['mebibytes']:.0f}" if column in cells else "" for column in columns]
                lines.append(f"| {row['row']} | " + " | ".join(texts) + " |")
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
