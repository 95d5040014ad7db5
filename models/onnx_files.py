"""Read ONNX files: what they state of their graph, and whether their weights are there and finite."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

import config
from config import UserError
from files import require_model_file
from models.graph_files import Graph, GraphNode, GraphTensor, one_line

LARGE = 1000  # bytes: a field of a weight from this size on holds its values


def fields(data: Any, start: int, end: int) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Yield (number, place, place of the content) of each field of the protobuf message `data[start:end]`.

    Raises ValueError if it is no such message.
    """

    def integer(place: int) -> tuple[int, int]:  # and the place after it
        value = shift = 0
        while place < end:
            value |= (data[place] & 127) << shift
            place, shift = place + 1, shift + 7
            if data[place - 1] < 128:
                return value, place
        raise ValueError("it is cut off")

    while start < end:
        key, content = integer(start)
        sizes = {0: 0, 1: 8, 2: 0, 5: 4}  # bytes after the key by the field's type; 0: a number, 2: any bytes
        if key & 7 not in sizes:
            raise ValueError("it is no protobuf message")
        size = sizes[key & 7]
        if key & 7 == 0:
            size = integer(content)[1] - content
        elif key & 7 == 2:
            size, content = integer(content)
        stop = content + size
        if stop > end:
            raise ValueError("it is cut off")
        yield key >> 3, slice(start, stop), (content, stop)
        start = stop


def is_finite(tensor: Any, raw: Any) -> bool:
    """Return whether a float32 or float16 weight with the bytes `raw` holds no NaN and no infinity.

    Logits of NaN would show such a weight, but if the graph quantizes what it gives, the logits are only wrong. A
    constant of one value may be a mask's minus infinity.
    """
    from onnx import TensorProto

    dtype = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2"}.get(tensor.data_type)
    if not dtype or math.prod(tensor.dims) < 2 or len(raw) % np.dtype(dtype).itemsize:
        return True
    # In float64, since no sum of finite values of these types overflows there.
    return bool(np.isfinite(np.frombuffer(raw, dtype).sum(dtype=np.float64)))


def parse_onnx(path: str) -> Any:
    """Return an ONNX file as an onnx.ModelProto without the values of large weights.

    Raises ValueError if the values of a weight are missing or not finite, or protobuf's exceptions.
    """
    import onnx

    kinds = onnx.TensorProto.DESCRIPTOR.fields_by_name
    stored = {kinds[name].number for name in kinds if name.endswith("_data")}
    raw_data = kinds["raw_data"].number

    model = onnx.ModelProto()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, place, content in fields(data, 0, len(data)):
            if number != onnx.ModelProto.GRAPH_FIELD_NUMBER:
                model.MergeFromString(data[place])
                continue
            for number_in_graph, part, tensor_content in fields(data, *content):
                if number_in_graph != onnx.GraphProto.INITIALIZER_FIELD_NUMBER:
                    model.graph.MergeFromString(data[part])
                    continue
                tensor = model.graph.initializer.add()
                found = list(fields(data, *tensor_content))
                for _, field, _ in found:
                    if field.stop - field.start < LARGE:
                        tensor.MergeFromString(data[field])
                if math.prod(tensor.dims) and not any(
                    kind in stored and end > start for kind, _, (start, end) in found
                ):
                    raise ValueError(f"the weight {tensor.name} has no values")
                places = [slice(*place) for kind, _, place in found if kind == raw_data]
                if not all(is_finite(tensor, memoryview(data)[place]) for place in places):
                    raise ValueError(f"the weight {tensor.name} holds NaN or infinity")
    return model


def read_onnx(path: str, weights: bool = False) -> Any:
    """Read an ONNX file as an onnx.ModelProto, with the values of large weights only if `weights`.

    A weight that is also an input, as in the first versions of the format, is only a weight. Raises UserError if the
    file is missing, damaged, newer than the package onnx or no ONNX model, or if a second file with weights is missing
    or too short.
    """
    require_model_file(path)
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

    folder = os.path.dirname(path)
    with one_line(path, "damaged or not an ONNX model"):
        model = onnx.load(path, load_external_data=False) if weights else parse_onnx(path)
        graph = model.graph
        if not graph.node:
            raise ValueError("it holds no graph")
        known = onnx.IR_VERSION, onnx.defs.onnx_opset_version()
        if model.ir_version > known[0] or opset(model) > known[1]:
            fault = f"IR version {model.ir_version}, opset {opset(model)} is newer than {known[0]} and {known[1]}"
            remedy = "export the model again with an older opset, or update onnx"
            raise UserError(f"{path}: {fault}, the newest that onnx {onnx.__version__} knows; {remedy}")
        for tensor in filter(uses_external_data, graph.initializer):
            info = ExternalDataInfo(tensor)
            second = os.path.join(folder, info.location)
            end = (info.offset or 0) + (info.length or 0)
            if not os.path.isfile(second) or os.path.getsize(second) < end:
                fault = "is too short" if os.path.isfile(second) else "is missing"
                raise UserError(f"{path}: its weights are in {second}, which {fault}; put that file beside it")
        if weights:
            load_external_data_for_model(model, folder)
    names = {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.input if value.name in names]:
        graph.input.remove(value)
    return model


def opset(model: Any) -> int:
    """Return the version of ONNX's operators that a model uses, 0 if it uses none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


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
        few = kind.startswith("int") and math.prod(shape) < 10 and not proto.external_data
        return GraphTensor(name, kind, shape, tuple(numpy_helper.to_array(proto).flatten().tolist()) if few else ())

    constants = {proto.name: constant(proto.name, proto) for proto in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            value = attributes["value"].t
            if not is_finite(value, value.raw_data):
                raise ValueError(f"the weight {node.output[0]} holds NaN or infinity")
            constants[node.output[0]] = constant(node.output[0], value)
        cast = dtype(attributes["to"].i) if node.op_type == "Cast" else ""
        nodes.append(GraphNode(node.op_type, tuple(node.input), tuple(node.output), cast))
    version = f"IR version {model.ir_version}, opset {opset(model)}"
    return Graph(list(map(tensor, model.graph.input)), list(map(tensor, model.graph.output)), nodes, constants, version)


def read_onnx_graph(path: str) -> Graph | None:
    """Return what an ONNX file states, None if the package that reads it is missing. Raises UserError."""
    try:
        with one_line(path, "damaged or not an ONNX model"):
            return onnx_graph(read_onnx(path))
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        missing = "the package onnx is missing, which reads what the file states"
        config.notice(f"{path}: {missing}; its vocabulary, dtype and quantization may not be checked")
        return None
