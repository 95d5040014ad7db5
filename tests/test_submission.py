"""submission.py: sets of the demo's model made with the real LoadGen, TEST01, the check of a tree by each of its rules."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO_ENV, LIMIT_S, ROOT, fails

from submission import settings, verify_accuracy, verify_performance
from submission_check import AUDIT, OPTIONAL, REQUIRED, SAMPLES, SEEDS, check

SCENARIOS = ("Offline", "SingleStream")
PLAN = f"""
version = "v6.1"
division = "open"
benchmark = "bert-99"
submitter = "Someone"
system_name = "demo-machine"
backend = "pytorch"
dtype = "fp32"
model = "{DEMO_ENV['ML_MODEL_FILE_WITH_PATH']}"
dataset = "{DEMO_ENV['DATASET_FILE']}"
vocab = "{DEMO_ENV['VOCAB_FILE']}"
user_conf = "user.conf"
retraining = "no"
weight_transformations = "none"
[system]
system_type = "edge"
status = "available"
host_memory_configuration = "N/A"
host_storage_type = "SSD"
host_networking = "Ethernet"
host_network_card_count = "1"
host_networking_topology = "N/A"
cooling = "air"
"""
CONF = """
*.*.min_duration = 300
*.*.min_query_count = 64
*.Offline.target_qps = 2000
*.SingleStream.target_latency = 5
"""
RESULTS = "open/Someone/results/demo-machine/bert-99"


def submission(folder, *args, **changes):
    """submission.py in `folder`; `changes` are made to plan.toml before: name=value of its first part."""
    text = PLAN
    for name, value in changes.items():
        text, count = re.subn(rf'^{name} = .*$', f'{name} = "{value}"', text, flags=re.MULTILINE)
        assert count == 1
    (folder / "plan.toml").write_text(text)
    return subprocess.run([sys.executable, ROOT / "submission.py", *(args or ["plan.toml"])], cwd=folder,
                          capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(A folder in which submission.py has made a set of the demo's model in the open division, how that ended)."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "user.conf").write_text(CONF)
    result = submission(folder)
    assert "written" in result.stdout, result.stderr
    return folder, result


@pytest.fixture
def again(made, tmp_path):
    """A copy of that folder."""
    folder = tmp_path / "copy"
    shutil.copytree(made[0], folder)
    return folder


def run_folder(folder, scenario, kind):
    found, = (folder / "build/submission-runs").glob(f"{scenario}-{kind}-*")
    return found


def change_log(path, **values):
    """Give entries of a detail log other values; an entry that is not there is added."""
    lines = path.read_text().splitlines()
    for key, value in values.items():
        entries = [number for number, line in enumerate(lines) if f'"key": "{key}"' in line]
        entry = json.loads(lines[entries[-1] if entries else -1].removeprefix(":::MLLOG ")) | {"key": key, "value": value}
        line = f":::MLLOG {json.dumps(entry)}"
        if entries:
            lines[entries[-1]] = line
        else:
            lines.append(line)
    path.write_text("\n".join(lines) + "\n")


def test_one_command_makes_all_that_mlperf_looks_for(made):
    folder, result = made
    top = folder / "build/submission/open/Someone"
    found = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    logs = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
    wanted = {"systems/demo-machine.json"} | {
        f"results/demo-machine/bert-99/{scenario}/{name}" for scenario in SCENARIOS for name in
        ("measurements.json", "user.conf", "README.md", "accuracy/accuracy.txt", "accuracy/mlperf_log_accuracy.json",
         "TEST01/verify_accuracy.txt", "TEST01/verify_performance.txt", *(f"accuracy/{name}" for name in logs),
         *(f"performance/run_1/{name}" for name in logs), *(f"TEST01/performance/run_1/{name}" for name in logs))}
    assert {name for name in found if not name.startswith("src/")} == wanted
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in found if name.startswith("src/")} == {f"src/{name}" for name in tracked}
    assert result.returncode == 1  # a short run of a small set is complete, but nothing to hand in
    for line in result.stdout.splitlines():
        if line.startswith("build/submission/"):
            assert re.search("min_duration|sample_count|result_query_count|performance .* is not within", line), line


def test_the_accuracy_is_the_runs_and_its_log_is_hashed_whole_and_truncated(made, script):
    folder, _ = made
    for scenario in SCENARIOS:
        accuracy = folder / "build/submission" / RESULTS / scenario / "accuracy"
        log = run_folder(folder, scenario, "accuracy") / "mlperf_log_accuracy.json"
        line = script("accuracy-squad.py", "--log_file", log).stdout.splitlines()[-1]
        digest = hashlib.sha256(log.read_bytes()).hexdigest()
        assert (accuracy / "accuracy.txt").read_text() == f"{line}\nhash={digest}\n"
        text = log.read_text()
        assert (accuracy / "mlperf_log_accuracy.json").read_text() == f"{text[:4096]}\n\n...\n\n{text[-4096:]}"


def test_the_system_is_described_from_machine_and_plan(made):
    folder, _ = made
    fields = json.loads((folder / "build/submission/open/Someone/systems/demo-machine.json").read_text())
    assert set(fields) == set(REQUIRED + OPTIONAL)
    assert fields["framework"].startswith("PyTorch 2") and fields["accelerator_model_name"] == "N/A"
    assert (fields["cooling"], fields["submitter"], fields["division"]) == ("air", "Someone", "open")
    with open("/proc/meminfo", encoding="ascii") as file:
        kilobytes = int(file.readline().split()[1])
    assert fields["host_memory_capacity"] == f"{kilobytes / 2**20:.0f} GiB"
    assert fields["host_processor_model_name"] in Path("/proc/cpuinfo").read_text()


def test_finished_runs_are_kept_and_a_half_finished_one_is_made_anew(made, again):
    detail = run_folder(again, "SingleStream", "performance") / "mlperf_log_detail.txt"
    detail.write_text(detail.read_text()[:-1000])
    cut = run_folder(again, "Offline", "accuracy") / "mlperf_log_accuracy.json"
    cut.write_text(cut.read_text()[:-1000])
    result = submission(again)
    assert "written" in result.stdout, result.stderr
    said = [line for line in result.stderr.splitlines() if "submission-runs" in line]
    for scenario in SCENARIOS:
        for kind in ("accuracy", "performance", "TEST01"):
            words = [line.split(": ")[1] for line in said if f"{scenario}-{kind}-" in line]
            broken = (scenario, kind) in (("SingleStream", "performance"), ("Offline", "accuracy"))
            assert words == (["half finished, thrown away", "running"] if broken else ["finished before, kept"])
    responses = [{entry["qsl_idx"]: entry["data"] for entry in json.loads(path.read_text())}  # in any order
                 for path in (cut, made[0] / cut.relative_to(again))]
    assert responses[0] == responses[1]


def test_other_settings_or_another_model_are_other_runs(again):
    (again / "user.conf").write_text(CONF.replace("target_latency = 5", "target_latency = 6"))
    shutil.copytree(ROOT / "demo/model", again / "model")
    result = submission(again)
    said = [line for line in result.stderr.splitlines() if "submission-runs" in line]
    assert ["kept" in line for line in said] == [True] * 3 + [False] * 3, said
    with open(again / "model/config.json", "a", encoding="ascii") as file:
        file.write("\n")
    (again / "user.conf").write_text("no such line\n")
    result = submission(again, model="model")
    assert "Offline-accuracy" in result.stderr and "kept" not in result.stderr
    fails(result, "user.conf", "run.log")


def test_an_interrupted_set_ends_its_run_and_throws_it_away_later(again):
    (again / "user.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 60000"))
    process = subprocess.Popen([sys.executable, ROOT / "submission.py", "plan.toml"], cwd=again, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while "running Offline, performance" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)  # run.py listens to signals a moment after it says so
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    log, = (path for path in (again / "build/submission-runs").glob("Offline-performance-*/run.log")
            if not (path.parent / "run.json").exists())
    assert "terminated" in log.read_text()
    process = subprocess.Popen([sys.executable, ROOT / "submission.py", "plan.toml"], cwd=again, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    lines = []
    while not lines or "running Offline, performance" not in lines[-1]:
        lines.append(process.stderr.readline())
    process.terminate()
    process.communicate(timeout=30)
    assert any("Offline-accuracy" in line and "kept" in line for line in lines)
    assert any(log.parent.name in line and "half finished, thrown away" in line for line in lines)


def test_the_closed_division_is_refused_with_every_reason_and_the_open_offered(again):
    change_log(run_folder(again, "Offline", "performance") / "mlperf_log_detail.txt", result_validity="INVALID")
    result = submission(again, division="closed", benchmark="bert-99.9")
    assert result.returncode == 1 and not (again / "build/submission").exists()
    closed = "build/submission/closed/Someone/results/demo-machine/bert-99.9/Offline"
    detail = "mlperf_log_detail.txt"
    for line in (f"performance/run_1/{detail}: result_validity is INVALID, not VALID",
                 f"performance/run_1/{detail}: effective_min_duration_ms is 300, not 600000 or more",
                 f"accuracy/{detail}: effective_accuracy_sample_count is 334, not 10833",
                 "accuracy/accuracy.txt: F1 90.560 is under bert-99.9's target 90.783"):
        assert f"{closed}/{line}" in result.stdout.splitlines()
    assert 'division = "open"' in result.stdout.splitlines()[-1]


def test_v5_1_has_its_code_under_the_benchmark(again):
    assert "written" in submission(again, version="v5.1").stdout
    top = again / "build/submission/open/Someone"
    assert (top / "code/bert-99/run.py").is_file() and not (top / "src").exists()


def test_test01_passes_byte_for_byte_with_the_audits_settings(made):
    folder, _ = made
    for scenario in SCENARIOS:
        accuracy, test = (run_folder(folder, scenario, kind) for kind in ("accuracy", "TEST01"))
        assert "720381539243781796" in (test / "mlperf_log_detail.txt").read_text()
        verdict = verify_accuracy(accuracy, test)
        assert "\nTEST PASS\n" in verdict
        assert int(re.search("num_perf_log_entries = (.*)", verdict)[1]) >= 64
        tree = folder / "build/submission" / RESULTS / scenario / "TEST01"
        assert (tree / "verify_accuracy.txt").read_text() == verdict
        assert not (tree / "accuracy").exists()


def test_one_altered_byte_fails_test01_and_brings_both_scores(again):
    log = run_folder(again, "SingleStream", "TEST01") / "mlperf_log_accuracy.json"
    entries = json.loads(log.read_text())
    data = entries[7]["data"]
    entries[7]["data"] = ("1" if data[0] == "0" else "0") + data[1:]
    log.write_text(json.dumps(entries))
    assert "\nTEST FAIL\n" in verify_accuracy(run_folder(again, "SingleStream", "accuracy"), log.parent)
    assert "written" in submission(again).stdout
    test01 = again / "build/submission" / RESULTS / "SingleStream/TEST01"
    assert "TEST FAIL" in (test01 / "verify_accuracy.txt").read_text()
    baseline, compliance = ((test01 / f"accuracy/{name}_accuracy.txt").read_text() for name in
                            ("baseline", "compliance"))
    assert baseline.startswith('{"exact_match"') and compliance.startswith('{"exact_match"')
    assert hashlib.sha256(log.read_bytes()).hexdigest() in (test01 / "accuracy/accuracy.txt").read_text()
    assert (test01 / "accuracy/mlperf_log_accuracy.json").stat().st_size < 10240


def test_a_test01_that_logged_nothing_or_other_samples_fails(again):
    accuracy, test = (run_folder(again, "Offline", kind) for kind in ("accuracy", "TEST01"))
    log = test / "mlperf_log_accuracy.json"
    entries = json.loads(log.read_text())
    entries[0]["qsl_idx"] = 400
    log.write_text(json.dumps(entries))
    assert "TEST FAIL" in verify_accuracy(accuracy, test)
    log.write_text("[]")
    assert "TEST FAIL" in verify_accuracy(accuracy, test)


@pytest.mark.parametrize("factor, verdict", [(0.91, "PASS"), (1.09, "PASS"), (0.89, "FAIL"), (1.11, "FAIL")])
def test_test01s_performance_is_to_be_within_10_percent(again, factor, verdict):
    for scenario, key, unit in (("Offline", "result_samples_per_second", 1), ("SingleStream", "early_stopping_latency_ss", 1e6)):
        performance, test = (run_folder(again, scenario, kind) for kind in ("performance", "TEST01"))
        change_log(performance / "mlperf_log_detail.txt", **{key: 1000 * unit})
        change_log(test / "mlperf_log_detail.txt", **{key: 1000 * factor * unit})
        assert verify_performance(scenario, performance, test) == \
            f"Reference score = 1000\nTest score = {1000 * factor:g}\nTEST {verdict}\n"


def test_only_a_scenarios_own_settings_count_for_its_runs(tmp_path):
    (tmp_path / "user.conf").write_text("# a comment\n*.Server.target_qps = 1\n*.*.min_duration = 3 # ms\n"
                                        "bert.Offline.target_qps = 0.5\n")
    assert settings(tmp_path / "user.conf", "Offline") == ["*.*.min_duration = 3", "bert.Offline.target_qps = 0.5"]
    assert settings(tmp_path / "user.conf", "SingleStream") == ["*.*.min_duration = 3"]


@pytest.mark.parametrize("changes, words", [
    ({"submitter": "", "cooling": "", "host_networking": "", "dtype": ""},
     ["submitter is missing or empty", "dtype is missing or empty", "host_networking, cooling"]),
    ({"submitter": "A B"}, ["submitter is 'A B'"]), ({"system_name": "../up"}, ["system_name"]),
    ({"division": "closd"}, ["closd", "open or closed"]), ({"benchmark": "bert"}, ["bert-99 or bert-99.9"]),
    ({"version": "v4.0"}, ["v4.0", "v5.1"]), ({"backend": "numpy"}, ["numpy", "pytorch"]),
    ({"model": "nowhere"}, ["model is nowhere"]), ({"user_conf": "nowhere.conf"}, ["nowhere.conf"]),
    ({"dtype": "int8"}, ["calibration"]), ({"cooling": 'air"\nfan = "2'}, ["fan in [system] is unknown"]),
    ({"retraining": 'no"\nseed = "2'}, ["seed is unknown"]), ({"retraining": 'no'}, ["user.conf"])])
def test_what_is_wrong_in_a_plan_is_named_at_once(tmp_path, changes, words):
    if "user.conf" not in words:
        (tmp_path / "user.conf").write_text(CONF)
    fails(submission(tmp_path, **changes), "plan.toml", *words)
    assert not (tmp_path / "build").exists()


def test_a_plan_that_is_absent_or_no_toml_is_named(tmp_path):
    fails(submission(tmp_path, "nowhere.toml"), "nowhere.toml")
    (tmp_path / "bad.toml").write_text("division: open\n")
    fails(submission(tmp_path, "bad.toml"), "bad.toml", "TOML")


def test_an_audit_conf_that_run_py_would_take_for_every_run_is_refused(tmp_path):
    for name in ("user.conf", "audit.conf"):
        (tmp_path / name).write_text(CONF)
    fails(submission(tmp_path), "audit.conf")


def test_the_example_plan_is_one_but_for_what_is_left_to_fill_in():
    result = subprocess.run([sys.executable, "submission.py", "submission.toml"], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    fails(result, "submitter", "system_name", "host_memory_configuration", "cooling")
    assert "unknown" not in result.stderr and " not " not in result.stderr.replace("does not tell", "")


def test_the_seeds_are_those_that_loadgen_ships(made):
    """The made set's runs leave them as they are."""
    log = (run_folder(made[0], "Offline", "performance") / "mlperf_log_detail.txt").read_text()
    for name, value in SEEDS.items():
        assert f'"key": "{name}", "value": {value},' in log


