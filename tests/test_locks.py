"""Two commands of a kind at once: what one process writes is locked, and the other says who has the lock."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import ROOT, refused
from test_submission_plan import write_plan

import config
from convert import verify
from demo import make_data
from files import lock_folder, lock_holder, locked_folder, read_toml
from tools.report import __main__ as report
from tools.submission import __main__, runs
from tools.submission.plan import read_plan

HOLD = f"""if True:
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from files import locked_folder
    with locked_folder("folder", "a test"):
        print("locked", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_locked_folder_is_refused_with_the_process_that_has_it(folder):
    command = [sys.executable, "-c", HOLD, "an argument\nof two lines"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with refused(f"folder: process {process.pid} ({sys.executable} -c", "runs a test there; wait until it ends"):
            lock_folder("folder", "a test")
        os.mkdir("other")
        with locked_folder("other", "a test"):
            pass
        process.communicate("")
    with locked_folder("folder", "a test"):  # the lock ended with the process
        pass
    assert os.listdir("folder") == []


def test_a_command_may_wait_for_the_lock(folder, caplog):
    caplog.set_level("INFO", "bert")
    held = lock_folder("folder", "a test")
    thread = threading.Thread(target=lambda: os.close(lock_folder("folder", "a test", wait=True)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and f"folder: process {os.getpid()} (" in caplog.text
    os.close(held)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_a_notice(folder, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder("folder", "a test"):
        assert f"notice: folder: no locks there ({os.strerror(number)})" in caplog.text
    assert len(caplog.messages) == 1


def test_another_fault_of_the_lock_is_an_error(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with refused("folder: cannot lock this folder (Input/output error)"):
        lock_folder("folder", "a test")
    (folder / "file").touch()
    with refused("file/folder: cannot use this folder (Not a directory)"):
        lock_folder("file/folder", "a test")


def test_a_platform_without_locks_is_a_notice(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked_folder("folder", "a test"):
        assert "notice: folder: this platform has no locks" in caplog.text


def test_a_holder_that_cannot_be_found_is_another_process(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    assert lock_holder(descriptor) == "another process"  # nobody has the lock
    os.close(descriptor)


# The commands.


def test_a_second_submission_is_refused_and_deletes_nothing(folder):
    (folder / "user.conf").touch()
    write_plan(folder)
    run = folder / "build/submission-runs/Offline-accuracy-123/run.log"
    run.parent.mkdir(parents=True)
    run.touch()
    with (
        locked_folder(runs.RUNS, "tools.submission"),
        refused(f"build/submission-runs: process {os.getpid()} (", "runs tools.submission there; wait"),
    ):
        __main__.submit("plan.toml")
    assert run.exists()


def test_a_run_that_a_killed_submission_left_running_is_not_deleted(folder, monkeypatch):
    """run.py has the lock of its log folder."""
    monkeypatch.setattr(runs, "execute", lambda *_: ("error: no such model", 1))
    (folder / "user.conf").touch()
    write_plan(folder)
    plan = read_plan("plan.toml")
    with refused("no such model"):
        runs.ensure_run(plan, {}, "Offline", "accuracy")
    (unfinished,) = (folder / "build/submission-runs").iterdir()
    (unfinished / "mlperf_log_detail.txt").touch()
    with (
        locked_folder(str(unfinished), "run.py"),
        refused(f"{unfinished.name}: process {os.getpid()} (", "runs run.py there; wait until it ends"),
    ):
        runs.ensure_run(plan, {}, "Offline", "accuracy")
    assert (unfinished / "mlperf_log_detail.txt").exists()
    with refused("no such model"):  # now it is made again
        runs.ensure_run(plan, {}, "Offline", "accuracy")
    assert not (unfinished / "mlperf_log_detail.txt").exists()


def test_a_second_demo_make_data_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data", "--dev=dev.json", "--train=train/train.json"])
    monkeypatch.setattr(make_data, "make_document", lambda *_: {"data": []})
    with locked_folder("train", "demo.make_data"), refused("train: process", "runs demo.make_data there"):
        make_data.main()
    assert os.listdir("train") == [] and not os.path.exists("dev.json")
    make_data.main()
    assert os.path.exists("dev.json") and os.path.exists("train/train.json")
    shutil.rmtree("train")


def test_two_converters_never_mix_their_files(folder, monkeypatch):
    """Each writes two files that belong together; the second converter comes between the first one's renames."""
    replace = os.replace

    def convert(name):
        with verify.new_files("model") as path:
            for end in ("", ".data"):
                with open(path + end, "w") as file:
                    file.write(name)

    def slow(source, target):
        replace(source, target)
        if threading.current_thread() is first and not second.ident:
            second.start()
            second.join(0.5)  # ends only if nothing holds it up

    monkeypatch.setattr(os, "replace", slow)
    first, second = (threading.Thread(target=convert, args=(name,)) for name in ("first", "second"))
    first.start()
    for thread in (first, second):
        thread.join(10)
    assert (folder / "model").read_text() == (folder / "model.data").read_text() == "second"


def test_a_second_report_waits_for_the_first(folder, monkeypatch, caplog):
    """Two comparisons have the same folder, unless --out names another, and several files."""
    caplog.set_level("INFO", "bert")
    monkeypatch.setattr(report, "write_report", lambda *_: "page")
    monkeypatch.setattr(sys, "argv", ["report", "logs-a", "logs-b"])
    thread = threading.Thread(target=report.main)
    with locked_folder("build/report", "tools.report"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and "runs tools.report there; waiting until it ends" in caplog.text
    thread.join(10)
    assert not thread.is_alive()
    with locked_folder("logs-a", "run.py"):  # a run's own folder, of which a report may be written while it runs
        monkeypatch.setattr(sys, "argv", ["report", "logs-a", "--out=logs-a"])
        report.main()


# The helpers beside the locks.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain é “text”…", "plain é “text”…"),
        ("a\nb\r\x1b[2J\x00", r"a\nb\r\x1b[2J\x00"),
        ("\udcff\u202e", r"\udcff\u202e"),
    ],
)
def test_printable_text_is_one_line_without_control_characters(text, expected):
    assert config.printable(text) == expected


@pytest.mark.parametrize(
    "text", ["a = ", 'a = "\x01"', 100_000 * "[", f"a = {5000 * '9'}", "a = 2024-13-45", "a = 1\na = 2"]
)
def test_a_damaged_toml_file_is_one_line(folder, text):
    (folder / "a.toml").write_text(text)
    with refused("a.toml: the plan is not TOML (", "; correct it"):
        read_toml("a.toml", "the plan", "correct it")
