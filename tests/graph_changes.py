"""Changes of the tiny model's graph, for the table of forms: each function makes or is a change(model, folder).

A change modifies an onnx.ModelProto, or returns another one or the content of the file to write.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convert.pytorch_to_onnx import OUTPUTS


def node(operator, *names, **attributes):
    """Return a node whose last name is its output."""
    return helper.make_node(operator, names[:-1], names[-1:], **attributes)


def constant(name, value):
    """Return a node that gives a constant."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))


def same(model, folder):
    """Change nothing."""


def together(*changes):
    """Return a change that makes several, each of which changes the model in place."""

    def change(model, folder):
        for each in changes:
            each(model, folder)

    return change


def rename(**names):
    """Return a change that gives tensors other names."""

    def change(model, folder):
        for value in (*model.graph.input, *model.graph.output):
            value.name = names.get(value.name, value.name)
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]

    return change


def reverse(field):
    """Return a change that lists the inputs or outputs in reverse order."""

    def change(model, folder):
        values = list(getattr(model.graph, field))[::-1]
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)

    return change


def outputs(*values, nodes=()):
    """Return a change of the outputs to `values`, (name, element type, shape), which `nodes` compute.

    The logits of both kinds, (batch, length, 2), are the tensor "both".
    """

    def change(model, folder):
        whole = next(node for node in model.graph.node[::-1] if node.op_type == "Split").input[0]
        model.graph.node.append(node("Identity", whole, "both"))
        model.graph.node.extend(nodes)
        model.graph.ClearField("output")
        model.graph.output.extend(helper.make_tensor_value_info(*value) for value in values)

    return change


def cast_outputs(kind):
    """Return a change of the outputs' element type."""

    def change(model, folder):
        for value in model.graph.output:
            model.graph.node.append(node("Cast", value.name, f"{value.name}_", to=kind))
            value.name += "_"
            value.type.tensor_type.elem_type = kind
        rename(**{f"{name}_": name for name in OUTPUTS}, **{name: f"{name}_fp32" for name in OUTPUTS})(model, folder)

    return change


def more_outputs(model, folder):
    """Add outputs before the logits, as a model does that is also trained for another task."""
    added = [("hidden", TensorProto.FLOAT, None), ("input_ids_again", TensorProto.INT64, ["batch", "length"])]
    hidden = next(node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization")
    model.graph.node.append(helper.make_node("Identity", [hidden], ["hidden"]))
    model.graph.node.append(helper.make_node("Identity", ["input_ids"], ["input_ids_again"]))
    values = [*(helper.make_tensor_value_info(*value) for value in added), *model.graph.output]
    model.graph.ClearField("output")
    model.graph.output.extend(values)


def input_types(*types):
    """Return a change of the inputs' element types; a float is cast to an integer inside."""

    def change(model, folder):
        for value, kind in zip(model.graph.input, types):
            value.type.tensor_type.elem_type = kind
            if kind not in (TensorProto.INT32, TensorProto.INT64):
                name = value.name
                rename(**{name: f"{name}_int"})(model, folder)
                value.name = name
                model.graph.node.insert(0, node("Cast", name, f"{name}_int", to=TensorProto.INT64))

    return change


def another_input(name):
    def change(model, folder):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]))

    return change


def initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replace_table(make, name="word_embeddings"):
    """Return a change that computes a table by nodes: make(array) gives (constants, nodes with the output "table")."""

    def change(model, folder):
        tensor = initializer(model, name)
        constants, nodes = make(numpy_helper.to_array(tensor))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
        for node in model.graph.node:
            node.input[:] = ["table" if source == name else source for source in node.input]
        for place, node in enumerate(nodes):
            model.graph.node.insert(place, node)

    return change


def cut_table(name, rows):
    def change(model, folder):
        tensor = initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:rows].copy(), name))

    return change


def cast_table(table):
    cast = node("Cast", "stored", "table", to=TensorProto.FLOAT)
    return {"stored": table.astype(np.float16)}, [cast]


def int8_table(table):
    scale = np.float32(np.abs(table).max() / 127)
    constants = {"stored": np.rint(table / scale).astype(np.int8), "scale": scale, "zero": np.int8(0)}
    return constants, [node("DequantizeLinear", "stored", "scale", "zero", "table")]


def flat_table(table):
    constants = {"stored": table.reshape(-1), "form": np.array([-1, table.shape[1]])}
    return constants, [node("Reshape", "stored", "form", "table")]


