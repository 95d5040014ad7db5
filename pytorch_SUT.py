"""The PyTorch backend: loads a BERT for question answering and turns a batch into logits. packed_bert.py computes."""

import argparse
import hashlib
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

# Before torch is imported: its caches of kernels, 1,024 by default, grow for minutes to three times the model's memory.
# 256 hold those of a Server run of a small BERT in int8, which made 211; 16 made its batches a third slower.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")

import numpy as np
import torch
from safetensors.torch import load_file

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH, keep_arrays, load_features, read_calibration
from packed_bert import Bert, Int8Linear, Linear, PrepackedLinear
from squad_QSL import Batch, SquadQSL

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # --dtype: PyTorch's name

Ranges = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer's name: (low, high), fp32 (inputs,)

UNNEEDED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


def read_config(path: str) -> dict[str, Any]:
    """Read BERT's sizes from the JSON file `path` (Google's bert_config.json or Hugging Face's config.json)."""
    try:
        with open(path, encoding="utf-8") as file:
            sizes: dict[str, Any] = json.load(file)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                     "max_position_embeddings", "type_vocab_size"):
            if type(sizes[name]) is not int or sizes[name] < 1:
                raise UserError(f"{path}: {name} is {sizes[name]!r}; it must be a whole number above 0")
        epsilon = sizes.setdefault("layer_norm_eps", 1e-12)
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise UserError(f"{path}: layer_norm_eps is {epsilon!r}; it must be a number from 0 to 1")
    except OSError as error:
        raise UserError(f"{path}: cannot read the model's configuration ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{path}: the model's configuration lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: the model's configuration is not a JSON object ({error})") from None
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size {sizes['hidden_size']} does not divide by "
                        f"num_attention_heads {sizes['num_attention_heads']}")
    if sizes["max_position_embeddings"] < MAX_SEQ_LENGTH:
        raise UserError(f"{path}: max_position_embeddings {sizes['max_position_embeddings']} is less than the features' "
                        f"{MAX_SEQ_LENGTH} tokens; give a model for them")
    if sizes.get("hidden_act", "gelu") != "gelu" or sizes.get("model_type", "bert") != "bert":
        raise UserError(f"{path}: not a BERT with gelu (model_type {sizes.get('model_type')}, "
                        f"hidden_act {sizes.get('hidden_act')})")
    return sizes


