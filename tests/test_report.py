"""tools/report on logs that run.py wrote with the demo's model, with and without what other harnesses leave out."""

import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import DEMO_ENV, LIMIT_S, ROOT, SHORT_RUNS, backend_script, command_of, fails, refused
from report_pages import Page

from config import SCENARIOS
from create_squad_data import read_squad
from loadgen_logs import read_detail_log
from squad_eval import score_question
from tools.report.__main__ import main
from tools.report.page import write_report
from tools.report.plots import number
from tools.report.read import read_run, read_trace, run_names

# Runs of run.py in one process: NAME is the log folder, and what the run prints goes to NAME.stdout. Two have a report.
RUNS = """\
import contextlib, os, sys
import run

for name in ("accuracy", *run.SCENARIOS):
    os.environ["LOG_PATH"] = name
    flags = ["--accuracy"] if name == "accuracy" else [f"--scenario={name}", "--max_examples=200"]
    flags += ["--report"] * (name in ("accuracy", "Server"))
    sys.argv = ["run.py", "--backend=onnxruntime", *flags]
    with open(f"{name}.stdout", "w") as file, contextlib.redirect_stdout(file):
        run.main()
"""


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """Return the folder of run.py's logs: one per scenario, and "accuracy"; NAME.stdout beside each. See RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "user.conf").write_text(SHORT_RUNS)
    env = command_of("tools.report", "--backend=onnxruntime")[1]
    subprocess.run([sys.executable, "-c", RUNS], cwd=folder, env=env, check=True, timeout=LIMIT_S)
    return folder


@pytest.fixture
def copied(logs, tmp_path):
    """Return a function that copies a run of `logs`, by default without its trace, because drawing takes seconds."""

    def copy(name, trace=False):
        ignored = shutil.ignore_patterns("report*", "" if trace else "mlperf_log_trace.json")
        return shutil.copytree(logs / name, tmp_path / name, ignore=ignored)

    return copy


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Return a function that writes a report on log folders and returns its Page."""
    monkeypatch.chdir(tmp_path)
    for name, value in DEMO_ENV.items():
        monkeypatch.setenv(name, value)
    return lambda *folders, **options: Page(write_report(list(map(str, folders)), "page", **options))


@pytest.fixture
def command(report, monkeypatch, capsys):
    """Return a function that runs the command and returns what it prints."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["report", *map(str, args)])
        main()
        return capsys.readouterr().out.strip()

    return run


def edit(folder, key, value):
    """Set the value of `key` in LoadGen's detail log in `folder`."""
    path = folder / "mlperf_log_detail.txt"
    pattern = f'("key": "{key}", "value": )("[^"]*"|[^,"]*),'
    text, count = re.subn(pattern, lambda match: match[1] + json.dumps(value) + ",", path.read_text())
    assert count
    path.write_text(text)


def cut(path, end):
    """Cut off a log at `end`, a text or an offset, as a killed run leaves it."""
    text = path.read_text()
    path.write_text(text[: text.index(end) if isinstance(end, str) else end])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_results_are_loadgens(logs, report, copied, scenario):
    page = report(copied(scenario))
    log = read_detail_log(logs / scenario)
    value, unit = (logs / f"{scenario}.stdout").read_text().split()[-2:]
    shown = re.search(rf"([0-9.,]+) {unit} ", page.text)[1]
    assert float(shown.replace(",", "")) == pytest.approx(float(value), rel=1e-4)
    per_query = "_per_query" if scenario == "MultiStream" else ""
    rows = dict(page.table("as logged by LoadGen"))
    for percent in (50, 90, 99, 99.9):
        latency = log[f"result_{percent:.2f}_percentile{per_query}_latency_ns"] / 1e6
        assert rows[f"p{percent:g}"] == f"{number(latency)} ms"
    assert ("a query of 8 samples" in page.text) == (scenario == "MultiStream")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_charts_latencies_are_loadgens(logs, scenario):
    """The latencies in the trace have the min, mean, max and percentiles that LoadGen logs."""
    samples, log = read_trace(str(logs / scenario)), read_detail_log(logs / scenario)
    per, query = ("_per_query", "_query") if scenario == "MultiStream" else ("", "")
    latency = np.sort(samples.timings(scenario)[1]) * 1e6
    count = log["effective_samples_per_query" if scenario == "Offline" else "result_query_count"]
    assert len(latency) == count
    assert latency[0] == pytest.approx(log[f"result_min{query}_latency_ns"], abs=1)
    assert latency[-1] == pytest.approx(log[f"result_max{query}_latency_ns"], abs=1)
    assert latency.mean() == pytest.approx(log[f"result_mean{query}_latency_ns"], abs=2)
    assert latency[int(0.9 * count)] == pytest.approx(log[f"result_90.00_percentile{per}_latency_ns"], rel=0.05)


