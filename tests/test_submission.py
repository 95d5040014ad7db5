"""tools/submission: a set of the demo's model made by real runs, and what becomes of runs, plans and TEST01."""

import hashlib
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DEMO_ENV, DEMO_ONNX, ONE_THREAD, PLAN_VALUES, ROOT, refused, run_script

from tools.submission import __main__, runs, tree
from tools.submission.check import FIELDS, LOG_FOLDERS, RULES, SCENARIOS, check, seeds
from tools.submission.plan import read_plan
from tools.submission.tree import verify_accuracy, verify_performance

pytestmark = pytest.mark.slow  # six real runs

VERSION = "v6.0"  # whose seeds are not those that LoadGen has built in
VALUES = PLAN_VALUES | {"backend": "onnxruntime", "model": DEMO_ONNX, "dataset": "dev.json", "version": VERSION}
CONF = """
*.*.min_duration = 100
*.*.min_query_count = 64
*.Offline.target_qps = 2000
*.SingleStream.target_latency = 5
"""
TREE = "build/submission/open/Someone"
RESULTS = f"{TREE}/results/demo-machine/bert-99"
DETAIL_LOG, ACCURACY_LOG = "mlperf_log_detail.txt", "mlperf_log_accuracy.json"


def write_plan(folder, **changes):
    """Write the example plan, filled in for the demo and then changed, as plan.toml."""
    text = (ROOT / "tools/submission/plan.toml").read_text()
    for name, value in (VALUES | changes).items():
        text, count = re.subn(rf'^(# )?{name} = "[^"]*"', f'{name} = "{value}"', text, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "plan.toml").write_text(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (a folder in which the command made a set with six real runs, how it ended); the data set is small."""
    folder = tmp_path_factory.mktemp("made")
    dataset = json.loads(Path(DEMO_ENV["DATASET_FILE"]).read_text())
    (folder / "dev.json").write_text(json.dumps(dataset | {"data": dataset["data"][:8]}))
    (folder / "user.conf").write_text(CONF)
    write_plan(folder)
    result = run_script("tools.submission", "plan.toml", cwd=folder)
    assert "written" in result.stdout, result.stderr
    return folder, result


@pytest.fixture
def folder(made, monkeypatch):
    """Return a copy of that folder, which is the working folder; runs that are missing there are taken from `made`."""

    def execute(command, env, log):
        scenario = next(word for word in command if word.startswith("--scenario=")).removeprefix("--scenario=")
        kind = "accuracy" if "--accuracy" in command else "TEST01" if "audit" in command[-1] else "performance"
        shutil.copytree(run_folder(made[0], scenario, kind), env["LOG_PATH"], dirs_exist_ok=True)
        (Path(env["LOG_PATH"]) / runs.INPUTS).unlink()
        return "", 0

    copy = made[0].parent / "copy"
    shutil.copytree(made[0], copy)
    monkeypatch.chdir(copy)
    for name, value in ONE_THREAD.items():  # as in `made`
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "execute", execute)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture
def submit(monkeypatch, capsys, caplog):
    """Return a function that runs the command in this process: (exit status, lines printed, progress of runs)."""

    def run(folder, **changes):
        write_plan(folder, **changes)
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["submission", "plan.toml"])
        status = __main__.main()
        return status, capsys.readouterr().out.splitlines(), [text for text in caplog.messages if "runs/" in text]

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    caplog.set_level(logging.INFO, "bert")
    return run


def run_folder(folder, scenario, kind):
    (found,) = (folder / "build/submission-runs").glob(f"{scenario}-{kind}-*")
    return found


def change_log(path, **values):
    """Give entries of a detail log other values; an entry that is missing is added."""
    lines = path.read_text().splitlines()
    for key, value in values.items():
        entry = {"key": key, "value": value, "metadata": {"is_error": False}}
        lines = [line for line in lines if f'"key": "{key}"' not in line] + [f":::MLLOG {json.dumps(entry)}"]
    path.write_text("\n".join(lines) + "\n")


# The set that six real runs made.


def test_one_command_makes_all_that_mlperf_looks_for(made):
    folder, result = made
    found = {str(path.relative_to(folder / TREE)) for path in (folder / TREE).rglob("*") if path.is_file()}
    logs = ("mlperf_log_summary.txt", DETAIL_LOG)
    wanted = {"systems/demo-machine.json"} | {
        f"results/demo-machine/bert-99/{scenario}/{name}"
        for scenario in SCENARIOS
        for name in (
            "measurements.json",
            "user.conf",
            "README.md",
            "accuracy/accuracy.txt",
            f"accuracy/{ACCURACY_LOG}",
            "TEST01/verify_accuracy.txt",
            "TEST01/verify_performance.txt",
            *(f"accuracy/{name}" for name in logs),
            *(f"performance/run_1/{name}" for name in logs),
            *(f"TEST01/performance/run_1/{name}" for name in logs),
        )
    }
    assert {name for name in found if not name.startswith("src/")} == wanted
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tracked = {f"src/{name}" for name in tracked if (ROOT / name).is_file()}
    assert {name for name in found if name.startswith("src/")} == tracked
    assert result.returncode == 1  # a short run of a small set is complete, but cannot be submitted
    for line in result.stdout.splitlines():
        if line.startswith("build/submission/"):
            assert re.search("min_duration|sample_count|result_query_count", line) and "TEST01" not in line, line
    assert re.search("notice: build/submission/.*/TEST01/.*min_duration.*the open division needs no", result.stderr)
    assert re.search(r"\d\d:\d\d:\d\d     ONNX Runtime .*; warming up\n", result.stderr)  # run.py's progress


def test_the_accuracy_is_the_runs_and_its_log_is_hashed_completely_and_truncated(made, script):
    folder, _ = made
    for scenario in SCENARIOS:
        accuracy = folder / RESULTS / scenario / "accuracy"
        log = run_folder(folder, scenario, "accuracy") / ACCURACY_LOG
        score, digest = (accuracy / "accuracy.txt").read_text().splitlines()
        assert digest == f"hash={hashlib.sha256(log.read_bytes()).hexdigest()}"
        text = log.read_text()
        assert (accuracy / ACCURACY_LOG).read_text() == f"{text[:4096]}\n\n...\n\n{text[-4096:]}"
    args = ("--log_file", log, "--val_data", folder / "dev.json")
    assert score == script("accuracy-squad.py", *args).stdout.splitlines()[-1]


def test_the_system_is_described_from_machine_and_plan(made):
    fields = json.loads((made[0] / TREE / "systems/demo-machine.json").read_text())
    assert set(fields) == set(FIELDS["required"] + FIELDS["optional"])
    assert fields["framework"].startswith("ONNX Runtime 1") and fields["accelerator_model_name"] == "N/A"
    assert (fields["cooling"], fields["submitter"], fields["division"]) == ("air", "Someone", "open")
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
    assert fields["host_memory_capacity"] == f"{kilobytes / 2**20:.0f} GiB"
    assert fields["host_processor_model_name"] in Path("/proc/cpuinfo").read_text()


def test_the_readme_says_how_to_repeat_the_runs(made):
    text = (made[0] / RESULTS / "Offline/README.md").read_text()
    score = (made[0] / RESULTS / "Offline/accuracy/accuracy.txt").read_text().splitlines()[0]
    assert re.search(rf"^ONNX Runtime .*, fp32: throughput \S+ samples/s, accuracy `{score}`\.$", text, re.MULTILINE)
    assert "run.py --backend=onnxruntime --dtype=fp32 --scenario=Offline --user_conf=user.conf --accuracy\n" in text
    assert f"\n```\n{runs.AUDIT_CONFIG}```\n" in text
    for path in (ROOT / "demo/model/model.onnx", made[0] / "dev.json"):
        assert f"- {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}\n" in text


def test_every_run_has_the_seeds_of_the_plans_version(made):
    for path in (made[0] / "build").rglob(DETAIL_LOG):
        for name, value in seeds(VERSION).items():
            assert f'"key": "effective_{name}", "value": {value},' in path.read_text(), path
    conf = (made[0] / RESULTS / "Offline/user.conf").read_text()
    assert conf.startswith(CONF) and all(f"*.*.{name} = {value}\n" in conf for name, value in seeds(VERSION).items())


def test_another_version_needs_other_runs(folder, submit):
    _, lines, progress = submit(folder, version="v6.1")
    assert ["kept" in line for line in progress] == [False] * 6, progress
    assert any("effective_qsl_rng_seed is 2465351861681999779, expected 2085463073848966840" in line for line in lines)
    (folder / "user.conf").write_text(CONF + "*.*.qsl_rng_seed = 5\n")
    with refused("user.conf", "qsl_rng_seed = 5", "v6.1, sets the seeds"):
        submit(folder, version="v6.1")


def test_a_closed_tree_with_the_logs_of_whole_runs_has_no_faults(folder):
    """The demo's logs are changed to what a whole run of BERT-Large would have."""
    top = folder / "build/submission"
    (top / "open").rename(top / "closed")
    system = top / "closed/Someone/systems/demo-machine.json"
    system.write_text(system.read_text().replace('"open"', '"closed"'))
    performance = {name: value for values in RULES["minimum"].values() for name, value in values.items()}
    performance |= {
        "result_validity": "VALID",
        "result_samples_per_second": 100,
        "early_stopping_latency_ss": 5_000_000,
    }
    for path in top.rglob(DETAIL_LOG):
        change_log(path, **(RULES["expected"]["accuracy"] if path.parent.name == "accuracy" else performance))
    for path in top.rglob("verify_performance.txt"):
        path.write_text("Reference score = 100\nTest score = 100\nTEST PASS\n")
    for path in top.rglob("accuracy.txt"):
        path.write_text(path.read_text().replace('"f1": 8', '"f1": 9'))
    assert check(str(top)) == check(str(top), VERSION) == []
    log = path.parent.parent / "performance/run_1" / DETAIL_LOG
    log.write_text(log.read_text().replace('"is_error": false', '"is_error": true', 1))
    assert [fault.split(": ")[1] for fault in check(str(top))] == ["LoadGen logged 1 errors"]


# Which runs are kept, and which are made.


def test_finished_runs_are_kept_and_unfinished_ones_are_made_again(folder, submit):
    broken = ("SingleStream", "performance", DETAIL_LOG), ("Offline", "accuracy", ACCURACY_LOG)
    for scenario, kind, name in broken:
        path = run_folder(folder, scenario, kind) / name
        path.write_text(path.read_text()[:-1000])
    (run_folder(folder, "Offline", "TEST01") / runs.INPUTS).unlink()
    status, _, progress = submit(folder)
    assert status == 1 and (folder / TREE).exists()
    for scenario in SCENARIOS:
        for kind in LOG_FOLDERS:
            words = [line.split(": ")[1] for line in progress if f"{scenario}-{kind}-" in line]
            kept = (scenario, kind) not in (
                ("SingleStream", "performance"),
                ("Offline", "accuracy"),
                ("Offline", "TEST01"),
            )
            assert words == (["finished before, kept"] if kept else ["unfinished, running again"])


def test_other_settings_or_another_model_need_other_runs(folder, submit):
    (folder / "user.conf").write_text(CONF.replace("target_latency = 5", "target_latency = 6"))
    _, _, progress = submit(folder)
    assert ["kept" in line for line in progress] == [True] * 3 + [False] * 3, progress
    shutil.copytree(ROOT / "demo/model", folder / "model")
    model = folder / "model/model.onnx"
    _, _, progress = submit(folder, model=model)  # the same file, and a model may move
    assert ["kept" in line for line in progress] == [True] * 6, progress
    model.write_bytes(model.read_bytes() + b"\n")
    _, _, progress = submit(folder, model=model)
    assert ["kept" in line for line in progress] == [False] * 6, progress


# What becomes of the runs.


def test_the_closed_division_is_refused_with_every_reason_and_the_open_one_offered(folder, submit):
    change_log(run_folder(folder, "Offline", "performance") / DETAIL_LOG, result_validity="INVALID")
    status, lines, _ = submit(folder, division="closed", benchmark="bert-99.9")
    assert status == 1 and not (folder / "build/submission").exists()
    offline = "build/submission/closed/Someone/results/demo-machine/bert-99.9/Offline"
    for line in (
        f"performance/run_1/{DETAIL_LOG}: result_validity is INVALID, expected VALID",
        f"performance/run_1/{DETAIL_LOG}: effective_min_duration_ms is 100, expected at least 600000",
        f"accuracy/{DETAIL_LOG}: effective_accuracy_sample_count is 31, expected 10833",
        "accuracy/accuracy.txt: F1 88.519 is below bert-99.9's target 90.783",
    ):
        assert f"{offline}/{line}" in lines
    assert 'division = "open"' in lines[-1]


def test_a_set_without_faults_ends_with_status_0(folder, submit, monkeypatch):
    monkeypatch.setattr(__main__, "check", lambda tree, version: [])
    status, lines, _ = submit(folder)
    assert status == 0 and lines[-1] == "build/submission: complete, no faults"


def test_a_short_accuracy_log_is_not_truncated(tmp_path):
    (tmp_path / ACCURACY_LOG).write_text("[]\n")
    tree.write_accuracy(str(tmp_path / "tree"), str(tmp_path), "{}")
    assert (tmp_path / "tree" / ACCURACY_LOG).read_text() == "[]\n"


def test_v5_1_has_other_folders(folder, submit):
    _, lines, _ = submit(folder, version="v5.1")
    assert not any("is missing" in line for line in lines)
    assert (folder / TREE / "code/bert-99/run.py").is_file() and not (folder / TREE / "src").exists()
    names = {str(path.relative_to(folder / TREE)) for path in (folder / TREE).rglob("*") if path.is_file()}
    for scenario in SCENARIOS:
        place = f"demo-machine/bert-99/{scenario}"
        found = {name.replace(f"/{place}", "") for name in names if f"/{place}/" in name}
        logs = ("mlperf_log_summary.txt", DETAIL_LOG)
        assert found == {
            *(f"measurements/{name}" for name in ("measurements.json", "demo-machine.json", "user.conf", "README.md")),
            *(f"compliance/TEST01/{name}" for name in ("verify_accuracy.txt", "verify_performance.txt")),
            *(f"compliance/TEST01/performance/run_1/{name}" for name in logs),
            *(f"results/performance/run_1/{name}" for name in logs),
            *(f"results/accuracy/{name}" for name in (*logs, "accuracy.txt", ACCURACY_LOG)),
        }
    text = (folder / TREE / f"measurements/{place}/README.md").read_text()
    assert "The code is in code/bert-99/;" in text and "seeds of MLPerf v5.1" in text


def test_an_int8_tree_documents_its_calibration(folder, submit, monkeypatch):
    """The runs are fp32 ones that count as int8."""
    path = folder / "list.txt"
    path.write_text("1\n2\n")
    monkeypatch.setattr(tree, "common_backend", lambda folders, dtype: f"PyTorch 2, CPU, {dtype}")
    _, lines, _ = submit(folder, dtype="int8", calibration="list.txt", weight_transformations="static scales")
    text = (folder / TREE / "documentation/calibration.md").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert "\nstatic scales\n" in text and f"list.txt (sha256\n{digest})" in text
    assert not any("calibration.md" in line for line in lines)


def test_runs_of_several_backends_or_of_another_dtype_are_refused(folder, submit):
    with refused("submission-runs/", "ran on ONNX Runtime", "expected one backend in bf16"):
        submit(folder, dtype="bf16")
    record = next(folder.glob("build/submission-runs/Offline-TEST01-*/record.json"))
    names = [str(path) for path in folder.glob("build/submission-runs/*") if path != record.parent]
    record.write_text(json.dumps(json.loads(record.read_text()) | {"backend": "PyTorch, CPU, fp32"}))
    with refused(f"{record.parent} ran on PyTorch, CPU, fp32", "expected one backend in fp32"):
        runs.common_backend([*names, str(record.parent)], "fp32")


def test_a_tree_needs_the_git_repository_of_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "ROOT", str(tmp_path))
    with refused(str(tmp_path), "git repository"):
        tree.copy_source(str(tmp_path / "src"))
    monkeypatch.setenv("PATH", "")
    with refused(str(tmp_path), "git: No such file or directory"):
        tree.tracked_files()


