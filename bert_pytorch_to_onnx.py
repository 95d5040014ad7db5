"""BERT for question answering in PyTorch -> an ONNX file.

    python3 bert_pytorch_to_onnx.py --model FOLDER_OR_FILE --onnx_out model.onnx

Inputs `input_ids`, `input_mask`, `segment_ids`, int64 (batch, length), both dynamic; outputs `output_start_logits`,
`output_end_logits`, float32 (batch, length). --published fixes the length at the 384 of MLPerf's file.

The graph is written as ONNX Runtime runs it best with operators of the standard only, so that others read it too: one
product for queries, keys and values together, LayerNormalization and Gelu as one operator each. ONNX Runtime fuses
biases and residuals into these when it loads the file; its own Attention operator was measured no faster.
"""

import argparse
import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH

OPSET = 20  # the first with Gelu
INPUTS = config.ONNX_INPUTS[0]
OUTPUTS = ("output_start_logits", "output_end_logits")
ONE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB; weights of more go to a second file beside the first


class Graph:
    """ONNX nodes and constants in the making. Tensors are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, value: np.ndarray | np.generic, name: str | None = None) -> str:
        """The name of a constant, `value` as an array."""
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, operator: str, *inputs: str | np.ndarray | np.generic, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; `inputs` are tensors or arrays. Returns the name of its output, or a list of `outputs` names."""
        tensors = [tensor if isinstance(tensor, str) else self.constant(tensor) for tensor in inputs]
        name = f"{operator}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, tensors, names, name=name, **attributes))
        return names[0] if outputs == 1 else names


def build_model(sizes: dict[str, Any], weights: dict[str, np.ndarray], length: int | None = None) -> onnx.ModelProto:
    """BERT as an onnx.ModelProto.

    `weights` are {Hugging Face's name: float32 array}; `length` fixes the tokens of a sample, None leaves them open.
    """
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    width = hidden // heads
    graph = Graph()
    add = graph.add

    def linear(x: str, *names: str) -> Any:  # several layers of the same input become one
        kernel = graph.constant(np.concatenate([weights[f"{name}.weight"] for name in names]).T, f"{names[0]}.kernel")
        return add("Add", add("MatMul", x, kernel), np.concatenate([weights[f"{name}.bias"] for name in names]))

    def norm(x: str, name: str) -> Any:
        return add("LayerNormalization", x, weights[f"{name}.weight"], weights[f"{name}.bias"], axis=-1,
                   epsilon=sizes.get("layer_norm_eps", 1e-12))

    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    ids, mask, segments = INPUTS
    words, positions, types = (graph.constant(weights[f"bert.embeddings.{name}_embeddings.weight"], f"{name}_embeddings")
                               for name in ("word", "position", "token_type"))
    tokens = add("Shape", ids, start=1, end=2)
    x = add("Add", add("Gather", words, ids), add("Gather", types, segments))
    x = norm(add("Add", x, add("Slice", positions, ints(0), tokens)), "bert.embeddings.LayerNorm")
    padding = add("Sub", np.float32(1), add("Cast", add("Unsqueeze", mask, ints(1, 2)), to=TensorProto.FLOAT))
    bias = add("Mul", padding, np.float32(-10000))
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}"
        qkv = linear(x, *(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")))
        qkv = add("Transpose", add("Reshape", qkv, ints(0, 0, 3, heads, width)), perm=[2, 0, 3, 1, 4])
        q, k, v = (add("Squeeze", part, ints(0)) for part in add("Split", qkv, outputs=3, axis=0, num_outputs=3))
        scores = add("MatMul", q, add("Transpose", k, perm=[0, 1, 3, 2]))
        scores = add("Add", add("Mul", scores, np.float32(width ** -0.5)), bias)
        context = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        context = add("Reshape", context, ints(0, 0, hidden))
        x = norm(add("Add", linear(context, f"{prefix}.attention.output.dense"), x),
                 f"{prefix}.attention.output.LayerNorm")
        inner = add("Gelu", linear(x, f"{prefix}.intermediate.dense"))
        x = norm(add("Add", linear(inner, f"{prefix}.output.dense"), x), f"{prefix}.output.LayerNorm")
    pair = add("Split", linear(x, "qa_outputs"), outputs=2, axis=-1, num_outputs=2)
    for logits, name in zip(pair, OUTPUTS):
        graph.nodes.append(helper.make_node("Squeeze", [logits, graph.constant(ints(-1))], [name], name=name))

    shape = ["batch", length or "length"]
    return helper.make_model(
        helper.make_graph(
            graph.nodes, "BERT", [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in INPUTS],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in OUTPUTS],
            list(graph.constants.values())),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def write_model(path: str, model: onnx.ModelProto) -> None:
    """Write an onnx.ModelProto; weights too big for one file go to PATH.data. Raises UserError where it cannot."""
    apart = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > ONE_FILE_BYTES
    data = f"{os.path.basename(path)}.data"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.exists(f"{path}.data"):
            os.unlink(f"{path}.data")  # onnx would append to it
        onnx.save(model, path, save_as_external_data=apart, location=data)
    except OSError as error:
        raise UserError(f"{path}: cannot write the model ({error.strerror}); give another file or free disk") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=config.PYTORCH_MODEL,
                        help="Hugging Face folder, or state dict with bert_config.json beside it (default: %(default)s)")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    parser.add_argument("--published", action="store_true", help=f"inputs of the fixed length {MAX_SEQ_LENGTH}")
    args = parser.parse_args()
    from pytorch_SUT import read_weights

    sizes, weights = read_weights(args.model)
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    write_model(args.onnx_out, build_model(sizes, weights, MAX_SEQ_LENGTH if args.published else None))
    print(f"{args.onnx_out}: {len(weights)} weights")


if __name__ == "__main__":
    config.script(main)
