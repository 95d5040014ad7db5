"""Make a set of results that can be handed in to MLPerf: run what is missing, verify TEST01, write the tree.

    python3 submission.py submission.toml             runs take an hour or more; then writes build/submission
    python3 submission.py --check build/submission    what is wrong with a tree, one line each

The plan, a TOML file, says what to run and describes the system; submission.toml is one to fill in. The runs are an
accuracy run, a performance run and TEST01's of Offline and of SingleStream, each in a folder of its own under
build/submission-runs, named after all that it was made from: the plan, the files it names, the code, the machine. Those
that are finished are kept, so an interrupted set goes on where it was.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from typing import Any

import numpy as np

import config
from config import UserError
from create_squad_data import load_features, read_vocab
from run import BACKENDS, RESULTS, figure, read_detail_log, stage
from squad_eval import Logits, read_log, score_log
from submission_check import AUDIT, GAP, LOG_LIMIT, OPTIONAL, REQUIRED, SCENARIOS, SHOWN, TARGETS, check, close

HERE = os.path.dirname(os.path.abspath(__file__))
RUNS = f"{config.BUILD_DIR}/submission-runs"
TREE = f"{config.BUILD_DIR}/submission"
KINDS = ("accuracy", "performance", "TEST01")
SUMMARY, DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"
RUN_LOG, RECORD = "run.log", "run.json"  # in a run's folder: what run.py printed; what the run was made from
# TEST01: a performance run that logs the responses of some samples (LoadGen's mode 2).
AUDIT_CONFIG = "*.*.mode = 2\n" + "".join(f"*.*.{name} = {value}\n" for name, value in AUDIT.items())
# Variables that change how a run computes.
VARIABLES = ("USE_GPU", "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "MLC_MAX_NUM_THREADS", "OMP_NUM_THREADS",
             "TF_INTRA_OP_PARALLELISM_THREADS", "TF_INTER_OP_PARALLELISM_THREADS")

VALUES = {"version": ("v6.1", "v6.0", "v5.1"), "division": ("open", "closed"), "benchmark": tuple(TARGETS),
          "backend": tuple(BACKENDS)}  # what a plan may choose from
FILES = ("model", "dataset", "vocab", "user_conf")
NAMES = ("submitter", "system_name")  # become folders
TEXTS = ("dtype", "retraining", "weight_transformations")


def read_plan(path: str, found: dict[str, str]) -> dict[str, Any]:
    """The plan in the TOML file `path`; `found` is of `machine`.

    Raises UserError, which names all at once, where something is missing, empty or not allowed.
    """
    try:
        with open(path, "rb") as file:
            plan = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the plan ({error.strerror}); submission.toml is one to copy") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the plan is not TOML ({error})") from None

    names = (*VALUES, *FILES, *NAMES, *TEXTS)
    system = plan.setdefault("system", {})
    if not isinstance(system, dict):
        raise UserError(f"{path}: system must be a table, [system]")
    wrong = [f"{name} is missing or empty" for name in names if not plan.get(name)]
    wrong += [f"{name} is unknown" for name in plan if name not in (*names, "calibration", "system")]
    wrong += [f"{name} in [system] is unknown" for name in system if name not in REQUIRED + OPTIONAL]
    wrong += [f"{name} must be text in quotes" for name, value in (*plan.items(), *system.items())
              if name != "system" and not isinstance(value, str)]
    wrong += [f"{name} is {plan[name]!r}, not {' or '.join(allowed)}" for name, allowed in VALUES.items()
              if plan.get(name) and plan[name] not in allowed]
    wrong += [f"{name} is {plan[name]!r}; letters, digits, . + - _ are allowed, no spaces" for name in NAMES
              if plan.get(name) and not re.fullmatch(r"\w[\w.+-]*", str(plan[name]), re.ASCII)]
    if plan.get("dtype") == "int8" and not plan.get("calibration"):
        wrong.append("calibration, the list that the int8 model was calibrated with, is missing or empty")
    described = describe_system(plan, found)
    empty = [name for name in REQUIRED if name not in names and not described[name]]
    if empty:
        wrong.append(f"[system] must say what this machine does not tell: {', '.join(empty)}; N/A where there is none")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    for name in (*FILES, "calibration"):
        if plan.get(name) and not os.path.exists(plan[name]):
            raise UserError(f"{path}: {name} is {plan[name]}: no such file")
    return plan


def machine() -> dict[str, str]:
    """What this machine tells about itself, fields of a system's description; what it does not tell is left out."""
    try:
        text = subprocess.run(["lscpu"], env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True,
                              check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        text = ""
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    network = "/sys/class/net"
    cards = [name for name in (os.listdir(network) if os.path.isdir(network) else [])
             if os.path.exists(os.path.join(network, name, "device"))]  # the others are virtual
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    fields = {
        "number_of_nodes": "1",
        "host_processor_model_name": cpu.get("Model name"),
        "host_processors_per_node": cpu.get("Socket(s)"),
        "host_processor_core_count": cpu.get("Core(s) per socket"),
        "host_processor_frequency": cpu.get("CPU max MHz") and f"{cpu['CPU max MHz']} MHz",
        "host_processor_caches": ", ".join(f"{name.removesuffix(' cache')} {value}" for name, value in cpu.items()
                                           if name.endswith(" cache")),
        "host_memory_capacity": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 2**30:.0f} GiB",
        "host_network_card_count": str(len(cards)),
        "operating_system": f"{system}, kernel {platform.release()}",
        "other_software_stack": f"Python {platform.python_version()}, "
                                f"LoadGen {importlib.metadata.version('mlcommons-loadgen')}",
    }
    return {name: value for name, value in fields.items() if value}


