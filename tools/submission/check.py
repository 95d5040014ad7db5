"""Find what MLPerf's submission checker would reject in a tree of results. rules.toml holds the rules."""

import json
import os
import re
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from config import UserError
from loadgen_logs import ACCURACY_LOG, DETAIL_LOG, METRICS, SUMMARY_LOG, primary_metric, read_entries

RULES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))
FIELDS: dict[str, list[str]] = RULES["fields"]
BENCHMARKS: list[str] = list(RULES["f1_target"])
SCENARIOS: list[str] = RULES["scenarios"]
# Each kind of run, and where its logs are in a scenario's folder.
LOG_FOLDERS = {"accuracy": "accuracy", "performance": "performance/run_1", "TEST01": "TEST01/performance/run_1"}
GAP = "\n\n...\n\n"  # between the two ends of a truncated accuracy log

SCORE = re.compile(r'^\{"exact_match": [\d.]+, "f1": ([\d.]+)\}$', re.MULTILINE)
HASH = re.compile(r"^hash=[0-9a-f]{64}$", re.MULTILINE)
PASS = re.compile(r"^TEST PASS$", re.MULTILINE)


def check(root: str) -> list[str]:
    """Return the faults of the tree `root`, one line each."""
    if not os.path.isdir(root):
        return [f"{root}: no such folder"]
    checker = Checker()
    checker.check_files(root)
    for division in checker.folders(root, "division", RULES["divisions"]):
        for submitter in checker.folders(os.path.join(root, division), "submitter"):
            checker.check_submitter(os.path.join(root, division, submitter), division, submitter)
    return checker.faults


def within_tolerance(submitted: float, test: float) -> bool:
    """Return whether TEST01's performance is close enough to the submitted one."""
    return bool(abs(test - submitted) <= RULES["test01"]["tolerance"] * submitted)


