"""Define what several scripts share: default paths, environment variables, file helpers and how a command ends.

Paths are relative to the folder that a script is started in, as in the MLPerf BERT reference; `make` and MLCommons'
automation start every script in the project's folder.
"""

import argparse
import codecs
import contextlib
import functools
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, NoReturn, TextIO

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


@functools.cache  # so that a command asks the hub once
def local_model(model: str) -> str:
    """Return the path `model`, or that of the local copy if it names a model of Hugging Face's hub: hf://ORG/NAME.

    models/hub.py describes these names and fetches the model. Raises UserError if that fails.
    """
    if not model.startswith("hf://"):
        return model
    from models.hub import HubError, fetch  # not at the top, because Ray's nodes do not have the folder

    try:
        path, remark = fetch(model)
    except HubError as error:
        raise UserError(f"{model}: {error}") from None
    log_progress(f"{model} is {path}")
    if remark:
        notice(f"{model}: {remark}")
    return path


def model_path(backend: str, dtype: str) -> str:
    """Return the path of the model that `backend` (a key of backends.BACKENDS) runs in `dtype`. Raises UserError."""
    onnx = ONNX_INT8_MODEL if dtype == "int8" else ONNX_MODEL
    default = {"pytorch": PYTORCH_MODEL, "tf": TF_MODEL}.get(backend, onnx)
    return local_model(env("ML_MODEL_FILE_WITH_PATH", default))


# What the help of a command says of the flags that it passes to `dataset_files`.
DATASET_DEFAULT = f"(default: DATASET_FILE, or {DATASET})"
VOCAB_DEFAULT = f"(default: VOCAB_FILE, or the one beside the model, or {VOCAB})"


def dataset_files(dataset: str | None = None, vocab_file: str | None = None) -> tuple[str, str]:
    """Return the paths of the data set and of the vocabulary; a command passes those that its flags name.

    Without a flag, DATASET_FILE and VOCAB_FILE name them. Without VOCAB_FILE it is the vocab.txt beside the model of
    ML_MODEL_FILE_WITH_PATH, or else BERT-Large's. Raises UserError if a model of the hub cannot be fetched.
    """
    dataset, vocab_file = dataset or env("DATASET_FILE", DATASET), vocab_file or env("VOCAB_FILE", "")
    if not vocab_file and (model := env("ML_MODEL_FILE_WITH_PATH", "")):
        vocab_file = vocab_beside(local_model(model)) or ""
    return dataset, vocab_file or VOCAB


@functools.cache  # so that a command says it once
def vocab_beside(model: str) -> str | None:
    """Return the path of the vocab.txt in the folder of `model` (a path) and say that it is used; None without one."""
    folder = model if os.path.isdir(model) else os.path.dirname(model)
    # Exporters write onnx/model.onnx beside the vocabulary.
    for place in (folder, os.path.dirname(folder)) if os.path.basename(folder) == "onnx" else (folder,):
        if os.path.isfile(path := os.path.join(place, "vocab.txt")):
            log_progress(f"using the vocabulary beside the model, {path}; VOCAB_FILE names another")
            return path
    return None


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


def sample_limit(text: str) -> int | None:
    """Return `text` as a number of samples; 0 is None, all of them, as in the MLPerf reference.

    Raises argparse.ArgumentTypeError for anything but a whole number.
    """
    return None if text == "0" else positive_int(text)


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


