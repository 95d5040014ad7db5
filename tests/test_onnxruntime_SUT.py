"""The ONNX Runtime backend: every form of file, the same bytes in every batch, files that cannot be used."""

import json

import numpy as np
import pytest
from conftest import arguments, predict, random_batch, refused, samples

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper

import onnxruntime_SUT
from bert_pytorch_to_onnx import INPUTS, OUTPUTS, write_model
from onnxruntime_SUT import OnnxRuntimeBackend
from pytorch_SUT import PyTorchBackend


@pytest.fixture
def load(monkeypatch):
    """The backend on a file: load(path, NAME=value), with run.py's arguments as `args`."""
    def call(path, backend=OnnxRuntimeBackend, args=None, **variables):
        for name, value in {"ML_MODEL_FILE_WITH_PATH": str(path), **variables}.items():
            monkeypatch.setenv(name, value)
        return backend(args or arguments())
    return call


def variant(model, names=INPUTS, batch=None, kind=None):
    """A copy of `model` with other input names, a fixed batch, int32 inputs."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    renamed = dict(zip(INPUTS, names))
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for value in model.graph.input:
        value.name = renamed[value.name]
        if batch:
            value.type.tensor_type.shape.dim[0].dim_value = batch
        if kind:
            value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize("name, changes", [
    ("model", {}), ("published", {}), ("published", {"batch": 1}), ("model", {"kind": TensorProto.INT32}),
    ("model", {"names": ("input_ids", "attention_mask", "token_type_ids")})])
def test_every_form_gives_pytorchs_logits(load, tiny, tmp_path, name, changes):
    write_model(str(tmp_path / "model.onnx"), variant(onnx.load(tiny.folder / f"{name}.onnx"), **changes))
    batch = random_batch(384, 7, 150, 150)
    expected = predict(load(tiny.folder / "model", PyTorchBackend), batch)
    logits = predict(load(tmp_path / "model.onnx"), batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4


def test_weights_in_a_second_file_are_read(load, tiny, tmp_path, monkeypatch):
    """What a model over protobuf's 2 GB needs."""
    monkeypatch.setattr("bert_pytorch_to_onnx.ONE_FILE_BYTES", 1000)
    for _ in range(2):
        write_model(str(tmp_path / "model.onnx"), onnx.load(tiny.folder / "model.onnx"))
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size \
        < (tiny.folder / "model.onnx").stat().st_size
    batch = random_batch(30)
    assert np.array_equal(predict(load(tmp_path / "model.onnx"), batch), predict(load(tiny.folder / "model.onnx"), batch))


@pytest.mark.parametrize("name", ["model.onnx", "published.onnx"])
@pytest.mark.parametrize("length", [5, 64, 90, 150, 384])
def test_a_samples_logits_are_the_same_bytes_beside_others_of_its_length(load, tiny, name, length):
    backend = load(tiny.folder / name)
    assert backend.together == "equal"
    for size in (1, 2, 5):
        batch = random_batch(*size * [length])
        alone = [backend.predict(sample) for sample in samples(batch)]
        assert backend.predict(batch).tobytes() == np.concatenate(alone).tobytes()


def test_a_padded_batch_gives_the_same_logits(load, tiny):
    """What a GPU computes."""
    backend = load(tiny.folder / "model.onnx")
    batch = random_batch(90, 384, 5)
    expected = predict(backend, batch)
    assert np.abs(backend.predict(batch) - expected).max() < 1e-4


def test_the_provider_is_the_preferred_one_where_it_is_there_and_allowed(monkeypatch):
    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    preferred = "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER"
    assert onnxruntime_SUT.providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    for name, expected in (("TensorrtExecutionProvider", ["TensorrtExecutionProvider", "CPUExecutionProvider"]),
                           ("CPUExecutionProvider", ["CPUExecutionProvider"]),
                           ("AbsentExecutionProvider", ["CPUExecutionProvider"])):
        monkeypatch.setenv(preferred, name)
        assert onnxruntime_SUT.providers() == expected
    monkeypatch.delenv(preferred)
    monkeypatch.setenv("USE_GPU", "off")
    assert onnxruntime_SUT.providers() == ["CPUExecutionProvider"]


def test_the_profile_is_written_and_named(load, tiny, tmp_path, capsys):
    backend = load(tiny.folder / "model.onnx", args=arguments(profile=True), LOG_PATH=str(tmp_path))
    backend.predict(random_batch(20))
    backend.end_profile()
    profile, = tmp_path.glob("onnxruntime_profile*.json")
    assert str(profile) in capsys.readouterr().err
    assert any(event["name"].startswith("MatMul") for event in json.loads(profile.read_text()))


def model_of(tmp_path, names=INPUTS, outputs=OUTPUTS, kind=TensorProto.INT64, shape=("batch", "length")):
    """An ONNX file that puts out its first input as logits."""
    nodes = [helper.make_node("Cast", names[:1], [name], to=TensorProto.FLOAT) for name in outputs]
    graph = helper.make_graph(nodes, "bad", [helper.make_tensor_value_info(name, kind, shape) for name in names],
                              [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "bad.onnx")
    return tmp_path / "bad.onnx"


@pytest.mark.parametrize("changes, words", [
    ({"names": ("input_ids", "mask", "segments")}, ["inputs are input_ids, mask, segments"]),
    ({"names": ("input_ids", "input_mask")}, ["inputs are input_ids, input_mask"]),
    ({"kind": TensorProto.FLOAT}, ["tensor(float)"]), ({"shape": ("batch", 128)}, ["128", "384"]),
    ({"shape": (8, 384)}, ["(8, 384)"]), ({"shape": (384,)}, ["(384,)"]),
    ({"outputs": ("logits",)}, ["outputs are logits"]), ({"outputs": ("a", "b", "c")}, ["outputs are a"])])
def test_a_model_that_is_not_berts_is_named(load, tmp_path, changes, words):
    with refused("bad.onnx", "bert_tf_to_pytorch.py", *words):
        load(model_of(tmp_path, **changes))


def test_a_file_that_is_no_model_is_named(load, tiny, tmp_path):
    whole = (tiny.folder / "model.onnx").read_bytes()
    for content in (b"a text\n", b"", whole[:len(whole) // 2]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with refused("bad.onnx", "bert_tf_to_pytorch.py"):
            load(tmp_path / "bad.onnx")
    for path in (tmp_path / "nowhere.onnx", tmp_path):
        with refused(str(path), "ML_MODEL_FILE_WITH_PATH"):
            load(path)


def test_a_token_that_the_model_does_not_know_is_named(load, tiny):
    backend = load(tiny.folder / "model.onnx")
    with refused("model.onnx", "VOCAB_FILE"):
        backend.predict(random_batch(100, vocab_size=1000))
