"""The forms of a TensorFlow graph: each runs right or is refused in one line, as test_graph_forms.py has it for ONNX.

A row of the table has what it is, a change of the tiny model's GraphDef, which may return another one or the path of
another form, and what is expected: the words of the refusal, or attributes of the backend, which must then give the
tiny model's logits.
"""

import numpy as np
import pytest
from helpers import FP16, INT8, Lazy

from config import ONNX_INPUTS

pytestmark = pytest.mark.usefixtures("tiny_graphs")
tf, freeze_tf, backend_module = Lazy("tensorflow"), Lazy("convert.freeze_tf"), Lazy("tf_SUT")
MASK, SEGMENTS = "input_mask", "segment_ids"


def same(definition, folder):
    """Change nothing."""


def together(*changes):
    """Return a change that makes several."""

    def change(definition, folder):
        for each in changes:
            definition = each(definition, folder) or definition
        return definition

    return change


def rename(**names):
    """Return a change of nodes' names."""

    def change(definition, folder):
        for node in definition.node:
            node.name = names.get(node.name, node.name)
            for place, source in enumerate(node.input):
                name, colon, output = source.partition(":")
                node.input[place] = names.get(name, name) + colon + output

    return change


def outputs(make):
    """Return a change that computes outputs by make(logits), {name: tensor}."""

    def change(definition, folder):
        rename(logits="both")(definition, folder)
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(definition, name="")
            for name, tensor in make(graph.get_tensor_by_name("both:0")).items():
                tf.identity(tensor, name)
        return graph.as_graph_def()

    return change


def google(both):
    """Name the outputs as Google's BERT does: the two outputs of an operation."""
    tf.unstack(tf.transpose(both, [2, 0, 1]), name="google")
    return {}


def one(make):
    """Return a change of the output that holds both logits."""
    return outputs(lambda both: {"logits": make(both)})


def cast_inputs(dtype, *names):
    """Return a change of the dtype of inputs."""

    def change(definition, folder):
        rename(**{name: f"{name}_32" for name in names})(definition, folder)
        with tf.Graph().as_default() as graph:
            ports = {name: tf.compat.v1.placeholder(dtype, (None, None), name) for name in names}
            cast = {f"{name}_32:0": tf.cast(port, tf.int32) for name, port in ports.items()}
            tf.import_graph_def(definition, cast, name="")
        return graph.as_graph_def()

    return change


def another_input(definition, folder):
    definition.node.add(name="keep", op="Placeholder").attr["dtype"].type = tf.float32.as_datatype_enum


def constant(name, value):
    """Return the NodeDef of a constant."""
    node = tf.compat.v1.NodeDef(name=name, op="Const")
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    node.attr["dtype"].type = node.attr["value"].tensor.dtype
    return node


def operation(name, operator, *sources, **types):
    """Return the NodeDef of an operation with these dtypes as attributes."""
    node = tf.compat.v1.NodeDef(name=name, op=operator, input=sources)
    for key, dtype in types.items():
        node.attr[key].type = dtype.as_datatype_enum
    return node


def replace(make, *shapes):
    """Return a change of the constants of these shapes; make(name, array) gives nodes, the last of this name."""

    def change(definition, folder):
        for node in list(definition.node):
            sizes = tuple(size.size for size in node.attr["value"].tensor.tensor_shape.dim)
            if node.op == "Const" and sizes in shapes:
                definition.node.remove(node)
                definition.node.extend(make(node.name, tf.make_ndarray(node.attr["value"].tensor)))

    return change


def as_fp16(name, array):
    stored = constant(f"{name}_16", array.astype(np.float16))
    return [stored, operation(name, "Cast", stored.name, SrcT=tf.float16, DstT=tf.float32)]


def without_values(name, array):
    node = constant(name, array)
    node.attr["value"].tensor.ClearField("tensor_content")
    return [node]


