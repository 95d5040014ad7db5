"""What holds for every backend: the first prediction, the dtype in the record."""

import numpy as np
import pytest
from helpers import NullBackend, random_batch, refused

from backends import RunOptions, warm_up
from config import UserError
from loadgen_logs import new_record


class FailingBackend(NullBackend):
    """Raise an exception in every prediction."""

    name, model_path = "failing", "folder/model"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def predict(self, batch):
        raise self.error


@pytest.mark.parametrize(
    "error, words",
    [
        (IndexError("index 99 is out of range\nin self.table"), ["index 99 is out of range"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["out of memory"]),
        (MemoryError(), ["out of memory"]),
        (UserError("folder/model: the reason"), ["folder/model: the reason"]),
    ],
)
def test_a_first_prediction_that_fails_names_the_model_in_one_line(error, words):
    with refused("folder/model: ", *words):
        warm_up(FailingBackend(error), random_batch(5))


def test_the_record_shows_the_dtype_of_the_model_file(load, tiny, tmp_path):
    import graph_changes
    import onnx

    model = onnx.load(tiny.folder / "model.onnx")
    graph_changes.static_int8(model, tmp_path)
    onnx.save(model, tmp_path / "int8.onnx")
    for name, backend, asked, dtype in (
        (tmp_path / "int8.onnx", "onnxruntime", "fp32", "int8"),
        (tiny.folder / "model.onnx", "onnxruntime", "int8", "fp32"),
        (tiny.folder / "model", "pytorch", "fp32", "fp32"),
    ):
        record = new_record(RunOptions(backend=backend, dtype=asked), load(name, backend, dtype=asked), 1)
        assert record["dtype"] == dtype and f", {dtype}" in record["backend"]


def test_a_backend_that_works_is_warmed_up_once():
    batches = []
    backend = NullBackend()
    backend.predict = lambda batch: batches.append(batch) or np.zeros((5, 2), np.float32)
    warm_up(backend, random_batch(5))
    assert len(batches) == 1
