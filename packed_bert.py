"""BERT for question answering over packed tokens, in PyTorch: no sample is padded.

The tokens of all samples of a batch stand behind one another in one matrix for every linear layer; only attention looks
at each sample alone. What a linear layer runs on is one of the classes here, each with three operations: the product
itself, the product followed by gelu, and the product added to the residual.

    Linear            PyTorch's own, on any device
    PrepackedLinear   oneDNN with weights laid out for it once: fp32 and bf16 on CPUs
    Int8Linear        oneDNN in int8 with scales from a calibration: on CPUs

Each row of these products comes out bit for bit the same whatever the other rows are, so a sample's logits do not
depend on its batch; tests/test_packed_bert.py holds them to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

# On CPUs a product's rows are filled up to a multiple of this, and so are a sample's within attention where oneDNN
# computes it: for each number of rows that it meets oneDNN makes a kernel, which took a fifth of a small BERT's time for a
# sample in bf16 and int8. Samples of all lengths have 24 such numbers now, not 300. 8 was no faster, 32 slower.
ROWS = 16


class Linear:
    """x W' + b as PyTorch computes it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """`weight` (outputs, inputs) and `bias` (outputs,), on the device and in the dtype to compute in."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(x).add_(residual)


class PrepackedLinear:
    """x W' + b by oneDNN, whose blocked layout of the weights is made once; gelu and the addition are fused."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """`weight` (outputs, inputs) and `bias` (outputs,), both fp32 or both bf16."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def uint8_range(low: torch.Tensor, high: torch.Tensor) -> tuple[float, int]:
    """The (scale, zero point) with which uint8 covers the values between the least of `low` and the most of `high`."""
    low, high = min(low.min().item(), 0.0), max(high.max().item(), 0.0)
    scale = max(high - low, 1e-6) / 255
    return scale, round(-low / scale)


