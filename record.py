"""What LoadGen's logs do not know of a run: record.json beside them, written by run.py and read by report.py."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import config
from config import UserError

if TYPE_CHECKING:  # numpy and LoadGen
    from squad_SUT import Backend

RECORD = "record.json"
# Where the environment decides something, README says what.
VARIABLES = ("ML_MODEL_FILE_WITH_PATH", "VOCAB_FILE", "DATASET_FILE", "CALIBRATION_FILE", "USE_GPU",
             "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "MLC_MAX_NUM_THREADS", "TF_INTRA_OP_PARALLELISM_THREADS",
             "TF_INTER_OP_PARALLELISM_THREADS")
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers", "tensorflow", "onnxruntime", "openvino")


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu() -> str | None:
    """The name of the GPU that PyTorch sees, None where it is not loaded or sees none."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() and config.use_gpu() else None


def revision() -> str | None:
    """The commit of this project, with "-dirty" behind it where files were changed; None outside a git checkout."""
    try:
        result = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always",
                                 "--dirty", "--exclude=*", "--abbrev=40"],
                                capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def describe(args: argparse.Namespace, backend: Backend, batch_tokens: int) -> dict[str, Any]:
    """The record of a run that is about to start: `args` are run.py's, `batch_tokens` the most tokens of a batch."""
    dataset, vocab_file = config.dataset_files()
    model = getattr(backend, "path", None)
    return {
        "started": now(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "backend": backend.name,
        "dtype": args.dtype,
        "batch_tokens": int(batch_tokens),
        "workers": backend.workers,
        "model": model and os.path.abspath(model),
        "dataset": os.path.abspath(dataset),
        "max_examples": args.max_examples,
        "vocab": os.path.abspath(vocab_file),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "processor": processor(),
        "cores": config.cores(),
        "gpu": gpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
        "revision": revision(),
    }


def finish(record: dict[str, Any]) -> None:
    """Add to the record of a run that has ended when that was, and the model's md5 (3 s for BERT-Large's file)."""
    record["finished"] = now()
    if record["model"] and os.path.isfile(record["model"]):
        with open(record["model"], "rb") as file:
            record["model_md5"] = hashlib.file_digest(file, "md5").hexdigest()


def write(folder: str, record: dict[str, Any]) -> None:
    """Write `record` as record.json in `folder`. Raises UserError where it cannot."""
    path = os.path.join(folder, RECORD)
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    except OSError as error:
        raise UserError(f"{path}: cannot write the run's record ({error.strerror}); free disk or name another folder "
                        "with LOG_PATH") from None


def read(folder: str) -> dict[str, Any]:
    """The record in `folder`, {} where there is none. Raises UserError where it is damaged."""
    path = os.path.join(folder, RECORD)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the run's record is damaged ({error}); remove it to do without") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: the run's record is no JSON object; remove it to do without")
    return record
