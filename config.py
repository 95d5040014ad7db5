"""Define what several scripts share: default paths, environment variables, file helpers and how a command ends.

Paths are relative to the folder that a script is started in, as in the MLPerf BERT reference; `make` and MLCommons'
automation start every script in the project's folder.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import IO, Any, NoReturn

ROOT = os.path.dirname(os.path.abspath(__file__))  # the project's folder
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
LOG_DIR = f"{BUILD_DIR}/logs"
CALIBRATION = f"{BUILD_DIR}/data/bert_calibration_features.txt"  # one of MLPerf's two calibration lists
PREDICTIONS = f"{BUILD_DIR}/result/predictions.json"
BERT_CONFIG = os.path.join(ROOT, "bert_config.json")  # BERT-Large's configuration

SCENARIOS = ("SingleStream", "Offline", "Server", "MultiStream")
# Names of a graph's inputs (ids, mask, segments): those of MLPerf's fp32 file, of its int8 file, of TensorFlow Hub.
ONNX_INPUTS = (
    ("input_ids", "input_mask", "segment_ids"),
    ("input_ids", "attention_mask", "token_type_ids"),
    ("input_word_ids", "input_mask", "input_type_ids"),
)
MAX_THREADS = 1024  # more than any machine has cores; with far more, PyTorch crashes without an error message

# Environment variables that name a run's files, and those that change how it computes. docs/running.md explains them.
FILE_VARIABLES = ("ML_MODEL_FILE_WITH_PATH", "VOCAB_FILE", "DATASET_FILE", "CALIBRATION_FILE")
TF_THREADS = ("TF_INTRA_OP_PARALLELISM_THREADS", "TF_INTER_OP_PARALLELISM_THREADS")
THREADS = ("MLC_MAX_NUM_THREADS", "OMP_NUM_THREADS", *TF_THREADS)
COMPUTE_VARIABLES = ("USE_GPU", "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", *THREADS)

log = logging.getLogger("bert")


class UserError(Exception):
    """Report input that cannot be used, in one line: which file or value, what is wrong, what to do."""


def log_progress(text: str) -> None:
    """Log what the command is doing."""
    log.info("%s", text)  # the "%s" because `text` may hold one


def notice(text: str) -> None:
    """Log something that the user should know although the command continues."""
    log.warning("notice: %s", text)


def env(name: str, default: str) -> str:
    """Return the environment variable `name`, or `default` if it is unset or empty."""
    return os.environ.get(name) or default


def model_path(backend: str, dtype: str) -> str:
    """Return the path of the model that `backend` (a key of backends.BACKENDS) runs in `dtype`."""
    onnx = ONNX_INT8_MODEL if dtype == "int8" else ONNX_MODEL
    return env("ML_MODEL_FILE_WITH_PATH", {"pytorch": PYTORCH_MODEL, "tf": TF_MODEL}.get(backend, onnx))


def require_model_file(path: str) -> None:
    """Raise UserError unless the model file `path` exists and is not a file that only stands for it."""
    if not os.path.isfile(path):
        fault = "a folder; name the model file in it" if os.path.isdir(path) else "no such model file"
        remedy = "`make setup` fetches BERT-Large, ML_MODEL_FILE_WITH_PATH names another"
        raise UserError(f"{path}: {fault}; {remedy}")
    try:
        with open(path, "rb") as file:
            start = file.read(100).lstrip().lower()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); correct its permissions") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; `git lfs pull` fetches the file")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: a web page was saved in place of the file; download the file itself")


def dataset_files() -> tuple[str, str]:
    """Return the paths of the data set and of the vocabulary."""
    return env("DATASET_FILE", DATASET), env("VOCAB_FILE", VOCAB)


def onnx_inputs(path: str, found: Collection[str]) -> tuple[str, str, str]:
    """Return those of the input names `found` in the file `path` that are the ids, the mask and the segments.

    Each may have any of its names in ONNX_INPUTS, with ":0" as in TensorFlow or without. Raises UserError if one is
    missing, or if there is another input.
    """
    names = [[name for name in found if name.removesuffix(":0") in known] for known in zip(*ONNX_INPUTS)]
    if [len(each) for each in names] == [1, 1, 1] and len(found) == 3:
        return names[0][0], names[1][0], names[2][0]
    expected = " or ".join(map(", ".join, ONNX_INPUTS[:2]))
    inputs = ", ".join(found) or "none"
    raise UserError(f"{path}: the inputs are {inputs}; expected {expected}; `make convert` writes such files")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a command's docstring as it is written."""
    prog = command_name() if command_name().endswith(".py") else f"python3 -m {command_name()}"
    return argparse.ArgumentParser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive_int(text: str) -> int:
    """Return `text` as an integer above 0. Raises argparse.ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def thread_limit(name: str) -> int | None:
    """Return the environment variable `name`, 1 to MAX_THREADS, or None if it is unset or empty. Raises UserError."""
    text = os.environ.get(name)
    try:
        threads = positive_int(text) if text else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}; correct or unset it") from None
    if threads and threads > MAX_THREADS:
        raise UserError(f"{name}: {threads} threads are more than {MAX_THREADS}; set one per core, or unset it")
    return threads


def cores() -> int:
    """Return how many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Return how many threads a backend may use: MLC_MAX_NUM_THREADS, or one per core. Raises UserError."""
    return thread_limit("MLC_MAX_NUM_THREADS") or cores()


def cpu_flags() -> list[str]:
    """Return the instruction sets of this processor by Linux's names, such as avx512f; none on another system."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []


