"""Make the runs of a submission and keep finished ones; a folder's name has a hash of all that changes the result."""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

import config
from config import ROOT, UserError, log_progress
from files import file_digest, locked_folder, read_text, write_json
from loadgen_conf import SEEDS, read_conf
from loadgen_logs import LIBRARIES, RECORD, check_logs, read_record
from models.model_files import CONFIG_FILES, model_files
from tools.submission.check import RULES, seeds
from tools.submission.plan import Plan, describe_machine

RUNS = f"{config.BUILD_DIR}/submission-runs"  # each run has a folder in it
RUN_LOG, INPUTS = "run.log", "run.json"  # in a run's folder: run.py's output, the run's inputs
# The project's files that a run uses. The rest of convert/ only writes model files, which are inputs themselves.
SOURCES = ("*.py", "models/*.py", "models/*.cpp", "bert_config.json", "convert/calibration.py")
PACKAGES = {*LIBRARIES, "onnxruntime-gpu", "ray", "safetensors"}  # those that compute
# TEST01 is a performance run (LoadGen's mode 2).
AUDIT_CONFIG = "*.*.mode = 2\n" + "".join(f"*.*.{key} = {value}\n" for key, value in RULES["test01"]["audit"].items())


def file_hashes(path: str) -> dict[str, str]:
    """Return {name: sha256} of a model: of the files in its folder, or of a file, its parts and its configuration."""
    path = config.local_model(path)
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    parts = (os.path.relpath(part, folder or ".") for part in (model_files(path).parts if name else ()))
    names = [name, *parts, *CONFIG_FILES] if name else sorted(os.listdir(folder))
    return {name: file_digest(file) for name in names if os.path.isfile(file := os.path.join(folder, name))}


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Return the inputs that all runs of a plan have in common."""
    sources = [name for pattern in SOURCES for name in glob.glob(pattern, root_dir=ROOT)]
    return {
        "machine": describe_machine(),
        "packages": {dist.name: dist.version for dist in distributions() if dist.name.lower() in PACKAGES},
        "model": file_hashes(plan["model"]),
        **{name: file_digest(plan[name]) for name in ("dataset", "vocab", "calibration") if plan.get(name)},
        "variables": {name: os.environ[name] for name in config.COMPUTE_VARIABLES if os.environ.get(name)},
        "code": {name: file_digest(f"{ROOT}/{name}") for name in sorted(sources)},
    }


def scenario_settings(path: str, scenario: str) -> list[str]:
    """Return the lines of the user.conf `path` that apply to `scenario`; the others do not change its runs."""
    text = read_text(path, "LoadGen's settings", "give a text file")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    others = [f".{name}." for name in config.SCENARIOS if name != scenario]
    return [line for line in lines if line and not any(other in line for other in others)]


def check_seeds(path: str, version: str) -> None:
    """Raise UserError if the user.conf `path` sets a seed otherwise than `version` does."""
    for line in read_conf(path):
        if line.key in SEEDS and line.value != seeds(version)[line.key]:
            raise UserError(f"{line.place}: the plan's version, {version}, sets the seeds; remove this line")


def finished(folder: str) -> bool:
    """Return whether `folder` holds a finished run: run.json, which is written after it, its record and whole logs."""
    try:
        check_logs(folder)
        return all(os.path.exists(f"{folder}/{name}") for name in (INPUTS, RECORD))
    except UserError:
        return False


def ensure_run(plan: Plan, common: dict[str, Any], scenario: str, kind: str) -> str:
    """Return the folder of a finished run, kept or made now; `kind` is a key of LOG_FOLDERS, `common` a fingerprint."""
    args = [f"--backend={plan['backend']}", f"--dtype={plan['dtype']}", f"--scenario={scenario}"]
    args += ["--accuracy"] if kind == "accuracy" else []
    audit = AUDIT_CONFIG if kind == "TEST01" else None
    settings = scenario_settings(plan["user_conf"], scenario)
    version = {"version": plan["version"], "seeds": seeds(plan["version"])}
    inputs = {"args": args, **common, **version, "user_conf": settings, "audit_config": audit}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = f"{RUNS}/{scenario}-{kind}-{digest[:12]}"
    if finished(folder):
        log_progress(f"{folder}: finished before, kept")
        return folder
    log_progress(f"{folder}: {'unfinished, running again' if os.path.exists(folder) else 'running'}")
    with locked_folder(folder, "run.py"):  # which a command that was killed may have left running
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    text = read_text(plan["user_conf"], "LoadGen's settings", "give a text file").rstrip("\n")
    with open(f"{folder}/user.conf", "w", encoding="utf-8") as file:
        file.write(f"{text}\n\n# The seeds of MLPerf {plan['version']}.\n")
        file.writelines(f"*.*.{name} = {seed}\n" for name, seed in seeds(plan["version"]).items())
    command = [sys.executable, f"{ROOT}/run.py", *args, f"--user_conf={folder}/user.conf"]
    if audit:
        with open(f"{folder}/audit.config", "w", encoding="utf-8") as file:
            file.write(audit)
        command.append(f"--audit_conf={folder}/audit.config")
    files = {"ML_MODEL_FILE_WITH_PATH": plan["model"], "DATASET_FILE": plan["dataset"], "VOCAB_FILE": plan["vocab"]}
    others = {"CALIBRATION_FILE": plan.get("calibration", ""), "LOG_PATH": folder, "SKIP_VERIFY_ACCURACY": "1"}
    line, status = execute(command, {**os.environ, **files, **others}, f"{folder}/{RUN_LOG}")
    if status:
        raise UserError(f"{folder}: {line or f'run.py ended with status {status}'}; {RUN_LOG} there has its output")
    write_json(f"{folder}/{INPUTS}", inputs, "free disk space", "a run's inputs")
    return folder


def execute(command: list[str], env: dict[str, str], log: str) -> tuple[str, int]:
    """Run `command` with its output into the file `log` and its progress logged; return (last line, exit status)."""
    line, pipe = "", subprocess.PIPE
    with open(log, "w", buffering=1, encoding="utf-8") as file:
        process = subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert process.stdout  # a pipe
        try:
            for line in process.stdout:
                file.write(line)
                if re.match(r"\d\d:\d\d:\d\d ", line):
                    log_progress(f"    {line[9:].rstrip()}")
        except BaseException:  # such as SystemExit by SIGTERM
            process.terminate()
            file.write(process.communicate()[0])
            raise
        return line.strip(), process.wait()


def common_backend(folders: list[str], dtype: str) -> str:
    """Return the name of the backend that all runs in `folders` recorded. Raises UserError if it is not of `dtype`."""
    found: dict[str, str] = {read_record(folder)["backend"]: folder for folder in folders}
    name = next(iter(found))
    if len(found) > 1 or dtype not in name.split(", "):
        names = "; ".join(f"{folder} ran on {name}" for name, folder in found.items())
        raise UserError(f"{names}; expected one backend in {dtype}: remove older runs or change the plan's dtype")
    return name
