"""The forms of a file with a graph: each runs right or is refused in one line, alike in every backend that reads it.

Each table has a row per form: what it is, a change of the tiny model's graph, and what is expected: the words of the
refusal, or attributes of the backend, which must then give the tiny model's logits.
"""

import numpy as np
import pytest
from helpers import FP16, INT8, refused

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
import graph_changes as change
import onnx
from graph_changes import constant, node, outputs, rename, replace_table, reverse, second_file, together
from onnx import TensorProto

from config import ONNX_INPUTS, UserError
from models.graph_files import read_signature
from models.onnx_files import onnx_graph, parse_onnx, read_onnx_graph

FLOAT, HALF, INT32, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64
START, END = "output_start_logits", "output_end_logits"
TWO, THREE = ["batch", "length"], ["batch", "length", 2]
HF = {START: "start_logits", END: "end_logits"}
GOOGLE = {START: "unstack:0", END: "unstack:1"}
NUMBERS = {START: "318", END: "319"}
MASK, SEGMENTS = "input_mask", "segment_ids"
COLUMNS = [
    constant("first", 0),
    constant("last", -1),
    node("Gather", "both", "first", "start", axis=2),
    node("Gather", "both", "last", "end", axis=2),
]

OUTPUTS = [
    ("as it is", change.same, {"batch_policy": "same_length"}),
    ("end before start", reverse("output"), {}),
    ("Hugging Face's names", rename(**HF), {}),
    ("Hugging Face's names, end first", together(rename(**HF), reverse("output")), {}),
    ("TensorFlow's names, end first", together(rename(**GOOGLE), reverse("output")), {}),
    ("numbers for names", rename(**NUMBERS), {}),
    ("numbers for names, end first", together(rename(**NUMBERS), reverse("output")), {}),
    ("columns, end first", outputs(("end", FLOAT, TWO), ("start", FLOAT, TWO), nodes=COLUMNS), {}),
    (
        "two of which neither is a half",
        outputs(("both", FLOAT, THREE), ("twice", FLOAT, THREE), nodes=[node("Add", "both", "both", "twice")]),
        ["outputs are both float32", START],
    ),
    ("more outputs", change.more_outputs, {}),
    ("more outputs, numbers for names", together(rename(**NUMBERS), change.more_outputs), {}),
    ("one for both", together(outputs(("both", FLOAT, THREE)), rename(both="logits")), {}),
    ("one for both of another name", outputs(("both", FLOAT, THREE)), {}),
    (
        "one for both among more",
        together(outputs(("both", FLOAT, THREE)), rename(both="logits"), change.more_outputs),
        {},
    ),
    (
        "one for both, (2, batch, length)",
        outputs(("logits", FLOAT, [2, *TWO]), nodes=[node("Transpose", "both", "logits", perm=[2, 0, 1])]),
        {},
    ),
    (
        "one for both, (batch, 2, length)",
        outputs(("logits", FLOAT, ["batch", 2, "length"]), nodes=[node("Transpose", "both", "logits", perm=[0, 2, 1])]),
        {},
    ),
    (
        "three logits a token",
        outputs(
            ("l", FLOAT, None), nodes=[constant("w", np.ones((2, 3), np.float32)), node("MatMul", "both", "w", "l")]
        ),
        ["outputs are l float32 (1, 8, 3)", "(1, 8, 2)"],
    ),
    (
        "one logit a sample",
        outputs(
            ("start_logits", FLOAT, None),
            ("end_logits", FLOAT, None),
            nodes=[
                constant("axes", [1, 2]),
                node("ReduceMax", "both", "axes", "start_logits", keepdims=0),
                node("ReduceMin", "both", "axes", "end_logits", keepdims=0),
            ],
        ),
        ["outputs are start_logits float32 (1,)", "(1, 8)"],
    ),
    (
        "no logits",
        outputs(("ids", INT64, TWO), nodes=[node("Identity", "input_ids", "ids")]),
        ["outputs are ids int64"],
    ),
    ("in fp16", change.cast_outputs(HALF), {"within": FP16}),
    ("in fp64", change.cast_outputs(TensorProto.DOUBLE), {}),
    ("of integers", change.cast_outputs(INT32), ["outputs are", "int32"]),
    (
        "one for both in fp16",
        outputs(("logits", HALF, THREE), nodes=[node("Cast", "both", "logits", to=HALF)]),
        {"within": FP16},
    ),
]

INPUTS = [
    ("MLPerf's int8 names", rename(**dict(zip(ONNX_INPUTS[0], ONNX_INPUTS[1]))), {}),
    ("names of both files", rename(**{MASK: "attention_mask"}), {}),
    ("TensorFlow Hub's names", rename(**dict(zip(ONNX_INPUTS[0], ONNX_INPUTS[2]))), {}),
    ("names with :0", rename(**{name: f"{name}:0" for name in ONNX_INPUTS[0]}), {}),
    ("segments first", reverse("input"), {}),
    ("int32", change.input_types(INT32, INT32, INT32), {}),
    ("int64 ids, int32 mask and segments", change.input_types(INT64, INT32, INT32), {}),
    ("an fp16 mask", change.input_types(INT64, HALF, INT64), ["input_mask float16", "int64 or int32"]),
    ("fp32 ids", change.input_types(FLOAT, INT64, INT64), ["input_ids float32", "int64 or int32"]),
    ("positions", change.another_input("position_ids"), ["segment_ids, position_ids", "expected"]),
    ("other names", rename(input_ids="0", **{MASK: "1", SEGMENTS: "2"}), ["inputs are 0, 1, 2", "input_ids"]),
    ("ids and mask swapped", rename(input_ids=MASK, **{MASK: "input_ids"}), ["input_mask and input_ids are swapped"]),
    ("mask and segments swapped", rename(**{MASK: SEGMENTS, SEGMENTS: MASK}), ["swapped", "export"]),
]