def one_hot(model, folder):
    """Look up segments by a product with a one-hot matrix, as Google's BERT does in TensorFlow."""
    place, gather = next(
        pair for pair in enumerate(model.graph.node) if list(pair[1].input) == ["token_type_embeddings", "segment_ids"]
    )
    constants = {"depth": np.int64(2), "values": np.array([0, 1], np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    product = node("MatMul", "one_hot", "token_type_embeddings", gather.output[0])
    model.graph.node.remove(gather)
    model.graph.node.insert(place, product)
    model.graph.node.insert(place, node("OneHot", "segment_ids", "depth", "values", "one_hot", axis=-1))


def constant_nodes(model, folder):
    """Move the weights from the list of initializers to nodes, as some exporters write them."""
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.ClearField("initializer")


def weights_are_inputs(model, folder):
    values = (helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
    model.graph.input.extend(values)


def weight(change):
    """Return a change of a layer's matrix by `change(tensor)`."""

    def change_model(model, folder):
        change(next(tensor for tensor in model.graph.initializer if tensor.name.endswith("intermediate.dense.kernel")))

    return change_model


def not_a_number(tensor):
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def node_without_inputs(model, folder):
    next(node for node in model.graph.node if node.op_type == "Squeeze").ClearField("input")


def version(ir=None, opset=None):
    def change(model, folder):
        model.ir_version = ir or model.ir_version
        model.opset_import[0].version = opset or model.opset_import[0].version

    return change


def fp16(model, folder):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=False, force_fp16_initializers=True)


def fp16_weights(model, folder):
    """Store the matrices in fp16 and compute in fp32."""
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name.endswith(".kernel")]:
        values = numpy_helper.to_array(tensor).astype(np.float16)
        model.graph.node.insert(0, node("Cast", f"{tensor.name}16", tensor.name, to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values, f"{tensor.name}16"))


def int8_weights(model, folder):
    """Store the matrices in int8 and compute in fp32."""
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name.endswith(".kernel")]:
        constants, _ = int8_table(numpy_helper.to_array(tensor))
        names = {name: f"{tensor.name}_{name}" for name in constants}
        model.graph.node.insert(0, node("DequantizeLinear", *names.values(), tensor.name))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(numpy_helper.from_array(constants[name], names[name]) for name in names)


def static_int8(model, folder):
    """Quantize the inputs of the products by constant scales."""
    for name, value in (("static_scale", np.float32(8 / 127)), ("static_zero", np.int8(0))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for product in [node for node in model.graph.node if node.op_type == "MatMul" and ".kernel" in node.input[1]]:
        source, kernel = product.input
        place = list(model.graph.node).index(product)
        product.input[0] = f"{kernel}_fake"
        model.graph.node.insert(
            place, node("DequantizeLinear", f"{kernel}_int8", "static_scale", "static_zero", f"{kernel}_fake")
        )
        model.graph.node.insert(place, node("QuantizeLinear", source, "static_scale", "static_zero", f"{kernel}_int8"))


def dynamic_int8(model, folder):
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(model, folder / "fp32.onnx")
    quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx")
    return (folder / "int8.onnx").read_bytes()


def second_file(change):
    """Return a change that puts the weights into a second file and then changes that file."""

    def write(model, folder):
        onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx_data", size_threshold=100)
        change(folder / "m.onnx_data")
        return (folder / "m.onnx").read_bytes()

    return write


def traced(opset):
    """Return the model as PyTorch's exporter writes it: its outputs have numbers for names."""

    def change(model, folder):
        import torch
        from transformers import BertConfig, BertForQuestionAnswering

        from models.model_files import read_weights

        bert_config, weights = read_weights(str(folder / "tiny/model"))
        bert = BertForQuestionAnswering(BertConfig(**bert_config, attn_implementation="eager")).eval()
        bert.load_state_dict(weights)
        bert.forward = lambda *inputs, call=bert.forward: call(*inputs, return_dict=False)
        names = ["input_ids", "attention_mask", "token_type_ids"]
        axes = {name: {0: "batch", 1: "length"} for name in names}
        sample = (torch.ones((1, 9), dtype=torch.long),) * 3
        path = str(folder / "traced.onnx")
        torch.onnx.export(bert, sample, path, input_names=names, dynamic_axes=axes, opset_version=opset, dynamo=False)
        return (folder / "traced.onnx").read_bytes()

    return change
