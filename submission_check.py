"""What MLPerf's submission checker looks for in a set of BERT results: `check` says what is wrong with a tree.

submission.py writes such trees, and `python3 submission.py --check TREE` prints what `check` finds.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from config import UserError
from run import RESULTS, figure, read_detail_log

DIVISIONS = ("closed", "open", "network")
SCENARIOS = ("Offline", "SingleStream")  # BERT is a benchmark for edge systems, and these are its scenarios
TARGETS = {"bert-99": 89.965, "bert-99.9": 90.783}  # F1 in the closed division: that much of the reference's 90.874
DELTAS = {"bert-99": 1, "bert-99.9": 0.1}  # TEST01's F1 may differ by so many percent where its bytes do
SAMPLES = 10833  # features of SQuAD v1.1's validation set
OFFLINE_SAMPLES = 24576  # in the closed division
SINGLESTREAM_QUERIES = 1024
MIN_DURATION_MS = 600_000
# As in the mlperf.conf inside LoadGen 6.0.17.
SEEDS = {"effective_qsl_rng_seed": 2085463073848966840, "effective_sample_index_rng_seed": 2747215439041700203,
         "effective_schedule_rng_seed": 16159082839903944936}
AUDIT = {"accuracy_log_rng_seed": 720381539243781796, "accuracy_log_sampling_target": 4096}  # TEST01's settings
TOLERANCE = 0.1  # TEST01's performance and the submitted one
LOG_LIMIT = 10 * 1024  # bytes of an accuracy log in the tree
SHOWN = 4096  # characters of a truncated log's beginning, and of its end
GAP = "\n\n...\n\n"
FILE_LIMIT = 50_000_000  # bytes of any file
FLOATS = ("fp32", "bf16", "fp16")  # weights that need no calibration

MEASUREMENTS = ("input_data_types", "retraining", "starting_weights_filename", "weight_data_types",
                "weight_transformations")
# Fields of a system's description: those that must say something (N/A where there is none), then those that may not.
REQUIRED = (
    "division", "submitter", "system_type", "status", "system_name", "number_of_nodes", "host_processor_model_name",
    "host_processors_per_node", "host_processor_core_count", "host_memory_capacity", "host_memory_configuration",
    "host_storage_capacity", "host_storage_type", "host_networking", "host_network_card_count",
    "host_networking_topology", "accelerators_per_node", "accelerator_model_name", "accelerator_memory_capacity",
    "accelerator_host_interconnect", "accelerator_memory_configuration", "accelerator_interconnect", "cooling",
    "framework", "operating_system", "other_software_stack")
OPTIONAL = (
    "host_processor_frequency", "host_processor_caches", "host_processor_interconnect", "accelerator_frequency",
    "accelerator_interconnect_topology", "accelerator_on-chip_memories", "hw_notes", "sw_notes", "system_type_detail")
STATUS = ("available", "preview", "rdi")
SYSTEM_TYPES = ("datacenter", "edge", "datacenter,edge", "edge,datacenter")

FIGURES = re.compile(r'^\{"exact_match": [\d.]+, "f1": ([\d.]+)\}$', re.MULTILINE)
HASH = re.compile(r"^hash=[0-9a-f]{64}$", re.MULTILINE)
PASS = re.compile(r"^TEST PASS$", re.MULTILINE)

T = TypeVar("T")


def close(submitted: float, test: float) -> bool:
    """Whether TEST01's figure is as near to the submitted one as MLPerf asks."""
    return abs(test - submitted) <= TOLERANCE * submitted


def check(root: str) -> list[str]:
    """What is wrong with the tree of results `root`: a line for each fault, none where there is none."""
    faults: list[str] = []
    if not os.path.isdir(root):
        return [f"{root}: no such folder"]
    check_paths(root, faults)
    divisions = folders(root)
    if not divisions:
        faults.append(f"{root}: holds no division ({', '.join(DIVISIONS)})")
    for division in divisions:
        path = os.path.join(root, division)
        if division not in DIVISIONS:
            faults.append(f"{path}: is no division ({', '.join(DIVISIONS)})")
            continue
        if not folders(path):
            faults.append(f"{path}: holds no submitter")
        for submitter in folders(path):
            check_submitter(os.path.join(path, submitter), division, submitter, faults)
    return faults