TABLES = [
    ("2,000 of 2,400 tokens, as it were", change.cut_table("word_embeddings", 50), {"vocab_size": 50}),
    ("a table in fp16", replace_table(change.cast_table), {"within": FP16}),
    ("a table in int8", replace_table(change.int8_table), {"within": INT8}),
    ("a table in one dimension", replace_table(change.flat_table), {}),
    ("one-hot segments", change.one_hot, {}),
    ("constants as nodes", change.constant_nodes, {}),
    ("one segment", change.cut_table("token_type_embeddings", 1), ["segment_ids has 1 row", "type_vocab_size"]),
]

DTYPES = [
    ("fp16", change.fp16, {"dtype": "fp16", "within": FP16, "notice": "the model is fp16, not fp32"}),
    ("matrices in fp16", change.fp16_weights, {"dtype": "fp32 (fp16 weights)", "within": FP16}),
    ("matrices in int8", change.int8_weights, {"dtype": "fp32 (int8 weights)", "within": INT8}),
    ("int8", change.static_int8, {"dtype": "int8", "within": INT8, "batch_policy": "same_length"}),
    ("int8 by each batch's range", change.dynamic_int8, {"dtype": "int8", "within": INT8, "batch_policy": "single"}),
]

FILES = [
    ("weights that are inputs", change.weights_are_inputs, {}),
    ("the first IR version", together(change.weights_are_inputs, change.version(ir=3)), {}),
    ("a future IR version", change.version(ir=99), ["IR version 99", "opset 20"]),
    ("a future opset", change.version(opset=999), ["opset 999"]),
    ("PyTorch's export in opset 10, of 2019", change.traced(10), {}),
    ("PyTorch's export in opset 11, as MLPerf's", change.traced(11), {}),
    ("PyTorch's export in opset 17", change.traced(17), {}),
    ("weights in a second file", second_file(lambda path: None), {}),
    ("no second file", second_file(lambda path: path.unlink()), ["m.onnx_data", "missing"]),
    ("a second file cut off", second_file(lambda path: path.write_bytes(b"0")), ["m.onnx_data", "too short"]),
    ("a weight without values", change.weight(lambda tensor: tensor.ClearField("raw_data")), ["kernel has no values"]),
    ("NaN in a weight", change.weight(change.not_a_number), ["kernel holds NaN or infinity"]),
    ("NaN in a node", together(change.weight(change.not_a_number), change.constant_nodes), ["kernel holds NaN"]),
    ("a node without inputs", change.node_without_inputs, ["`make convert`"]),
    ("an empty file", lambda model, folder: b"", ["not an ONNX model"]),
    ("a Git LFS pointer", lambda model, folder: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", ["Git LFS"]),
    ("a web page", lambda model, folder: b"<!DOCTYPE html>\n<html><title>Not found</title></html>\n", ["web page"]),
]


def marked(table):
    """Return the rows of a table as parameters; PyTorch's exports import much and are slow."""
    return [pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * row[0].startswith("PyTorch")) for row in table]


ONNX_FORMS = [row for table in (OUTPUTS, INPUTS, TABLES, DTYPES, FILES) for row in table]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("what, make, result", marked(ONNX_FORMS))
def test_an_onnx_file_of_every_form(check_form, tiny, tmp_path, what, make, result, backend):
    (tmp_path / "tiny").symlink_to(tiny.folder)
    model = onnx.load(tiny.folder / "model.onnx")
    made = make(model, tmp_path)
    model = model if made is None else made
    (tmp_path / "m.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    check_form(tmp_path / "m.onnx", backend, result)


def test_an_onnx_file_is_read_without_its_weights(tiny):
    """What its own reader skips is only the values of weights."""
    path = str(tiny.folder / "model.onnx")
    skipped, whole = parse_onnx(path), onnx.load(path)
    assert onnx_graph(skipped) == onnx_graph(whole)
    assert skipped.ByteSize() < whole.ByteSize() / 4
    assert {tensor.name for tensor in whole.graph.initializer if len(tensor.raw_data) < 900} == {
        tensor.name for tensor in skipped.graph.initializer if tensor.raw_data
    }


def test_no_damaged_onnx_file_causes_a_traceback(tiny, tmp_path):
    """Each bit of damage gives a model, which may be refused later, or one line."""
    whole = (tiny.folder / "model.onnx").read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(len(whole), size=100):
        (tmp_path / "m.onnx").write_bytes(whole[:place])
        with refused("m.onnx", "not an ONNX model", "make convert"):
            read_onnx_graph(str(tmp_path / "m.onnx"))
        (tmp_path / "m.onnx").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            read_signature("m.onnx", read_onnx_graph(str(tmp_path / "m.onnx")), False)
        except UserError as error:
            assert "m.onnx" in str(error) and "\n" not in str(error)
