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
import tempfile

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

import config
from bert_pytorch_to_onnx import write_model
from config import UserError
from create_squad_data import load_features, read_calibration
from onnxruntime_SUT import feed, open_session, read_inputs
from squad_QSL import SquadQSL

LIMIT = 127  # the largest int8, and minus it the smallest: symmetric
ANSWERS = 2  # columns of the answer layer's weight


def read_model(path):
    """Read an ONNX file into an onnx.ModelProto. Raises UserError where it cannot."""
    try:
        return onnx.load(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the model ({error.strerror}); bert_tf_to_pytorch.py makes one") from None
    except DecodeError:
        raise UserError(f"{path}: damaged or not an ONNX model; bert_tf_to_pytorch.py makes one") from None


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


def largest_values(path, model, names, qsl, rows):
    """The largest absolute value of each of the tensors `names` in each of the samples `rows`: float32 (samples, names).

    `model` is what the file `path` holds. Raises UserError where ONNX Runtime cannot run it.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for number, name in enumerate(names):
        watched.graph.node.append(helper.make_node("Abs", [name], [f"abs_{number}"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"abs_{number}"], [f"max_{number}"], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(f"max_{number}", TensorProto.FLOAT, []))
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "watched.onnx")
        write_model(copy, watched)
        del watched
        session = open_session(copy, name=path)
    types, length = read_inputs(path, session)[:2]
    wanted = [f"max_{number}" for number in range(len(names))]
    return np.array([session.run(wanted, feed(types, length, qsl.batch(np.array([row])))) for row in rows])


def quantize(model, products, largest):
    """Put QuantizeLinear/DequantizeLinear on both inputs of `products`, in place.

    `largest` is {name of the first input: the value that becomes 127}.
    """
    graph = model.graph

    def pairs(name):  # the nodes that quantize the tensor `name` and give it back as NAME_fake
        graph.initializer.extend([numpy_helper.from_array(np.float32(max(largest[name], 1e-6) / LIMIT), f"{name}_scale"),
                                  numpy_helper.from_array(np.int8(0), f"{name}_zero")])
        parameters = [f"{name}_scale", f"{name}_zero"]
        return [helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_int8"], f"{name}_quantize"),
                helper.make_node("DequantizeLinear", [f"{name}_int8", *parameters], [f"{name}_fake"],
                                 f"{name}_dequantize")]

    def weight_node(tensor):  # the node that gives the weight back as NAME_fake; the fp32 one goes
        weight, name = numpy_helper.to_array(tensor), tensor.name
        scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / LIMIT
        graph.initializer.remove(tensor)
        graph.initializer.extend([
            numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), f"{name}_int8"),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
            numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}_zero")])
        return helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale", f"{name}_zero"],
                                [f"{name}_fake"], f"{name}_dequantize", axis=1)

    weights = {node.name: weight for node, weight in products}
    nodes, done = [], set()
    for node in graph.node:
        if node.name in weights:
            source, weight = node.input
            if source not in done:
                nodes += pairs(source)
            if weight not in done:
                nodes.append(weight_node(weights[node.name]))
            done |= {source, weight}
            node.input[:] = f"{source}_fake", f"{weight}_fake"
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def rename_inputs(model, names):
    """Rename the inputs of `model`, in place; `names` is {old: new}."""
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", default=config.ONNX_MODEL, help="the fp32 model (default: %(default)s)")
    parser.add_argument("--out", default=config.ONNX_INT8_MODEL, help="default: %(default)s")
    parser.add_argument("--dataset", default=config.env("DATASET_FILE", config.DATASET), help="SQuAD v1.1 JSON file")
    parser.add_argument("--vocab_file", default=config.env("VOCAB_FILE", config.VOCAB), help="BERT's vocab.txt")
    parser.add_argument("--calibration", default=config.env("CALIBRATION_FILE", config.CALIBRATION),
                        help="list of feature indices or of question ids, one a line")
    args = parser.parse_args()
    squad, features = load_features(args.dataset, args.vocab_file)
    rows = read_calibration(args.calibration, squad, features)
    model = read_model(args.onnx)
    products = encoder_products(args.onnx, model)
    names = list(dict.fromkeys(node.input[0] for node, _ in products))
    largest = largest_values(args.onnx, model, names, SquadQSL(features), rows)
    quantize(model, products, dict(zip(names, largest.max(axis=0).tolist())))
    rename_inputs(model, dict(zip(*config.ONNX_INPUTS)))
    write_model(args.out, model)
    print(f"{args.out}: {len(products)} products in int8, calibrated on {len(rows)} features")


if __name__ == "__main__":
    config.script(main)
