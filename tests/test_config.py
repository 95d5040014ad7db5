"""The helpers that every script uses: writing files, naming the command, reporting a missing package."""

import os
import stat
import sys

import pytest
from helpers import refused

import config

ANSWERS = "a file of answers"


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder/file.json"
    config.write_json(str(path), {"a": "1"}, "give another file", ANSWERS)
    with pytest.raises(ZeroDivisionError), config.atomic_write(str(path), "give another file", ANSWERS) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == '{\n "a": "1"\n}' and os.listdir(path.parent) == ["file.json"]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    config.write_json(str(tmp_path / "link"), 7, "give another file", ANSWERS)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "7"
    config.write_json("/dev/null", 7, "give another file", ANSWERS)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name, words", [("/dev/null/x", "cannot write it"), ("folder", "Is a directory")])
def test_a_path_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    with refused(name, words, "give another file"):
        config.write_json(name, 7, "give another file", ANSWERS)


@pytest.mark.parametrize(
    "content, words",
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer, not the file itself"),
        ("<!DOCTYPE html>\n<html>", "a web page was saved in place of the file"),
        ("\ufeff \n<HTML lang=en>", "a web page was saved in place of the file"),
    ],
)
def test_what_a_failed_download_left_is_recognized_in_any_file(tmp_path, content, words):
    path = tmp_path / "file"
    path.write_text(content)
    for read in (config.read_text, config.read_json):
        with refused("file: ", words):
            read(str(path), "the data set", "give another")
    with refused("file: ", words):
        config.require_model_file(str(path))


@pytest.mark.parametrize(
    "script, name",
    [
        ("run.py", "run.py"),
        ("accuracy-squad.py", "accuracy-squad.py"),
        ("tools/report/__main__.py", "tools.report"),
        ("tools/benchmark.py", "tools.benchmark"),
        ("convert/freeze_tf.py", "convert.freeze_tf"),
    ],
)
def test_a_command_is_named_as_the_user_starts_it(monkeypatch, script, name):
    monkeypatch.setattr(sys, "argv", [os.path.join(config.ROOT, script)])
    assert config.command_name() == name
    usage = name if name.endswith(".py") else f"python3 -m {name}"
    assert config.argument_parser("text").format_usage() == f"usage: {usage} [-h]\n"


@pytest.mark.parametrize("module, package", [("convert.quantize_onnx", "onnx"), ("tools.benchmark", "tabulate")])
def test_a_package_that_is_missing_is_named_in_one_line(script, tmp_path, module, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name='{package}')")
    result = script(module, PYTHONPATH=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{module}: error: the package {package} is not installed; `make venv")
    assert len(result.stderr.splitlines()) == 1
