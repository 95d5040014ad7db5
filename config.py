"""Facts that several scripts share: default paths, environment variables, how a script ends.

Paths are relative to the folder a script is started in, as in the MLPerf BERT reference;
`make` and MLCommons' automation start every script in the project's folder.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection
from typing import NoReturn

BUILD_DIR = "build"
MODEL_DIR = f"{BUILD_DIR}/data/bert_tf_v1_1_large_fp32_384_v2"  # the reference's name for all BERT-Large files
CACHE_DIR = f"{BUILD_DIR}/cache"
DATASET = f"{BUILD_DIR}/data/dev-v1.1.json"
VOCAB = f"{MODEL_DIR}/vocab.txt"
TF_CHECKPOINT = f"{MODEL_DIR}/model.ckpt-5474"  # without .index
TF_MODEL = f"{MODEL_DIR}/model.pb"
PYTORCH_MODEL = f"{MODEL_DIR}/model.pytorch"
ONNX_MODEL = f"{MODEL_DIR}/model.onnx"
ONNX_INT8_MODEL = f"{MODEL_DIR}/bert_large_v1_1_fake_quant.onnx"
# What an ONNX file's inputs are called, ids, mask, segments: the first as in MLPerf's fp32 file, the second as in its
# int8 file.
ONNX_INPUTS = ("input_ids", "input_mask", "segment_ids"), ("input_ids", "attention_mask", "token_type_ids")
LOG_DIR = f"{BUILD_DIR}/logs"
CALIBRATION = f"{BUILD_DIR}/data/bert_calibration_features.txt"  # one of MLPerf's two lists for int8
ACCURACY_LOG = "mlperf_log_accuracy.json"  # LoadGen's name, inside the log folder
PREDICTIONS = f"{BUILD_DIR}/result/predictions.json"
MOST_THREADS = 1024  # more than any machine has cores; with too many, PyTorch dies without a word
BERT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bert_config.json")  # BERT-Large's sizes


class UserError(Exception):
    """What a user gave cannot be used. The message is one line: which file or value, what is wrong, what to do."""


def env(name: str, default: str) -> str:
    """The environment variable `name`; `default` where it is not set or empty."""
    return os.environ.get(name) or default


def onnx_model(dtype: str) -> str:
    """The path of the ONNX model to run in `dtype`."""
    return env("ML_MODEL_FILE_WITH_PATH", ONNX_INT8_MODEL if dtype == "int8" else ONNX_MODEL)


def model(backend: str, dtype: str) -> str:
    """The path of the model that `--backend=backend` runs in `dtype`."""
    own = {"pytorch": PYTORCH_MODEL, "tf": TF_MODEL}
    return env("ML_MODEL_FILE_WITH_PATH", own[backend]) if backend in own else onnx_model(dtype)


def onnx_inputs(path: str, found: Collection[str]) -> tuple[str, str, str]:
    """The one of ONNX_INPUTS that the names `found` in the file `path` are, in any order. Raises UserError."""
    for names in ONNX_INPUTS:
        if set(names) == set(found):
            return names
    raise UserError(f"{path}: the inputs are {', '.join(found)}, not {' or '.join(map(', '.join, ONNX_INPUTS))}; "
                    "bert_tf_to_pytorch.py and quantize_bert.py make files that fit")


def dataset_files() -> tuple[str, str]:
    """The paths of the data set and of the vocabulary."""
    return env("DATASET_FILE", DATASET), env("VOCAB_FILE", VOCAB)


def count(text: str) -> int:
    """`text` as an integer above 0, for argparse. Raises argparse.ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def env_threads(name: str) -> int | None:
    """How many threads the environment variable `name` asks for, None where it is not set or empty.

    Raises UserError for anything but a number from 1 to MOST_THREADS.
    """
    text = os.environ.get(name)
    try:
        threads = count(text) if text else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}; correct or unset it") from None
    if threads and threads > MOST_THREADS:
        raise UserError(f"{name}: {threads} threads are more than {MOST_THREADS}; give one for each core, or unset it")
    return threads


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads a backend may use: MLC_MAX_NUM_THREADS, else one for each core. Raises UserError."""
    return env_threads("MLC_MAX_NUM_THREADS") or cores()


def side_by_side(args: argparse.Namespace) -> bool:
    """Whether a backend on a CPU is to run a batch on each of its threads at once; `args` are run.py's.

    In Offline, which has batches enough. Threads that need not wait for one another lose less to whatever else the
    machine does: int8 gained 5 % in PyTorch and, in ONNX Runtime, nothing in a quiet minute and 50 % in a noisy one;
    fp32 gained 10 % there and in TensorFlow.
    A server and an actor of Ray get one batch after another, of any scenario.
    """
    return args.scenario == "Offline" and not args.reference and not args.network and not args.backend.startswith("ray")


def use_gpu() -> bool:
    """Whether the environment allows a GPU: USE_GPU is unset or anything but 0, false, off or no."""
    return os.environ.get("USE_GPU", "").strip().lower() not in ("0", "false", "off", "no")


def memory_fault(error: BaseException) -> str | None:
    """One line for an `error` by which a framework says that memory ran out; None for any other."""
    line = (str(error).splitlines() or [""])[0]
    if not isinstance(error, MemoryError) and "allocat" not in line and "out of memory" not in line:
        return None
    return f"out of memory ({line or type(error).__name__}); free some, or take a smaller model or --batch_tokens"


def script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` as a command: a UserError becomes one line on standard error and exit status 1."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: the package {error.name} is not installed; "
                 "`make venv` makes .venv, start this with .venv/bin/python")
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
        # 128 + SIGINT, as a shell reports it; at once, since a thread that still loads a model would abort the exit
        os._exit(130)
    except (MemoryError, RuntimeError) as error:
        if fault := memory_fault(error):
            sys.exit(f"{os.path.basename(sys.argv[0])}: error: {fault}")
        raise
