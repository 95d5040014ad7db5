"""Read what model files hold: BERT's configuration, and its weights by Hugging Face's names and shapes."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH

if TYPE_CHECKING:  # only `read_weights` imports PyTorch; the other functions work without it
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # {name of a weight: shape}

WIDTHS = ("hidden_size", "intermediate_size")
COUNTS = ("num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "type_vocab_size")
# Tensors that a file may hold although question answering does not use them.
UNUSED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


def read_config(path: str) -> dict[str, Any]:
    """Read BERT's configuration, Google's bert_config.json or Hugging Face's config.json. Raises UserError."""
    remedy = "give the configuration that belongs to the weights, or another model"
    bert_config: dict[str, Any] = config.read_json(path, "the model's configuration", remedy)

    def require(condition: bool, fault: str) -> None:
        if not condition:
            raise UserError(f"{path}: {fault}; {remedy}")

    require(isinstance(bert_config, dict), "the model's configuration is not a JSON object")
    for name in WIDTHS + COUNTS:
        value = bert_config.get(name)
        require(type(value) is int and value > 0, f"{name} must be a whole number above 0, not {value!r}")
    epsilon = bert_config.setdefault("layer_norm_eps", 1e-12)
    require(isinstance(epsilon, float) and 0 < epsilon < 1, f"layer_norm_eps must be between 0 and 1, not {epsilon!r}")
    hidden, heads = bert_config["hidden_size"], bert_config["num_attention_heads"]
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    tokens = bert_config["max_position_embeddings"]
    require(tokens >= MAX_SEQ_LENGTH, f"max_position_embeddings {tokens} is below a feature's {MAX_SEQ_LENGTH} tokens")
    for name, supported in (("model_type", "bert"), ("hidden_act", "gelu")):
        value = bert_config.get(name, supported)
        require(value == supported, f"{name} is {value!r}, only {supported!r} is supported")
    return bert_config


def weight_shapes(bert_config: dict[str, Any]) -> Shapes:
    """Return the shapes of the weights of a BERT with this configuration."""
    hidden, inner = bert_config["hidden_size"], bert_config["intermediate_size"]
    tables = (("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "type_vocab_size"))
    shapes: Shapes = {f"bert.embeddings.{kind}_embeddings.weight": (bert_config[size], hidden) for kind, size in tables}
    parts: Shapes = {"bert.embeddings.LayerNorm": (hidden,), "qa_outputs": (2, hidden)}
    for number in range(bert_config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            parts[f"{layer}.attention.{name}"] = hidden, hidden
        parts[f"{layer}.intermediate.dense"] = inner, hidden
        parts[f"{layer}.output.dense"] = hidden, inner
        parts[f"{layer}.attention.output.LayerNorm"] = parts[f"{layer}.output.LayerNorm"] = (hidden,)
    for name, shape in parts.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def check_shapes(path: str, config_file: str, found: Shapes, expected: Shapes) -> None:
    """Raise UserError unless the weights `found` in the file `path` are those that its configuration expects."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not BERT's" for name in found if name not in expected]
    wrong = {name: shape for name, shape in expected.items() if found.get(name, shape) != shape}
    faults += [f"{name} is {found[name]}, not {shape}" for name, shape in wrong.items()]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{path}: does not fit {config_file}: {'; '.join(faults[:4])}{more}; give files of one model")


def model_files(model: str) -> tuple[str, str]:
    """Return the paths of the configuration and of the weights of `model` (see `read_weights`)."""
    if os.path.isdir(model):
        return os.path.join(model, "config.json"), os.path.join(model, "model.safetensors")
    beside = os.path.join(os.path.dirname(model), "bert_config.json")
    return beside if os.path.exists(beside) else config.BERT_CONFIG, model


def read_weights(model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a BERT for question answering: (configuration, {name: float32 tensor}).

    `model` is a Hugging Face folder, or a state dict of `torch.save` with the bert_config.json beside it or else the
    project's (BERT-Large). Raises UserError if a file is missing or damaged, or weights do not fit or are not finite.
    """
    config_file, path = model_files(model)
    config.require_model_file(path)
    bert_config = read_config(config_file)
    import torch
    from safetensors.torch import load_file

    remedy = "save it with torch.save(model.state_dict(), …)"
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damage raises exceptions of many types; weights_only refuses a pickle's code
        line = config.first_line(error)
        raise UserError(f"{path}: damaged or not safe to load ({line}); fetch it again or {remedy}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: the file holds no state dict; {remedy}")
    shapes = weight_shapes(bert_config)
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in UNUSED}
    check_shapes(path, config_file, found, shapes)
    weights = {name: state[name].float() for name in shapes}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} weights do); fetch the file again")
    return bert_config, weights


