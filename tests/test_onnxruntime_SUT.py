"""The ONNX Runtime backend: all forms of a file, the same bytes in every batch, files that cannot be used."""

import json

import numpy as np
import pytest
from helpers import predict, random_batch, refused, samples

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime
from onnx import TensorProto, helper

import onnxruntime_SUT
from config import ONNX_INPUTS
from convert.pytorch_to_onnx import INPUTS, OUTPUTS, write_model

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


BACKEND = "onnxruntime"  # of the fixture `load`


def variant(model, names=INPUTS, batch=None, dtype=None):
    """Return a copy of `model` with other input names, a fixed batch size or another input type."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    renamed = dict(zip(INPUTS, names))
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for value in model.graph.input:
        value.name = renamed[value.name]
        if batch:
            value.type.tensor_type.shape.dim[0].dim_value = batch
        if dtype:
            value.type.tensor_type.elem_type = dtype
    return model


@pytest.mark.parametrize(
    "name, changes, policy",
    [
        ("model", {}, "same_length"),
        ("published", {}, "same_length"),
        ("published", {"batch": 1}, "single"),
        ("model", {"dtype": TensorProto.INT32}, "same_length"),
        ("model", {"names": ONNX_INPUTS[1]}, "same_length"),
    ],
)
def test_every_form_of_a_file_gives_pytorchs_logits(load, tiny, tmp_path, name, changes, policy):
    write_model(str(tmp_path / "model.onnx"), variant(onnx.load(tiny.folder / f"{name}.onnx"), **changes))
    batch = random_batch(384, 7, 150, 150)
    expected = predict(load(tiny.folder / "model", "pytorch"), batch)
    backend = load(tmp_path / "model.onnx")
    logits = predict(backend, batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4
    assert backend.batch_policy == policy
    assert backend.model_path == str(tmp_path / "model.onnx")


def test_reference_pads_single_samples(load, tiny):
    backend = load(tiny.folder / "model.onnx", reference=True)
    assert backend.batch_policy == "single"
    published = load(tiny.folder / "published.onnx", scenario="SingleStream")
    batch = random_batch(90)
    assert np.abs(backend.predict(batch) - published.predict(batch)).max() < 1e-6


@pytest.mark.parametrize("scenario, threads", [("Offline", 3), ("SingleStream", 1)])
def test_only_offline_runs_one_batch_per_core(load, tiny, monkeypatch, scenario, threads):
    monkeypatch.setenv("MLC_MAX_NUM_THREADS", "3")
    assert load(tiny.folder / "model.onnx", scenario=scenario).concurrency == threads


def test_weights_in_a_second_file_are_read(load, tiny, tmp_path, monkeypatch):
    """A model over protobuf's 2 GB needs one."""
    monkeypatch.setattr("convert.pytorch_to_onnx.ONE_FILE_BYTES", 1000)
    for _ in range(2):  # the second time, the second file is replaced
        write_model(str(tmp_path / "model.onnx"), onnx.load(tiny.folder / "model.onnx"))
    one_file, first, second = (
        path.stat().st_size
        for path in (tiny.folder / "model.onnx", tmp_path / "model.onnx", tmp_path / "model.onnx.data")
    )
    assert first < second < one_file
    batch = random_batch(30)
    expected = predict(load(tiny.folder / "model.onnx"), batch)
    assert np.array_equal(predict(load(tmp_path / "model.onnx"), batch), expected)


@pytest.mark.parametrize("name", ["model.onnx", "published.onnx"])
@pytest.mark.parametrize("length", [5, 64, 90, 150, 384])
def test_a_samples_logits_are_the_same_bytes_beside_others_of_its_length(load, tiny, name, length):
    backend = load(tiny.folder / name)
    assert backend.batch_policy == "same_length"
    for size in (1, 2, 5):
        batch = random_batch(*size * [length])
        alone = [backend.predict(sample) for sample in samples(batch)]
        assert backend.predict(batch).tobytes() == np.concatenate(alone).tobytes()


