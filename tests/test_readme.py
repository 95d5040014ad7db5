"""README's commands run as they stand there, one after the other in one folder, and its example of a backend works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO_ENV, LIMIT_S, ROOT
from test_run import CONF

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", "").splitlines()
            if line.startswith((".venv", "make", "export", "RAY_ADDRESS"))]
# What does not run here, by how it begins, and why; README says so, too.
ELSEWHERE = {
    "make demo": "runs below", "make test": "is running", "make setup": "network", "make venv": "network",
    "make build_docker": "Docker", "make launch_docker": "Docker", "export RAY": "two machines, test_ray_SUT.py",
    "RAY_ADDRESS": "two machines, test_ray_SUT.py", ".venv/bin/ray": "two machines, test_ray_SUT.py",
    ".venv/bin/python run.py --network": "two machines, test_network.py",
    ".venv/bin/python run.py --backend=pytorch --scenario=SingleStream --quick": "10 s, as in make demo",
    ".venv/bin/python run.py --backend=pytorch --scenario=Server --find_peak": "minutes, test_run.py",
}
HERE = [command for command in COMMANDS if not command.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that README names: the demo's."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "user.conf").write_text(CONF)
    shutil.copytree(ROOT / "demo/model", folder / "my-bert")
    shutil.copy(ROOT / "demo/dev.json", folder / "dev-v1.1.json")
    shutil.copy(ROOT / "demo/model/vocab.txt", folder)
    (folder / "bert_calibration_features.txt").write_text("0\n1\n2\n3\n")
    squad = json.loads((ROOT / "demo/dev.json").read_text())
    (folder / "predictions.json").write_text(json.dumps({
        question["id"]: "an answer" for article in squad["data"] for paragraph in article["paragraphs"]
        for question in paragraph["qas"]}))
    return folder


@pytest.mark.parametrize("command", HERE)
def test_a_command_of_the_readme_runs(folder, command):
    words = shlex.split(command)
    if words[0] == "export":
        return  # DEMO_ENV's are the same files
    assert words[0] == ".venv/bin/python"
    env = {**os.environ, **DEMO_ENV, "CALIBRATION_FILE": "bert_calibration_features.txt"}
    result = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], cwd=folder, env=env, capture_output=True,
                            text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stderr
    if "--accuracy" in words:  # what later commands name
        shutil.copy(folder / "build/logs/mlperf_log_accuracy.json", folder)
        for name in ("logs-fp32", "logs-int8"):
            shutil.copytree(folder / "build/logs", folder / name, dirs_exist_ok=True)


def test_every_reason_not_to_run_a_command_has_one():
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command in COMMANDS), start
    assert len(HERE) >= 12


def test_make_demo_ends_with_the_two_figures_that_the_readme_shows():
    """The score to the last digit; the speed is the machine's."""
    result = subprocess.run(["make", "--no-print-directory", "demo", f"PYTHON={sys.executable}"], cwd=ROOT,
                            capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stderr
    figures, speed = (line for line in result.stdout.splitlines() if line.startswith(("{", "TRIAL")))
    assert figures in README
    assert re.fullmatch(r"TRIAL, no official result: Offline throughput [0-9.]+ samples/s", speed)


def test_the_example_of_a_backend_works(tmp_path):
    """In accuracy mode, with the score of PyTorch's own."""
    file, line = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "huggingface_SUT.py").write_text(file)
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "run_it.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport config, run\n"
                                        f"run.BACKENDS |= {{{line.strip()}}}\nconfig.script(run.main)\n")
    result = subprocess.run([sys.executable, "run_it.py", "--backend=huggingface", "--accuracy", "--scenario=Server"],
                            cwd=tmp_path, env={**os.environ, **DEMO_ENV}, capture_output=True, text=True, timeout=LIMIT_S,
                            check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] in README
    assert len(file.splitlines()) < 40
