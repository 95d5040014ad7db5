"""What the tests share: where things are, and how to run one of the project's scripts."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DEMO_ENV = {
    "ML_MODEL_FILE_WITH_PATH": str(ROOT / "demo/model"),
    "VOCAB_FILE": str(ROOT / "demo/model/vocab.txt"),
    "DATASET_FILE": str(ROOT / "demo/dev.json"),
}
# Every backend answers in a test within seconds, on a busy machine in a minute; a run that hangs fails here.
LIMIT_S = 300

sys.path.insert(0, str(ROOT))
from config import UserError
from run import parse_args


@pytest.fixture
def script(tmp_path):
    """Runs a script of the project in an empty folder, on the demo's model and data: script("run.py", …, NAME=value).

    Returns the CompletedProcess with its text output. A variable given as None is unset.
    """
    def call(name, *args, **variables):
        env = {**os.environ, **DEMO_ENV, **variables}
        env = {key: str(value) for key, value in env.items() if value is not None}
        return subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=tmp_path, env=env, timeout=LIMIT_S,
                              capture_output=True, text=True, check=False)
    call.root, call.demo_dataset, call.demo_vocab = ROOT, DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"]
    return call


@pytest.fixture
def shared():
    """The folder with SQuAD's validation set and a real small BERT, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} (SQuAD's validation set, a BERT trained on SQuAD) is absent")
    return SHARED


def random_bert(folder, **changes):
    """Write a BERT of random weights, a Hugging Face folder; `changes` are sizes. Returns (sizes, {name: array})."""
    from safetensors.numpy import save_file

    from pytorch_SUT import weight_shapes

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
             "vocab_size": 60, "max_position_embeddings": 384, "type_vocab_size": 2, **changes}
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(name.endswith("LayerNorm.weight"), 0.1, shape).astype(np.float32)
               for name, shape in weight_shapes(sizes).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(weights, folder / "model.safetensors")
    return sizes, weights


def random_batch(*lengths, vocab_size=60):
    """A `squad_QSL.Batch` of samples of random tokens."""
    from squad_QSL import Batch

    generator = np.random.default_rng(sum(lengths))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    ids, segments = (generator.integers(below, size=mask.shape, dtype=np.int32) * mask for below in (vocab_size, 2))
    return Batch(ids, mask, segments, np.array(lengths, np.int32))


def samples(batch):
    """The samples of a `squad_QSL.Batch`, each as a batch of its own without padding."""
    from squad_QSL import Batch

    return [Batch(*(array[row:row + 1, :length] for array in (batch.input_ids, batch.input_mask, batch.segment_ids)),
                  batch.lengths[row:row + 1]) for row, length in enumerate(batch.lengths)]


def predict(backend, batch):
    """The logits of `batch`, in batches that the backend takes."""
    assert backend.together in ("any", "equal", "one")
    return np.concatenate([backend.predict(part) for part in ([batch] if backend.together == "any" else samples(batch))])


def arguments(**changes):
    """run.py's arguments, those of no flag but `changes`."""
    return SimpleNamespace(**{**vars(parse_args([])), **changes})


@contextlib.contextmanager
def refused(*words):
    """Assert that what stands under this ends in a UserError of one line that holds `words`."""
    with pytest.raises(UserError) as error:
        yield
    for word in (*words, ""):
        assert word in str(error.value) and "\n" not in str(error.value), f"{word!r} is not in {str(error.value)!r}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A BERT of random weights in every form: .sizes, .weights, .folder of the files, named as in test_convert.py."""
    pytest.importorskip("tensorflow")
    from bert_pytorch_to_onnx import build_model, write_model
    from tf_freeze_bert import build_graph, write_graph

    folder = tmp_path_factory.mktemp("tiny")
    sizes, weights = random_bert(folder / "model")
    for name, length in (("model", None), ("published", 384)):
        write_model(str(folder / f"{name}.onnx"), build_model(sizes, weights, length))
        write_graph(str(folder / f"{name}.pb"), build_graph(sizes, weights, (1 if length else None, length)))
    return SimpleNamespace(sizes=sizes, weights=weights, folder=folder)


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory):
    """The demo's model in every form: {backend: path}, and "int8" for onnxruntime's --quantized."""
    pytest.importorskip("tensorflow")
    from bert_pytorch_to_onnx import build_model, write_model
    from pytorch_SUT import read_weights
    from tf_freeze_bert import build_graph, write_graph

    folder = tmp_path_factory.mktemp("demo")
    models = {"pytorch": DEMO_ENV["ML_MODEL_FILE_WITH_PATH"], "tf": str(folder / "model.pb"),
              "onnxruntime": str(folder / "model.onnx"), "int8": str(folder / "int8.onnx")}
    sizes, weights = read_weights(models["pytorch"])
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    write_graph(models["tf"], build_graph(sizes, weights))
    write_model(models["onnxruntime"], build_model(sizes, weights))
    (folder / "calibration.txt").write_text("".join(f"{row}\n" for row in range(20)))
    subprocess.run([sys.executable, ROOT / "quantize_bert.py", "--onnx", models["onnxruntime"], "--out", models["int8"],
                    "--calibration", folder / "calibration.txt"], cwd=folder, env={**os.environ, **DEMO_ENV},
                   check=True, timeout=LIMIT_S)
    return models


def fails(result, *words):
    """Assert that a script ended as a user's mistake should: status not 0, one line that holds `words`, no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
