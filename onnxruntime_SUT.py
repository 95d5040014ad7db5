"""The ONNX Runtime backend: run an ONNX file of BERT for question answering, fp32 or int8."""

import atexit
import os

import numpy as np
import onnxruntime

import config
from backends import Backend, RunOptions, graph_shape
from config import UserError
from squad_QSL import Batch

CPU = "CPUExecutionProvider"
INPUT_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
REMEDY = "`make convert` writes files that fit"


def providers() -> list[str]:
    """Return the execution providers to use: the preferred one if it is available and allowed, then the CPU's."""
    wanted = config.env("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "")
    available = onnxruntime.get_available_providers()
    preferred = wanted or "CUDAExecutionProvider"
    if config.use_gpu() and preferred in available:
        return list(dict.fromkeys([preferred, CPU]))
    if config.use_gpu() and wanted:
        config.notice(f"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER={wanted} is not one of {available}; running on {CPU}")
    return [CPU]


def describe(nodes: list[onnxruntime.NodeArg]) -> str:
    """Return the names, types and shapes of a model's inputs or outputs, for a message."""
    return ", ".join(f"{node.name} {node.type} {node.shape}" for node in nodes)


class OnnxModel:
    """An ONNX file of BERT in ONNX Runtime, which messages call `name`. Raises UserError if it cannot be used."""

    def __init__(self, path: str, name: str, options: RunOptions) -> None:
        config.require_model_file(path)
        settings = onnxruntime.SessionOptions()
        if options.profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(config.env("LOG_PATH", config.LOG_DIR), "onnxruntime_profile")
        use = providers()
        on_cpu = use == [CPU]
        threads = 1 if options.one_batch_per_core and on_cpu else config.thread_limit("MLC_MAX_NUM_THREADS")
        settings.intra_op_num_threads = threads or 0  # 0: one per core
        settings.log_severity_level = 3  # errors only
        if not on_cpu:
            onnxruntime.preload_dlls()  # CUDA's, if pip installed them, as in the Docker image
        disabled = {"SkipLayerNormFusion"} if on_cpu else None  # it takes longer than an addition and a norm
        try:
            self.session = onnxruntime.InferenceSession(path, settings, use, disabled_optimizers=disabled)
        except Exception as error:  # ONNX Runtime has a type for each kind of damage
            raise UserError(f"{name}: damaged or not an ONNX model ({config.first_line(error)}); {REMEDY}") from None
        nodes = {node.name: node for node in self.session.get_inputs()}
        inputs = [nodes[input_name] for input_name in config.onnx_inputs(name, list(nodes))]
        if not all(node.type in INPUT_DTYPES for node in inputs):
            raise UserError(f"{name}: the inputs are {describe(inputs)}, expected int64 or int32; {REMEDY}")
        self.inputs = [(node.name, INPUT_DTYPES[node.type]) for node in inputs]
        shapes = [tuple(size if isinstance(size, int) else None for size in node.shape) for node in inputs]
        self.batch_size, self.length = graph_shape(name, shapes, options.reference)

    def run(self, outputs: list[str] | None, batch: Batch) -> list[np.ndarray]:
        """Return the tensors `outputs` (None: the outputs) for a batch of B samples: (B, length, …)."""
        arrays = batch.padded_to(self.length or batch.input_ids.shape[1])
        feed = {name: array.astype(dtype) for (name, dtype), array in zip(self.inputs, arrays)}
        return list(self.session.run(outputs, feed))


class OnnxRuntimeBackend(Backend):
    """BERT in ONNX Runtime, on the preferred execution provider if it is available and USE_GPU allows, else the CPU."""

    def __init__(self, options: RunOptions) -> None:
        self.model_path = path = config.model_path("onnxruntime", options.dtype)
        self.model = OnnxModel(path, path, options)
        outputs = self.model.session.get_outputs()
        if [(node.type, len(node.shape)) for node in outputs] != 2 * [("tensor(float)", 2)]:
            raise UserError(f"{path}: the outputs are {describe(outputs)}, not two of float (batch, length); {REMEDY}")
        provider = self.model.session.get_providers()[0]
        if options.one_batch_per_core and provider == CPU:
            self.concurrency = config.threads()
        self.batch_policy = "same_length" if provider == CPU else "mixed"
        if self.model.batch_size == 1:
            self.batch_policy = "single"
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {options.dtype}"
        if options.profile:
            atexit.register(lambda: config.log_progress(f"profile: {self.model.session.end_profiling()}"))

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token, float32 (tokens, 2). Raises UserError if a token is not the model's."""
        try:
            pair = self.model.run(None, batch)
        except Exception as error:
            reason = config.first_line(error)
            raise UserError(f"{self.model_path}: ONNX Runtime cannot run it ({reason}); check VOCAB_FILE") from None
        return batch.packed(np.stack(pair, axis=-1)[:, : batch.input_ids.shape[1]])