def describe_system(plan: dict[str, Any], found: dict[str, str], backend: str | None = None) -> dict[str, Any]:
    """The system's description, every field of REQUIRED and OPTIONAL, "" where neither plan nor machine says it.

    `found` is of `machine`; `backend`, what the runs said they run on, is None before the runs, and fields that
    follow from it are taken to be known.
    """
    framework, device = (backend.split(", ") + ["cpu"])[:2] if backend else ("known after the runs", "cpu")
    fields = dict.fromkeys(sorted(REQUIRED + OPTIONAL), "") | found | {"framework": framework}
    if device.lower().startswith("cpu"):
        fields |= {name: "N/A" for name in REQUIRED if name.startswith("accelerator_")} | {"accelerators_per_node": "0"}
    system: dict[str, str] = plan["system"]
    return fields | system | {name: plan.get(name) for name in ("division", "submitter", "system_name")}


def sha256(path: str) -> str:
    """The sha256 of a file, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None


def file_hashes(path: str) -> dict[str, str]:
    """{name: sha256} of the file `path`, or of the files in the folder `path`."""
    if not os.path.isdir(path):
        beside = os.path.join(os.path.dirname(path), "bert_config.json")  # the sizes of a state dict
        return {os.path.basename(file): sha256(file) for file in (path, beside) if os.path.exists(file)}
    files = (entry.path for entry in os.scandir(path) if entry.is_file())
    return {os.path.basename(file): sha256(file) for file in sorted(files)}


def ingredients(plan: dict[str, Any], found: dict[str, str]) -> dict[str, Any]:
    """What all runs of a plan are made from, but for its settings: a dict for RECORD; `found` is of `machine`."""
    code = [name for name in os.listdir(HERE) if name.endswith(".py") and not name.startswith("submission")]
    return {
        "backend": plan["backend"], "dtype": plan["dtype"], "machine": found,
        "model": file_hashes(plan["model"]),
        **{name: sha256(plan[name]) for name in ("dataset", "vocab", "calibration") if plan.get(name)},
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "code": {name: sha256(os.path.join(HERE, name)) for name in sorted(code)},
    }


def settings(path: str, scenario: str) -> list[str]:
    """The lines of the user.conf `path` that are for `scenario`, so that another's may change without a new run."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read LoadGen's settings ({error})") from None
    return [line for line in lines if line and not any(f".{other}." in line for other in RESULTS if other != scenario)]


def finished(folder: str, scenario: str, kind: str) -> bool:
    """Whether `folder` holds a whole run of that kind: its record, and logs that LoadGen wrote to their end."""
    try:
        log = read_detail_log(folder)
        logged = read_responses(folder) if kind != "performance" else []
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False
    return (os.path.exists(os.path.join(folder, RECORD)) and log.get("effective_scenario") == scenario
            and ("power_end" in log if kind == "accuracy" else
                 "num_errors" in log and figure(scenario, log)[1] is not None)
            and (kind != "accuracy" or len(logged) == log.get("effective_accuracy_sample_count")))


