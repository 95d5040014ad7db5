"""Convert a BERT for question answering from PyTorch to an ONNX file.

    python3 -m convert.pytorch_to_onnx --model FOLDER_OR_FILE --onnx_out model.onnx

Inputs: `input_ids`, `input_mask`, `segment_ids`, int64 (batch, length). Outputs: `output_start_logits`,
`output_end_logits`, float32 (batch, length). The operators are standard ones, which other frameworks read too, in the
form that ONNX Runtime runs fastest: its own Attention operator was measured to be no faster.
"""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import config
from config import UserError
from convert.verify import new_files, random_logits, require_equal
from create_squad_data import MAX_SEQ_LENGTH
from files import atomic_write, require_replaceable
from models.model_files import model_files, open_weights

INPUTS = config.ONNX_INPUTS[0]
OUTPUTS = ("output_start_logits", "output_end_logits")
ONE_FILE_BYTES = 1_900_000_000  # protobuf's limit is 2 GiB; more weights go to a second file beside the first


def build_model(bert_config: dict[str, Any], weights: Mapping[str, Any], length: int | None = None) -> Any:
    """Return BERT as an onnx.ModelProto of a fixed length, or of any if `length` is None.

    `weights` are float32 arrays or tensors by Hugging Face's names; each is taken once.
    """
    hidden, heads = bert_config["hidden_size"], bert_config["num_attention_heads"]
    width = hidden // heads
    epsilon = bert_config.get("layer_norm_eps", 1e-12)
    nodes: list[onnx.NodeProto] = []
    shape = ["batch", length or "length"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in INPUTS]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in OUTPUTS]
    opsets = [helper.make_opsetid("", 20)]  # 20 is the first with Gelu
    # The constants are added to the model itself, because each helper copies what it is given: 1.3 GB of BERT-Large.
    model = helper.make_model(helper.make_graph([], "BERT", inputs, outputs), opset_imports=opsets, ir_version=10)
    constants = model.graph.initializer

    def constant(value: Any, name: str = "") -> str:  # returns its name, as `add` does
        name = name or f"constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(operator: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:  # inputs: tensors or constants
        tensors = [tensor if isinstance(tensor, str) else constant(tensor) for tensor in inputs]
        name = f"{operator}_{len(nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{number}" for number in range(outputs)]
        nodes.append(helper.make_node(operator, tensors, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def linear(x: str, *names: str) -> Any:  # layers with the same input become one
        kernel = constant(np.concatenate([weights[f"{name}.weight"] for name in names]).T, f"{names[0]}.kernel")
        return add("Add", add("MatMul", x, kernel), np.concatenate([weights[f"{name}.bias"] for name in names]))

    def norm(x: str, name: str) -> Any:
        return add(
            "LayerNormalization", x, weights[f"{name}.weight"], weights[f"{name}.bias"], axis=-1, epsilon=epsilon
        )

    ids, mask, segments = INPUTS
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    words, positions, types = (constant(weights[f"bert.embeddings.{name}.weight"], name) for name in tables)
    tokens = add("Shape", ids, start=1, end=2)
    x = add("Add", add("Gather", words, ids), add("Gather", types, segments))
    x = norm(add("Add", x, add("Slice", positions, [0], tokens)), "bert.embeddings.LayerNorm")
    padding = add("Sub", np.float32(1), add("Cast", add("Unsqueeze", mask, [1, 2]), to=TensorProto.FLOAT))
    bias = add("Mul", padding, np.float32(-10000))
    for layer in range(bert_config["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}"
        qkv = linear(x, *(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")))
        qkv = add("Transpose", add("Reshape", qkv, [0, 0, 3, heads, width]), perm=[2, 0, 3, 1, 4])
        q, k, v = (add("Squeeze", part, [0]) for part in add("Split", qkv, outputs=3, axis=0, num_outputs=3))
        scores = add("MatMul", q, add("Transpose", k, perm=[0, 1, 3, 2]))
        scores = add("Add", add("Mul", scores, np.float32(width**-0.5)), bias)
        context = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        context = linear(add("Reshape", context, [0, 0, hidden]), f"{prefix}.attention.output.dense")
        x = norm(add("Add", context, x), f"{prefix}.attention.output.LayerNorm")
        inner = add("Gelu", linear(x, f"{prefix}.intermediate.dense"))
        x = norm(add("Add", linear(inner, f"{prefix}.output.dense"), x), f"{prefix}.output.LayerNorm")
    pair = add("Split", linear(x, "qa_outputs"), outputs=2, axis=-1, num_outputs=2)
    nodes += [helper.make_node("Squeeze", [x, constant([-1])], [name], name=name) for x, name in zip(pair, OUTPUTS)]
    model.graph.node.extend(nodes)
    return model


def write_model(path: str, model: onnx.ModelProto) -> None:
    """Write an ONNX file; weights over ONE_FILE_BYTES go to PATH.data. Raises UserError."""
    remedy, data = "give another path or free disk", f"{path}.data"
    require_replaceable(path, "an ONNX model", remedy)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= ONE_FILE_BYTES:
        with atomic_write(path, remedy, "an ONNX model") as file:
            file.write(model.SerializeToString())
        return
    if os.path.exists(data) and data not in model_files(path).parts:
        raise UserError(f"{data}: exists and is not a part of {path}, so it is not replaced; {remedy}")
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder or ".") as part:
            onnx.save(model, f"{part}/{name}", save_as_external_data=True, location=f"{name}.data")
            os.replace(f"{part}/{name}.data", data)
            os.replace(f"{part}/{name}", path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the model ({error.strerror}); {remedy}") from None


def main() -> None:
    """Convert the model that the command line names."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--model", default=config.PYTORCH_MODEL, help="folder or state dict (default: %(default)s)")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    parser.add_argument("--published", action="store_true", help=f"fix the length at MLPerf's {MAX_SEQ_LENGTH}")
    args = parser.parse_args()
    require_replaceable(args.onnx_out, "an ONNX model", "give another --onnx_out")
    expected = random_logits("pytorch", args.model)
    bert_config, weights = open_weights(args.model)
    count = len(weights)
    with new_files(args.onnx_out, ".data") as path:
        write_model(path, build_model(bert_config, weights, MAX_SEQ_LENGTH if args.published else None))
        del weights  # before ONNX Runtime needs the memory
        require_equal(args.onnx_out, [expected, random_logits("onnxruntime", path)])
    print(f"{args.onnx_out}: {count} weights, which give PyTorch's logits")


if __name__ == "__main__":
    config.run_command(main)
