"""tools/submission: which plans are accepted, what a run depends on, and how a run fails or is interrupted."""

import ast
import errno
import re
import signal
import subprocess
import sys

import pytest
from helpers import LIMIT_S, PLAN_VALUES, ROOT, fails, refused

from backends import BACKENDS
from tools.submission import __main__, runs, tree
from tools.submission.plan import read_plan
from tools.submission.runs import fingerprint, scenario_settings

EXAMPLE = (ROOT / "tools/submission/plan.toml").read_text()
VALUES = PLAN_VALUES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty working folder that has a user.conf."""
    (tmp_path / "user.conf").write_text("*.Offline.target_qps = 100\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_plan(folder, **changes):
    """Write the example plan, filled in for the demo and then changed, as plan.toml."""
    text = EXAMPLE
    for name, value in (VALUES | changes).items():
        text, count = re.subn(rf'^{name} = "[^"]*"', f'{name} = "{value}"', text, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "plan.toml").write_text(text)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"submitter": "", "cooling": "", "host_networking": "", "dtype": ""},
            ["submitter is missing or empty", "dtype is missing or empty", "host_networking, cooling"],
        ),
        ({"submitter": "A B"}, ["submitter is 'A B'"]),
        ({"system_name": "../up"}, ["system_name"]),
        ({"division": "closd"}, ["closd", "open or closed"]),
        ({"benchmark": "bert"}, ["bert-99 or bert-99.9"]),
        ({"version": "v4.0"}, ["v4.0", "v5.1"]),
        ({"backend": "numpy"}, ["numpy", "pytorch"]),
        ({"model": "nowhere"}, ["model is nowhere: no such file"]),
        ({"user_conf": "nowhere.conf"}, ["user_conf is nowhere.conf: no such file"]),
        ({"dtype": "int8"}, ["calibration"]),
        ({"cooling": 'air"\nfan = "2'}, ["fan in [system] is unknown"]),
        ({"cooling": 'air"\nhw_notes = 2 # "'}, ["hw_notes must be text in quotes"]),
        ({"retraining": 'no"\nseed = "2'}, ["seed is unknown"]),
        ({"retraining": 'no"\nsystem = "2'}, ["TOML"]),
    ],
)
def test_everything_that_is_wrong_in_a_plan_is_named_at_once(folder, changes, words):
    write_plan(folder, **changes)
    with refused("plan.toml", *words):
        read_plan("plan.toml")


def test_a_plan_that_is_missing_or_not_toml_is_named(folder, script):
    fails(script("tools.submission", "nowhere.toml"), "nowhere.toml", "plan.toml")
    (folder / "bad.toml").write_text("division: open\n")
    with refused("bad.toml", "TOML"):
        read_plan("bad.toml")
    (folder / "bad.toml").write_text('system = "mine"\n')
    with refused("bad.toml", "[system]"):
        read_plan("bad.toml")


def test_the_example_plan_is_valid_except_for_what_is_left_to_fill_in(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match="submitter.*system_name.*host_memory_configuration.*cooling") as error:
        read_plan("tools/submission/plan.toml")
    faults = re.sub(r"\w+ is [^;]*: no such file", "", str(error.value))  # BERT-Large's, if they are not there
    assert "unknown" not in faults and "expected" not in faults and "must be" not in faults


@pytest.mark.parametrize("name", ["audit.conf", "audit.config"])
def test_an_audit_file_that_run_py_would_use_in_every_run_is_refused(folder, name):
    write_plan(folder)
    (folder / name).touch()
    with refused(f"{name}: "):
        __main__.submit("plan.toml")
    assert not (folder / "build").exists()


def test_only_a_scenarios_own_settings_count_for_its_runs(tmp_path):
    conf = tmp_path / "user.conf"
    conf.write_text("# a comment\n*.Server.target_qps = 1\n*.*.min_duration = 3 # ms\nbert.Offline.target_qps = 0.5\n")
    assert scenario_settings(conf, "Offline") == ["*.*.min_duration = 3", "bert.Offline.target_qps = 0.5"]
    assert scenario_settings(conf, "SingleStream") == ["*.*.min_duration = 3"]


def imported_files(path, found):
    """Add the project's file `path` to the set `found`, with those that it imports, also late, but without tools/."""
    if path in found or not (ROOT / path).is_file() or path.startswith("tools/"):
        return found
    found.add(path)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            imported_files(f"{name.replace('.', '/')}.py", found)
    return found


