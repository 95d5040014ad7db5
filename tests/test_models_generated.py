"""Generated models: each gives the base model's logits, or one line says what is wrong, within seconds.

A folder for PyTorch or an ONNX file is made from the model of the fixture `tiny` in several of the forms that the
tables of forms hold, and at most one property of it is changed. Left out are changes after which it is another valid
model, such as another number of heads. MODEL_EXAMPLES=2000 tries that many of each kind instead of a few seconds of
them.
"""

import contextlib
import copy
import os
import shutil
import signal

import numpy as np
import pytest
from helpers import EXACT, FP16, INT8, predict, random_batch, random_bert, samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
import graph_changes
import graph_faults
import model_changes
import onnx
import test_graph_forms as forms

from backends import RunOptions, load_backend, warm_up
from config import UserError
from models.model_files import check_vocab
from squad_SUT import validate_logits

LIMIT_S = 30  # of an example, which takes about 0.1 s
BATCH = random_batch(40, 7, 384, vocab_size=50)
VOCAB = {str(number): number for number in range(50)}


def examples(count):
    """Return hypothesis's settings for `count` examples, the same in each run; MODEL_EXAMPLES is another number."""
    number = int(os.environ.get("MODEL_EXAMPLES", 0))
    return settings(
        max_examples=number or count,
        derandomize=not number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def time_limit():
    """Fail if the block, which may hang in Python, takes longer than LIMIT_S."""

    def fail(number, frame):
        pytest.fail(f"an example took over {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def result(path, backend):
    """Return the logits that a backend gives with a model, as run.py loads it, or the line that refuses the model."""
    with pytest.MonkeyPatch.context() as patch, time_limit():
        patch.setenv("ML_MODEL_FILE_WITH_PATH", str(path))
        patch.setenv("MLC_MAX_NUM_THREADS", "1")
        patch.setattr("config.notice", lambda text: None)
        try:
            loaded = load_backend(RunOptions(backend=backend))
            check_vocab("vocab.txt", VOCAB, loaded.vocab_size)
            warm_up(loaded, samples(BATCH)[-1])
            return validate_logits(BATCH.lengths, predict(loaded, BATCH))
        except UserError as error:
            return str(error)


def check(found, expected, within, must_run):
    """Assert that `found`, a `result`, has the logits `expected`, or is one line unless `must_run`."""
    if isinstance(found, str):
        assert not must_run, found
        assert "\n" not in found and len(found) < 2000
        assert "; " in found or ": holds a" in found
    else:
        assert np.abs(found - expected).max() <= within


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return (configuration, weights, logits); the weights are rounded to values that fp16 and bf16 hold exactly."""
    folder = tmp_path_factory.mktemp("base")
    bert_config, weights = random_bert(folder)
    weights = {name: np.rint(array * 128) / 128 for name, array in weights.items()}
    save_file(weights, folder / "model.safetensors")
    return bert_config, weights, result(folder, "pytorch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("generated") / "model"


@examples(150)
@given(st.data())
def test_a_generated_folder_gives_the_same_logits_or_one_line(base, place, data):
    bert_config, weights, expected = base
    model = model_changes.new_model(bert_config, weights)
    forms = data.draw(st.sets(st.sampled_from(range(len(model_changes.FORMS))), max_size=5))
    for number in sorted(forms):
        model_changes.FORMS[number](data.draw, model)
    fault = data.draw(st.sampled_from([None, "model", "pickled", "files", "files"]))
    if fault in ("model", "pickled"):
        faults = model_changes.FAULTS if fault == "model" else model_changes.PICKLED_FAULTS
        data.draw(st.sampled_from(faults))(data.draw, model)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = model_changes.write_model(data.draw, model, place, fault == "pickled")
    if fault == "files":
        model_changes.change_file(data.draw, place)
    check(result(path, "pytorch"), expected, 0, must_run=fault is None)


def onnx_variants(bert_config, weights, folder):
    """Return {what: ONNX model} with which a generated file begins."""
    from convert.pytorch_to_onnx import build_model

    dynamic = build_model(bert_config, weights)
    fixed, one = build_model(bert_config, weights, 384), build_model(bert_config, weights, 384)
    for value in (*one.graph.input, *one.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    fp16 = graph_changes.fp16(build_model(bert_config, weights), folder)
    int8 = onnx.load_from_string(graph_changes.dynamic_int8(dynamic, folder))
    for model in (fp16, int8):
        model.graph.ClearField("value_info")  # they state dtypes that the forms change
    return {"dynamic": dynamic, "384 tokens": fixed, "(1, 384)": one, "fp16": fp16, "int8": int8}


@pytest.fixture(scope="module")
def variants(base, tmp_path_factory):
    return onnx_variants(*base[:2], tmp_path_factory.mktemp("variants"))


WITHIN = {"fp16": FP16, "int8": INT8}  # of the variants; the tables of forms have it of each form
IN_PLACE = [row for row in forms.DTYPES if row[1] not in (graph_changes.fp16, graph_changes.dynamic_int8)]


def make_onnx(draw, variants):
    """Return an ONNX model in drawn forms, how near its logits must be, and whether a form is one that is refused."""
    variant = draw(st.sampled_from(["dynamic", "dynamic", *variants]))
    model = copy.deepcopy(variants[variant])
    tables = [forms.INPUTS] if variant in WITHIN else [IN_PLACE, forms.TABLES, forms.OUTPUTS, forms.INPUTS]
    chosen = [table[draw(st.integers(0, len(table) - 1))] for table in tables if draw(st.booleans())]
    for _, change, _ in chosen:
        change(model, None)
    if draw(st.booleans()):
        graph_changes.weights_are_inputs(model, None)
    results = [expected for _, _, expected in chosen]
    refusals = [expected for expected in results if isinstance(expected, list)]
    within = [expected.get("within", EXACT) for expected in results if expected not in refusals]
    return model, max([WITHIN.get(variant, EXACT), *within]), bool(refusals)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@examples(40)
@given(st.data())
def test_a_generated_onnx_file_gives_the_same_logits_or_one_line(base, variants, place, backend, data):
    model, within, refusal = make_onnx(data.draw, variants)
    fault = data.draw(st.sampled_from([None, "graph", "graph", "graph", "bytes", "second file"]))
    if fault == "graph":
        data.draw(st.sampled_from(graph_faults.FAULTS))(data.draw, model)
    content = model.SerializeToString()
    if fault == "bytes":
        content = data.draw(st.sampled_from(graph_faults.BYTE_FAULTS))(data.draw, content)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / "m.onnx"
    path.write_bytes(content)
    if fault == "second file":
        graph_faults.second_file(data.draw, path)
    found = result(path, backend)
    assert isinstance(found, str) or not refusal
    check(found, base[2], within, must_run=fault is None and not refusal)
