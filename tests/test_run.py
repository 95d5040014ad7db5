"""run.py from the command line, on the demo's model and data, with the real LoadGen: scenarios, modes, flags, faults."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DEMO_ENV, ROOT, fails

from create_squad_data import load_features
from run import find_peak, form_batches, parse_args, read_detail_log, verdict

# --backend and --dtype of every row that README's table of models has, and of PyTorch's other dtypes.
BACKENDS = [("pytorch", "fp32"), ("pytorch", "bf16"), ("pytorch", "int8"), ("tf", "fp32"), ("onnxruntime", "fp32"),
            ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")]
SCENARIOS = ["Offline", "SingleStream", "MultiStream", "Server"]
CONF = """
*.*.min_duration = 300
*.*.max_duration = 20000
*.*.min_query_count = 20
*.Offline.target_qps = 100
*.Server.target_qps = 40
*.Server.target_latency = 500
*.SingleStream.target_latency = 5
*.MultiStream.target_latency = 20
"""


@pytest.fixture
def run(script, tmp_path):
    """run.py with a user.conf of short runs: run("--backend=…", …, NAME=value)."""
    (tmp_path / "user.conf").write_text(CONF)
    return lambda *args, **variables: script("run.py", *args, **variables)


def responses(folder):
    """The responses in an accuracy log: {sample: float32 (tokens, 2)}."""
    with open(folder / "mlperf_log_accuracy.json", encoding="ascii") as file:
        return {entry["qsl_idx"]: np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 2)
                for entry in json.load(file)}


@pytest.fixture(scope="session")
def demo_features(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "features.npz"
    return load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(cache))[1]


@pytest.fixture
def model_of(demo_models):
    """The demo's model for a backend and dtype."""
    def path(backend, dtype):
        if backend == "openvino":
            backend = "onnxruntime"
        return demo_models["int8" if (backend, dtype) == ("onnxruntime", "int8") else backend]
    return path


@pytest.mark.parametrize("backend, dtype", BACKENDS)
def test_a_samples_response_is_the_same_bytes_in_every_scenario(run, tmp_path, model_of, backend, dtype, demo_features):
    """Whatever batch and order they bring. It is one float32 (start, end) pair a real token, and the score is right."""
    figures, logs = set(), []
    for scenario in SCENARIOS:
        result = run(f"--backend={backend}", f"--dtype={dtype}", f"--scenario={scenario}", "--accuracy",
                     LOG_PATH=scenario, ML_MODEL_FILE_WITH_PATH=model_of(backend, dtype))
        assert result.returncode == 0, result.stderr
        figures.add(result.stdout.splitlines()[-1])
        together = scenario != "Offline" or backend == "openvino"
        workers = json.loads((tmp_path / scenario / "record.json").read_text())["workers"]
        assert together or workers == len(os.sched_getaffinity(0))  # a batch on each core
        logs.append({row: response.tobytes() for row, response in responses(tmp_path / scenario).items()})
    assert {row: len(response) for row, response in logs[0].items()} == \
        {row: 8 * length for row, length in enumerate(demo_features.lengths)}
    for scenario, log in zip(SCENARIOS[1:], logs[1:]):
        assert [row for row in logs[0] if log[row] != logs[0][row]] == [], scenario
    assert len(figures) == 1
    assert json.loads(figures.pop())["f1"] >= (90 if dtype == "fp32" else 87)


@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("scenario, figure", [
    ("Offline", "throughput {} samples/s"), ("Server", "throughput {} samples/s"),
    ("SingleStream", "90th percentile latency {} ms"), ("MultiStream", "99th percentile latency {} ms")])
def test_a_performance_run_ends_with_the_verdict_and_the_figure(run, tmp_path, model_of, backend, dtype, scenario,
                                                                figure):
    result = run(f"--backend={backend}", f"--dtype={dtype}", f"--scenario={scenario}", LOG_PATH="logs",
                 ML_MODEL_FILE_WITH_PATH=model_of(backend, dtype))
    assert result.returncode == 0, result.stderr
    assert f"Scenario : {scenario}" in result.stdout  # LoadGen's own summary
    last = result.stdout.splitlines()[-1]
    match = re.fullmatch(f"(VALID|INVALID): {scenario} " + figure.format("([0-9.e+]+)"), last)
    assert match, last
    assert f"Result is : {match[1]}" in (tmp_path / "logs/mlperf_log_summary.txt").read_text()
    assert float(match[2]) > 0


