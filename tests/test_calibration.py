"""The calibration of int8: what is observed, and for what a cached result is used."""

import numpy as np
import pytest
from helpers import DEMO_ENV, random_batch, random_bert

pytest.importorskip("torch")
import torch

import convert.calibration
from convert.calibration import Observer, input_ranges, int8_ranges
from models import packed_bert


def equal(ranges, others):
    assert ranges.keys() == others.keys()
    return all(torch.equal(torch.stack(pair), torch.stack(others[name])) for name, pair in ranges.items())


def test_an_observer_records_the_smallest_and_largest_input_of_each_column():
    ranges = {}
    layer = Observer(ranges, "0.up", torch.randn(3, 2), torch.randn(3))
    layer(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    layer(torch.tensor([[-5.0, -1.0]]), gelu=True)
    layer(torch.tensor([[2.0, -6.0]]), residual=torch.zeros(1, 3))
    assert {name: torch.stack(pair).tolist() for name, pair in ranges.items()} == {"0.up": [[-5, -6], [3, 0]]}


def test_every_linear_layer_has_a_range(tmp_path):
    random_bert(tmp_path)
    ranges = input_ranges(str(tmp_path), [random_batch(30, 20)])
    assert ranges.keys() == {f"{layer}.{part}" for layer in (0, 1) for part in ("qkv", "out", "up", "down")}
    assert {name: len(low) for name, (low, _) in ranges.items() if len(low) != 48} == {"0.down": 96, "1.down": 96}


def test_filling_up_rows_changes_no_range(tmp_path, monkeypatch):
    random_bert(tmp_path)
    filled = input_ranges(str(tmp_path), [random_batch(90, 37, 3)])
    monkeypatch.setattr(packed_bert, "ROWS", 1)
    assert equal(input_ranges(str(tmp_path), [random_batch(90, 37, 3)]), filled)


@pytest.fixture
def calibrate(tmp_path, monkeypatch):
    """Return a function that calibrates with some of the demo's samples: its result is (ranges, {cache file: time})."""
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model", vocab_size=2400)
    for name, value in {**DEMO_ENV, "CALIBRATION_FILE": "list.txt"}.items():
        monkeypatch.setenv(name, value)

    def calibrate(rows):
        (tmp_path / "list.txt").write_text("".join(f"{row}\n" for row in rows))
        ranges = int8_ranges("model")
        return ranges, {path: path.stat().st_mtime_ns for path in (tmp_path / "build/cache").glob("int8-*.npz")}

    return calibrate


def test_a_cached_calibration_is_used_for_its_samples_only(calibrate):
    ranges, first = calibrate([0, 1, 2])
    assert len(first) == 1
    again, unchanged = calibrate([0, 1, 2])
    assert unchanged == first and equal(again, ranges)
    _, both = calibrate([0, 1, 3])
    assert len(both) == 2


@pytest.mark.parametrize("damage", ["cut off", "other arrays"])
def test_a_damaged_cache_is_replaced_with_a_notice(calibrate, damage, caplog):
    ranges, (path,) = calibrate(range(3))
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:100])
    else:
        np.savez(path, key=np.load(path)["key"], **{"0.qkv": np.zeros(3)})
    again, _ = calibrate(range(3))
    assert "is damaged" in caplog.text and equal(again, ranges)
    caplog.clear()
    assert equal(calibrate(range(3))[0], ranges) and not caplog.text


def test_without_a_calibration_list_100_samples_are_used_with_a_notice(calibrate, monkeypatch, caplog):
    monkeypatch.setenv("CALIBRATION_FILE", "none.txt")
    used = []
    monkeypatch.setattr(convert.calibration, "input_ranges", lambda model, batches: used.extend(batches) or {})
    calibrate([])
    assert len(used) == 100
    assert "none.txt is missing; calibrating with 100 samples at even steps" in caplog.text