# TEST01.


def test_test01_passes_byte_for_byte_with_the_audits_settings(made):
    folder, _ = made
    for scenario in SCENARIOS:
        accuracy, test = (run_folder(folder, scenario, kind) for kind in ("accuracy", "TEST01"))
        assert "720381539243781796" in (test / DETAIL_LOG).read_text()
        verdict = verify_accuracy(accuracy, test)
        assert "\nTEST PASS\n" in verdict
        assert int(re.search("num_perf_log_entries = (.*)", verdict)[1]) >= 64
        assert (folder / RESULTS / scenario / "TEST01/verify_accuracy.txt").read_text() == verdict
        assert not (folder / RESULTS / scenario / "TEST01/accuracy").exists()


def test_one_altered_byte_fails_test01_and_adds_both_scores(folder, submit):
    log = run_folder(folder, "SingleStream", "TEST01") / ACCURACY_LOG
    entries = json.loads(log.read_text())
    data = entries[7]["data"]
    entries[7]["data"] = ("1" if data[0] == "0" else "0") + data[1:]
    log.write_text(json.dumps(entries) + "\n")
    assert "\nTEST FAIL\n" in verify_accuracy(run_folder(folder, "SingleStream", "accuracy"), log.parent)
    submit(folder)
    test01 = folder / RESULTS / "SingleStream/TEST01"
    assert "TEST FAIL" in (test01 / "verify_accuracy.txt").read_text()
    baseline, compliance = (
        (test01 / f"accuracy/{name}_accuracy.txt").read_text() for name in ("baseline", "compliance")
    )
    assert baseline.startswith('{"exact_match"') and compliance.startswith('{"exact_match"')
    assert hashlib.sha256(log.read_bytes()).hexdigest() in (test01 / "accuracy/accuracy.txt").read_text()
    assert (test01 / "accuracy" / ACCURACY_LOG).stat().st_size < 10240