def have_run(plan: dict[str, Any], made_from: dict[str, Any], scenario: str, kind: str) -> str:
    """The folder of a finished run, kept from before or made now. Raises UserError where run.py fails."""
    args = [f"--backend={plan['backend']}", f"--dtype={plan['dtype']}", f"--scenario={scenario}",
            *(["--accuracy"] if kind == "accuracy" else [])]
    record = {"args": args, **made_from, "user_conf": settings(plan["user_conf"], scenario),
              "audit_config": AUDIT_CONFIG if kind == "TEST01" else None}
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    folder = os.path.join(RUNS, f"{scenario}-{kind}-{key[:12]}")
    if finished(folder, scenario, kind):
        stage(f"{folder}: finished before, kept")
        return folder
    if os.path.exists(folder):
        stage(f"{folder}: half finished, thrown away")
        shutil.rmtree(folder)
    stage(f"{folder}: running")
    os.makedirs(folder)
    shutil.copyfile(plan["user_conf"], os.path.join(folder, "user.conf"))
    args.append(f"--user_conf={os.path.join(folder, 'user.conf')}")
    if kind == "TEST01":
        write(os.path.join(folder, "audit.config"), AUDIT_CONFIG)
        args.append(f"--audit_conf={os.path.join(folder, 'audit.config')}")
    variables = {"ML_MODEL_FILE_WITH_PATH": plan["model"], "DATASET_FILE": plan["dataset"], "VOCAB_FILE": plan["vocab"],
                 "LOG_PATH": folder, "SKIP_VERIFY_ACCURACY": "1", "CALIBRATION_FILE": plan.get("calibration", "")}
    line, status = run([sys.executable, os.path.join(HERE, "run.py"), *args], variables, os.path.join(folder, RUN_LOG))
    if status:
        raise UserError(f"{folder}: {line or f'run.py ended with status {status}'}; all it said is in {RUN_LOG} there")
    write(os.path.join(folder, RECORD), json.dumps(record, indent=1))
    if not finished(folder, scenario, kind):
        raise UserError(f"{folder}: run.py ended well, but its logs are not whole or hold no figure; look into "
                        f"{RUN_LOG} there")
    return folder


def run(command: list[str], variables: dict[str, str], log: str) -> tuple[str, int]:
    """Run `command` with more environment `variables`, its output into the file `log`: (its last line, exit status).

    run.py's own lines, which begin with the time, are shown as well.
    """
    line = ""
    with open(log, "w", encoding="utf-8") as file, \
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout  # a pipe
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if re.match(r"\d\d:\d\d:\d\d ", line):
                    print("   ", line, end="", file=sys.stderr, flush=True)
        except BaseException:
            process.terminate()
            file.write(process.stdout.read())
            raise
    return line.strip(), process.returncode


def backend_of(folders: Iterable[str], dtype: str) -> str:
    """What the runs in `folders` said they ran on. Raises UserError where they differ, or ran in another dtype."""
    found: dict[str, str] = {}
    for folder in folders:
        names = re.findall(r"^\S+ (.+); warming up$", read(os.path.join(folder, RUN_LOG)), re.MULTILINE)
        found.setdefault(names[0], folder)
    if len(found) > 1:
        raise UserError("the runs are not of one backend: " + "; ".join(f"{path} {name}" for name, path in found.items())
                        + "; remove the older ones and start again")
    name, folder = found.popitem()
    if dtype not in name.split(", "):
        raise UserError(f"{folder}: ran on {name}, not in {dtype}; give the dtype that runs here in the plan")
    return name


def read_responses(folder: str) -> list[tuple[int, str]]:
    """The responses in a run's accuracy log, [(sample, hexadecimal digits)]."""
    return [(entry["qsl_idx"], entry["data"]) for entry in json.loads(read(os.path.join(folder, config.ACCURACY_LOG)))]


def verify_accuracy(accuracy: str, test: str) -> str:
    """TEST01's verify_accuracy.txt for the folders of both runs: each logged response is the accuracy run's."""
    responses, logged = dict(read_responses(accuracy)), read_responses(test)
    missing = sum(sample not in responses for sample, _ in logged)
    different = sum(responses.get(sample, data) != data for sample, data in logged)
    return (f"num_acc_log_entries = {len(responses)}\nnum_perf_log_entries = {len(logged)}\n"
            f"num_perf_log_data_mismatch = {different}\nnum_missing_qsl_idxs = {missing}\n"
            f"TEST {'PASS' if logged and not missing and not different else 'FAIL'}\n")


