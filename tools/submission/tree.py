"""Write the tree of a submission from its finished runs, with the verdicts of the compliance test TEST01."""

import json
import os
import shutil
import subprocess

import numpy as np

from config import BUILD_DIR, ROOT, UserError, first_line, printable
from create_squad_data import load_features, read_vocab
from files import atomic_write, file_digest, read_json, read_text, write_json
from loadgen_logs import ACCURACY_LOG, DETAIL_LOG, SUMMARY_LOG, primary_metric, read_detail_log
from squad_eval import Logits, read_log, score_log
from tools.submission.check import (
    GAP,
    LOG_FOLDERS,
    RULES,
    SCENARIOS,
    TOLERANCE,
    Folders,
    scenario_folders,
    source_folder,
)
from tools.submission.plan import Plan, describe_system
from tools.submission.runs import AUDIT_CONFIG, common_backend, file_hashes

Runs = dict[tuple[str, str], str]  # {(scenario, key of LOG_FOLDERS): the run's folder}
TREE = f"{BUILD_DIR}/submission"
DISK, LOG_REMEDY = "free disk space", "remove the run's folder"
NEW = "a new file"  # the tree is empty at first


def write_tree(plan: Plan, runs: Runs) -> None:
    """Replace the folder TREE by the tree of finished runs."""
    backend = common_backend(list(runs.values()), plan["dtype"])
    foreign = set(os.listdir(TREE) if os.path.isdir(TREE) else ()) - set(RULES["divisions"])
    if foreign:
        raise UserError(f"{TREE}: holds {min(foreign)}, which is not a part of a submission's tree; move it away")
    shutil.rmtree(TREE, ignore_errors=True)
    top = f"{TREE}/{plan['division']}/{plan['submitter']}"
    system, benchmark = plan["system_name"], plan["benchmark"]
    write_json(f"{top}/systems/{system}.json", describe_system(plan, backend), DISK, NEW)
    source = source_folder(plan["version"], top, benchmark)
    copy_source(source)
    if plan["dtype"] == "int8":
        values = {"list": os.path.basename(plan["calibration"]), "digest": file_digest(plan["calibration"])}
        fill_template("calibration.template", f"{top}/documentation/calibration.md", plan | values)
    for scenario in SCENARIOS:
        folders = scenario_folders(plan["version"], top, system, benchmark, scenario)
        values = plan | {"scenario": scenario, "source": os.path.relpath(source, top)}
        write_scenario(folders, values, runs, backend)


def write_scenario(folders: Folders, plan: Plan, runs: Runs, backend: str) -> None:
    """Write the results of a scenario into its folders; `plan` also says the scenario and the folder of the source."""
    scenario, test01 = plan["scenario"], f"{folders.compliance}/TEST01"
    for kind in LOG_FOLDERS:
        os.makedirs(folders.logs(kind))
        for name in (SUMMARY_LOG, DETAIL_LOG):
            shutil.copyfile(f"{runs[scenario, kind]}/{name}", f"{folders.logs(kind)}/{name}")
    accuracy, performance, test = (runs[scenario, kind] for kind in LOG_FOLDERS)
    os.makedirs(folders.measurements, exist_ok=True)
    shutil.copyfile(f"{performance}/user.conf", f"{folders.measurements}/user.conf")
    measurements = {name: plan[name] for name in ("retraining", "weight_transformations")}
    measurements |= {"input_data_types": "int32", "weight_data_types": plan["dtype"]}
    measurements["starting_weights_filename"] = os.path.basename(os.path.normpath(plan["model"]))
    write_json(f"{folders.measurements}/measurements.json", measurements, DISK, NEW)
    if folders.measurements != folders.results:  # where MLPerf's checker reads the file that begins with this name
        write_json(f"{folders.measurements}/{plan['system_name']}.json", measurements, DISK, NEW)
    accuracy_score = score(plan, accuracy)
    write_accuracy(f"{folders.results}/accuracy", accuracy, accuracy_score)
    write(f"{test01}/verify_performance.txt", verify_performance(scenario, performance, test))
    verdict = verify_accuracy(accuracy, test)
    write(f"{test01}/verify_accuracy.txt", verdict)
    if "TEST PASS" not in verdict:  # then MLPerf compares the scores of TEST01's samples
        baseline, compliance = score(plan, accuracy, samples_of=test), score(plan, test)
        write(f"{test01}/accuracy/baseline_accuracy.txt", f"{baseline}\n")
        write(f"{test01}/accuracy/compliance_accuracy.txt", f"{compliance}\n")
        write_accuracy(f"{test01}/accuracy", test, compliance)
    metric, value, unit = primary_metric(scenario, read_detail_log(performance))
    files = [plan[name] for name in ("dataset", "vocab", "calibration") if plan.get(name)]
    hashes = file_hashes(plan["model"]) | {os.path.basename(path): file_digest(path) for path in files}
    result = f"{backend}: {metric} {value or 0:.6g} {unit}, accuracy `{accuracy_score}`"
    hash_list = "\n".join(f"- {name}: {digest}" for name, digest in hashes.items())
    values = {"result": result, "audit_config": AUDIT_CONFIG, "files": hash_list}
    fill_template("README.template", f"{folders.measurements}/README.md", plan | values)