@pytest.fixture(scope="module")
def valid(made, tmp_path_factory):
    """A closed tree without a fault: the demo's, its logs changed to what a whole run of BERT-Large would have."""
    tree = tmp_path_factory.mktemp("valid") / "tree"
    shutil.copytree(made[0] / "build/submission/open", tree / "closed")
    top = tree / "closed/Someone"
    system = top / "systems/demo-machine.json"
    system.write_text(system.read_text().replace('"open"', '"closed"'))
    for path in top.rglob("mlperf_log_detail.txt"):
        values = {"effective_accuracy_sample_count": SAMPLES} if path.parent.name == "accuracy" else {
            "effective_min_duration_ms": 600000, "effective_performance_sample_count": SAMPLES,
            "effective_samples_per_query": 24576, "result_query_count": 1024, "result_validity": "VALID",
            "result_samples_per_second": 100, "early_stopping_latency_ss": 5_000_000}
        change_log(path, **values)
    for path in top.rglob("verify_performance.txt"):
        path.write_text("Reference score = 100\nTest score = 100\nTEST PASS\n")
    return tree


@pytest.fixture
def tree(valid, tmp_path):
    """A copy of the valid tree."""
    shutil.copytree(valid, tmp_path / "tree")
    return tmp_path / "tree"


def test_a_tree_without_a_fault_is_said_to_be_so(valid, tmp_path):
    assert check(str(valid)) == []
    result = submission(tmp_path, "--check", str(valid))
    assert result.returncode == 0 and result.stdout == f"{valid}: nothing is wrong with it\n"


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    path.write_text("")


