"""cpu_kernels.cpp against PyTorch's own operators, and what happens if it cannot be compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

pytest.importorskip("torch")
import torch
import torch.nn.functional as F  # noqa: N812 - it is F everywhere

from models import cpu_kernels
from models.cpu_kernels import load_kernels
from models.packed_bert import attention

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
DTYPES = [torch.float32, torch.bfloat16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("heads, width", [(1, 16), (3, 48), (12, 384), (2, 128), (1, 256)])
def test_attention_is_pytorchs_and_stays_within_a_sample(kernels, threads, kind, heads, width):
    lengths = [5, 384, 1, 16, 36, 37, 16, 73, 2]
    qkv = torch.randn(sum(lengths) + 3, 3 * width, generator=generator()).to(kind)
    qkv[:, :width] *= (width // heads) ** -0.5
    result = kernels.attention(qkv, heads, lengths)
    expected = attention(qkv.float(), heads, lengths)
    assert (result - expected).abs().max() < (1e-5 if kind == torch.float32 else 0.03)
    start = 0
    for length in lengths:
        sample = slice(start, start + length)
        assert torch.equal(result[sample], kernels.attention(qkv[sample].clone(), heads, [length]))
        start += length
    assert torch.equal(result[start:], result[:1].expand(3, -1)), "rows after the samples repeat the first row"


@pytest.mark.parametrize("kind", DTYPES)
def test_attention_stays_finite_for_scores_of_any_size(kernels, kind):
    for size in (0.0, 1e-20, 30.0, 1e4):
        qkv = size * torch.randn(50, 96, generator=generator())
        result = kernels.attention(qkv.to(kind), 2, [50])
        values = qkv[:, 64:]
        assert result.isfinite().all()
        assert result.float().max() <= values.max() + 0.01 * size and result.float().min() >= values.min() - 0.01 * size


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("column", [3, 40, 70], ids=["query", "key", "value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_attention_does_not_hide_what_is_no_number(kernels, kind, column, value):
    """A response that contains NaN or infinity is refused."""
    qkv = torch.randn(50, 96, generator=generator()).to(kind)
    qkv[7, column] = value
    result, expected = kernels.attention(qkv, 2, [50]), attention(qkv.float(), 2, [50])
    assert not result.isfinite().all()
    assert torch.equal(result.isfinite(), expected.isfinite())


@pytest.mark.parametrize("kinds", [(one, two) for one in DTYPES for two in DTYPES])
@pytest.mark.parametrize("width", [16, 48, 1024])
def test_add_norm_is_pytorchs_and_a_row_does_not_depend_on_the_others(kernels, threads, kinds, width):
    x, y = (torch.randn(100, width, generator=generator(seed)).to(kind) for seed, kind in enumerate(kinds))
    weight, bias = torch.randn(2, width, generator=generator(2))
    result = kernels.add_norm(x, y, weight, bias, 1e-12)
    expected = F.layer_norm(x.double() + y.double(), (width,), weight.double(), bias.double(), 1e-12)
    assert result.dtype == x.dtype
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-6 if x.dtype == torch.float32 else 2**-8)
    for rows in (slice(0, 1), slice(3, 40), slice(99, 100)):
        assert torch.equal(kernels.add_norm(x[rows].clone(), y[rows].clone(), weight, bias, 1e-12), result[rows])


def test_a_norm_of_equal_values_is_the_bias(kernels):
    weight, bias = torch.ones(32), torch.arange(32.0)
    assert torch.equal(kernels.add_norm(torch.ones(2, 32), torch.ones(2, 32), weight, bias, 1e-12), bias.expand(2, -1))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_quantized_values_are_pytorchs(kernels, threads, kind, zero_point):
    """Also halves, which are rounded to even numbers, and what is beyond the range."""
    x = torch.randn(100, 48, generator=generator())
    x[::3] = (torch.randint(-300, 300, (34, 48), generator=generator()) + 0.5) / 64
    x = x.to(kind)
    factors = torch.linspace(0.1, 1, 48)
    for factor, values in ((None, x.float()), (factors, x * factors)):
        expected = torch.quantize_per_tensor(values, 1 / 64, zero_point, torch.quint8).int_repr()
        assert torch.equal(kernels.quantize(x, factor, 1 / 64, zero_point), expected)


@pytest.mark.parametrize("change", [{"hidden_size": 40}, {"num_attention_heads": 8}, {"intermediate_size": 40}])
def test_a_bert_with_other_widths_runs_without_them(change, caplog):
    assert load_kernels(SIZES | change) is None
    assert caplog.text == ""


@pytest.fixture
def missing(kernels, tmp_path, monkeypatch, caplog):
    """Return a function that tries to compile the kernels, as if they never were, and returns the notice."""
    monkeypatch.setattr(torch.ops, "bert_squad", SimpleNamespace())
    monkeypatch.setattr(cpu_kernels.config, "CACHE_DIR", str(tmp_path / "cache"))

    def call():
        assert load_kernels(SIZES) is None
        [notice] = [line for line in caplog.messages if line.endswith("running with PyTorch's slower operators")]
        assert "\n" not in notice and notice.startswith("notice: models/cpu_kernels.cpp: ")
        return notice

    return call


def test_without_a_compiler_a_notice_names_it_and_the_remedy(missing, monkeypatch):
    monkeypatch.setenv("CXX", "missing-c++")
    assert "there is no C++ compiler missing-c++; install g++" in missing()


def test_a_compilation_that_fails_is_a_notice_with_the_compilers_line(missing, tmp_path, monkeypatch):
    source = tmp_path / "cpu_kernels.cpp"
    source.write_text("int main() { return unknown; }\n")
    monkeypatch.setattr(cpu_kernels, "SOURCE", str(source))
    assert re.search("error: .*unknown", missing())
    assert not list(tmp_path.glob("cache/*/*"))


def test_a_folder_that_cannot_be_written_is_a_notice(missing, tmp_path):
    (tmp_path / "cache").touch()
    assert str(tmp_path / "cache") in missing()


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again_and_once_for_two_processes(kernels, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import config
config.CACHE_DIR, config.log_progress = {str(tmp_path)!r}, print
from models.cpu_kernels import library_path, load_kernels
if sys.argv[1:]:
    print(library_path())
else:
    print(load_kernels({SIZES}).attention)
"""
    command = [sys.executable, "-c", code]
    library = Path(subprocess.run([*command, "path"], capture_output=True, text=True, check=True).stdout.strip())
    library.parent.mkdir()
    library.write_text("damaged")
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [lines[-1] for lines in outputs] == ["bert_squad.attention"] * 2
    assert sum(line.startswith("compiling") for lines in outputs for line in lines) == 1
    assert os.listdir(library.parent) == [library.name]
