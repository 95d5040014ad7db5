"""The OpenVINO backend: run an ONNX file of BERT for question answering, each sample at its own length."""

import queue

import numpy as np
import openvino

import config
from backends import Backend, RunOptions, graph_shape
from config import UserError
from squad_QSL import Batch

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}  # an int8 file's other operators run in fp32


class OpenVinoBackend(Backend):
    """BERT in OpenVINO, on its GPU device if there is one that USE_GPU allows, else on the CPU."""

    batch_policy = "single"

    def __init__(self, options: RunOptions) -> None:
        self.model_path = path = config.model_path("openvino", options.dtype)
        config.require_model_file(path)
        core = openvino.Core()
        device = "GPU" if config.use_gpu() and "GPU" in core.available_devices else "CPU"
        # In SingleStream one request at a time uses all cores; in the other scenarios requests run at once.
        hint = "LATENCY" if options.scenario == "SingleStream" else "THROUGHPUT"
        settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": PRECISIONS[options.dtype]}
        if (threads := config.thread_limit("MLC_MAX_NUM_THREADS")) and device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            model = core.read_model(path)
            names = config.onnx_inputs(path, [port.any_name for port in model.inputs])
            compiled = core.compile_model(model, device, settings)
        except RuntimeError as error:
            line = config.last_line(error)
            raise UserError(f"{path}: OpenVINO cannot use it ({line}); `make convert` writes files that fit") from None
        self.inputs = [compiled.input(name) for name in names]
        shapes = [port.partial_shape if port.partial_shape.rank.is_static else () for port in self.inputs]
        sizes = [tuple(size.get_length() if size.is_static else None for size in shape) for shape in shapes]
        self.length = graph_shape(path, sizes, options.reference)[1]
        self.concurrency = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(self.concurrency):
            self.requests.put(compiled.create_infer_request())
        version = openvino.__version__.split("-")[0]
        self.name = f"OpenVINO {version}, {device}, {options.dtype}, {self.concurrency} requests"

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token of a batch of one sample, float32 (tokens, 2)."""
        arrays = batch.padded_to(self.length or batch.input_ids.shape[1])
        feed = {port: array.astype(port.element_type.to_dtype()) for port, array in zip(self.inputs, arrays)}
        request = self.requests.get()
        result = request.infer(feed)
        logits = np.stack([result[0][0], result[1][0]], axis=-1)[: batch.lengths[0]]
        self.requests.put(request)
        return logits
