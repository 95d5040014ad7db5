"""models.cuda_bert.py without a GPU: what CUDA's kernels demand, the numbers, streams, slots and graphs.

Fake CUDA tensors show that every operator gets what CUDA's kernels take. Stand-ins on the CPU compute the numbers.
"""

import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, random_batch, refused

pytest.importorskip("torch")
import cuda_standins
import torch
import torch.utils.benchmark
from cuda_standins import BERT_CONFIG, CudaRules, random_weights
from torch._subclasses.fake_tensor import FakeTensorMode

from models import cuda_bert
from models.cuda_bert import CudaBert, CudaBerts
from models.packed_bert import Bert, Linear
from pytorch_SUT import DTYPES

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
# What torch 2.13.0 promises of the private operators that cuda_bert.py calls.
SCHEMAS = {
    "_flash_attention_forward": "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, "
    "Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
    "bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
    "Tensor? seqused_k=None, Tensor? alibi_slopes=None, Tensor? block_table=None, int? num_splits=None) -> "
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_efficient_attention_forward": "aten::_efficient_attention_forward(Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, "
    "Tensor? seqlen_k=None, int? window_size=None) -> (Tensor output, Tensor logsumexp, Tensor philox_seed, "
    "Tensor philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)",
    "_addmm_activation": "aten::_addmm_activation(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, "
    "Scalar alpha=1, bool use_gelu=False) -> Tensor",
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with cuda_standins.kernels():
        yield


@pytest.fixture
def cuda(monkeypatch):
    """Install the stand-ins; return a function that does so with the options of `cuda_standins.install`."""

    def install(**options):
        cuda_standins.install(monkeypatch, **options)

    install()
    return install


def plain_linear(name, weight, bias):
    return Linear(weight, bias)


def make_bert(dtype, device=CPU, max_tokens=1024):
    weights = random_weights(device)
    with torch.inference_mode():
        return CudaBert(BERT_CONFIG, weights, device, DTYPES[dtype], max_tokens)


@pytest.fixture(scope="module")
def plain():
    """Return the Bert of a CPU in fp32, of PyTorch's own layers."""
    with torch.inference_mode():
        return Bert(BERT_CONFIG, random_weights(), CPU, torch.float32, plain_linear)


def run(bert, batch):
    with torch.inference_mode():
        return np.asarray(bert(batch))


def test_the_private_operators_are_as_in_the_torch_version_that_was_read():
    source = (ROOT / "models/cuda_bert.py").read_text(encoding="utf-8")
    called = set(re.findall(r"torch\.(?:ops\.aten\.)?(_\w+)", source))
    assert called == set(SCHEMAS), "a private operator that is called needs a row in SCHEMAS"
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.aten, name).default._schema) == schema


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_kernel_gets_what_cuda_takes_and_the_host_never_waits(cuda, monkeypatch, dtype, capability):
    """In a layer: four products, attention, two norms; in fp32 also a gelu."""
    cuda(capability=capability)
    monkeypatch.setattr(cuda_bert, "GRAPH_TOKENS", ())
    monkeypatch.setattr(cuda_bert, "pinned", torch.zeros)
    with FakeTensorMode(), torch.inference_mode():
        bert = make_bert(dtype, CUDA)
        with CudaRules() as rules:
            logits = bert.launch(256, 16)
    assert logits.shape == (256, 2) and logits.dtype == torch.float32 and logits.device == CUDA
    flash = capability >= (8, 0) and dtype != "fp32"
    assert sum("flash" in name for name in rules.launches) == (BERT_CONFIG["num_hidden_layers"] if flash else 0)
    outside = 10  # three embeddings, two sums, a norm, the conversion to fp32, three of the answer
    assert len(rules.launches) <= (8 if dtype == "fp32" else 7) * BERT_CONFIG["num_hidden_layers"] + outside


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 5e-2)])
def test_the_logits_are_those_of_a_cpu(cuda, monkeypatch, plain, dtype, tolerance, capability):
    cuda(capability=capability)
    monkeypatch.setattr(cuda_bert, "GRAPH_TOKENS", ())
    batch = random_batch(5, 19, 384, 130)
    expected = run(plain, batch)
    found = run(make_bert(dtype), batch)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_samples_without_tokens_and_rows_after_the_samples_touch_no_sample(cuda, plain):
    batch = random_batch(5, 19, 100)
    bert = make_bert("fp16")
    ids = [torch.from_numpy(array) for array in cuda_bert.packed_inputs(batch)]
    ends = torch.tensor([0, 5, 24, 124], dtype=torch.int32)
    with torch.inference_mode():
        expected = bert.compute(*ids, ends)
        more = [torch.cat((array, torch.zeros(50, dtype=torch.int32))) for array in ids]
        found = bert.compute(*more, torch.cat((ends[:2], ends[1:2], ends[2:], ends[-1:].expand(7))))
    assert found.shape == (174, 2) and found[124:].isnan().all(), "the stand-in leaves NaN in rows of no sample"
    assert (found[:124] - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_a_bias_that_moves_into_a_norm_changes_no_other_product():
    """The layer that reads the norm's output takes away what bf16 adds: 4.03125, not 4.02."""
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randn(size, generator=generator) for size in ((50, 32), (24, 32)))
    norm = torch.ones(32), torch.randn(32, generator=generator) / 100
    added = Linear(torch.zeros(32, 32), torch.full((32,), 4.02))
    reader = Linear(weight, torch.zeros(24))
    moved = cuda_bert.move_bias(norm, added, reader, torch.bfloat16)
    assert moved[0].dtype == moved[1].dtype == torch.bfloat16
    assert (moved[1].float() - norm[1] - 4.02).abs().max() < 0.02, "the residual gets the bias"
    rounded = Linear(weight.to(torch.bfloat16).float(), reader.bias)
    expected = torch.nn.functional.linear(values + norm[1], rounded.weight)
    assert (rounded(values + moved[1].float()) - expected).abs().max() < 1e-4


