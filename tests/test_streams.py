"""Standard output and error that cannot be written: the work is done, and the exit status says what was lost."""

import ast
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import DEMO_ENV, LIMIT_S, ROOT, SHORT_RUNS, command_of, refused

import config
from files import require_utf8

WORK = f"""
import contextlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import config

def main():
    config.log_progress("begin")
    print("a result")
    for line in range(20_000):  # more than a pipe holds
        print(line)
    sys.stdout.flush()
    config.notice("done")
    with open("product", "w") as file:  # would be the stream if the system gave it the free number
        with contextlib.suppress(OSError):  # as a library's code writes
            os.write(2, b"native")
        file.write("whole")
    return int(sys.argv[1])

config.run_command(main)
"""
FULL = "work.py: error: standard output: cannot write all of it (No space left on device)\n"
# (redirection, main's result, exit status, whether standard error holds progress, its last line)
STREAMS = [
    ("", 0, 0, True, "native"),
    ("2>&-", 0, 0, False, ""),
    (">&-", 0, 0, True, "native"),
    (">&- 2>&-", 0, 0, False, ""),
    ("<&- >&- 2>&-", 3, 3, False, ""),
    (">/dev/full", 0, 1, True, f"native{FULL}"),
    (">/dev/full", 3, 3, True, f"native{FULL}"),
    ("2>/dev/full", 0, 0, False, ""),
    (">/dev/full 2>/dev/full", 0, 1, False, ""),
    (">&3", 0, 128 + signal.SIGPIPE, True, "native"),  # nobody reads number 3
    (">&3", 3, 3, True, "native"),
    ("2>&3", 0, 0, False, ""),
]


def run_with(redirection, command, folder, **variables):
    """Run a command with a redirection of the shell's; number 3 is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            ["bash", "-c", f'exec 3>&{writer}; exec "$@" {redirection}', "bash", *command],
            cwd=folder,
            env={**os.environ, **variables},
            pass_fds=[writer],
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("redirection, returned, status, progress, last", STREAMS)
def test_the_work_is_done_whatever_the_streams_take(tmp_path, redirection, returned, status, progress, last):
    (tmp_path / "work.py").write_text(WORK)
    result = run_with(redirection, [sys.executable, "work.py", str(returned)], tmp_path)
    assert result.returncode == status
    assert (tmp_path / "product").read_text() == "whole"
    error = result.stderr.decode()
    assert ("begin" in error) == ("notice: done" in error) == progress and error.endswith(last)
    assert len(error.splitlines()) == (3 if progress else 0)
    if not redirection:
        assert result.stdout == b"a result\n" + b"".join(b"%d\n" % line for line in range(20_000))


def test_a_run_without_streams_keeps_its_logs(tmp_path):
    """LoadGen's threads and the libraries write there, too."""
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    model = {**DEMO_ENV, "ML_MODEL_FILE_WITH_PATH": str(ROOT / "demo/model/model.onnx")}
    command = [sys.executable, str(ROOT / "run.py"), "--backend=onnxruntime", "--accuracy", "--max_examples=8"]
    result = run_with(">/dev/full 2>&-", command, tmp_path, **model)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")
    assert "finished" in json.loads((tmp_path / "build/logs/record.json").read_text())
    assert len(json.loads((tmp_path / "build/logs/mlperf_log_accuracy.json").read_text())) == 8
    assert len(json.loads((tmp_path / "build/result/predictions.json").read_text())) == 8


TEXTS = [
    ("ascii", "caf\u00e9 …", b"caf\\xe9 \\u2026\n"),
    ("ascii", "b\udcc3\udca9", b"b\xc3\xa9\n"),  # a file name's bytes
    ("utf-8", "caf\u00e9 \udcff", b"caf\xc3\xa9 \xff\n"),
    ("utf-8", "half \ud800", b"half \\ud800\n"),  # half a character is no byte of a file name
    ("latin-1", "caf\u00e9 \u2026", b"caf\xe9 \\u2026\n"),
]


@pytest.mark.parametrize("encoding, text, expected", TEXTS)
def test_every_text_can_be_printed_in_every_locale(tmp_path, encoding, text, expected):
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        stream = config.forgiving(file)
        print(text, file=stream)
        stream.flush()
    assert (tmp_path / "out").read_bytes() == expected


def test_a_stream_that_is_no_file_stays_as_it_is():
    stream = io.StringIO()
    assert config.forgiving(stream) is stream and config.forgiving(None) is None


@pytest.mark.parametrize("name, words", [("run.py", "tools.report"), ("tools.report", "logs")])
def test_a_deleted_working_folder_is_one_line(tmp_path, name, words):
    """Before any package is imported: Intel's library ends the process in such a folder."""
    command, env = command_of(name, words)
    gone = tmp_path / "gone"
    gone.mkdir()
    arguments = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *command]
    result = subprocess.run(arguments, cwd=gone, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: the working folder was deleted; change to another\n"


NOT_UTF8 = "this name is not UTF-8, or the locale is not; rename it, or set LC_ALL=C.UTF-8"
NAME = "l\udcf6gs"  # "lögs" in ISO 8859-1


def test_a_name_that_loadgen_cannot_take_is_refused(command, tmp_path):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    run = ("run.py", "--backend=onnxruntime")
    assert command(*run, LOG_PATH=NAME) == rf"l\udcf6gs: {NOT_UTF8}"
    (tmp_path / NAME).write_text(SHORT_RUNS)
    assert NOT_UTF8 in command(*run, f"--user_conf={NAME}")
    assert NOT_UTF8 in command(*run, f"--audit_conf={NAME}")


def test_a_name_that_onnx_runtime_cannot_take_is_refused(load, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / f"{NAME}.onnx"
    path.write_bytes((ROOT / "demo/model/model.onnx").read_bytes())
    with refused(NOT_UTF8):
        load(path, "onnxruntime")
    require_utf8("lögs")


def test_every_command_has_these_streams():
    """It imports config before other packages, and `run_command` runs it."""
    commands = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("demo/*")]:
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.suffix == ".py" else ast.Module([], [])
        for node in tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                commands[path] = tree, ast.unparse(node.body)
    assert len(commands) >= 16
    assert {code.removeprefix("config.") for _, code in commands.values()} == {"run_command(main)"}
    for path, (tree, _) in commands.items():
        first_of_package = (
            path.parent == ROOT
            or "import config" in (path.parent / "__init__.py").read_text()
            or ("import config" in (path.parent.parent / "__init__.py").read_text())
        )
        imported = [
            name
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        ]
        others = [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names]
        assert first_of_package and (path.parent != ROOT or others[0] == "config"), path
