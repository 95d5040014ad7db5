"""tools/benchmark.py: arithmetic, a quick run on the demo's model, and what it cannot measure; no speed is tested."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DEMO_ENV, random_bert, refused

import config
from config import UserError
from tools import benchmark
from tools.benchmark import Run, convert_model, parse_args, ratios, serve, spread_samples
from tools.peak import flops


def test_flops_are_those_of_the_matrix_products():
    """A layer has four (hidden, hidden) and two (hidden, inner) products, and two within attention, for each token."""
    bert_config = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3}
    expected = sum(3 * (2 * length * (4 * 8 * 8 + 2 * 8 * 32) + 2 * 2 * length * length * 8) for length in (5, 7))
    assert flops(bert_config, [5, 7]) == expected


@pytest.mark.parametrize("group", [1, 4])
def test_samples_are_distributed_as_the_lengths_are(group):
    lengths = np.random.default_rng(0).permutation(np.arange(1000))
    rows = spread_samples(lengths, 40, group)
    assert len(set(rows.tolist())) == 40
    assert abs(lengths[rows].mean() - 499.5) < 20 and abs(np.percentile(lengths[rows], 90) - 900) < 60


def test_ratios_are_those_of_each_round():
    assert ratios([2, 9, 8], [1, 3, 2]) == "3.00 (2.00 to 4.00)"


def test_a_model_is_converted_once_into_the_form_that_a_backend_reads(tmp_path, monkeypatch):
    commands = []

    def run(command, env, check):
        path = command[-1] + (".index" if "convert.pytorch_to_tf" in command else "")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        commands.append(command[2])
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", run)
    random_bert(tmp_path / "models/tiny")
    for path in (config.DATASET, config.VOCAB):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()

    def converted(backend, dtype, folder="models/tiny"):
        return re.sub("tiny-[0-9a-f]{12}", "tiny", convert_model(backend, dtype, folder))

    assert convert_model("pytorch", "bf16", "models/tiny") == "models/tiny"
    for _ in range(2):
        assert converted("tf", "fp32") == "build/benchmark/tiny-model.pb"
        assert converted("onnxruntime", "int8", "models/tiny/") == "build/benchmark/tiny-int8.onnx"
        assert converted("openvino", "bf16") == "build/benchmark/tiny-model.onnx"
    converters = ["pytorch_to_tf", "freeze_tf", "pytorch_to_onnx", "quantize_onnx"]
    assert commands == [f"convert.{name}" for name in converters]


def test_a_conversion_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", "false")
    random_bert(tmp_path / "models/tiny")
    with refused("build/benchmark/tiny-", "-model.onnx", "convert.pytorch_to_onnx failed", "make venv"):
        convert_model("onnxruntime", "fp32", "models/tiny")


def test_a_dtype_that_a_backend_does_not_have_is_refused(monkeypatch, capsys):
    for run in ("pytorch:int4", "tf:bf16", "pytorch"):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--runs", run])
        with pytest.raises(SystemExit):
            parse_args()
        assert f"'{run}'" in capsys.readouterr().err


def test_the_number_of_rounds_has_two_names(monkeypatch):
    for flag in ("--rounds", "--turns"):
        monkeypatch.setattr("sys.argv", ["benchmark.py", flag, "7"])
        assert parse_args().rounds == 7


@pytest.mark.slow
def test_a_quick_run_gives_a_row_for_each_run_and_its_baseline(script, tmp_path):
    # ONNX Runtime, because four processes would import PyTorch; test_peers.py has a run of PyTorch.
    result = script("tools.benchmark", "--quick", "--runs", "onnxruntime:fp32")
    assert result.returncode == 0, result.stderr
    assert "other logits" not in result.stderr  # in Offline than in SingleStream
    saved = json.loads((tmp_path / "build/benchmark/table.json").read_text())
    baseline, fp32 = saved["rows"]
    assert (baseline["run"], fp32["run"]) == ("onnxruntime:reference", "onnxruntime:fp32")
    assert baseline["x baseline (min to max)"] == "1.00 (1.00 to 1.00)"
    assert all(float(row["samples/s"]) > 0 and float(row["% of peak GEMM"]) >= 0 for row in saved["rows"])
    assert 0 <= float(fp32["F1"]) <= 100
    assert "onnxruntime:reference" in result.stdout and "peak GEMM: " in result.stdout
    assert (tmp_path / "build/benchmark/table.md").read_text() in result.stdout


def test_a_model_that_cannot_be_loaded_is_named(monkeypatch):
    for name in DEMO_ENV:
        monkeypatch.setenv(name, DEMO_ENV[name])
    sent = []
    serve(SimpleNamespace(send=sent.append), "pytorch", "fp32", "Offline", "nowhere")
    with refused("pytorch:fp32: nowhere"):
        raise sent[0]


def test_a_process_that_fails_or_dies_ends_the_benchmark():
    def recv():
        raise EOFError

    run = Run.__new__(Run)  # without its processes
    run.name = "pytorch:fp32"
    run.pipes = {
        "Offline": SimpleNamespace(send=print, recv=lambda: UserError("pytorch:fp32: no such model")),
        "SingleStream": SimpleNamespace(send=print, recv=recv),
    }
    with refused("pytorch:fp32: no such model"):
        run.answer("Offline", np.arange(2))
    with refused("pytorch:fp32", "died", "fewer --runs"):
        run.answer("SingleStream", np.arange(2))


def test_samples_whose_logits_change_are_noted():
    logits = iter([{3: np.zeros((5, 2)), 4: np.zeros((6, 2))}, {3: np.zeros((5, 2)), 4: np.ones((6, 2))}])
    run = Run.__new__(Run)
    run.logits, run.changed, run.memory, run.gpu_memory = {}, set(), 0, 0
    run.pipes = {"Offline": SimpleNamespace(send=print, recv=lambda: ([0.1], next(logits), 1000, 2000))}
    for _ in range(2):
        assert run.answer("Offline", np.arange(2)) == [0.1]
    assert run.changed == {4} and (run.memory, run.gpu_memory) == (1000, 2000)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_gpu_runs_one_process_at_a_time_with_queries_of_seconds_and_a_cpu_all_of_them_in_turn(monkeypatch, on_gpu):
    """A query of the 2 samples takes 0.4 s, and on a GPU it must take 3 s."""
    steps = []

    class Recorder(Run):
        def __init__(self, name):
            self.name, self.baseline = name, False
            self.rates, self.latencies = [], []

        def open(self, scenario):
            steps.append(f"+{self.name}{scenario[0]}")

        def close(self, scenario):
            steps.append(f"-{self.name}{scenario[0]}")

        def answer(self, scenario, rows):
            steps.append(f"{self.name}{scenario[0]}{len(rows)}")
            return [0.2] * len(rows) if scenario == "SingleStream" else [0.2 * len(rows)]

    monkeypatch.setattr(benchmark, "measure_peak", lambda peak: steps.append("peak") or peak.update(fp32=1.0))
    monkeypatch.setattr(benchmark, "gpu_peak", lambda: steps.append("peak") or {"fp32": 2.0})
    runs = [Recorder("a"), Recorder("b")]
    measure = benchmark.measure_on_gpu if on_gpu else benchmark.measure_interleaved
    assert measure(runs, lambda run, scenario: np.arange(2), 2) == {"fp32": 2.0 if on_gpu else 1.0}
    one = "+{0}S {0}S2 {0}S2 {0}S16 {0}S16 -{0}S +{0}O {0}O2 {0}O2 {0}O16 {0}O16 -{0}O "
    together = "+a{0} +b{0} a{0}2 b{0}2 peak a{0}2 b{0}2 peak -a{0} -b{0} "
    expected = one.format("a") + one.format("b") + "peak" if on_gpu else together.format("S") + together.format("O")
    assert " ".join(steps) == expected.strip()
    assert runs[0].rates == pytest.approx([5.0, 5.0]) and runs[0].latencies[0][0] == pytest.approx(200)


@pytest.mark.parametrize("on_gpu, expected", [(True, benchmark.GPU_RUNS), (False, benchmark.DEFAULT_RUNS)])
def test_the_default_runs_are_those_of_the_device(monkeypatch, on_gpu, expected):
    names = []

    def run(name, folder):
        names.append(name)
        if len(names) == len(expected) + 1:
            raise InterruptedError

    pytest.importorskip("torch")
    monkeypatch.setattr("pytorch_SUT.find_device", lambda: SimpleNamespace(type="cuda" if on_gpu else "cpu"))
    monkeypatch.setattr(benchmark, "Run", run)
    monkeypatch.setattr("sys.argv", ["benchmark.py"])
    for name in DEMO_ENV:
        monkeypatch.setenv(name, DEMO_ENV[name])
    with pytest.raises(InterruptedError):
        benchmark.main()
    assert names == ["pytorch:reference", *expected]
    assert not on_gpu or "pytorch:int8" not in names


def test_a_model_of_random_weights_is_bert_larges(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from models.model_files import read_weights

    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(random_bert(tmp_path / "small")[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("config.BERT_CONFIG", str(config_file))
    folder = benchmark.random_model()
    bert_config, weights = read_weights(folder)
    assert bert_config["hidden_size"] == 48 and abs(weights["qa_outputs.weight"].std() - 0.02) < 0.01
    assert abs(weights["bert.embeddings.LayerNorm.weight"].mean() - 1) < 0.1
    assert benchmark.random_model() == folder and not list(tmp_path.glob("build/benchmark/*.part"))