class Int8Linear:
    """x W' + b by oneDNN in int8: one scale for each output's weights, one scale and zero point for the input.

    The input's are constants of a calibration, so that a sample's result does not depend on its batch.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
                 output_dtype: torch.dtype, gelu_range: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """`weight` (outputs, inputs) and `bias` (outputs,) in fp32; `low` and `high` bound the inputs, fp32 (inputs,).

        The products come out in `output_dtype`, but those of `gelu` in uint8, quantized for the next layer, whose
        inputs' bounds are `gelu_range`.
        """
        self.scale, self.zero_point = uint8_range(low, high)
        self.offset = torch.tensor([self.zero_point + 0.5])
        self.weight_scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        quantized = (weight / self.weight_scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.weight_zero_point = torch.zeros(len(weight), dtype=torch.int64)
        self.bias, self.output_dtype = bias, output_dtype
        if gelu_range:
            self.gelu_scale, self.gelu_zero_point = uint8_range(*gelu_range)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The input as uint8; it already is after a `gelu`."""
        if x.dtype == torch.uint8:
            return x
        return torch.add(self.offset, x, alpha=1 / self.scale).clamp_(0, 255).to(torch.uint8)

    def product(self) -> tuple[float, int, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.scale, self.zero_point, self.weight, self.weight_scale, self.weight_zero_point

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(self.quantize(x), *self.product(), self.bias, 1.0, 0,
                                                  self.output_dtype, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(self.quantize(x), *self.product(), self.bias, self.gelu_scale,
                                                  self.gelu_zero_point, torch.uint8, "gelu", [], "none")

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise.binary(
            self.quantize(x), *self.product(), residual, self.bias, 1.0, 0, residual.dtype, 1.0, 0, "add", 1.0,
            "none", [], "")


Product = Linear | PrepackedLinear | Int8Linear


def attention(qkv: torch.Tensor, heads: int, lengths: list[int]) -> torch.Tensor:
    """Attention within each sample: queries, keys and values (T, 3 * hidden) -> (T, hidden).

    `lengths` are the samples' tokens, a list of ints; the queries are scaled already. Rows behind theirs become the first.
    """
    tokens, width = qkv.shape
    result = qkv.new_empty(tokens, width // 3)
    by_head = result.view(tokens, heads, -1).transpose(0, 1)  # (heads, T, hidden / heads)
    parts = qkv.view(tokens, 3, heads, -1).permute(1, 2, 0, 3)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        q, k, v = parts[:, :, own]
        if qkv.dtype != torch.float32:  # then it is oneDNN's, which copies them anyway
            padded = qkv.new_zeros(3, heads, length + -length % ROWS, width // 3 // heads)
            padded[:, :, :length] = parts[:, :, own]  # F.pad keeps the strides where it adds nothing: twice as slow
            q, k, v = padded
        scores = torch.bmm(q, k.transpose(1, 2))
        scores[:, :, length:] = -torch.inf
        by_head[:, own] = torch.bmm(torch.softmax(scores, dim=-1), v)[:, :length]
        start += length
    result[start:] = result[0]
    return result


def cuda_attention(qkv: torch.Tensor, heads: int, lengths: list[int]) -> torch.Tensor:
    """`attention` on a GPU: the framework's variable-length kernel for half types, sample by sample for fp32."""
    if qkv.dtype == torch.float32:
        return attention(qkv, heads, lengths)
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(torch.tensor(lengths, device=qkv.device).cumsum(0, dtype=torch.int32), (1, 0))
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    return varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), scale=1.0).flatten(1)


class Bert:
    """BERT for question answering. Called with packed tokens, it gives their logits."""

    def __init__(self, sizes: dict[str, Any], weights: dict[str, torch.Tensor], device: torch.device,
                 dtype: torch.dtype, make_linear: Callable[[str, torch.Tensor, torch.Tensor], Product]) -> None:
        """`sizes` and `weights` as `pytorch_SUT.read_weights` gives them; the weights are taken out of the dict.

        `dtype` is that of what passes between layers, `make_linear(name, weight, bias)` makes a layer's product from
        fp32 weights; its names are "N.qkv", "N.out", "N.up" and "N.down" for layer N.
        """
        self.heads = sizes["num_attention_heads"]
        self.epsilon = sizes.get("layer_norm_eps", 1e-12)
        self.attention, self.rows = (cuda_attention, 1) if device.type == "cuda" else (attention, ROWS)

        def own(name: str) -> torch.Tensor:
            return weights.pop(name).to(device, copy=True)  # one that is not a part of the file holds all of it in memory

        def take(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return own(f"{name}.weight"), own(f"{name}.bias")

        self.words, self.positions, self.types = (
            own(f"bert.embeddings.{name}_embeddings.weight").to(dtype)
            for name in ("word", "position", "token_type"))
        self.embedding_norm = take("bert.embeddings.LayerNorm")
        self.layers = []
        for layer in range(sizes["num_hidden_layers"]):
            prefix = f"bert.encoder.layer.{layer}"
            parts: list[Sequence[torch.Tensor]] = [
                take(f"{prefix}.attention.self.{name}") for name in ("query", "key", "value")]
            scale = (sizes["hidden_size"] / self.heads) ** -0.5
            parts[0] = [tensor * scale for tensor in parts[0]]  # the scale of attention, once instead of at each score
            self.layers.append((
                make_linear(f"{layer}.qkv", *(torch.cat(tensors) for tensors in zip(*parts))),
                make_linear(f"{layer}.out", *take(f"{prefix}.attention.output.dense")),
                take(f"{prefix}.attention.output.LayerNorm"),
                make_linear(f"{layer}.up", *take(f"{prefix}.intermediate.dense")),
                make_linear(f"{layer}.down", *take(f"{prefix}.output.dense")),
                take(f"{prefix}.output.LayerNorm")))
        self.answer = Linear(*take("qa_outputs"))

    def norm(self, x: torch.Tensor, weight_bias: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[1:], *weight_bias, self.epsilon)

    def __call__(self, input_ids: torch.Tensor, segment_ids: torch.Tensor, positions: torch.Tensor,
                 lengths: list[int]) -> torch.Tensor:
        """Logits fp32 (T, 2) of T packed tokens: the first three are int (T,), `lengths` a list of ints."""
        x = self.words[input_ids] + self.positions[positions] + self.types[segment_ids]
        x = self.norm(x, self.embedding_norm)
        tokens = len(x)
        # filled up with the first token, whose rows are in every layer what they would have been
        x = torch.cat((x, x[:1].expand(-tokens % self.rows, -1)))
        for qkv, out, out_norm, up, down, down_norm in self.layers:
            x = self.norm(out.add(self.attention(qkv(x), self.heads, lengths), x), out_norm)
            x = self.norm(down.add(up.gelu(x), x), down_norm)
        return self.answer(x[:tokens].float())
