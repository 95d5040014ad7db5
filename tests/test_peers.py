"""tools/peers.py: peers compute what the baseline does, and one that cannot run is one line; no speed is tested."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DEMO_ENV, ROOT, predict, random_batch, random_bert, refused

pytest.importorskip("torch", reason="the peers run PyTorch's model")
if not importlib.util.find_spec("transformers"):
    pytest.skip("the package transformers is absent, and the peers run its model", allow_module_level=True)

import torch

import config
from backends import RunOptions
from config import UserError
from pytorch_SUT import PyTorchReference, cpu_runs
from tools import benchmark, peers
from tools.benchmark import Run
from tools.peers import PEERS, load_peer, obstacle, peer_runs

# PyTorch's compiler, inductor, takes 25 s for this BERT; "eager" runs what torch.compile captures without it.
COMPILER = os.environ.get("PEERS_COMPILER", "eager")


@pytest.fixture
def bert(tmp_path, monkeypatch):
    """Write a BERT of one layer, which peers load from then on, and return its path."""
    random_bert(tmp_path, num_hidden_layers=1)
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", str(tmp_path))
    monkeypatch.setattr(peers, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peers.Compiled, "compiler", COMPILER)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # `monkeypatch` removes what the peer sets
    return tmp_path / "model.safetensors"


# torch.compile and zentorch take bf16 as `transformers` does, by a cast of the model, so that their fp32 is enough.
PAIRS = [
    (name, dtype)
    for name, entry in PEERS.items()
    for dtype in entry.dtypes
    if dtype != "bf16" or not issubclass(entry.peer, peers.Compiled)
]


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", PAIRS)
def test_a_peer_computes_what_the_baseline_does(bert, name, dtype):
    if reason := obstacle(name):  # zentorch, which is not in requirements/test.txt and needs AVX-512
        pytest.skip(f"{name}: {reason}")
    options = RunOptions(backend=name, dtype=dtype)
    if name == "hf-openvino" and dtype == "bf16" and not cpu_runs("bf16"):
        with refused("no bf16 instructions"):
            load_peer(options)
        return
    batch = random_batch(60, 9, 384)
    expected = predict(PyTorchReference(RunOptions(reference=True)), batch)
    peer = load_peer(options)
    logits = predict(peer, batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    least, limit = {"fp32": (0, 1e-5), "bf16": (1e-4, 0.02), "int8": (1e-4, 0.3)}[dtype]
    assert least <= difference < limit
    assert peer.model_path == str(bert) and peer.name == f"{name}, {dtype}"


def test_torch_compile_keeps_its_cache_in_the_project_and_starts_no_processes(bert, monkeypatch):
    """The variables are those that PyTorch documents; a user's own value stays."""
    monkeypatch.setattr(peers.Compiled, "compiler", "eager")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    load_peer(RunOptions(backend="torch.compile"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(bert.parent / "cache")
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"


def test_torch_compile_never_compiles_while_it_is_measured(bert, monkeypatch):
    """A model that was compiled for one length only cannot run another without compiling again."""
    monkeypatch.setattr(peers.Compiled, "compiler", "eager")
    monkeypatch.setattr(torch, "compile", lambda *args, dynamic, call=torch.compile, **more: call(*args, **more))
    peer = load_peer(RunOptions(backend="torch.compile"))
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        peer.predict(random_batch(60))


@pytest.mark.parametrize("name", ["hf-openvino", "hf-onnxruntime"])
def test_a_peer_of_cpus_does_not_run_beside_a_gpu(bert, monkeypatch, name):
    monkeypatch.setattr("pytorch_SUT.find_device", lambda: torch.device("meta"))
    with refused("CPUs only", "USE_GPU=0"):
        load_peer(RunOptions(backend=name))


def test_a_peer_that_cannot_run_is_one_line_that_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("zentorch", "onnx") else name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    runs, absent = peer_runs(PEERS, ["fp32", "bf16", "fp32"])
    assert runs == ["transformers:fp32", "transformers:bf16", "hf-openvino:fp32", "hf-openvino:bf16"]
    assert [line.partition(":")[0] for line in absent] == ["torch.compile", "zentorch", "hf-onnxruntime"]
    compiler, zentorch, onnx = absent
    assert "needs a C++ compiler" in compiler and "apt install g++" in compiler
    fitting = ".".join(torch.__version__.split(".")[:2])
    assert zentorch.endswith(f"not installed; `.venv/bin/pip install 'zentorch=={fitting}.*'` installs it")
    assert onnx.endswith("not installed; `.venv/bin/pip install onnx` installs it")
    monkeypatch.setattr("importlib.util.find_spec", str)
    monkeypatch.setattr(config, "cpu_flags", lambda: ["avx2"])
    assert "AVX-512" in obstacle("zentorch")


def test_a_peer_runs_in_those_of_the_dtypes_that_it_has():
    assert peer_runs(["transformers"], ["int8", "bf16"]) == (["transformers:bf16"], [])
    assert peer_runs([], ["fp32"]) == ([], [])
    assert peer_runs(["hf-openvino"], ["int8"]) == (
        [],
        ["hf-openvino: runs in fp32, bf16, and none of the --runs does"],
    )


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("step", ["open", "answer", "second scenario"])
def test_a_peer_that_fails_is_left_out_and_a_backend_that_fails_ends_the_benchmark(monkeypatch, caplog, step, on_gpu):
    class Recorder(Run):
        def __init__(self, name, fails=False):
            self.name, self.backend, self.baseline, self.fails = name, name.partition(":")[0], False, fails
            self.rates, self.latencies, self.pipes, self.processes, self.ended = [], [], {}, {}, []

        def open(self, scenario):
            self.pipes[scenario] = SimpleNamespace(close=partial(self.ended.append, f"{scenario} closed"))
            self.processes[scenario] = SimpleNamespace(join=partial(self.ended.append, f"{scenario} ended"))
            self.fail(step == "open" or (step == "second scenario" and scenario == "Offline"))

        def answer(self, scenario, rows):
            self.fail(step == "answer")
            return [2.0]

        def fail(self, now):
            if self.fails and now:
                raise UserError(f"{self.name}: no such operator")

    def measure(*runs):
        (benchmark.measure_on_gpu if on_gpu else benchmark.measure_interleaved)(runs, lambda *_: np.arange(2), 3)

    monkeypatch.setattr(benchmark, "measure_peak", lambda peak: None)
    monkeypatch.setattr(benchmark, "gpu_peak", dict)
    runs = ours, peer, other = (
        Recorder("pytorch:fp32"),
        Recorder("transformers:fp32", True),
        Recorder("hf-openvino:fp32"),
    )
    measure(*runs)
    assert [len(run.rates) for run in runs] == [3, 0, 3]
    assert not ours.fault and not other.fault
    assert peer.fault == "transformers:fp32: no such operator; not measured" and peer.fault in caplog.text
    opened = ["SingleStream", "Offline"] if step == "second scenario" else ["SingleStream"]
    assert peer.ended == [f"{scenario} {what}" for scenario in opened for what in ("closed", "ended")]
    assert not peer.pipes and not peer.processes
    with refused("pytorch:fp32: no such operator"):
        measure(Recorder("pytorch:fp32", True))


@pytest.fixture
def threads(monkeypatch):
    """Let the benchmark start a thread for each of its processes: importing PyTorch takes a process seconds."""

    def start(target, args, daemon):
        pipe, *others = args
        own = Connection(os.dup(pipe.fileno()))  # a process has its own copy, too
        return threading.Thread(target=target, args=(own, *others), daemon=daemon)

    context = SimpleNamespace(Process=start, Pipe=Pipe)
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(benchmark, "measure_peak", lambda peak: peak.update(fp32=1e9))


def test_peers_are_rows_of_the_same_table(threads, monkeypatch, tmp_path, capsys):
    """One that fails and one that is not installed are lines below it."""

    def fail(self, bert, options):
        raise RuntimeError("no such operator\nand a long explanation")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers.OpenVino, "make", fail)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, call=peers.importlib.util.find_spec: name != "zentorch"
    )
    for name in DEMO_ENV:
        monkeypatch.setenv(name, DEMO_ENV[name])
    arguments = [
        "--samples=1",
        "--rounds=1",
        "--runs",
        "pytorch:fp32",
        "--peers",
        "transformers",
        "zentorch",
        "hf-openvino",
    ]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    saved = json.loads((tmp_path / "build/benchmark/table.json").read_text())
    rows = {row["run"]: row for row in saved["rows"]}
    assert list(rows) == ["pytorch:reference", "pytorch:fp32", "transformers:fp32"]
    assert rows["transformers:fp32"]["F1"] == rows["pytorch:fp32"]["F1"]
    relative = saved["rates"]["transformers:fp32"][0] / saved["rates"]["pytorch:reference"][0]
    assert rows["transformers:fp32"]["x baseline (min to max)"].startswith(f"{relative:.2f} ")
    printed = capsys.readouterr().out
    assert "peers' baseline: pytorch:reference" in printed
    zentorch, openvino = printed.strip().splitlines()[-3::2]
    assert zentorch.startswith("zentorch: not installed")
    assert openvino == "hf-openvino:fp32: no such operator; not measured"


