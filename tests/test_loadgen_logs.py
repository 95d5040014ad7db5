"""LoadGen's logs may hold inf and nan, which are no JSON: runs, their reports and the check of a submission go on."""

import math
from pathlib import Path

import pytest
from helpers import SHORT_RUNS, refused, run_loadgen

from backends import RunOptions
from loadgen import loadgen_settings
from loadgen_logs import DETAIL_LOG, read_detail_log, verdict
from tools.report.page import write_report

ONE_QUERY = "*.*.min_duration = 0\n*.*.min_query_count = 1\n*.Server.target_qps = 0.001\n*.*.max_duration = 1\n"
LINE = ':::MLLOG {"key": "%s", "value": %s, "time_ms": 0.1, "metadata": {"is_error": false}}\n'


def run(folder, monkeypatch, conf, **options):
    """Run LoadGen with the settings `conf` and write its logs into `folder`."""
    monkeypatch.setenv("LOG_PATH", str(folder))
    (folder / "user.conf").write_text(conf)
    monkeypatch.chdir(folder)
    run_loadgen(*loadgen_settings(RunOptions(**options)))


VALUES = [
    ("inf", math.inf),
    ("-inf", -math.inf),
    ("nan", math.nan),
    ("-nan", math.nan),
    ("-1.5", -1.5),
    ('"inf"', "inf"),
    ('"a \\"value\\": inf, b"', 'a "value": inf, b'),
    ("true", True),
]


@pytest.mark.parametrize("text, value", VALUES)
def test_values_that_are_not_finite_are_read(tmp_path, text, value):
    (tmp_path / DETAIL_LOG).write_text(LINE % ("result", text))
    (found,) = read_detail_log(tmp_path).values()
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize("text", ["infinite", "nano", "Inf", "1e", "inf inf"])
def test_other_values_are_damage(tmp_path, text):
    (tmp_path / DETAIL_LOG).write_text(LINE % ("result", text))
    with refused(DETAIL_LOG, "line 1 is damaged"):
        read_detail_log(tmp_path)


def test_a_server_run_of_one_query_for_which_loadgen_logs_nan_has_a_verdict_and_a_report(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, ONE_QUERY, scenario="Server")
    assert '"value": -nan' in (tmp_path / DETAIL_LOG).read_text()
    log = read_detail_log(tmp_path)
    assert math.isnan(log["result_scheduled_samples_per_sec"])
    assert verdict("Server", log).startswith(f"{log['result_validity']}: Server throughput ")
    assert write_report([str(tmp_path)], str(tmp_path))


def test_an_accuracy_run_for_which_loadgen_logs_inf_is_read(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "*.*.target_latency = 1e-310", scenario="SingleStream", accuracy=True)
    assert read_detail_log(tmp_path)["effective_target_qps"] == math.inf


@pytest.mark.parametrize(
    "scenario, value", [("Server", "inf"), ("Server", "-nan"), ("Offline", "inf"), ("SingleStream", "-nan")]
)
def test_no_figure_that_is_not_finite_damages_a_report(tmp_path, monkeypatch, scenario, value):
    run(tmp_path, monkeypatch, SHORT_RUNS, scenario=scenario)
    lines = [replace_number(line, value) for line in (tmp_path / DETAIL_LOG).read_text().splitlines()]
    assert sum(f'"value": {value}' in line for line in lines) > 10
    (tmp_path / DETAIL_LOG).write_text("".join(f"{line}\n" for line in lines))
    page = write_report([str(tmp_path)], str(tmp_path))
    assert f"is {value.strip('-')}, expected a number" in Path(page).read_text(encoding="utf-8")


def replace_number(line, value):
    """Return a line of a detail log with `value` instead of a result or target that is a number."""
    key, text = (line.partition(f'"{name}": ')[2].partition(", ")[0] for name in ("key", "value"))
    if not key.startswith(('"result_', '"effective_target')) or text.startswith('"'):
        return line
    return line.replace(f'"value": {text}', f'"value": {value}', 1)
