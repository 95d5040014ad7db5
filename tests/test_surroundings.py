"""Unusual surroundings of a run or a command: a stopped process, logs of other benchmarks or in another order."""

import array
import json
import queue
import random
import time
from pathlib import Path

import pytest
from helpers import DEMO_ENV, main_of, refused

import loadgen
import loadgen_logs
from create_squad_data import load_features
from squad_eval import read_log
from tools import download
from tools.report.page import write_report
from tools.submission.check import check

lg = pytest.importorskip("mlperf_loadgen")


class Outcome(queue.SimpleQueue):
    """A queue whose first look takes as long as a process is stopped, and which then holds the end of the run."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def get(self, **timeout):
        if self.seconds:
            time.sleep(self.seconds)
            self.seconds = 0
            raise queue.Empty


@pytest.mark.parametrize("seconds, stopped", [(0.05, False), (1.2, True)])
def test_a_process_that_was_stopped_says_so(monkeypatch, caplog, seconds, stopped):
    """As after SIGSTOP and SIGCONT, or in a container that was paused; LoadGen's clock runs meanwhile."""
    monkeypatch.setattr(loadgen, "STOPPED_S", 0.8)
    monkeypatch.setattr(loadgen, "progress", lambda *_: (0, ""))
    assert loadgen.wait_for_end(Outcome(seconds), None, None) is None
    expected = "notice: this process was stopped for 1 s, which LoadGen's times include"
    assert caplog.messages == ([expected] if stopped else [])


def run_other(folder, model, scenario, accuracy, size, samples=30):
    """Make a run of another MLPerf benchmark, whose responses have `size` bytes."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.AccuracyOnly if accuracy else lg.TestMode.PerformanceOnly
    settings.FromConfig("", model, scenario, 0)
    settings.min_duration_ms, settings.min_query_count, settings.max_duration_ms = 50, 5, 5000
    settings.offline_expected_qps = settings.server_target_qps = settings.performance_sample_count_override = samples
    data = array.array("B", [1] * size)

    def issue(queries):
        address = data.buffer_info()[0]
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, address, size) for query in queries])

    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(samples, samples, lambda indices: None, lambda indices: None)
    log_settings = lg.LogSettings()
    log_settings.log_output.outdir = str(folder)
    lg.StartTestWithLogSettings(system, library, settings, log_settings, "")
    lg.DestroyQSL(library)
    lg.DestroySUT(system)


OTHERS = [
    ("resnet50", "Server", False, 4, None),
    ("resnet50", "MultiStream", False, 4, None),
    ("resnet50", "Offline", True, 4, "sample 0: 4 bytes are not 1 to 384 float32 pairs"),
    ("3d-unet", "SingleStream", True, 100_000, "sample 0: 100000 bytes are not 1 to 384 float32 pairs"),
    ("retinanet", "Offline", False, 28, None),
]


@pytest.mark.parametrize("model, scenario, accuracy, size, fault", OTHERS, ids=lambda value: str(value)[:20])
def test_logs_of_other_benchmarks_give_a_page_or_one_line(
    tmp_path, monkeypatch, model, scenario, accuracy, size, fault
):
    for name, value in DEMO_ENV.items():
        monkeypatch.setenv(name, value)
    logs = tmp_path / "logs"
    logs.mkdir()
    run_other(logs, model, scenario, accuracy, size)
    page = Path(write_report([str(logs)], str(tmp_path / "report"))).read_text(encoding="utf-8")
    assert "another harness" in page and scenario in page
    if accuracy:
        assert "The run had 30 samples, but " in page  # not a score
        with refused("mlperf_log_accuracy.json: ", fault):
            read_log(str(logs / loadgen_logs.ACCURACY_LOG), 334)
    assert check(str(logs)) == [f"{logs}: contains no folder of a division"]
    tree = tmp_path / f"tree/closed/Org/results/system/{model}/{scenario}"
    tree.mkdir(parents=True)
    logs.rename(tree / ("accuracy" if accuracy else "performance"))
    faults = check(str(tmp_path / "tree"))
    assert any(f"system/{model}: is not a benchmark" in fault for fault in faults)


def test_the_order_of_an_accuracy_log_does_not_matter(tmp_path, monkeypatch, capsys):
    """LoadGen logs responses as they come; other harnesses may sort them."""
    _, features = load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, value in DEMO_ENV.items():
        monkeypatch.setenv(name, value)
    generator = random.Random(0)
    entries = [
        {"seq_id": row, "qsl_idx": row, "data": generator.randbytes(int(8 * length)).hex()}
        for row, length in enumerate(features.lengths)
    ]
    for entry in entries:  # finite numbers: no exponent has all its bits set
        data = bytearray.fromhex(entry["data"])
        data[3::4] = bytes(byte & 0xBF for byte in data[3::4])
        entry["data"] = data.hex()
    results = []
    for order in (entries, entries[::-1], generator.sample(entries, len(entries))):
        (tmp_path / "log.json").write_text(json.dumps(order))
        monkeypatch.setattr("sys.argv", ["accuracy-squad.py", "--log_file=log.json"])
        main_of("accuracy-squad.py")()
        results.append((capsys.readouterr().out, (tmp_path / "build/result/predictions.json").read_text()))
    assert results[0] == results[1] == results[2]


def test_a_python_without_ssl_is_one_line(monkeypatch):
    def get(*_):
        raise ImportError("Can't connect to HTTPS URL because the SSL module is not available.")

    monkeypatch.setattr(download, "get", get)
    with refused("https://127.0.0.1/file: cannot be downloaded (Can't connect to HTTPS URL because the SSL module"):
        download.source_size("https://127.0.0.1/file", 10)
