"""Peers for `tools.benchmark --peers`: what a user would choose instead of this project's backends.

Each runs Hugging Face's BertForQuestionAnswering with a framework's own defaults, one sample at a time at its own
length, because padding costs more than a batch gains on a CPU.
"""

import gc
import importlib.util
import logging
import os
import queue
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

import config
from backends import Backend, RunOptions
from models.memory import return_memory
from squad_QSL import Batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
CACHE = f"{config.CACHE_DIR}/torch_compile"


class Peer(Backend):
    """Compute logits with what `make` returns: a function of ids, mask and segments, each int64 (1, length)."""

    batch_policy = "single"
    cpu_only = False

    def __init__(self, options: RunOptions) -> None:
        from pytorch_SUT import PyTorchReference

        reference = PyTorchReference(options)
        self.model_path, self.vocab_size, self.gpu = reference.model_path, reference.vocab_size, reference.gpu
        self.name = f"{options.backend}, {options.dtype}"
        if self.cpu_only and reference.device.type != "cpu":
            raise config.UserError("runs on CPUs only; set USE_GPU=0")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated in the frameworks' own code
            self.logits = self.make(reference.model, options)

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that returns the start and the end logits, each (1, length).

        `bert` is Hugging Face's model in fp32, for `make` to change. Raises UserError, or what the framework raises.
        """
        raise NotImplementedError

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token of a batch of one sample, float32 (tokens, 2)."""
        arrays = (batch.input_ids, batch.input_mask, batch.segment_ids)
        found = self.logits(*(array.astype(np.int64) for array in arrays))
        return np.stack([logits[0] for logits in found], axis=-1).astype(np.float32)


class Transformers(Peer):
    """Hugging Face's model as it is, in PyTorch's eager mode."""

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs `bert` in the dtype of `options`."""
        import torch

        from pytorch_SUT import DTYPES

        bert.to(DTYPES[options.dtype])

        def logits(*arrays: np.ndarray) -> list[np.ndarray]:
            with torch.inference_mode():
                tensors = (torch.from_numpy(array).to(bert.device) for array in arrays)
                answer = bert(**dict(zip(INPUTS, tensors)))
            return [np.asarray(answer[name].float().cpu()) for name in OUTPUTS]

        return logits


class Compiled(Transformers):
    """The same under torch.compile in its default mode, with PyTorch's own compiler or, as `zentorch`, with AMD's."""

    compiler = "inductor"

    def __init__(self, options: RunOptions) -> None:
        # PyTorch's documented variables, read when it is imported. Its compiler's own processes would outlive this one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.abspath(CACHE))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        if options.backend == "zentorch":
            self.compiler = importlib.import_module("zentorch").__name__
        super().__init__(options)

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs `bert` compiled for any length; it raises an error rather than compile again."""
        import torch

        bert.forward = torch.compile(bert.forward, backend=self.compiler, dynamic=True)
        logits = super().make(bert, options)
        logits(*np.ones((3, 1, 100), np.int64))
        guarded: Callable[..., list[np.ndarray]] = torch.compiler.set_stance("fail_on_recompile")(logits)
        return guarded


def release(bert: Any) -> None:
    """Free the weights of `bert`, which was converted, and return freed memory to the system."""
    bert.to("meta")
    gc.collect()
    return_memory()


