"""The PyTorch backend: load a BERT for question answering and turn batches into logits.

packed_bert.py computes them on a CPU, cuda_bert.py on GPUs.
"""

import os
import platform
from functools import partial
from typing import Any

# Set before torch is imported: by default, oneDNN's caches hold 1,024 kernels and grow to three times the model's
# memory. A Server run of a small BERT in int8 needs 211 kernels; with a limit of 16, batches took a third longer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")

import numpy as np
import torch
from torch import Tensor

import config
from backends import Backend, RunOptions
from batching import check_bytes
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from models import cuda_bert, gpus
from models.cpu_kernels import load_kernels
from models.model_files import COUNTS, WIDTHS, model_files, open_weights
from models.packed_bert import Bert, Int8Linear, Linear, PrepackedLinear, Ranges
from models.weights import Weights
from squad_QSL import Batch

# The dtype of the values between the linear layers, by --dtype; int8 applies only inside the linear layers.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
GEMM_SIZE = 4096  # rows and columns of the products whose speed a notice gives; they take under 0.1 s on any GPU


def find_device() -> torch.device:
    """Return the first GPU that PyTorch can use and USE_GPU allows; else the CPU, with a notice if there is a GPU."""
    if config.use_gpu() and torch.cuda.is_available():
        return torch.device("cuda", 0)
    gpus.notice_unused("PyTorch", torch.version.cuda, "install a build of torch with CUDA (docs/gpu.md)")
    return torch.device("cpu")


def cpu_runs(dtype: str) -> bool:
    """Return whether this processor has instructions for matrix products in `dtype`."""
    if dtype == "bf16":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if dtype == "fp16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == "fp32" or bool(torch.cpu._is_vnni_supported())


def linear_layer(
    dtype: str, ranges: Ranges, kernels: Any, name: str, weight: Tensor, bias: Tensor
) -> Linear | Int8Linear:
    """Make a linear layer of `Bert` in `dtype`; int8 needs the input ranges of all layers."""
    if dtype == "int8":
        int8 = Int8Linear(weight, bias, *ranges[name], torch.bfloat16, kernels)
        if name.endswith(".up"):
            int8.quantize_gelu(*ranges[name.replace("up", "down")])
        return int8
    weight, bias = weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype])
    # oneDNN's blocked layout is for x86; PyTorch's own operators are faster on other processors.
    if platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
        return PrepackedLinear(weight, bias)
    return Linear(weight.clone(), bias)  # a copy, because the weight may be a part of a mapped file


