"""The memory that loading a model takes: its weights once, and a part of its files."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, random_bert, refused

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file

from models.model_files import open_weights, read_weights
from models.packed_bert import Bert, Linear, PrepackedLinear

LARGE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 8}
LAYER = 4 * (4 * 512 * 512 + 2 * 512 * 2048)  # bytes in fp32


def as_it_is(folder, weights):
    pass


def state_dict(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half(folder, weights):
    state_dict(folder, {name: tensor.half() for name, tensor in weights.items()})


def old_state_dict(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def shards(folder, weights):
    names = list(weights)
    index = {name: f"model-{row % 3}.safetensors" for row, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return the folder of a BERT of 101 MB."""
    folder = tmp_path_factory.mktemp("large")
    random_bert(folder, **LARGE)
    return folder


FORMS = [as_it_is, state_dict, half, old_state_dict, shards]


def mapped_bytes(folder):
    """Return how many bytes of the files in `folder` are in this process's memory, from Linux's /proc/self/smaps."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:  # the addresses of a mapping, and its file
                inside = words[-1].startswith(str(folder))
            elif inside and words[0] == "Rss:":
                total += 1024 * int(words[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_part_of_the_files_is_in_memory_while_a_model_is_made_and_nothing_afterwards(large, tmp_path, form):
    shutil.copytree(large, tmp_path, dirs_exist_ok=True)
    form(tmp_path, load_file(tmp_path / "model.safetensors"))
    bert_config, weights = open_weights(str(tmp_path))
    found = []

    def make_linear(name, weight, bias):
        if name.endswith("down"):  # the last of a layer
            found.append(mapped_bytes(tmp_path))
        return PrepackedLinear(weight, bias)

    with torch.inference_mode():
        bert = Bert(bert_config, weights, torch.device("cpu"), torch.float32, make_linear)
    assert max(found) < 16_800_000 + LAYER + 5_000_000 < 0.4 * LARGE["num_hidden_layers"] * LAYER
    del weights
    assert mapped_bytes(tmp_path) == 0 and len(bert.layers) == 8


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_weights_are_those_of_the_file_whenever_they_are_taken(tmp_path, form, monkeypatch):
    monkeypatch.setattr("models.weights.PART_BYTES", 1000)  # the files are mapped anew after nearly every weight
    random_bert(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    if form is half:
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    form(tmp_path, load_file(tmp_path / "model.safetensors"))
    _, weights = open_weights(str(tmp_path))
    taken = [dict(weights), dict(weights), read_weights(str(tmp_path))[1]]
    weights["qa_outputs.bias"] = expected["qa_outputs.bias"] = torch.tensor([7.0, 8.0])
    taken.append({name: weights.pop(name) for name in reversed(expected)})
    assert not weights and taken[0]["qa_outputs.bias"].tolist() != [7, 8]
    for found in taken:
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"qa_outputs.bias"}:
            assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[name])
    assert taken[-1]["qa_outputs.bias"].tolist() == [7, 8]


@pytest.mark.parametrize("form", [as_it_is, state_dict, shards], ids=lambda form: form.__name__)
def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path, form, monkeypatch):
    monkeypatch.setattr("models.weights.PART_BYTES", 1000)
    random_bert(tmp_path)
    form(tmp_path, load_file(tmp_path / "model.safetensors"))
    _, weights = open_weights(str(tmp_path))
    weights.pop("qa_outputs.weight")
    path = next(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin"))
    (tmp_path / "new").write_bytes(path.read_bytes())
    os.replace(tmp_path / "new", path)
    with refused(str(tmp_path), "was replaced while it was read"):
        dict(weights)


def test_a_linear_layer_that_keeps_its_weight_as_it_is_keeps_no_mapped_file(tmp_path, monkeypatch):
    """Processors other than x86 have such layers."""
    import pytorch_SUT

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    weight = torch.ones(3, 2)
    layer = pytorch_SUT.linear_layer("fp32", {}, None, "0.up", weight, torch.zeros(3))
    assert type(layer) is Linear and layer.weight.data_ptr() != weight.data_ptr()


PEAK = """
import os, sys
root, small, large = sys.argv[1:]
sys.path.insert(0, root)
import pytorch_SUT
from backends import RunOptions

def megabytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / 1e6

def load(model):
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    return pytorch_SUT.PyTorchBackend(RunOptions(dtype="fp32"))

load(small)  # what the frameworks need for any model
before = megabytes("VmRSS:")
backend = load(large)
print(megabytes("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """The peak is measured in a separate process, which the operating system keeps."""
    random_bert(tmp_path, hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=6)
    size, layer = ((tmp_path / "model.safetensors").stat().st_size / 1e6, 4 * 12 * 1024**2 / 1e6)
    env = {**os.environ, "USE_GPU": "0"}
    command = [sys.executable, "-c", PEAK, str(ROOT), str(ROOT / "demo/model"), str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    assert float(result.stdout) < 1.1 * size + layer < 1.4 * size


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_process_has_a_peak_of_its_own():
    """Not that of the process that started it."""
    child = "from models.memory import peak_memory; print(peak_memory())"
    parent = f"import subprocess, sys; len(b'x' * 500_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    result = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 5_000_000 < int(result.stdout) < 200_000_000
