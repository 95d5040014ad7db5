"""Define what a backend is, which backends there are, and what a run asks of one.

To add a backend, write a file with a subclass of `Backend` and add its line to BACKENDS; docs/adding-a-backend.md has a
complete example.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import config
from config import UserError

if TYPE_CHECKING:  # numpy
    import numpy as np

    from squad_QSL import Batch

# Which samples a backend wants in one batch: any, only those of one length (padding costs more than a batch gains),
# or one sample alone.
BatchPolicy = Literal["mixed", "same_length", "single"]

# The default limit of a batch. Measured on a CPU, where more tokens gain nothing and 4,096 lose 5 % in fp32.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class RunOptions:
    """Hold what run.py's command line asks for; the defaults here are those of its flags."""

    backend: str = "tf"
    scenario: str = "Offline"
    accuracy: bool = False
    quick: bool = False
    find_peak: bool = False
    max_examples: int | None = None
    report: bool = False
    dtype: str = "fp32"
    reference: bool = False
    batch_tokens: int | None = None
    profile: bool = False
    user_conf: str = "user.conf"
    audit_conf: str | None = None  # None: either of loadgen_conf.AUDIT_FILES if it exists
    network: str | None = None
    node: str = ""
    host: str = "localhost"
    port: int = 8000
    sut_server: tuple[str, ...] = ("http://localhost:8000",)

    @property
    def one_batch_per_core(self) -> bool:
        """Whether a backend on a CPU runs one batch on each of its threads at once: in Offline, on this machine.

        Threads that need not wait for one another lose less time to other processes: PyTorch's int8 gained 5 %, fp32
        in ONNX Runtime and TensorFlow 10 %, ONNX Runtime's int8 up to 50 % on a noisy machine.
        """
        elsewhere = self.network or self.backend.startswith("ray")
        return self.scenario == "Offline" and not self.reference and not elsewhere


class Backend(ABC):
    """Run batches of BERT in one framework; `__init__(options)` raises UserError if the model cannot be used.

    run.py constructs a backend and calls `predict` in one thread and, if the concurrency is above 1, in more threads.
    """

    name: str  # what runs, for people, separated by ", ": framework and version, device, dtype
    batch_policy: BatchPolicy = "mixed"
    concurrency: int = 1  # how many calls of `predict` may run at once
    max_concurrency: int = 1  # above 1: run.py may choose any concurrency up to this with `set_concurrency`
    vocab_size: int | None = None  # tokens that the model knows, None if the model does not tell
    model_path: str | None = None  # the model's file or folder, for the run's record
    batch_tokens: int = BATCH_TOKENS  # the default limit of a batch
    in_flight: int = 1  # of the `concurrency`, how many calls share a device, which computes one of them at a time
    gpu: str | None = None  # the GPUs that compute, for the run's record
    same_bytes: bool | None = None  # whether no response depends on its batch, if the backend has checked this machine
    dtype: str | None = None  # of the matrix products, for the run's record; None: the one that `options` asks for

    @classmethod
    def prepare(cls, options: RunOptions) -> dict[str, Any]:
        """Return keyword arguments for `__init__` that Ray's driver computes once for all copies of the backend."""
        return {}

    @abstractmethod
    def predict(self, batch: Batch) -> np.ndarray:
        """Return the start and end logits of every token, sample after sample without padding: float32 (tokens, 2)."""

    def set_concurrency(self, calls: int) -> None:
        """Prepare for `calls` calls of `predict` at once, 1 to `max_concurrency`; never called during a run."""
        self.concurrency = calls

    def node_names(self) -> str | None:
        """Return the names of the servers that compute, for LoadGen's log; None if this machine does."""
        return None

    def close(self) -> None:  # noqa: B027 - most backends have nothing to end
        """End what would outlive the process; other threads may be inside `predict`, but nobody needs their results."""


class Entry(NamedTuple):
    """Where a backend is defined and which dtypes it has."""

    module: str
    class_name: str
    dtypes: tuple[str, ...]

    def backend_class(self) -> type[Backend]:
        """Import the module and return the class."""
        found: type[Backend] = getattr(importlib.import_module(self.module), self.class_name)
        return found


# --backend's names. The packages that a backend needs are in requirements/NAME.txt.
BACKENDS = {
    "tf": Entry("tf_SUT", "TensorFlowBackend", ("fp32",)),
    "pytorch": Entry("pytorch_SUT", "PyTorchBackend", ("fp32", "bf16", "fp16", "int8")),
    "onnxruntime": Entry("onnxruntime_SUT", "OnnxRuntimeBackend", ("fp32", "fp16", "int8")),
    "openvino": Entry("openvino_SUT", "OpenVinoBackend", ("fp32", "bf16", "fp16", "int8")),
}
DTYPES = tuple(dict.fromkeys(dtype for entry in BACKENDS.values() for dtype in entry.dtypes))
# These run a backend of BACKENDS on other machines: on the actors of a Ray cluster, on the servers of --sut_server.
RAY_ACTORS = Entry("ray_SUT", "RayBackend", ())
NETWORK = Entry("network_LON", "NetworkBackend", ())
# Backends of the MLPerf reference that this project refuses: the reason and the remedy.
REFUSED = {"tf_estimator": "TensorFlow has removed Estimator; use --backend=tf"}
# --backend=ray…: the backend that Ray's actors run.
RAY = {"ray": "pytorch"} | {f"ray:{name}": name for name in BACKENDS}


def load_backend(options: RunOptions) -> Backend:
    """Return the backend that `options` asks for, with its model loaded. Raises UserError."""
    if options.network == "lon":
        return NETWORK.backend_class()(options)  # type: ignore[call-arg] # see Backend's docstring
    if options.backend in REFUSED:
        raise UserError(f"--backend={options.backend}: {REFUSED[options.backend]}")
    if options.profile and options.backend != "onnxruntime":
        raise UserError(f"--profile is for --backend=onnxruntime, not {options.backend}; leave it out")
    name = RAY.get(options.backend, options.backend)
    entry = BACKENDS[name]
    if options.dtype not in entry.dtypes:
        known = ", ".join(entry.dtypes)
        raise UserError(f"--backend={options.backend} runs in {known}, not {options.dtype}; give another --dtype")
    if options.reference and name == "pytorch":
        entry = entry._replace(class_name="PyTorchReference")
    try:
        if options.backend in RAY:
            return RAY_ACTORS.backend_class()(name, entry.backend_class(), options)  # type: ignore[call-arg]
        return entry.backend_class()(options)  # type: ignore[call-arg]
    except Exception as error:
        fault = config.import_fault(error)
        if fault is None:
            raise
        package, reason = fault
        target = "ray" if package == "ray" else name
        needs = f"--backend={options.backend} needs the package {package}"
        if line := config.out_of_memory(error):
            raise UserError(f"{needs}: {line}") from None
        if reason:
            remedy = f"remove .venv and run `make venv BACKEND={target}` again"
            raise UserError(f"{needs}, which is installed but broken ({reason}); {remedy}") from None
        raise UserError(f"{needs}; `make venv BACKEND={target}` installs it") from None


def warm_up(backend: Backend, batch: Batch) -> None:
    """Run a backend for the first time, on `batch`. Raises UserError, in one line, whatever the framework raises."""
    try:
        backend.predict(batch)
    except UserError:
        raise
    except Exception as error:
        fault = config.out_of_memory(error) or f"its first prediction failed ({config.first_line(error)})"
        raise UserError(f"{backend.model_path or backend.name}: {fault}") from error
