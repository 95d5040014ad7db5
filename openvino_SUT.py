"""The OpenVINO backend: runs an ONNX file of BERT for question answering at each sample's own length."""

import argparse
import os
import queue
import sys
from typing import Any

import numpy as np
import openvino

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}  # int8 is in the file; the rest of it is fp32


class OpenVinoBackend:
    """BERT in OpenVINO, on its GPU device where there is one that USE_GPU allows, else on the CPU."""

    together = "one"
    vocab_size = sys.maxsize  # the file does not say

    def __init__(self, args: argparse.Namespace) -> None:
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        self.path = path = config.onnx_model(args.dtype)
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such model file; `make setup` fetches BERT-Large, "
                            "ML_MODEL_FILE_WITH_PATH names another")
        core = openvino.Core()
        device = "GPU" if config.use_gpu() and "GPU" in core.available_devices else "CPU"
        # One request at a time has all cores for SingleStream's sake; elsewhere requests run side by side.
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY" if args.scenario == "SingleStream" else "THROUGHPUT",
                                   "INFERENCE_PRECISION_HINT": PRECISIONS[args.dtype]}
        threads = config.env_threads("MLC_MAX_NUM_THREADS")
        if threads and device == "CPU":
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            names = config.onnx_inputs(path, [port.any_name for port in model.inputs])
            self.model = core.compile_model(model, device, options)
        except RuntimeError as error:
            raise UserError(f"{path}: OpenVINO cannot use it ({str(error).strip().splitlines()[-1]})") from None
        self.ports = [self.model.input(name) for name in names]
        shape = self.ports[0].partial_shape
        sizes = [size.get_length() if size.is_static else None for size in shape] if shape.rank.is_static else []
        if len(sizes) != 2 or sizes[0] not in (None, 1) or sizes[1] not in (None, MAX_SEQ_LENGTH):
            raise UserError(f"{path}: the inputs' shape is {shape}; a dynamic one or (1, {MAX_SEQ_LENGTH}) is needed; "
                            "bert_tf_to_pytorch.py and quantize_bert.py make files that fit")
        self.length = MAX_SEQ_LENGTH if args.reference else sizes[1]
        self.workers = self.model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(self.workers):
            self.requests.put(self.model.create_infer_request())
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}, {device}, {args.dtype}, {self.workers} requests"

    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch` of one sample, float32 (tokens, 2)."""
        arrays = batch.padded_to(self.length or batch.input_ids.shape[1])
        request = self.requests.get()
        result = request.infer({port: array.astype(port.element_type.to_dtype())
                                for port, array in zip(self.ports, arrays)})
        logits = np.stack([result[0][0], result[1][0]], axis=-1)[:batch.lengths[0]]
        self.requests.put(request)
        return logits
