"""Prepare the log folder, read LoadGen's logs (each scenario's metric, the verdict) and keep record.json beside them.

record.json holds what LoadGen does not know of a run; run.py writes it and tools/report reads it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import config
from config import UserError, log_progress
from files import lock_folder, read_json, read_text, require_utf8, write_json

if TYPE_CHECKING:  # numpy
    from backends import Backend, RunOptions

DETAIL_LOG, SUMMARY_LOG = "mlperf_log_detail.txt", "mlperf_log_summary.txt"
ACCURACY_LOG, TRACE_LOG = "mlperf_log_accuracy.json", "mlperf_log_trace.json"
# How each log ends if LoadGen could write all of it.
LOG_ENDS = {DETAIL_LOG: b"}}\n", SUMMARY_LOG: b".\n", ACCURACY_LOG: b"]\n", TRACE_LOG: b"}\n"}
RECORD = "record.json"
OUR_FILES = re.compile(r"mlperf_log_.*|record\.json|report\.html|report-.*\.png")  # LoadGen's and ours in a log folder
EARLIER = "earlier"  # the folder in a log folder that keeps the logs of earlier runs
NOT_FINITE = re.compile(r'(?<="value": )-?(inf|nan)(?=[,}])')  # as LoadGen writes such a value, which is not JSON
JSON_NAMES = {"inf": "Infinity", "-inf": "-Infinity"}  # as Python's json module reads it
DISK = "free disk space or set LOG_PATH to another folder"
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers", "tensorflow", "onnxruntime", "openvino")


class Metric(NamedTuple):
    """The primary metric of a scenario."""

    name: str
    unit: str
    scale: float  # how many of LoadGen's units make one `unit`
    keys: tuple[str, ...]  # of LoadGen's detail log; the first that has a value counts


# MLPerf counts the early-stopping estimate of a latency; a short run has none, and its percentile is used instead.
P90 = ("early_stopping_latency_ss", "result_90.00_percentile_latency_ns")
P99 = ("early_stopping_latency_ms", "result_99.00_percentile_per_query_latency_ns")
METRICS = {
    "Offline": Metric("throughput", "samples/s", 1, ("result_samples_per_second",)),
    "Server": Metric("throughput", "samples/s", 1, ("result_completed_samples_per_sec",)),
    "SingleStream": Metric("90th percentile latency", "ms", 1e6, P90),
    "MultiStream": Metric("99th percentile latency", "ms", 1e6, P99),
}


def log_settings() -> Any:
    """Return LoadGen's LogSettings: the log folder, and a trace with each sample's latency, for the report.

    Raises UserError if LoadGen cannot use the folder's name.
    """
    import mlperf_loadgen as lg

    settings = lg.LogSettings()
    require_utf8(folder := config.env("LOG_PATH", config.LOG_DIR))
    settings.log_output.outdir = folder
    settings.log_output.copy_summary_to_stdout = False  # it would break into a progress line; run.py prints it
    settings.enable_trace = True  # a thread of LoadGen's writes it
    return settings


def prepare_log_folder(folder: str) -> None:
    """Make the log folder, lock it until this process ends, and move an earlier run's logs to its folder earlier/TIME.

    They stay inside the folder: MLCommons' automation takes each folder beside it for another mode of the run, and the
    folder may be a mount point. Raises UserError.
    """
    lock_folder(folder, "run.py", remedy="set LOG_PATH to another folder")
    try:
        old = [name for name in os.listdir(folder) if OUR_FILES.fullmatch(name)]
        if old:
            when = max(os.path.getmtime(os.path.join(folder, name)) for name in old)
            name = time.strftime("%Y%m%d-%H%M%S", time.localtime(when))
            aside = os.path.join(folder, EARLIER, name)
            while os.path.exists(aside):  # two runs ended within a second
                aside += "-next"
            os.makedirs(aside)
            for name in old:
                os.replace(os.path.join(folder, name), os.path.join(aside, name))
            log_progress(f"moved the earlier run's logs to {os.path.relpath(aside)}")
    except OSError as error:
        remedy = "set LOG_PATH to another folder"
        raise UserError(f"{folder}: cannot write logs there ({error.strerror}); {remedy}") from None


def read_entries(folder: str, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the entries of LoadGen's detail log in `folder`: dicts of key, value and more.

    The last line of an unfinished run may be cut off and is then left out. Raises UserError if the log is missing or
    damaged; if `damaged` is given, a line for each damaged entry is added there instead, and the others are returned.
    """
    path = os.path.join(folder, DETAIL_LOG)
    remedy = "give the log folder of a run"
    entries = []
    text = read_text(path, "LoadGen's log", remedy, errors="strict" if damaged is None else "replace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if line.startswith(":::MLLOG "):
            try:
                line = NOT_FINITE.sub(lambda match: JSON_NAMES.get(match[0], "NaN"), line)
                entry = json.loads(line.removeprefix(":::MLLOG "))
                entry["value"]
                if not isinstance(entry["key"], str) or not isinstance(entry.get("metadata", {}), dict):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                fault = f"{path}: line {number} is damaged"
                if damaged is None:
                    raise UserError(f"{fault}; {remedy}") from None
                damaged.append(fault)
                continue
            entries.append(entry)
    return entries


def read_detail_log(folder: str) -> dict[str, Any]:
    """Return LoadGen's detail log in `folder` as {key: value}; the last value of a key counts. Raises UserError."""
    return {entry["key"]: entry["value"] for entry in read_entries(folder)}


def check_logs(folder: str) -> None:
    """Raise UserError if a log of LoadGen's is incomplete: LoadGen does not report a full disk."""
    for name, end in LOG_ENDS.items():
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                file.seek(-min(len(end), os.fstat(file.fileno()).st_size), os.SEEK_END)
                complete = file.read() == end
        except OSError as error:
            raise UserError(f"{path}: cannot read LoadGen's log ({error.strerror})") from None
        if not complete:
            raise UserError(f"{path}: LoadGen could not write all of it; {DISK}")


def primary_metric(scenario: str, log: dict[str, Any]) -> tuple[str, float | None, str]:
    """Return (name, value, unit) of the scenario's metric; the value is None if `log` (a detail log) has none."""
    metric = METRICS[scenario]
    value = next((log[key] for key in metric.keys if log.get(key)), None)
    return metric.name, value and value / metric.scale, metric.unit


def verdict(scenario: str, log: dict[str, Any], quick: bool = False) -> str:
    """Return the last line of a performance run: LoadGen's verdict (none for a `quick` run) and the primary metric."""
    name, value, unit = primary_metric(scenario, log)
    result = "not known: LoadGen logged none" if value is None else f"{value:.6g} {unit}"
    return f"{'TRIAL, no official result' if quick else log['result_validity']}: {scenario} {name} {result}"


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def revision() -> str | None:
    """Return this project's commit, with "-dirty" if files were changed; None outside a git checkout."""
    command = ["git", "-C", config.ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def timestamp() -> str:
    """Return the time now, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def new_record(options: RunOptions, backend: Backend, batch_tokens: int) -> dict[str, Any]:
    """Return the record of a run that is about to start; `batch_tokens` is the limit of a batch."""
    dataset, vocab_file = config.dataset_files()
    model, variables = backend.model_path, config.FILE_VARIABLES + config.COMPUTE_VARIABLES
    return {
        "started": timestamp(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "backend": backend.name,
        "dtype": backend.dtype or options.dtype,
        "batch_tokens": int(batch_tokens),
        "workers": backend.concurrency,
        "model": model and os.path.abspath(model),
        "dataset": os.path.abspath(dataset),
        "max_examples": options.max_examples,
        "vocab": os.path.abspath(vocab_file),
        "variables": {name: os.environ[name] for name in variables if os.environ.get(name)},
        "processor": processor(),
        "cores": config.cores(),
        "gpu": backend.gpu,
        "same_bytes_in_every_batch": backend.same_bytes,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
        "revision": revision(),
    }


def finish_record(record: dict[str, Any]) -> None:
    """Add the end of the run and the md5 of the model's weights (3 s for BERT-Large's file)."""
    from models.model_files import model_files  # not at the top, because it imports numpy

    record["finished"] = timestamp()
    if record["model"] and os.path.isfile(record["model"]):
        record["model_md5"] = model_files(record["model"]).digest("md5")


def write_record(folder: str, record: dict[str, Any]) -> None:
    """Write `record` to record.json in `folder`. Raises UserError."""
    write_json(os.path.join(folder, RECORD), record, DISK, "a run's record")


def read_record(folder: str) -> dict[str, Any]:
    """Return the record in `folder`, {} if there is none. Raises UserError if it is damaged."""
    path = os.path.join(folder, RECORD)
    if not os.path.exists(path):
        return {}
    record = read_json(path, "the run's record", "remove it to continue without")
    if isinstance(record, dict):
        return record
    raise UserError(f"{path}: the run's record is not a JSON object; remove it to continue without")
