"""Write a report: one page of tables and charts on one run or several. template.html is its layout and text."""

import os
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np
from matplotlib import rc_context

import config
from loadgen_logs import primary_metric, timestamp
from tools.report.plots import STYLE, draw_comparison, draw_run, number
from tools.report.read import OFFICIAL_MS, Answer, Form, Paths, Run, read_run, run_names

MAX_ANSWERS = 20  # of the worst answers that the page shows
# fmt: off
# Settings and counts of a performance run: (label, key in LoadGen's detail log, divisor, unit).
SETTINGS = (
    ("queries", "result_query_count", 1, ""), ("samples per query", "effective_samples_per_query", 1, ""),
    ("minimum duration", "effective_min_duration_ms", 1e3, " s"),
    ("minimum query count", "effective_min_query_count", 1, ""),
    ("target_qps", "effective_target_qps", 1, " samples/s"),
    ("target latency", "effective_target_latency_ns", 1e6, " ms"),
    ("queries over the target latency", "result_overlatency_query_count", 1, ""),
)
# record.json's keys and their labels.
SYSTEM = {
    "backend": "backend", "dtype": "dtype", "batch_tokens": "batch size (tokens)", "workers": "concurrency",
    "model": "model", "model_md5": "model MD5", "dataset": "data set", "vocab": "vocabulary", "processor": "processor",
    "cores": "cores", "gpu": "GPU", "memory_bytes": "memory", "system": "operating system", "revision": "git revision",
    "same_bytes_in_every_batch": "same bytes in every batch", "command": "command", "python": "Python",
}
# fmt: on


def latencies(run: Run) -> dict[str, str]:
    """Return the latency distribution that LoadGen logged: {label: latency}."""
    query, percentile = ("_query", "percentile_per_query") if run.scenario == "MultiStream" else ("", "percentile")
    keys = {"min": f"result_min{query}_latency_ns", "mean": f"result_mean{query}_latency_ns"}
    keys |= {f"p{share:g}": f"result_{share:.2f}_{percentile}_latency_ns" for share in (50, 90, 95, 97, 99, 99.9)}
    keys["max"] = f"result_max{query}_latency_ns"
    return {label: f"{number(run.log[key] / 1e6)} ms" for label, key in keys.items() if key in run.log}


def settings(run: Run) -> dict[str, Any]:
    """Return the settings that LoadGen logged: {label: value}."""
    found = {"scenario": run.scenario, "mode": run.log["effective_test_mode"], "started": run.log.get("test_datetime")}
    for label, key, divisor, unit in () if run.accuracy else SETTINGS:
        if run.log.get(key) or (key in run.log and key.startswith("result_")):  # a setting of 0 does not apply
            found[label] = number(run.log[key] / divisor, 9) + unit
    found |= {"available samples": run.log.get("qsl_reported_total_count"), "LoadGen": run.log.get("loadgen_version")}
    return {label: value for label, value in found.items() if value is not None}


def system(run: Run) -> dict[str, str]:
    """Return what record.json says of the system, the model and the versions: {label: value}."""
    found = {label: run.record.get(key) for key, label in SYSTEM.items()}
    found["memory"] = found["memory"] and f"{number(found['memory'] / 2**30)} GiB"
    found["command"] = " ".join(run.record.get("command", []))
    found |= run.record.get("libraries", {}) | run.record.get("variables", {})
    return {label: str(value) for label, value in found.items() if value or value is False}


def compare(runs: list[Run], describe: Callable[[Run], dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Return rows (label, [value of each run], whether the values differ) of the tables that `describe` returns."""
    tables = [describe(run) for run in runs]
    labels = dict.fromkeys(label for table in tables for label in table)
    rows = [(label, [str(table.get(label, "–")) for table in tables]) for label in labels]
    return [(label, values, len(set(values)) > 1) for label, values in rows]


def worst_answers(run: Run) -> tuple[list[Answer], int]:
    """Return (up to MAX_ANSWERS of the worst answers at even steps through them, how many there are)."""
    wrong = sorted((answer for answer in run.answers if not answer.exact), key=lambda answer: answer.f1)
    worst = [answer for answer in wrong if answer.f1 == 0] or wrong  # without a correct word, or else all
    steps = np.linspace(0, len(worst) - 1, min(MAX_ANSWERS, len(worst))).astype(int)
    return [worst[step] for step in steps], len(worst)


def write_report(folders: list[str], out: str, given: Paths = (None, None), form: Form = ("float32", False)) -> str:
    """Write report.html and its charts on the log folders into the folder `out`; return its path. Raises UserError."""
    runs = [read_run(folder, name, given, form) for folder, name in zip(folders, run_names(folders))]
    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    functions = (primary_metric, latencies, settings, system, compare, worst_answers, number)
    environment.globals.update({function.__name__: function for function in functions}, official_ms=OFFICIAL_MS)
    path = os.path.join(out, "report.html")
    with config.atomic_write(path, "name another folder with --out") as file, rc_context(STYLE):
        charts = [list(draw_run(run, out, f"{place}-" if len(runs) > 1 else "")) for place, run in enumerate(runs, 1)]
        content = {"runs": runs, "charts": charts, "comparison": list(draw_comparison(runs, out))}
        environment.get_template("template.html").stream(content, written=timestamp()).dump(file, "utf-8")
    return path