def verify_performance(scenario: str, performance: str, test: str) -> str:
    """TEST01's verify_performance.txt for the folders of both runs: the figures are within 10 %."""
    submitted, found = (figure(scenario, read_detail_log(folder))[1] or 0 for folder in (performance, test))
    return (f"Reference score = {submitted:.6g}\nTest score = {found:.6g}\n"
            f"TEST {'PASS' if close(submitted, found) else 'FAIL'}\n")


class Scorer:
    """Scores accuracy logs of the plan's data set."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.squad, self.features = load_features(plan["dataset"], plan["vocab"])
        self.vocab = read_vocab(plan["vocab"])

    def logits(self, folder: str) -> Logits:
        return read_log(os.path.join(folder, config.ACCURACY_LOG), len(self.features))

    def line(self, logits: Logits) -> str:
        """The line {"exact_match": X, "f1": Y}."""
        return json.dumps(score_log(self.squad, self.features, self.vocab, logits)[0])


def write_accuracy(folder: str, run_folder: str, line: str) -> None:
    """Write accuracy.txt, the score `line` with the hash of the run's whole log, and that log truncated."""
    path = os.path.join(run_folder, config.ACCURACY_LOG)
    text = read(path)
    if len(text) >= LOG_LIMIT:
        text = text[:SHOWN] + GAP + text[-SHOWN:]
    write(os.path.join(folder, config.ACCURACY_LOG), text)
    write(os.path.join(folder, "accuracy.txt"), f"{line}\nhash={sha256(path)}\n")


def write_test01(folder: str, scenario: str, runs: dict[tuple[str, str], str], scorer: Scorer) -> None:
    """Write TEST01's folder of a scenario."""
    accuracy, performance, test = (runs[scenario, kind] for kind in KINDS)
    copy_logs(test, os.path.join(folder, "performance", "run_1"))
    write(os.path.join(folder, "verify_performance.txt"), verify_performance(scenario, performance, test))
    verdict = verify_accuracy(accuracy, test)
    write(os.path.join(folder, "verify_accuracy.txt"), verdict)
    if "TEST PASS" not in verdict:  # then the two must score alike on the same samples
        logged, baseline = scorer.logits(test), scorer.logits(accuracy)
        chosen = np.searchsorted(baseline.rows, logged.rows)
        lines = {"baseline": scorer.line(Logits(logged.rows, baseline.start[chosen], baseline.end[chosen])),
                 "compliance": scorer.line(logged)}
        for name, line in lines.items():
            write(os.path.join(folder, "accuracy", f"{name}_accuracy.txt"), line + "\n")
        write_accuracy(os.path.join(folder, "accuracy"), test, lines["compliance"])


def write_tree(plan: dict[str, Any], found: dict[str, str], runs: dict[tuple[str, str], str]) -> None:
    """Write TREE from the finished `runs`, {(scenario, kind): folder}, in place of what was there."""
    backend = backend_of(runs.values(), plan["dtype"])
    scorer = Scorer(plan)
    shutil.rmtree(TREE, ignore_errors=True)
    top = os.path.join(TREE, plan["division"], plan["submitter"])
    name, benchmark = plan["system_name"], plan["benchmark"]
    write(os.path.join(top, "systems", f"{name}.json"), as_json(describe_system(plan, found, backend)))
    copy_source(os.path.join(top, f"code/{benchmark}" if plan["version"] == "v5.1" else "src"))
    if plan["dtype"] == "int8":
        write(os.path.join(top, "documentation", "calibration.md"), calibration(plan))

    for scenario in SCENARIOS:
        folder = os.path.join(top, "results", name, benchmark, scenario)
        accuracy, performance, _ = (runs[scenario, kind] for kind in KINDS)
        copy_logs(accuracy, os.path.join(folder, "accuracy"))
        line = scorer.line(scorer.logits(accuracy))
        write_accuracy(os.path.join(folder, "accuracy"), accuracy, line)
        copy_logs(performance, os.path.join(folder, "performance", "run_1"))
        write_test01(os.path.join(folder, "TEST01"), scenario, runs, scorer)
        shutil.copyfile(os.path.join(performance, "user.conf"), os.path.join(folder, "user.conf"))
        write(os.path.join(folder, "measurements.json"), as_json({
            "input_data_types": "int32",
            "retraining": plan["retraining"],
            "starting_weights_filename": os.path.basename(os.path.normpath(plan["model"])),
            "weight_data_types": plan["dtype"],
            "weight_transformations": plan["weight_transformations"]}))
        write(os.path.join(folder, "README.md"), read_me(plan, scenario, backend, line, performance))


