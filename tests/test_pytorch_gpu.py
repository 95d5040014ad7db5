"""The PyTorch backend on GPUs that stand-ins replace: dtypes, notices, the record, and queries under way at once."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DEMO_ENV, SHORT_RUNS, main_of, random_batch, random_bert, refused

pytest.importorskip("torch")
import cuda_standins
import torch

import batching
from backends import RunOptions
from batching import plan_batching
from files import read_json
from models import cuda_bert, gpus
from pytorch_SUT import PyTorchBackend
from squad_QSL import SquadQSL
from squad_SUT import SquadSUT, Worker

STREAMS = ("SingleStream", "MultiStream")
T4 = gpus.Gpu("Tesla T4", 15 * 2**30, 0, "580.65.06", "13.0")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads the backend in a dtype on stand-ins for GPUs, see `cuda_standins.install`."""
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model")
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "model")
    monkeypatch.delenv("USE_GPU", raising=False)
    threads = torch.get_num_threads()
    matmul = torch.backends.cuda.matmul

    def load(dtype="fp16", batch_tokens=None, **machine):
        cuda_standins.install(monkeypatch, **machine)
        monkeypatch.setattr(cuda_bert, "GRAPH_TOKENS", (64, 512))
        monkeypatch.setattr(gpus, "find_gpus", lambda: [T4] * machine.get("gpus", 1))
        rates = {torch.float16: 60.0, torch.float32: 8.0, torch.bfloat16: 60.0}
        monkeypatch.setattr(cuda_bert, "product_rate", lambda device, dtype, size: rates[dtype])
        return PyTorchBackend(RunOptions(dtype=dtype, batch_tokens=batch_tokens))

    with cuda_standins.kernels():
        yield load
    torch.set_num_threads(threads)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = (True, True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_backend_describes_its_gpus(load, dtype):
    backend = load(dtype, gpus=2, multiprocessors=40)
    device = "2 x Tesla T4 (15 GiB); driver 580.65.06; CUDA 13.0"
    assert backend.name == f"PyTorch {torch.__version__}, {device}, {dtype}"
    assert (backend.gpu, backend.batch_tokens, backend.concurrency, backend.in_flight) == (device, 5120, 4, 2)
    assert backend.max_concurrency == 1, "nothing adjusts the number of calls"
    assert backend.predict(random_batch(60, 7)).shape == (67, 2)


def test_batch_tokens_override_the_gpus_default_and_a_single_sample_always_fits(load):
    backend = load(batch_tokens=100)
    assert backend.batch_tokens == 100
    assert backend.predict(random_batch(384)).shape == (384, 2)


@pytest.mark.parametrize(
    "dtype, capability, words",
    [
        ("int8", (9, 0), ["--dtype=int8 runs on CPUs only", "USE_GPU=0", "--dtype=fp16"]),
        ("bf16", (7, 5), ["--dtype=bf16", "compute capability 8.0", "--dtype=fp16"]),
    ],
)
def test_a_dtype_that_a_gpu_lacks_is_refused_with_one_that_it_has(load, dtype, capability, words):
    with refused(*words):
        load(dtype, capability=capability)


def test_fp32_is_the_default_and_says_how_much_faster_fp16_is(load, caplog):
    assert RunOptions().dtype == "fp32"
    load("fp32")
    assert "--dtype=fp16 computes products 7.5 times as fast as fp32" in caplog.text
    caplog.clear()
    load("fp16")
    assert "fast" not in caplog.text


@pytest.mark.parametrize("agree", [True, False])
def test_a_gpu_whose_bytes_depend_on_the_batch_is_a_notice_and_in_the_record(load, monkeypatch, caplog, agree):
    monkeypatch.setattr(batching, "batches_agree", lambda *args: agree)
    assert load().same_bytes is agree
    assert ("the last bits of a sample's logits depend on the other samples" in caplog.text) != agree


def test_the_check_of_the_bytes_runs_on_the_gpus_with_full_batches(load, monkeypatch):
    """A sample's last bits change in a batch of more than 4,000 tokens, which is not a full one."""
    real = cuda_bert.CudaBert.__call__

    def call(bert, batch):
        return real(bert, batch) + (1e-6 if batch.lengths.sum() > 4000 else 0)

    monkeypatch.setattr(cuda_bert.CudaBert, "__call__", call)
    assert load("fp32", multiprocessors=40).same_bytes is False
    assert load("fp32", batch_tokens=4000).same_bytes is not None


def test_a_machine_whose_gpu_pytorch_does_not_see_is_a_notice(load, monkeypatch, caplog):
    monkeypatch.setattr(gpus, "find_gpus", lambda: [T4])
    assert not torch.cuda.is_available()
    backend = PyTorchBackend(RunOptions())
    assert ", cpu, fp32" in backend.name and backend.gpu is None
    assert "PyTorch runs on the CPU, not on the Tesla T4" in caplog.text
    assert "docs/gpu.md" in caplog.text or torch.version.cuda


def test_use_gpu_0_runs_on_the_cpu(load, monkeypatch):
    monkeypatch.setenv("USE_GPU", "0")
    assert ", cpu, fp32" in load("fp32").name


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_every_sample_gets_its_own_logits_with_two_batches_in_flight_on_each_gpu(load, monkeypatch, scenario):
    lengths = np.random.default_rng(0).integers(5, 385, 60).astype(np.int32)
    batch = random_batch(*lengths)
    features = SimpleNamespace(
        lengths=lengths, input_ids=batch.input_ids, input_mask=batch.input_mask, segment_ids=batch.segment_ids
    )
    qsl = SquadQSL(features)
    monkeypatch.setenv("USE_GPU", "0")
    cpu = PyTorchBackend(RunOptions())
    expected = np.split(cpu.predict(batch), np.cumsum(lengths)[:-1])
    monkeypatch.delenv("USE_GPU")
    backend = load("fp32", gpus=2, multiprocessors=8)
    outcome, done = {}, threading.Event()

    class Recorder(SquadSUT):
        def answer(self, ids, batch):
            outcome.update(zip(ids, np.split(self.backend.predict(batch), np.cumsum(batch.lengths)[:-1])))
            if len(outcome) == len(lengths):
                done.set()

    plan = plan_batching(RunOptions(scenario=scenario), backend, qsl, 30.0)
    assert plan.concurrency == 4 and plan.shares == 2 and plan.max_tokens == 1024
    failures = []
    sut = Recorder(backend, qsl, plan, lambda error: (failures.append(error), done.set()), Worker())
    sut.issue_queries([SimpleNamespace(index=row, id=row) for row in range(len(lengths))])
    assert done.wait(60) and not failures
    sut.stop()
    for row, logits in enumerate(expected):
        assert np.abs(outcome[row] - logits).max() < 1e-4 * np.abs(logits).max()


@pytest.mark.slow
def test_a_run_on_a_gpu_is_recorded(load, monkeypatch, tmp_path):
    """run.py itself, with LoadGen, on the demo's model and a GPU of stand-ins."""
    load("fp32")
    for name, value in DEMO_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOG_PATH", "logs")
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    monkeypatch.setattr("sys.argv", ["run.py", "--backend=pytorch", "--dtype=fp16", "--max_examples=30"])
    main_of("run.py")()
    record = json.loads((tmp_path / "logs/record.json").read_text())
    assert record["gpu"] == "Tesla T4 (15 GiB); driver 580.65.06; CUDA 13.0" and record["gpu"] in record["backend"]
    assert record["same_bytes_in_every_batch"] in (True, False)
    assert record["batch_tokens"] == 2048 and record["workers"] == 2
    assert read_json("logs/record.json", "", "") == record


@pytest.mark.slow
def test_every_part_of_the_gpu_check_runs_on_a_gpu(load, monkeypatch, tmp_path):
    """Those that dry runs leave out, too: graphs on and off, and the GPU's memory and peak."""
    from tools import gpu_check

    load("fp32", multiprocessors=2)  # installs the stand-ins
    random_bert(tmp_path / "model", vocab_size=2400)
    for name in ("VOCAB_FILE", "DATASET_FILE"):
        monkeypatch.setenv(name, DEMO_ENV[name])
    monkeypatch.setenv("USE_GPU", "")
    amounts = gpu_check.Amounts(dtypes=("fp32",), fast="fp32", samples=4, seconds=0.01)
    known = {}
    for name, function, further in gpu_check.parts(amounts):
        if function is not gpu_check.server:
            known[name] = function(amounts, known, *further)
            monkeypatch.setenv("USE_GPU", "")  # the part that computes the CPU's logits sets it to 0
    assert known["machine"]["default batch (tokens)"] == 256
    assert set(known["products"]) == {"fp32 (TFLOP/s)", "fp16 (TFLOP/s)", "bf16 (TFLOP/s)"}
    assert known["responses fp32"]["rms error / rms"] < 1e-5
    assert known["responses fp32"]["same best start and end"] == "4 of 4"
    assert {f"{tokens} tokens (samples/s)" for tokens in (32, 64, 128, 256, 512)} <= set(known["offline fp32"])
    assert known["offline fp32"]["GPU memory (GB)"] == 0.0
    scenarios = [f"{one} {two} graphs, p50 / p90 / p99 (ms)" for two in ("with", "without") for one in STREAMS]
    assert list(known["latencies fp32"]) == scenarios
    assert "Tesla T4" in gpu_check.table(known)
