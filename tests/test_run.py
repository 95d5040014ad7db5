"""run.py from the command line, on the demo's model and data, under the real LoadGen."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from helpers import DEMO_ENV, DEMO_ONNX, DEMO_SCORE, ROOT, SHORT_RUNS, backend_script, fails, run_script, running

from config import SCENARIOS
from create_squad_data import load_features
from loadgen import find_peak
from loadgen_logs import prepare_log_folder, read_detail_log, verdict
from run import parse_args
from squad_QSL import Batch

# Every scenario forms its batches in another way; a dtype or framework changes nothing there, so two are enough for it.
RESPONSES = [
    ("pytorch", "fp32", SCENARIOS),
    ("pytorch", "bf16", ("Offline", "Server")),
    ("pytorch", "int8", ("Offline", "Server")),
    ("tf", "fp32", ("Offline", "MultiStream")),
    ("onnxruntime", "fp32", ("Offline", "MultiStream")),
    ("onnxruntime", "int8", ("Offline", "MultiStream")),
    ("openvino", "fp32", ("Offline", "MultiStream")),
    ("openvino", "int8", ("Offline", "MultiStream")),
]

# run.py several times in one process, since loading a framework takes seconds: the last argument is the scenarios. All
# samples are scored in the first; the others answer a part of them, in other batches.
PART = 100
RUNS = f"""\
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import config, run

def main():
    *args, scenarios = sys.argv
    part = []
    for scenario in scenarios.split(","):
        os.environ["LOG_PATH"] = scenario
        sys.argv = [*args, f"--scenario={{scenario}}", *part]
        run.main()
        part = ["--max_examples={PART}"]

