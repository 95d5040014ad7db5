"""A tree of results without a fault, and changes that break a rule: for the tests of tools/submission --check."""

import hashlib
import json
import shutil

from tools.submission.check import FIELDS, RULES, SCENARIOS, scenario_folders, seeds, source_folder

SCORE = '{{"exact_match": 80.0, "f1": {}}}\n'
AUDIT = {f"effective_{name}": value for name, value in RULES["test01"]["audit"].items()}
NO_AUDIT = dict.fromkeys(AUDIT, 0)


def detail_log(**values):
    entries = [{"key": key, "value": value, "metadata": {"is_error": False}} for key, value in values.items()]
    return "".join(f":::MLLOG {json.dumps(entry)}\n" for entry in entries)


def scenario_files(scenario, folders, version):
    """Return the files of a scenario without a fault, in the `Folders` given: {path: text}."""
    logged = {"effective_scenario": scenario, **{f"effective_{name}": seed for name, seed in seeds(version).items()}}
    accuracy = logged | {"effective_test_mode": "AccuracyOnly", "effective_accuracy_sample_count": 10833}
    performance = {
        **logged,
        "effective_test_mode": "PerformanceOnly",
        "effective_min_duration_ms": 600_000,
        "effective_performance_sample_count": 10833,
        "effective_samples_per_query": 24576,
        "result_query_count": 1024,
        "result_validity": "VALID",
        "result_samples_per_second": 100,
        "early_stopping_latency_ss": 5_000_000,
    }
    logs = {
        "accuracy": detail_log(**accuracy, **NO_AUDIT),
        "performance": detail_log(**performance, **NO_AUDIT),
        "TEST01": detail_log(**performance, **AUDIT),
    }
    return {
        **{f"{folders.logs(kind)}/mlperf_log_detail.txt": text for kind, text in logs.items()},
        **{f"{folders.logs(kind)}/mlperf_log_summary.txt": "A summary.\n" for kind in logs},
        f"{folders.measurements}/user.conf": "*.*.min_duration = 600000\n",
        f"{folders.measurements}/README.md": "# How to run it\n",
        f"{folders.measurements}/measurements.json": json.dumps(dict.fromkeys(FIELDS["measurements"], "fp32")),
        f"{folders.results}/accuracy/mlperf_log_accuracy.json": f"[{4095 * 'a'}\n\n...\n\n{4095 * 'b'}]",
        f"{folders.results}/accuracy/accuracy.txt": f"{SCORE.format(90)}hash={64 * 'a'}\n",
        f"{folders.compliance}/TEST01/verify_accuracy.txt": "TEST PASS\n",
        f"{folders.compliance}/TEST01/verify_performance.txt": "TEST PASS\n",
    }


def valid_tree(version="v6.1", division="closed"):
    """Return a tree of `version` without a fault: {path: text}."""
    top = f"{division}/Someone"
    fields = dict.fromkeys(FIELDS["required"] + FIELDS["optional"], "N/A")
    fields |= {"division": division, "submitter": "Someone", "status": "available", "system_type": "edge"}
    files = {
        f"{top}/systems/machine.json": json.dumps(fields),
        f"{source_folder(version, top, 'bert-99')}/run.py": "# code\n",
    }
    for scenario in SCENARIOS:
        files |= scenario_files(scenario, scenario_folders(version, top, "machine", "bert-99", scenario), version)
    return files


def write_tree(folder, files):
    """Write {path: text} into `folder` and return it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Changes of a file or folder.


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    path.write_text("")


def rename(name):
    return lambda path: path.rename(path.with_name(name))


def write(text):
    return lambda path: path.write_text(text)


def replace(old, new):
    def change(path):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def log(**values):
    """Give entries of a detail log other values: the last value of a key counts."""
    return lambda path: path.write_text(path.read_text() + detail_log(**values))


def fields(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))