def test_the_page_is_self_contained_and_accessible(logs):
    page = Page(logs / "Server/report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert re.match("#|data:", attributes.get(name, "#")), (tag, attributes[name][:80])
    assert len(page.charts) == len(set(page.charts)) == sum(tag == "svg" for tag, _ in page.tags) == 7
    assert all("ms" in text or "samples/s" in text for text in page.charts)
    assert dict(page.tags)["html"]["lang"] == "en"
    assert [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)][:2] == [1, 2]
    assert sum(tag == "table" for tag, _ in page.tags) == len(page.tables) == 5
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes.get(name, "") for _, attributes in page.tags for name in ("href", "xlink:href")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_the_charts_are_also_png_files(logs):
    files = {path.name: path.read_bytes() for path in (logs / "Server").glob("*.png")}
    names = ("histogram", "percentiles", "time", "throughput", "length", "published", "published-per-core")
    assert files.keys() == {f"report-{name}.png" for name in names}
    assert all(content.startswith(b"\x89PNG") for content in files.values())


@pytest.mark.parametrize("verdict", ["VALID", "INVALID"])
def test_a_short_run_is_a_trial_whatever_its_verdict(report, copied, verdict):
    folder = copied("Server")
    edit(folder, "result_validity", verdict)
    page = report(folder)
    assert page.badges == ["TRIAL"]
    assert "not an official result: its minimum duration was 0.3 s, and MLPerf requires 600 s" in page.text
    assert f"With these settings, LoadGen's verdict is {verdict}" in page.text


def test_a_run_of_official_length_has_loadgens_verdict(report, copied):
    folder = copied("SingleStream")
    edit(folder, "effective_min_duration_ms", 600_000)
    edit(folder, "result_validity", "VALID")
    page = report(folder)
    assert page.badges == ["VALID"] and "LoadGen calls this run valid with the settings below" in page.text
    edit(folder, "result_validity", "INVALID")
    edit(folder, "early_stopping_result", "Too many slow queries")
    page = report(folder)
    assert page.badges == ["INVALID"] and "Too many slow queries" in page.text


def test_an_unfinished_run_has_no_result(report, copied):
    folder = copied("Server")
    cut(folder / "mlperf_log_detail.txt", '"result_validity"')
    page = report(folder)
    assert page.badges == ["INCOMPLETE"] and "did not finish" in page.text and "Throughput: not known" in page.text
    assert not any("as logged by LoadGen" in caption for caption in page.tables)
    folder = copied("accuracy")
    cut(folder / "mlperf_log_accuracy.json", -100)
    page = report(folder)
    assert page.badges == ["INCOMPLETE"] and "exact match" not in page.text and "F1: not known" in page.text
    (folder / "mlperf_log_accuracy.json").unlink()
    assert report(folder).badges == ["INCOMPLETE"]


def test_an_accuracy_run_shows_its_score_and_worst_answers(logs):
    page = Page(logs / "accuracy/report.html")
    scores = json.loads((logs / "accuracy.stdout").read_text().splitlines()[-1])
    rows = dict(page.table("Accuracy"))
    assert (rows["exact match"], rows["F1"]) == tuple(f"{scores[key]:.3f} %" for key in ("exact_match", "f1"))
    questions = read_squad(DEMO_ENV["DATASET_FILE"]).questions
    answers = json.loads((logs / "build/result/predictions.json").read_text())
    counted = [int(rows[label]) for label in ("exactly correct", "partly correct", "no correct word")]
    graded = [score_question(question, answers[question.id]) for question in questions]
    assert counted[0] == sum(exact for exact, _ in graded) and counted[2] == sum(f1 == 0 for _, f1 in graded)
    assert sum(counted) == len(questions) and rows["questions scored"] == f"{len(questions)} of {len(questions)}"
    worst = page.table("Worst answers")[1:]
    assert 1 <= len(worst) <= 20
    for text, answer, accepted, f1 in worst:
        same = [question for question in questions if question.text == text]
        assert any(" ".join(answers[question.id].split()) == answer.replace("(none)", "") for question in same)
        exact, question_f1 = score_question(same[-1], answers[same[-1].id])
        assert not exact and accepted.split(" · ")[0] in same[-1].answers
        assert float(f1.split()[0]) == pytest.approx(100 * question_f1, abs=0.01)


@pytest.mark.parametrize("dtype, transposed", [("float32", False), ("float64", True)])
def test_another_harnesss_accuracy_log_is_scored(report, copied, logs, dtype, transposed):
    """Without record.json, and with responses of 384 pairs, as the MLPerf reference leaves them."""
    folder = copied("accuracy")
    (folder / "record.json").unlink()
    path = folder / "mlperf_log_accuracy.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        pairs = np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 2).astype(dtype)
        pairs = np.pad(pairs, ((0, 384 - len(pairs)), (0, 0)), constant_values=-10000)
        entry["data"] = (pairs.T if transposed else pairs).tobytes().hex()
    path.write_text(json.dumps(entries))
    page = report(folder, form=(dtype, transposed))
    scores = json.loads((logs / "accuracy.stdout").read_text().splitlines()[-1])
    assert dict(page.table("Accuracy"))["F1"] == f"{scores['f1']:.3f} %"
    assert "no record.json" in page.text