BATCHES = [[5], [384], [60, 4], [90, 37, 384, 8], [300, 384, 200], [9] * 30, [3]]


@pytest.mark.parametrize("gpus", [1, 2])
def test_threads_share_each_gpu_and_get_their_own_logits(cuda, monkeypatch, plain, gpus):
    """In graphs and without, smaller batches after larger ones, two threads for each GPU."""
    cuda(gpus=gpus)
    monkeypatch.setattr(cuda_bert, "GRAPH_TOKENS", (64, 256, 512))
    with torch.inference_mode():
        berts = CudaBerts(BERT_CONFIG, random_weights(), torch.float32, 1024)
    assert [sorted(bert.graphs) for bert in berts.berts] == gpus * [[64, 256, 512]]
    batches = [random_batch(*lengths) for lengths in BATCHES]
    expected = [run(plain, batch) for batch in batches]
    wrong = []

    def work(seed):
        try:
            for index in np.random.default_rng(seed).integers(len(batches), size=12):
                if not np.abs(run(berts, batches[index]) - expected[index]).max() < 1e-4:
                    wrong.append(BATCHES[index])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(cuda_bert.IN_FLIGHT * gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert berts.free.qsize() == 2 * gpus and all(bert.free.qsize() == 2 for bert in berts.berts)


def test_two_batches_are_in_flight_at_once(cuda, monkeypatch):
    """While one thread waits for the GPU, another launches its batch."""
    bert = make_bert("fp32", max_tokens=512)
    launched, both = threading.Semaphore(0), threading.Event()

    def synchronize(event):
        launched.release()
        assert both.wait(20), "the second batch is not launched before the first is answered"

    monkeypatch.setattr(cuda_standins.Event, "synchronize", synchronize)
    threads = [threading.Thread(target=run, args=(bert, random_batch(20)), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert all(launched.acquire(timeout=20) for _ in threads)
    both.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "lengths, graph", [([5], 64), ([64], 64), ([65], 256), ([4] * 16, 64), ([3] * 17, None), ([384, 200], None)]
)
def test_a_small_batch_runs_in_the_smallest_graph_that_holds_it(cuda, monkeypatch, lengths, graph):
    monkeypatch.setattr(cuda_bert, "GRAPH_TOKENS", (64, 256, 2048))
    bert = make_bert("fp32")
    assert sorted(bert.graphs) == [64, 256], "no graph is larger than a batch can be"
    replayed, launched = [], []
    for size, (replay, logits) in list(bert.graphs.items()):
        bert.graphs[size] = lambda size=size, replay=replay: (replayed.append(size), replay()), logits
    launch = bert.launch
    monkeypatch.setattr(bert, "launch", lambda *args: (launched.append(args), launch(*args))[1])
    run(bert, random_batch(*lengths))
    assert replayed == ([graph] if graph else [])
    assert graph or launched == [(sum(lengths), len(lengths))]


def test_a_failing_batch_gives_its_slot_back(cuda, monkeypatch):
    with torch.inference_mode():
        berts = CudaBerts(BERT_CONFIG, random_weights(), torch.float32, 512)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        run(berts, random_batch(300, 300))
    assert berts.free.qsize() == berts.berts[0].free.qsize() == 2
    assert run(berts, random_batch(40)).shape == (40, 2)


@pytest.mark.parametrize("hidden, heads", [(312, 12), (520, 2)])
def test_heads_that_no_kernel_takes_are_refused(cuda, hidden, heads):
    with refused(f"{hidden // heads} values", "multiple of 8", "USE_GPU=0"):
        CudaBert(BERT_CONFIG | {"hidden_size": hidden, "num_attention_heads": heads}, {}, CPU, torch.float16, 512)


def test_nothing_is_left_to_tf32_or_split_k(cuda, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", chosen.append)
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        with torch.inference_mode():
            CudaBerts(BERT_CONFIG, random_weights(), torch.float16, 64)
        assert torch.get_float32_matmul_precision() == "highest"
        for name in ("fp16", "bf16"):
            for end in ("", "_split_k"):
                assert getattr(matmul, f"allow_{name}_reduced_precision_reduction{end}") is False
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = (True, True)
    assert chosen == ["cublaslt"]


def test_a_gpus_default_batch_has_128_tokens_for_each_multiprocessor(cuda):
    cuda(gpus=2, multiprocessors=132)
    assert cuda_bert.batch_tokens() == 16896


def test_the_rate_of_a_product_is_that_of_its_operations(monkeypatch):
    seconds = iter((1, 2, 0.5, 3, 3))

    class Clock(torch.utils.benchmark.Timer):
        def timeit(self, number):
            assert super().timeit(number).mean > 0  # the statement can be executed
            return SimpleNamespace(mean=next(seconds))

    monkeypatch.setattr(torch.utils.benchmark, "Timer", Clock)
    assert cuda_bert.product_rate(CPU, torch.float32, 8) == 2 * 8**3 / 0.5
