"""Find what MLPerf's submission checker would reject in a tree of results. rules.toml holds the rules."""

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError, log_progress, notice, printable
from files import read_toml
from loadgen_logs import ACCURACY_LOG, DETAIL_LOG, METRICS, SUMMARY_LOG, primary_metric, read_entries

RULES: dict[str, Any] = read_toml(str(Path(__file__).with_name("rules.toml")), "the rules", "restore it from git")
FIELDS: dict[str, list[str]] = RULES["fields"]
BENCHMARKS: list[str] = list(RULES["f1_target"])
VERSIONS: list[str] = list(RULES["versions"])  # the newest first
SCENARIOS: list[str] = RULES["scenarios"]
# Each kind of run, and where its logs are in a scenario's folder; TEST01's is among the compliance tests.
LOG_FOLDERS = {"accuracy": "accuracy", "performance": "performance/run_1", "TEST01": "TEST01/performance/run_1"}
GAP = "\n\n...\n\n"  # between the two ends of a truncated accuracy log
TOLERANCE: float = RULES["test01"]["tolerance"]
FIGURES = '{"exact_match": X, "f1": Y}'  # the line of accuracy.txt with the scores, two percentages


class Folders(NamedTuple):
    """Where a tree has the files of a scenario."""

    results: str
    measurements: str
    compliance: str

    def logs(self, kind: str) -> str:
        """Return the folder of the logs of a run; `kind` is a key of LOG_FOLDERS."""
        return f"{self.compliance if kind == 'TEST01' else self.results}/{LOG_FOLDERS[kind]}"


def scenario_folders(version: str, submitter: str, *names: str) -> Folders:
    """Return a scenario's folders in the folder `submitter`; `names` are its system, benchmark and scenario."""
    places = RULES["versions"][version]["folders"]
    tops = ("results", places["measurements"], places["compliance"])
    return Folders(*("/".join((submitter, top, *names)) for top in tops))


def source_folder(version: str, submitter: str, benchmark: str) -> str:
    """Return the folder of the source code in the folder `submitter`."""
    name = RULES["versions"][version]["folders"]["source"]
    return f"{submitter}/code/{benchmark}" if name == "code" else f"{submitter}/{name}"


def seeds(version: str) -> dict[str, int]:
    """Return the seeds of a version's runs by LoadGen's names."""
    return {f"{name}_rng_seed": seed for name, seed in RULES["versions"][version]["seeds"].items()}


def number(value: Any) -> float | None:
    """Return `value`, an entry of a log, if it is a finite number and not far too large; None otherwise."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if valid else None


def shown(value: Any) -> str:
    """Return a value of a JSON file for a message."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else str(value)[:80]


def check(root: str, version: str | None = None) -> list[str]:
    """Return the faults of the tree `root`, one line each, and log notices of what MLPerf does not count as a fault.

    The rules are those of `version`, one of VERSIONS; by default of the version whose seeds a log in the tree has.
    """
    if not os.path.isdir(root):
        return [f"{printable(root)}: no such folder"]
    chosen = version or find_version(root)
    reason = (
        "" if version else ", whose seeds its logs have" if chosen else ", the newest; its logs have no known seeds"
    )
    chosen = chosen or VERSIONS[0]
    known = ", ".join(VERSIONS)
    log_progress(f"{printable(root)}: checking it by the rules of {chosen}{reason} (this check knows {known})")
    checker = Checker(chosen)
    checker.check_names(root)
    for division in checker.folders(root, "division", RULES["divisions"]):
        for submitter in checker.folders(os.path.join(root, division), "submitter"):
            checker.check_submitter(os.path.join(root, division, submitter), division, submitter)
    for line in checker.notices:
        notice(line)
    return checker.faults


def find_version(root: str) -> str | None:
    """Return the version whose seeds a log in the tree `root` has, None if there is no such log."""
    places = (LOG_FOLDERS["performance"], LOG_FOLDERS["accuracy"])
    paths = [
        path for place in places for path in glob.glob(f"{glob.escape(root)}/*/*/results/*/*/*/{place}/{DETAIL_LOG}")
    ]
    for path in sorted(paths):
        _, log = Checker(VERSIONS[0]).read_log(path)
        for version in VERSIONS:
            if all(log.get(f"effective_{name}") == seed for name, seed in seeds(version).items()):
                return version
    return None


