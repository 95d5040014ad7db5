"""The published MLPerf results that a report shows beside a performance run."""

import csv
import math

import pytest
from report_pages import RECORD, Page, write_run

from tools.report.page import write_report
from tools.report.published import DATA, compare_published, most_similar, own_hardware, read_published
from tools.report.read import read_run

GPU = {**RECORD, "gpu": "NVIDIA H100 80GB HBM3"}


def run_of(tmp_path, scenario="Offline", log=(), record=RECORD):
    folder = write_run(tmp_path / "run", scenario, log, record, samples=[])
    return read_run(str(folder), "run", ("nowhere", "nowhere"), ("float32", False))


def published(tmp_path, **options):
    return compare_published(run_of(tmp_path, **options))


def test_the_projects_file_has_all_results_and_their_units():
    rows = list(csv.DictReader(DATA.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 419 and {row["round"] for row in rows} == {"v3.0", "v4.1"}
    counts = {
        scenario: len(read_published(scenario)) for scenario in ("Offline", "Server", "SingleStream", "MultiStream")
    }
    assert counts == {"Offline": 211, "Server": 184, "SingleStream": 24, "MultiStream": 0}
    for scenario, unit in (("Offline", "samples/s"), ("Server", "samples/s"), ("SingleStream", "ms")):
        assert {result.unit for result in read_published(scenario)} == {unit}
        assert all(result.value > 0 for result in read_published(scenario))


def test_facts_are_shown_as_submitted():
    """Dell's entry counts the threads of its processors as cores; the open division is named."""
    results = {(result.submitter, result.entry, result.system): result for result in read_published("Offline")}
    dell = results["Dell", "v3.0, closed, bert-99", "Dell PowerEdge Server R760 (1x Intel Xeon Platinum 8480+)"]
    assert dell.value == 1376.05 and dell.hardware.units == 448
    assert dell.description == "2 × Intel(R) Xeon(R) Platinum 8480+ (224 cores each)"
    assert ("Deci", "v3.0, open, bert-99.9", "Intel Sapphire Rapids 112 Cores") in results
    unknown = [result for result in read_published("SingleStream") if "? cores" in result.description]
    assert len(unknown) == 1 and unknown[0].hardware.name == "RBLN ATOM"


@pytest.mark.parametrize("scenario, key, value", [
    ("Offline", "result_samples_per_second", 1500), ("Server", "result_completed_samples_per_sec", 1e5),
    ("SingleStream", "result_90.00_percentile_latency_ns", 2_000_000),
])  # fmt: skip
def test_the_nearest_results_come_first(tmp_path, scenario, key, value):
    tables = published(tmp_path, scenario=scenario, log={key: value})
    own = value / 1e6 if scenario == "SingleStream" else value
    expected = sorted((abs(math.log(result.value / own)), result.value) for result in read_published(scenario))[:5]
    shown = [float(row[3].split()[0].replace(",", "")) for row in tables.tables["Nearest results"]]
    assert shown == pytest.approx([value for _, value in expected], rel=1e-3)
    assert tables.columns[-1] == "Ratio" and ("Per unit" in tables.columns) == (scenario != "SingleStream")
    assert all(len(row) == len(tables.columns) for row in [tables.own, *tables.tables["Nearest results"]])


@pytest.mark.parametrize("record, word, count", [
    (RECORD, "8480+", None),
    ({**RECORD, "processor": "INTEL(R) XEON(R) PLATINUM 8592+", "cores": 128}, "8592+", 128),
    ({**RECORD, "processor": "Intel(R) Xeon(R) 6980P"}, "6980P", 256),
    (GPU, "H100", 1), ({**RECORD, "gpu": "NVIDIA A100-SXM4-80GB"}, "A100", 1), ({**RECORD, "gpu": "Tesla T4"}, "T4", 1),
    ({**RECORD, "gpu": "NVIDIA L40S"}, "L40S", None),
])  # fmt: skip
def test_the_most_similar_hardware_has_the_same_product_and_then_the_nearest_count(tmp_path, record, word, count):
    hardware = own_hardware(run_of(tmp_path, record=record))
    best = most_similar(read_published("Offline"), hardware, 1000)[0].hardware
    assert word.lower() in best.name.lower() and best.unit == hardware.unit and count in (None, best.units)


def test_an_unknown_processor_is_compared_with_processors_of_a_similar_number_of_cores(tmp_path):
    hardware = own_hardware(run_of(tmp_path, record={**RECORD, "processor": "AMD EPYC", "cores": 80}))
    results = most_similar(read_published("Offline"), hardware, 1000)
    assert {result.hardware.unit for result in results} == {"core"} and results[0].hardware.units == 80


@pytest.mark.parametrize("record, known", [
    (None, False), ({**RECORD, "backend": "Ray 2, 2 actors on 2 nodes: PyTorch"}, False),
    ({**RECORD, "command": ["run.py", "--network=lon"]}, False),
    ({**RECORD, "command": ["run.py", "--network", "lon"]}, False),
    ({"processor": "Chip"}, True), (RECORD, True),
])  # fmt: skip
def test_hardware_that_is_not_known_is_not_compared(tmp_path, record, known):
    tables = published(tmp_path, record=record)
    assert len(tables.tables) == 1 + known
    assert known or "The hardware of this run is not known" in " ".join(tables.sentences)
    assert ("per core" in tables.own[4]) == (record == RECORD)


@pytest.mark.parametrize("log, words", [
    ({}, ["is not one: MLCommons has not audited it", "v3.0 or v4.1", "some count threads as cores"]),
    ({}, ["334 samples, MLPerf's 10,833, so the task is not the same", "Its model is model.safetensors"]),
    ({"effective_min_duration_ms": 10_000}, ["This run is a trial, shorter than MLPerf requires"]),
    ({"result_validity": "INVALID"}, ["LoadGen calls this run invalid"]),
])  # fmt: skip
def test_what_a_reader_must_know_is_said(tmp_path, log, words):
    text = " ".join(published(tmp_path, log=log).sentences)
    assert all(word in text for word in words)
    assert "so the task" not in " ".join(published(tmp_path, log={"qsl_reported_total_count": 10833}).sentences)


def test_what_has_no_result_is_not_compared(tmp_path):
    assert published(tmp_path, log={"effective_test_mode": "AccuracyOnly"}) is None
    assert published(tmp_path, log={"result_validity": None}) is None  # an unfinished run
    assert published(tmp_path, log={"result_samples_per_second": 0}) is None
    tables = published(tmp_path, scenario="MultiStream")
    assert not tables.tables and "no BERT result of MultiStream" in tables.sentences[0]
    text = " ".join(published(tmp_path, scenario="SingleStream").sentences)
    assert "None of the published SingleStream results is of a system without accelerators" in text


@pytest.mark.slow
@pytest.mark.parametrize("scenario, record, charts", [
    ("Offline", RECORD, ["Published Offline results. ", "Published results per core. "]),
    ("Server", GPU, ["Published Server results. ", "Published results per accelerator. "]),
    ("SingleStream", RECORD, ["Published SingleStream results. "]),
    ("Server", None, ["Published Server results. "]), ("MultiStream", RECORD, []),
])  # fmt: skip
def test_the_page_draws_the_run_among_the_published_results(tmp_path, scenario, record, charts):
    folder = write_run(tmp_path / "run", scenario, record=record, samples=[])
    page = Page(write_report([str(folder)], str(folder)))
    assert len(page.charts) == len(charts) and all(text.startswith(start) for text, start in zip(page.charts, charts))
    assert all("this run: " in text for text in page.charts)
    assert "Published MLPerf results of the same scenario" in page.text
    if charts:
        rows = page.table("Nearest results")
        assert len(rows) == 7 and rows[1][0] == "this run" and rows[1][-1] == "1"
