"""Faults during a run: a backend that fails, signals, a full disk, no memory, a second run, a clock that jumps.

Each ends the process within seconds with one line and a status that is not 0.
"""

import json
import resource
import signal
import subprocess
import time

import pytest
from helpers import LIMIT_S, SHORT_RUNS, backend_script, command_of, fails, run_script, running

from config import SCENARIOS

LONG_RUNS = SHORT_RUNS.replace("min_duration = 300", "min_duration = 60000")


@pytest.fixture
def faulty(tmp_path):
    """Return a function that runs run.py with a backend that executes `body`; see `backend_script`."""

    def call(body, *args, setup="", **variables):
        (tmp_path / "user.conf").write_text(SHORT_RUNS)
        path = backend_script(tmp_path, body, setup=setup)
        return run_script(path, "--backend=pytorch", *args, cwd=tmp_path, **variables)

    return call


@pytest.fixture
def long_run(tmp_path):
    """Return a context manager that starts a run of a minute; see `running`."""

    def call(*args, body="time.sleep(0.2)", setup="", **variables):
        (tmp_path / "user.conf").write_text(LONG_RUNS)
        path = backend_script(tmp_path, body, setup=setup)
        return running(path, "--backend=pytorch", *args, cwd=tmp_path, **variables)

    return call


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_exception_in_a_worker_ends_the_run_with_its_message(faulty, scenario):
    started = time.monotonic()
    result = faulty("raise ValueError('no such layer')", f"--scenario={scenario}")
    assert result.returncode == 1 and time.monotonic() - started < 20
    assert result.stderr.splitlines()[-1] == "run.py: error: the run failed: ValueError: no such layer"


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise config.UserError('disk gone')", ["error: disk gone"]),
        ("raise SystemExit(0)", ["SystemExit"]),
        ("return np.zeros((3, 2), np.float32)", ["(3, 2)"]),
        ("return None", ["NoneType"]),
        ("return np.full((batch.lengths.sum(), 2), np.nan, np.float32)", ["NaN or infinity"]),
        ("raise MemoryError", ["out of memory", "--batch_tokens"]),
        ("np.zeros(2**52)", ["out of memory", "--batch_tokens"]),
        ("import torch; torch.zeros(2**52)", ["out of memory", "--batch_tokens"]),
    ],
)
def test_every_fault_of_a_backend_is_one_last_line(faulty, body, words):
    result = faulty(body)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("run.py: error: ") and all(word in line for word in words), line


def test_only_an_unexpected_exception_has_a_traceback(faulty):
    assert "Traceback" not in faulty("raise config.UserError('disk gone')").stderr
    assert "Traceback" in faulty("raise ValueError('no such layer')").stderr


