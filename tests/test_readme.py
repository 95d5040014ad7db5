"""The commands in README.md and docs/ run as they are written, the links lead somewhere, and the example works.

A block of commands runs in a folder that looks like the project's, with the demo's files under the names that the
documents use.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import DEMO_ENV, DEMO_ONNX, LIMIT_S, ONE_THREAD, ROOT, SHORT_RUNS

import config
from run import parse_args

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md")))
}
README, CONTRIBUTING = DOCUMENTS["README.md"], DOCUMENTS["CONTRIBUTING.md"]
# How commands begin that do not run here, and why.
ELSEWHERE = {
    "make demo": "runs below",
    "make test": "is running",
    "make format": "changes files",
    "make setup": "network",
    "make venv": "network",
    "make build_docker": "Docker",
    "make launch_docker": "Docker",
    "export RAY": "two machines, test_ray_SUT.py",
    "RAY_ADDRESS": "two machines, test_ray_SUT.py",
    ".venv/bin/ray": "two machines, test_ray_SUT.py",
    ".venv/bin/python run.py --network": "two machines, test_network_LON.py",
    ".venv/bin/python run.py --backend=pytorch --scenario=SingleStream --quick": "10 s, as in make demo",
    ".venv/bin/python run.py --backend=pytorch --scenario=Server --find_peak": "minutes, test_run.py",
    "make gpu_check": "a GPU; test_gpu_check.py has the dry run",
    ".venv/bin/python -m tools.benchmark": "BERT-Large, test_benchmark.py",
}
COMMAND = (".venv", "make", "export", "RAY_ADDRESS")


def code_blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(block):
    """Return the commands of a block, each without its comment and on one line."""
    lines = block.replace("\\\n", "").splitlines()
    return [re.sub(r"\s+", " ", line.partition("  #")[0].strip()) for line in lines if line.startswith(COMMAND)]


# The demo's model and vocabulary, and a part of its data set; see the fixture `project`.
FILES = DEMO_ENV | {"DATASET_FILE": "dev-v1.1.json"}
# The commands of a block, one per argument, in one process: each would import TensorFlow or PyTorch again.
IN_ONE_PROCESS = """\
import runpy, shlex, sys
for command in sys.argv[1:]:
    _, *words = shlex.split(command)
    module = words[0] == "-m"
    sys.argv = words[module:]
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
COMMANDS = [command for text in DOCUMENTS.values() for block in code_blocks(text) for command in commands(block)]
SCRIPTS = {
    f"{name}, block {number}": script
    for name, text in DOCUMENTS.items()
    for number, block in enumerate(code_blocks(text), 1)
    if (script := [command for command in commands(block) if not command.startswith(tuple(ELSEWHERE))])
}


def succeed(folder, *command, **variables):
    """Run a command in `folder`, which must succeed; returns the CompletedProcess."""
    env = {**os.environ, **ONE_THREAD, **variables}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with the project's code and the demo's files under the names that the documents use."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "convert", ROOT / "models", ROOT / "tools"):
        (folder / path.name).symlink_to(path)
    shutil.copy(ROOT / "bert_config.json", folder)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "user.conf").write_text(SHORT_RUNS)
    (folder / "my-bert").symlink_to(ROOT / "demo/model")
    (folder / "vocab.txt").symlink_to(DEMO_ENV["VOCAB_FILE"])
    dataset = json.loads((ROOT / "demo/dev.json").read_text())
    (folder / "dev-v1.1.json").write_text(json.dumps(dataset | {"data": dataset["data"][:24]}))  # 101 questions
    (folder / "bert_calibration_features.txt").write_text("0\n1\n2\n3\n")
    questions = re.findall(r'"id": "([^"]+)"', (folder / "dev-v1.1.json").read_text())
    (folder / "predictions.json").write_text(json.dumps(dict.fromkeys(questions, "an answer")))
    run = "run.py", "--backend=onnxruntime", "--accuracy", "--max_examples=8"
    succeed(folder, sys.executable, *run, **FILES | {"ML_MODEL_FILE_WITH_PATH": DEMO_ONNX})
    shutil.copy(folder / "build/logs/mlperf_log_accuracy.json", folder)
    for name in ("logs-fp32", "logs-int8"):
        shutil.copytree(folder / "build/logs", folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_the_commands_of_a_block_run_one_after_another(project, script):
    if not any("run.py" in command for command in script):  # run.py keeps its log folder until its process ends
        (project / "in_one_process.py").write_text(IN_ONE_PROCESS)
        succeed(project, ".venv/bin/python", "in_one_process.py", *script, **FILES)
    else:
        succeed(project, "bash", "-euc", "\n".join(script), **FILES)


def test_each_reason_not_to_run_a_command_applies_to_one():
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command in COMMANDS), start
    assert sum(map(len, SCRIPTS.values())) >= 14


