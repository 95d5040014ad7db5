"""The OpenVINO backend: all forms of a file, concurrent requests, files that cannot be used."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import predict, random_batch, refused, samples

pytest.importorskip("openvino")
pytest.importorskip("onnx")
import onnx
import openvino

BACKEND = "openvino"  # of the fixture `load`


@pytest.mark.parametrize(
    "name, options",
    [
        ("model.onnx", {}),
        ("model.onnx", {"scenario": "SingleStream"}),
        ("model.onnx", {"reference": True}),
        ("published.onnx", {}),
    ],
)
def test_every_form_of_a_file_gives_pytorchs_logits(load, tiny, name, options):
    batch = random_batch(384, 7, 150)
    expected = predict(load(tiny.folder / "model", "pytorch"), batch)
    backend = load(tiny.folder / name, **options)
    assert backend.batch_policy == "single" and backend.vocab_size == 60
    assert backend.model_path == str(tiny.folder / name)
    logits = predict(backend, batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4


def test_requests_that_run_at_once_give_the_same_bytes(load, tiny, monkeypatch):
    monkeypatch.setenv("MLC_MAX_NUM_THREADS", "2")
    backend = load(tiny.folder / "model.onnx", scenario="Server")
    assert backend.concurrency == 2
    assert load(tiny.folder / "model.onnx", scenario="SingleStream").concurrency == 1
    parts = samples(random_batch(90, 384, 5, 90, 200, 17))
    alone = [backend.predict(part).tobytes() for part in parts]
    with ThreadPoolExecutor(backend.concurrency) as pool:
        assert [logits.tobytes() for logits in pool.map(backend.predict, parts)] == alone


def test_a_file_that_is_not_an_onnx_model_is_refused(load, tmp_path):
    for content in (b"a text\n", b"\x08\x0a\x12\x07pytorch"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with refused("bad.onnx", "make convert"):
            load(tmp_path / "bad.onnx")
    with refused("nowhere.onnx", "ML_MODEL_FILE_WITH_PATH"):
        load(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("name, size, words", [("input_mask", None, ["mask"]), (None, 128, ["128", "384"])])
def test_a_model_with_other_inputs_is_refused(load, tiny, tmp_path, name, size, words):
    model = onnx.load(tiny.folder / "published.onnx")
    for node in model.graph.node:
        node.input[:] = ["mask" if name and value == name else value for value in node.input]
    for value in model.graph.input:
        value.name = "mask" if value.name == name else value.name
        if size:
            value.type.tensor_type.shape.dim[1].dim_value = size
    for value in model.graph.output if size else ():
        value.type.tensor_type.shape.dim[1].dim_value = size
    onnx.save(model, tmp_path / "other.onnx")
    with refused("other.onnx", "make convert", *words):
        load(tmp_path / "other.onnx")


def test_a_model_in_openvinos_own_format_is_read(load, tiny, tmp_path):
    openvino.save_model(openvino.Core().read_model(tiny.folder / "model.onnx"), tmp_path / "model.xml", False)
    batch = random_batch(30)
    backend = load(tmp_path / "model.xml")
    assert backend.vocab_size == 60 and backend.dtype == "fp32"
    assert np.array_equal(predict(backend, batch), predict(load(tiny.folder / "model.onnx"), batch))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_name_shows_the_precision_that_the_processor_has(load, tiny, caplog, dtype):
    """OpenVINO takes bf16 in place of fp16 if the processor has only the former."""
    found = [name.lower() for name in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    expected = dtype if dtype in found else "bf16" if "bf16" in found else "fp32"
    backend = load(tiny.folder / "model.onnx", dtype=dtype)
    assert backend.dtype == expected and f", {expected}," in backend.name
    assert (f"has no {dtype} instructions; running in {expected}" in caplog.text) == (dtype != expected)
