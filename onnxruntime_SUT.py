"""The ONNX Runtime backend: run an ONNX file of BERT for question answering, fp32 or int8."""

import atexit
import os
from collections.abc import Sequence

import numpy as np
import onnxruntime

import config
from backends import RunOptions
from graph_files import Graph, GraphTensor, one_line, read_onnx_graph, read_signature
from graph_SUT import GraphBackend

CPU = "CPUExecutionProvider"


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


def session_graph(session: onnxruntime.InferenceSession) -> Graph:
    """Return what ONNX Runtime tells of a model: its inputs and outputs."""

    def tensor(node: onnxruntime.NodeArg) -> GraphTensor:
        dtype = node.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if isinstance(size, int) else None for size in node.shape)
        return GraphTensor(node.name, {"float": "float32", "double": "float64"}.get(dtype, dtype), shape)

    return Graph(list(map(tensor, session.get_inputs())), list(map(tensor, session.get_outputs())), [], {}, "")


class OnnxModel:
    """An ONNX file of BERT in ONNX Runtime, which messages call `name`. Raises UserError if it cannot be used."""

    def __init__(self, path: str, name: str, options: RunOptions) -> None:
        config.require_model_file(path)
        graph = read_onnx_graph(path)
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
        with one_line(name, f"ONNX Runtime cannot load it, {graph.version if graph else 'an ONNX file'}"):
            self.session = onnxruntime.InferenceSession(path, settings, use, disabled_optimizers=disabled)
            self.signature = read_signature(name, graph or session_graph(self.session), options.reference)

    def run(self, outputs: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the tensors `outputs`, (B, length, …), for ids, mask and segments of one shape."""
        inputs = self.signature.inputs
        feed = {tensor.name: array.astype(tensor.dtype) for tensor, array in zip(inputs, arrays)}
        return list(self.session.run(outputs, feed))


class OnnxRuntimeBackend(GraphBackend):
    """BERT in ONNX Runtime, on the preferred execution provider if it is available and USE_GPU allows, else the CPU."""

    framework = "ONNX Runtime"

    def __init__(self, options: RunOptions) -> None:
        self.model_path = path = config.model_path("onnxruntime", options.dtype)
        self.model = OnnxModel(path, path, options)
        provider = self.model.session.get_providers()[0]
        if options.one_batch_per_core and provider == CPU:
            self.concurrency = config.threads()
        self.batch_policy = "same_length" if provider == CPU else "mixed"
        self.take(self.model.signature)
        self.check_dtype(options.dtype)
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {self.dtype}"
        if options.profile:
            atexit.register(lambda: config.log_progress(f"profile: {self.model.session.end_profiling()}"))
        self.try_once()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of the signature."""
        return self.model.run(self.signature.outputs, arrays)
