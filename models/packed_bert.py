"""Compute BERT for question answering over packed tokens in PyTorch: no sample is padded.

The tokens of a batch form one matrix for every linear layer; only attention treats each sample separately. On a CPU a
row's bits do not depend on other rows, nor a sample's logits on its batch; tests/test_packed_bert.py checks this.
cpu_kernels.py has what is faster on a CPU with AVX-512, and cuda_bert.py what differs on a GPU.
"""

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.memory import return_memory
from models.outliers import outlier_scales
from squad_QSL import Batch

# On a CPU the rows of a linear layer's input are filled up to a multiple of ROWS, and so are a sample's in attention
# unless it is in fp32. oneDNN generates a kernel for each number of rows, which took a fifth of a small BERT's time in
# bf16 and int8; samples of all lengths have 24 such numbers instead of 300. ROWS = 8 was no faster, and 32 was slower.
ROWS = 16

warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")  # deprecated, but see Int8Linear.quantize

Ranges = dict[str, tuple[Tensor, Tensor]]  # of the inputs of linear layers: {layer name: (low, high)}, fp32 (inputs,)


class Linear:
    """A linear layer of PyTorch on any device: `weight` (outputs, inputs) and `bias` (outputs,), in the input dtype."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return x W' + b, its gelu, or its sum with `residual`."""
        y = F.linear(x, self.weight, self.bias)
        if residual is not None:
            return y.add_(residual)
        return F.gelu(y) if gelu else y


class PrepackedLinear(Linear):
    """A linear layer of oneDNN on CPUs, which reorders its weights once; all tensors are fp32, or all are bf16."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)
        # Without AVX-512, oneDNN's gelu takes a fifth of an fp32 product; PyTorch's takes 4 % and has the same bits.
        self.slow_gelu = weight.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return x W' + b, its gelu, or its sum with `residual`."""
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        fused = gelu and not self.slow_gelu
        operator, algorithm = ("gelu", "none") if fused else ("none", "")
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, operator, (), algorithm)
        return F.gelu(y) if gelu and not fused else y


def uint8_range(low: Tensor, high: Tensor) -> tuple[float, int]:
    """Return the scale and the zero point with which uint8 covers 0 and the values from min(low) to max(high)."""
    smallest, largest = min(low.min().item(), 0.0), max(high.max().item(), 0.0)
    scale = max(largest - smallest, 1e-6) / 255
    return scale, round(-smallest / scale)


def outlier_factors(low: Tensor, high: Tensor) -> Tensor | None:
    """Return the `outlier_scales` of channels with the range `low`, `high`; None if there is no outlier."""
    factors = torch.from_numpy(outlier_scales(torch.maximum(-low, high).numpy()))
    return factors if factors.min() < 1 else None


class Int8Linear:
    """A linear layer of oneDNN in int8 on CPUs, made from fp32 tensors; `low` and `high` are the range of its input.

    `kernels` are what cpu_kernels.load_kernels returns.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, low: Tensor, high: Tensor, output_dtype: torch.dtype, kernels: Any = None
    ) -> None:
        # The weights have a scale for each output. The input has a constant one, so no result depends on the batch.
        self.factors = outlier_factors(low, high)
        if self.factors is not None:
            low, high, weight = low * self.factors, high * self.factors, weight / self.factors
        self.scale, self.zero_point = uint8_range(low, high)
        weight_scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        quantized = (weight / weight_scale[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.operands = (self.scale, self.zero_point, packed, weight_scale, torch.zeros(len(weight), dtype=torch.int64))
        self.bias, self.kernels = bias, kernels
        self.output = 1.0, 0, output_dtype, "none", (), ""  # scale 1 and zero point 0: not quantized
        self.gelu_output = 1.0, 0, output_dtype, "gelu", (), "none"

    def quantize_gelu(self, low: Tensor, high: Tensor) -> None:
        """Make a gelu return uint8 if the next layer's input, of the range `low` to `high`, has no outlier channel."""
        if outlier_factors(low, high) is None:  # a gelu of oneDNN has one scale for all channels
            self.gelu_output = *uint8_range(low, high), torch.uint8, "gelu", (), "none"

    def quantize(self, x: Tensor) -> Tensor:
        """Return the input as uint8; a value's bits do not depend on its place."""
        if self.kernels:
            return self.kernels.quantize(x, self.factors, self.scale, self.zero_point)
        x = x.float() if self.factors is None else x * self.factors
        # A sum, a clamp and a conversion to uint8, which PyTorch 2.13 does not vectorize, take 1.42 ms instead of 0.17
        # for 1,890 x 1,024 values with AVX-512 (issue 19), and four times as long as this with AVX2.
        quantized = torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8)
        storage, shape, stride = quantized.untyped_storage(), quantized.shape, quantized.stride()
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, stride)

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return x W' + b, its gelu (see `quantize_gelu`), or its sum with `residual` in the residual's dtype."""
        inputs = (x if x.dtype == torch.uint8 else self.quantize(x)), *self.operands
        if residual is not None:
            output = 1.0, 0, residual.dtype, 1.0, 0, "add", 1.0, "none", (), ""
            return torch.ops.onednn.qlinear_pointwise.binary(*inputs, residual, self.bias, *output)
        return torch.ops.onednn.qlinear_pointwise(*inputs, self.bias, *(self.gelu_output if gelu else self.output))


def attention(qkv: Tensor, heads: int, lengths: list[int]) -> Tensor:
    """Return the attention (T, hidden) within each sample; `qkv` (T, 3 * hidden): scaled queries, keys and values."""
    tokens, width = qkv.shape
    result = qkv.new_empty(tokens, width // 3)
    by_head = result.view(tokens, heads, -1).transpose(0, 1)  # (heads, T, hidden / heads)
    parts = qkv.view(tokens, 3, heads, -1).permute(1, 2, 0, 3)
    start = 0
    for length in lengths:  # in tokens
        sample = slice(start, start + length)
        q, k, v = parts[:, :, sample]
        if qkv.dtype != torch.float32:  # oneDNN computes these products and would copy q, k and v anyway
            padded = qkv.new_zeros(3, heads, length + -length % ROWS, width // 3 // heads)
            padded[:, :, :length] = parts[:, :, sample]  # F.pad keeps the strides if it adds nothing: twice as slow
            q, k, v = padded
        scores = torch.bmm(q, k.transpose(1, 2))
        scores[:, :, length:] = -torch.inf
        by_head[:, sample] = torch.bmm(torch.softmax(scores, dim=-1), v)[:, :length]
        start += length
    result[start:] = result[0]  # the rows after the last sample
    return result


def packed_inputs(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids, positions and segments of the batch's T tokens, each int32 (T,)."""
    positions = np.broadcast_to(np.arange(batch.input_ids.shape[1], dtype=np.int32), batch.input_ids.shape)
    return batch.packed(batch.input_ids), batch.packed(positions), batch.packed(batch.segment_ids)


