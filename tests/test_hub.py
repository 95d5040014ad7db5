"""Models of Hugging Face's hub: what is fetched from a stand-in for the hub, and how each failure is reported."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, fails, refused
from hub_server import COMMITS, serving

import config
from files import file_digest

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants

DEMO = ROOT / "demo/model"
FILES = {path.name: path.read_bytes() for path in DEMO.iterdir()}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {f"model-0000{number}-of-00002.safetensors": b"shard" for number in (1, 2)}
MODELS = {
    "me/demo": {**FILES, "README.md": b"", "tf_model.h5": b"h5", "pytorch_model.bin": b"bin", "onnx/model.onnx": b"o"},
    "me/shards": {
        "config.json": b"{}",
        "model.safetensors.index.json": INDEX.encode(),
        **SHARDS,
        "training_args.bin": b"",
    },
    "me/old": {"config.json": b"{}", "vocab.txt": b"", "pytorch_model.bin": b"bin", "optimizer.pt": b""},
    "me/flax": {"config.json": b"{}", "flax_model.msgpack": b"x"},
    "me/gated": FILES,
    "legacy-name": FILES,
}


@pytest.fixture(scope="module")
def hub():
    """Return a running stand-in for the hub."""
    with serving(MODELS, gated=["me/gated"]) as hub:
        yield hub


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Return a function that fetches a model in this process, from the hub at an address into an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def call(name, endpoint, offline=False):
        config.local_model.cache_clear()
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        return config.local_model(name)

    return call


SMALL = ["config.json", "vocab.txt"]
FETCHED = {
    "hf://me/demo": [*SMALL, "model.safetensors"],
    "hf://me/demo@v2": [*SMALL, "model.safetensors"],
    f"hf://me/demo@{COMMITS['v2']}": [*SMALL, "model.safetensors"],
    "hf://me/demo/onnx/model.onnx": [*SMALL, "onnx/model.onnx"],
    "hf://me/demo@v2/pytorch_model.bin": [*SMALL, "pytorch_model.bin"],
    "hf://me/shards": ["config.json", "model.safetensors.index.json", *SHARDS],
    "hf://me/old": [*SMALL, "pytorch_model.bin"],
    "hf://legacy-name": [*SMALL, "model.safetensors"],
}


@pytest.mark.parametrize("name", FETCHED)
def test_only_what_a_run_needs_is_fetched(hub, fetch, name):
    path = Path(fetch(name, hub.url))
    commit = COMMITS["v2" if "@" in name else "main"]
    folder = next(parent for parent in (path, *path.parents) if parent.name == commit)
    found = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    assert sorted(found) == sorted(FETCHED[name])
    assert path == folder or str(path.relative_to(folder)) == FETCHED[name][-1]


def test_a_model_in_the_cache_is_used_without_a_connection(hub, fetch, caplog):
    folder = fetch("hf://me/demo", hub.url)
    count = len(hub.requests)
    assert fetch("hf://me/demo", hub.url, offline=True) == folder and len(hub.requests) == count
    assert "using the copy in the cache: HF_HUB_OFFLINE is set" in caplog.text
    assert fetch("hf://me/demo", "http://127.0.0.1:1") == folder
    assert "using the copy in the cache: no answer" in caplog.text


REFUSED = {
    "hf://me/none": "has no such model, or none that HF_TOKEN gives access to",
    "hf://me/demo@v9": "the model has no revision v9",
    "hf://me/gated": "accept the model's terms on the hub, and set HF_TOKEN",
    "hf://me/flax": "has no model.safetensors and no",
    "hf://me/demo/model.pb": "has no model.pb, but README.md, config.json,",
    "hf://": "not a name of a model on the hub; write hf://ORG/NAME",
    "hf://me/de mo": "not a name of a model on the hub",
    "hf://../..": "",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_fetched_is_named_with_the_reason(hub, fetch, name):
    with refused(f"{name}: ", REFUSED[name]):
        fetch(name, hub.url)


def test_offline_without_a_copy_is_one_line(hub, fetch):
    with refused("not in the cache", "HF_HUB_OFFLINE is set"):
        fetch("hf://me/demo", hub.url, offline=True)


@pytest.mark.parametrize("fault", ["is not there", "is busy"])
def test_a_hub_that_does_not_answer_is_one_line(fetch, fault):
    with serving(MODELS, fault=fault) as hub:
        url = "http://127.0.0.1:1" if fault == "is not there" else hub.url
        with refused("not in the cache", url, "check the network, HF_ENDPOINT"):
            fetch("hf://me/demo", url)


def test_a_hub_that_never_answers_is_one_line_within_seconds(fetch, monkeypatch):
    monkeypatch.setattr("models.hub.TIMEOUT_S", 1)
    with serving(MODELS, fault="never answers") as hub, refused("not in the cache", "timed out"):
        fetch("hf://me/demo", hub.url)


def test_quantization_takes_a_model_of_the_hub(hub, fetch, command, tmp_path):
    """It is no ONNX file there, which the message says of the fetched file."""
    (tmp_path / "list.txt").write_text("0\n")
    path = fetch("hf://me/demo/onnx/model.onnx", hub.url)
    args = "--onnx", "hf://me/demo/onnx/model.onnx", "--calibration", "list.txt"
    assert command("convert.quantize_onnx", *args).startswith(path)


@pytest.mark.slow
def test_a_run_takes_model_and_vocabulary_from_a_hub_that_wants_a_token(script, tmp_path):
    (tmp_path / "user.conf").write_text("")
    files = {"HF_HOME": tmp_path / "hf", "VOCAB_FILE": None, "ML_MODEL_FILE_WITH_PATH": "hf://me/private/model.onnx"}
    args = ("run.py", "--backend=onnxruntime", "--accuracy", "--max_examples=9")
    with serving({"me/private": FILES}, token="secret") as hub:
        fails(script(*args, **files, HF_ENDPOINT=hub.url, HF_TOKEN=""), "none that HF_TOKEN gives access to")
        result = script(*args, **files, HF_ENDPOINT=hub.url, HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("using the vocabulary beside the model") == 1
    record = json.loads((tmp_path / "build/logs/record.json").read_text())
    assert record["model_md5"] == file_digest(str(DEMO / "model.onnx"), "md5")
    again = script(*args, **files, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, result.stdout), again.stderr
