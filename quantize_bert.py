"""BERT in ONNX, fp32 -> int8: static, symmetric, as QuantizeLinear/DequantizeLinear pairs.

    python3 quantize_bert.py --onnx model.onnx --out bert_large_v1_1_fake_quant.onnx \\
        --dataset dev-v1.1.json --vocab_file vocab.txt --calibration bert_calibration_features.txt

Every product with a weight matrix inside the encoder runs in int8; embeddings, norms, softmax, the products within
attention and the answer layer stay in fp32. A weight has a scale for each of its columns. An input has one scale for
all tokens, from the largest values that the calibration's features bring it to; the few channels that lie far out
are scaled down before, and the weight's rows up to match. --calibration is one of MLPerf's two
lists: feature indices or question ids, one a line.
"""

import argparse
import os
import tempfile
from collections.abc import Iterable

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
OPSET = 13  # the first with a scale for each column
ANSWERS = 2  # columns of the answer layer's weight


def read_model(path: str) -> onnx.ModelProto:
    """Read an ONNX file into an onnx.ModelProto. Raises UserError where it cannot."""
    try:
        model = onnx.load(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the model ({error.strerror}); bert_tf_to_pytorch.py makes one") from None
    except DecodeError:
        raise UserError(f"{path}: damaged or not an ONNX model; bert_tf_to_pytorch.py makes one") from None
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    if opset < OPSET:
        raise UserError(f"{path}: opset {opset} has no scales for each column, {OPSET} has; "
                        "bert_tf_to_pytorch.py makes a newer file")
    return model


def encoder_products(path: str, model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
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


def largest_values(path: str, model: onnx.ModelProto, names: list[str], qsl: SquadQSL,
                   rows: Iterable[int]) -> dict[str, np.ndarray]:
    """The largest absolute values of the tensors `names` over the samples `rows`: {name: float32 (channels,)}.

    `model` is what the file `path` holds. Raises UserError where ONNX Runtime cannot run it.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "watched.onnx")
        write_model(copy, watched)
        del watched
        session = open_session(copy, name=path)
    types, length, _ = read_inputs(path, session)
    largest = dict.fromkeys(names, np.zeros((), np.float32))
    for row in rows:
        values = session.run(names, feed(types, length, qsl.batch(np.array([row]))))
        for name, value in zip(names, values):
            largest[name] = np.maximum(largest[name], np.abs(value).reshape(-1, value.shape[-1]).max(axis=0))
    return largest


def tame(largest: np.ndarray) -> np.ndarray | None:
    """The factors that bring outlying channels of an input down: float32 (channels,), or None where none lies out.

    `largest` is what `largest_values` found for it. In a trained BERT a few channels reach ten times what all others
    do; one scale for all would leave these others a few of the 255 values.
    """
    usual = np.sort(largest)[-1 - len(largest) // 100]
    return None if largest.max() < 2 * usual else np.minimum(usual / np.maximum(largest, usual), 1).astype(np.float32)


def quantize(model: onnx.ModelProto, products: list[tuple[onnx.NodeProto, onnx.TensorProto]],
             largest: dict[str, np.ndarray]) -> None:
    """Put QuantizeLinear/DequantizeLinear on both inputs of `products`, in place; `largest` of `largest_values`.

    Where channels lie out, the input is multiplied by `tame`'s factors before, and the weight's rows divided by them.
    """
    graph = model.graph
    done = set()  # tensors whose quantized form, NAME_fake, has its nodes

    def constant(name: str, value: np.ndarray | np.generic) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def quantized_input(name: str, factors: np.ndarray | None) -> list[onnx.NodeProto]:
        limit, source = largest[name].max(), name
        nodes = []
        if factors is not None:
            limit, source = (largest[name] * factors).max(), f"{name}_tamed"
            nodes = [helper.make_node("Mul", [name, constant(f"{name}_factors", factors)], [source], f"{name}_tame")]
        scale = constant(f"{name}_scale", np.float32(max(limit, 1e-6) / LIMIT)), constant(f"{name}_zero", np.int8(0))
        return [*nodes,
                helper.make_node("QuantizeLinear", [source, *scale], [f"{name}_int8"], f"{name}_quantize"),
                helper.make_node("DequantizeLinear", [f"{name}_int8", *scale], [f"{name}_fake"], f"{name}_dequantize")]

    def quantized_weight(tensor: onnx.TensorProto, factors: np.ndarray | None) -> list[onnx.NodeProto]:
        name, weight = tensor.name, numpy_helper.to_array(tensor)
        if factors is not None:
            weight = weight / factors[:, None]
        scale = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / LIMIT).astype(np.float32)
        stored = [constant(f"{name}_int8", np.rint(weight / scale).astype(np.int8)), constant(f"{name}_scale", scale),
                  constant(f"{name}_zero", np.zeros(len(scale), np.int8))]
        graph.initializer.remove(tensor)
        return [helper.make_node("DequantizeLinear", stored, [f"{name}_fake"], f"{name}_dequantize", axis=1)]

    matrices = {weight.name: weight for _, weight in products}
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            name, weight = node.input
            factors = tame(largest[name])
            for tensor, make, argument in ((name, quantized_input, name), (weight, quantized_weight, matrices[weight])):
                if tensor not in done:
                    done.add(tensor)
                    nodes += make(argument, factors)
            node.input[:] = f"{name}_fake", f"{weight}_fake"
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # what follows frees the graph's own
    del graph.node[:]
    graph.node.extend(nodes)


def rename_inputs(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename the inputs of `model`, in place; `names` is {old: new}."""
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def main() -> None:
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
    quantize(model, products, largest)
    rename_inputs(model, dict(zip(*config.ONNX_INPUTS)))
    write_model(args.out, model)
    print(f"{args.out}: {len(products)} products in int8, calibrated on {len(rows)} features")


if __name__ == "__main__":
    config.script(main)
