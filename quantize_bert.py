"""BERT in ONNX, fp32 -> int8: static, symmetric, as QuantizeLinear/DequantizeLinear pairs.

    python3 quantize_bert.py --onnx model.onnx --out bert_large_v1_1_fake_quant.onnx \\
        --dataset dev-v1.1.json --vocab_file vocab.txt --calibration bert_calibration_features.txt

Every product with a weight matrix inside the encoder runs in int8; embeddings, norms, softmax, the products within
attention and the answer layer stay in fp32. A weight has a scale for each of its columns. An input has one scale for
all tokens, from the largest values that the calibration's features bring it to. --calibration is one of MLPerf's two
lists: feature indices or question ids, one a line.
"""

import argparse
import os

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import config
from bert_pytorch_to_onnx import write_model
from config import UserError
from create_squad_data import load_features
from onnxruntime_SUT import INPUTS, MODEL, QUANTIZED_MODEL, fixed_sizes, input_types
from squad_QSL import SquadQSL

LIMIT = 127  # the largest int8, and minus it the smallest: symmetric
ANSWERS = 2  # columns of the answer layer's weight


def read_calibration(path, squad, features):
    """The features that the list `path` names: int array. Raises UserError where a line names none."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the calibration list ({error})") from None
    if not lines:
        raise UserError(f"{path}: the calibration list is empty; give one of MLPerf's")
    questions = {question.id: number for number, question in enumerate(squad.questions)}
    if lines[0] in questions:
        unknown = next((line for line in lines if line not in questions), None)
        rows = np.flatnonzero(np.isin(features.question, [questions.get(line, -1) for line in lines]))
    else:
        unknown = next((line for line in lines if not line.isdecimal() or int(line) >= len(features)), None)
        rows = np.array([int(line) for line in lines] if unknown is None else [])
    if unknown is not None:
        raise UserError(f"{path}: {unknown!r} is neither a question id of {squad.path} nor below its {len(features)} "
                        "features; give the list and the data set that belong together")
    return rows


def encoder_products(path, model):
    """The MatMul nodes of `model` whose second input is a weight, but for the answer layer's: [(node, weight)].

    Raises UserError where there are none.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer
               if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT}
    products = [(node, weights[node.input[1]]) for node in model.graph.node
                if node.op_type == "MatMul" and node.input[1] in weights]
    products = [(node, weight) for node, weight in products if weight.dims[1] != ANSWERS]
    if not products:
        raise UserError(f"{path}: holds no product with a float32 weight to quantize; give the fp32 model")
    return products


def largest_values(path, names, qsl, rows):
    """The largest absolute value that each of the tensors `names` takes in each of the samples `rows`.

    float32 (tensors, samples). `path` is the fp32 model; a copy of it beside it, removed afterwards, puts them out.
    """
    model = onnx.load(path, load_external_data=False)
    for number, name in enumerate(names):
        model.graph.node.append(helper.make_node("Abs", [name], [f"abs_{number}"]))
        model.graph.node.append(helper.make_node("ReduceMax", [f"abs_{number}"], [f"max_{number}"], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(f"max_{number}", TensorProto.FLOAT, []))
    return model


def quantize(model, products, largest):
    """Put QuantizeLinear/DequantizeLinear round both inputs of `products`, in place.

    `largest` is {input: value that becomes 127}.
    """
    graph = model.graph
    nodes, quantized = {}, set()

    def constant(name, value):
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for name, value in largest.items():
        scale = constant(f"{name}_scale", np.float32(value / LIMIT))
        zero = constant(f"{name}_zero_point", np.int8(0))
        nodes[name] = [helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_int8"], f"{name}_quantize"),
                       helper.make_node("DequantizeLinear", [f"{name}_int8", scale, zero], [f"{name}_fake"],
                                        f"{name}_dequantize")]
    ordered = []
    matrices = {id(node): weight for node, weight in products}
    for node in graph.node:
        if id(node) in matrices:
            weight = matrices[id(node)]
    return ordered