def test_a_changed_source_file_of_a_run_needs_new_runs_and_a_tool_does_not(folder, monkeypatch):
    write_plan(folder)
    plan = read_plan("plan.toml")
    code = fingerprint(plan)["code"]
    executed = imported_files("run.py", set())
    for backend in BACKENDS.values():
        imported_files(f"{backend.module}.py", executed)
    assert {"run.py", "loadgen.py", "pytorch_SUT.py", "models/packed_bert.py", "convert/calibration.py"} <= executed
    assert executed | {"bert_config.json"} <= set(code)
    assert not any(name.startswith(("tools/", "tests/")) or name == "convert/quantize_onnx.py" for name in code)


def test_a_run_depends_on_the_models_files_and_on_variables_that_change_how_it_computes(folder, monkeypatch):
    write_plan(folder)
    plan = read_plan("plan.toml")
    assert set(fingerprint(plan)["model"]) == {"config.json", "model.onnx", "model.safetensors", "vocab.txt"}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in fingerprint(plan)["variables"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert fingerprint(plan)["variables"]["OMP_NUM_THREADS"] == "1"
    for name in ("model.pytorch", "bert_config.json", "other"):
        (folder / name).touch()
    assert set(runs.file_hashes("model.pytorch")) == {"model.pytorch", "bert_config.json"}


def test_a_failed_run_is_named_with_its_last_line(folder, monkeypatch):
    write_plan(folder)
    (folder / "run.py").write_text("import sys; print('12:00:00 reading'); sys.exit('run.py: error: no such model')")
    monkeypatch.setattr(runs, "ROOT", str(folder))
    plan = read_plan("plan.toml")
    with refused("submission-runs/Offline-accuracy-", "run.py: error: no such model", "run.log"):
        runs.ensure_run(plan, fingerprint(plan), "Offline", "accuracy")
    (log,) = folder.glob("build/submission-runs/*/run.log")
    assert sorted(log.read_text().splitlines()) == ["12:00:00 reading", "run.py: error: no such model"]
    assert not log.with_name("run.json").exists()


def test_the_git_repository_and_the_disk_are_checked_before_the_runs(folder, monkeypatch):
    """As for a user who may not read the repository, or not write."""
    write_plan(folder)
    monkeypatch.setattr(tree, "ROOT", str(folder))
    with refused("git cannot list the files (fatal: not a git repository", "clone it as this user"):
        __main__.submit("plan.toml")
    monkeypatch.undo()
    monkeypatch.chdir(folder)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "run.log")

    monkeypatch.setattr(runs, "execute", fail)
    with refused("run.log: No space left on device; free disk space or correct permissions"):
        __main__.submit("plan.toml")


def test_an_interrupted_set_ends_its_run(folder):
    write_plan(folder)
    (folder / "run.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('run.py: terminated'))\n"
        "print('12:00:00 running', flush=True)\n"
        "time.sleep(60)\n"
    )
    (folder / "command.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import config\n"
        "from tools.submission import __main__, runs\n"
        f"runs.ROOT = {str(folder)!r}\n"
        "config.run_command(__main__.main)\n"
    )
    command = [sys.executable, "command.py", "plan.toml"]
    with subprocess.Popen(command, cwd=folder, text=True, stderr=subprocess.PIPE) as process:
        while not (line := process.stderr.readline()).endswith("     running\n"):
            assert line, "the command ended"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGTERM
    (log,) = folder.glob("build/submission-runs/*/run.log")
    assert log.read_text().endswith("run.py: terminated\n") and not log.with_name("run.json").exists()
