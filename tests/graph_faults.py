"""Faults of an ONNX file, for generated files: each is a function(draw, model) that changes an onnx.ModelProto.

`draw(strategy)` gives a value of a hypothesis strategy. After each, the file gives the same logits or cannot be used;
BYTE_FAULTS change its content, and SECOND_FILE_FAULTS the file with its weights.
"""

import numpy as np
import onnx
from graph_changes import rename, together
from hypothesis import assume
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from config import ONNX_INPUTS

TYPES = st.integers(0, 24)  # of TensorProto's elements; 24 is not one
SIZES = st.sampled_from([None, "batch", "length", "N", 1, 2, 3, 8, 128, 383, 384, 512, -1, 0])
SHAPES = st.none() | st.lists(SIZES, max_size=4)
KNOWN = sorted({name for names in ONNX_INPUTS for name in names}) + [
    "start_logits",
    "end_logits",
    "logits",
    "unstack:0",
]
NAMES = st.sampled_from([*KNOWN, "", "0", ":0", "Logits", "input_ids:0", "é", "a b", "token_type_embeddings"])


def one_of(draw, values):
    """Return one of a list of messages; they are not shown in a failure, its number is."""
    assume(len(values) > 0)
    return values[draw(st.integers(0, len(values) - 1))]


def tensor_of(draw, model):
    return one_of(draw, [*model.graph.input, *model.graph.output])


def another_name(draw, model):
    """Rename an input or an output in the whole graph, as an exporter may."""
    value, name = tensor_of(draw, model), draw(NAMES)
    taken = {tensor.name for tensor in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    if name not in taken and not same_kind(value.name, name):
        rename(**{value.name: name})(model, None)


def same_kind(name, other):
    """Return whether two names say start and end: the graph cannot tell a start that is named end."""
    return "logits" in name and other.startswith(("start", "end", "unstack"))


def swapped_inputs(draw, model):
    """Give the inputs one another's names."""
    names = [value.name for value in model.graph.input]
    order = draw(st.permutations(names))
    away, back = {name: f"{name}_" for name in names}, {f"{name}_": other for name, other in zip(names, order)}
    together(rename(**away), rename(**back))(model, None)


def declared_name(draw, model):
    """Change a name only in the list of inputs or outputs."""
    tensor_of(draw, model).name = draw(NAMES)


def declared_type(draw, model):
    tensor_of(draw, model).type.tensor_type.elem_type = draw(TYPES)


def declared_shape(draw, model):
    """Declare another shape of one or of all inputs or outputs."""
    value, shape = tensor_of(draw, model), draw(SHAPES)
    values = draw(st.sampled_from([[value], model.graph.input, model.graph.output]))
    for each in values:
        each.CopyFrom(helper.make_tensor_value_info(each.name, each.type.tensor_type.elem_type, shape))


def no_tensor(draw, model):
    """Declare an input or an output that is no tensor, or has no type."""
    value = tensor_of(draw, model)
    sequence = helper.make_tensor_sequence_value_info(value.name, TensorProto.FLOAT, None)
    value.CopyFrom(draw(st.sampled_from([sequence, onnx.ValueInfoProto(name=value.name)])))


def removed(draw, model):
    """Remove an input, an output, a node, a weight or all of them."""
    values = getattr(model.graph, draw(st.sampled_from(["input", "output", "node", "initializer"])))
    place = draw(st.integers(0, max(0, len(values) - 1)))
    del values[0 if draw(st.booleans()) else place : place + 1]


def twice(draw, model):
    """Repeat an input, an output, a node or a weight."""
    values = getattr(model.graph, draw(st.sampled_from(["input", "output", "node", "initializer"])))
    values.add().CopyFrom(one_of(draw, values))


def versions(draw, model):
    """State another version of the format or of the operators, or operators of another domain."""
    model.ir_version = draw(st.sampled_from([model.ir_version, 0, 1, 2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 2**40]))
    opset = draw(st.sampled_from([None, *range(30), 999, 2**40, -1]))
    del model.opset_import[:]
    if opset is not None:
        domain = draw(st.sampled_from(["", "", "", "ai.onnx", "com.microsoft", "my.own"]))
        model.opset_import.append(helper.make_opsetid(domain, opset))


def weight(draw, model):
    """Change what a weight states of itself."""
    tensor = one_of(draw, model.graph.initializer)
    change = draw(st.sampled_from(["dims", "type", "name", "values", "no values", "nan"]))
    if change == "dims":
        dims = draw(st.sampled_from([[], [-1], [0], [2**40, 2**40], [*tensor.dims, 1], [1, *tensor.dims], [7]]))
        if dims[:1] != [1] and dims != []:  # an additional 1 in front gives the same products
            tensor.dims[:] = dims
    elif change == "type":
        tensor.data_type = draw(TYPES)
    elif change == "name":
        tensor.name = draw(NAMES)
    elif change == "values":
        tensor.raw_data = tensor.raw_data[: draw(st.integers(0, max(0, len(tensor.raw_data) - 1)))]
    elif change == "no values":
        tensor.ClearField("raw_data")
    elif tensor.data_type == TensorProto.FLOAT:
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from([np.nan, np.inf]))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def table(draw, model):
    """Cut an embedding table or add rows to it; positions with one row are the same for all tokens, another model."""
    name = draw(st.sampled_from(["word_embeddings", "position_embeddings", "token_type_embeddings"]))
    tensor = next((each for each in model.graph.initializer if each.name == name), None)
    if tensor is not None:
        values, rows = numpy_helper.to_array(tensor), draw(st.integers(2 * (name[0] == "p"), 500))
        values = np.concatenate((values, np.ones((rows, values.shape[1]), values.dtype)))[: max(rows, 0)]
        tensor.CopyFrom(numpy_helper.from_array(values, name))


