"""report.py on logs that run.py made with the demo's model, with and without what other harnesses leave out."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import DEMO_ENV, LIMIT_S, ROOT, fails
from test_run import CONF, FAULTY, SCENARIOS

from create_squad_data import read_squad
from report import number, read_trace
from run import read_detail_log
from squad_eval import score_question


class Page(HTMLParser):
    """A report's page: .text, .tags [(name, attributes)], .tables {caption: [[cell]]}, .badges."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.tables, self.badges, self.cell, self.skip = "", [], {}, [], None, 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.skip += tag in ("style", "svg")
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th", "caption") or "badge" in attributes.get("class", ""):
            self.cell = ""

    def handle_endtag(self, tag):
        self.text += " "
        self.skip -= tag in ("style", "svg")
        if tag == "caption":
            self.tables[self.cell.strip()] = self.rows
        elif tag in ("td", "th"):
            self.rows[-1].append(" ".join(self.cell.split()))
        elif tag == "span" and self.cell is not None:
            self.badges.append(self.cell)
        else:
            return
        self.cell = None

    def handle_data(self, data):
        if not self.skip:
            self.text += data
        if self.cell is not None:
            self.cell += data

    def table(self, words):
        return next(rows for caption, rows in self.tables.items() if words in caption)


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """The folder of run.py's logs: one folder a scenario, and "accuracy"; .stdout of each beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "user.conf").write_text(CONF)
    for name in (*SCENARIOS, "accuracy"):
        args = ["--accuracy"] if name == "accuracy" else [f"--scenario={name}", "--max_examples=200"]
        result = subprocess.run([sys.executable, ROOT / "run.py", "--backend=pytorch", *args], cwd=folder, check=True,
                                env={**os.environ, **DEMO_ENV, "LOG_PATH": name}, timeout=LIMIT_S, capture_output=True,
                                text=True)
        (folder / f"{name}.stdout").write_text(result.stdout)
    return folder


@pytest.fixture
def copied(logs, tmp_path):
    """Copies a run's logs into the test's folder: copied("Server") -> its path."""
    return lambda name: shutil.copytree(logs / name, tmp_path / name)


@pytest.fixture
def report(script, tmp_path):
    """Makes a report and reads it: report(folder, …) -> Page."""
    def make(*args, **variables):
        result = script("report.py", *args, **variables)
        assert result.returncode == 0, result.stderr
        return Page(tmp_path / result.stdout.strip())
    return make


def edit(folder, key, value):
    """Set what LoadGen's detail log in `folder` says of `key`."""
    path = folder / "mlperf_log_detail.txt"
    text, count = re.subn(f'("key": "{key}", "value": )("[^"]*"|[^,"]*),',
                          lambda match: match[1] + json.dumps(value) + ",", path.read_text())
    assert count
    path.write_text(text)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_figures_are_loadgens(report, copied, logs, scenario):
    page = report(copied(scenario))
    log = read_detail_log(logs / scenario)
    figure, unit = (logs / f"{scenario}.stdout").read_text().split()[-2:]
    shown = re.search(rf"([0-9.,]+) {unit} ", page.text)[1]
    assert float(shown.replace(",", "")) == pytest.approx(float(figure), rel=1e-4)
    per = "_per_query" if scenario == "MultiStream" else ""
    rows = dict(page.table("LoadGen's figures"))
    for percent in (50, 90, 99, 99.9):
        assert rows[f"{percent:g} %"] == f"{number(log[f'result_{percent:.2f}_percentile{per}_latency_ns'] / 1e6)} ms"
    assert ("a query of 8 samples" in page.text) == (scenario == "MultiStream")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_pictures_latencies_are_loadgens(logs, scenario):
    """What is read from the trace has the least, mean, most and percentiles of LoadGen's own counting."""
    samples, log = read_trace(logs / scenario), read_detail_log(logs / scenario)
    per, query = ("_per_query", "_query") if scenario == "MultiStream" else ("", "")
    latency = np.sort(samples.latency if scenario == "Offline" else samples.queries()[1]) * 1e9
    queries = log["result_query_count"]
    assert len(latency) == (log["effective_samples_per_query"] if scenario == "Offline" else queries)
    assert latency[0] == pytest.approx(log[f"result_min{query}_latency_ns"], abs=1)
    assert latency[-1] == pytest.approx(log[f"result_max{query}_latency_ns"], abs=1)
    assert latency.mean() == pytest.approx(log[f"result_mean{query}_latency_ns"], abs=2)
    assert latency[int(0.9 * len(latency))] == pytest.approx(log[f"result_90.00_percentile{per}_latency_ns"], rel=0.05)