config.run_command(main)
"""


USERS = (("notes.txt", "mine"), ("report.csv", "mine"), ("reports.csv", "mine"))  # files of a user in a log folder


@pytest.fixture
def run(script, tmp_path):
    """Return a function that runs run.py with a user.conf of short runs."""
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    return lambda *args, **variables: script("run.py", *args, **variables)


@pytest.fixture
def null(tmp_path):
    """Return a function that runs run.py with a backend that computes nothing; see `backend_script`."""

    def call(*args, conf=SHORT_RUNS, body="pass", concurrency=2, setup="", **variables):
        (tmp_path / "user.conf").write_text(conf)
        path = backend_script(tmp_path, body, concurrency, setup)
        return run_script(path, "--backend=pytorch", *args, cwd=tmp_path, **variables)

    return call


def responses(folder):
    """Return the responses in an accuracy log: {sample: float32 (tokens, 2)}."""
    entries = json.loads((folder / "mlperf_log_accuracy.json").read_text())
    return {
        entry["qsl_idx"]: np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 2) for entry in entries
    }


@pytest.fixture(scope="session")
def demo_features(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "features.npz"
    return load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(cache))[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend, dtype, scenarios", RESPONSES)
def test_a_samples_response_is_the_same_bytes_in_every_scenario(
    tmp_path, demo_models, backend, dtype, scenarios, demo_features
):
    """Whatever its batch and order. It is one float32 (start, end) pair per token, and the score is right."""
    if backend == "pytorch" and not importlib.import_module("pytorch_SUT").cpu_runs(dtype):
        pytest.skip(f"this processor has no {dtype} instructions")
    form = "onnxruntime" if backend == "openvino" else backend
    model = demo_models["int8" if (backend, dtype) == ("onnxruntime", "int8") else form]
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    (tmp_path / "runs.py").write_text(RUNS)
    args = (f"--backend={backend}", f"--dtype={dtype}", "--accuracy", ",".join(scenarios))
    threads = {"OMP_NUM_THREADS": None, "MLC_MAX_NUM_THREADS": None}  # one per core, unlike in the other tests
    result = run_script(tmp_path / "runs.py", *args, cwd=tmp_path, ML_MODEL_FILE_WITH_PATH=model, **threads)
    assert result.returncode == 0, result.stderr
    scores = [line for line in result.stdout.splitlines() if "exact_match" in line]
    assert len(scores) == len(scenarios) and len(set(scores[1:])) == 1
    logs = []
    for scenario in scenarios:
        if scenario == "Offline" and backend in ("pytorch", "onnxruntime"):  # a batch on each core
            workers = json.loads((tmp_path / scenario / "record.json").read_text())["workers"]
            assert workers == len(os.sched_getaffinity(0))
        logs.append({row: response.tobytes() for row, response in responses(tmp_path / scenario).items()})
    lengths = {row: 8 * length for row, length in enumerate(demo_features.lengths)}
    assert {row: len(response) for row, response in logs[0].items()} == lengths
    for scenario, log in zip(scenarios[1:], logs[1:]):
        assert [row for row in range(PART) if log[row] != logs[0][row]] == [] and len(log) == PART, scenario
    score = json.loads(scores[0])
    assert score == DEMO_SCORE if dtype == "fp32" else score["f1"] >= 87


@pytest.mark.parametrize(
    "scenario, metric",
    [
        ("Offline", "throughput {} samples/s"),
        ("Server", "throughput {} samples/s"),
        ("SingleStream", "90th percentile latency {} ms"),
        ("MultiStream", "99th percentile latency {} ms"),
    ],
)
def test_a_performance_run_ends_with_the_verdict_and_the_primary_metric(run, tmp_path, scenario, metric):
    result = run("--backend=onnxruntime", f"--scenario={scenario}", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert f"Scenario : {scenario}" in result.stdout  # LoadGen's own summary
    last = result.stdout.splitlines()[-1]
    match = re.fullmatch(f"(VALID|INVALID): {scenario} " + metric.format("([0-9.e+]+)"), last)
    assert match, last
    assert f"Result is : {match[1]}" in (tmp_path / "logs/mlperf_log_summary.txt").read_text()
    assert float(match[2]) > 0


def test_a_run_without_a_metric_is_reported_as_such():
    expected = "INVALID: Server throughput not known: LoadGen logged none"
    assert verdict("Server", {"result_validity": "INVALID"}) == expected


@pytest.mark.parametrize("minimum_ms, expected", [(0, "VALID"), (10000, "INVALID")])
def test_the_verdict_is_loadgens(null, minimum_ms, expected):
    conf = SHORT_RUNS.replace("min_duration = 300", f"min_duration = {minimum_ms}")
    assert null(conf=conf).stdout.splitlines()[-1].startswith(f"{expected}: Offline")


def test_accuracy_squad_finds_the_score_of_the_run(run, script):
    scored = run("--backend=onnxruntime", "--accuracy")
    again = script("accuracy-squad.py")
    assert again.stdout.splitlines()[-1] == scored.stdout.splitlines()[-1]
    assert json.loads(again.stdout.splitlines()[-1]) == DEMO_SCORE


def test_the_garbage_collector_ignores_what_exists_before_the_run(null):
    body = "assert gc.get_freeze_count() > 10_000, gc.get_freeze_count()"
    result = null(body=body, setup="import gc")
    assert result.returncode == 0, result.stderr


def test_a_run_is_not_scored_if_another_tool_will_do_it(null):
    assert "exact_match" not in null("--accuracy", SKIP_VERIFY_ACCURACY="1").stdout
    assert "exact_match" in null("--accuracy").stdout


def test_max_examples_runs_and_scores_the_first_features(null, tmp_path, demo_features):
    result = null("--accuracy", "--max_examples=16")
    assert result.returncode == 0, result.stderr
    assert sorted(responses(tmp_path / "build/logs")) == list(range(16))
    assert f"scored {len(set(demo_features.question[:16]))} of" in result.stderr
    assert "performance_sample_count : 16" in null("--max_examples=16").stdout


@pytest.mark.slow
def test_the_logits_are_those_of_hugging_faces_model(load, demo_features):
    """BertForQuestionAnswering, batch size 1, padded to 384."""
    torch = pytest.importorskip("torch")
    from transformers import BertForQuestionAnswering

    backend = load(ROOT / "demo/model", "pytorch")
    model = BertForQuestionAnswering.from_pretrained(ROOT / "demo/model").eval()
    arrays = (demo_features.input_ids, demo_features.input_mask, demo_features.segment_ids)
    for row in range(0, 100, 12):
        length = demo_features.lengths[row]
        batch = Batch(*(array[row : row + 1, :length] for array in arrays), demo_features.lengths[row : row + 1])
        ids, mask, segments = (torch.from_numpy(array[row : row + 1]).long() for array in arrays)
        with torch.inference_mode():
            output = model(input_ids=ids, attention_mask=mask, token_type_ids=segments)
        expected = torch.stack((output.start_logits[0], output.end_logits[0]), -1)[:length]
        assert np.abs(backend.predict(batch) - expected.numpy()).max() < 1e-4


def test_the_logs_of_earlier_runs_stay_in_the_log_folder(tmp_path, monkeypatch):
    """Two of them ended in the same second; the lock of the folder would last until this process ends."""
    monkeypatch.setattr("loadgen_logs.lock_folder", lambda *args, **options: None)
    logs = tmp_path / "logs"
    logs.mkdir()
    for text in ("first", "second"):
        for name, content in (("mlperf_log_detail.txt", text), ("record.json", "{}"), ("report.html", "page"), *USERS):
            (logs / name).write_text(content)
            os.utime(logs / name, (1_000_000, 1_000_000))
        prepare_log_folder(str(logs))
        assert {path.name for path in logs.iterdir()} == {"earlier", *dict(USERS)}
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    found = sorted((logs / "earlier").iterdir())
    assert [(path / "mlperf_log_detail.txt").read_text() for path in found] == ["first", "second"]
    assert all((path / "record.json").exists() and not (path / "reports.csv").exists() for path in found)


@pytest.mark.parametrize(
    "package, backend, target",
    [
        ("torch", "pytorch", "pytorch"),
        ("onnxruntime", "onnxruntime", "onnxruntime"),
        ("tensorflow", "tf", "tf"),
        ("openvino", "openvino", "openvino"),
        ("ray", "ray", "ray"),
        ("mlperf_loadgen", "pytorch", ""),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(run, tmp_path, package, backend, target):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')")
    hint = f"make venv BACKEND={target}" if target else "make venv"
    fails(run(f"--backend={backend}", PYTHONPATH=tmp_path), package, hint)


def test_variables_choose_folder_threads_and_device(run, tmp_path):
    variables = {"LOG_PATH": "here/there", "MLC_MAX_NUM_THREADS": "1", "USE_GPU": "off"}
    result = run("--backend=onnxruntime", "--max_examples=4", "--accuracy", **variables)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here/there/mlperf_log_summary.txt").exists()
    assert json.loads((tmp_path / "here/there/record.json").read_text())["workers"] == 1
    assert ", CPUExecutionProvider, " in result.stderr


@pytest.mark.parametrize("peak", [0.3, 7, 40, 41, 5000])
@pytest.mark.parametrize("start", [1, 40])
def test_the_peak_is_found_to_2_percent_from_any_start(peak, start):
    tried = []
    found = find_peak(lambda rate: tried.append(rate) or rate <= peak, start)
    assert found <= peak < 1.02 * found and len(tried) < 25


def test_the_peak_is_0_if_no_rate_is_valid():
    assert find_peak(lambda rate: False, 10) == 0


@pytest.mark.slow
def test_find_peak_tries_rates_until_the_highest_valid_one(null, tmp_path):
    """Two workers of 2 ms a sample: 1,000 samples/s, and somewhat more for the 0.7 s of a trial, within 100 ms."""
    conf = SHORT_RUNS.replace("target_latency = 500", "target_latency = 100").replace("max_duration = 20000", "")
    conf = conf.replace("min_query_count = 20", "min_query_count = 700").replace("target_qps = 200", "target_qps = 400")
    flags = ("--scenario=Server", "--find_peak", "--batch_tokens=1")
    result = null(*flags, conf=conf.replace("*.*.\n", ""), body="time.sleep(0.002 * len(batch))")
    assert result.returncode == 0, result.stderr
    peak = float(re.match("([0-9.]+) samples/s is the highest", result.stdout.splitlines()[-1])[1])
    assert 20 < peak < 1300
    assert (tmp_path / f"build/logs/target_qps-{peak:.6g}/mlperf_log_summary.txt").exists()


def test_help_is_grouped_and_loads_no_package(script):
    """Without numpy, torch and LoadGen it takes a tenth of a second."""
    result = script("run.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert not re.findall(r"\| +(numpy|torch|mlperf_loadgen|tokenizers|tqdm)$", result.stderr, re.MULTILINE)
    assert re.findall(r"\| +(argparse)$", result.stderr, re.MULTILINE)
    assert result.returncode == 0 and result.stdout.count("python3 run.py --backend") == 3
    groups = ("what to run:", "how to compute:", "LoadGen's settings:", "over the network:")
    for words in (*groups, "(default: Offline)", "(default: user.conf)", "(default: 8000)"):
        assert words in result.stdout


def test_the_defaults_are_the_references():
    options = parse_args([])
    assert (options.backend, options.scenario, options.dtype, options.user_conf) == (
        "tf",
        "Offline",
        "fp32",
        "user.conf",
    )
    assert parse_args(["--quantized"]).dtype == "int8"
    assert parse_args(["--audit=x.config"]).audit_conf == "x.config"  # MLCommons' automation abbreviates it


@pytest.mark.parametrize("name", ["singlestream", "SINGLESTREAM", "SingleStream"])
def test_a_scenarios_name_is_accepted_in_any_case(name):
    assert parse_args([f"--scenario={name}"]).scenario == "SingleStream"


def test_progress_is_logged_in_order_and_the_end_is_announced(null):
    result = null("--scenario=Server", conf=SHORT_RUNS.replace("min_duration = 300", "min_duration = 3000"))
    found = re.findall("reading features|loading the model|warming up|running|scoring", result.stderr)
    assert found == ["reading features", "loading the model", "warming up", "running"]
    line = next(line for line in result.stderr.splitlines() if "running" in line)
    now, end = (
        sum(int(part) * unit for part, unit in zip(text.split(":"), (3600, 60, 1)))
        for text in re.search(r"^(\S+) .* at least 3 seconds, until (\S+);", line).groups()
    )
    assert 2 <= (end - now) % 86400 <= 4 and "--quick" in line
    assert any(line.endswith(" scoring") for line in null("--accuracy").stderr.splitlines())


def test_an_error_in_loadgens_log_is_shown(null):
    conf = SHORT_RUNS.replace("min_duration = 300", "min_duration = 9000")
    result = null("--scenario=Server", conf=conf.replace("max_duration = 20000", "max_duration = 500"))
    assert "LoadGen's error: IssueQueryThread 0 Ending early" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("INVALID: Server")


@pytest.mark.parametrize(
    "scenario, conf, words",
    [
        ("Offline", "*.Offline.target_qps = 32", "at target_qps 32 it takes 11 minutes, until"),
        ("Server", "*.Server.target_qps = 0.05", "at least 33 minutes, until"),
        ("Server", "*.Server.target_qps = 5", "at least 10 minutes, until"),
    ],
)
def test_mlperfs_ten_minutes_are_announced_before_they_start(tmp_path, scenario, conf, words):
    (tmp_path / "user.conf").write_text(conf)
    path = backend_script(tmp_path, "time.sleep(0.1)")
    with running(path, "--backend=pytorch", f"--scenario={scenario}", cwd=tmp_path, wait=words):
        pass


@pytest.mark.slow
def test_a_quick_run_claims_no_result(null, tmp_path):
    """Neither on the command line nor, by the duration that LoadGen logs, in its folder."""
    result = null("--quick", conf="*.Offline.target_qps = 2000\n*.*.min_query_count = 100000", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"TRIAL, no official result: Offline throughput [0-9.e+]+ samples/s\n", result.stdout)
    assert "a short trial, no official result" in result.stderr
    log = read_detail_log(tmp_path / "logs")
    assert log["effective_min_duration_ms"] == 10_000 and log["effective_samples_per_query"] == 22_000


def test_a_runs_record_is_beside_its_logs(run, tmp_path):
    result = run("--backend=onnxruntime", "--max_examples=8", "--accuracy", LOG_PATH="logs", MLC_MAX_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "logs/record.json").read_text())
    assert record["model_md5"] == hashlib.md5(Path(DEMO_ONNX).read_bytes()).hexdigest()
    assert record["dtype"] == "fp32" and record["backend"] in result.stderr and record["max_examples"] == 8
    assert record["dataset"] == DEMO_ENV["DATASET_FILE"] and record["variables"]["MLC_MAX_NUM_THREADS"] == "1"
    assert record["libraries"]["onnxruntime"] in record["backend"] and record["memory_bytes"] > 2**26
    assert record["cores"] >= 1 and record["finished"] >= record["started"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--accuracy"], r"\d+ of 334 samples, [0-9.e+]+ samples/s, \S+ left"),
        (["--scenario=Offline"], r"\d+ of 33\d samples, [0-9.e+]+ samples/s, \S+ left"),
        (["--scenario=Server"], r"%\|.*\| \d+ samples, [0-9.e+]+ samples/s, \S+ left"),
    ],
)
def test_only_a_terminal_shows_a_runs_progress(tmp_path, args, words):
    conf = SHORT_RUNS.replace("min_duration = 300", "min_duration = 2000")
    (tmp_path / "user.conf").write_text(conf.replace("target_qps = 100", "target_qps = 151.6"))
    path = backend_script(tmp_path, "time.sleep(0.1)")
    main, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = [sys.executable, path, "--backend=pytorch", *args]
    env = {**os.environ, **DEMO_ENV, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal's output
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(60) == 0
    assert re.search(words, shown.decode()), shown.decode()
    elsewhere = run_script(path, "--backend=pytorch", *args, cwd=tmp_path)
    assert elsewhere.returncode == 0 and "left" not in elsewhere.stderr and "\r" not in elsewhere.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_sample_gets_its_own_logits(null, tmp_path, demo_features, scenario):
    """Four workers finish out of order; the log pairs each sample with the response made from it."""
    setup = """
def echo(self, batch):
    time.sleep(np.random.default_rng().uniform(0, 0.01))
    return np.repeat(batch.packed(batch.input_ids)[:, None], 2, 1).astype(np.float32)
Fake.predict = echo"""
    result = null(f"--scenario={scenario}", "--accuracy", setup=setup, concurrency=4, LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    logged = responses(tmp_path / "logs")
    assert len(logged) == len(demo_features)
    for row, response in logged.items():
        assert (response[:, 0] == demo_features.input_ids[row, : demo_features.lengths[row]]).all()