def first_line(error: BaseException | str) -> str:
    """Return the first line of an exception's message or of a text, or the type's name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException | str) -> str:
    """Return the last line of an exception's message or of a text, or the type's name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def printable(text: str) -> str:
    """Return `text` in one line: line ends, control characters and bytes that are not Unicode become escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def out_of_memory(error: BaseException) -> str | None:
    """Return one line for an exception by which a package reports that memory ran out, None for any other."""
    cause: BaseException | None = error
    while cause:  # numpy raises an ImportError from that of its library
        line = first_line(cause)
        # "failed to map segment" is the dynamic linker's message if a library does not fit
        found = any(words in line for words in ("allocat", "bad_alloc", "out of memory", "failed to map segment"))
        if found or isinstance(cause, MemoryError):
            remedy = "free some, raise `ulimit -v`, or use a smaller model or fewer --batch_tokens"
            return f"out of memory ({line}); {remedy}"
        cause = cause.__cause__
    return None


def failure_line(error: BaseException) -> str:
    """Return one line for the exception that ended a run; print the traceback if it is not a user's mistake."""
    if line := out_of_memory(error):
        return line
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"the run failed: {type(error).__name__}: {error}"


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
    if isinstance(error, KeyboardInterrupt):
        end_process("interrupted", 130)  # as in `run_command`
    fault = import_fault(error)
    if fault and (line := out_of_memory(error)):
        sys.stderr.write(f"{command_name()}: error: the package {fault[0]}: {line}\n")
        return
    if fault is None:
        sys.__excepthook__(kind, error, trace)
        return
    package, reason = fault
    state, remedy = f"is installed but broken ({reason})", "remove .venv and run `make venv BACKEND=…` again"
    if not reason:
        state, remedy = "is not installed", "`make venv BACKEND=…` installs what a command needs into .venv"
    sys.stderr.write(f"{command_name()}: error: the package {package} {state}; {remedy}; use .venv/bin/python\n")


def prepare_process() -> None:
    """Prepare what no package may find missing: open standard streams, and a working folder.

    A file that is opened while a stream is closed, such as a log, would get its number. Some packages crash in a
    working folder that was deleted.
    """
    sys.excepthook = report_missing_package
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the working folder was deleted; change to another")


class StandardStream(io.FileIO):
    """Write to standard output or error; a write that fails loses the text, but does not end the command's work."""

    fault: OSError | None = None  # of the first write that failed

    def write(self, data: Any) -> int:
        """Write bytes and return how many were taken; all of them if the write fails."""
        try:
            return super().write(data)
        except OSError as error:
            self.fault = self.fault or error
            return memoryview(data).nbytes


def escape(error: UnicodeError) -> tuple[bytes, int]:
    """Return what stands for characters that a stream's encoding lacks: a file name's own bytes, or an escape."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    try:
        return text.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def forgiving(stream: TextIO | None) -> Any:
    """Return a stream like `stream`, standard output or error, on which no write fails."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    codecs.register_error("escape", escape)
    file: Any = StandardStream(stream.fileno(), "w", closefd=False)
    binary = file if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(file)
    lines, through = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(binary, stream.encoding, "escape", line_buffering=lines, write_through=through)


def output_fault() -> OSError | None:
    """Return the fault of the first write to standard output that failed, None if all could be written."""
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    fault: OSError | None = getattr(getattr(binary, "raw", binary), "fault", None)
    return fault


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` as a command, with progress and notices on standard error; a UserError becomes exit status 1.

    If standard output or error cannot be written, the work is done all the same. Then the exit status is 141 if nobody
    reads standard output, 1 if it cannot hold all of it, and not affected by standard error.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = forgiving(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = forgiving(sys.stderr)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # TensorFlow installs a handler on the root logger, which would repeat every line
    end: Any  # an exit status, or a line
    try:
        end = main()
    except SystemExit as error:
        end = error.code
    except UserError as error:
        end = f"{command_name()}: error: {error}"
    except KeyboardInterrupt:
        # 128 + SIGINT, as a shell reports it; at once, because a thread that is loading a model would abort the exit
        end_process("interrupted", 130)
    except Exception as error:
        if import_fault(error):
            report_missing_package(type(error), error, None)
            end = 1
        elif line := out_of_memory(error):
            end = f"{command_name()}: error: {line}"
        else:
            raise
    fault = output_fault()
    if isinstance(fault, BrokenPipeError):
        end = end or 128 + signal.SIGPIPE  # silently, as other programs do: the reader has seen enough
    elif fault:
        sys.stderr.write(f"{command_name()}: error: standard output: cannot write all of it ({fault.strerror})\n")
        end = end or 1
    sys.exit(end)


prepare_process()  # here, because modules import their packages before `run_command` runs
