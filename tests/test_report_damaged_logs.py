"""tools/report on any log folder: what cannot be read has one line, and the rest of the page is made."""

import io
import json
import os
import re
import sys
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from helpers import DEMO_ENV, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_pages import RECORD, Page, sample, write_run

import config
from config import UserError
from create_squad_data import load_features
from tools.report.__main__ import main
from tools.report.page import read_sections, write_report
from tools.report.plots import MANY
from tools.report.read import PIECE, find_folders, read_run, read_trace

DETAIL, TRACE, ACCURACY = "mlperf_log_detail.txt", "mlperf_log_trace.json", "mlperf_log_accuracy.json"
FUZZ = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def demo(monkeypatch, tmp_path):
    """Run on the demo's data set, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in DEMO_ENV.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def page(monkeypatch):
    """Return a function that writes a report without the charts of a run, because drawing takes seconds."""
    monkeypatch.setattr("tools.report.page.draw_run", lambda *_: [])
    monkeypatch.setattr("tools.report.page.draw_published", lambda *_: [])
    return lambda *folders: Page(write_report([os.fspath(folder) for folder in folders], "page"))


def read(folder):
    return read_run(os.fspath(folder), "run", (None, None), ("float32", False))


def test_any_name_of_a_folder_is_shown_as_it_is(page, tmp_path):
    names = ["a$b$", "_hidden", "x^2_{3}", r"\frac{1}{0}", "$\\alpha", "日本", "%s {0}", "<b>&amp;"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page(*(write_run(tmp_path / name) for name in names))
    html = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    for name in names:
        shown = re.escape(name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        assert len(re.findall(rf"<text[^>]*>\s*{shown}\s*</text>", html)) == 2  # in the legends of both charts
        assert re.search(rf'<h2 id="title-[1-8]">{shown}: Server</h2>', html)
    assert "<b>" not in html


@pytest.mark.parametrize("name", [b"caf\xe9", b"line\nbreak", b"\x1b[31mred", b"\xe2\x80\xaereversed"])
def test_a_name_that_cannot_be_printed_is_replaced(page, capfdbinary, monkeypatch, tmp_path, name):
    folder = write_run(tmp_path / os.fsdecode(name), samples=[])
    shown = page(folder, write_run(tmp_path / "other", samples=[]))
    assert re.search("caf\ufffd|line break|\ufffd\\[31mred|\ufffdreversed", shown.text)
    monkeypatch.setattr("sys.argv", ["report", os.fspath(folder)])
    monkeypatch.setattr("sys.stdout", config.forgiving(sys.stdout))  # as `run_command` does
    main()
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == os.fsencode(folder) + b"/report.html\n"


RECORDS = [
    ("{", "record.json: the run's record is not valid JSON"),
    ("[7]", "is not a JSON object"),
    (DEEP, "is not valid JSON"),
    (b"\xff\xfe{}", "is not utf-8 text"),
    ('{"backend": ' + DEEP[:600] + DEEP[-600:] + "}", "backend is a list, expected a text"),
    ({"cores": "many"}, "record.json: cores is 'many', expected a number; it is left out"),
    ({"cores": True}, "cores is True"),
    ({"memory_bytes": [2]}, "memory_bytes is a list"),
    ('{"memory_bytes": 1e999}', "memory_bytes is inf"),
    ('{"memory_bytes": NaN}', "memory_bytes is nan"),
    ({"memory_bytes": -1}, "memory_bytes is -1"),
    ({"memory_bytes": 10**400}, "memory_bytes is a huge number"),
    ({"processor": {"name": 1}}, "processor is an object"),
    ({"command": "run.py"}, "command is 'run.py', expected texts"),
    ({"command": ["run.py", 7]}, "command is a list"),
    ({"libraries": ["numpy"]}, "libraries is a list, expected texts by name"),
    ({"variables": {"A": None}}, "variables is an object"),
    ({"dataset": 0}, "dataset is 0, expected a text"),  # and not the file with descriptor 0
    ({"max_examples": "all"}, "max_examples is 'all'"),
    ({"dataset": "a\0b"}, "a\ufffdb is missing, so there is no chart of latency by sequence length"),
    ({"dataset": "/dev/zero"}, "/dev/zero is missing"),
    ('{"backend": "\\ud800 half \\u0007 bell"}', "\ufffd half \ufffd bell"),
    ({"backend": "x" * 10**6}, "xxx…"),
]


@pytest.mark.parametrize("content, words", RECORDS, ids=lambda value: str(value)[:40])
def test_a_value_of_record_json_that_cannot_be_is_named_and_left_out(page, tmp_path, content, words):
    folder = write_run(tmp_path / "run")
    content = json.dumps({**RECORD, **content}) if isinstance(content, dict) else content
    (folder / "record.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = page(folder)
    assert words in shown.text and shown.badges == ["VALID"] and "50.5 samples/s" in shown.text
    assert not re.search("None|; ,|, cores", shown.text)


VALUES = [
    ("result_mean_latency_ns", "fast", "result_mean_latency_ns is 'fast', expected a number from 0 to 2^64"),
    ("result_mean_latency_ns", -1, "result_mean_latency_ns is -1"),
    ("result_mean_latency_ns", 1e308, "result_mean_latency_ns is 1e+308"),
    ("result_mean_latency_ns", 10**400, "result_mean_latency_ns is a huge number"),
    ("result_99.00_percentile_latency_ns", float("nan"), "result_99.00_percentile_latency_ns is nan"),
    ("effective_target_qps", float("inf"), "effective_target_qps is inf"),
    ("effective_target_latency_ns", {"ns": 1}, "effective_target_latency_ns is an object"),
    ("effective_samples_per_query", [8], "effective_samples_per_query is a list"),
    ("qsl_reported_total_count", None, "qsl_reported_total_count is null"),
    ("test_datetime", 7, "test_datetime is 7, expected a text"),
    ("result_invalid_reason", ["slow"], "result_invalid_reason is a list, expected a text"),
]


@pytest.mark.parametrize("key, value, words", VALUES, ids=str)
def test_a_value_of_the_detail_log_that_cannot_be_is_named_and_left_out(page, tmp_path, key, value, words):
    shown = page(write_run(tmp_path / "run", log={key: value}))
    assert words in shown.text and shown.badges == ["VALID"] and "50.5 samples/s" in shown.text


def test_a_result_that_cannot_be_is_not_shown(page, tmp_path):
    key = "result_completed_samples_per_sec"
    shown = page(write_run(tmp_path / "run", log={key: "1e6"}))
    assert "Throughput: not known" in shown.text and f"{key} is '1e6'" in shown.text
    shown = page(write_run(tmp_path / "run", log={"result_validity": "SPLENDID"}))
    assert shown.badges == ["INCOMPLETE"] and "result_validity is 'SPLENDID', expected VALID or INVALID" in shown.text


LINES = [
    (":::MLLOG {7}", "line 1 is damaged; it is left out."),
    (":::MLLOG " + DEEP, "line 1 is damaged; it is left out."),
    (':::MLLOG {"key": ["a"], "value": 1}', "line 1 is damaged; it is left out."),
    (':::MLLOG {"key": "a", "value": 1, "metadata": 7}', "line 1 is damaged; it is left out."),
    (
        ':::MLLOG {"key": "sut_name", "value": "rack "3""}\n:::MLLOG {}',
        "line 1 is damaged; 2 damaged lines are left out.",
    ),
    (':::MLLOG {"key": "error", "value": [[7]], "metadata": {"is_error": true}}', "LoadGen's error: a list"),
    (':::MLLOG {"key": "error", "value": "a\u2028b", "metadata": {"is_error": true}}', "LoadGen's error: a b"),
    (b':::MLLOG {"key": "error", "value": "caf\xe9", "metadata": {"is_error": 1}}', "LoadGen's error: caf\ufffd"),
]


@pytest.mark.parametrize("line, words", LINES, ids=lambda value: str(value)[:60])
def test_a_damaged_line_of_the_detail_log_is_named_and_the_others_are_read(page, tmp_path, line, words):
    path = write_run(tmp_path / "run", samples=[]) / DETAIL
    path.write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n" + path.read_bytes())
    shown = page(path.parent)
    assert words in shown.text and shown.badges == ["VALID"] and "50.5 samples/s" in shown.text


def test_a_detail_log_that_is_not_of_a_run_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    for log, words in (({"effective_scenario": 7}, "scenario None"), ({"effective_test_mode": ["x"]}, "mode None")):
        with refused("run", words):
            read(write_run(folder, log=log))
    (folder / DETAIL).write_text(":::MLLOG {\n")
    with refused("run", DETAIL, "line 1 is damaged", "scenario None"):
        read(folder)


@pytest.mark.parametrize("name", [DETAIL, TRACE, "record.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_log_that_is_no_file_is_named_and_not_waited_for(tmp_path, name, make):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    make(folder / name)
    if name == DETAIL:
        with refused(name, "not a file"):
            read(folder)
    else:
        assert any(name in note and "not a file" in note for note in read(folder).notes)


IMPOSSIBLE = ["-5", "1e308", '"text"', "NaN", "null", "1.2.3", "9" * 40, "[7]", "{}", ""]


@pytest.mark.parametrize("field", ["start", "query", "index", "latency"])
@pytest.mark.parametrize("value", IMPOSSIBLE)
def test_a_sample_with_an_impossible_number_is_counted_and_left_out(tmp_path, field, value):
    good = {"start": 100.5, "query": 3, "index": 5, "latency": 2_000_000}
    samples = [sample(**good), sample(**good | {field: value}), sample(**good)]
    run = read(write_run(tmp_path / "run", samples=samples))
    assert len(run.samples.index) == 2 and set(run.samples.latency) == {0.002} and set(run.samples.index) == {5}
    assert any("has 2 of 30 samples" in note for note in run.notes)
    assert any("1 of 3 samples have impossible numbers; they are left out" in note for note in run.notes)


def test_a_half_written_trace_has_its_whole_samples(tmp_path):
    folder = write_run(tmp_path / "run")
    content = (folder / TRACE).read_bytes()
    (folder / TRACE).write_bytes(content[: content.rindex(b'"complete_ns":2') + 16])  # in the middle of a number
    run = read(folder)
    assert len(run.samples.latency) == 29 and run.samples.latency.min() >= 0.02
    assert any("has 29 of 30 samples; the charts show only these" in note for note in run.notes)


def test_a_sample_beyond_the_data_set_costs_only_the_chart_by_length(tmp_path):
    run = read(write_run(tmp_path / "run", samples=[sample(1, 0, 10**9, 5)] * 30))
    assert run.samples and run.lengths is None and any("has number 1000000000" in note for note in run.notes)


@pytest.mark.parametrize("content", ["", "[", "]", "[7]", DEEP, '[{"qsl_idx": 0, "data": "zz"}]', "null]", b"\xff]"])
def test_a_damaged_accuracy_log_has_a_note_instead_of_a_score(page, tmp_path, content):
    folder = write_run(tmp_path / "run", log={"effective_test_mode": "AccuracyOnly"}, samples=[])
    (folder / ACCURACY).write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = page(folder)
    assert "F1: not known" in shown.text and shown.badges[0] in ("ACCURACY", "INCOMPLETE")
    assert shown.badges == ["INCOMPLETE"] or ACCURACY in shown.text


EXTREMES = [("Server", 0, 0), ("Server", 10**18 - 1, 10**15 - 1), ("Offline", 1, 0), ("Offline", 5, 10**15 - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario, latency, start", EXTREMES)
def test_extreme_samples_are_drawn(tmp_path, scenario, latency, start):
    samples = [sample(start * (place > 3), place, 0, latency) for place in range(30)]
    folder = write_run(tmp_path / "run", scenario, {"effective_target_qps": 1e-300}, samples=samples)
    shown = Page(write_report([str(folder)], "page"))
    assert len(shown.charts) == 7 and "inf" not in shown.text and "nan" not in shown.text


def test_one_run_that_cannot_be_read_does_not_cost_the_others(page, tmp_path):
    good = write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    with refused(
        "wrote page/report.html without a run that cannot be read", "empty/mlperf_log_detail.txt", "and 1 more"
    ):
        page(good, tmp_path / "empty", tmp_path / "missing")
    shown = Page(tmp_path / "page/report.html")
    assert shown.badges == ["VALID"] and "Not on this page" in shown.text
    assert "empty/mlperf_log_detail.txt" in shown.text and "missing/mlperf_log_detail.txt" in shown.text


def test_the_log_folders_inside_a_folder_are_found(tmp_path):
    names = ["Offline/accuracy", "Offline/performance/run_1", "Offline/TEST01/performance/run_1", "Server/accuracy"]
    for name in names:
        write_run(tmp_path / "tree/closed/me/results/box/bert-99" / name)
    write_run(tmp_path / "tree/closed/me/results/box/bert-99/Offline/accuracy/earlier/accuracy")
    folders, found = find_folders([str(tmp_path / "tree")])
    assert sorted(found) == sorted(names) and all(folder.endswith(name) for folder, name in zip(folders, found))
    with refused("duplicated"):
        find_folders([str(tmp_path / "tree"), folders[0]])
    for number in (10, 9, 1):
        write_run(tmp_path / f"sweep/run_{number}")
    assert find_folders([str(tmp_path / "sweep")])[1] == ["run_1", "run_9", "run_10"]


def test_a_submission_shows_its_description_of_the_system_and_its_score(page, tmp_path):
    scenario = tmp_path / "tree/closed/me/results/box/bert-99/Offline"
    write_run(scenario / "performance/run_1", "Offline", record=None, samples=[])
    write_run(scenario / "accuracy", "Offline", {"effective_test_mode": "AccuracyOnly"}, None, [])
    (scenario / "accuracy" / ACCURACY).write_text("[{}\n\n...\n\n]\n")
    (scenario / "accuracy/accuracy.txt").write_text('{"exact_match": 83.1, "f1": 90.874}\nhash=0\n')
    path = tmp_path / "tree/closed/me/systems/box.json"
    path.parent.mkdir()
    system = {"framework": "PyTorch 9", "host_processor_model_name": "Chip 1", "host_processors_per_node": "2"}
    system |= {"number_of_nodes": 1, "host_processor_core_count": "32", "accelerator_model_name": "N/A"}
    path.write_text(json.dumps(system | {"accelerators_per_node": "0", "operating_system": 7}))
    shown = page(tmp_path / "tree")
    rows = {row[0]: row[1:] for row in shown.table("System")}
    assert rows["cores"] == ["64", "64"] and rows["processor"] == ["Chip 1", "Chip 1"] and "GPU" not in rows
    assert dict(shown.table("Accuracy")) == {"exact match": "83.100 %", "F1": "90.874 %"}
    assert "accuracy.txt states it" in shown.text and "box.json describes it" in shown.text
    path.write_text(DEEP)
    assert "box.json: the system's description is not valid JSON" in page(tmp_path / "tree").text


def test_many_runs_are_compared_in_one_table(monkeypatch, tmp_path):
    count, loaded, terminal = MANY + 5, [], io.StringIO()
    for place in range(count):
        log = {"result_completed_samples_per_sec": 50 + place, "result_validity": "VALID" if place else "INVALID"}
        record = {"dataset": DEMO_ENV["DATASET_FILE"], "vocab": DEMO_ENV["VOCAB_FILE"]}
        write_run(tmp_path / f"runs/{place}", log={**log, "qsl_reported_total_count": 334}, record={**RECORD, **record})
    monkeypatch.setattr("tools.report.page.load_features", lambda *paths: loaded.append(paths) or load_features(*paths))
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    shown = Page(write_report([str(tmp_path / "runs")], "page"))
    assert len(loaded) == 1 and f"{count}/{count}" in terminal.getvalue()  # the data set is read once; a progress bar
    rows = shown.table(f"The {count} runs")
    assert len(rows) == count + 1 and rows[0] == ["run", "status", "throughput"]
    assert rows[1] == ["0", "INVALID", "50 samples/s"]
    assert ["minimum duration", "600 s"] in shown.table("The same in all runs")
    html = (tmp_path / "page/report.html").read_text()
    assert len(shown.charts) == 2 and f"highest: {49 + count} samples/s, {count - 1}" in html
    assert "lowest: 50 samples/s, 0" in html


def test_a_comparison_keeps_no_run_in_memory(page, tmp_path):
    folders = [str(write_run(tmp_path / name)) for name in "ab"]
    sections, _ = read_sections(folders, ["a", "b"], str(tmp_path), (None, None), ("float32", False))
    assert all(section.run.samples is None and section.run.answers == () for section in sections)
    assert all(sum(array.size for curve in section.curves for array in curve) < 2000 for section in sections)


@pytest.mark.slow
def test_the_time_of_many_runs_grows_with_their_number_only(tmp_path):
    samples = [sample(1000 * place, place, place % 300, 10**7 + place) for place in range(3000)]
    for place in range(90):
        write_run(tmp_path / f"runs/{place:03}", samples=samples)

    def cost(count):
        folders = [str(tmp_path / f"runs/{place:03}") for place in range(count)]
        start = time.process_time()
        write_report(folders, "page")
        return time.process_time() - start

    cost(21)  # fonts and modules are loaded
    few, many = cost(30), cost(90)
    assert many < 60 and many < 4.5 * few  # three times as many runs


def test_a_trace_takes_memory_for_its_numbers_not_for_its_text(monkeypatch, tmp_path):
    noise = '{"name":"Other","args":{"text":"' + "x" * 2000 + '"}},\n'
    folder = write_run(tmp_path / "run", samples=[sample(place, place, 0, 5) + noise for place in range(20_000)])
    assert (folder / TRACE).stat().st_size > 2 * PIECE
    expected = read_trace(str(folder))
    monkeypatch.setattr("tools.report.read.PIECE", 2**16)
    tracemalloc.start()
    samples = read_trace(str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 20_000 < (folder / TRACE).stat().st_size / 10
    for name in ("start", "latency", "query", "index"):  # the same wherever the pieces end
        assert np.array_equal(getattr(samples, name), getattr(expected, name)) and len(samples.index) == 20_000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MORE_KEYS = ["dataset", "vocab", "gpu", "accelerators", "variables", "max_examples", "memory", "name", "dtype"]
KEYS = [
    "effective_scenario", "effective_test_mode", "effective_min_duration_ms", "effective_samples_per_query",
    "effective_target_latency_ns", "effective_target_latency_percentile", "effective_target_qps", "test_datetime",
    "result_validity", "result_invalid_reason", "result_query_count", "result_completed_samples_per_sec",
    "qsl_reported_total_count",
]  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(values=st.dictionaries(st.sampled_from([*RECORD, *MORE_KEYS]), JSON))
def test_no_value_of_record_json_stops_the_page(tmp_path, values):
    folder = write_run(tmp_path / "run", record={**RECORD, **values})
    make_page(folder, tmp_path)


@pytest.mark.slow
@FUZZ
@given(values=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_value_of_the_detail_log_stops_the_page(tmp_path, values):
    make_page(write_run(tmp_path / "run", log=values), tmp_path)


@pytest.mark.slow
@FUZZ
@given(data=st.data(), name=st.sampled_from([DETAIL, TRACE, "record.json"]))
def test_no_damage_to_a_file_stops_the_page(tmp_path, data, name):
    """Bytes that are lost, inserted, changed or repeated."""
    path = write_run(tmp_path / "run") / name
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 40))
        content[place : place + length] = data.draw(st.binary(max_size=10)) * data.draw(st.integers(0, 3))
    path.write_bytes(content)
    make_page(path.parent, tmp_path)


def make_page(folder, out):
    """Read a run and fill the template; only a UserError may be raised. Other tests draw the charts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.report.page.draw_run", lambda *_: [])
        patch.setattr("tools.report.page.draw_published", lambda *_: [])
        try:
            write_report([str(folder)], str(out / "page"))
        except UserError as error:
            assert "\n" not in str(error)