def write(path: str, text: str) -> None:
    """Write the file `path`, and its folder if it is missing."""
    with atomic_write(path, DISK, NEW) as file:
        file.write(text.encode())


def fill_template(name: str, path: str, values: Plan) -> None:
    """Write the file `path`: the template `name` with its {fields} replaced by `values`."""
    write(path, read_text(f"{ROOT}/tools/submission/{name}", "the template", "restore it from git").format_map(values))


def score(plan: Plan, run: str, samples_of: str | None = None) -> str:
    """Return {"exact_match": X, "f1": Y} of a run's responses, or of those to the samples that another run logged."""
    squad, features = load_features(plan["dataset"], plan["vocab"])
    logits = read_log(f"{run}/{ACCURACY_LOG}", len(features))
    if samples_of:
        chosen = np.isin(logits.rows, read_log(f"{samples_of}/{ACCURACY_LOG}", len(features)).rows)
        logits = Logits(logits.rows[chosen], logits.start[chosen], logits.end[chosen])
    return json.dumps(score_log(squad, features, read_vocab(plan["vocab"]), logits)[0])


def write_accuracy(folder: str, run: str, score: str) -> None:
    """Write accuracy.txt, which is `score` and the hash of the run's accuracy log, and that log truncated."""
    path, end = f"{run}/{ACCURACY_LOG}", RULES["log_end"]
    text = read_text(path, "the accuracy log", LOG_REMEDY)
    if len(text) >= RULES["log_characters"]:
        text = text[:end] + GAP + text[-end:]
    write(f"{folder}/{ACCURACY_LOG}", text)
    write(f"{folder}/accuracy.txt", f"{score}\nhash={file_digest(path)}\n")


def verify_accuracy(accuracy: str, test: str) -> str:
    """Return verify_accuracy.txt for the folders of both runs: TEST01's responses are the accuracy run's."""
    logs = (read_json(f"{run}/{ACCURACY_LOG}", "the accuracy log", LOG_REMEDY) for run in (accuracy, test))
    expected, logged = ([(entry["qsl_idx"], entry["data"]) for entry in log] for log in logs)
    responses = dict(expected)
    missing = sum(sample not in responses for sample, _ in logged)
    different = sum(responses.get(sample, data) != data for sample, data in logged)
    counts = f"num_acc_log_entries = {len(responses)}\nnum_perf_log_entries = {len(logged)}\n"
    faults = f"num_perf_log_data_mismatch = {different}\nnum_missing_qsl_idxs = {missing}\n"
    return f"{counts}{faults}TEST {'PASS' if logged and not missing and not different else 'FAIL'}\n"


def verify_performance(scenario: str, performance: str, test: str) -> str:
    """Return verify_performance.txt for the folders of both runs: the primary metrics are close to each other."""
    submitted, found = (primary_metric(scenario, read_detail_log(folder))[1] or 0 for folder in (performance, test))
    verdict = "PASS" if abs(found - submitted) <= TOLERANCE * submitted else "FAIL"
    return f"Reference score = {submitted:.6g}\nTest score = {found:.6g}\nTEST {verdict}\n"


def tracked_files() -> list[str]:
    """Return the project's files that git tracks, relative to ROOT. Raises UserError if git cannot list them."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
        fault = first_line(listed.stderr) if listed.returncode else ""
    except OSError as error:
        fault = f"git: {error.strerror}"
    if fault:  # such as "not a git repository", or the repository of another user
        remedy = "clone it as this user, because the tree has a copy of the tracked files"
        raise UserError(f"{ROOT}: git cannot list the files ({printable(fault)}); {remedy}")
    return [name for name in listed.stdout.split("\0") if os.path.isfile(f"{ROOT}/{name}")]


def copy_source(folder: str) -> None:
    """Copy the project's files, those that git tracks, into `folder`."""
    for name in tracked_files():
        target = f"{folder}/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(f"{ROOT}/{name}", target)