def node(draw, model):
    """Make a node one that cannot run."""
    found = one_of(draw, model.graph.node)
    change = draw(st.sampled_from(["operator", "domain", "input", "output", "no input", "cycle"]))
    if change == "operator":
        found.op_type = draw(st.sampled_from(["", "Nothing", "gelu", "LayerNorm", "Loop", "If"]))
    elif change == "domain":
        found.domain = draw(st.sampled_from(["com.microsoft", "my.own", "é"]))
    elif change == "no input":
        found.ClearField("input")
    elif change == "cycle" and found.input:
        found.input[0] = model.graph.node[-1].output[0]
    elif names := found.input if change == "input" else found.output:
        names[draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from(["lost", "0"]))


FAULTS = [
    another_name,
    swapped_inputs,
    declared_name,
    declared_type,
    declared_shape,
    no_tensor,
    removed,
    twice,
    versions,
]
FAULTS += [weight, table, node]


def cut_off(draw, content):
    return content[: draw(st.integers(0, len(content) - 1))]


def more_content(draw, content):
    return content + draw(st.sampled_from([b"\0", b"x", b"\n", b"<html>", content[:999], content[-999:], content]))


def another_content(draw, content):
    return draw(st.sampled_from([b"", b"\0" * 99, b"{}", b"\x08\x0a", b"PK\x03\x04", b"<html>", b"\xff" * 999]))


BYTE_FAULTS = [cut_off, more_content, another_content]


def second_file(draw, path):
    """Put the weights of the file `path` into a second file, and cut that off or name another place in it."""
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=100)
    model, second = onnx.load(path, load_external_data=False), path.parent / "weights"
    stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assume(stored)
    change = draw(
        st.sampled_from(["none", "cut off", "empty", "missing", "a folder", "more", "key", "no key", "no keys"])
    )
    if change == "cut off":
        second.write_bytes(cut_off(draw, second.read_bytes()))
    elif change == "empty":
        second.write_bytes(b"")
    elif change == "more":
        second.write_bytes(second.read_bytes() + b"x")
    elif change in ("missing", "a folder"):
        second.unlink()
        if change == "a folder":
            second.mkdir()
    elif change != "none":
        tensor = one_of(draw, stored)
        entry = one_of(draw, tensor.external_data)
        if change == "key":
            places = ["", ".", "..", "/", "lost", "../weights", "weights", "-1", "x", "99999999", "9" * 30, "1e3", "é"]
            entry.value = draw(st.sampled_from(places))
        elif change == "no key" and entry.key != "offset":  # without it the values are those at the file's beginning
            tensor.external_data.remove(entry)
        elif change == "no keys":
            tensor.ClearField("external_data")
    path.write_bytes(model.SerializeToString())
