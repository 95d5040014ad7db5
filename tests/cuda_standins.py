"""What stands for CUDA on a machine without a GPU: kernels and their rules, streams, events and graphs."""

import contextlib
import re
import threading
import time
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from models import cuda_bert
from models.model_files import weight_shapes

BERT_CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 60,
    "max_position_embeddings": 384,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
# Operators that launch no kernel.
VIEWS = re.compile(r"view|unbind|aten\.t\.|transpose|slice|alias|detach|squeeze|select|flatten|narrow|empty")
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "aten.equal", "masked_select", "unique")


def random_weights(device="cpu"):
    """Return weights of BERT_CONFIG; biases are as large as values, so that a lost or doubled one shows."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            (torch.randn(shape, generator=generator) * (0.3 if name.endswith("bias") else 0.1)).to(device)
            + name.endswith("LayerNorm.weight")
        )
        for name, shape in weight_shapes(BERT_CONFIG).items()
    }


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


class CudaRules(TorchDispatchMode):
    """Refuse what CUDA's kernels refuse and CPU's take, and what makes the host wait; count the launches."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        inputs = list(tensors_in((*args, *(kwargs or {}).values())))
        assert not any(word in name for word in SYNCS), f"{name} waits for the GPU"
        if any(word in name for word in ("layer_norm", "linear", "addmm", "aten.mm", "bmm")):
            dtypes = {tensor.dtype for tensor in inputs}
            assert len(dtypes) == 1, f"{name} gets {dtypes}, and CUDA wants one dtype"
        result = function(*args, **(kwargs or {}))
        # The kernels' random seeds, which are not used, have other devices in PyTorch's fake results.
        outputs = list(tensors_in([result]))[: 1 if "attention" in name else None]
        devices = {tensor.device.type for tensor in (*inputs, *outputs)}
        assert len(devices) == 1, f"{name} copies between host and GPU within the model"
        if not VIEWS.search(name):
            self.launches.append(name)
        return result


def attend(query, key, value, ends, longest, scale):
    """Check and compute what the variable-length kernels do, and leave NaN in the rows that they leave alone."""
    assert ends.dtype == torch.int32 and ends.dim() == 1 and ends.is_contiguous() and ends.device == query.device
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
    places = ends.tolist()
    assert places[0] == 0 and places[-1] <= len(query)
    for start, end in zip(places, places[1:]):
        assert 0 <= end - start <= longest
        if end > start:
            q, k, v = (tensor[start:end].float().transpose(0, 1) for tensor in (query, key, value))
            out[start:end] = scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1).to(query.dtype)
    return out


def flash(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug, *, scale=None, num_splits=None, **others):
    """Stand for FlashAttention: no fp32, head sizes of a multiple of 8 up to 256."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dim() == 3 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert ends_q is ends_k or torch.equal(ends_q, ends_k)
    assert (max_q, max_k, dropout, causal, debug, num_splits) == (384, 384, 0, False, False, 1) and not others
    none = q.new_zeros(0)
    return attend(q, k, v, ends_q, max_q, scale), none, none, none, none


def efficient(q, k, v, bias, ends_q, ends_k, max_q, max_k, dropout, mask, lse=False, *, scale=None, **others):
    """Stand for the memory-efficient kernel: one row of a batch, any dtype."""
    assert q.dim() == 4 and len(q) == 1 and q.shape[-1] % 8 == 0 and bias is None
    assert (max_q, max_k, dropout, mask, lse) == (384, 384, 0, 0, False) and not others
    none = q.new_zeros(0)
    return attend(q[0], k[0], v[0], ends_q, max_q, scale)[None], none, none, none, 0, 0


@contextlib.contextmanager
def kernels():
    """Let the CPU have the variable-length kernels."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", flash)
    library.impl("_efficient_attention_forward", efficient)
    yield
    library._destroy()


class Event:
    """A CUDA event; copies to the host that were launched before it are done when it has been waited for."""

    def __init__(self):
        self.copies = None

    def record(self, stream):
        self.copies, stream.copies = stream.copies, []

    def synchronize(self):
        assert self.copies is not None, "an event is waited for before it is recorded"
        time.sleep(0.002)  # the GPU computes
        for target, values in self.copies:
            target.copy_(values)
        self.copies = None


class Stream:
    """A CUDA stream that fails if two threads launch on it at once; `.copies` to the host wait for an event."""

    current = threading.local()

    def __init__(self, device=None):
        self.device, self.copies, self.owner = device, [], threading.Lock()


@contextlib.contextmanager
def use_stream(stream):
    assert stream.owner.acquire(blocking=False), "two threads launch on one stream at once"
    Stream.current.stream = stream
    try:
        time.sleep(0.001)  # a launch takes time, in which another thread may try to launch
        yield
    finally:
        Stream.current.stream = None
        stream.owner.release()


class Pinned(torch.Tensor):
    """Page-locked memory: a copy to it is done only when the stream's event has been waited for."""

    def copy_(self, source, non_blocking=False):
        if non_blocking:
            Stream.current.stream.copies.append((self, source.clone()))
            return self
        return super().copy_(source)


def capture(call, pool):
    """Stand for a CUDA graph: it computes from the tensors that `call` read, into the result's memory."""
    result = call()
    return lambda: result.copy_(call()), result


def install(monkeypatch, capability=(9, 0), gpus=1, multiprocessors=16):
    """Replace what cuda_bert.py needs of CUDA; the devices are the CPU."""

    def pin(*shape, dtype):
        return torch.zeros(*shape, dtype=dtype).as_subclass(Pinned)

    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": use_stream,
        "graph_pool_handle": lambda: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device=None: "Test GPU",
        "is_available": lambda: True,
        "device_count": lambda: gpus,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name: None)
    monkeypatch.setattr(cuda_bert, "pinned", pin)
    monkeypatch.setattr(cuda_bert, "capture", capture)
    monkeypatch.setattr(cuda_bert, "devices", lambda: [torch.device("cpu")] * gpus)
