"""Compute BERT on NVIDIA GPUs in PyTorch: all samples in one attention call, and two batches in flight on each GPU.

It ran on an H100 (docs/gpu.md); `make gpu_check` checks and measures it on another GPU. tests/test_cuda_bert.py runs it
on fake CUDA tensors and with stand-ins for the kernels, streams and graphs.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from models.packed_bert import Bert, Linear, packed_inputs
from squad_QSL import Batch

IN_FLIGHT = 2  # batches at once on a GPU: it computes one while the host answers another and forms the next
# The default limit of a batch. The tiles of a large product have 128 rows and 256 columns: with 128 tokens for each
# multiprocessor, every product of BERT-Large is a whole number of tiles for each. An H100 has 132: 16,896 tokens.
TOKENS_PER_MULTIPROCESSOR = 128
# Batches of at most GRAPH_SAMPLES samples run as a CUDA graph of the next of these numbers of tokens: one launch from
# the host instead of about 170. In larger batches, the launches take less time than the GPU needs to compute. On an
# H100, cuBLAS has another order of sums for 64 rows than for the 101 larger numbers that were tried.
GRAPH_TOKENS = (128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048)
GRAPH_SAMPLES = 16
FLASH = (8, 0)  # the lowest compute capability of FlashAttention and of bf16
# With one split, the order of attention's sums does not depend on the batch. PyTorch 2.11 does not have this option.
FLASH_ARGUMENTS = torch.ops.aten._flash_attention_forward.default._schema.arguments
ONE_SPLIT = {"num_splits": 1} if any(argument.name == "num_splits" for argument in FLASH_ARGUMENTS) else {}

Weights = dict[str, Tensor]  # by Hugging Face's names, fp32


class CudaLinear(Linear):
    """A linear layer on CUDA with what cuBLASLt computes within the product: the bias, gelu, and the sum."""

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return x W' + b, its gelu, or `residual` with x W' added to it, in place: `CudaBert` has added b before.

        The gelu of a product in bf16 or fp16 is cuBLASLt's, which is the tanh approximation.
        """
        if residual is not None:
            return residual.addmm_(x, self.weight.t())
        if gelu and x.dtype != torch.float32:
            return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)
        return super().__call__(x, gelu)


class CudaAnswer(Linear):
    """A linear layer with few outputs, in fp32, whose sums have the same order for any number of rows from 64 on.

    cuBLAS chooses a kernel for such a product, and with it the order, by the number of rows (measured on an H100).
    """

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return x W' + b."""
        return (x.unsqueeze(1) * self.weight).sum(-1).add_(self.bias)


def flash_attention(qkv: Tensor, heads: int, ends: Tensor) -> Tensor:
    """Compute packed_bert.attention in bf16 or fp16; `ends`, int32 (samples + 1,), are 0 and where each sample ends.

    Samples may have no tokens. Rows after the last sample are undefined. The longest sample that there can be is given
    instead of the batch's, so that a CUDA graph takes any samples and no result depends on the batch's longest.
    """
    q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
    fixed = ends, ends, MAX_SEQ_LENGTH, MAX_SEQ_LENGTH, 0.0, False, False
    return torch.ops.aten._flash_attention_forward(q, k, v, *fixed, scale=1.0, **ONE_SPLIT)[0].flatten(1)


def efficient_attention(qkv: Tensor, heads: int, ends: Tensor) -> Tensor:
    """Compute what `flash_attention` does, in fp32 and on older GPUs too."""
    q, k, v = qkv.view(1, qkv.shape[0], 3, heads, -1).unbind(2)
    fixed = None, ends, ends, MAX_SEQ_LENGTH, MAX_SEQ_LENGTH, 0.0, 0, False
    return torch.ops.aten._efficient_attention_forward(q, k, v, *fixed, scale=1.0)[0].flatten(2).squeeze(0)


