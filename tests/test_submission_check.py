"""tools/submission --check: a tree that breaks one rule of MLPerf's gets one line that says so."""

import os
import shutil

import pytest
from helpers import run_script
from submission_trees import (
    AUDIT,
    SCORE,
    empty,
    fields,
    log,
    remove,
    rename,
    replace,
    scenario_files,
    sha256,
    valid_tree,
    write,
    write_tree,
)

from tools.submission.check import FIELDS, LOG_FOLDERS, check, scenario_folders, seeds

TOP = "closed/Someone"
SYSTEM = f"{TOP}/systems/machine.json"
BENCHMARK = f"{TOP}/results/machine/bert-99"
SINGLE, OFFLINE = f"{BENCHMARK}/SingleStream", f"{BENCHMARK}/Offline"
ACCURACY, PERFORMANCE, TEST01 = (f"{folder}/mlperf_log_detail.txt" for folder in LOG_FOLDERS.values())
ACCURACY_LOG = "accuracy/mlperf_log_accuracy.json"


@pytest.fixture
def tree(tmp_path):
    """Return the folder of a tree without a fault."""
    return write_tree(tmp_path / "tree", valid_tree())


def test_a_tree_without_a_fault_is_said_to_have_none(tree):
    assert check(str(tree)) == []
    result = run_script("tools.submission", "--check", "tree", cwd=tree.parent)
    assert (result.returncode, result.stdout) == (0, "tree: no faults\n")


def test_all_faults_of_a_tree_are_printed_one_a_line_with_status_1(tree):
    missing = [f"{OFFLINE}/measurements.json", f"{SINGLE}/user.conf"]
    for path in missing:
        (tree / path).unlink()
    result = run_script("tools.submission", "--check", "tree", cwd=tree.parent)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [f"tree/{path}: is missing" for path in missing]
    assert check("nowhere") == ["nowhere: no such folder"]


# Changes of a tree.


def different_responses(f1):
    """Let TEST01's responses differ from the accuracy run's and score `f1`; the accuracy run's score 90."""

    def change(path):
        path.write_text("TEST FAIL\n")
        shutil.copytree(path.parent.parent / "accuracy", path.parent / "accuracy")
        for name, score in (("baseline", 90), ("compliance", f1)):
            (path.parent / f"accuracy/{name}_accuracy.txt").write_text(SCORE.format(score))

    return change