def test_peers_are_measured_in_the_dtypes_of_the_runs(monkeypatch):
    names = []

    def run(name, folder):
        names.append(name)
        if name.startswith("transformers"):
            raise InterruptedError

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


INTERRUPTED = """\
import os, signal, sys, time
from types import SimpleNamespace
sys.path.insert(0, {root!r})
sys.modules["pytorch_SUT"] = SimpleNamespace(find_device=lambda: SimpleNamespace(type="cpu"))
import config
from tools import benchmark

def serve(pipe, *args):
    print(os.getpid(), signal.getsignal(signal.SIGINT).name, flush=True)
    pipe.recv()
    pipe.send(([], {{}}, 0, 0))
    time.sleep(1000)

benchmark.serve = serve
if __name__ == "__main__":
    config.run_command(benchmark.main)
"""


def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    """A terminal sends the signal to all processes of the command."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(root=str(ROOT)))
    command = [sys.executable, "interrupted.py", "--runs", "pytorch:fp32", "--peers", "transformers"]
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    env = {**os.environ, **DEMO_ENV}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **files) as process:
        started, handlers = zip(*(process.stdout.readline().split() for _ in range(3)))
        while "round 1" not in process.stderr.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, text = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # they have ended
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and set(handlers) == {"SIG_IGN"}
    assert text.strip().splitlines()[-1].endswith("interrupted") and "Traceback" not in text
    assert not any(os.path.exists(f"/proc/{number}") for number in started)
