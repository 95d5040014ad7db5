"""Write a report: one page of tables and charts on one run or several. template.html is its layout and text."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import jinja2
import numpy as np
from matplotlib import rc_context
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import config
from config import UserError
from create_squad_data import load_features
from files import atomic_write
from loadgen_logs import primary_metric, timestamp
from tools.report.plots import MANY, STYLE, Chart, Curves, curves_of, draw_comparison, draw_run, number
from tools.report.published import Tables, compare_published, draw_published
from tools.report.read import OFFICIAL_MS, Answer, Form, Loader, Paths, Run, find_folders, read_run
from tools.report.values import clean

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
# Keys of Run.record and their labels.
SYSTEM = {
    "name": "system", "backend": "backend", "dtype": "dtype", "batch_tokens": "batch size (tokens)",
    "workers": "concurrency", "model": "model", "model_md5": "model MD5", "dataset": "data set", "vocab": "vocabulary",
    "processor": "processor", "cores": "cores", "gpu": "GPU", "accelerators": "accelerators", "memory": "memory",
    "system": "operating system", "revision": "git revision",
    "same_bytes_in_every_batch": "same bytes in every batch", "command": "command", "python": "Python",
}
# fmt: on


@dataclass
class Section:
    """What the page shows of a run."""

    run: Run  # without its samples and answers, which take far more memory than all that is below
    curves: Curves | None  # for the comparison
    accuracy: dict[str, str]  # a table on an accuracy run's answers, {} without a score
    worst: tuple[list[Answer], int]  # see worst_answers
    charts: Sequence[Chart] = ()
    published: Tables | None = None  # published results to compare a performance run with, and their charts
    published_charts: Sequence[Chart] = ()


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
    record = dict(run.record)
    record["command"] = " ".join(record.get("command", []))
    if memory := record.get("memory_bytes"):
        record["memory"] = f"{number(memory / 2**30)} GiB"
    found = {label: record.get(key) for key, label in SYSTEM.items()}
    found |= record.get("libraries", {}) | record.get("variables", {})
    return {label: str(value) for label, value in found.items() if value or value is False}


def results(run: Run) -> dict[str, str]:
    """Return a run's status and result, for a table of many runs: {label: value}."""
    name, value, unit = primary_metric(run.scenario, run.log)
    if run.score:
        name, value, unit = "F1", run.score["f1"], "%"
    known = value is not None and run.status != "INCOMPLETE"
    return {"scenario": run.scenario, "status": run.status, name: f"{number(value or 0, 5)} {unit}" if known else "–"}


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


def accuracy_table(run: Run) -> dict[str, str]:
    """Return the score of an accuracy run and, if its log could be scored, how many answers are right."""
    if not run.score:
        return {}
    rows = {"exact match": f"{run.score['exact_match']:.3f} %", "F1": f"{run.score['f1']:.3f} %"}
    if run.answers:
        exact = sum(answer.exact for answer in run.answers)
        wrong = sum(answer.f1 == 0 for answer in run.answers)
        rows["questions scored"] = f"{len(run.answers):,} of {run.questions:,}"
        rows["exactly correct"] = f"{exact:,}"
        rows["partly correct"] = f"{len(run.answers) - exact - wrong:,}"
        rows["no correct word"] = f"{wrong:,}"
        rows["not answered"] = f"{sum(not answer.text for answer in run.answers):,}"
    return rows


def read_section(
    folder: str, name: str, out: str, prefix: str | None, given: Paths, form: Form, load: Loader
) -> Section:
    """Return what the page shows of the log folder `folder`, with its charts drawn into the folder `out`.

    `prefix` begins the charts' names; without one there are none. Raises UserError if the run cannot be read.
    """
    run = read_run(folder, name, given, form, load)
    section = Section(run, curves_of(run), accuracy_table(run), worst_answers(run))
    if prefix is not None:
        section.charts = list(draw_run(run, out, prefix))
        section.published, section.published_charts = compare_published(run), list(draw_published(run, out, prefix))
    run.samples, run.lengths, run.answers = None, None, ()
    return section


def read_sections(
    paths: list[str], names: list[str], out: str, given: Paths, form: Form
) -> tuple[list[Section], list[str]]:
    """Return what the page shows of each log folder, and a line for each that cannot be read.

    Raises UserError if none can be read.
    """
    load = lru_cache(maxsize=2)(load_features)  # most runs have the same data set
    sections, unreadable = [], []
    # A bar if standard error is a terminal; what is logged meanwhile appears above it.
    with logging_redirect_tqdm([config.log]), tqdm(names, unit="run", disable=len(names) == 1 or None) as bar:
        for place, (name, path) in enumerate(zip(bar, paths), 1):
            prefix = None if len(names) > MANY else f"{place}-" if len(names) > 1 else ""
            try:
                sections.append(read_section(path, name, out, prefix, given, form, load))
            except UserError as error:
                unreadable.append(clean(str(error)))
    if not sections:
        raise UserError(unreadable[0])
    return sections, unreadable


def printable(value: Any) -> Any:
    """Return what the page shows of a value: foreign text only as far as it can be shown; HTML is a separate type."""
    return clean(value) if type(value) is str else value


@cache
def template() -> jinja2.Template:
    """Return the page's template."""
    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, autoescape=True, finalize=printable, **blocks)
    functions = (primary_metric, latencies, settings, system, results, compare, number)
    environment.globals.update({function.__name__: function for function in functions}, official_ms=OFFICIAL_MS)
    return environment.get_template("template.html")


def write_report(folders: list[str], out: str, given: Paths = (None, None), form: Form = ("float32", False)) -> str:
    """Write report.html and its charts on the log folders into the folder `out`; return its path.

    A folder may also be that of a submission or of several runs. Raises UserError; if some folders cannot be read, it
    does so after it wrote the page on the others.
    """
    paths, names = find_folders(folders)
    path = os.path.join(out, "report.html")
    remedy = "name another folder with --out"
    with atomic_write(path, remedy, "a report") as file, rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may have characters that matplotlib's font lacks
        sections, unreadable = read_sections(paths, names, out, given, form)
        runs = [section.run for section in sections]
        comparison = list(draw_comparison(runs, [section.curves for section in sections], out))
        content = {"sections": sections, "runs": runs, "comparison": comparison, "unreadable": unreadable}
        content |= {"many": len(runs) > MANY, "written": timestamp()}
        template().stream(content).dump(file, "utf-8")
    if unreadable:
        more = f", and {len(unreadable) - 1} more" if unreadable[1:] else ""
        raise UserError(f"wrote {path} without a run that cannot be read: {unreadable[0]}{more}")
    return path
