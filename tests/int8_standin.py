"""Run run.py with PyTorch's int8 on a processor without instructions for it, at the speed of fp32 or below.

python3 tests/int8_standin.py --backend=pytorch --dtype=int8 --accuracy

oneDNN's integer products are replaced by exact ones in floating point. Attention is computed in fp32 from values that
are rounded to bf16.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.nn.functional import gelu

import config
import pytorch_SUT
import run
from models import packed_bert

EXACT = 384  # products of a uint8 and an int8 value whose sum fp32 holds without rounding, less than 2**24


def prepack(weight, shape):
    """Return int8 weights (outputs, inputs) in the form that `product` takes, fp32 (inputs, outputs)."""
    return weight.float().T.contiguous()


def product(x, scale, zero_point, weight, weight_scale, bias):
    """Return the product with uint8 values (rows, inputs), in fp32 with the bias."""
    parts = zip((x.float() - zero_point).split(EXACT, 1), weight.split(EXACT))
    return sum((left @ right).double() for left, right in parts).float() * (scale * weight_scale) + bias


class QLinear:
    """Stand for torch.ops.onednn.qlinear_pointwise."""

    def __call__(
        self, x, scale, zero_point, weight, weight_scale, weight_zeros, bias, out_scale, out_zero_point, dtype, kind, *_
    ):
        """Return the product or its gelu, in uint8 if `dtype` says so."""
        y = product(x, scale, zero_point, weight, weight_scale, bias)
        y = gelu(y) if kind == "gelu" else y
        if dtype == torch.uint8:
            y = (y / out_scale).round_().add_(out_zero_point).clamp_(0, 255)
        return y.to(dtype)

    def binary(self, x, scale, zero_point, weight, weight_scale, weight_zeros, residual, bias, *_):
        """Return the sum of the product and `residual`, in the residual's dtype."""
        return (product(x, scale, zero_point, weight, weight_scale, bias) + residual).to(residual.dtype)


def rounded(x):
    """Round to bf16."""
    return x.bfloat16().float()


def attention(qkv, heads, lengths):
    """Stand for packed_bert.attention if `qkv` is in bf16."""
    if qkv.dtype == torch.float32:
        return fp32_attention(qkv, heads, lengths)
    tokens, width = qkv.shape
    result = torch.zeros(tokens, width // 3)
    by_head = result.view(tokens, heads, -1).transpose(0, 1)
    parts = qkv.float().view(tokens, 3, heads, -1).permute(1, 2, 0, 3)
    for sample in torch.arange(sum(lengths)).split(lengths):
        q, k, v = parts[:, :, sample]
        shares = rounded(torch.softmax(rounded(q @ k.transpose(1, 2)), -1))
        by_head[:, sample] = shares @ v
    return result.bfloat16()


fp32_attention = packed_bert.attention


def install(replace=setattr):
    """Replace oneDNN's operators by replace(object, name, value)."""
    replace(torch.ops.onednn, "qlinear_prepack", prepack)
    replace(torch.ops.onednn, "qlinear_pointwise", QLinear())
    replace(packed_bert, "attention", attention)
    runs = pytorch_SUT.cpu_runs
    replace(pytorch_SUT, "cpu_runs", lambda dtype: dtype == "int8" or runs(dtype))


if __name__ == "__main__":
    install()
    config.run_command(run.main)