def test_a_run_without_a_figure_is_said_to_have_none():
    assert verdict("Server", {"result_validity": "INVALID"}) == \
        "INVALID: Server throughput not known: LoadGen logged none"


def test_the_verdict_is_loadgens(run, tmp_path):
    (tmp_path / "valid.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 1"))
    assert run("--backend=pytorch", "--user_conf=valid.conf").stdout.splitlines()[-1].startswith("VALID: Offline")
    (tmp_path / "invalid.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 10000"))
    assert run("--backend=pytorch", "--user_conf=invalid.conf").stdout.splitlines()[-1].startswith("INVALID: Offline")


def test_accuracy_squad_finds_the_score_of_the_run(run, script):
    scored = run("--backend=pytorch", "--accuracy")
    unscored = run("--backend=pytorch", "--accuracy", SKIP_VERIFY_ACCURACY="1")
    assert "exact_match" in scored.stdout and "exact_match" not in unscored.stdout
    again = script("accuracy-squad.py")
    assert again.stdout.splitlines()[-1] == scored.stdout.splitlines()[-1]


def test_max_examples_runs_and_scores_the_first_features(run, tmp_path, demo_features):
    result = run("--backend=pytorch", "--accuracy", "--max_examples=16")
    assert result.returncode == 0, result.stderr
    assert sorted(responses(tmp_path / "build/logs")) == list(range(16))
    assert f"scored {len(set(demo_features.question[:16]))} of" in result.stderr
    result = run("--backend=pytorch", "--max_examples=16")
    assert "performance_sample_count : 16" in result.stdout


def test_the_logits_are_those_of_the_plain_model(run, tmp_path, demo_features):
    """Hugging Face's BertForQuestionAnswering, one sample at a time, padded to 384."""
    torch = pytest.importorskip("torch")
    from transformers import BertForQuestionAnswering

    run("--backend=pytorch", "--accuracy", LOG_PATH="logs")
    model = BertForQuestionAnswering.from_pretrained(ROOT / "demo/model").eval()
    logged = responses(tmp_path / "logs")
    for row in range(0, len(demo_features), 37):
        inputs = [torch.from_numpy(array[row:row + 1]).long() for array in
                  (demo_features.input_ids, demo_features.input_mask, demo_features.segment_ids)]
        with torch.inference_mode():
            plain = model(input_ids=inputs[0], attention_mask=inputs[1], token_type_ids=inputs[2])
        expected = torch.stack((plain.start_logits[0], plain.end_logits[0]), -1)[:demo_features.lengths[row]]
        assert np.abs(logged[row] - expected.numpy()).max() < 1e-4


def test_an_earlier_runs_logs_are_moved_aside(run, tmp_path):
    run("--backend=pytorch", LOG_PATH="logs")
    first = (tmp_path / "logs/mlperf_log_detail.txt").read_text()
    fails(run("--backend=pytorch", LOG_PATH="logs", ML_MODEL_FILE_WITH_PATH="nowhere"), "nowhere")
    assert not (tmp_path / "logs/mlperf_log_detail.txt").exists()
    aside, = tmp_path.glob("logs-*")
    assert (aside / "mlperf_log_detail.txt").read_text() == first