class Checker:
    """Collect the faults of a tree by the rules of a version, and notices: one line each, which begins with a path."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.faults: list[str] = []
        self.notices: list[str] = []

    def report(self, path: str | Path, fault: str) -> None:
        """Add a fault. A name or value from the tree cannot begin a new line or control a terminal."""
        self.faults.append(printable(f"{path}: {fault if len(fault) < 1000 else fault[:1000] + '…'}"))

    def read(self, path: str, parse: Callable[[str], Any] = str) -> Any:
        """Return what `parse` makes of a file's text; report a missing, empty or unreadable file and return None."""
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
                self.report(path, "is not a file")
                return None
            if status.st_size > RULES["file_bytes"]:  # reported by check_names
                return None
            if text := Path(path).read_text(encoding="utf-8"):
                value = parse(text)
                if parse is not json.loads or isinstance(value, dict):
                    return value
            self.report(path, "is not a JSON object" if text else "is empty")
        except (FileNotFoundError, NotADirectoryError):
            self.report(path, "is missing")
        except (UserError, OSError, ValueError, RecursionError) as error:  # a RecursionError by deep nesting
            self.report(path, f"cannot be read ({error})")
        return None

    def read_log(self, path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return a detail log as its entries and as {key: value}; both are empty if it cannot be read."""
        entries = self.read(path, lambda _: read_entries(os.path.dirname(path))) or []
        return entries, {entry["key"]: entry["value"] for entry in entries if isinstance(entry["key"], str)}

    def folders(self, path: str, what: str, allowed: Collection[str] = ()) -> list[str]:
        """Return the names of the folders in `path`; report if there are none, and names that are not allowed."""
        try:
            names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        except OSError:
            names = []
        if not names:
            self.report(path, f"contains no folder of a {what}")
        wrong = [name for name in names if allowed and name not in allowed]
        for name in wrong:
            self.report(os.path.join(path, name), f"is not a {what} ({', '.join(allowed)})")
        return [name for name in names if name not in wrong]

    def check_names(self, root: str) -> None:
        """Check the names, kinds and sizes of all files and folders (tools/submission/repository_checks.sh)."""
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self.report(folder, f"cannot be read ({error.strerror})")
                continue
            for entry in entries:
                if " " in entry.name:
                    self.report(entry.path, "has a space in its name")
                elif not entry.name.isprintable():
                    self.report(entry.path, "has a character in its name that cannot be printed")
                if entry.name == ".git":
                    self.report(entry.path, "is a git folder")
                if entry.is_symlink():
                    self.report(entry.path, "is a symbolic link")
                elif entry.is_dir():
                    folders.append(entry.path)
                elif not entry.is_file():
                    self.report(entry.path, "is not a file or a folder")
                elif entry.stat().st_size > RULES["file_bytes"]:
                    self.report(entry.path, f"is larger than {RULES['file_bytes']} bytes")

    def check_submitter(self, path: str, division: str, submitter: str) -> None:
        """Check the folder of a submitter."""
        for system in self.folders(f"{path}/results", "system"):
            self.check_system(f"{path}/systems/{system}.json", division, submitter)
            for benchmark in self.folders(f"{path}/results/{system}", "benchmark", BENCHMARKS):
                source = source_folder(self.version, path, benchmark)
                if not any(Path(source).glob("*")):
                    self.report(source, "is missing")
                results = f"{path}/results/{system}/{benchmark}"
                found = self.folders(results, "scenario", SCENARIOS)
                for scenario in found:
                    self.check_scenario(path, division, system, benchmark, scenario)
                for scenario in sorted(set(SCENARIOS) - set(found)):
                    self.report(f"{results}/{scenario}", "is missing")

    def check_system(self, path: str, division: str, submitter: str) -> None:
        """Check the description of a system."""
        if (fields := self.read(path, json.loads)) is None:
            return
        if missing := [name for name in FIELDS["required"] + FIELDS["optional"] if name not in fields]:
            self.report(path, f"lacks {', '.join(missing)}")
        if empty := [name for name in FIELDS["required"] if name in fields and not fields[name]]:
            self.report(path, f"lacks a value of {', '.join(empty)}; write N/A if a field does not apply")
        for name, value in fields.items():
            if isinstance(value, dict | list | bool):
                self.report(path, f"{name} is {shown(value)}, expected a text or a number")
        for name, allowed in {"division": [division], "submitter": [submitter], **RULES["values"]}.items():
            if isinstance(fields.get(name), str | int | float) and fields[name] and fields[name] not in allowed:
                self.report(path, f"{name} is {fields[name]!r}, expected {' or '.join(allowed)}")

    def check_scenario(self, submitter: str, division: str, system: str, benchmark: str, scenario: str) -> None:
        """Check the files of a scenario; `submitter` is the submitter's folder."""
        folders = scenario_folders(self.version, submitter, system, benchmark, scenario)
        for name in ("user.conf", "README.md"):
            self.read(f"{folders.measurements}/{name}")
        path = self.measurements_file(folders, system)
        if (fields := self.read(path, json.loads)) is not None:
            if empty := [name for name in FIELDS["measurements"] if not fields.get(name)]:
                self.report(path, f"lacks {', '.join(empty)}")
            if fields.get("weight_data_types", "fp32") not in RULES["float_weights"]:
                self.read(f"{submitter}/documentation/calibration.md")
        logs = {kind: self.check_log(folders, kind, division, scenario) for kind in ("accuracy", "performance")}
        f1, target = self.check_accuracy(f"{folders.results}/accuracy"), RULES["f1_target"][benchmark]
        if f1 is not None and division != "open" and f1 < target:
            fault = f"F1 {f1:.3f} is below {benchmark}'s target {target}"
            self.report(f"{folders.results}/accuracy/accuracy.txt", fault)
        test01 = Checker(self.version)
        log = test01.check_log(folders, "TEST01", division, scenario)
        test01.check_test01(f"{folders.compliance}/TEST01", logs["performance"], log, benchmark, scenario)
        if division == "open":
            self.notices += [f"{line} (the open division needs no compliance test)" for line in test01.faults]
        else:
            self.faults += test01.faults

    def measurements_file(self, folders: Folders, system: str) -> str:
        """Return the path of a scenario's measurements (get_measurement_path in MLPerf's loader.py)."""
        path = f"{folders.measurements}/measurements.json"
        if folders.measurements == folders.results:
            return path
        named = sorted(glob.glob(f"{glob.escape(f'{folders.measurements}/{system}')}*.json"))
        if not named and os.path.exists(path):
            wanted = f"{self.version} reads a file whose name begins with the system's; copy it to {system}.json"
            self.notices.append(printable(f"{path}: MLPerf's checker of {wanted}"))
        return named[0] if named else path

    def check_log(self, folders: Folders, kind: str, division: str, scenario: str) -> dict[str, Any]:
        """Check the logs of a run and return the detail log as {key: value}; `kind` is a key of LOG_FOLDERS."""
        self.read(f"{folders.logs(kind)}/{SUMMARY_LOG}")
        path = f"{folders.logs(kind)}/{DETAIL_LOG}"
        count = len(self.faults)
        entries, log = self.read_log(path)
        if len(self.faults) > count:
            return {}
        mode = "accuracy" if kind == "accuracy" else "performance"
        expected = {"effective_scenario": scenario, **RULES["expected"][mode]}
        expected |= {f"effective_{name}": seed for name, seed in seeds(self.version).items()}
        for name, value in RULES["test01"]["audit"].items():
            expected[f"effective_{name}"] = value if kind == "TEST01" else 0
        minimum = {} if mode == "accuracy" else dict(RULES["minimum"]["performance"])
        if minimum and (scenario, division) != ("Offline", "open"):
            minimum |= RULES["minimum"][scenario]
        for name, value in expected.items():
            if log.get(name) != value or isinstance(log.get(name), bool):
                self.report(path, f"{name} is {shown(log.get(name))}, expected {value}")
        for name, value in minimum.items():
            if (number(log.get(name)) or 0) < value:
                self.report(path, f"{name} is {shown(log.get(name))}, expected at least {value}")
        metadata = [entry.get("metadata", {}) for entry in entries]
        if not all(isinstance(data, dict) for data in metadata):
            self.report(path, "has an entry whose metadata is not an object")
        elif errors := sum(bool(data.get("is_error")) for data in metadata):
            self.report(path, f"LoadGen logged {errors} errors")
        return log

    def check_accuracy(self, folder: str) -> float | None:
        """Check an accuracy log and its accuracy.txt, and return the F1 of the latter."""
        f1, digest = self.check_score(f"{folder}/accuracy.txt", hashed=True)
        path, limit, end = f"{folder}/{ACCURACY_LOG}", RULES["log_characters"], RULES["log_end"]
        text = self.read(path)
        if text and len(text) >= limit:
            self.report(path, f"has {len(text)} characters, expected fewer than {limit}; truncate it")
        elif text and text[end:-end] != GAP:
            try:
                whole = isinstance(json.loads(text), list)
            except (ValueError, RecursionError):
                whole = False
            if not whole:
                self.report(path, f"is not the first and last {end} characters of a log with ... between them")
            elif digest and digest != hashlib.sha256(Path(path).read_bytes()).hexdigest():
                self.report(path, "is complete, and its sha256 is not the hash= of accuracy.txt")
        return f1

    def check_score(self, path: str, hashed: bool = False) -> tuple[float | None, str | None]:
        """Check a file such as accuracy.txt and return (its F1, its line hash=), each None if it is not valid.

        `hashed` says whether it has a hash, that of the complete accuracy log.
        """
        if (text := self.read(path)) is None:
            return None, None
        lines = text.splitlines()
        digests = [line for line in lines if line.startswith("hash=")]
        if hashed and not (len(digests) == 1 and re.fullmatch("hash=[0-9a-f]{64}", digests[0])):
            found = "no line" if not digests else f"{len(digests)} lines" if len(digests) > 1 else "a malformed line"
            self.report(path, f"has {found} hash=, expected one: the sha256 of the complete accuracy log")
        figures = [line for line in lines if re.search("exact_match|[\"']f1[\"']", line, re.IGNORECASE)]
        scores = read_figures(figures[0]) if figures else None
        if len(figures) > 1:
            self.report(path, f"has {len(figures)} lines of figures, expected one: {FIGURES}")
        elif not scores:
            self.report(path, f"has no line {FIGURES}")
        elif not all(0 <= score <= 100 for score in scores):
            self.report(path, f"has the figures {figures[0]}, expected two percentages, 0 to 100")
        else:
            return scores[1], digests[0][5:] if digests else None
        return None, None

    def check_test01(
        self, path: str, submitted: dict[str, Any], test: dict[str, Any], benchmark: str, scenario: str
    ) -> None:
        """Check the compliance test in the folder `path`; `submitted` and `test` are both runs' detail logs."""
        verdict = self.read(f"{path}/verify_accuracy.txt")
        if verdict and "TEST PASS" not in verdict.splitlines():
            baseline, _ = self.check_score(f"{path}/accuracy/baseline_accuracy.txt")
            f1, _ = self.check_score(f"{path}/accuracy/compliance_accuracy.txt")
            self.check_accuracy(f"{path}/accuracy")
            limit = RULES["test01"]["f1_percent"][benchmark]
            if baseline is not None and f1 is not None and abs(f1 - baseline) * 100 > limit * baseline:
                fault = f"the responses differ, and F1 {f1:.3f} is not within {limit} % of {baseline:.3f}"
                self.report(f"{path}/verify_accuracy.txt", fault)
        verdict = self.read(f"{path}/verify_performance.txt")
        if not submitted or not test:
            return
        runs = [{key: log[key] for key in log if number(log[key]) is not None} for log in (submitted, test)]
        (_, value, unit), (_, found, _) = (primary_metric(scenario, log) for log in runs)
        if value is None or found is None:
            self.report(path, f"its detail log or that of performance/run_1 has no {METRICS[scenario].keys[0]}")
        elif abs(found - value) > TOLERANCE * value:
            limit = f"{TOLERANCE:.0%} of the submitted {value:.6g}"
            self.report(path, f"performance {found:.6g} {unit} is not within {limit}")
        elif verdict and "TEST PASS" not in verdict.splitlines():
            self.report(f"{path}/verify_performance.txt", "has no line TEST PASS")


def read_figures(line: str) -> tuple[float, float] | None:
    """Return (exact match, F1) of a line {"exact_match": X, "f1": Y}, None if it has another form."""
    match = re.fullmatch(r'\{"exact_match": (\d{1,9}(?:\.\d+)?), "f1": (\d{1,9}(?:\.\d+)?)\}', line, re.ASCII)
    return (float(match[1]), float(match[2])) if match else None