def use_gpu() -> bool:
    """Return whether the environment allows a GPU: USE_GPU is not 0, false, off or no."""
    return os.environ.get("USE_GPU", "").strip().lower() not in ("0", "false", "off", "no")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException | str) -> str:
    """Return the last line of an exception's message or of a text, or the type's name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def file_digest(path: str, algorithm: str = "sha256") -> str:
    """Return the digest of a file in hexadecimal. Raises UserError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None


def read_text(path: str, what: str, remedy: str, encoding: str = "utf-8") -> str:
    """Return the text of the file `path`, which holds `what`. Raises UserError, which ends with `remedy`."""
    try:
        with open(path, encoding=encoding) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read {what} ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not {encoding} text ({error.reason}); {remedy}") from None


def read_json(path: str, what: str, remedy: str, encoding: str = "utf-8") -> Any:
    """Return the content of the JSON file `path`, which holds `what`. Raises UserError, which ends with `remedy`."""
    text = read_text(path, what, remedy, encoding)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not valid JSON ({error}); {remedy}") from None


@contextlib.contextmanager
def atomic_write(path: str, remedy: str) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block succeeds, and make the folder if it is missing.

    Raises UserError, which ends with `remedy`, if the file cannot be written.
    """
    target = os.path.realpath(path)  # a symbolic link stays, and a device such as /dev/null is written directly
    device = os.path.exists(target) and not os.path.isfile(target)
    part = target if device else f"{target}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(part, "wb") as file:
            yield file
        if not device:
            os.replace(part, target)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror or error}); {remedy}") from None
    finally:
        if not device:
            with contextlib.suppress(OSError):
                os.unlink(part)


def write_json(path: str, value: Any, remedy: str) -> None:
    """Write `value` to the JSON file `path` atomically. Raises UserError, which ends with `remedy`."""
    with atomic_write(path, remedy) as file:
        file.write(json.dumps(value, indent=1).encode())


def out_of_memory(error: BaseException) -> str | None:
    """Return one line for an exception by which a framework reports that memory ran out, None for any other."""
    line = first_line(error)
    if not isinstance(error, MemoryError) and "allocat" not in line and "out of memory" not in line:
        return None
    return f"out of memory ({line}); free some, or use a smaller model or fewer --batch_tokens"


def command_name() -> str:
    """Return the name of this process's command: "run.py", or "tools.report" for `python3 -m tools.report`."""
    path = os.path.relpath(sys.argv[0] or "python", ROOT).removesuffix("__main__.py").rstrip(os.sep)
    if path.startswith(("convert", "demo", "tools")):
        return path.removesuffix(".py").replace(os.sep, ".")
    return os.path.basename(path)


def end_process(message: str, status: int) -> NoReturn:
    """Write `message` to standard error and end the process at once, also if threads are inside native code."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{command_name()}: {message}\n")
        sys.stderr.flush()
    os._exit(status)


def import_fault(error: BaseException) -> tuple[str, str] | None:
    """Return (package, reason) if `error` came from the import of a package, None for any other exception.

    The reason is "" if the package is not installed; a package that is installed but broken may raise any exception.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return error.name, ""
    package = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    importing = ""  # the package that the last of the project's own files imports
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = os.path.abspath(frame.f_code.co_filename)
        if path.startswith(ROOT + os.sep) and "site-packages" not in path:
            importing = ""
        elif frame.f_code.co_name == "<module>" and not importing:
            importing = str(frame.f_globals["__name__"]).split(".")[0]
    package = importing or package
    return (package, first_line(error)) if package else None


def report_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write one line for a package that cannot be imported, else the exception's traceback; for sys.excepthook."""
    fault = import_fault(error)
    if fault is None:
        sys.__excepthook__(kind, error, trace)
        return
    package, reason = fault
    state, remedy = f"is installed but broken ({reason})", "remove .venv and run `make venv BACKEND=…` again"
    if not reason:
        state, remedy = "is not installed", "`make venv BACKEND=…` installs what a command needs into .venv"
    sys.stderr.write(f"{command_name()}: error: the package {package} {state}; {remedy}; use .venv/bin/python\n")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` as a command, with progress and notices on standard error; a UserError becomes exit status 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # TensorFlow installs a handler on the root logger, which would repeat every line
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"{command_name()}: error: {error}")
    except KeyboardInterrupt:
        # 128 + SIGINT, as a shell reports it; at once, because a thread that is loading a model would abort the exit
        end_process("interrupted", 130)
    except Exception as error:
        if line := out_of_memory(error):
            sys.exit(f"{command_name()}: error: {line}")
        if not import_fault(error):
            raise
        report_missing_package(type(error), error, None)
        sys.exit(1)