def test_the_page_stands_alone_and_can_be_read_without_seeing_it(report, copied):
    page = report(copied("Server"))
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            if name in attributes:
                assert re.match("#|data:", attributes[name]), (tag, attributes[name][:80])
    pictures = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) == len(set(pictures)) == sum(tag == "svg" for tag, _ in page.tags) == 5
    assert all("ms" in text or "samples/s" in text for text in pictures)
    assert dict(page.tags)["html"]["lang"] == "en"
    assert [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)][:2] == [1, 2]
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == len(page.tables) == 3
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, attributes in page.tags for name, value in attributes.items()
             if name in ("href", "xlink:href") and value.startswith("#")}
    assert links <= set(ids)


def test_the_pictures_are_png_files_too(report, copied, tmp_path):
    report(copied("Server"))
    names = {path.name for path in (tmp_path / "Server").glob("*.png")}
    assert names == {f"report-{name}.png" for name in ("histogram", "percentiles", "time", "throughput", "length")}
    assert all((tmp_path / "Server" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_short_run_is_called_a_trial_whatever_loadgen_says(report, copied):
    folder = copied("Server")
    for said in ("VALID", "INVALID"):
        edit(folder, "result_validity", said)
        page = report(folder)
        assert page.badges == ["TRIAL"]
        assert f"no official result: at least 0.3 s were asked for, MLPerf asks for 600 s. Under these settings " \
               f"LoadGen's verdict is {said}" in page.text


def test_a_run_of_full_length_has_loadgens_verdict(report, copied):
    folder = copied("Server")
    edit(folder, "effective_min_duration_ms", 600_000)
    edit(folder, "result_validity", "VALID")
    assert report(folder).badges == ["VALID"]
    edit(folder, "result_validity", "INVALID")
    edit(folder, "early_stopping_result", "Too many slow queries")
    page = report(folder)
    assert page.badges == ["INVALID"] and "Too many slow queries" in page.text


def test_an_unfinished_run_is_no_result(report, copied):
    """A log that ends in the middle of a line before the results, as a killed run leaves it."""
    folder = copied("Server")
    path = folder / "mlperf_log_detail.txt"
    path.write_text(path.read_text()[:path.read_text().index('"result_validity"')])
    page = report(folder)
    assert page.badges == ["INCOMPLETE"] and "did not finish" in page.text and "LoadGen's figures" not in page.tables
    folder = copied("accuracy")
    path = folder / "mlperf_log_accuracy.json"
    path.write_text(path.read_text()[:-100])
    page = report(folder)
    assert page.badges == ["INCOMPLETE"] and "exact match" not in page.text


def test_an_accuracy_run_shows_its_score_and_worst_answers(report, copied, logs):
    page = report(copied("accuracy"))
    figures = json.loads((logs / "accuracy.stdout").read_text().splitlines()[-1])
    rows = dict(page.table("The answers"))
    assert (rows["exact match"], rows["F1"]) == tuple(f"{figures[key]:.3f} %" for key in ("exact_match", "f1"))
    questions = {question.text: question for question in read_squad(DEMO_ENV["DATASET_FILE"]).questions}
    answers = json.loads((logs / "build/result/predictions.json").read_text())
    worst = page.table("worst answers")[1:]
    assert 1 <= len(worst) <= 20
    for text, answer, accepted, f1 in worst:
        same = [question for question in questions.values() if question.text == text]
        assert any(" ".join(answers[question.id].split()) == answer.replace("(none)", "") for question in same)
        question = questions[text]
        assert not score_question(question, answers[question.id])[0]
        assert accepted.split(" · ")[0] in question.answers
        assert float(f1.split()[0]) == pytest.approx(100 * score_question(question, answers[question.id])[1], abs=0.01)


def test_another_harnesss_logs_make_a_report(report, copied, logs):
    """Without record.json, and with responses of 384 pairs, as the MLPerf reference leaves them."""
    folder = copied("accuracy")
    (folder / "record.json").unlink()
    path = folder / "mlperf_log_accuracy.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        pairs = np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 2)
        entry["data"] = np.pad(pairs, ((0, 384 - len(pairs)), (0, 0)), constant_values=-10000).tobytes().hex()
    path.write_text(json.dumps(entries))
    page = report(folder)
    figures = json.loads((logs / "accuracy.stdout").read_text().splitlines()[-1])
    assert dict(page.table("The answers"))["F1"] == f"{figures['f1']:.3f} %"
    assert "no record.json" in page.text

    folder = copied("Offline")
    (folder / "record.json").unlink()
    (folder / "mlperf_log_trace.json").unlink()
    page = report(folder)
    assert "no pictures" in page.text and page.badges == ["TRIAL"]


def test_without_the_data_set_the_page_says_what_is_missing(report, copied):
    for name, words in (("accuracy", "there is no score"), ("Server", "no picture of latency against length")):
        folder = copied(name)
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps({**record, "dataset": "gone.json"}))
        assert words in report(folder).text
        (folder / "record.json").unlink()
        edit(folder, "qsl_reported_total_count", 10833)
        page = report(folder)
        assert words in page.text and "The run had 10833 samples" in page.text


def test_runs_stand_side_by_side(report, copied, tmp_path):
    first = copied("Server")
    second = shutil.copytree(first, tmp_path / "other")
    record = json.loads((second / "record.json").read_text())
    (second / "record.json").write_text(json.dumps({**record, "dtype": "bf16"}))
    page = report(first, second, copied("accuracy"), "--out", tmp_path / "page")
    rows = page.table("System")
    assert rows[0] == ["", "Server", "other", "accuracy"]
    assert ["dtype", "fp32", "bf16", "fp32"] in rows
    assert page.badges[:3] == ["TRIAL", "TRIAL", "ACCURACY"]
    pictures = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert sum("Server, other" in text for text in pictures) == 2 and len(pictures) == 12
    differing = [attributes for tag, attributes in page.tags if tag == "tr" and attributes.get("class") == "differs"]
    assert differing


def test_run_writes_the_report_of_its_own_run(script, tmp_path):
    (tmp_path / "user.conf").write_text(CONF)
    result = script("run.py", "--backend=pytorch", "--report", "--max_examples=50", LOG_PATH="logs")
    assert result.returncode == 0 and result.stdout.splitlines()[-1].startswith(("VALID", "INVALID")), result.stderr
    assert Page(tmp_path / "logs/report.html").badges == ["TRIAL"]
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError('no jinja2', name='jinja2')")
    fails(script("report.py", "logs", PYTHONPATH=tmp_path), "jinja2", "make venv BACKEND=report")


def test_the_report_of_24576_samples_is_fast_and_small(script, tmp_path):
    (tmp_path / "user.conf").write_text("*.Offline.target_qps = 2240000\n*.*.min_duration = 10\n"
                                        "*.*.min_query_count = 1\n")
    (tmp_path / "null.py").write_text(FAULTY.replace("BODY", "pass"))
    result = script(tmp_path / "null.py", "--backend=pytorch", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert len(read_trace(tmp_path / "logs").index) >= 24_576
    start = time.monotonic()
    assert script("report.py", "logs").returncode == 0
    assert time.monotonic() - start < 10
    assert (tmp_path / "logs/report.html").stat().st_size < 2e6


def test_what_cannot_be_used_is_named(script, copied, tmp_path):
    fails(script("report.py", "nowhere"), "nowhere", "cannot read")
    folder = copied("Server")
    fails(script("report.py", folder, "--val_data", "nowhere.json"), "nowhere.json")
    fails(script("report.py", folder, "--out", "/dev/null/page"), "/dev/null/page", "--out")
    fails(script("report.py", folder, folder), "twice")
    detail = (folder / "mlperf_log_detail.txt").read_text()
    (folder / "mlperf_log_detail.txt").write_text(":::MLLOG {\n" + detail)
    fails(script("report.py", folder), "mlperf_log_detail.txt", "line 1")
    (folder / "mlperf_log_detail.txt").write_text("")
    fails(script("report.py", folder), "Server", "no scenario")
    (folder / "mlperf_log_detail.txt").write_text(detail)
    (folder / "record.json").write_text("{")
    fails(script("report.py", folder), "record.json", "damaged")


def test_a_phone_need_not_scroll_sideways(report, copied, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium to show the page in")
    folders = [copied(name) for name in ("Server", "accuracy")]
    for folders_shown in ([folders[0]], [folders[1]], folders):
        report(*folders_shown, "--out", tmp_path / "page")
        page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
        tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
        frame = page.replace("</body>", tell).replace("&", "&amp;").replace('"', "&quot;")
        (tmp_path / "frame.html").write_text(
            "<script>onmessage = event => document.title = `width ${event.data}`</script>"
            f'<iframe style="width: 360px; height: 800px; border: 0" srcdoc="{frame}"></iframe>', encoding="utf-8")
        shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                                "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                                f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom",
                                f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120,
                               check=True)
        assert int(re.search("<title>width ([0-9]+)", shown.stdout)[1]) <= 360
