"""benchmark.py: its arithmetic, a quick run on the demo's model, and what it cannot measure. No speed is tested."""

import json

import numpy as np
import pytest
from conftest import fails

from benchmark import flops, spread_samples


def test_flops_are_those_of_the_products():
    """A layer's four (hidden, hidden) and two (hidden, inner) products, and the two within attention, for each token."""
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3}
    expected = sum(3 * (2 * length * (4 * 8 * 8 + 2 * 8 * 32) + 2 * 2 * length * length * 8) for length in (5, 7))
    assert flops(sizes, [5, 7]) == expected


@pytest.mark.parametrize("group", [1, 4])
def test_samples_are_spread_as_the_lengths_are(group):
    lengths = np.random.default_rng(0).permutation(np.arange(1000))
    rows = spread_samples(lengths, 40, group)
    assert len(set(rows.tolist())) == 40
    assert abs(lengths[rows].mean() - 499.5) < 20 and abs(np.percentile(lengths[rows], 90) - 900) < 60


def test_a_quick_run_gives_a_row_for_each_run_and_its_yardstick(script, tmp_path):
    result = script("benchmark.py", "--quick", "--runs", "pytorch:fp32", "pytorch:bf16")
    assert result.returncode == 0, result.stderr
    assert "other logits" not in result.stderr  # in Offline than in SingleStream
    saved = json.loads((tmp_path / "build/benchmark/table.json").read_text())
    rows = {row["run"]: row for row in saved["rows"]}
    assert list(rows) == ["pytorch:reference", "pytorch:fp32", "pytorch:bf16"]
    assert rows["pytorch:reference"]["x reference (min to max)"] == "1.00 (1.00 to 1.00)"
    assert all(float(row["samples/s"]) > 0 for row in rows.values())
    assert all(name in result.stdout for name in rows) and "bare products: " in result.stdout
    assert (tmp_path / "build/benchmark/table.md").read_text() in result.stdout


def test_what_cannot_be_measured_is_named(script):
    fails(script("benchmark.py", "--runs", "pytorch:int4"), "pytorch:int4", "BACKEND:DTYPE")
    fails(script("benchmark.py", "--quick", "--runs", "tf:bf16", ML_MODEL_FILE_WITH_PATH="nowhere"), "nowhere")