def replace(old, new):
    def change(path):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return change


def logged(**values):
    return lambda path: change_log(path, **values)


def failed_with(f1):
    """TEST01's bytes differ; its responses score `f1`, the accuracy run's 90."""
    def change(path):
        path.write_text("TEST FAIL\n")
        folder = path.parent / "accuracy"
        shutil.copytree(path.parent.parent / "accuracy", folder)
        for name, score in (("baseline", 90), ("compliance", f1)):
            (folder / f"{name}_accuracy.txt").write_text(f'{{"exact_match": 80.0, "f1": {score}}}\n')
    return change


S = "closed/Someone/results/demo-machine/bert-99/SingleStream/"
O = "closed/Someone/results/demo-machine/bert-99/Offline/"
PERFORMANCE, TEST01, ACCURACY = (f"{name}/mlperf_log_detail.txt" for name in
                                 ("performance/run_1", "TEST01/performance/run_1", "accuracy"))
SYSTEM = "closed/Someone/systems/demo-machine.json"
SMALL = [f"{S}{name}" for name in (
    "measurements.json", "user.conf", "README.md", "accuracy/mlperf_log_summary.txt", "accuracy/mlperf_log_detail.txt",
    "accuracy/mlperf_log_accuracy.json", "accuracy/accuracy.txt", "performance/run_1/mlperf_log_summary.txt",
    "performance/run_1/mlperf_log_detail.txt", "TEST01/verify_performance.txt",
    "TEST01/performance/run_1/mlperf_log_summary.txt", "TEST01/performance/run_1/mlperf_log_detail.txt",
    "TEST01/verify_accuracy.txt")]
