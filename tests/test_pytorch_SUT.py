"""The PyTorch backend: the same bits in every batch, close to the baseline in every dtype."""

import pickle

import numpy as np
import pytest
from helpers import DEMO_ENV, random_batch, random_bert, refused, samples

pytest.importorskip("torch")
import torch

import pytorch_SUT
from backends import RunOptions
from convert.calibration import input_ranges
from models import packed_bert
from pytorch_SUT import PyTorchBackend, PyTorchReference


@pytest.fixture(params=["cpu_kernels", "PyTorch's operators"])
def load(request, tmp_path, monkeypatch):
    """Return a function that loads the backend in a dtype with a BERT of random weights."""
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model")
    if request.param == "cpu_kernels":
        request.getfixturevalue("kernels")
    else:
        monkeypatch.setattr(pytorch_SUT, "load_kernels", lambda bert_config: None)
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "model")

    def load(dtype):
        ranges = input_ranges("model", [random_batch(60, 30), random_batch(384)]) if dtype == "int8" else None
        return PyTorchBackend(RunOptions(dtype=dtype), ranges)

    return load


def test_a_sample_has_the_same_logits_bit_for_bit_in_every_batch(load, dtype):
    backend = load(dtype)
    batch = random_batch(90, 384, 5, 90, 3, 200)
    parts = np.split(backend.predict(batch), np.cumsum(batch.lengths)[:-1])
    for logits, sample in zip(parts, samples(batch)):
        assert logits.tobytes() == backend.predict(sample).tobytes()


def test_a_concurrency_changes_no_bit(load):
    backend = load("fp32")
    batch = random_batch(90, 384)
    expected = backend.predict(batch)
    threads = torch.get_num_threads()
    backend.set_concurrency(backend.max_concurrency)
    assert backend.predict(batch).tobytes() == expected.tobytes()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_filling_up_rows_changes_no_logits(load, dtype, monkeypatch):
    batch = random_batch(90, 37, 3)
    filled = load(dtype).predict(batch)
    monkeypatch.setattr(packed_bert, "ROWS", 1)
    tolerance = {"fp32": 0, "bf16": 0.02, "int8": 0.02}[dtype]  # attention in bf16 rounds in another order
    assert np.abs(load(dtype).predict(batch) - filled).max() <= tolerance


@pytest.mark.slow
def test_every_dtype_stays_close_to_the_baseline(load, dtype):
    pytest.importorskip("transformers")
    batch = random_batch(384, 100, 7)
    logits = load(dtype).predict(batch)
    baseline = PyTorchReference(RunOptions(reference=True))
    expected = np.concatenate([baseline.predict(sample) for sample in samples(batch)])
    share = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1}[dtype]
    assert np.abs(logits - expected).max() < share * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_a_dtype_that_the_processor_lacks_runs_in_fp32_with_a_notice(load, monkeypatch, caplog, dtype):
    monkeypatch.setattr(pytorch_SUT, "cpu_runs", lambda dtype: dtype == "fp32")
    backend = load(dtype)
    assert f"no {dtype} instructions; running in fp32" in caplog.text
    assert backend.name.endswith("fp32") and backend.dtype == "fp32"
    assert (backend.predict(random_batch(20)) == load("fp32").predict(random_batch(20))).all()


def test_int8_calibrates_itself_unless_it_is_given_ranges(int8, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model", vocab_size=2400)
    (tmp_path / "list.txt").write_text("0\n1\n2\n")
    files = {"ML_MODEL_FILE_WITH_PATH": "model", "CALIBRATION_FILE": "list.txt"}
    for name, value in {**DEMO_ENV, **files}.items():
        monkeypatch.setenv(name, value)
    options = RunOptions(dtype="int8")
    batch = random_batch(20, 9)
    expected = PyTorchBackend(options).predict(batch)
    given = pickle.loads(pickle.dumps(PyTorchBackend.prepare(options)))  # as Ray sends it to its actors
    assert len(list((tmp_path / "build/cache").glob("int8-*.npz"))) == 1  # calibrated once
    monkeypatch.setenv("DATASET_FILE", "none")
    assert PyTorchBackend(options, **given).predict(batch).tobytes() == expected.tobytes()
    with refused("none", "data set"):
        PyTorchBackend(options)


def test_only_int8_needs_preparation(load):
    assert PyTorchBackend.prepare(RunOptions(dtype="bf16")) == {}