class PyTorchBackend(Backend):
    """Run BERT in PyTorch on packed tokens, on the GPUs or the CPU; `ranges` are those of `prepare`."""

    def __init__(self, options: RunOptions, ranges: Ranges | None = None) -> None:
        self.device, dtype = find_device(), options.dtype
        threads = config.thread_limit("MLC_MAX_NUM_THREADS") or torch.get_num_threads()
        self.threads = self.max_concurrency = threads if self.device.type == "cpu" else 1
        torch.set_num_threads(self.threads)
        model = config.model_path("pytorch", dtype)
        self.model_path = model_files(model).weights
        bert_config, weights = open_weights(model)
        self.vocab_size = bert_config["vocab_size"]
        if self.device.type == "cpu" and not cpu_runs(dtype):
            config.notice(f"this processor has no {dtype} instructions; running in fp32")
            dtype = "fp32"
        self.dtype = dtype
        self.gpu = gpus.describe(gpus.find_gpus()) if self.device.type == "cuda" else None
        kernels = load_kernels(bert_config) if self.device.type == "cpu" else None
        framework = f"PyTorch {torch.__version__}" + (" with cpu_kernels" if kernels else "")
        self.name = f"{framework}, {self.gpu or 'cpu'}, {dtype}"
        self.bert: Bert | cuda_bert.CudaBerts
        with torch.inference_mode():
            if self.gpu:
                self._load_on_gpus(options, bert_config, weights)
                return
            if dtype == "int8":
                ranges = ranges or self.prepare(options)["ranges"]
            make_linear = partial(linear_layer, dtype, ranges or {}, kernels)
            self.bert = Bert(bert_config, weights, self.device, DTYPES[dtype], make_linear, kernels)

    def _load_on_gpus(self, options: RunOptions, bert_config: dict[str, Any], weights: Weights) -> None:
        """Make `bert` for all visible GPUs, and log notices on its speed and on its responses."""
        remedy = "set USE_GPU=0 or give --dtype=fp16"
        if options.dtype == "int8":
            raise UserError(f"--dtype=int8 runs on CPUs only; {remedy}")
        if options.dtype == "bf16" and torch.cuda.get_device_capability(self.device) < cuda_bert.FLASH:
            raise UserError(f"--dtype=bf16 needs a GPU of compute capability 8.0 or higher; {remedy}")
        self.in_flight = cuda_bert.IN_FLIGHT
        self.batch_tokens = options.batch_tokens or cuda_bert.batch_tokens()
        tokens = max(self.batch_tokens, MAX_SEQ_LENGTH)
        self.bert = cuda_bert.CudaBerts(bert_config, weights, DTYPES[options.dtype], tokens)
        self.concurrency = self.in_flight * len(self.bert.berts)
        check_bytes(self, bert_config["vocab_size"], self.batch_tokens)
        if options.dtype == "fp32":
            rates = [cuda_bert.product_rate(self.device, DTYPES[name], GEMM_SIZE) for name in ("fp16", "fp32")]
            config.notice(f"on this GPU --dtype=fp16 computes products {rates[0] / rates[1]:.1f} times as fast as fp32")

    @classmethod
    def prepare(cls, options: RunOptions) -> dict[str, Any]:
        """Return the input ranges of an int8 model, which need the data set, as {"ranges": …}. Raises UserError."""
        if options.dtype != "int8":
            return {}
        from convert.calibration import int8_ranges  # not at the top, because Ray's nodes do not have the folder

        return {"ranges": int8_ranges(config.model_path("pytorch", options.dtype))}

    @torch.inference_mode()
    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token, float32 (tokens, 2)."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads // self.concurrency)  # for the calling thread; takes 0.6 us
        return np.asarray(self.bert(batch))


class PyTorchReference(Backend):
    """Run the baseline, as the MLPerf reference does: Hugging Face's BERT in fp32, batch size 1, padded to 384."""

    batch_policy = "single"
    dtype = "fp32"

    def __init__(self, options: RunOptions) -> None:
        try:
            from transformers import BertConfig, BertForQuestionAnswering
        except ModuleNotFoundError:
            raise UserError("--reference needs transformers; `make venv BACKEND=reference` installs it") from None
        self.device = find_device()
        path = config.model_path("pytorch", "fp32")
        self.model_path = model_files(path).weights
        bert_config, weights = open_weights(path)
        self.vocab_size = bert_config["vocab_size"]
        sizes = {name: bert_config[name] for name in (*WIDTHS, *COUNTS, "layer_norm_eps")}
        model = BertForQuestionAnswering(BertConfig(**sizes))
        model.load_state_dict(weights, assign=True)
        self.model = model.to(self.device).eval()
        self.gpu = gpus.describe(gpus.find_gpus()[:1]) if self.device.type == "cuda" else None
        self.name = f"PyTorch {torch.__version__}, {self.gpu or 'cpu'}, fp32, baseline"

    @torch.inference_mode()
    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token of a batch of one sample, float32 (tokens, 2)."""
        ids, mask, types = (torch.from_numpy(array).long().to(self.device) for array in batch.padded_to(MAX_SEQ_LENGTH))
        answer = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        pairs = torch.stack((answer.start_logits[0], answer.end_logits[0]), dim=-1)
        return np.asarray(pairs[: batch.lengths[0]].cpu())