RULES = [
    *((path, remove, f"{path}: is missing") for path in (*SMALL, SYSTEM)),
    *((path, empty, f"{path}: is empty") for path in (*SMALL, SYSTEM)),
    (S, remove, "SingleStream: is missing"), (O, remove, "Offline: is missing"),
    (S, lambda path: shutil.copytree(path, path.parent / "Server"), "Server: is none of Offline, SingleStream"),
    ("closed/Someone/src", remove, "src: is missing"),
    ("closed/Someone/results/demo-machine/bert-99", lambda path: path.rename(path.with_name("bert-98")),
     "bert-98: is none of bert-99, bert-99.9"),
    ("closed/Someone/results/demo-machine/bert-99", remove, "demo-machine: holds no benchmark"),
    ("closed/Someone/results", remove, "results: holds no system"), ("closed/Someone", remove, "holds no submitter"),
    ("closed", remove, "holds no division"), ("closed", lambda path: path.rename(path.with_name("close")), "no division"),
    *((SYSTEM, replace(f'"{name}"', '"other"'), f"lacks {name}") for name in REQUIRED + OPTIONAL),
    (SYSTEM, lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"cooling": "", "framework": ""})),
     "empty: cooling, framework"),
    (SYSTEM, replace('"closed"', '"open"'), "division is 'open', not closed"),
    (SYSTEM, replace('"Someone"', '"Else"'), "submitter is 'Else', not Someone"),
    (SYSTEM, replace('"available"', '"soon"'), "status is 'soon'"),
    (SYSTEM, replace('"edge"', '"edge, datacenter"'), "system_type is 'edge, datacenter'"),
    (SYSTEM, lambda path: path.write_text("[]"), "not a JSON object"),
    *((f"{S}measurements.json", replace(f'"{name}"', '"other"'), f"empty or absent: {name}") for name in
      ("input_data_types", "retraining", "starting_weights_filename", "weight_data_types", "weight_transformations")),
    (f"{S}measurements.json", replace('"no"', '""'), "empty or absent: retraining"),
    (f"{S}measurements.json", replace('"fp32"', '"int8"'), "documentation/calibration.md: is missing"),
    *((f"{scenario}{PERFORMANCE}", logged(**{key: value}), f"{key} is {value}") for scenario, key, value in (
        (O, "effective_samples_per_query", 24575), (O, "effective_min_duration_ms", 599999),
        (S, "effective_min_duration_ms", 599999), (S, "result_query_count", 1023),
        (O, "effective_performance_sample_count", 10832), (S, "effective_performance_sample_count", 10832),
        (O, "result_validity", "INVALID"), (S, "result_validity", "INVALID"), (S, "effective_scenario", "Offline"),
        (S, "effective_test_mode", "AccuracyOnly"), (S, "effective_accuracy_log_sampling_target", 4096))),
    *((f"{S}{log}", logged(**{key: 5}), f"{key} is 5") for log in (PERFORMANCE, ACCURACY, TEST01) for key in SEEDS),
    *((f"{S}{log}", replace('"is_error": false, "is_warning": false, "file": "version.cc", "line_no": 53',
                            '"is_error": true, "is_warning": false, "file": "version.cc", "line_no": 53'),
       "LoadGen logged 1 errors") for log in (PERFORMANCE, ACCURACY, TEST01)),
    *((f"{S}{TEST01}", logged(**{key: value}), f"{key} is {value}") for key, value in (
        ("result_validity", "INVALID"), ("effective_min_duration_ms", 599999), ("result_query_count", 1023),
        *((f"effective_{name}", 0) for name in AUDIT))),
    *((f"{O}{ACCURACY}", logged(effective_accuracy_sample_count=value), f"effective_accuracy_sample_count is {value}")
      for value in (10832, 10834)),
    (f"{O}{ACCURACY}", lambda path: path.write_text(":::MLLOG {\n"), "cannot be read"),
    (f"{S}accuracy/accuracy.txt", replace("hash=", "hash "), "no line hash="),
    (f"{S}accuracy/accuracy.txt", replace('"f1"', '"F1"'), 'no line {"exact_match": X, "f1": Y}'),
    (f"{S}accuracy/accuracy.txt", replace("90.56", "89.96"), "F1 89.960 is under bert-99's target 89.965"),
    (f"{S}accuracy/mlperf_log_accuracy.json", lambda path: path.write_text("[" + " " * 10238 + "]"), "truncated"),
    (f"{S}accuracy/mlperf_log_accuracy.json", replace("\n\n...\n\n", "\n\n...\n"), "first and last 4096 characters"),
    (f"{S}TEST01/verify_accuracy.txt", failed_with(91), "F1 91.000 is not within 1 % of 90.000"),
    (f"{S}TEST01/verify_performance.txt", replace("PASS", "FAIL"), "verify_performance.txt: has no line TEST PASS"),
    (f"{S}{TEST01}", logged(early_stopping_latency_ss=5_501_000), "performance 5.501 ms is not within 10% of the submitted 5"),
    (f"{O}{TEST01}", logged(result_samples_per_second=89), "performance 89 samples/s is not within 10% of the submitted 100"),
    (f"{S}user.conf", lambda path: path.rename(path.with_name("user .conf")) and shutil.copy(
        path.with_name("user .conf"), path), "a space in the name"),
    (f"{S}README.md", lambda path: path.with_name("link").symlink_to(path), "a symbolic link"),
    ("closed/Someone/src", lambda path: (path / ".git").mkdir(), "a git folder"),
    ("closed/Someone/src/run.py", lambda path: os.truncate(path, 50_000_001), "50.0 MB, not 50 MB or less"),
]


