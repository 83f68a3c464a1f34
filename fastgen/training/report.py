"""report.html: a run on one page, in one file, for a browser of any width."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from fastgen import __version__
from fastgen.training.checkpoint import write_atomically
from fastgen.training.config import TrainConfig
from fastgen.training.evaluation import Evaluation

_MAX_PICTURES = 8  # during training
_STYLE = """
:root { color-scheme: light dark; --line: #8885 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } p { margin: .25rem 0 }
img { image-rendering: pixelated; max-width: 100%; display: block } .final { width: 32rem }
.strip { display: flex; gap: .75rem; overflow-x: auto; padding-bottom: .5rem } figure { margin: 0; flex: none }
.strip img { width: 11rem } figcaption, .note, summary { font-size: .85rem; opacity: .75 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .75rem .3rem 0; vertical-align: top }
tr { border-top: 1px solid var(--line) } td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
svg { width: 100%; max-width: 32rem; height: auto }
@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg) } }
pre { overflow-x: auto; font-size: .8rem; overflow-wrap: normal }
"""


def write_report(
    folder: Path,
    config: TrainConfig,
    step: int,
    records: Sequence[dict[str, Any]],
    evaluation: Evaluation | None,
    fusion: str,
    losses: str | None,
) -> None:
    """Writes report.html into a run folder, with the samples that the folder holds.

    Args:
        records: the lines of metrics.jsonl.
        evaluation: None if there is none yet.
        fusion: which layers run as fused ops, as text.
        losses: the loss curves as an <svg> element; None if they could not be drawn.
    """
    title = f"{config.system} on {config.data}"
    pictures = sorted(path for path in (folder / "samples").glob("step_*.png") if path.stem[5:].isdecimal())
    chosen = {round(index * (len(pictures) - 1) / (_MAX_PICTURES - 1)) for index in range(_MAX_PICTURES)}
    strip = "".join(
        _picture(path, f"step {int(path.stem.removeprefix('step_')):,}")
        for index, path in enumerate(pictures)
        if index in chosen
    )
    final = folder / "samples.png"
    rates = [rate for record in records if isinstance(rate := record.get("images_per_second"), int | float)]
    speed = (
        f"{median(rates):,.0f} images/s (median of {len(rates)} intervals; {min(rates):,.0f} to {max(rates):,.0f})"
        if rates
        else "not measured"
    )
    defaults = type(config)()
    settings = [
        (f"{field.name}{' *' if value != getattr(defaults, field.name) else ''}", value)
        for field in fields(config)
        for value in [getattr(config, field.name)]
    ]
    parts = [
        f"<h1>{_escape(title)}</h1><p class=note>{step:,} of {config.steps:,} steps · {speed} · fastgen "
        f"{__version__}</p>",
        _section("Samples", _picture(final, "at the end", "final") if final.exists() else ""),
        _section("During training", f"<div class=strip>{strip}</div>" if strip else ""),
        _section("Figures", "" if evaluation is None else _figures(evaluation)),
        _section("Losses", losses if losses and records else ""),
        _section(
            "Settings",
            f"<details><summary>{len(settings)} settings; * is not the default</summary>{_table(settings)}</details>",
        ),
        _section(
            "Fused layers",
            f"<details><summary>Which layers run as one op</summary><pre>{_escape(fusion)}</pre></details>",
        ),
    ]
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_atomically(folder / "report.html", page.encode(errors="backslashreplace"))


def _escape(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _picture(path: Path, caption: str, kind: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img class="{kind}" alt="{_escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "<table>" + "".join(f"<tr><td>{_escape(a)}<td>{_escape(b)}" for a, b in rows) + "</table>"


def _figures(evaluation: Evaluation) -> str:
    rows = []
    if evaluation.recognised is not None:
        share = evaluation.recognised
        rows.append(("recognised ↑", f"{share.share:.1%}", f"{share.real_share:.1%} (real images)", share.protocol))
    for name, figure in evaluation.figures.items():
        baseline = "" if figure.baseline is None else f"{figure.baseline:.4g} ({figure.baseline_is})"
        arrow = {"lower": "↓", "higher": "↑"}[figure.better]
        rows.append((f"{name.replace('_', ' ')} {arrow}", f"{figure.value:.4g}", baseline, figure.protocol))
    body = "".join(
        f"<tr><td>{_escape(name)}<td class=number><b>{value}</b><td>{_escape(baseline)}"
        f"<tr style='border: 0'><td colspan=3><details><summary>protocol</summary>{_escape(protocol)}</details>"
        for name, value, baseline, protocol in rows
    )
    return f"<p class=note>↑ higher is better, ↓ lower is better</p><table>{body}</table>" if rows else ""
