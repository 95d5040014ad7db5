"""Peers for `tools.benchmark --peers`: what a user would choose instead of this project's backends.

Each runs Hugging Face's BertForQuestionAnswering with a framework's own defaults, one sample at a time at its own
length, because padding costs more than a batch gains on a CPU.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from backends import Backend, RunOptions
from squad_QSL import Batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
WARM_UP = (384, 200, 100)  # tokens: torch.compile makes a kernel for the first length and then one for any length


class Peer(Backend):
    """Compute logits with what `make` returns: a function of ids, mask and segments, each int64 (1, length)."""

    batch_policy = "single"

    def __init__(self, options: RunOptions) -> None:
        from pytorch_SUT import DTYPES, PyTorchReference

        reference = PyTorchReference(options)
        self.model_path, self.vocab_size, self.gpu = reference.model_path, reference.vocab_size, reference.gpu
        self.name = f"{options.backend}, {options.dtype}"
        self.logits = self.make(reference.model.to(DTYPES[options.dtype]), options)

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that returns the start and the end logits, each (1, length); `bert` is Hugging Face's."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token of a batch of one sample, float32 (tokens, 2)."""
        arrays = (batch.input_ids, batch.input_mask, batch.segment_ids)
        found = self.logits(*(array.astype(np.int64) for array in arrays))
        return np.stack([logits[0] for logits in found], axis=-1).astype(np.float32)


class Transformers(Peer):
    """Hugging Face's model as it is, in PyTorch's eager mode."""

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs `bert`."""
        import torch

        def logits(*arrays: np.ndarray) -> list[np.ndarray]:
            with torch.inference_mode():
                tensors = (torch.from_numpy(array).to(bert.device) for array in arrays)
                answer = bert(**dict(zip(INPUTS, tensors)))
            return [np.asarray(answer[name].float().cpu()) for name in OUTPUTS]

        return logits


class Compiled(Transformers):
    """The same under torch.compile, with PyTorch's own backend or, as `zentorch`, with AMD's."""

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs `bert` compiled, after it has compiled it for any length."""
        import torch

        compiler = "inductor"
        if options.backend == "zentorch":
            compiler = importlib.import_module("zentorch").__name__
        bert.forward = torch.compile(bert.forward, backend=compiler)
        logits = super().make(bert, options)
        for length in WARM_UP:
            logits(*np.ones((3, 1, length), np.int64))
        return logits


class OpenVino(Peer):
    """OpenVINO's own conversion, with the hint that it documents for each scenario; its own precision unless fp32."""

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs the converted model."""
        import openvino
        import torch

        ids = torch.ones((1, 8), dtype=torch.long)
        model = openvino.convert_model(bert.cpu(), example_input=dict.fromkeys(INPUTS, ids))
        hint = "LATENCY" if options.scenario == "SingleStream" else "THROUGHPUT"
        settings = {
            "PERFORMANCE_HINT": hint,
            **({"INFERENCE_PRECISION_HINT": "f32"} if options.dtype == "fp32" else {}),
        }
        compiled = openvino.compile_model(model, "CPU", settings)
        self.concurrency = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

        def logits(*arrays: np.ndarray) -> list[np.ndarray]:
            result = compiled.create_infer_request().infer(dict(zip(INPUTS, arrays)))
            return [result[name] for name in OUTPUTS]

        return logits


class OnnxRuntime(Peer):
    """PyTorch's export, optimized by ONNX Runtime's tool for transformers, in a session with default options."""

    def make(self, bert: Any, options: RunOptions) -> Callable[..., Iterable[np.ndarray]]:
        """Return a function that runs the exported model; int8 is ONNX Runtime's dynamic quantization."""
        import onnxruntime
        import torch
        from onnxruntime.quantization import quantize_dynamic
        from onnxruntime.transformers.optimizer import optimize_model

        sample = (torch.ones((1, 8), dtype=torch.long),) * 3
        axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, *OUTPUTS)}
        bert, sizes = bert.cpu(), bert.config
        bert.forward = lambda *inputs, call=bert.forward: call(**dict(zip(INPUTS, inputs)), return_dict=False)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            names = {"input_names": list(INPUTS), "output_names": list(OUTPUTS), "dynamic_axes": axes}
            torch.onnx.export(bert, sample, path, **names, opset_version=17, dynamo=False)
            model = optimize_model(path, "bert", sizes.num_attention_heads, sizes.hidden_size)
            model.save_model_to_file(path)
            if options.dtype == "int8":
                quantize_dynamic(path, path)
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


def missing_package(name: str) -> str | None:
    """Return the package that the peer `name` needs and that is not installed, None if there is none."""
    return next((package for package in PEERS[name].packages if not importlib.util.find_spec(package)), None)


def peer_runs(names: Iterable[str], dtypes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the runs, PEER:DTYPE, of the peers `names` in those of `dtypes` that they have, and why others are absent.

    A reason is one line: what is missing, and how to install it.
    """
    runs, absent = [], []
    for name in names:
        package = missing_package(name)
        if package:
            absent.append(f"{name}: not installed; `.venv/bin/pip install {package}` installs it")
        elif PEERS[name].peer is Compiled and not (shutil.which("g++") or shutil.which("clang++")):
            absent.append(f"{name}: needs a C++ compiler; `apt install g++` installs one")
        else:
            runs += [f"{name}:{dtype}" for dtype in dict.fromkeys(dtypes) if dtype in PEERS[name].dtypes]
    return runs, absent


def load_peer(options: RunOptions) -> Peer:
    """Return the peer `options.backend` with its model loaded. Raises what the framework raises."""
    return PEERS[options.backend].peer(options)