@pytest.mark.parametrize("package, backend, words", [
    ("torch", "pytorch", "make venv BACKEND=pytorch"), ("onnxruntime", "onnxruntime", "make venv BACKEND=onnxruntime"),
    ("tensorflow", "tf", "make venv BACKEND=tf"), ("openvino", "openvino", "make venv BACKEND=openvino"),
    ("ray", "ray", "make venv BACKEND=ray"), ("mlperf_loadgen", "pytorch", "make venv")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(run, tmp_path, package, backend, words):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')")
    fails(run(f"--backend={backend}", PYTHONPATH=tmp_path), package, words)


def test_variables_choose_folder_threads_and_device(run, tmp_path):
    result = run("--backend=pytorch", "--max_examples=4", "--accuracy", LOG_PATH="here/there", MLC_MAX_NUM_THREADS="1",
                 USE_GPU="off")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here/there/mlperf_log_summary.txt").exists()
    assert ", cpu, " in result.stderr


@pytest.mark.parametrize("peak", [0.3, 7, 40, 41, 5000])
def test_the_peak_is_found_to_2_percent_from_any_start(peak):
    for start in (1, 40):
        tried = []
        found = find_peak(lambda rate, tried=tried: tried.append(rate) or rate <= peak, start)
        assert found <= peak < 1.02 * found and len(tried) < 25


def test_without_a_valid_rate_the_peak_is_0():
    assert find_peak(lambda rate: False, 10) == 0


def test_find_peak_tries_rates_until_the_highest_valid_one(script, tmp_path):
    """Two workers of 2 ms a sample: 1,000 samples/s, and somewhat more for the 0.7 s of a trial, within 100 ms."""
    (tmp_path / "user.conf").write_text(CONF.replace("target_latency = 500", "target_latency = 100")
                                        .replace("min_query_count = 20", "min_query_count = 700")
                                        .replace("target_qps = 40", "target_qps = 400")
                                        .replace("max_duration = 20000", "max_duration = 0"))
    (tmp_path / "slow.py").write_text(FAULTY.replace("BODY", "time.sleep(0.002 * len(batch))"))
    result = script(tmp_path / "slow.py", "--backend=pytorch", "--scenario=Server", "--find_peak", "--batch_tokens=1")
    assert result.returncode == 0, result.stderr
    peak = float(re.match("([0-9.]+) samples/s is the highest", result.stdout.splitlines()[-1])[1])
    assert 20 < peak < 1300
    assert (tmp_path / f"build/logs/target_qps-{peak:.6g}/mlperf_log_summary.txt").exists()


@pytest.mark.parametrize("target_ms, workers", [(200, 4), (60, 2), (15, 1)])
def test_server_runs_so_many_batches_at_once_that_the_longest_sample_takes_half_the_latency(target_ms, workers):
    """Of a backend of four threads, 10 ms for 384 tokens with all of them and 40 ms with one."""
    def predict(batch):
        time.sleep(0.01 * backend.workers)

    backend = SimpleNamespace(threads=4, workers=1, together="any", predict=predict)
    qsl = SimpleNamespace(longest_batch=lambda count: SimpleNamespace(lengths=np.array([384])))
    settings = SimpleNamespace(server_target_latency_ns=target_ms * 1e6)
    batching = form_batches(parse_args(["--scenario=Server"]), settings, backend, qsl)
    assert backend.workers == workers
    assert 0.5 < batching.tokens_a_second / (384 / (0.01 * workers)) <= 1
    assert batching.max_tokens == (1 if workers > 1 else int(batching.tokens_a_second * target_ms / 3000))


def test_servers_batches_for_other_machines_take_a_third_of_the_latency():
    """Several are on their way at once, but each runs on all of a machine."""
    backend = SimpleNamespace(workers=4, together="any", predict=lambda batch: time.sleep(0.01))
    qsl = SimpleNamespace(longest_batch=lambda count: SimpleNamespace(lengths=np.array([384])))
    batching = form_batches(parse_args(["--scenario=Server"]), SimpleNamespace(server_target_latency_ns=1e8), backend, qsl)
    assert batching.workers == backend.workers == 4
    assert batching.max_tokens == int(batching.tokens_a_second / 30) > 384


# A backend whose predict does as the test says, in place of one of run.py's.
FAULTY = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import config, run

class Faulty:
    name, workers, together, vocab_size = "faulty", 2, "any", sys.maxsize
    calls = 0

    def __init__(self, args):
        pass

    def predict(self, batch):
        self.calls += 1
        if self.calls > 3:  # after the warming up
            BODY
        return np.zeros((batch.lengths.sum(), 2), np.float32)

run.BACKENDS["pytorch"] = ("__main__", "Faulty", ("fp32",))
config.script(run.main)
"""


@pytest.fixture
def null(script, tmp_path):
    """run.py with a backend that computes nothing: null("--scenario=…", …, conf=text of user.conf, NAME=value)."""
    def call(*args, conf=CONF, **variables):
        (tmp_path / "user.conf").write_text(conf)
        (tmp_path / "null.py").write_text(FAULTY.replace("BODY", "pass"))
        return script(tmp_path / "null.py", "--backend=pytorch", *args, **variables)
    return call


def test_help_has_groups_defaults_and_examples_and_loads_no_package_to_show_them(script):
    """So it comes in a tenth of a second."""
    result = script("run.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert not re.findall(r"\| +(numpy|torch|mlperf_loadgen|tokenizers|tqdm)$", result.stderr, re.MULTILINE)
    assert re.findall(r"\| +(argparse)$", result.stderr, re.MULTILINE)
    assert result.returncode == 0 and result.stdout.count("python3 run.py --backend") == 3
    for words in ("what to run:", "how to compute:", "LoadGen's settings:", "over the network:", "(default: Offline)",
                  "(default: user.conf)"):
        assert words in result.stdout


@pytest.mark.parametrize("name", ["singlestream", "SINGLESTREAM", "SingleStream"])
def test_a_scenarios_name_is_taken_in_any_case(null, name):
    assert "SingleStream 90th percentile latency" in null(f"--scenario={name}").stdout.splitlines()[-1]


def test_the_stages_are_named_in_turn_and_the_end_is_announced(null, tmp_path):
    result = null("--scenario=Server", conf=CONF.replace("min_duration = 300", "min_duration = 3000"))
    found = re.findall("reading features|loading the model|warming up|running|scoring", result.stderr)
    assert found == ["reading features", "loading the model", "warming up", "running"]
    line = next(line for line in result.stderr.splitlines() if "running" in line)
    now, end = (sum(int(part) * unit for part, unit in zip(time_.split(":"), (3600, 60, 1)))
                for time_ in re.search(r"^(\S+) .* at least 3 seconds, until (\S+);", line).groups())
    assert 2 <= (end - now) % 86400 <= 4 and "--quick" in line
    assert any(line.endswith(" scoring") for line in null("--accuracy").stderr.splitlines())


def test_what_loadgen_logs_as_an_error_is_told(null):
    result = null("--scenario=Server", conf=CONF.replace("min_duration = 300", "min_duration = 9000")
                  .replace("max_duration = 20000", "max_duration = 500"))
    assert "LoadGen's error: IssueQueryThread 0 Ending early" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("INVALID: Server")


@pytest.mark.parametrize("conf, words", [
    ("", "at target_qps 32 it takes 11 minutes, until"), ("*.Server.target_qps = 0.05", "at least 33 minutes, until"),
    ("*.Server.target_qps = 5", "at least 10 minutes, until")])
def test_mlperfs_ten_minutes_are_announced_before_they_start(tmp_path, conf, words):
    (tmp_path / "user.conf").write_text(conf or "*.Offline.target_qps = 32")
    (tmp_path / "null.py").write_text(FAULTY.replace("BODY", "time.sleep(0.1)"))
    process = subprocess.Popen([sys.executable, tmp_path / "null.py", "--backend=pytorch",
                                f"--scenario={'Server' if conf else 'Offline'}"], cwd=tmp_path,
                               env={**os.environ, **DEMO_ENV}, stderr=subprocess.PIPE, text=True)
    try:
        assert words in next(line for line in process.stderr if "running" in line)
    finally:
        process.kill()
        process.communicate()


def test_a_quick_run_claims_no_result(null, tmp_path):
    """Neither on the command line nor, by the duration that LoadGen logs, in its folder."""
    result = null("--quick", conf="*.Offline.target_qps = 2000\n*.*.min_query_count = 100000", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"TRIAL, no official result: Offline throughput [0-9.e+]+ samples/s\n", result.stdout)
    assert "a short trial, no official result" in result.stderr
    log = read_detail_log(tmp_path / "logs")
    assert log["effective_min_duration_ms"] == 10_000 and log["effective_samples_per_query"] == 22_000


def test_a_runs_record_stands_beside_its_logs_and_moves_with_them(run, tmp_path):
    result = run("--backend=pytorch", "--max_examples=8", "--accuracy", LOG_PATH="logs", MLC_MAX_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "logs/record.json").read_text())
    with open(ROOT / "demo/model/model.safetensors", "rb") as file:
        assert record["model_md5"] == hashlib.file_digest(file, "md5").hexdigest()
    assert record["dtype"] == "fp32" and record["backend"] in result.stderr and record["max_examples"] == 8
    assert record["dataset"] == DEMO_ENV["DATASET_FILE"] and record["variables"]["MLC_MAX_NUM_THREADS"] == "1"
    assert record["libraries"]["torch"] in record["backend"] and record["memory_bytes"] > 2**28 and record["cores"] >= 1
    assert record["finished"] >= record["started"]
    fails(run("--backend=pytorch", LOG_PATH="logs", ML_MODEL_FILE_WITH_PATH="nowhere"), "nowhere")
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("args, words", [
    (["--accuracy"], r"\d+ of 334 samples, [0-9.e+]+ samples/s, \S+ left"),
    (["--scenario=Offline"], r"\d+ of 33\d samples, [0-9.e+]+ samples/s, \S+ left"),
    (["--scenario=Server"], r"%\|.*\| \d+ samples, [0-9.e+]+ samples/s, \S+ left")])
def test_a_terminal_shows_a_runs_progress_and_nothing_else_does(script, tmp_path, args, words):
    (tmp_path / "user.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 2000")
                                        .replace("target_qps = 100", "target_qps = 151.6"))
    (tmp_path / "slow.py").write_text(FAULTY.replace("BODY", "time.sleep(0.1)"))
    command = [sys.executable, str(tmp_path / "slow.py"), "--backend=pytorch", *args]
    env = {**os.environ, **DEMO_ENV, "TERM": "xterm"}
    main, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal tells its end
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(60) == 0
    assert re.search(words, shown.decode()), shown.decode()
    elsewhere = script(*command[1:])
    assert elsewhere.returncode == 0 and "left" not in elsewhere.stderr and "\r" not in elsewhere.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("body, words", [
    ("raise ValueError('no such layer')", ["ValueError", "no such layer"]),
    ("raise config.UserError('disk gone')", ["disk gone"]),
    ("raise SystemExit(0)", ["SystemExit"]),
    ("return np.zeros((3, 2), np.float32)", ["(3, 2)"]),
    ("return np.zeros((batch.lengths.sum(), 2))", ["float64"]),
    ("return None", ["NoneType"]),
])
def test_a_fault_in_a_worker_ends_the_run_with_its_message(script, tmp_path, scenario, body, words):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "faulty.py").write_text(FAULTY.replace("BODY", body))
    started = time.monotonic()
    result = script(tmp_path / "faulty.py", "--backend=pytorch", f"--scenario={scenario}")
    assert result.returncode == 1
    assert time.monotonic() - started < 20
    line = result.stderr.splitlines()[-1]
    assert line.startswith("run.py: error: ") and all(word in line for word in words), line


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_signal_ends_a_run_within_seconds(tmp_path, scenario, sent, status):
    (tmp_path / "user.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 60000"))
    # A background job, such as CI's may be, hands down SIGINT ignored; a terminal does not.
    terminal = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "slow.py").write_text(terminal + FAULTY.replace("BODY", "time.sleep(0.2)"))
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py", "--backend=pytorch", f"--scenario={scenario}"],
                               cwd=tmp_path, env={**os.environ, **DEMO_ENV}, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    while "running" not in process.stderr.readline():
        pass
    time.sleep(0.5)
    process.send_signal(sent)
    started = time.monotonic()
    message = process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 3
    assert process.returncode == status
    assert "incomplete" in message and "Traceback" not in message


def test_every_sample_is_answered_by_its_own_logits(script, tmp_path, demo_features):
    """Four workers that finish out of order: the log pairs each sample with the response made from it."""
    (tmp_path / "user.conf").write_text(CONF)
    body = """pass
        time.sleep(np.random.default_rng().uniform(0, 0.01))
        return np.repeat(batch.packed(batch.input_ids)[:, None], 2, 1).astype(np.float32)"""
    (tmp_path / "echo.py").write_text(FAULTY.replace("BODY", body).replace('"faulty", 2', '"faulty", 4'))
    for scenario in SCENARIOS:
        result = script(tmp_path / "echo.py", "--backend=pytorch", f"--scenario={scenario}", "--accuracy",
                        LOG_PATH=scenario)
        assert result.returncode == 0, result.stderr
        logged = responses(tmp_path / scenario)
        assert len(logged) == len(demo_features)
        for row, response in logged.items():
            assert (response[:, 0] == demo_features.input_ids[row, :demo_features.lengths[row]]).all()