def move_bias(norm: tuple[Tensor, Tensor], added: Linear, reader: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `norm` in `dtype` with the bias of the layer `added`, which is added to its output, in its own bias.

    `reader`, which multiplies the same output, gets a bias that takes away what the norm really adds, with all rounding
    to `dtype`. The tensors of `norm` and of the layers are fp32.
    """
    weight, bias = norm
    moved = (bias + added.bias).to(dtype)
    reader.bias = reader.bias - F.linear(moved.float() - bias, reader.weight.to(dtype).float())
    return weight.to(dtype), moved


class Slot(NamedTuple):
    """The host's side of a batch in flight, in page-locked memory, so that copies do not wait."""

    inputs: Tensor  # int32 (4 * (tokens + 1),)
    logits: Tensor  # fp32 (tokens, 2)
    done: torch.cuda.Event


def input_rows(buffer: Tensor, tokens: int) -> Tensor:
    """Return the part of `buffer` for a batch of `tokens` tokens: rows of ids, positions, segments, samples' ends."""
    return buffer.narrow(0, 0, 4 * (tokens + 1)).view(4, -1)


def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros in page-locked memory."""
    return torch.zeros(*shape, dtype=dtype, pin_memory=True)


def capture(call: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Capture `call()` on the current stream: return what replays it, and its result, which each replay overwrites.

    Graphs of one `pool` share the memory of their intermediate values, so only one of them may run at a time.
    """
    call()  # loads the kernels and allocates the workspaces of this shape, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        result = call()
    return graph.replay, result


class CudaBert(Bert):
    """`Bert` on one GPU, for IN_FLIGHT threads at once, in batches of up to `max_tokens` tokens. Raises UserError."""

    def __init__(
        self, bert_config: dict[str, Any], weights: Weights, device: torch.device, dtype: torch.dtype, max_tokens: int
    ) -> None:
        size = bert_config["hidden_size"] // bert_config["num_attention_heads"]
        if size % 8 or size > 256:
            raise UserError(f"attention heads of {size} values: a GPU needs a multiple of 8 up to 256; set USE_GPU=0")
        super().__init__(bert_config, weights, device, dtype, lambda name, weight, bias: CudaLinear(weight, bias))
        norms = [self.embedding_norm, *(norm for layer in self.layers for norm in (layer[2], layer[5]))]
        # Of each norm but the last: the layer whose bias moves into it, and the one that takes it away.
        pairs = [pair for qkv, out, _, up, down, _ in self.layers for pair in ((out, qkv), (down, up))]
        moved = [move_bias(norm, added, reader, dtype) for norm, (added, reader) in zip(norms, pairs)]
        moved.append((norms[-1][0].to(dtype), norms[-1][1].to(dtype)))  # CUDA's norm takes only its input's dtype
        for linear in (linear for qkv, out, _, up, down, _ in self.layers for linear in (qkv, out, up, down)):
            linear.weight, linear.bias = linear.weight.to(dtype), linear.bias.to(dtype)
        self.embedding_norm, parts = moved[0], zip(self.layers, moved[1::2], moved[2::2])
        self.layers = [(qkv, out, one, up, down, two) for (qkv, out, _, up, down, _), one, two in parts]
        flash = dtype != torch.float32 and torch.cuda.get_device_capability(device) >= FLASH
        self.attention, self.rows = flash_attention if flash else efficient_attention, 1
        self.answer = CudaAnswer(self.answer.weight, self.answer.bias)

        self.lock = threading.Lock()  # the thread that holds it owns `device_inputs` and launches
        self.stream = torch.cuda.Stream(device)
        self.device_inputs = torch.zeros(4 * (max_tokens + 1), dtype=torch.int32, device=device)
        self.free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(IN_FLIGHT):
            logits = pinned(max_tokens, 2, dtype=torch.float32)
            self.free.put(Slot(pinned(4 * (max_tokens + 1), dtype=torch.int32), logits, torch.cuda.Event()))
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}  # by their number of tokens
        with torch.cuda.stream(self.stream):
            pool = torch.cuda.graph_pool_handle()
            for tokens in sorted((size for size in GRAPH_TOKENS if size <= max_tokens), reverse=True):
                self.graphs[tokens] = capture(partial(self.launch, tokens, GRAPH_SAMPLES), pool)

    def launch(self, tokens: int, samples: int) -> Tensor:
        """Launch a batch's kernels on what is in `device_inputs`; return its logits, which will be on the GPU."""
        rows = input_rows(self.device_inputs, tokens)
        ids, positions, segments, _ = rows.narrow(1, 0, tokens).unbind()
        return self.compute(ids, positions, segments, rows.select(0, 3).narrow(0, 0, samples + 1))

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits of the batch's T tokens, fp32 (T, 2), in the host's memory."""
        samples, tokens = len(batch), int(batch.lengths.sum())
        fitting = [size for size in self.graphs if size >= tokens] if samples <= GRAPH_SAMPLES else []
        size = min(fitting, default=tokens)  # of the graph, whose last rows and samples mean nothing
        slot = self.free.get()
        try:
            sent = input_rows(slot.inputs, size)
            rows = sent.numpy()
            rows[:3, :tokens], rows[:3, tokens:] = packed_inputs(batch), 0
            rows[3, 0], rows[3, 1 : samples + 1], rows[3, samples + 1 :] = 0, np.cumsum(batch.lengths), tokens
            with self.lock, torch.cuda.stream(self.stream):
                input_rows(self.device_inputs, size).copy_(sent, non_blocking=True)
                if fitting:
                    replay, logits = self.graphs[size]
                    replay()
                else:
                    logits = self.launch(tokens, samples)
                slot.logits[:tokens].copy_(logits[:tokens], non_blocking=True)
                slot.done.record(self.stream)
            slot.done.synchronize()
            return slot.logits[:tokens].clone()
        finally:
            self.free.put(slot)


def devices() -> list[torch.device]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


class CudaBerts:
    """A `CudaBert` on each visible GPU; a call takes one that has a free slot. `weights` stay as they are."""

    def __init__(
        self, bert_config: dict[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, max_tokens: int
    ) -> None:
        # Else the order of a row's sums would depend on the number of rows, which decides the kernel.
        torch.set_float32_matmul_precision("highest")
        for name in ("fp16", "bf16"):
            setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", (False, False))
        torch.backends.cuda.preferred_blas_library("cublaslt")
        self.berts = [CudaBert(bert_config, dict(weights), device, dtype, max_tokens) for device in devices()]
        self.free: queue.SimpleQueue[CudaBert] = queue.SimpleQueue()
        for bert in IN_FLIGHT * self.berts:  # one slot of each GPU, then the other
            self.free.put(bert)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits of the batch's T tokens, fp32 (T, 2), in the host's memory."""
        bert = self.free.get()
        try:
            return bert(batch)
        finally:
            self.free.put(bert)


def batch_tokens() -> int:
    """Return the default limit of a batch in tokens, for the visible GPU with the fewest multiprocessors."""
    counts = (torch.cuda.get_device_properties(device).multi_processor_count for device in devices())
    return TOKENS_PER_MULTIPROCESSOR * int(min(counts))


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the operations/s of the product of two matrices of `size` rows and columns; best of five."""
    # Imported here, because this import initializes CUDA, after which a process that is forked cannot use it.
    from torch.utils.benchmark import Timer

    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("x @ y", globals={"x": x, "y": y})  # waits for the GPU
    return 2 * size**3 / float(min(timer.timeit(1).mean for _ in range(5)))
