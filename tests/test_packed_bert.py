"""BERT over packed tokens: each product against the plain one, and a sample's logits free of its batch."""

import numpy as np
import pytest
from conftest import arguments, random_batch, random_bert, samples

torch = pytest.importorskip("torch")
import packed_bert
import pytorch_SUT
from packed_bert import Int8Linear, Linear, PrepackedLinear, attention
from pytorch_SUT import PyTorchBackend, PyTorchReference, cpu_runs

INPUTS, OUTPUTS = 96, 160


def layers(dtype):
    """A plain layer in fp32, and the same in `dtype` as a CPU runs it."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(OUTPUTS, INPUTS, generator=generator) / 10, torch.randn(OUTPUTS, generator=generator)
    plain = Linear(weight, bias)
    if dtype == "int8":
        bound = torch.full((INPUTS,), 4.0)
        gelu_range = torch.tensor([-0.2]), torch.tensor([4.0])
        return plain, Int8Linear(weight, bias, -bound, bound, torch.float32, gelu_range)
    kind = getattr(torch, pytorch_SUT.DTYPES[dtype])
    return plain, PrepackedLinear(weight.to(kind), bias.to(kind))


def inputs(rows, dtype):
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)).clamp(-4, 4)
    return x if dtype == "int8" else x.to(getattr(torch, pytorch_SUT.DTYPES[dtype]))


@pytest.fixture(params=["fp32", "bf16", "int8"])
def dtype(request):
    if not cpu_runs(request.param):
        pytest.skip(f"this processor has no {request.param} instructions")
    return request.param


def test_each_product_is_the_plain_one(dtype):
    plain, layer = layers(dtype)
    x = inputs(50, dtype)
    residual = torch.randn(50, OUTPUTS).to(x.dtype)
    tolerance = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.06}[dtype]
    with torch.inference_mode():
        assert (layer(x).float() - plain(x.float())).abs().max() < tolerance
        assert (layer.add(x, residual).float() - plain.add(x.float(), residual.float())).abs().max() < tolerance
        gelu = layer.gelu(x)
        if dtype == "int8":
            assert gelu.dtype == torch.uint8
            gelu = (gelu.float() - layer.gelu_zero_point) * layer.gelu_scale
        expected = plain.gelu(x.float()).clamp(max=4.0 if dtype == "int8" else torch.inf)  # int8 has its range
        assert (gelu.float() - expected).abs().max() < tolerance


def test_a_row_is_the_same_bits_whatever_the_others_are(dtype):
    """With other rows, more of them and another place, for any number from two up; a sample has three tokens at least."""
    _, layer = layers(dtype)
    x = inputs(700, dtype)
    with torch.inference_mode():
        for call in (layer, layer.gelu, lambda rows: layer.add(rows, rows.repeat(1, 2)[:, :OUTPUTS].contiguous())):
            whole = call(x)
            for start, stop in ((0, 2), (3, 8), (100, 117), (350, 650), (699 - 63, 700)):
                assert torch.equal(call(x[start:stop].contiguous()), whole[start:stop])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_stays_within_a_sample(kind):
    heads, width, lengths = 3, 24, [5, 19, 5]
    qkv = torch.randn(sum(lengths) + 2, 3 * width, generator=torch.Generator().manual_seed(0)).to(kind)
    result = attention(qkv, heads, lengths)
    start = 0
    for length in lengths:
        own = qkv[start:start + length]
        q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in own.float().split(width, dim=1))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(0, 1).flatten(1)
        assert (result[start:start + length] - expected).abs().max() < (1e-5 if kind == torch.float32 else 0.06)
        assert torch.equal(result[start:start + length], attention(own, heads, [length]))
        start += length
    assert torch.equal(result[start:], result[:1].expand(2, -1)), "what fills up is no other than the first"


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """A backend on a BERT of random weights: backend("bf16")."""
    monkeypatch.chdir(tmp_path)
    random_bert(tmp_path / "model")
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "model")
    monkeypatch.setattr(pytorch_SUT, "int8_ranges", lambda model: pytorch_SUT.input_ranges(
        model, (random_batch(60, 30), random_batch(384))))
    return lambda dtype, kind=PyTorchBackend: kind(arguments(dtype=dtype))


def test_a_samples_logits_are_the_same_bits_in_every_batch(backend, dtype):
    runner = backend(dtype)
    batch = random_batch(90, 384, 5, 90, 3, 200)
    together = np.split(runner.predict(batch), np.cumsum(batch.lengths)[:-1])
    for logits, sample in zip(together, samples(batch)):
        assert logits.tobytes() == runner.predict(sample).tobytes()


def test_rows_that_fill_up_change_neither_logits_nor_ranges(backend, dtype, monkeypatch):
    batch = random_batch(90, 37, 3)
    filled, ranges = backend(dtype).predict(batch), pytorch_SUT.input_ranges("model", [batch])
    monkeypatch.setattr(packed_bert, "ROWS", 1)
    assert np.abs(backend(dtype).predict(batch) - filled).max() <= {"fp32": 0, "bf16": 0.02, "int8": 0.02}[dtype]
    for name, pair in pytorch_SUT.input_ranges("model", [batch]).items():
        assert torch.equal(torch.stack(pair), torch.stack(ranges[name])), name


def test_every_dtype_stays_close_to_the_plain_padded_model(backend, dtype):
    batch = random_batch(384, 100, 7)
    runner, reference = backend(dtype), backend("fp32", PyTorchReference)
    expected = np.concatenate([reference.predict(sample) for sample in samples(batch)])
    share = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1}[dtype]
    assert np.abs(runner.predict(batch) - expected).max() < share * np.abs(expected).max()


def test_a_dtype_that_the_processor_lacks_runs_in_fp32_with_a_notice(backend, monkeypatch, capsys):
    monkeypatch.setattr(pytorch_SUT, "cpu_runs", lambda dtype: dtype == "fp32")
    expected = backend("fp32").predict(random_batch(20))
    for dtype in ("bf16", "int8"):
        runner = backend(dtype)
        assert f"no {dtype} instructions; running in fp32" in capsys.readouterr().err
        assert runner.name.endswith("fp32") and (runner.predict(random_batch(20)) == expected).all()


def test_a_calibration_is_kept_for_its_model_and_list_only(tmp_path, script, monkeypatch):
    """int8 through run.py: the second run loads what the first found; another list or a damaged file is found anew."""
    (tmp_path / "user.conf").write_text("")
    kept = tmp_path / "build/cache"

    def run(rows):
        (tmp_path / "list.txt").write_text("".join(f"{row}\n" for row in rows))
        result = script("run.py", "--backend=pytorch", "--dtype=int8", "--accuracy", "--max_examples=8",
                        CALIBRATION_FILE="list.txt")
        assert result.returncode == 0, result.stderr
        return {path: path.stat().st_mtime_ns for path in kept.glob("int8-*.npz")}, result.stderr

    first, _ = run(range(10))
    assert len(first) == 1
    assert run(range(10))[0] == first
    assert len(run(range(5, 15))[0]) == 2
    for path in first:
        path.write_bytes(path.read_bytes()[:100])
    again, said = run(range(10))
    assert "is damaged" in said and again != first
