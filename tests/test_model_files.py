"""BERT's configuration and weights: which files can be read, and how a file that cannot be used is reported."""

import json
import pickle

import numpy as np
import pytest
from helpers import ROOT, refused

import config
from models.model_files import read_config, read_weights, weight_shapes

pytest.importorskip("torch")
import torch
from safetensors.torch import save_file

DEMO = ROOT / "demo/model"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def demo():
    """Return the demo's model: (configuration, {name: tensor})."""
    return read_weights(str(DEMO))


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a Hugging Face folder and returns its path."""

    def write(bert_config, weights):
        (tmp_path / "config.json").write_text(json.dumps(bert_config))
        save_file(weights, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


@pytest.fixture
def state_dict(tmp_path):
    """Return a function that writes a state dict with its configuration beside it and returns its path."""

    def write(bert_config, weights, new_format=True):
        (tmp_path / "bert_config.json").write_text(json.dumps(bert_config))
        torch.save(weights, tmp_path / "model.pytorch", _use_new_zipfile_serialization=new_format)
        return str(tmp_path / "model.pytorch")

    return write


@pytest.mark.parametrize("new_format", [True, False])
def test_a_state_dict_gives_what_the_folder_gives(state_dict, demo, new_format):
    bert_config, weights = read_weights(state_dict(*demo, new_format))
    assert bert_config == demo[0]
    assert weights.keys() == demo[1].keys()
    assert all(torch.equal(tensor, demo[1][name]) for name, tensor in weights.items())


def test_pooler_and_position_ids_are_ignored(state_dict, demo):
    bert_config, weights = demo
    hidden = bert_config["hidden_size"]
    extra = {
        "bert.pooler.dense.weight": torch.zeros(hidden, hidden),
        "bert.pooler.dense.bias": torch.zeros(hidden),
        "bert.embeddings.position_ids": torch.arange(512)[None],
    }
    assert read_weights(state_dict(bert_config, weights | extra))[1].keys() == weights.keys()


def test_a_state_dict_without_a_configuration_beside_it_must_be_bert_large(demo, tmp_path):
    torch.save(demo[1], tmp_path / "model.pytorch")
    with refused("model.pytorch: does not fit", config.BERT_CONFIG):
        read_weights(str(tmp_path / "model.pytorch"))


def test_bert_large_has_its_published_size():
    shapes = weight_shapes(read_config(config.BERT_CONFIG))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 334_094_338


def test_half_precision_weights_are_read_as_float32(folder, demo):
    bert_config, weights = demo
    _, found = read_weights(folder(bert_config, {name: tensor.half() for name, tensor in weights.items()}))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize(
    "name, change, words",
    [
        (QUERY, lambda tensor: None, f"{QUERY} is missing"),
        (QUERY, lambda tensor: tensor[:-1], f"{QUERY} is (127, 128), not (128, 128)"),
        (QUERY, lambda tensor: tensor * torch.nan, f"{QUERY} holds NaN"),
        (
            "bert.encoder.layer.99.output.dense.weight",
            lambda tensor: torch.zeros(1),
            "99.output.dense.weight is not BERT's",
        ),
    ],
    ids=["missing", "misshapen", "NaN", "unknown"],
)
def test_a_weight_that_does_not_fit_is_named(folder, demo, name, change, words):
    bert_config, weights = demo
    changed = {**weights, name: change(weights.get(name))}
    model = folder(bert_config, {name: tensor for name, tensor in changed.items() if tensor is not None})
    with refused("model.safetensors", words):
        read_weights(model)


def test_of_many_faults_four_are_named(folder, demo):
    bert_config, weights = demo
    few = {name: tensor for name, tensor in weights.items() if not name.startswith("bert.encoder")}
    with refused(f"{len(weights) - len(few) - 4} more"):
        read_weights(folder(bert_config, few))


class Intruder:
    """What a hostile pickle holds: code that runs when it is loaded."""

    def __reduce__(self):
        return open, ("intruded", "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Intruder()}, "new.pytorch")
    (tmp_path / "old.pytorch").write_bytes(pickle.dumps({"weight": Intruder()}))
    for name in ("new.pytorch", "old.pytorch"):
        with refused(name, "not safe to load"):
            read_weights(name)
    assert not (tmp_path / "intruded").exists()


@pytest.mark.parametrize("content", [b"", b"just text\n", b"PK\x03\x04 cut off", b"\x80\x02"])
@pytest.mark.parametrize("name", ["model.pytorch", "model.safetensors"])
def test_a_file_that_is_no_model_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    with refused(name, "damaged"):
        read_weights(str(tmp_path if name == "model.safetensors" else tmp_path / name))


def test_a_file_that_holds_no_state_dict_is_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "model.pytorch")
    with refused("model.pytorch", "holds no state dict"):
        read_weights(str(tmp_path / "model.pytorch"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": None}, "hidden_size must be a whole number above 0, not None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is above 1000"),
        ({"vocab_size": 0}, "vocab_size must be a whole number above 0, not 0"),
        ({"type_vocab_size": "2"}, "type_vocab_size must be a whole number above 0, not '2'"),
        ({"layer_norm_eps": 2.0}, "layer_norm_eps must be between 0 and 1, not 2.0"),
        ({"num_attention_heads": 7}, "not a multiple of num_attention_heads 7"),
        ({"max_position_embeddings": 128}, "max_position_embeddings 128 is below a feature's 384 tokens"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
    ],
)
def test_a_value_of_the_configuration_that_does_not_fit_is_named(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((DEMO / "config.json").read_text()) | change))
    with refused("config.json", words):
        read_config(str(path))


@pytest.mark.parametrize("content", ["", "[1]", "not JSON"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with refused("config.json", "JSON"):
        read_config(str(tmp_path / "config.json"))


def test_a_configuration_of_another_model_does_not_fit_the_weights(folder, demo):
    bert_config, weights = demo
    with refused("config.json", "is not BERT's"):
        read_weights(folder(bert_config | {"num_hidden_layers": 1}, weights))


def test_a_folder_without_a_file_of_the_model_is_named(folder, demo, tmp_path):
    with refused("model.safetensors", "no such model file"):
        read_weights(str(tmp_path))
    model = folder(*demo)
    (tmp_path / "config.json").unlink()
    with refused("config.json", "cannot read the model's configuration"):
        read_weights(model)
