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
TOLERANCE: float = RULES["test01"]["tolerance"]


def check(root: str) -> list[str]:
    """Return the faults of the tree `root`, one line each."""
    if not os.path.isdir(root):
        return [f"{root}: no such folder"]
    checker = Checker()
    for path in sorted(Path(root).rglob("*")):
        if " " in path.name:
            checker.report(path, "has a space in its name")
        if path.name == ".git":
            checker.report(path, "is a git folder")
        if path.is_symlink():
            checker.report(path, "is a symbolic link")
        elif path.stat().st_size > RULES["file_bytes"]:
            checker.report(path, f"is larger than {RULES['file_bytes']} bytes")
    for division in checker.folders(root, "division", RULES["divisions"]):
        for submitter in checker.folders(os.path.join(root, division), "submitter"):
            checker.check_submitter(os.path.join(root, division, submitter), division, submitter)
    return checker.faults


class Checker:
    """Collect the faults of a tree, each a line that begins with a path."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def report(self, path: str | Path, fault: str) -> None:
        """Add a fault."""
        self.faults.append(f"{path}: {fault}")

    def read(self, path: str, parse: Callable[[str], Any] = str) -> Any:
        """Return what `parse` makes of a file's text; report a missing, empty or unreadable file and return None."""
        try:
            if text := Path(path).read_text(encoding="utf-8"):
                value = parse(text)
                if parse is not json.loads or isinstance(value, dict):
                    return value
            self.report(path, "is not a JSON object" if text else "is empty")
        except FileNotFoundError:
            self.report(path, "is missing")
        except (UserError, OSError, ValueError) as error:
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
                for scenario in found:
                    self.check_scenario(path, f"{folder}/{scenario}", division, benchmark, scenario)
                for scenario in sorted(set(SCENARIOS) - set(found)):
                    self.report(f"{folder}/{scenario}", "is missing")

    def check_system(self, path: str, division: str, submitter: str) -> None:
        """Check the description of a system."""
        if (fields := self.read(path, json.loads)) is None:
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
        if (fields := self.read(f"{path}/measurements.json", json.loads)) is not None:
            if empty := [name for name in FIELDS["measurements"] if not fields.get(name)]:
                self.report(f"{path}/measurements.json", f"lacks {', '.join(empty)}")
            if fields.get("weight_data_types", "fp32") not in RULES["float_weights"]:
                self.read(f"{submitter}/documentation/calibration.md")
        logs = {kind: self.check_log(path, kind, division, scenario) for kind in LOG_FOLDERS}
        f1, target = self.check_accuracy(f"{path}/accuracy"), RULES["f1_target"][benchmark]
        if f1 is not None and division != "open" and f1 < target:
            self.report(f"{path}/accuracy/accuracy.txt", f"F1 {f1:.3f} is below {benchmark}'s target {target}")
        self.check_test01(f"{path}/TEST01", logs, benchmark, scenario)

    def check_log(self, folder: str, kind: str, division: str, scenario: str) -> dict[str, Any] | None:
        """Check a detail log in a scenario's folder and return it as {key: value}; `kind` is a key of LOG_FOLDERS."""
        path = f"{folder}/{LOG_FOLDERS[kind]}/{DETAIL_LOG}"
        if (entries := self.read(path, lambda _: read_entries(os.path.dirname(path)))) is None:
            return None
        log = {entry["key"]: entry["value"] for entry in entries}
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
        if errors := sum(entry.get("metadata", {}).get("is_error", False) for entry in entries):
            self.report(path, f"LoadGen logged {errors} errors")
        return log

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
        if (text := self.read(path)) is None:
            return None
        if hashed and not re.search("^hash=[0-9a-f]{64}$", text, re.MULTILINE):
            self.report(path, "has no line hash=, the sha256 of the complete accuracy log")
        if score := re.search(r'^\{"exact_match": [\d.]+, "f1": ([\d.]+)\}$', text, re.MULTILINE):
            return float(score[1])
        self.report(path, 'has no line {"exact_match": X, "f1": Y}')
        return None

    def check_test01(self, path: str, logs: dict[str, Any], benchmark: str, scenario: str) -> None:
        """Check the compliance test; `logs` is {key of LOG_FOLDERS: what `check_log` returned}."""
        verdict = self.read(f"{path}/verify_accuracy.txt")
        if verdict and "TEST PASS" not in verdict.splitlines():
            baseline = self.check_score(f"{path}/accuracy/baseline_accuracy.txt")
            f1 = self.check_score(f"{path}/accuracy/compliance_accuracy.txt")
            self.check_accuracy(f"{path}/accuracy")
            limit = RULES["test01"]["f1_percent"][benchmark]
            if baseline and f1 is not None and abs(f1 / baseline - 1) * 100 > limit:
                fault = f"the responses differ, and F1 {f1:.3f} is not within {limit} % of {baseline:.3f}"
                self.report(f"{path}/verify_accuracy.txt", fault)
        verdict = self.read(f"{path}/verify_performance.txt")
        if logs["performance"] is None or logs["TEST01"] is None:
            return
        _, value, unit = primary_metric(scenario, logs["performance"])
        _, test, _ = primary_metric(scenario, logs["TEST01"])
        if value is None or test is None:
            self.report(path, f"its detail log or that of performance/run_1 has no {METRICS[scenario].keys[0]}")
        elif abs(test - value) > TOLERANCE * value:
            limit = f"{TOLERANCE:.0%} of the submitted {value:.6g}"
            self.report(path, f"performance {test:.6g} {unit} is not within {limit}")
        elif verdict and "TEST PASS" not in verdict.splitlines():
            self.report(f"{path}/verify_performance.txt", "has no line TEST PASS")