def test_the_baseline_is_scored_on_test01s_samples(folder):
    accuracy, test = (run_folder(folder, "SingleStream", kind) for kind in ("accuracy", "TEST01"))
    plan = read_plan("plan.toml")
    entries = json.loads((test / ACCURACY_LOG).read_text())[:20]
    (test / ACCURACY_LOG).write_text(json.dumps(entries))
    assert tree.score(plan, accuracy, samples_of=test) == tree.score(plan, test) != tree.score(plan, accuracy)


def test_a_test01_that_logged_no_or_other_samples_fails(folder):
    accuracy, test = (run_folder(folder, "Offline", kind) for kind in ("accuracy", "TEST01"))
    log = test / ACCURACY_LOG
    entries = json.loads(log.read_text())
    entries[0]["qsl_idx"] = 400
    log.write_text(json.dumps(entries))
    assert "TEST FAIL" in verify_accuracy(accuracy, test)
    log.write_text("[]")
    assert "TEST FAIL" in verify_accuracy(accuracy, test)


@pytest.mark.parametrize(
    "scenario, key, unit",
    [("Offline", "result_samples_per_second", 1), ("SingleStream", "early_stopping_latency_ss", 1e6)],
)
@pytest.mark.parametrize("factor, verdict", [(0.91, "PASS"), (1.09, "PASS"), (0.89, "FAIL"), (1.11, "FAIL")])
def test_test01s_performance_must_be_within_10_percent(tmp_path, scenario, key, unit, factor, verdict):
    performance, test = tmp_path / "performance", tmp_path / "test"
    for folder, value in ((performance, 1000), (test, 1000 * factor)):
        folder.mkdir()
        (folder / DETAIL_LOG).write_text(f':::MLLOG {{"key": "{key}", "value": {value * unit}}}\n')
    lines = f"Reference score = 1000\nTest score = {1000 * factor:g}\nTEST {verdict}\n"
    assert verify_performance(scenario, performance, test) == lines