def read_text(path: str) -> str:
    """Return the text of a file."""
    return Path(path).read_text(encoding="utf-8")


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError or TypeError for anything else."""
    value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def read_log(path: str) -> dict[str, Any]:
    """Return a detail log as {key: value}, and the number of errors that LoadGen logged as "errors"."""
    entries = read_entries(os.path.dirname(path))
    errors = sum(entry["metadata"]["is_error"] for entry in entries)
    return {entry["key"]: entry["value"] for entry in entries} | {"errors": errors}


class Checker:
    """Collect the faults of a tree, each a line that begins with a path."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def report(self, path: str, fault: str) -> None:
        """Add a fault."""
        self.faults.append(f"{path}: {fault}")

    def read(self, path: str, reader: Callable[[str], Any] = read_text) -> Any:
        """Return `reader(path)`; report a file that is missing, empty or unreadable and return None."""
        try:
            if os.path.getsize(path):
                return reader(path)
            self.report(path, "is empty")
        except FileNotFoundError:
            self.report(path, "is missing")
        except (UserError, OSError, ValueError, TypeError, KeyError) as error:
            self.report(path, f"cannot be read ({error})")
        return None

    def folders(self, path: str, what: str, allowed: Collection[str] = ()) -> list[str]:
        """Return the names of the folders in `path`; report if there are none, and names that are not allowed."""
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
        if not names:
            self.report(path, f"contains no folder of a {what}")
        wrong = [name for name in names if allowed and name not in allowed]
        for name in wrong:
            self.report(os.path.join(path, name), f"is not a {what} ({', '.join(allowed)})")
        return [name for name in names if name not in wrong]

    def check_files(self, root: str) -> None:
        """Check the name, type and size of every file and folder."""
        for folder, names, files in os.walk(root):
            for name in names + files:
                path = os.path.join(folder, name)
                if " " in name:
                    self.report(path, "has a space in its name")
                if name == ".git":
                    self.report(path, "is a git folder")
                if os.path.islink(path):
                    self.report(path, "is a symbolic link")
                elif os.path.getsize(path) > RULES["file_bytes"]:
                    self.report(path, f"is larger than {RULES['file_bytes']} bytes")

    def check_submitter(self, path: str, division: str, submitter: str) -> None:
        """Check the folder of a submitter."""
        for system in self.folders(f"{path}/results", "system"):
            self.check_system(f"{path}/systems/{system}.json", division, submitter)
            for benchmark in self.folders(f"{path}/results/{system}", "benchmark", BENCHMARKS):
                sources = (f"{path}/src", f"{path}/code/{benchmark}")
                if not any(os.path.isdir(source) and os.listdir(source) for source in sources):
                    self.report(sources[0], f"is missing (v5.1: code/{benchmark})")
                folder = f"{path}/results/{system}/{benchmark}"
                found = self.folders(folder, "scenario", SCENARIOS)
                for scenario in SCENARIOS:
                    if scenario in found:
                        self.check_scenario(path, f"{folder}/{scenario}", division, benchmark, scenario)
                    else:
                        self.report(f"{folder}/{scenario}", "is missing")

    def check_system(self, path: str, division: str, submitter: str) -> None:
        """Check the description of a system."""
        fields = self.read(path, read_object)
        if fields is None:
            return
        if missing := [name for name in FIELDS["required"] + FIELDS["optional"] if name not in fields]:
            self.report(path, f"lacks {', '.join(missing)}")
        if empty := [name for name in FIELDS["required"] if name in fields and not fields[name]]:
            self.report(path, f"lacks a value of {', '.join(empty)}; write N/A if a field does not apply")
        for name, allowed in {"division": [division], "submitter": [submitter], **RULES["values"]}.items():
            if fields.get(name) and fields[name] not in allowed:
                self.report(path, f"{name} is {fields[name]!r}, expected {' or '.join(allowed)}")

    def check_scenario(self, submitter: str, path: str, division: str, benchmark: str, scenario: str) -> None:
        """Check the results of one scenario, in the folder `path`; `submitter` is the submitter's folder."""
        for name in ("user.conf", "README.md", *(f"{folder}/{SUMMARY_LOG}" for folder in LOG_FOLDERS.values())):
            self.read(f"{path}/{name}")
        fields = self.read(f"{path}/measurements.json", read_object)
        if fields is not None:
            if empty := [name for name in FIELDS["measurements"] if not fields.get(name)]:
                self.report(f"{path}/measurements.json", f"lacks {', '.join(empty)}")
            if fields.get("weight_data_types", "fp32") not in RULES["float_weights"]:
                self.read(f"{submitter}/documentation/calibration.md")

        logs = {}
        for kind, folder in LOG_FOLDERS.items():
            logs[kind] = log = self.read(f"{path}/{folder}/{DETAIL_LOG}", read_log)
            if log:
                self.check_log(f"{path}/{folder}/{DETAIL_LOG}", log, kind, division, scenario)
        f1, target = self.check_accuracy(f"{path}/accuracy"), RULES["f1_target"][benchmark]
        if f1 is not None and division != "open" and f1 < target:
            self.report(f"{path}/accuracy/accuracy.txt", f"F1 {f1:.3f} is below {benchmark}'s target {target}")
        self.check_test01(f"{path}/TEST01", logs, benchmark, scenario)

    def check_log(self, path: str, log: dict[str, Any], kind: str, division: str, scenario: str) -> None:
        """Check a detail log (of `read_log`); `kind` is a key of LOG_FOLDERS."""
        mode = "accuracy" if kind == "accuracy" else "performance"
        expected = {"effective_scenario": scenario, **RULES["seeds"], **RULES["expected"][mode]}
        for name, value in RULES["test01"]["audit"].items():
            expected[f"effective_{name}"] = value if kind == "TEST01" else 0
        minimum = {} if mode == "accuracy" else dict(RULES["minimum"]["performance"])
        if minimum and (scenario, division) != ("Offline", "open"):
            minimum |= RULES["minimum"][scenario]
        for name, value in expected.items():
            if log.get(name) != value:
                self.report(path, f"{name} is {log.get(name)}, expected {value}")
        for name, value in minimum.items():
            if not log.get(name, 0) >= value:
                self.report(path, f"{name} is {log.get(name)}, expected at least {value}")
        if log["errors"]:
            self.report(path, f"LoadGen logged {log['errors']} errors")

    def check_accuracy(self, folder: str) -> float | None:
        """Check an accuracy log and its accuracy.txt, and return the F1 of the latter."""
        path, limit, end = f"{folder}/{ACCURACY_LOG}", RULES["log_characters"], RULES["log_end"]
        text = self.read(path)
        if text and len(text) >= limit:
            self.report(path, f"has {len(text)} characters, expected fewer than {limit}; truncate it")
        elif text and text[end:-end] != GAP:
            try:
                json.loads(text)
            except ValueError:
                self.report(path, f"is not the first and last {end} characters of a log with ... between them")
        return self.check_score(f"{folder}/accuracy.txt", hashed=True)

    def check_score(self, path: str, hashed: bool = False) -> float | None:
        """Check a file such as accuracy.txt, which has the accuracy log's hash if `hashed`, and return its F1."""
        text = self.read(path)
        if text is None:
            return None
        if hashed and not HASH.search(text):
            self.report(path, "has no line hash=, the sha256 of the complete accuracy log")
        match = SCORE.search(text)
        if not match:
            self.report(path, 'has no line {"exact_match": X, "f1": Y}')
        return float(match[1]) if match else None

    def check_test01(self, path: str, logs: dict[str, Any], benchmark: str, scenario: str) -> None:
        """Check the compliance test; `logs` are the scenario's (of `read_log`), {kind: log}."""
        verdict = self.read(f"{path}/verify_accuracy.txt")
        if verdict and not PASS.search(verdict):
            baseline = self.check_score(f"{path}/accuracy/baseline_accuracy.txt")
            f1 = self.check_score(f"{path}/accuracy/compliance_accuracy.txt")
            self.check_accuracy(f"{path}/accuracy")
            limit = RULES["test01"]["f1_percent"][benchmark]
            if baseline and f1 is not None and abs(f1 / baseline - 1) * 100 > limit:
                fault = f"the responses differ, and F1 {f1:.3f} is not within {limit} % of {baseline:.3f}"
                self.report(f"{path}/verify_accuracy.txt", fault)
        verdict = self.read(f"{path}/verify_performance.txt")
        if not logs["performance"] or not logs["TEST01"]:
            return
        _, submitted, unit = primary_metric(scenario, logs["performance"])
        _, test, _ = primary_metric(scenario, logs["TEST01"])
        if submitted is None or test is None:
            self.report(path, f"its detail log or that of performance/run_1 has no {METRICS[scenario].keys[0]}")
        elif not within_tolerance(submitted, test):
            limit = f"{RULES['test01']['tolerance']:.0%} of the submitted {submitted:.6g}"
            self.report(path, f"performance {test:.6g} {unit} is not within {limit}")
        elif verdict and not PASS.search(verdict):
            self.report(f"{path}/verify_performance.txt", "has no line TEST PASS")