def calibration(plan: dict[str, Any]) -> str:
    """The text of calibration.md."""
    where = "`int8_ranges` in pytorch_SUT.py, from which `Int8Linear` in packed_bert.py takes its scales" \
        if plan["backend"] == "pytorch" else "quantize_bert.py, or whatever made the model file"
    return (f"# Calibration\n\n{plan['weight_transformations']}\n\nThe ranges of the products' inputs are those over the "
            f"features in the list {os.path.basename(plan['calibration'])} (sha256 {sha256(plan['calibration'])}), "
            f"found by {where}.\n")


def read_me(plan: dict[str, Any], scenario: str, backend: str, line: str, performance: str) -> str:
    """The text of a scenario's README.md: what ran, on what, and how to run it again."""
    what, value, unit = figure(scenario, read_detail_log(performance))
    files = {**file_hashes(plan["model"]), **{os.path.basename(plan[name]): sha256(plan[name])
                                              for name in ("dataset", "vocab", "calibration") if plan.get(name)}}
    command = f"python3 run.py --backend={plan['backend']} --dtype={plan['dtype']} --scenario={scenario}"
    return (f"# {plan['benchmark']}, {scenario}\n\n{backend}: {what} {value:.6g} {unit}, accuracy `{line}`.\n\n"
            f"The code is in src/ (v5.1: code/{plan['benchmark']}/); its README says how to install what it needs and "
            "which variables name the files. The runs, with user.conf beside this file:\n\n"
            f"```\n{command} --user_conf=user.conf --accuracy\n{command} --user_conf=user.conf\n"
            f"{command} --user_conf=user.conf --audit_conf=audit.config\n```\n\nThe last is TEST01's, audit.config:\n\n"
            f"```\n{AUDIT_CONFIG}```\n\nThe files, by sha256:\n\n"
            + "".join(f"- {name}: {digest}\n" for name, digest in files.items()))


def copy_source(folder: str) -> None:
    """Copy the project's files, those that git tracks, into `folder`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"{HERE}: is no git repository; the tree's src/ is a copy of the files that git tracks")
    for name in listed.stdout.split("\0"):
        if os.path.isfile(os.path.join(HERE, name)):
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.copy(os.path.join(HERE, name), path)


def copy_logs(run_folder: str, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    for name in (SUMMARY, DETAIL):
        shutil.copyfile(os.path.join(run_folder, name), os.path.join(folder, name))


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Write the file `path`, and its folder where there is none."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def make(path: str) -> int:
    """Make the tree of the plan `path`; returns the exit status."""
    found = machine()
    plan = read_plan(path, found)
    if os.path.exists("audit.conf"):
        raise UserError("audit.conf: run.py would take it for every run; move it away")
    made_from = ingredients(plan, found)
    runs = {(scenario, kind): have_run(plan, made_from, scenario, kind) for scenario in SCENARIOS for kind in KINDS}
    stage("writing the tree")
    write_tree(plan, found, runs)
    faults = check(TREE)
    for (scenario, kind), folder in runs.items():
        print(f"{scenario} {kind}: {folder}")
    if not faults:
        print(f"{TREE}: complete, nothing is wrong with it")
        return 0
    print("\n".join(faults))
    if plan["division"] == "closed":
        shutil.rmtree(TREE)
        print(f'closed division refused, {len(faults)} faults; division = "open" in {path} takes these runs as they are')
    else:
        print(f"{TREE}: written, but MLPerf's checker would find these {len(faults)} faults")
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("plan", nargs="?", help="the TOML file that says what to run on what")
    what.add_argument("--check", metavar="TREE", help="only say what is wrong with a tree")
    args = parser.parse_args()
    if args.plan:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run is ended too
        return make(args.plan)
    faults = check(args.check)
    print("\n".join(faults) or f"{args.check}: nothing is wrong with it")
    return 1 if faults else 0


if __name__ == "__main__":
    config.script(main)
