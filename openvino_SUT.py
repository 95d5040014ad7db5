"""The OpenVINO backend: run an ONNX file of BERT for question answering, each sample at its own length."""

import queue
from collections.abc import Sequence

import numpy as np
import openvino

import config
from backends import RunOptions
from files import require_model_file
from models.graph_backend import GraphBackend
from models.graph_files import Graph, GraphNode, GraphTensor, one_line, read_signature
from models.onnx_files import read_onnx_graph

# OpenVINO's names of the precisions by --dtype; with another --dtype all that is not quantized runs in f32.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def ir_graph(model: openvino.Model) -> Graph:
    """Return what a model states that OpenVINO has read, such as one in its own format, an .xml file."""

    def tensor(port: openvino.Output) -> GraphTensor:
        sizes = port.partial_shape if port.partial_shape.rank.is_static else ()
        shape = tuple(size.get_length() if size.is_static else None for size in sizes)
        kind = port.get_node().get_type_name()
        name = port.any_name if kind in ("Parameter", "Result") else port.get_node().get_friendly_name()
        return GraphTensor(name, port.element_type.to_dtype().name, shape)

    nodes, constants = [], {}
    for operation in model.get_ordered_ops():
        outputs = [tensor(port) for port in operation.outputs()]
        kind = operation.get_type_name()
        if kind == "Constant":
            constants[outputs[0].name] = outputs[0]
        operator, dtype = ("Cast", outputs[0].dtype) if kind == "Convert" else (kind, "")
        sources = tuple(tensor(port.get_source_output()).name for port in operation.inputs())
        nodes.append(GraphNode(operator, sources, tuple(output.name for output in outputs), dtype))
    return Graph(
        list(map(tensor, model.inputs)), list(map(tensor, model.outputs)), nodes, constants, "read by OpenVINO"
    )


class OpenVinoBackend(GraphBackend):
    """BERT in OpenVINO, on its GPU device if there is one that USE_GPU allows, else on the CPU."""

    framework = "OpenVINO"
    batch_policy = "single"

    def __init__(self, options: RunOptions) -> None:
        self.model_path = path = config.model_path("openvino", options.dtype)
        require_model_file(path)
        graph = None if path.endswith(".xml") else read_onnx_graph(path)
        core = openvino.Core()
        with one_line(path, f"OpenVINO cannot read it, {graph.version if graph else 'a model'}", config.last_line):
            model = core.read_model(path)
            graph = graph or ir_graph(model)
            self.take(read_signature(path, graph, options.reference))
        device = "GPU" if config.use_gpu() and "GPU" in core.available_devices else "CPU"
        # In SingleStream one request at a time uses all cores; in the other scenarios requests run at once.
        hint = "LATENCY" if options.scenario == "SingleStream" else "THROUGHPUT"
        precision = PRECISIONS.get(options.dtype if self.dtype != "int8" else "fp32", "f32")
        settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision}
        if (threads := config.thread_limit("MLC_MAX_NUM_THREADS")) and device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        with one_line(path, f"OpenVINO cannot compile it, {graph.version}", config.last_line):
            compiled = core.compile_model(model, device, settings)
            self.concurrency = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
            # Not `to_dtype`, which is numpy's float16 for OpenVINO's bf16.
            taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            runs = {name: dtype for dtype, name in PRECISIONS.items()}[taken]
            self.ports = [compiled.output(name) for name in self.signature.outputs]
            self.requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
            for _ in range(self.concurrency):
                self.requests.put(compiled.create_infer_request())
        if self.dtype == "fp32" and options.dtype in PRECISIONS:
            self.dtype = runs
            if runs != options.dtype:
                config.notice(f"this {device} has no {options.dtype} instructions; running in {runs}")
        else:
            self.check_dtype(options.dtype)
        version = openvino.__version__.split("-")[0]
        self.name = f"OpenVINO {version}, {device}, {self.dtype}, {self.concurrency} requests"
        self.try_once()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of the signature."""
        inputs = self.signature.inputs
        feed = {tensor.name: array.astype(tensor.dtype) for tensor, array in zip(inputs, arrays)}
        request = self.requests.get()
        try:
            result = request.infer(feed)
            return [np.array(result[port]) for port in self.ports]
        finally:
            self.requests.put(request)