@pytest.mark.parametrize(
    "scenario, sent, status",
    [
        *((scenario, signal.SIGINT, 130) for scenario in SCENARIOS),
        ("Offline", signal.SIGTERM, 143),
        ("Server", signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_a_run_within_seconds(long_run, scenario, sent, status):
    with long_run(f"--scenario={scenario}") as process:
        time.sleep(0.5)
        process.send_signal(sent)
        started = time.monotonic()
        message = process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 10
    assert process.returncode == status
    assert "incomplete" in message and "Traceback" not in message


def test_a_signal_before_the_first_query_is_announced_too(faulty):
    setup = "import gc, os, signal; gc.collect = lambda: os.kill(os.getpid(), signal.SIGTERM)"
    result = faulty("time.sleep(30)", setup=setup)
    assert result.returncode == 143 and "incomplete" in result.stderr.splitlines()[-1]


# Where a stage waits: statements before run.py's main.
STAGES = {
    "reading features": "import create_squad_data; create_squad_data.read_squad = lambda path: time.sleep(30)",
    "loading the model": "Fake.__init__ = lambda self, options: time.sleep(30)",
    # in PyTorch's code, where a thread that the exit stops would abort the process
    "warming up": "import torch; x = torch.ones(999, 999)\nFake.predict = lambda *args: [x @ x for _ in iter(int, 1)]",
    "scoring": "import squad_eval; squad_eval.read_log = lambda *args: time.sleep(30)",
}


@pytest.mark.parametrize("stage, sent", [*((stage, signal.SIGINT) for stage in STAGES), ("scoring", signal.SIGTERM)])
def test_a_signal_ends_every_stage_within_seconds(long_run, stage, sent):
    flags = ("--accuracy", "--max_examples=4")
    with long_run(*flags, body="pass", setup=STAGES[stage], wait=stage) as process:
        time.sleep(0.3)
        process.send_signal(sent)
        message = process.communicate(timeout=20)[1]
    assert process.returncode in (128 + sent, -sent)
    assert "Traceback" not in message


@pytest.mark.parametrize("jump_s", [3600, -3600, 1])
def test_a_clock_that_jumps_ends_the_run(long_run, jump_s):
    """Python's clock stands in for the system's, which a test cannot set."""
    body = f"""\
        time.sleep(0.1)
        if time.time.__name__ == "time":
            time.time = lambda real=time.time: real() + {jump_s}"""
    with long_run(body=body) as process:
        message = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert f"clock jumped by {jump_s}.0 s" in message and "Traceback" not in message


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_continues(long_run, script, tmp_path):
    with long_run(LOG_PATH="logs") as first:
        fails(
            script("run.py", "--backend=pytorch", LOG_PATH="logs"),
            "logs: process",
            "run.py",
            "runs run.py there",
            "set LOG_PATH to another folder",
        )
        assert first.poll() is None and (tmp_path / "logs/record.json").exists()


def test_a_killed_process_leaves_no_log_that_looks_complete(long_run, script, faulty):
    with long_run(LOG_PATH="logs") as process:
        process.kill()
        process.wait()
    fails(script("accuracy-squad.py", "--log_file=logs/mlperf_log_accuracy.json"), "mlperf_log_accuracy.json")
    assert faulty("pass", LOG_PATH="logs").returncode == 0  # the lock has gone with the process


@pytest.mark.parametrize(
    "size, args, words",
    [
        (500, ["--accuracy"], ["record.json", "LOG_PATH"]),
        (3000, ["--accuracy"], ["mlperf_log_", "all of it"]),
        (60_000, ["--accuracy"], ["mlperf_log_", "all of it"]),
        (1000, [], ["mlperf_log_", "all of it"]),
        (20_000, [], ["mlperf_log_", "all of it"]),
        (20_000, ["--scenario=SingleStream"], ["mlperf_log_", "all of it"]),
    ],
)
def test_a_full_disk_fails_the_run(tmp_path, size, args, words):
    """A limit on the size of files stands in for the disk: writing fails in the same way, silently in LoadGen."""
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    # coverage writes files, too, and would meet the limit
    command, env = command_of("run.py", "--backend=onnxruntime", *args, LOG_PATH="logs")
    env = {name: value for name, value in env.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        check=False,
    )
    fails(result, *words)
    assert "exact_match" not in result.stdout and "throughput" not in result.stdout


QUESTION = {"id": "q", "question": "what?", "answers": [{"text": "sorrow"}]}
SORROW = json.dumps({"data": [{"paragraphs": [{"context": "the song of joy", "qas": [QUESTION]}]}]})
TWO_RESPONSES = json.dumps([{"qsl_idx": 0, "data": digits * 8} for digits in ("00", "01")])
SCORE, FEATURES = ["accuracy-squad.py", "--log_file=log.json"], ["create_squad_data.py", "--out=f.npz"]
# (what, words of the notice, command, a file, its content)
NOTICES = [
    ("an answer outside its passage", ["d.json", "'q'"], FEATURES, "d.json", SORROW),
    ("a sample with two responses", ["log.json", "sample 0"], SCORE, "log.json", TWO_RESPONSES),
    ("a response that is too short", ["sample 0", "--output_dtype"], SCORE, "log.json", TWO_RESPONSES),
    ("a cache that cannot be written", ["build/cache"], FEATURES, "build", "a file"),
]


@pytest.mark.parametrize("what, words, command, name, content", NOTICES, ids=[row[0] for row in NOTICES])
def test_doubtful_input_is_used_with_a_notice(script, tmp_path, what, words, command, name, content):
    (tmp_path / name).write_text(content)
    result = script(*command, **({"DATASET_FILE": name} if name == "d.json" else {}))
    assert result.returncode == 0, result.stderr
    notices = [line for line in result.stderr.splitlines() if " notice: " in line]
    assert any(all(word in line for word in words) for line in notices), result.stderr


def test_an_unknown_execution_provider_is_a_notice(script, tmp_path):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    variables = {"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": "RocketExecutionProvider", "USE_GPU": ""}
    flags = ("--backend=onnxruntime", "--accuracy", "--max_examples=4")
    result = script("run.py", *flags, **variables)
    assert result.returncode == 0, result.stderr
    assert any(" notice: " in line and "RocketExecutionProvider" in line for line in result.stderr.splitlines())
