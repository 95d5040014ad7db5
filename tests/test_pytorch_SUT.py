"""PyTorch's model files: what is read, and how one that cannot be used is named."""

import json
import pickle

import numpy as np
import pytest
from conftest import ROOT, fails

import config

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

from pytorch_SUT import read_weights, weight_shapes


@pytest.fixture
def demo():
    """The demo's model: (sizes, {name: tensor})."""
    return read_weights(str(ROOT / "demo/model"))


@pytest.fixture
def run(script, tmp_path):
    """An accuracy run of a few samples with the model file `model`."""
    (tmp_path / "user.conf").write_text("")
    return lambda model: script("run.py", "--backend=pytorch", "--accuracy", "--max_examples=20",
                                ML_MODEL_FILE_WITH_PATH=model)


def test_a_state_dict_gives_what_the_folder_gives(run, demo, tmp_path):
    """With its sizes from the bert_config.json beside it, in torch's new form and its old one."""
    sizes, weights = demo
    expected = run(ROOT / "demo/model").stdout.splitlines()[-1]
    (tmp_path / "bert_config.json").write_text(json.dumps(sizes))
    for new in (True, False):
        torch.save(weights, tmp_path / "model.pytorch", _use_new_zipfile_serialization=new)
        result = run("model.pytorch")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == expected


def test_pooler_and_position_ids_are_passed_over(run, demo, tmp_path):
    sizes, weights = demo
    hidden = sizes["hidden_size"]
    extra = {"bert.pooler.dense.weight": torch.zeros(hidden, hidden), "bert.pooler.dense.bias": torch.zeros(hidden),
             "bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({**weights, **extra}, tmp_path / "model.pytorch")
    (tmp_path / "bert_config.json").write_text(json.dumps(sizes))
    assert run("model.pytorch").returncode == 0


def test_without_sizes_beside_it_a_state_dict_is_bert_large(run, demo, tmp_path):
    torch.save(demo[1], tmp_path / "model.pytorch")
    fails(run("model.pytorch"), "model.pytorch", config.BERT_CONFIG)


def test_bert_large_has_its_published_size():
    with open(config.BERT_CONFIG, encoding="utf-8") as file:
        shapes = weight_shapes(json.load(file))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 334_094_338


def test_half_precision_weights_are_read_as_float32(demo, tmp_path):
    save_file({name: tensor.half() for name, tensor in demo[1].items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(demo[0]))
    _, weights = read_weights(str(tmp_path))
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def broken(fault):
    """The demo's weights with one fault."""
    weights = load_file(ROOT / "demo/model/model.safetensors")
    if fault == "missing":
        del weights[QUERY]
    elif fault == "misshapen":
        weights[QUERY] = weights[QUERY][:-1]
    elif fault == "unknown":
        weights["bert.encoder.layer.99.output.dense.weight"] = torch.zeros(1)
    elif fault == "NaN":
        weights[QUERY][0, 0] = torch.nan
    return weights


@pytest.mark.parametrize("fault, words", [
    ("missing", f"{QUERY} is missing"), ("misshapen", f"{QUERY} is ("), ("NaN", f"{QUERY} holds NaN"),
    ("unknown", "bert.encoder.layer.99.output.dense.weight is not BERT's")])
def test_a_weight_that_does_not_fit_is_named(run, demo, tmp_path, fault, words):
    (tmp_path / "config.json").write_text(json.dumps(demo[0]))
    save_file(broken(fault), tmp_path / "model.safetensors")
    fails(run(tmp_path), "model.safetensors", words)


class Intruder:
    """What a hostile pickle holds: code to run on loading."""

    def __reduce__(self):
        return open, ("intruded", "w")


def test_a_pickle_that_would_run_code_is_refused(run, tmp_path):
    for name, save in (("new.pytorch", torch.save), ("old.pytorch", lambda x, f: f.write_bytes(pickle.dumps(x)))):
        save({"weight": Intruder()}, tmp_path / name)
        fails(run(name), name)
    assert not (tmp_path / "intruded").exists()


@pytest.mark.parametrize("content", [b"", b"just text\n", b"PK\x03\x04 cut off", b"\x80\x02"])
def test_a_file_that_is_no_model_is_named(run, tmp_path, content):
    (tmp_path / "model.pytorch").write_bytes(content)
    fails(run("model.pytorch"), "model.pytorch")
    (tmp_path / "config.json").write_text((ROOT / "demo/model/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    fails(run(tmp_path), "model.safetensors")


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": None}, "hidden_size"), ({"num_attention_heads": 7}, "num_attention_heads 7"),
    ({"hidden_act": "relu"}, "relu"), ({"model_type": "roberta"}, "roberta"), ({"num_hidden_layers": 1}, "is not BERT's")])
def test_a_configuration_that_does_not_fit_is_named(run, demo, tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**demo[0], **change}))
    save_file(broken(None), tmp_path / "model.safetensors")
    fails(run(tmp_path), "config.json", words)


def test_a_folder_without_a_model_is_named(run, tmp_path):
    fails(run(tmp_path), "model.safetensors")
    save_file(broken(None), tmp_path / "model.safetensors")
    fails(run(tmp_path), "config.json")
