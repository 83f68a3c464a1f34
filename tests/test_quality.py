"""The quality table. Its rows take minutes, so the tests do not train them."""

import json

import pytest
import torch

from benchmarks import quality
from fastgen.training import CONFIGS


def test_every_row_can_be_trained_and_is_in_the_table():
    for name, row in quality.ROWS.items():
        assert CONFIGS[row.system](**row.options)
        assert f"| {name}" in quality.table({}) and quality.table({}).count("not yet measured") == len(quality.ROWS)
    with pytest.raises(SystemExit, match="unknown row 'none': choose from: gan-digits"):
        quality.main("none")


def test_rows_are_kept_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "_RESULTS", tmp_path / "results" / "quality.json")
    config = CONFIGS["vae"](seed=5)
    measures = [
        quality.Measure("good", 2.0, 1.0, "p1", baseline=1.5, baseline_is="bicubic"),
        quality.Measure("bad", 2.0, 1.0, "p2", better="lower"),
        quality.Measure("free", 2.0, None, "p3"),
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 100, "losses": {"nll": 1.0}, "images_per_second": 32.0}\n')
    for name in ("vae-digits", "gan-digits"):
        quality._keep(name, quality._entry(config, tmp_path, measures))
    text = (tmp_path / "results" / "quality.md").read_text()
    for line in (
        "| vae-digits | good | 2 | ≥ 1 ✓ | 1.5 (bicubic) | 2,500 steps, 1.7 min |",
        "|  | bad | 2 | ≤ 1 ✗ |  |  |",
        "|  | free | 2 |  |  |  |",
        "| dcgan-digits | not yet measured |",
    ):
        assert line in text
    assert "vae-digits, bad (seed 5, torch" in text and "): p2." in text
    assert set(json.loads((tmp_path / "results" / "quality.json").read_text())) == {
        "vae-digits",
        "gan-digits",
    }


def test_the_median_filter_takes_the_middle_value():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    image[0, 0, :, 3:] = 0.5
    found = quality._median(image, 3)
    assert found[0, 0, 2, 2] == 0 and found[0, 0, 2, 3] == 0.5 and found.shape == image.shape
