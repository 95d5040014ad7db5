"""The fixtures that several test modules use; helpers.py has the functions."""

import gc
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DEMO_ENV, EXACT, SHARED, main_of, predict, random_batch, random_bert, refused, run_script

from backends import RunOptions, load_backend
from config import UserError

# OpenMP's threads spin while they wait. Workers share the cores, so spinning threads of one take them from the
# others: a SingleStream run of the demo took 66 s of processor time beside other tests, and 7 s without spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# OpenBLAS starts its threads when NumPy is imported, for 0.27 s of processor time with two and 0.18 s with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A background job, as CI may be, starts with SIGINT ignored; so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests import TensorFlow.
TENSORFLOW = {"test_convert", "test_faults", "test_outputs", "test_run"}
TENSORFLOW |= {"test_tf_SUT", "test_tf_graph_forms", "test_tf_graphs_generated"}
# Files whose tests take long together, although none of them is slow.
LONG = {"test_run_failures", "test_network_bounds", "test_models_generated"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run a file in one worker, and all that import TensorFlow in the same, since that takes 5 s."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "tensorflow" if Path(nodeid.split("::")[0]).stem in TENSORFLOW else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that all workers end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] - 10 * (item.path.stem in LONG))


def pytest_collection_finish():
    """Let the garbage collector ignore the frameworks' objects, which took a tenth of a worker's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def script(tmp_path):
    """Return `run_script` with an empty folder as the working folder."""
    return partial(run_script, cwd=tmp_path)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Return a function that runs a command in this process and returns the line with which it was refused.

    command("run.py", "--backend=tf", NAME=value): it runs in an empty folder, on the demo's files. A UserError or an
    exit of argparse's is expected.
    """
    monkeypatch.chdir(tmp_path)

    def call(name, *args, **variables):
        for key, value in (DEMO_ENV | variables).items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setattr(sys, "argv", [str(name), *map(str, args)])
        with pytest.raises((UserError, SystemExit)) as error:
            main_of(name)()
        if isinstance(error.value, UserError):
            assert "\n" not in str(error.value)
            return str(error.value)
        assert error.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.fixture
def load(request, monkeypatch):
    """Return a function that loads a backend (default: the module's BACKEND) on a model file with these options."""

    def call(path, backend=None, **options):
        monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", str(path))
        return load_backend(RunOptions(backend=backend or request.module.BACKEND, **options))

    return call


@pytest.fixture
def int8(monkeypatch):
    """Compute PyTorch's int8 by a stand-in if the processor has no instructions for it."""
    import int8_standin

    from pytorch_SUT import cpu_runs

    if not cpu_runs("int8"):
        int8_standin.install(monkeypatch.setattr)


@pytest.fixture(params=["fp32", "bf16", "int8"])
def dtype(request):
    """Return each dtype of PyTorch on a CPU; skip bf16 if the processor has no instructions for it."""
    from pytorch_SUT import cpu_runs

    if request.param == "int8":
        request.getfixturevalue("int8")
    elif not cpu_runs(request.param):
        pytest.skip(f"this processor has no {request.param} instructions")
    return request.param


@pytest.fixture(scope="session")
def kernels():
    """Return the operators of cpu_kernels.cpp; skip the test only if they cannot exist here."""
    import torch

    from models.cpu_kernels import load_kernels

    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 with bf16, which cpu_kernels.cpp needs")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("there is no C++ compiler for cpu_kernels.cpp")
    found = load_kernels({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128})
    assert found, "cpu_kernels.cpp cannot be compiled; run.py's notice says why"
    return found


@pytest.fixture
def shared():
    """Return the folder with SQuAD's validation set and a real small BERT; skip the test if it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} (SQuAD's validation set, a BERT trained on SQuAD) is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a BERT of random weights: .bert_config, .weights and .folder with model, model.onnx and published.onnx."""
    from convert.pytorch_to_onnx import build_model, write_model

    folder = tmp_path_factory.mktemp("tiny")
    bert_config, weights = random_bert(folder / "model")
    for name, length in (("model", None), ("published", 384)):
        write_model(str(folder / f"{name}.onnx"), build_model(bert_config, weights, length))
    return SimpleNamespace(bert_config=bert_config, weights=weights, folder=folder)


@pytest.fixture(scope="session")
def tiny_graphs(tiny):
    """Add model.pb and published.pb to the folder of `tiny`."""
    from convert.freeze_tf import build_graph, write_graph

    for name, shape in (("model", (None, None)), ("published", (1, 384))):
        write_graph(str(tiny.folder / f"{name}.pb"), build_graph(tiny.bert_config, tiny.weights, shape))


@pytest.fixture(scope="session")
def tiny_logits(tiny):
    """Return (batch, its logits by the tiny BERT in PyTorch)."""
    batch = random_batch(40, 7, 40, vocab_size=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML_MODEL_FILE_WITH_PATH", str(tiny.folder / "model"))
        return batch, predict(load_backend(RunOptions(backend="pytorch")), batch)


@pytest.fixture
def check_form(load, tiny_logits, caplog):
    """Return a function that asserts that a backend runs a file with the tiny BERT's graph, or refuses it.

    check_form(path, backend, result): `result` is a list of the refusal's words, or attributes of the backend with what
    they must be; "within" is how near the logits must be, "notice" what must be logged.
    """

    def call(path, backend, result):
        if isinstance(result, list):
            with refused(path.name, *result):
                load(path, backend)
            return
        attributes = {"vocab_size": 60, "dtype": "fp32", "within": EXACT, "notice": ""} | result
        if backend != "onnxruntime":
            attributes["batch_policy"] = "single"  # as always on a CPU
        loaded = load(path, backend)
        batch, expected = tiny_logits
        logits = predict(loaded, batch)
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        assert np.abs(logits - expected).max() < attributes.pop("within")
        assert attributes.pop("notice") in caplog.text
        assert {name: getattr(loaded, name) for name in attributes} == attributes
        assert loaded.dtype in loaded.name.split(", ")

    return call


@pytest.fixture
def server():
    """Return a running mirror of downloads, see `mirrors.mirror_server`."""
    from mirrors import mirror_server

    with mirror_server() as server:
        yield server


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return an empty folder of a project that downloads, see `mirrors.project`."""
    from mirrors import project

    return project(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory):
    """Return the demo's model in every form: {backend: path}, and "int8" for onnxruntime's --quantized."""
    pytest.importorskip("tensorflow")
    from convert.freeze_tf import build_graph, write_graph
    from convert.pytorch_to_onnx import build_model, write_model
    from models.model_files import read_weights

    folder = tmp_path_factory.mktemp("demo")
    models = {
        "pytorch": DEMO_ENV["ML_MODEL_FILE_WITH_PATH"],
        "tf": str(folder / "model.pb"),
        "onnxruntime": str(folder / "model.onnx"),
        "int8": str(folder / "int8.onnx"),
    }
    bert_config, weights = read_weights(models["pytorch"])
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    write_graph(models["tf"], build_graph(bert_config, weights))
    write_model(models["onnxruntime"], build_model(bert_config, weights))
    (folder / "calibration.txt").write_text("".join(f"{row}\n" for row in range(20)))
    args = ("--onnx", models["onnxruntime"], "--out", models["int8"], "--calibration", folder / "calibration.txt")
    result = run_script("convert.quantize_onnx", *args, cwd=folder)
    assert result.returncode == 0, result.stderr
    return models