def test_a_padded_batch_gives_the_same_logits(load, tiny):
    """As a GPU computes it."""
    backend = load(tiny.folder / "model.onnx")
    batch = random_batch(90, 384, 5)
    expected = predict(backend, batch)
    assert np.abs(backend.predict(batch) - expected).max() < 1e-4


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, [CUDA, CPU]),
        ({"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": TENSORRT}, [TENSORRT, CUDA, CPU]),
        ({"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": CPU}, [CPU]),
        ({"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": "AbsentProvider"}, [CPU]),
        ({"USE_GPU": "off"}, [CPU]),
        ({"USE_GPU": "off", "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": TENSORRT}, [CPU]),
    ],
)
def test_the_preferred_provider_is_used_if_it_is_available_and_allowed(monkeypatch, caplog, variables, expected):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert onnxruntime_SUT.providers() == expected
    assert ("AbsentProvider" in caplog.text) == ("AbsentProvider" in variables.values())


def test_the_profile_is_written_and_named_at_the_end(load, tiny, tmp_path, monkeypatch, caplog):
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setenv("LOG_PATH", str(tmp_path))
    load(tiny.folder / "model.onnx", profile=True).predict(random_batch(20))
    with caplog.at_level("INFO"):
        at_exit[0]()
    (profile,) = tmp_path.glob("onnxruntime_profile*.json")
    assert str(profile) in caplog.text
    assert any(event["name"].startswith("MatMul") for event in json.loads(profile.read_text()))


def foreign_model(path, names=INPUTS, outputs=OUTPUTS, dtype=TensorProto.INT64, shape=("batch", "length")):
    """Write an ONNX file that returns its first input as logits."""
    nodes = [helper.make_node("Cast", names[:1], [name], to=TensorProto.FLOAT) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(name, dtype, shape) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"names": ("input_ids", "mask", "segments")}, ["inputs are input_ids, mask, segments"]),
        ({"names": ("input_ids", "input_mask")}, ["inputs are input_ids, input_mask"]),
        ({"dtype": TensorProto.FLOAT}, ["input_ids float32", "int64"]),
        ({"shape": ("batch", 128)}, ["128", "384"]),
        ({"shape": (8, 384)}, ["(8, 384)"]),
        ({"shape": (384,)}, ["(384,)"]),
        ({"outputs": ("logits",)}, ["outputs are logits"]),
        ({"outputs": ("a", "b", "c")}, ["outputs are a"]),
    ],
)
def test_a_model_that_is_not_berts_is_refused(load, tmp_path, changes, words):
    with refused("foreign.onnx", "make convert", *words):
        load(foreign_model(tmp_path / "foreign.onnx", **changes))


def test_a_file_that_is_not_an_onnx_model_is_refused(load, tiny, tmp_path):
    whole = (tiny.folder / "model.onnx").read_bytes()
    for content in (b"a text\n", b"", whole[: len(whole) // 2]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with refused("bad.onnx", "make convert"):
            load(tmp_path / "bad.onnx")
    for path in (tmp_path / "nowhere.onnx", tmp_path):
        with refused(str(path), "ML_MODEL_FILE_WITH_PATH"):
            load(path)


def test_a_token_that_the_model_does_not_know_is_refused(load, tiny):
    backend = load(tiny.folder / "model.onnx")
    assert backend.vocab_size == 60
    with refused("model.onnx", "VOCAB_FILE"):
        backend.predict(random_batch(100, vocab_size=1000))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_without_the_package_onnx_a_run_trusts_the_command_line(load, tiny, monkeypatch, caplog, backend, dtype):
    """MLCommons' automation installs ONNX Runtime alone."""
    batch = random_batch(30)
    expected = predict(load(tiny.folder / "model.onnx", backend), batch)

    def missing(path):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr("models.onnx_files.read_onnx", missing)
    loaded = load(tiny.folder / "model.onnx", backend, dtype=dtype)
    assert "the package onnx is missing" in caplog.text
    if backend == "onnxruntime":
        assert loaded.vocab_size is None and f", {dtype}" in loaded.name
    assert np.array_equal(predict(loaded, batch), expected)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_dtype_is_the_files_and_not_the_command_lines(load, tiny, caplog, backend):
    loaded = load(tiny.folder / "model.onnx", backend, dtype="int8")
    assert loaded.dtype == "fp32" and ", fp32" in loaded.name and "int8" not in loaded.name
    assert "model.onnx: the model is fp32, not int8; it runs as fp32" in caplog.text
