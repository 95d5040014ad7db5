"""Quantize an fp32 ONNX file of BERT to int8: static and symmetric, as QuantizeLinear and DequantizeLinear pairs.

    python3 -m convert.quantize_onnx --onnx model.onnx --out int8.onnx --calibration bert_calibration_features.txt

The encoder's products with a weight run in int8, everything else in fp32. A weight has one scale per column; an input
has one for all tokens, from its largest values over the features of --calibration, one of MLPerf's two lists.
"""

import tempfile
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

import config
from backends import RunOptions
from config import UserError
from convert.pytorch_to_onnx import write_model
from convert.verify import load_model, new_files
from create_squad_data import load_features, read_calibration
from files import require_different_files, require_replaceable
from models.onnx_files import opset, read_onnx
from onnxruntime_SUT import OnnxModel
from squad_QSL import SquadQSL

OPSET = 13  # the first with a scale per column
LIMIT = 127  # the largest int8; the smallest that is used is -127, because the quantization is symmetric
MAX_DIFFERENCE = 0.5  # relative; MLPerf's and the demo's models differ by a few percent, unrelated logits by 140 %
RENAMED = dict(zip(*config.ONNX_INPUTS[:2]))  # inputs of the fp32 file: those of the int8 file


def read_model(path: str) -> tuple[onnx.ModelProto, dict[str, TensorProto], list[tuple[str, str]]]:
    """Read a model: (model, {name: matrix}, [a product's (input, matrix)]), without the answer layer's 2 columns."""
    model = read_onnx(path, weights=True)
    if (version := opset(model)) < OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:  # onnx raises RuntimeError, protobuf its own types, above 2 GiB for example
            reason = config.first_line(error)
            fault = f"opset {version} cannot be converted to {OPSET}, the first with a scale per column ({reason})"
            raise UserError(f"{path}: {fault}; export the model again with a newer opset") from None
    constants = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    weights = {tensor.name: tensor for tensor in constants if len(tensor.dims) == 2 and tensor.dims[1] != 2}
    products = [tuple(node.input) for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    if not products:
        raise UserError(f"{path}: no product with a float32 weight to quantize; give the fp32 model")
    return model, weights, products


def max_magnitudes(
    path: str, fp32: onnx.ModelProto, names: list[str], qsl: SquadQSL, rows: Iterable[int]
) -> dict[str, np.ndarray]:
    """Return the largest magnitudes of the tensors `names` of a model over samples: {name: float32 (channels,)}."""
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/model.onnx", model)
        del model  # before ONNX Runtime needs the memory
        observed = OnnxModel(f"{folder}/model.onnx", path, RunOptions(scenario="SingleStream"))
    maxima = dict.fromkeys(names, np.zeros((), np.float32))
    for row in rows:
        batch = qsl.batch(np.array([row]))
        arrays = batch.padded_to(observed.signature.length or batch.input_ids.shape[1])
        for name, value in zip(names, observed.run(names, arrays)):
            maxima[name] = np.maximum(maxima[name], np.abs(value).reshape(-1, value.shape[-1]).max(axis=0))
    return maxima


def outlier_scales(maxima: np.ndarray) -> np.ndarray:
    """Return factors, float32 (channels,), that bring outlier channels down to the 99th percentile of `maxima`.

    Under one scale for all, a trained BERT's few channels of ten times the size leave the others few of the 255 values.
    Unlike SmoothQuant (arXiv:2211.10438), this scales only outliers, and none if no channel is twice the percentile.
    """
    usual = np.sort(maxima)[-1 - len(maxima) // 100]
    if maxima.max() < 2 * usual:
        return np.ones_like(maxima)
    return np.asarray(np.minimum(usual / np.maximum(maxima, usual), 1), np.float32)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the root mean square of the difference of logits, relative to the standard deviation of `expected`."""
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


def quantize(model: onnx.ModelProto, weights: dict[str, TensorProto], maxima: dict[str, np.ndarray]) -> None:
    """Quantize a model's products with `weights`, in place, and rename its inputs; `maxima` is of `max_magnitudes`."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    quantized = set()  # names of tensors

    def constant(name: str, value: np.ndarray | np.generic) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: int) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], f"{output}_{operator}", **attributes))
        return output

    for value in graph.input:
        value.name = RENAMED.get(value.name, value.name)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            x, w = node.input
            factors = outlier_scales(maxima[x])
            if x not in quantized:
                limit = max((maxima[x] * factors).max(), 1e-6)
                pair = [constant(f"{x}_scale", np.float32(limit / LIMIT)), constant(f"{x}_zero", np.int8(0))]
                scaled = add("Mul", [x, constant(f"{x}_factors", factors)], f"{x}_scaled") if factors.min() < 1 else x
                add("DequantizeLinear", [add("QuantizeLinear", [scaled, *pair], f"{x}_int8"), *pair], f"{x}_fake")
            if w not in quantized:
                weight = numpy_helper.to_array(weights[w]) / factors[:, None]
                scale = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / LIMIT).astype(np.float32)
                int8 = constant(f"{w}_int8", np.rint(weight / scale).astype(np.int8))
                parameters = [constant(f"{w}_scale", scale), constant(f"{w}_zero", np.zeros(len(scale), np.int8))]
                add("DequantizeLinear", [int8, *parameters], f"{w}_fake", axis=1)
                graph.initializer.remove(weights[w])
            quantized.update(node.input)
            node.input[:] = [f"{name}_fake" for name in node.input]
        node.input[:] = [RENAMED.get(name, name) for name in node.input]
        nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)


def main() -> None:
    """Quantize the file that the command line names."""
    calibration = config.env("CALIBRATION_FILE", config.CALIBRATION)
    parser = config.argument_parser(__doc__)
    parser.add_argument(
        "--onnx", default=config.ONNX_MODEL, help="the fp32 model, also hf://ORG/NAME/FILE (default: %(default)s)"
    )
    parser.add_argument("--out", default=config.ONNX_INT8_MODEL, help="default: %(default)s")
    parser.add_argument("--dataset", help=f"SQuAD v1.1 JSON file {config.DATASET_DEFAULT}")
    parser.add_argument("--vocab_file", help=f"BERT's vocab.txt {config.VOCAB_DEFAULT}")
    parser.add_argument("--calibration", default=calibration, help="default: %(default)s")
    args = parser.parse_args()
    args.onnx = config.local_model(args.onnx)
    require_different_files(args.out, args.onnx)
    require_replaceable(args.out, "an ONNX model", "give another --out")
    squad, features = load_features(*config.dataset_files(args.dataset, args.vocab_file))
    rows = read_calibration(args.calibration, squad, features)
    model, weights, products = read_model(args.onnx)
    names = list(dict.fromkeys(name for name, _ in products))
    qsl = SquadQSL(features)
    quantize(model, weights, max_magnitudes(args.onnx, model, names, qsl, rows))
    sample = qsl.batch(np.array(rows[:1]))
    fp32 = load_model("onnxruntime", args.onnx).predict(sample)
    with new_files(args.out, ".data") as path:
        write_model(path, model)
        difference = relative_difference(load_model("onnxruntime", path, "int8").predict(sample), fp32)
        if not difference < MAX_DIFFERENCE:
            fault = f"its logits differ from those of {args.onnx} by {difference:.0%}"
            raise UserError(f"{args.out}: {fault}; nothing was written, int8 does not suit this model")
    print(
        f"{args.out}: {len(products)} products in int8, calibrated on {len(rows)} features; the logits of the first "
        f"differ from those in fp32 by {difference:.0%}"
    )


if __name__ == "__main__":
    config.run_command(main)