# Each path, the change of it and the words of the fault.
FOLDERS_OF_SINGLE = scenario_folders("v6.1", TOP, "machine", "bert-99", "SingleStream")
FILES = [SYSTEM, *scenario_files("SingleStream", FOLDERS_OF_SINGLE, "v6.1")]
FOLDERS = [
    (SINGLE, remove, "SingleStream: is missing"),
    (OFFLINE, remove, "Offline: is missing"),
    (
        SINGLE,
        lambda path: shutil.copytree(path, path.parent / "Server"),
        "Server: is not a scenario (Offline, SingleStream)",
    ),
    (f"{TOP}/src", remove, "src: is missing"),
    (BENCHMARK, rename("bert-98"), "bert-98: is not a benchmark (bert-99, bert-99.9)"),
    (BENCHMARK, remove, "machine: contains no folder of a benchmark"),
    (f"{TOP}/results", remove, "results: contains no folder of a system"),
    (TOP, remove, "closed: contains no folder of a submitter"),
    ("closed", remove, "tree: contains no folder of a division"),
    ("closed", rename("close"), "close: is not a division"),
    (f"{SINGLE}/user.conf", lambda path: shutil.copy(path, path.with_name("user .conf")), "has a space in its name"),
    (f"{SINGLE}/README.md", lambda path: path.with_name("link").symlink_to(path), "link: is a symbolic link"),
    (f"{TOP}/src", lambda path: (path / ".git").mkdir(), ".git: is a git folder"),
    (f"{TOP}/src/run.py", lambda path: os.truncate(path, 50_000_001), "is larger than 50000000 bytes"),
]
DESCRIPTIONS = [
    *((SYSTEM, replace(f'"{name}"', '"other"'), f"lacks {name}") for name in FIELDS["required"] + FIELDS["optional"]),
    (SYSTEM, fields(cooling="", framework=""), "lacks a value of cooling, framework"),
    (SYSTEM, fields(division="open"), "division is 'open', expected closed"),
    (SYSTEM, fields(submitter="Else"), "submitter is 'Else', expected Someone"),
    (SYSTEM, fields(status="soon"), "status is 'soon'"),
    (SYSTEM, fields(system_type="edge, datacenter"), "system_type is 'edge, datacenter'"),
    (SYSTEM, write("[]"), "not a JSON object"),
    *(
        (f"{SINGLE}/measurements.json", replace(f'"{name}"', '"other"'), f"lacks {name}")
        for name in FIELDS["measurements"]
    ),
    (f"{SINGLE}/measurements.json", fields(retraining=""), "lacks retraining"),
    (f"{SINGLE}/measurements.json", fields(weight_data_types="int8"), "documentation/calibration.md: is missing"),
]
LOGGED = [
    *((OFFLINE, PERFORMANCE, {"effective_samples_per_query": 24575}),),
    *((SINGLE, TEST01, {name: 0}) for name in AUDIT),
    *((SINGLE, PERFORMANCE, {name: value}) for name, value in AUDIT.items()),
    *((OFFLINE, ACCURACY, {"effective_accuracy_sample_count": value}) for value in (10832, 10834)),
    *((SINGLE, path, {f"effective_{name}": 5}) for path in (ACCURACY, PERFORMANCE, TEST01) for name in seeds("v6.1")),
    (SINGLE, ACCURACY, {"effective_scenario": "Offline"}),
    (SINGLE, ACCURACY, {"effective_test_mode": "PerformanceOnly"}),
    (SINGLE, PERFORMANCE, {"effective_test_mode": "AccuracyOnly"}),
    *(
        (scenario, path, {"result_validity": "INVALID"})
        for scenario in (SINGLE, OFFLINE)
        for path in (PERFORMANCE, TEST01)
    ),
    *(
        (scenario, path, {"effective_min_duration_ms": 599999})
        for scenario in (SINGLE, OFFLINE)
        for path in (PERFORMANCE, TEST01)
    ),
    *((scenario, PERFORMANCE, {"effective_performance_sample_count": 10832}) for scenario in (SINGLE, OFFLINE)),
    *((SINGLE, path, {"result_query_count": 1023}) for path in (PERFORMANCE, TEST01)),
]
LOGS = [
    *(
        (f"{scenario}/{path}", log(**values), "{} is {}, expected".format(*next(iter(values.items()))))
        for scenario, path, values in LOGGED
    ),
    *(
        (f"{SINGLE}/{path}", replace('"is_error": false', '"is_error": true'), "LoadGen logged")
        for path in (ACCURACY, PERFORMANCE, TEST01)
    ),
    (f"{OFFLINE}/{ACCURACY}", write(":::MLLOG {\n"), "cannot be read"),
    (f"{SINGLE}/{PERFORMANCE}", log(early_stopping_latency_ss=0), "has no early_stopping_latency_ss"),
    (
        f"{SINGLE}/{TEST01}",
        log(early_stopping_latency_ss=5_501_000),
        "performance 5.501 ms is not within 10% of the submitted 5",
    ),
    (
        f"{OFFLINE}/{TEST01}",
        log(result_samples_per_second=89),
        "performance 89 samples/s is not within 10% of the submitted 100",
    ),
]
TEXTS = [
    (f"{SINGLE}/accuracy/accuracy.txt", replace("hash=", "hash "), "no line hash="),
    (f"{SINGLE}/accuracy/accuracy.txt", replace('"f1"', '"F1"'), 'no line {"exact_match": X, "f1": Y}'),
    (f"{SINGLE}/accuracy/accuracy.txt", replace("90", "89.96"), "F1 89.960 is below bert-99's target 89.965"),
    (f"{SINGLE}/{ACCURACY_LOG}", write(f"[{10238 * ' '}]"), "truncate it"),
    (f"{SINGLE}/{ACCURACY_LOG}", replace("\n\n...\n\n", "\n\n...\n"), "first and last 4096 characters"),
    (f"{SINGLE}/TEST01/verify_accuracy.txt", different_responses(91), "F1 91.000 is not within 1 % of 90.000"),
    (
        f"{SINGLE}/TEST01/verify_performance.txt",
        replace("PASS", "FAIL"),
        "verify_performance.txt: has no line TEST PASS",
    ),
]
BROKEN = [
    *((path, remove, f"{path}: is missing") for path in FILES),
    *((path, empty, f"{path}: is empty") for path in FILES),
    *FOLDERS,
    *DESCRIPTIONS,
    *LOGS,
    *TEXTS,
]


@pytest.mark.parametrize("path, change, words", BROKEN, ids=[f"{path}: {words}" for path, _, words in BROKEN])
def test_a_tree_that_breaks_one_rule_has_one_fault(tree, path, change, words):
    change(tree / path)
    faults = check(str(tree))
    assert len(faults) == 1 and words in faults[0] and "\n" not in faults[0], faults


@pytest.mark.parametrize("text", ["[]\n", f"[{4000 * ' '}]"])
def test_a_short_accuracy_log_is_complete(tree, text):
    path = tree / SINGLE / ACCURACY_LOG
    path.write_text(text)
    (tree / SINGLE / "accuracy/accuracy.txt").write_text(f"{SCORE.format(90)}hash={sha256(path)}\n")
    assert check(str(tree)) == []


def test_a_quantized_model_needs_its_calibration_documented(tree):
    fields(weight_data_types="int8")(tree / SINGLE / "measurements.json")
    path = tree / TOP / "documentation/calibration.md"
    path.parent.mkdir()
    path.write_text("# Calibration\n")
    assert check(str(tree)) == []


def test_a_test01_whose_responses_differ_needs_both_scores_and_they_must_be_close(tree):
    different_responses(90.5)(tree / SINGLE / "TEST01/verify_accuracy.txt")
    assert check(str(tree)) == []
    for name in ("accuracy.txt", "baseline_accuracy.txt", "compliance_accuracy.txt", "mlperf_log_accuracy.json"):
        path = tree / SINGLE / "TEST01/accuracy" / name
        text = path.read_text()
        path.unlink()
        assert check(str(tree)) == [f"{path}: is missing"]
        path.write_text(text)


def test_the_open_division_has_no_target_and_needs_fewer_samples(tree):
    fields(division="open")(tree / SYSTEM)
    write(f"{SCORE.format(9.5)}hash={64 * 'a'}\n")(tree / SINGLE / "accuracy/accuracy.txt")
    log(effective_samples_per_query=10833)(tree / OFFLINE / PERFORMANCE)
    (tree / "closed").rename(tree / "open")
    assert check(str(tree)) == []