def repeated(name, array):
    """Return a constant of one value, which is stored once: another model, which is not refused."""
    node = without_values(name, array)[0]
    node.attr["value"].tensor.float_val.append(0.5)
    return node


def in_one_dimension(name, array):
    flat, shape = constant(f"{name}_flat", array.reshape(-1)), constant(f"{name}_shape", np.int32([-1, 48]))
    return [flat, shape, operation(name, "Reshape", flat.name, shape.name, T=tf.float32, Tshape=tf.int32)]


def one_hot(definition, folder):
    """Look up segments by a product with a one-hot matrix, as Google's BERT does."""
    gathers = [node for node in definition.node if node.op == "GatherV2" and node.input[1] == SEGMENTS]
    (gather,) = gathers
    name, table = gather.name, gather.input[0]
    definition.node.remove(gather)
    with tf.Graph().as_default() as graph:
        segments = tf.compat.v1.placeholder(tf.int32, (None, None), SEGMENTS)
        matrix = tf.constant(np.zeros((2, 48), np.float32), name="a_table")
        with tf.name_scope("segments_one_hot"):
            product = tf.matmul(tf.one_hot(tf.reshape(segments, [-1]), 2), matrix)
            shape = tf.concat([tf.shape(segments), [48]], 0)
        tf.reshape(product, shape, name="looked_up")
    for node in graph.as_graph_def().node:
        if node.name not in (SEGMENTS, "a_table", "looked_up/shape"):
            node.name = name if node.name == "looked_up" else node.name
            node.input[:] = [table if source == "a_table" else source for source in node.input]
            definition.node.append(node)


def on_device(name):
    def change(definition, folder):
        for node in definition.node:
            node.device = name

    return change


def in_a_function(both):
    @tf.function
    def on_a_gpu(tensor):
        with tf.device("/device:GPU:0"):
            return tf.identity(tensor)

    return on_a_gpu(both)


def dynamic_range(both):
    """Quantize by the range of the values that happen to be in the batch."""
    return tf.quantization.fake_quant_with_min_max_vars(both, tf.reduce_min(both), tf.reduce_max(both))


def saved_model(name):
    def change(definition, folder):
        tf.saved_model.save(tf.Module(), str(folder / "saved"))
        return folder / name

    return change


def checkpoint(name):
    def change(definition, folder):
        prefix = str(folder / "model.ckpt")
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=["x"], shape_and_slices=[""], tensors=[np.float32(1)])
        return folder / name

    return change


def unknown_operator(definition, folder):
    definition.node.add(name="custom", op="CustomOperator", input=["logits"])


