"""tools/peers.py: peers compute what the baseline does, and one that cannot run is one line; no speed is tested."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import predict, random_batch, random_bert, refused

pytest.importorskip("torch")
pytest.importorskip("transformers")


from backends import RunOptions
from config import UserError
from pytorch_SUT import PyTorchReference
from tools import benchmark, peers
from tools.benchmark import Run
from tools.peers import PEERS, load_peer, peer_runs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_the_baseline_does(tmp_path, monkeypatch, name, dtype):
    if dtype not in PEERS[name].dtypes or not peer_runs([name], [dtype])[0]:
        pytest.skip(f"{name} has no {dtype}, or is not installed")
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", str(tmp_path))
    monkeypatch.setattr(peers, "WARM_UP", (20, 30))
    random_bert(tmp_path)
    batch = random_batch(60, 9)
    expected = predict(PyTorchReference(RunOptions(reference=True)), batch)
    peer = load_peer(RunOptions(backend=name, dtype=dtype))
    logits = predict(peer, batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    share = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.2}[dtype]
    assert np.abs(logits - expected).max() < share * np.abs(expected).max()
    assert peer.model_path == str(tmp_path / "model.safetensors") and dtype in peer.name


def test_a_peer_that_is_not_installed_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("zentorch", "onnx") else name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    runs, absent = peer_runs(PEERS, ["fp32", "bf16", "fp32"])
    assert runs == ["transformers:fp32", "transformers:bf16", "hf-openvino:fp32", "hf-openvino:bf16"]
    assert [line.partition(":")[0] for line in absent] == ["torch.compile", "zentorch", "hf-onnxruntime"]
    compiler, zentorch, onnx = absent
    assert "needs a C++ compiler" in compiler and "apt install g++" in compiler
    for line, package in ((zentorch, "zentorch"), (onnx, "onnx")):
        assert line.endswith(f"not installed; `.venv/bin/pip install {package}` installs it")


def test_a_peer_runs_in_those_of_the_dtypes_that_it_has():
    assert peer_runs(["transformers"], ["int8", "bf16"]) == (["transformers:bf16"], [])
    assert peer_runs([], ["fp32"]) == ([], [])


def test_a_peer_that_fails_is_left_out_and_a_backend_that_fails_ends_the_benchmark(caplog):
    ended = []

    class Broken(Run):
        def __init__(self, name):
            self.name, self.backend, self.scenarios = name, name.partition(":")[0], ("SingleStream", "Offline")
            self.pipes, self.processes = {}, {}

        def open(self, scenario):
            pipe = SimpleNamespace(close=lambda: ended.append(f"{scenario} closed"))
            self.pipes[scenario] = pipe
            self.processes[scenario] = SimpleNamespace(join=lambda: ended.append(f"{scenario} ended"))
            if scenario == "Offline":
                raise UserError(f"{self.name}: no such operator")

    peer = Broken("transformers:fp32")
    assert not all(map(peer.try_to_open, peer.scenarios))
    assert peer.fault == "transformers:fp32: no such operator; not measured" and peer.fault in caplog.text
    assert ended == ["SingleStream closed", "SingleStream ended", "Offline closed", "Offline ended"]
    with refused("pytorch:fp32: no such operator"):
        all(map(Broken("pytorch:fp32").try_to_open, peer.scenarios))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_others_are_measured_if_a_peer_fails(monkeypatch, on_gpu):
    class Recorder(Run):
        def __init__(self, name):
            self.name, self.backend, self.baseline = name, name.partition(":")[0], False
            self.scenarios, self.rates, self.latencies, self.pipes = ("SingleStream", "Offline"), [], [], {}

        def open(self, scenario):
            if self.backend == "transformers":
                raise UserError(f"{self.name}: out of memory")

        def close(self, scenario):
            pass

        def answer(self, scenario, rows):
            return [2.0]

    monkeypatch.setattr(benchmark, "measure_peak", lambda peak: None)
    monkeypatch.setattr(benchmark, "gpu_peak", dict)
    runs = [Recorder("pytorch:fp32"), Recorder("transformers:fp32"), Recorder("hf-openvino:fp32")]
    (benchmark.measure_on_gpu if on_gpu else benchmark.measure_interleaved)(runs, lambda *_: np.arange(2), 3)
    assert [len(run.rates) for run in runs] == [3, 0, 3] and [bool(run.fault) for run in runs] == [False, True, False]


@pytest.mark.slow
def test_peers_are_rows_of_the_same_table(script, tmp_path):
    result = script("tools.benchmark", "--quick", "--peers", "transformers", "zentorch", OMP_WAIT_POLICY="passive")
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "build/benchmark/table.json").read_text())
    rows = {row["run"]: row for row in saved["rows"]}
    assert list(rows)[:3] == ["pytorch:reference", "pytorch:fp32", "transformers:fp32"]
    assert float(rows["transformers:fp32"]["samples/s"]) > 0
    assert rows["transformers:fp32"]["F1"] == rows["pytorch:fp32"]["F1"]
    assert ("zentorch:fp32" in rows) != ("zentorch: not installed" in result.stdout)


def test_peers_are_measured_in_the_dtypes_of_the_runs(monkeypatch):
    names = []

    def run(name, folder):
        names.append(name)
        if name.startswith("transformers"):
            raise InterruptedError

    from helpers import DEMO_ENV

    monkeypatch.setattr("pytorch_SUT.find_device", lambda: SimpleNamespace(type="cpu"))
    monkeypatch.setattr(benchmark, "Run", run)
    for name in DEMO_ENV:
        monkeypatch.setenv(name, DEMO_ENV[name])
    for args, expected in (
        (["--peers"], ["pytorch:reference", "pytorch:fp32", "transformers:fp32"]),
        (
            ["--runs", "pytorch:bf16", "--peers", "transformers"],
            ["pytorch:reference", "pytorch:bf16", "transformers:bf16"],
        ),
    ):
        names.clear()
        monkeypatch.setattr("sys.argv", ["benchmark.py", *args])
        with pytest.raises(InterruptedError):
            benchmark.main()
        assert names == expected