@pytest.mark.parametrize("path, change, words", RULES, ids=[f"{path}: {words}" for path, _, words in RULES])
def test_a_tree_that_breaks_one_rule_is_told_so_in_one_line(tree, path, change, words):
    change(tree / path)
    faults = check(str(tree))
    assert len(faults) == 1 and words in faults[0] and "\n" not in faults[0], faults


def test_a_test01_whose_bytes_differ_needs_both_scores_and_they_must_be_near(tree):
    failed_with(90.5)(tree / S / "TEST01/verify_accuracy.txt")
    assert check(str(tree)) == []
    for name in ("accuracy.txt", "baseline_accuracy.txt", "compliance_accuracy.txt", "mlperf_log_accuracy.json"):
        path = tree / S / "TEST01/accuracy" / name
        text = path.read_text()
        path.unlink()
        assert check(str(tree)) == [f"{path}: is missing"]
        path.write_text(text)


def test_the_open_division_has_no_target_and_needs_fewer_samples(tree):
    (tree / "closed").rename(tree / "open")
    replace('"closed"', '"open"')(tree / SYSTEM.replace("closed", "open"))
    replace("90.56", "9.56")(tree / f"{S}accuracy/accuracy.txt".replace("closed", "open"))
    change_log(tree / f"{O}{PERFORMANCE}".replace("closed", "open"), effective_samples_per_query=10833)
    assert check(str(tree)) == []


def test_all_faults_of_a_tree_are_printed_one_a_line_with_status_1(tree):
    for path in (f"{S}user.conf", f"{O}measurements.json"):
        (tree / path).unlink()
    result = submission(tree.parent, "--check", "tree")
    assert result.returncode == 1
    assert result.stdout.splitlines() == [f"tree/{path}: is missing" for path in (f"{O}measurements.json", f"{S}user.conf")]
    assert submission(tree.parent, "--check", "nowhere").stdout == "nowhere: no such folder\n"