class Bert:
    """BERT for question answering, made from what model_files.open_weights returns; empties `weights`.

    `make_linear` makes a linear layer from its name ("N.qkv", "N.out", "N.up" or "N.down" in BERT's layer N) and its
    weight and bias in fp32; `dtype` is that of the values between linear layers; `kernels` are what
    cpu_kernels.load_kernels returns.
    """

    def __init__(
        self,
        bert_config: dict[str, Any],
        weights: MutableMapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        make_linear: Callable[[str, Tensor, Tensor], Linear | Int8Linear],
        kernels: Any = None,
    ) -> None:
        self.heads, self.epsilon = bert_config["num_attention_heads"], bert_config["layer_norm_eps"]
        self.kernels = kernels
        self.attention: Callable[[Tensor, int, Any], Tensor] = kernels.attention if kernels else attention
        self.rows = ROWS

        def pair(name: str, copy: bool = True) -> tuple[Tensor, Tensor]:
            # Copied, because a tensor that is a part of the mapped file keeps the whole file in memory.
            weight = weights.pop(f"{name}.weight").to(device, copy=copy)
            return weight, weights.pop(f"{name}.bias").to(device, copy=True)

        def queries_keys_values(name: str) -> list[Tensor]:
            scale = (bert_config["hidden_size"] / self.heads) ** -0.5  # of attention, once instead of on every score
            query, key, value = (pair(f"{name}.{part}", copy=False) for part in ("query", "key", "value"))
            return [torch.cat((q * scale, k, v)) for q, k, v in zip(query, key, value)]

        names = (f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
        self.words, self.positions, self.types = (weights.pop(name).to(device, dtype, copy=True) for name in names)
        self.embedding_norm = pair("bert.embeddings.LayerNorm")
        self.layers: list[tuple[Any, ...]] = []  # query, key and value; output; its norm; up; down; its norm
        for layer in range(bert_config["num_hidden_layers"]):
            prefix = f"bert.encoder.layer.{layer}"
            qkv = make_linear(f"{layer}.qkv", *queries_keys_values(f"{prefix}.attention.self"))
            out = make_linear(f"{layer}.out", *pair(f"{prefix}.attention.output.dense", copy=False))
            up = make_linear(f"{layer}.up", *pair(f"{prefix}.intermediate.dense", copy=False))
            down = make_linear(f"{layer}.down", *pair(f"{prefix}.output.dense", copy=False))
            out_norm, down_norm = pair(f"{prefix}.attention.output.LayerNorm"), pair(f"{prefix}.output.LayerNorm")
            self.layers.append((qkv, out, out_norm, up, down, down_norm))
            return_memory()  # of the layer's tensors in fp32
        self.answer = Linear(*pair("qa_outputs"))

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits of the batch's T tokens, fp32 (T, 2), in the host's memory."""
        ids, positions, segments = map(torch.from_numpy, packed_inputs(batch))
        return self.compute(ids, positions, segments, batch.lengths.tolist())

    def compute(self, ids: Tensor, positions: Tensor, segments: Tensor, lengths: Any) -> Tensor:
        """Return the logits of T packed tokens, fp32 (T, 2), from tensors int32 (T,).

        `lengths` are the tokens of each sample, in the form that `self.attention` takes.
        """
        tables = (ids, self.words), (positions, self.positions), (segments, self.types)
        words, places, types = (F.embedding(rows, table) for rows, table in tables)
        x = self._norm(words + places + types, self.embedding_norm)
        if missing := -len(x) % self.rows:
            # Fill up with copies of the first token: calibration sees no value that a real token does not have.
            x = torch.cat((x, x[:1].expand(missing, -1)))
        for qkv, out, out_norm, up, down, down_norm in self.layers:
            x = self._add_norm(x, out, self.attention(qkv(x), self.heads, lengths), out_norm)
            x = self._add_norm(x, down, up(x, gelu=True), down_norm)
        return self.answer(x.narrow(0, 0, len(ids)).float())

    def _add_norm(self, x: Tensor, linear: Any, inputs: Tensor, weight_bias: tuple[Tensor, Tensor]) -> Tensor:
        """Return the norm of x + linear(inputs)."""
        if self.kernels:
            return self.kernels.add_norm(x, linear(inputs), *weight_bias, self.epsilon)
        return self._norm(linear(inputs, residual=x), weight_bias)

    def _norm(self, x: Tensor, weight_bias: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[1:], *weight_bias, self.epsilon)