def check_paths(root: str, faults: list[str]) -> None:
    """Links, large files, spaces and git folders anywhere in the tree."""
    for folder, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(folder, name)
            if " " in name:
                faults.append(f"{path}: a space in the name")
            if name == ".git":
                faults.append(f"{path}: a git folder")
            if os.path.islink(path):
                faults.append(f"{path}: a symbolic link")
            elif os.path.getsize(path) > FILE_LIMIT:
                faults.append(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, not {FILE_LIMIT / 1e6:.0f} MB or less")


def check_submitter(path: str, division: str, submitter: str, faults: list[str]) -> None:
    systems = folders(os.path.join(path, "results"))
    if not systems:
        faults.append(f"{path}/results: holds no system")
    for system in systems:
        check_system(os.path.join(path, "systems", f"{system}.json"), division, submitter, faults)
        benchmarks = folders(os.path.join(path, "results", system))
        if not benchmarks:
            faults.append(f"{path}/results/{system}: holds no benchmark")
        for benchmark in benchmarks:
            here = os.path.join(path, "results", system, benchmark)
            if benchmark not in TARGETS:
                faults.append(f"{here}: is none of {', '.join(TARGETS)}")
                continue
            if not any(os.path.isdir(source) and os.listdir(source)
                       for source in (os.path.join(path, "src"), os.path.join(path, "code", benchmark))):
                faults.append(f"{path}/src: is missing (in v5.1 code/{benchmark})")
            for scenario in SCENARIOS:
                if scenario not in folders(here):
                    faults.append(f"{here}/{scenario}: is missing")
            for scenario in folders(here):
                if scenario in SCENARIOS:
                    check_scenario(path, os.path.join(here, scenario), division, benchmark, scenario, faults)
                else:
                    faults.append(f"{here}/{scenario}: is none of {', '.join(SCENARIOS)}")


def check_system(path: str, division: str, submitter: str, faults: list[str]) -> None:
    """The description of a system."""
    fields = read(path, read_object, faults)
    if fields is None:
        return
    absent = [name for name in REQUIRED + OPTIONAL if name not in fields]
    empty = [name for name in REQUIRED if name in fields and not fields[name]]
    if absent:
        faults.append(f"{path}: lacks {', '.join(absent)}")
    if empty:
        faults.append(f"{path}: empty: {', '.join(empty)}; N/A where there is none")
    for name, allowed in (("division", (division,)), ("submitter", (submitter,)), ("status", STATUS),
                          ("system_type", SYSTEM_TYPES)):
        if fields.get(name) and fields[name] not in allowed:
            faults.append(f"{path}: {name} is {fields[name]!r}, not {' or '.join(allowed)}")


def check_scenario(submitter: str, path: str, division: str, benchmark: str, scenario: str,
                   faults: list[str]) -> None:
    """The results of one scenario."""
    for name in ("user.conf", "README.md", "accuracy/mlperf_log_summary.txt",
                 "performance/run_1/mlperf_log_summary.txt", "TEST01/performance/run_1/mlperf_log_summary.txt"):
        read(os.path.join(path, name), read_text, faults)

    fields = read(os.path.join(path, "measurements.json"), read_object, faults)
    if fields is not None:
        empty = [name for name in MEASUREMENTS if not fields.get(name)]
        if empty:
            faults.append(f"{path}/measurements.json: empty or absent: {', '.join(empty)}")
        if fields.get("weight_data_types", FLOATS[0]) not in FLOATS:
            read(os.path.join(submitter, "documentation", "calibration.md"), read_text, faults)

    logs = {kind: read(os.path.join(path, folder, "mlperf_log_detail.txt"), read_log, faults) for kind, folder in
            (("accuracy", "accuracy"), ("performance", "performance/run_1"), ("TEST01", "TEST01/performance/run_1"))}
    for kind, log in logs.items():
        if log:
            check_log(log, kind, division, scenario, faults)

    check_accuracy_log(os.path.join(path, "accuracy", "mlperf_log_accuracy.json"), faults)
    f1 = check_figures(os.path.join(path, "accuracy", "accuracy.txt"), True, faults)
    if f1 is not None and division != "open" and f1 < TARGETS[benchmark]:
        faults.append(f"{path}/accuracy/accuracy.txt: F1 {f1:.3f} is under {benchmark}'s target {TARGETS[benchmark]}")
    check_test01(os.path.join(path, "TEST01"), logs, benchmark, scenario, faults)


def check_log(log: dict[str, Any], kind: str, division: str, scenario: str, faults: list[str]) -> None:
    """A detail log of `read_log`; `kind` is accuracy, performance or TEST01."""
    exact = {"effective_scenario": scenario, **SEEDS,
             "effective_test_mode": "AccuracyOnly" if kind == "accuracy" else "PerformanceOnly",
             **{f"effective_{name}": value if kind == "TEST01" else 0 for name, value in AUDIT.items()}}
    least = {}
    if kind == "accuracy":
        exact["effective_accuracy_sample_count"] = SAMPLES
    else:
        exact["result_validity"] = "VALID"
        least = {"effective_min_duration_ms": MIN_DURATION_MS, "effective_performance_sample_count": SAMPLES}
        if scenario == "SingleStream":
            least["result_query_count"] = SINGLESTREAM_QUERIES
        elif division != "open":
            least["effective_samples_per_query"] = OFFLINE_SAMPLES
    for name, value in exact.items():
        if log.get(name) != value:
            faults.append(f"{log['path']}: {name} is {log.get(name)}, not {value}")
    for name, value in least.items():
        if not log.get(name, 0) >= value:
            faults.append(f"{log['path']}: {name} is {log.get(name)}, not {value} or more")
    if log["errors"]:
        faults.append(f"{log['path']}: LoadGen logged {log['errors']} errors")


def check_accuracy_log(path: str, faults: list[str]) -> None:
    """An accuracy log as it goes into a tree: whole where it is small, else truncated."""
    text = read(path, read_text, faults)
    if text is None:
        return
    if len(text) >= LOG_LIMIT:
        faults.append(f"{path}: {len(text)} characters, not under {LOG_LIMIT}; it must be truncated")
    elif text[SHOWN:-SHOWN] != GAP:
        try:
            json.loads(text)
        except ValueError:
            faults.append(f"{path}: is not the first and last {SHOWN} characters of a log with ... between")


def check_figures(path: str, hashed: bool, faults: list[str]) -> float | None:
    """The F1 in an accuracy.txt, None and a fault where there is none; `hashed`: it must have the log's hash."""
    text = read(path, read_text, faults)
    if text is None:
        return None
    if hashed and not HASH.search(text):
        faults.append(f"{path}: has no line hash=, the sha256 of the full accuracy log")
    match = FIGURES.search(text)
    if not match:
        faults.append(f'{path}: has no line {{"exact_match": X, "f1": Y}}')
    return float(match[1]) if match else None


def check_test01(path: str, logs: dict[str, Any], benchmark: str, scenario: str, faults: list[str]) -> None:
    """The compliance test; `logs` are the scenario's, of `read_log`."""
    verdict = read(os.path.join(path, "verify_accuracy.txt"), read_text, faults)
    if verdict is not None and not PASS.search(verdict):
        baseline, compliance = (check_figures(os.path.join(path, "accuracy", name), False, faults)
                                for name in ("baseline_accuracy.txt", "compliance_accuracy.txt"))
        check_figures(os.path.join(path, "accuracy", "accuracy.txt"), True, faults)
        check_accuracy_log(os.path.join(path, "accuracy", "mlperf_log_accuracy.json"), faults)
        if baseline and compliance is not None and abs(compliance / baseline - 1) * 100 > DELTAS[benchmark]:
            faults.append(f"{path}/verify_accuracy.txt: responses differ from the accuracy run's, and F1 {compliance:.3f} "
                          f"is not within {DELTAS[benchmark]} % of {baseline:.3f}")
    verdict = read(os.path.join(path, "verify_performance.txt"), read_text, faults)
    if not (logs["performance"] and logs["TEST01"]):
        return
    submitted, test = (figure(scenario, logs[kind])[1] for kind in ("performance", "TEST01"))
    unit = RESULTS[scenario][1]
    if submitted is None or test is None:
        faults.append(f"{path}: a detail log of it or of performance/run_1 has no {RESULTS[scenario][3][0]}")
    elif not close(submitted, test):
        faults.append(f"{path}: performance {test:.6g} {unit} is not within {TOLERANCE:.0%} of the submitted "
                      f"{submitted:.6g}")
    elif verdict is not None and not PASS.search(verdict):
        faults.append(f"{path}/verify_performance.txt: has no line TEST PASS")


def folders(path: str) -> list[str]:
    """The names of the folders in `path`, sorted; none where there is no such folder."""
    if not os.path.isdir(path):
        return []
    return sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))


def read(path: str, reader: Callable[[str], T], faults: list[str]) -> T | None:
    """`reader(path)`; None, and a fault, where the file is missing, empty or not what the reader wants."""
    try:
        if os.path.getsize(path):
            return reader(path)
        faults.append(f"{path}: is empty")
    except FileNotFoundError:
        faults.append(f"{path}: is missing")
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        faults.append(f"{path}: cannot be read ({error})")
    return None


def read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_object(path: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError or TypeError where the file holds anything else."""
    value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def read_log(path: str) -> dict[str, Any]:
    """A LoadGen detail log, {key: value}, and in it "path" and "errors", how many LoadGen logged."""
    errors = sum('"is_error": true' in line for line in read_text(path).splitlines())
    return {**read_detail_log(os.path.dirname(path)), "path": path, "errors": errors}
