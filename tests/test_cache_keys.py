"""What is stored for another run: each change that must invalidate it, one row a change."""

import json
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DEMO_ENV, ROOT, random_bert

import create_squad_data
from create_squad_data import load_features

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
import onnxruntime
import torch

import onnxruntime_SUT
from convert import calibration
from convert.calibration import ranges_key
from tools import benchmark
from tools.submission import runs


def edit(path, old, new):
    """Return a function that replaces `old` by `new` in the file `path`."""

    def change(patch):
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def write(path, text="text\n"):
    """Return a function that writes the file `path`."""
    return lambda patch: Path(path).write_text(text)


def set_value(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def set_variable(name, value):
    return lambda patch: patch.setenv(name, value)


def other_weights(patch):
    from safetensors.numpy import load_file, save_file

    weights = load_file("model/model.safetensors")
    weights["qa_outputs.bias"] = weights["qa_outputs.bias"] + np.float32(1)
    save_file(weights, "model/model.safetensors")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Work in a folder with a model, a data set and the other files of a run."""
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model", vocab_size=2400)
    document = json.loads(Path(DEMO_ENV["DATASET_FILE"]).read_text(encoding="utf-8"))
    texts = {
        "dev.json": json.dumps(document | {"data": document["data"][:2]}),
        "vocab.txt": Path(DEMO_ENV["VOCAB_FILE"]).read_text(encoding="utf-8"),
        "list.txt": "0\n1\n",
        "user.conf": "*.Server.target_qps = 7\n*.Offline.target_qps = 9\n",
        # The start of an ONNX file, and the names of its other files.
        "model.onnx": "\x08\x07\x3a\n\x08location\x12\x07weights\n\x08location\x12\x0cfolder/third",
        "weights": "external",
        "folder/third": "external",
        "model.xml": "<net>",
        "model.bin": "OpenVINO's weights",
        "bert_config.json": "{}",
    }
    (tmp_path / "folder").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "model.bert").write_bytes((tmp_path / "model.onnx").read_bytes())  # a name that tells nothing
    variables = {"ML_MODEL_FILE_WITH_PATH": "model", "VOCAB_FILE": "vocab.txt", "DATASET_FILE": "dev.json"}
    for name, value in {**variables, "CALIBRATION_FILE": "list.txt"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("USE_GPU", raising=False)
    return tmp_path


CONFIG = "model/config.json"
ANSWER, TOKEN = edit("dev.json", '"text": "', '"text": "The '), edit("vocab.txt", "\n##a\n", "\n##æ\n")


def features_key(folder):
    load_features("dev.json", "vocab.txt")
    return max((folder / "build/cache").glob("features-*"), key=lambda path: path.stat().st_mtime_ns).name


FEATURES = {
    "the data set": ANSWER,
    "the vocabulary": TOKEN,
    "the tokenizer's version": set_value(create_squad_data.tokenizers, "__version__", "0.0"),
    "the length of a window": set_value(create_squad_data, "MAX_SEQ_LENGTH", 320),
    "the stride": set_value(create_squad_data, "DOC_STRIDE", 64),
    "the length of a question": set_value(create_squad_data, "MAX_QUERY_LENGTH", 32),
    "the rules": set_value(create_squad_data, "CACHE_VERSION", 0),
}


def int8_key(folder):
    squad, features = load_features("dev.json", "vocab.txt")
    rows = create_squad_data.read_calibration("list.txt", squad, features)
    return ranges_key("model", [array[rows] for array in (features.input_ids, features.segment_ids, features.lengths)])


RANGES = {
    "the weights": other_weights,
    "the heads": edit(CONFIG, '"num_attention_heads": 3', '"num_attention_heads": 2'),
    "the norm's epsilon": edit(CONFIG, "{", '{"layer_norm_eps": 1e-5, '),
    "the calibration list": write("list.txt", "0\n2\n"),
    "the data set": edit("dev.json", '"context": "', '"context": "Here '),
    "the vocabulary": edit("vocab.txt", "\nthe\n", "\nthé\n"),
    "PyTorch": set_value(torch, "__version__", "0.0"),
    "the rules": set_value(calibration, "CACHE_VERSION", 0),
}


def plan(**changes):
    values = {"model": "model", "dataset": "dev.json", "vocab": "vocab.txt", "user_conf": "user.conf"}
    return values | {"calibration": "list.txt", "backend": "pytorch", "dtype": "int8", "version": "v6.1"} | changes


def run_folder(**changes):
    """Return a function that returns the folder of a run of the plan; run.py is not started."""

    def key(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "execute", lambda *_: ("", 0))
            patch.setattr(runs, "describe_machine", PROCESSOR.copy)
            made = plan(**changes)
            return runs.ensure_run(made, runs.fingerprint(made), "Server", "performance")

    return key


PROCESSOR = {"host_processor_model_name": "a"}
SUBMISSION = {
    "the weights": other_weights,
    "the configuration": edit(CONFIG, '"num_attention_heads": 3', '"num_attention_heads": 2'),
    "the tokenizer's configuration": write("model/tokenizer_config.json", "{}"),
    "the data set": ANSWER,
    "the vocabulary": TOKEN,
    "the calibration list": write("list.txt"),
    "LoadGen's settings": edit("user.conf", "Server.target_qps = 7", "Server.target_qps = 8"),
    "a variable": set_variable("USE_GPU", "0"),
    "a package": set_value(runs, "distributions", lambda: [SimpleNamespace(name="torch", version="0.0")]),
    "the processor": lambda patch: patch.setitem(PROCESSOR, "host_processor_model_name", "b"),
    "the code": set_value(runs, "SOURCES", ("run.py",)),
}


def converted(backend, dtype):
    """Return a function that returns the benchmark's model for a backend; no converter is started."""

    def key(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
            return benchmark.convert_model(backend, dtype, "model")

    return key


CONVERTED = {
    "the weights": other_weights,
    "the configuration": edit(CONFIG, '"num_attention_heads": 3', '"num_attention_heads": 2'),
    "a converter": set_value(benchmark.glob, "glob", lambda pattern: [f"{ROOT}/convert/calibration.py"]),
}
ONNX = {"the file": write("model.onnx"), "its second file": write("weights"), "its third file": write("folder/third")}
CALIBRATED = CONVERTED | {"the list": write("list.txt"), "the data set": ANSWER, "the vocabulary": TOKEN}
STORED = {
    "features": (features_key, FEATURES),
    "int8 ranges": (int8_key, RANGES),
    "a submission's run": (run_folder(), SUBMISSION),
    "what ONNX Runtime makes from a model": (
        lambda folder: onnxruntime_SUT.cache_name("model.onnx"),
        ONNX | {"ONNX Runtime": set_value(onnxruntime, "__version__", "0.0")},
    ),
    "a submission's run of a file": (
        run_folder(model="model.onnx"),
        ONNX | {"Google's configuration": write("bert_config.json"), "Hugging Face's": write("config.json")},
    ),
    "a submission's run of a file of another name": (
        run_folder(model="model.bert"),
        ONNX | {"the file": write("model.bert")},
    ),
    "a submission's run of OpenVINO's form": (
        run_folder(model="model.xml"),
        {"the file": write("model.xml"), "its weights": write("model.bin")},
    ),
    "the benchmark's ONNX file": (converted("onnxruntime", "fp32"), CONVERTED),
    "the benchmark's graph": (converted("tf", "fp32"), CONVERTED),
    "the benchmark's int8 file": (converted("openvino", "int8"), CALIBRATED),
}


@pytest.mark.parametrize("stored, change", [(name, change) for name, (_, rows) in STORED.items() for change in rows])
def test_a_change_invalidates_what_is_stored(files, monkeypatch, stored, change):
    key, changes = STORED[stored]
    before = key(files)
    assert key(files) == before
    changes[change](monkeypatch)
    assert key(files) != before


@pytest.mark.parametrize(
    "stored, change", [("features", write("list.txt")), ("a submission's run", edit("user.conf", "9", "8"))]
)
def test_what_is_stored_is_kept_if_nothing_that_it_depends_on_changes(files, monkeypatch, stored, change):
    key = STORED[stored][0]
    before = key(files)
    change(monkeypatch)
    assert key(files) == before


def test_the_packages_that_compute_are_a_part_of_a_runs_inputs(files):
    assert any(dist.name == "torch" for dist in distributions())
    assert {"torch", "numpy", "tokenizers"} <= runs.fingerprint(plan())["packages"].keys()