def test_without_a_trace_there_are_no_charts(report, copied):
    folder = copied("Offline")
    for content in (None, "", "{}"):
        if content is not None:
            (folder / "mlperf_log_trace.json").write_text(content)
        page = report(folder)
        assert "so there are no charts" in page.text and page.badges == ["TRIAL"]
        assert all(text.startswith("Published") for text in page.charts)


@pytest.mark.parametrize("name, lost", [("accuracy", "no score"), ("Server", "no chart of latency by sequence length")])
def test_without_the_data_set_a_note_says_what_is_missing(report, copied, name, lost):
    folder = copied(name, trace=True)

    def notes(given=(None, None)):
        run = read_run(str(folder), name, given, ("float32", False))
        assert (run.score is None and run.lengths is None) == (lost in str(run.notes))
        return str(run.notes)

    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "dataset": "gone.json"}))
    assert f"gone.json is missing, so there is {lost}" in notes()
    (folder / "record.json").unlink()
    edit(folder, "qsl_reported_total_count", 10833)
    assert re.search(rf"The run had 10833 samples, but .* makes \d+, so there is {lost}", notes())
    assert lost not in notes((DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"]))


def test_max_examples_may_exceed_the_data_set(copied):
    folder = copied("accuracy")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "max_examples": 1_000_000}))
    assert not read_run(str(folder), "accuracy", (None, None), ("float32", False)).notes


@pytest.mark.slow
def test_runs_are_compared(command, copied, tmp_path):
    first = copied("Server", trace=True)
    second = shutil.copytree(first, tmp_path / "other")
    record = json.loads((second / "record.json").read_text())
    (second / "record.json").write_text(json.dumps({**record, "dtype": "bf16"}))
    assert command(first, second, copied("accuracy")) == "build/report/report.html"
    page = Page(tmp_path / "build/report/report.html")
    rows = page.table("System")
    assert rows[0] == ["", "Server", "other", "accuracy"]
    assert ["dtype", "fp32", "bf16", "fp32"] in rows
    assert page.badges[:3] == ["TRIAL", "TRIAL", "ACCURACY"]
    assert sum("Server, other" in text for text in page.charts) == 2 and len(page.charts) == 16
    assert any(tag == "tr" and attributes.get("class") == "differs" for tag, attributes in page.tags)


def test_names_of_runs_are_as_short_as_possible():
    assert run_names(["a/logs", "b/other"]) == ["logs", "other"]
    assert run_names(["a/logs", "b/logs", "c/other"]) == ["a/logs", "b/logs", "c/other"]


def test_without_jinja2_the_command_says_how_to_install_it(script, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError('no jinja2', name='jinja2')")
    fails(script("tools.report", "logs", PYTHONPATH=tmp_path), "report: error:", "jinja2", "make venv BACKEND=")


@pytest.mark.slow
def test_the_report_of_24576_samples_is_fast_and_small(script, command, tmp_path):
    conf = "*.Offline.target_qps = 2240000\n*.*.min_duration = 10\n*.*.min_query_count = 1\n"
    (tmp_path / "user.conf").write_text(conf)
    result = script(backend_script(tmp_path), "--backend=pytorch", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert len(read_trace(str(tmp_path / "logs")).index) >= 24_576
    start = time.process_time()  # not that of other processes
    assert command("logs") == "logs/report.html"
    assert time.process_time() - start < 10
    assert (tmp_path / "logs/report.html").stat().st_size < 2e6


def test_what_cannot_be_used_is_named(command, copied):
    folder = copied("Server")
    with refused("nowhere", "cannot read"):
        command("nowhere")
    with refused("nowhere.json"):
        command(copied("accuracy"), "--val_data", "nowhere.json")
    with refused("/dev/null/page", "--out"):
        command(folder, "--out", "/dev/null/page")
    with refused("Server", "duplicated"):
        command(folder, folder)


def test_a_data_set_that_is_too_small_is_named(command, copied, tmp_path):
    document = json.loads((ROOT / "demo/dev.json").read_text())
    document["data"] = document["data"][:1]
    (tmp_path / "small.json").write_text(json.dumps(document))
    with refused("small.json", "--val_data"):
        command(copied("Server", trace=True), "--val_data=small.json", f"--vocab_file={DEMO_ENV['VOCAB_FILE']}")


@pytest.mark.slow
@pytest.mark.parametrize("names", [["Server"], ["accuracy"], ["Server", "accuracy"]], ids="+".join)
def test_a_phone_need_not_scroll_sideways(report, logs, tmp_path, names):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium to show the page in")
    report(*(logs / name for name in names))
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    frame = page.replace("</body>", tell).replace("&", "&amp;").replace('"', "&quot;")
    show = "<script>onmessage = event => document.title = `width ${event.data}`</script>"
    frame = f'{show}<iframe style="width: 360px; height: 800px; border: 0" srcdoc="{frame}"></iframe>'
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync virtual-time-budget=5000 dump-dom"
    command = [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={tmp_path / 'browser'}"]
    command += [f"file://{tmp_path / 'frame.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert int(re.search("<title>width ([0-9]+)", shown.stdout)[1]) <= 360
