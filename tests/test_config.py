"""The helpers that every script uses: writing files, naming the command, reporting a missing package."""

import os
import stat
import sys

import pytest
from helpers import ROOT, refused

import config
from files import atomic_write, read_json, read_text, require_model_file, write_json

ANSWERS = "a file of answers"


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder/file.json"
    write_json(str(path), {"a": "1"}, "give another file", ANSWERS)
    with pytest.raises(ZeroDivisionError), atomic_write(str(path), "give another file", ANSWERS) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == '{\n "a": "1"\n}' and os.listdir(path.parent) == ["file.json"]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    write_json(str(tmp_path / "link"), 7, "give another file", ANSWERS)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "7"
    write_json("/dev/null", 7, "give another file", ANSWERS)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name, words", [("/dev/null/x", "cannot write it"), ("folder", "Is a directory")])
def test_a_path_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    with refused(name, words, "give another file"):
        write_json(name, 7, "give another file", ANSWERS)


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
    for read in (read_text, read_json):
        with refused("file: ", words):
            read(str(path), "the data set", "give another")
    with refused("file: ", words):
        require_model_file(str(path))


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


USER_CONF = f"--user_conf={ROOT / 'user.conf'}"
BROKEN = [
    ("raise ImportError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1: cannot open shared object file"),
    ("raise OSError('libcudart.so.11.0: cannot open shared object file')", "libcudart.so.11.0"),
    ("raise RuntimeError('compiled against another version of NumPy')", "compiled against another version of NumPy"),
    ("import a_package.missing_part", "No module named 'a_package.missing_part'"),
    ("from math import nothing", "cannot import name 'nothing'"),
    ("import another_package", "the other one"),
]


@pytest.mark.parametrize("command", [("run.py", USER_CONF), ("squad_eval.py",), ("tools.benchmark",)])
def test_ctrl_c_during_an_import_is_no_fault_of_the_package(script, tmp_path, command):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    result = script(*command, PYTHONPATH=tmp_path)
    assert (result.returncode, result.stderr) == (130, f"{command[0]}: interrupted\n")


@pytest.mark.parametrize("content, reason", BROKEN)
def test_a_package_that_cannot_be_imported_is_found(tmp_path, monkeypatch, content, reason):
    (tmp_path / "a_package.py").write_text(content)
    (tmp_path / "another_package.py").write_text("raise ValueError('the other one')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception) as error:
        import a_package  # noqa: F401
    package, found = config.import_fault(error.value)
    assert package == "a_package" and reason in found


def test_a_name_that_a_package_lacks_is_the_packages_fault():
    """As after an update to an incompatible version."""
    with pytest.raises(ImportError) as error:
        from numpy import no_such_name  # noqa: F401
    assert config.import_fault(error.value)[0] == "numpy"


def test_a_package_that_is_missing_is_told_from_a_broken_one(tmp_path, monkeypatch):
    (tmp_path / "a_package.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as error:
        import a_package  # noqa: F401
    assert config.import_fault(error.value) == ("what_it_needs", "")


def test_an_exception_of_a_package_in_use_is_no_import_fault(tmp_path, monkeypatch):
    (tmp_path / "a_working_package.py").write_text("def fail():\n    raise ValueError('in use')")
    monkeypatch.syspath_prepend(tmp_path)
    import a_working_package

    for call in (a_working_package.fail, lambda: 1 / 0):
        with pytest.raises((ValueError, ZeroDivisionError)) as error:
            call()
        assert config.import_fault(error.value) is None


@pytest.mark.parametrize(
    "command, package",
    [
        (("run.py", "--backend=onnxruntime", USER_CONF), "onnxruntime"),
        (("run.py", "--backend=tf", USER_CONF), "tensorflow"),
        (("run.py", "--network=sut"), "aiohttp"),
        (("accuracy-squad.py",), "numpy"),
        (("create_squad_data.py",), "tokenizers"),
        (("squad_eval.py",), "numpy"),
        (("bert_tf_to_pytorch.py",), "torch"),
        (("convert.quantize_onnx",), "onnx"),
        (("tools.benchmark",), "tabulate"),
        (("tools.report", "nowhere"), "matplotlib"),
    ],
)
def test_a_package_that_is_broken_is_named_in_one_line(script, tmp_path, command, package):
    (tmp_path / f"{package}.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    result = script(*command, PYTHONPATH=tmp_path)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"{command[0]}: error: ") and "Traceback" not in result.stderr
    for words in (f"the package {package}", "broken (libfoo.so.1: cannot open", "make venv BACKEND="):
        assert words in line