# What the graph of a model file states: an ONNX file's is read here, a TensorFlow graph's in tf_SUT.py.


class GraphTensor(NamedTuple):
    """An input, an output or a constant of a graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | None, ...]  # None for a size that may vary; () also if the number of dimensions is unknown
    values: tuple[int, ...] = ()  # of a constant of a few integers


class GraphNode(NamedTuple):
    """An operation of a graph."""

    operator: str  # its name in the framework
    inputs: tuple[str, ...]  # names of tensors
    outputs: tuple[str, ...]
    dtype: str = ""  # of the output, if the operation is a cast


class Graph(NamedTuple):
    """What a model file states of its computation, without the weights' values."""

    inputs: list[GraphTensor]
    outputs: list[GraphTensor]
    nodes: list[GraphNode]
    constants: dict[str, GraphTensor]
    version: str  # of the file's format, for messages


def read_onnx(path: str, weights: bool = False) -> Any:
    """Read an ONNX file as an onnx.ModelProto, with the weights of a second file only if `weights`.

    A weight that is also an input, as in the first versions of the format, is only a weight. Raises UserError if the
    file is missing, damaged or no ONNX model, or if a file with weights is missing or too short. BERT-Large's file
    takes 3 s and, until it is freed, 2.6 GB, less than ONNX Runtime or OpenVINO need for it.
    """
    config.require_model_file(path)
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

    remedy = "fetch it again; `make convert` writes files that fit"
    folder = os.path.dirname(path)
    try:
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        if not graph.node:
            raise ValueError("it holds no graph")
        for tensor in filter(uses_external_data, graph.initializer):
            info = ExternalDataInfo(tensor)
            second = os.path.join(folder, info.location)
            end = (info.offset or 0) + (info.length or 0)
            if not os.path.isfile(second) or os.path.getsize(second) < end:
                fault = "is too short" if os.path.isfile(second) else "is missing"
                raise UserError(f"{path}: its weights are in {second}, which {fault}; put that file beside it")
        if weights:
            load_external_data_for_model(model, folder)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        line = config.first_line(error)
        raise UserError(f"{path}: damaged or not an ONNX model ({line}); {remedy}") from None
    names = {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.input if value.name in names]:
        graph.input.remove(value)
    return model


def onnx_graph(model: Any) -> Graph:
    """Return what an onnx.ModelProto of `read_onnx` states."""
    from onnx import helper, numpy_helper

    def dtype(number: int) -> str:
        try:
            return str(helper.tensor_dtype_to_np_dtype(number).name)
        except KeyError:
            return f"ONNX's type {number}"

    def tensor(value: Any) -> GraphTensor:  # of a ValueInfoProto
        kind = value.type.tensor_type
        return GraphTensor(value.name, dtype(kind.elem_type), tuple(size.dim_value or None for size in kind.shape.dim))

    def constant(name: str, proto: Any) -> GraphTensor:
        kind, shape = dtype(proto.data_type), tuple(proto.dims)
        few = kind.startswith("int") and sum(shape) < 10 and not proto.external_data
        return GraphTensor(name, kind, shape, tuple(numpy_helper.to_array(proto).flatten().tolist()) if few else ())

    constants = {proto.name: constant(proto.name, proto) for proto in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = constant(node.output[0], attributes["value"].t)
        cast = dtype(attributes["to"].i) if node.op_type == "Cast" else ""
        nodes.append(GraphNode(node.op_type, tuple(node.input), tuple(node.output), cast))
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    version = f"IR version {model.ir_version}, opset {opset}"
    return Graph(list(map(tensor, model.graph.input)), list(map(tensor, model.graph.output)), nodes, constants, version)
