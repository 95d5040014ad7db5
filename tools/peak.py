"""Count BERT's operations, and measure what they are compared with: the GEMM throughput of a processor or a GPU."""

import time
from collections.abc import Iterable
from typing import Any

from models.memory import keep_memory

GPU_GEMM_SIZE = 8192  # rows and columns of the products that give a GPU's peak


def flops(bert_config: dict[str, int], lengths: Iterable[int]) -> int:
    """Return the multiplications and additions of BERT for samples of `lengths` tokens without padding."""
    hidden, inner = bert_config["hidden_size"], bert_config["intermediate_size"]
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    layer = sum(length * (linear + 4 * length * hidden) for length in map(int, lengths))
    return bert_config["num_hidden_layers"] * layer


def gpu_peak() -> dict[str, float]:
    """Return the GEMM throughput in operations/s of each dtype that the GPU has instructions for."""
    import torch

    from models import cuda_bert
    from pytorch_SUT import DTYPES

    device = torch.device("cuda", 0)
    names = ["fp32", "fp16"] + ["bf16"] * (torch.cuda.get_device_capability(device) >= cuda_bert.FLASH)
    return {name: cuda_bert.product_rate(device, DTYPES[name], GPU_GEMM_SIZE) for name in names}


def measure_peak(peak: dict[str, float]) -> None:
    """Raise `peak` to the GEMM throughput in operations/s of each dtype that the processor has instructions for."""
    import torch

    from models.packed_bert import Int8Linear, Linear, PrepackedLinear
    from pytorch_SUT import cpu_runs

    keep_memory()  # the 34 MB of a product in fp32, as in a run
    rows, inputs, outputs = 2048, 1024, 4096
    with torch.inference_mode():
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        layers: list[tuple[str, Any, torch.Tensor]] = []
        if cpu_runs("int8"):
            int8 = Int8Linear(weight, bias, x.amin(0), x.amax(0), torch.bfloat16)
            layers.append(("int8", int8, int8.quantize(x)))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for kind in (Linear, PrepackedLinear) if cpu_runs(name) else ():
                layers.append((name, kind(weight.to(dtype), bias.to(dtype)), x.to(dtype)))
        for name, layer, matrix in layers:
            for _ in range(6):
                begin = time.perf_counter()
                layer(matrix)
                rate = 2 * rows * inputs * outputs / (time.perf_counter() - begin)
                peak[name] = max(peak.get(name, 0), rate)