class OpenVino(Peer):
    """OpenVINO's own conversion, with the hint that it documents for each scenario; its own precision unless fp32."""

    cpu_only = True

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs the converted model."""
        import openvino
        import torch

        core = openvino.Core()
        if options.dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise config.UserError("this processor has no bf16 instructions, so OpenVINO would run in fp32")
        ids = torch.ones((1, 8), dtype=torch.long)
        model = openvino.convert_model(bert, example_input=dict.fromkeys(INPUTS, ids))
        release(bert)
        settings = {"PERFORMANCE_HINT": "LATENCY" if options.scenario == "SingleStream" else "THROUGHPUT"}
        if options.dtype == "fp32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core.compile_model(model, "CPU", settings)
        self.concurrency = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(self.concurrency):
            requests.put(compiled.create_infer_request())

        def logits(*arrays: np.ndarray) -> list[np.ndarray]:
            request = requests.get()
            try:
                result = request.infer(dict(zip(INPUTS, arrays)))
                return [np.array(result[name]) for name in OUTPUTS]
            finally:
                requests.put(request)

        return logits


class OnnxRuntime(Peer):
    """PyTorch's export, optimized by ONNX Runtime's tool for transformers, in a session with default options."""

    cpu_only = True

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs the exported model; int8 is ONNX Runtime's dynamic quantization."""
        import onnx
        import onnxruntime
        import torch
        from onnxruntime.quantization import quantize_dynamic
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        sample = (torch.ones((1, 8), dtype=torch.long),) * 3
        axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, *OUTPUTS)}
        # No warning of what is switched off below.
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        sizes = bert.config
        bert.set_attn_implementation("eager")  # the tool fuses this form into its Attention, and no other
        bert.forward = lambda *inputs, call=bert.forward: call(**dict(zip(INPUTS, inputs)), return_dict=False)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            names = {"input_names": list(INPUTS), "output_names": list(OUTPUTS), "dynamic_axes": axes}
            torch.onnx.export(bert, sample, path, **names, opset_version=17, dynamo=False)
            release(bert)
            fusions = FusionOptions("bert")
            fusions.enable_shape_inference = False  # BERT's fusions do not use it, and BERT-Large's takes 6 GB
            heads, hidden = sizes.num_attention_heads, sizes.hidden_size
            model = optimize_model(path, "bert", heads, hidden, optimization_options=fusions)
            model.save_model_to_file(path)
            del model
            release(bert)
            if options.dtype == "int8":
                # It cannot infer the dtypes behind the tool's operators, and then needs to be told.
                quantize_dynamic(path, path, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda *arrays: session.run(list(OUTPUTS), dict(zip(INPUTS, arrays)))


class PeerEntry(NamedTuple):
    """A peer, its dtypes, and the packages that it needs besides those of the benchmark."""

    peer: type[Peer]
    dtypes: tuple[str, ...]
    packages: tuple[str, ...] = ()


PEERS = {
    "transformers": PeerEntry(Transformers, ("fp32", "bf16")),
    "torch.compile": PeerEntry(Compiled, ("fp32", "bf16")),
    "zentorch": PeerEntry(Compiled, ("fp32", "bf16"), ("zentorch",)),
    "hf-openvino": PeerEntry(OpenVino, ("fp32", "bf16"), ("openvino",)),
    "hf-onnxruntime": PeerEntry(OnnxRuntime, ("fp32", "int8"), ("onnxruntime", "onnx")),
}


def obstacle(name: str) -> str | None:
    """Return why the peer `name` cannot run on this machine and what to do, None if it can."""
    for package in PEERS[name].packages:
        if not importlib.util.find_spec(package):
            # Each zentorch is for one version of PyTorch, which its metadata does not say.
            fitting = (
                f"'{package}=={'.'.join(version('torch').split('.')[:2])}.*'" if package == "zentorch" else package
            )
            return f"not installed; `.venv/bin/pip install {fitting}` installs it"
    if name == "zentorch" and "avx512f" not in config.cpu_flags():
        return "needs a processor with AVX-512; without it, zentorch leaves the model as it is"
    if issubclass(PEERS[name].peer, Compiled) and not shutil.which(config.env("CXX", "g++")):
        return "needs a C++ compiler; `apt install g++` installs one"
    return None


def peer_runs(names: Iterable[str], dtypes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the runs, PEER:DTYPE, of the peers `names` in those of `dtypes` that they have, and why others are absent.

    A reason is one line.
    """
    runs, absent = [], []
    for name in names:
        shared = [dtype for dtype in dict.fromkeys(dtypes) if dtype in PEERS[name].dtypes]
        reason = obstacle(name)
        if not shared:
            reason = f"runs in {', '.join(PEERS[name].dtypes)}, and none of the --runs does"
        if reason:
            absent.append(f"{name}: {reason}")
        else:
            runs += [f"{name}:{dtype}" for dtype in shared]
    return runs, absent


def load_peer(options: RunOptions) -> Peer:
    """Return the peer `options.backend` with its model loaded. Raises what the framework raises."""
    return PEERS[options.backend].peer(options)