KERNELS = (48, 144), (48, 48), (48, 96), (96, 48)
OUTPUTS = [
    ("as it is", same, {}),
    ("(2, batch, length)", one(lambda both: tf.transpose(both, [2, 0, 1])), {}),
    ("(batch, 2, length)", one(lambda both: tf.transpose(both, [0, 2, 1])), {}),
    ("fp16 logits", one(lambda both: tf.cast(both, tf.float16)), {"within": FP16}),
    ("fp64 logits", one(lambda both: tf.cast(both, tf.float64)), {}),
    ("integer logits", one(lambda both: tf.cast(both, tf.int32)), ["outputs are logits:0 int32", "float32"]),
    ("three logits", one(lambda both: tf.concat([both, both], -1)[..., :3]), ["float32 (1, 8, 3)", "(1, 8, 2)"]),
    ("one logit a sample", one(lambda both: tf.reduce_max(both, [1, 2])), ["logits", "float32"]),
    ("Google's names", together(rename(unstack="shape"), outputs(google), rename(google="unstack")), {}),
    ("two outputs", outputs(lambda both: {"end_logits": both[..., 1], "start_logits": both[..., 0]}), {}),
    ("one of another name", rename(logits="answers"), {}),
    ("two of other names", outputs(lambda both: {"a": both[..., 1], "b": both[..., 0]}), ["outputs are", "a:0"]),
]
INPUTS = [
    ("names of MLPerf's int8 file", rename(**dict(zip(ONNX_INPUTS[0], ONNX_INPUTS[1]))), {}),
    ("names of both files", rename(**{MASK: "attention_mask"}), {}),
    ("int64", cast_inputs("int64", *ONNX_INPUTS[0]), {}),
    ("an fp16 mask", cast_inputs("float16", MASK), ["input_mask:0 float16", "int64 or int32"]),
    ("another input that nothing uses", another_input, {}),
    ("other names", rename(input_ids="a", **{MASK: "b", SEGMENTS: "c"}), ["inputs are a:0, b:0, c:0", "input_ids"]),
]
TABLES = [
    ("fewer tokens", replace(lambda name, array: [constant(name, array[:50])], (60, 48)), {"vocab_size": 50}),
    ("a table in fp16", replace(as_fp16, (60, 48)), {"within": FP16}),
    ("a matrix without values", replace(without_values, (48, 144)), ["the weight", "has no values", "make convert"]),
    ("a table in one dimension", replace(in_one_dimension, (60, 48)), {}),
    ("one-hot segments", one_hot, {}),
    ("one segment", replace(lambda name, array: [constant(name, array[:1])], (2, 48)), ["segment_ids:0 has 1 row"]),
    ("matrices in fp16", replace(as_fp16, *KERNELS), {"dtype": "fp32 (fp16 weights)", "within": FP16}),
]
DEVICES = [
    ("on a GPU", on_device("/device:GPU:0"), {}),
    ("on another machine", on_device("/job:worker/task:3/device:GPU:1"), {}),
]
OTHERS = [
    ("another input beside logits of another name", together(another_input, rename(logits="answers")), {}),
    ("a matrix of one value", replace(lambda name, array: [repeated(name, array)], (2, 48)), {"within": 9}),
    ("int8 by each batch's range", one(dynamic_range), {"dtype": "int8", "within": INT8}),
    ("on a GPU in a function", one(in_a_function), {}),
    ("a SavedModel", saved_model("saved"), ["a SavedModel", "freeze_tf"]),
    ("a SavedModel's graph", saved_model("saved/saved_model.pb"), ["a SavedModel", "freeze_tf"]),
    ("a checkpoint", checkpoint("model.ckpt"), ["a TensorFlow checkpoint", "freeze_tf"]),
    ("a checkpoint's index", checkpoint("model.ckpt.index"), ["a TensorFlow checkpoint", "freeze_tf"]),
    ("an unknown operator", unknown_operator, ["CustomOperator"]),
    ("an empty file", lambda definition, folder: tf.compat.v1.GraphDef(), ["not a frozen TensorFlow graph"]),
]
FORMS = [*OUTPUTS, *INPUTS, *TABLES, *DEVICES, *OTHERS]


@pytest.mark.parametrize("what, make, result", FORMS, ids=[row[0] for row in FORMS])
def test_a_graph_of_every_form(check_form, tiny, tmp_path, what, make, result):
    definition = tf.compat.v1.GraphDef.FromString((tiny.folder / "model.pb").read_bytes())
    made = make(definition, tmp_path)
    path = tmp_path / "m.pb"
    if hasattr(made, "node") or made is None:
        freeze_tf.write_graph(str(path), definition if made is None else made)
    else:
        path = made
    check_form(path, "tf", result)


def test_no_device_is_left_in_a_graph_or_its_functions(tiny, tmp_path):
    """So that a graph from a GPU runs on a machine without one, and one from a CPU uses a GPU."""
    definition = tf.compat.v1.GraphDef.FromString((tiny.folder / "model.pb").read_bytes())
    freeze_tf.write_graph(str(tmp_path / "m.pb"), one(in_a_function)(definition, tmp_path))
    read = backend_module.read_definition(str(tmp_path / "m.pb"))
    nodes = [*read.node, *(node for function in read.library.function for node in function.node_def)]
    assert read.library.function and {node.device for node in nodes} == {""}