def weight_shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a BERT of these sizes (of `read_config`): {Hugging Face's name: shape}."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (sizes["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (sizes["type_vocab_size"], hidden),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}."
        for name, outputs, inputs in (("attention.self.query", hidden, hidden), ("attention.self.key", hidden, hidden),
                                      ("attention.self.value", hidden, hidden),
                                      ("attention.output.dense", hidden, hidden),
                                      ("intermediate.dense", inner, hidden), ("output.dense", hidden, inner)):
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            shapes[f"{prefix}{name}.bias"] = (outputs,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (hidden,)
    return shapes


def model_files(model: str) -> tuple[str, str]:
    """The files of `model` (as in `read_weights`): (of the sizes, of the weights)."""
    if os.path.isdir(model):
        return os.path.join(model, "config.json"), os.path.join(model, "model.safetensors")
    beside = os.path.join(os.path.dirname(model), "bert_config.json")
    return beside if os.path.exists(beside) else config.BERT_CONFIG, model


def read_weights(model: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a BERT for question answering: (sizes, {Hugging Face's name: float32 tensor}).

    `model` is a Hugging Face folder (config.json and model.safetensors) or a state dict of `torch.save`, whose sizes
    are in a bert_config.json beside it, else in the project's (BERT-Large). Raises UserError where a file is missing
    or damaged, a weight is missing, of another shape or not finite, or there is one that BERT does not have.
    """
    config_file, path = model_files(model)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such model file; `make setup` fetches BERT-Large, "
                        "ML_MODEL_FILE_WITH_PATH names another")
    sizes = read_config(config_file)
    state = _read_state(path)

    shapes = weight_shapes(sizes)
    faults = [f"{name} is missing" for name in shapes if name not in state]
    faults += [f"{name} is not BERT's" for name in state if name not in shapes and name not in UNNEEDED]
    faults += [f"{name} is {tuple(state[name].shape)}, not {shape}" for name, shape in shapes.items()
               if name in state and tuple(state[name].shape) != shape]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{path}: does not fit {config_file}: {'; '.join(faults[:4])}{more}")
    weights = {name: state[name].float() for name in shapes}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} weights do); fetch the file anew")
    return sizes, weights


def _read_state(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a `torch.save` file, {name: tensor}, mapped into memory where possible."""
    try:
        if path.endswith(".safetensors"):
            state: dict[str, torch.Tensor] = load_file(path)
            return state
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001 - both raise whatever the bytes led them to; weights_only refuses a pickle's code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or no model file that loads safely ({reason}); "
                        "fetch it anew or save it with torch.save(model.state_dict(), …)") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds no state dict; save it with torch.save(model.state_dict(), …)")
    return state


def digest(model: str) -> str:
    """The sha256 of the weights of `model` (as in `read_weights`), in hexadecimal."""
    with open(model_files(model)[1], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Observer(PrepackedLinear):
    """A product that notes the range of its inputs: `low` and `high`, fp32 (inputs,)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.low = self.high = torch.zeros(weight.shape[1])

    def watch(self, x: torch.Tensor) -> torch.Tensor:
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        return x

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(self.watch(x))

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return super().gelu(self.watch(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().add(self.watch(x), residual)


@torch.inference_mode()
def input_ranges(model: str, batches: Iterable[Batch]) -> Ranges:
    """The range of the inputs of each of `model`'s linear layers over `squad_QSL.Batch`es.

    {layer's name: (low, high)}, fp32 (inputs,).
    """
    observers: dict[str, Observer] = {}

    def observer(name: str, weight: torch.Tensor, bias: torch.Tensor) -> Observer:
        observers[name] = Observer(weight, bias)
        return observers[name]

    bert = Bert(*read_weights(model), torch.device("cpu"), torch.float32, observer)
    for batch in batches:
        bert(*packed_inputs(batch))
    return {name: (observer.low, observer.high) for name, observer in observers.items()}


def int8_ranges(model: str) -> Ranges:
    """The `input_ranges` of `model` over the calibration's features.

    Read from build/cache where they are known for these weights, features and list. The features are those of
    CALIBRATION_FILE, one of MLPerf's two lists, of the data set; without the file, 100 at even steps.
    """
    dataset, vocab_file = config.dataset_files()
    squad, features = load_features(dataset, vocab_file)
    calibration = config.env("CALIBRATION_FILE", config.CALIBRATION)
    if os.path.exists(calibration):
        rows = read_calibration(calibration, squad, features)
    else:
        print(f"notice: {calibration} (MLPerf's calibration list) is absent; calibrating with 100 samples at even "
              "steps: no official result", file=sys.stderr)
        rows = np.unique(np.linspace(0, len(features) - 1, 100).astype(int))
    key = hashlib.sha256(digest(model).encode() + features.input_ids[rows].tobytes()).hexdigest()
    cache = os.path.join(config.CACHE_DIR, f"int8-{key[:16]}.npz")
    try:
        with np.load(cache, allow_pickle=False) as archive:
            found: Ranges = {}
            for name, pair in archive.items():
                low, high = torch.from_numpy(pair)
                found[name] = low, high
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        print(f"notice: {cache} is damaged ({error}); calibrating anew", file=sys.stderr)

    qsl = SquadQSL(features)
    ranges: Ranges = input_ranges(model, (qsl.batch(np.array([row])) for row in rows))
    keep_arrays(cache, {name: torch.stack(pair).numpy() for name, pair in ranges.items()})
    return ranges


def packed_inputs(batch: Batch,
                  device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """What `Bert` takes for a `squad_QSL.Batch`: ids, segments and positions, int32 (tokens,), and the lengths."""
    lengths = batch.lengths.tolist()
    positions = np.broadcast_to(np.arange(batch.input_ids.shape[1], dtype=np.int32), batch.input_ids.shape)
    tensors = [torch.from_numpy(batch.packed(array)).to(device)
               for array in (batch.input_ids, batch.segment_ids, positions)]
    return *tensors, lengths


def cpu_runs(dtype: str) -> bool:
    """Whether this processor has instructions for products in `dtype`."""
    has: dict[str, Callable[[], bool]] = {
        "fp32": lambda: True,
        "bf16": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "fp16": lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        "int8": lambda: torch.cpu._is_vnni_supported(),
    }
    return has[dtype]()


class PyTorchBackend:
    """BERT in PyTorch, on CUDA where there is one that USE_GPU allows, else on the CPU."""

    workers, together = 1, "any"

    def __init__(self, args: argparse.Namespace) -> None:
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        self.device = torch.device("cuda" if config.use_gpu() and torch.cuda.is_available() else "cpu")
        self.threads = config.env_threads("MLC_MAX_NUM_THREADS") or torch.get_num_threads()
        if self.device.type == "cuda":
            self.threads = 1
        torch.set_num_threads(self.threads)
        self.model = config.env("ML_MODEL_FILE_WITH_PATH", config.PYTORCH_MODEL)
        self.path = model_files(self.model)[1]
        self.sizes, weights = read_weights(self.model)
        self.vocab_size = self.sizes["vocab_size"]

        dtype = args.dtype
        if self.device.type == "cuda" and dtype == "int8":
            raise UserError("--dtype=int8 runs on CPUs only; set USE_GPU=0 or give --dtype=fp16")
        if self.device.type == "cpu" and not cpu_runs(dtype):
            print(f"notice: this processor has no {dtype} instructions; running in fp32", file=sys.stderr)
            dtype = "fp32"
        self.name = f"PyTorch {torch.__version__}, {self.device.type}, {dtype}"
        with torch.inference_mode():
            if dtype == "int8":
                self.bert = self.int8_bert(weights, getattr(args, "int8_ranges", None) or int8_ranges(self.model))
            else:
                self.bert = self.float_bert(weights, getattr(torch, DTYPES[dtype]))

    def float_bert(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Bert:
        # oneDNN's layouts are for x86; elsewhere PyTorch's own products are the fast ones
        prepack = self.device.type == "cpu" and torch.backends.mkldnn.is_available() and platform.machine() == "x86_64"
        kind = PrepackedLinear if prepack else Linear
        return Bert(self.sizes, weights, self.device, dtype, lambda name, *layer: kind(*(x.to(dtype) for x in layer)))

    def int8_bert(self, weights: dict[str, torch.Tensor], ranges: Ranges) -> Bert:
        def int8_linear(name: str, weight: torch.Tensor, bias: torch.Tensor) -> Int8Linear:
            layer, part = name.split(".")
            gelu_range = ranges[f"{layer}.down"] if part == "up" else None
            return Int8Linear(weight, bias, *ranges[name], torch.bfloat16, gelu_range)

        return Bert(self.sizes, weights, self.device, torch.float32, int8_linear)

    @torch.inference_mode()
    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2)."""
        torch.set_num_threads(self.threads // self.workers)  # those of this worker; 0.6 us
        logits: np.ndarray = self.bert(*packed_inputs(batch, self.device)).cpu().numpy()
        return logits


class PyTorchReference:
    """What the MLPerf reference computes: Hugging Face's plain model in fp32, one sample at a time, padded to 384."""

    workers, together = 1, "one"

    def __init__(self, args: argparse.Namespace) -> None:
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        try:
            from transformers import BertConfig, BertForQuestionAnswering
        except ModuleNotFoundError:
            raise UserError("--reference needs the package transformers; "
                            "`make venv BACKEND=reference` installs it") from None
        self.device = torch.device("cuda" if config.use_gpu() and torch.cuda.is_available() else "cpu")
        model = config.env("ML_MODEL_FILE_WITH_PATH", config.PYTORCH_MODEL)
        self.path = model_files(model)[1]
        sizes, weights = read_weights(model)
        self.vocab_size = sizes["vocab_size"]
        model = BertForQuestionAnswering(BertConfig(**sizes))
        model.load_state_dict(weights, assign=True)
        self.model = model.to(self.device).eval()
        self.name = f"PyTorch {torch.__version__}, {self.device.type}, fp32, the plain model padded"

    @torch.inference_mode()
    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch` of one sample, float32 (tokens, 2)."""
        ids, mask, segments = (torch.from_numpy(array).long().to(self.device)
                               for array in batch.padded_to(MAX_SEQ_LENGTH))
        answer = self.model(input_ids=ids, attention_mask=mask, token_type_ids=segments)
        pairs = torch.stack((answer.start_logits[0], answer.end_logits[0]), dim=-1)
        logits: np.ndarray = pairs[:batch.lengths[0]].cpu().numpy()
        return logits
