"""The ONNX Runtime backend: run an ONNX file of BERT for question answering, fp32, int8 or, on a GPU, fp16."""

import atexit
import ctypes
import logging
import os
from collections.abc import Sequence

import numpy as np
import onnxruntime

import config
from backends import BATCH_TOKENS, RunOptions
from batching import MIN_VOCAB, check_bytes
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from files import atomic_write, disk_faults, require_model_file, require_utf8
from models import gpus
from models.graph_backend import GraphBackend
from models.graph_files import Graph, GraphSignature, GraphTensor, one_line, read_signature
from models.model_files import model_files
from models.onnx_files import read_onnx_graph

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
SHORTEST = 8  # tokens of a sample, at least; TensorRT's engines are for batches of at most this many tokens a sample
TENSORRT_CACHE = os.path.join(config.CACHE_DIR, "tensorrt")
GPU_PACKAGES = "install requirements/onnxruntime-gpu.txt in place of onnxruntime.txt"


def providers() -> list[str]:
    """Return the execution providers to use: the preferred one if it is available and allowed, then the CPU's."""
    wanted = config.env("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "")
    available = onnxruntime.get_available_providers()
    preferred = wanted or CUDA
    if config.use_gpu() and preferred in available:
        behind = [CUDA] if preferred == TENSORRT and CUDA in available else []  # for what TensorRT does not take
        return list(dict.fromkeys([preferred, *behind, CPU]))
    if config.use_gpu() and wanted:
        config.notice(f"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER={wanted} is not one of {available}; running on {CPU}")
    elif not wanted:
        gpus.notice_unused("ONNX Runtime", None, GPU_PACKAGES)
    return [CPU]


def cache_name(path: str) -> str:
    """Return a name of what ONNX Runtime makes from the model `path`, which differs if one of its inputs does."""
    return f"{model_files(path).digest()[:16]}-{onnxruntime.__version__}"


def provider_options(
    use: list[str], path: str, signature: GraphSignature | None, options: RunOptions
) -> list[dict[str, str]]:
    """Return the options of each provider of `use`: no TF32 in fp32; TensorRT's engines for all shapes, and kept.

    ONNX Runtime names an engine by the names in the graph of the model `path`, so each model has a separate folder.
    """
    found: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}}
    if TENSORRT in use:
        engines = os.path.join(TENSORRT_CACHE, cache_name(path))
        with disk_faults(engines):
            os.makedirs(engines, exist_ok=True)
        found[TENSORRT] = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": engines}
        found[TENSORRT] |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": TENSORRT_CACHE}
        found[TENSORRT]["trt_fp16_enable"] = str(int(options.dtype == "fp16"))
        if signature and signature.batch_size is None and signature.length is None:
            most = max(1, (options.batch_tokens or BATCH_TOKENS) // SHORTEST)
            for name, samples, tokens in (("min", 1, 1), ("opt", min(8, most), 192), ("max", most, MAX_SEQ_LENGTH)):
                shapes = (f"{tensor.name}:{samples}x{tokens}" for tensor in signature.inputs)
                found[TENSORRT][f"trt_profile_{name}_shapes"] = ",".join(shapes)
    return [found.get(provider, {}) for provider in use]


def check_provider(wanted: str, found: str) -> None:
    """Raise UserError if ONNX Runtime runs on another provider than `wanted`, which it does without a message.

    On a machine without a GPU, the CPU is right unless the user has named a provider.
    """
    named = os.environ.get("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER")
    if found == wanted or not (named or gpus.find_gpus()):
        return
    folder = os.path.join(os.path.dirname(onnxruntime.__file__), "capi")
    try:
        own = {CUDA: "cuda", TENSORRT: "tensorrt"}.get(wanted, "shared")
        for kind in ("shared", own):  # the second needs the first
            ctypes.CDLL(os.path.join(folder, f"libonnxruntime_providers_{kind}.so"), ctypes.RTLD_GLOBAL)
        driver = next((f"the driver is for CUDA {gpu.cuda}" for gpu in gpus.find_gpus()), "no GPU is visible")
        reason = f"its libraries can be loaded, but {driver}"
    except OSError as error:
        reason = config.first_line(error)
    raise UserError(f"{wanted} cannot run, ONNX Runtime took {found} ({reason}); {GPU_PACKAGES}, or set USE_GPU=0")


def fp16_model(path: str) -> str:
    """Return the path of a copy of the fp32 model `path` in fp16, which ONNX Runtime's optimizer makes once."""
    from onnxruntime.transformers.optimizer import optimize_model

    target = os.path.join(config.CACHE_DIR, f"fp16-{cache_name(path)}.onnx")
    if not os.path.exists(target):
        config.log_progress(f"writing {target}")
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        with one_line(path, "ONNX Runtime's optimizer cannot convert it to fp16"):
            model = optimize_model(path, "bert", opt_level=0, use_gpu=True)
            model.convert_float_to_float16(keep_io_types=True)
        with atomic_write(target, "free disk space, or give --dtype=fp32", "an ONNX model") as file:
            file.write(model.model.SerializeToString())
    return target


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
        require_model_file(path)
        require_utf8(path)
        use = providers()
        graph = read_onnx_graph(path)
        signature = graph and read_signature(name, graph, options.reference)
        if options.dtype == "fp16" and use != [CPU] and signature and signature.dtype == "fp32":
            path = fp16_model(path)
            graph = read_onnx_graph(path)
            signature = graph and read_signature(name, graph, options.reference)
        settings = onnxruntime.SessionOptions()
        if options.profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(config.env("LOG_PATH", config.LOG_DIR), "onnxruntime_profile")
        on_cpu = use == [CPU]
        threads = 1 if options.one_batch_per_core and on_cpu else config.thread_limit("MLC_MAX_NUM_THREADS")
        settings.intra_op_num_threads = threads or 0  # 0: one per core
        settings.log_severity_level = 3  # errors only
        if not on_cpu:
            onnxruntime.preload_dlls()  # CUDA's, if pip installed them, as in the Docker image
        disabled = {"SkipLayerNormFusion"} if on_cpu else None  # it takes longer than an addition and a norm
        with one_line(name, f"ONNX Runtime cannot load it, {graph.version if graph else 'an ONNX file'}"):
            self.session = onnxruntime.InferenceSession(
                path, settings, use, provider_options(use, path, signature, options), disabled_optimizers=disabled
            )
            self.signature = signature or read_signature(name, session_graph(self.session), options.reference)
        check_provider(use[0], self.session.get_providers()[0])

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
        if provider in (CUDA, TENSORRT):
            self.gpu = gpus.describe(gpus.find_gpus()[:1])
            if provider == CUDA and self.dtype == "int8":
                config.notice(f"int8 gains nothing in {CUDA}; give the fp32 model and --dtype=fp16")
        framework = f"ONNX Runtime {onnxruntime.__version__}" + (f" {provider}" if self.gpu else "")
        self.name = f"{framework}, {self.gpu or provider}, {self.dtype}"
        if options.profile:
            atexit.register(lambda: config.log_progress(f"profile: {self.model.session.end_profiling()}"))
        self.try_once()
        if self.gpu and self.batch_policy == "mixed":
            check_bytes(self, self.vocab_size or MIN_VOCAB, options.batch_tokens or self.batch_tokens)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of the signature."""
        return self.model.run(self.signature.outputs, arrays)
