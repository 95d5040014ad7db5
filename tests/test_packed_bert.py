"""The linear layers and the attention of packed_bert.py, each against PyTorch's own in fp32."""

import pytest

pytest.importorskip("torch")
import torch

from models.packed_bert import Int8Linear, Linear, PrepackedLinear, attention
from pytorch_SUT import DTYPES

INPUTS, OUTPUTS = 96, 160
HIGH = 4.0  # of the inputs and of a gelu in int8


def layers(dtype):
    """Return a linear layer of PyTorch in fp32, and the same in `dtype` as a CPU runs it."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(OUTPUTS, INPUTS, generator=generator) / 10, torch.randn(OUTPUTS, generator=generator)
    if dtype != "int8":
        return Linear(weight, bias), PrepackedLinear(weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype]))
    bound = torch.full((INPUTS,), HIGH)
    layer = Int8Linear(weight, bias, -bound, bound, torch.float32)
    layer.quantize_gelu(torch.tensor([-0.2]), torch.tensor([HIGH]))
    return Linear(weight, bias), layer


def inputs(rows, dtype):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)).clamp(-HIGH, HIGH).to(DTYPES[dtype])


@torch.inference_mode()
def test_a_linear_layer_computes_what_pytorch_does_in_fp32(dtype):
    plain, layer = layers(dtype)
    x = inputs(50, dtype)
    residual = torch.randn(50, OUTPUTS).to(x.dtype)
    tolerance = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.06}[dtype]
    assert (layer(x).float() - plain(x.float())).abs().max() < tolerance
    expected = plain(x.float(), residual=residual.float())
    assert (layer(x, residual=residual).float() - expected).abs().max() < tolerance
    expected = plain(x.float(), gelu=True)
    gelu = layer(x, gelu=True)
    if dtype == "int8":
        assert gelu.dtype == torch.uint8
        scale, zero_point = layer.gelu_output[:2]
        gelu, expected = (gelu.float() - zero_point) * scale, expected.clamp(max=HIGH)
    assert (gelu.float() - expected).abs().max() < tolerance


@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_the_other_rows_are(dtype):
    """With other rows, more of them and at another place, for any number from two up; a sample has at least three."""
    _, layer = layers(dtype)
    x = inputs(700, dtype)
    residual = x.repeat(1, 2)[:, :OUTPUTS].contiguous()
    every = slice(0, len(x))

    def results(rows):
        part = x[rows].contiguous()
        return layer(part), layer(part, gelu=True), layer(part, residual=residual[rows].clone())

    whole = results(every)
    for rows in (slice(0, 2), slice(3, 8), slice(100, 117), slice(350, 650), slice(699 - 63, 700)):
        assert all(torch.equal(part, result[rows]) for part, result in zip(results(rows), whole))


@torch.inference_mode()
def test_an_outlier_channel_in_int8_leaves_the_others_their_precision(int8):
    generator = torch.Generator().manual_seed(0)
    plain = Linear(torch.randn(OUTPUTS, 200, generator=generator) / 10, torch.randn(OUTPUTS, generator=generator))
    x = torch.randn(50, 200, generator=generator).clamp(-HIGH, HIGH)
    plain.weight[:, 5] /= 20
    x[:, 5] *= 20
    layer = Int8Linear(plain.weight, plain.bias, -x.abs().amax(0), x.abs().amax(0), torch.float32)
    steps = layer.quantize(x).float() - layer.zero_point
    assert layer.scale < 2.1 * HIGH / 255
    assert (steps * layer.scale / layer.factors - x)[:, :5].abs().max() < 0.51 * layer.scale
    assert (layer(x) - plain(x)).abs().max() < 0.1
    layer.quantize_gelu(torch.zeros(200), layer.factors**-1)  # a next layer with an outlier
    assert layer(x, gelu=True).dtype == torch.float32


def test_a_quantized_value_does_not_depend_on_its_place():
    """Also halves, which are rounded to even numbers, and what is beyond the range."""
    layer = Int8Linear(torch.ones(1, 8), torch.zeros(1), -torch.ones(8), torch.ones(8), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    x[::3] = (torch.randint(-200, 200, x[::3].shape, generator=generator) + 0.5) * layer.scale
    whole = layer.quantize(x)
    assert whole.min() == 0 and whole.max() == 255
    for start in range(40):
        for rows in (1, 2, 3, 5, 31, 100, 3000):
            assert torch.equal(layer.quantize(x[start : start + rows].clone()), whole[start : start + rows])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_stays_within_a_sample(kind):
    heads, width, lengths = 3, 24, [5, 19, 5]
    qkv = torch.randn(sum(lengths) + 2, 3 * width, generator=torch.Generator().manual_seed(0)).to(kind)
    result = attention(qkv, heads, lengths)
    for start, length in zip((0, 5, 24), lengths):
        sample = slice(start, start + length)
        q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in qkv[sample].float().split(width, dim=1))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(0, 1).flatten(1)
        assert (result[sample] - expected).abs().max() < (1e-5 if kind == torch.float32 else 0.06)
        assert torch.equal(result[sample], attention(qkv[sample], heads, [length]))
    assert torch.equal(result[sum(lengths) :], result[:1].expand(2, -1)), "rows after the samples repeat the first row"


@pytest.fixture
def threads():
    """Return torch.set_num_threads; the number is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.inference_mode()
def test_a_gelu_has_the_same_bits_within_the_product_and_after_it(threads):
    """Also with numbers of threads that do not divide the values, whose shares end within a vector."""
    generator = torch.Generator().manual_seed(0)
    layer = PrepackedLinear(torch.randn(1536, 64, generator=generator), torch.randn(1536, generator=generator))
    for count in (1, 2, 3, 5, 7):
        threads(count)
        for rows in (16, 48, 112, 272):
            x = torch.randn(rows, 64, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
            results = []
            for layer.slow_gelu in (False, True):
                results.append(layer(x, gelu=True))
            assert torch.equal(*results), (count, rows)