@pytest.mark.slow
def test_make_demo_ends_with_the_two_figures_in_the_readme():
    """The score to the last digit; the speed depends on the machine."""
    result = succeed(ROOT, "make", "--no-print-directory", "demo", f"PYTHON={sys.executable}")
    score, speed = (line for line in result.stdout.splitlines() if line.startswith(("{", "TRIAL")))
    assert score in README
    assert re.fullmatch(r"TRIAL, no official result: Offline throughput [0-9.]+ samples/s", speed)


@pytest.mark.slow
def test_the_example_of_a_backend_answers_as_others_do(tmp_path):
    file, line = code_blocks(DOCUMENTS["docs/adding-a-backend.md"], "python")
    (tmp_path / "huggingface_SUT.py").write_text(file)
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    (tmp_path / "run_it.py").write_text(
        "import backends, config, run\nfrom backends import Entry\n"
        f"backends.BACKENDS |= {{{line.strip()}}}\nconfig.run_command(run.main)\n"
    )
    scores = []
    for command, backend, model in (
        ("run_it.py", "huggingface", DEMO_ENV["ML_MODEL_FILE_WITH_PATH"]),
        (str(ROOT / "run.py"), "onnxruntime", DEMO_ONNX),
    ):
        args = command, f"--backend={backend}", "--accuracy", "--max_examples=40"
        variables = DEMO_ENV | {"ML_MODEL_FILE_WITH_PATH": model, "PYTHONPATH": str(ROOT)}
        scores.append(json.loads(succeed(tmp_path, sys.executable, *args, **variables).stdout.splitlines()[-1]))
    assert scores[0] == scores[1] and scores[0]["f1"] > 80


def test_the_example_of_a_backend_is_short_and_passes_the_linter():
    file, _ = code_blocks(DOCUMENTS["docs/adding-a-backend.md"], "python")
    assert len(file.splitlines()) <= 30
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "huggingface_SUT.py", "-"]
    subprocess.run(command, cwd=ROOT, input=file, text=True, check=True)


def test_every_link_leads_to_a_file_and_its_heading():
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, heading = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), f"{name}: {target}"
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in {
                re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles
            }


def test_the_table_of_changes_names_one_file_in_each_row():
    table = CONTRIBUTING.partition("## The life of a sample")[0]
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", table, re.MULTILINE)[1:]
    assert len(rows) >= 15
    for what, file in rows:
        link = re.fullmatch(r"\[(\S+)\]\((\S+)\)", file)
        assert link and link[1] == link[2] and (ROOT / link[1]).is_file(), f"{what}: {file}"
    files = [file for _, file in rows]
    assert len(files) == len(set(files))


def test_the_diagrams_name_what_the_modules_define():
    names = re.findall(r"\b([A-Za-z_]+)\.(\w+)(?:\.(\w+))?", "".join(code_blocks(CONTRIBUTING)[1:]))
    found = [name for name in names if (ROOT / f"{name[0]}.py").exists()]
    assert len(found) >= 15
    for module, *parts in found:
        for part in filter(None, parts):
            assert re.search(rf"\b(def |class |self\.){part}\b", (ROOT / f"{module}.py").read_text()), (module, part)


def test_every_flag_and_environment_variable_is_documented(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    flags = re.findall(r"--\w+", capsys.readouterr().out)
    assert {"--backend", "--sut_server"} < set(flags)
    for flag in set(flags) - {"--help"}:
        assert f"`{flag}" in DOCUMENTS["docs/scenarios.md"], flag
    for name in (*config.FILE_VARIABLES, *config.COMPUTE_VARIABLES, "LOG_PATH", "SKIP_VERIFY_ACCURACY", "MODEL_MIRROR"):
        assert f"`{name}`" in DOCUMENTS["docs/running.md"], name
