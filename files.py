"""Read and write files: each read or write that fails is one line, and no file of a user is replaced by mistake."""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from config import UserError, first_line, log_progress, notice, printable

# What flock reports on a file system without locks: Lustre, some NFS (EBADF: it locks only files open for writing).
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)
ANOTHER = "work in another folder"

Recognizer = Callable[[str], bool]  # tells whether the file at a path is of a kind


def file_start(path: str) -> bytes:
    """Return the first 4,096 bytes of a file."""
    with open(path, "rb") as file:
        return file.read(4096)


def starts(pattern: bytes) -> Recognizer:
    """Return the recognizer of files whose first bytes match the regular expression `pattern`."""
    return lambda path: re.match(pattern, file_start(path), re.DOTALL) is not None


def ends(last: bytes) -> Recognizer:
    """Return the recognizer of files that end with the bytes `last`."""

    def matches(path: str) -> bool:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - len(last)))
            return file.read() == last

    return matches


def json_object(check: Callable[[dict[str, Any]], bool]) -> Recognizer:
    """Return the recognizer of files that hold a JSON object for which `check` is true."""

    def matches(path: str) -> bool:
        if not file_start(path).lstrip().startswith(b"{"):
            return False
        with contextlib.suppress(ValueError, RecursionError), open(path, encoding="utf-8") as file:
            return check(json.load(file))
        return False

    return matches


def with_keys(*keys: str) -> Recognizer:
    """Return the recognizer of files that hold a JSON object with these keys."""
    return json_object(lambda value: value.keys() >= set(keys))


def is_answers(path: str) -> bool:
    """Tell whether a file holds answers: as `write_json` lays them out, or with SQuAD's question ids as keys.

    A JSON object of strings alone may be anything, such as a user's settings.
    """
    ours = starts(rb'\{(\n "|\})')(path)

    def check(answers: dict[str, Any]) -> bool:
        known = ours or all(re.fullmatch(r"[0-9a-f]{24}", key) for key in answers)
        return known and all(isinstance(answer, str) for answer in answers.values())

    return json_object(check)(path)


# The caches that commands name themselves, by a digest. They are made again, whatever damaged them.
CACHE_NAME = re.compile(r"(features|int8)-[0-9a-f]{16}\.npz")
# In a zip file, the first member's name begins at byte 30.
ZIP = rb"PK\x03\x04.{26}"
KINDS: dict[str, Recognizer] = {
    "a new file": lambda path: False,
    "a cache": lambda path: bool(CACHE_NAME.fullmatch(os.path.basename(path))) or starts(ZIP + rb"key\.npy")(path),
    "a file of features": starts(ZIP + rb"input_ids\.npy"),
    "a PyTorch state dict": starts(ZIP + rb"[^/]+/(data\.pkl|\.format_version)|\x80\x02\x8a\nl\xfc\x9cF\xf9"),
    # Protocol buffers. ONNX: the field ir_version and the next field; TensorFlow: a first node's name and operator.
    "an ONNX model": starts(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]"),
    "a TensorFlow graph": starts(rb"\n.{1,5}\n.[\w./-]+\x12.[A-Z]\w+"),
    "the index of a TensorFlow checkpoint": ends(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"),  # its table's magic number
    "a safetensors file": starts(rb".{5}\0\0\0\{"),  # the header's size, then the header
    "a vocabulary of BERT": starts(rb"\[PAD\]\r?\n"),
    "a configuration of BERT": with_keys("hidden_size", "num_hidden_layers"),
    "a SQuAD file": with_keys("version", "data"),
    "a file of answers": is_answers,
    "a run's record": with_keys("started", "command", "backend"),
    "a run's inputs": with_keys("args", "model"),
    "a report": starts(rb"<!DOCTYPE html>.*BERT on SQuAD under LoadGen</title>"),
    "a chart": starts(rb"\x89PNG.*Matplotlib"),
    "a calibration list": starts(rb"\d+\n"),
    "a benchmark's table": starts(rb"\| run "),
    "a benchmark's results": with_keys("note", "rows"),
    "the GPU check's logits": starts(ZIP + rb"\d+\.npy"),
    "the GPU check's settings": starts(rb"\*\.Server\.target_qps = "),
    "the GPU check's results": json_object(lambda value: {dict} == set(map(type, value.values()))),
    "the GPU check's table": starts(rb"\| part "),
}


def require_model_file(path: str) -> None:
    """Raise UserError unless the model file `path` exists and is not a file that only stands for it."""
    if not os.path.isfile(path):
        fault = "a folder; name the model file in it" if os.path.isdir(path) else "no such model file"
        remedy = "`make setup` fetches BERT-Large, ML_MODEL_FILE_WITH_PATH names another"
        raise UserError(f"{path}: {fault}; {remedy}")
    try:
        refuse_placeholder(path, file_start(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); correct its permissions") from None


def require_utf8(path: str) -> None:
    """Raise UserError if the name `path` cannot be given to a library that takes names in UTF-8 only.

    In a locale of ASCII, Python reads all other characters of a name as bytes that are not Unicode.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        name = f"{printable(path)}: this name is not UTF-8, or the locale is not"
        raise UserError(f"{name}; rename it, or set LC_ALL=C.UTF-8") from None


def file_digest(path: str, algorithm: str = "sha256", *more: str) -> str:
    """Return the digest of a file in hexadecimal, or of several as if they were one. Raises UserError."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for name in (path, *more):
        try:
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{name}: cannot read it ({error.strerror})") from None
    return digest.hexdigest()


def refuse_placeholder(path: str, start: bytes) -> None:
    """Raise UserError if `start`, a file's first bytes, shows that a failed download left something in its place."""
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; `git lfs pull` fetches the file")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", start, re.IGNORECASE):
        raise UserError(f"{path}: a web page was saved in place of the file; download the file itself")


def read_text(
    path: str, what: str, remedy: str, encoding: str = "utf-8", errors: str = "strict", newline: str | None = None
) -> str:
    """Return the text of the file `path`, which holds `what`; `errors` and `newline` are those of open().

    Raises UserError, which ends with `remedy`.
    """
    try:
        with open(path, encoding=encoding, errors=errors, newline=newline) as file:
            text = file.read()
        refuse_placeholder(path, text[:100].encode(errors="replace"))
        return text
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


def read_toml(path: str, what: str, remedy: str) -> dict[str, Any]:
    """Return the content of the TOML file `path`, which holds `what`. Raises UserError, which ends with `remedy`."""
    if sys.version_info >= (3, 11):  # noqa: UP036 - of Python 3.10, too
        import tomllib  # novermin
    else:  # the same parser as a package
        import tomli as tomllib
    text = read_text(path, what, remedy)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for a number of 5,000 digits
        raise UserError(f"{path}: {what} is not TOML ({printable(first_line(error))}); {remedy}") from None


def require_replaceable(path: str, kind: str, remedy: str) -> None:
    """Raise UserError, which ends with `remedy`, if the file `path` holds something that is not of `kind`.

    `kind` is a key of KINDS. A command whose output follows much work calls this before the work, too.
    """
    try:
        if os.path.isfile(path) and os.path.getsize(path) and not KINDS[kind](path):
            raise UserError(f"{path}: exists and is not {kind}, so it is not replaced; {remedy}")
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); {remedy}") from None


@contextlib.contextmanager
def disk_faults(folder: str) -> Iterator[None]:
    """Raise UserError for an OSError in the block, which writes below `folder`."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or folder  # the last one is the file that could not be written
        raise UserError(f"{name}: {error.strerror or error}; free disk space or correct permissions") from None


def require_different_files(output: str, *others: str) -> None:
    """Raise UserError if the file `output` is one of `others`, a command's inputs and other outputs."""
    if os.path.realpath(output) in map(os.path.realpath, others):
        raise UserError(f"{output}: the command line names it twice; give another path for the output")


@contextlib.contextmanager
def atomic_write(path: str, remedy: str, kind: str) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block succeeds, and make the folder if it is missing.

    Raises UserError, which ends with `remedy`, if the file cannot be written, or if `path` holds something that is not
    of `kind`, a key of KINDS.
    """
    require_replaceable(path, kind, remedy)
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


def write_json(path: str, value: Any, remedy: str, kind: str) -> None:
    """Write `value` to the JSON file `path` as `atomic_write` does. Raises UserError, which ends with `remedy`."""
    with atomic_write(path, remedy, kind) as file:
        file.write(json.dumps(value, indent=1).encode())


def lock_holder(folder: int) -> str:
    """Return who holds the lock of a folder's descriptor, by Linux's list of locks; elsewhere "another process"."""
    status = os.fstat(folder)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="utf-8") as file:  # 1: FLOCK ADVISORY WRITE <process> <place> 0 EOF
            pid = next(words[4] for words in map(str.split, file) if words[1] == "FLOCK" and words[5] == place)
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return f"process {pid} ({printable(file.read().replace(chr(0), ' ').strip())[:200]})"
    except (OSError, StopIteration):
        return "another process"


def lock_folder(path: str, what: str, wait: bool = False, remedy: str = ANOTHER) -> int | None:
    """Make the folder `path` and lock it for this process, which runs `what`, such as "a download".

    Returns a descriptor: the lock lasts until it is closed or the process ends. Returns None, with a notice, if the
    platform or the file system has no such locks. If another process has the lock, waits for it if `wait` is true and
    otherwise raises UserError; both name that process. Raises UserError if the folder cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot use this folder ({error.strerror}); correct permissions, or {remedy}"
        ) from None
    try:
        import fcntl
    except ModuleNotFoundError:
        notice(f"{path}: this platform has no locks; do not start {what} there twice at the same time")
        return None
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{path}: cannot use this folder ({error.strerror}); correct permissions, or {remedy}"
        ) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = lock_holder(folder)
        if not wait:
            os.close(folder)
            raise UserError(f"{path}: {holder} runs {what} there; wait until it ends, or {remedy}") from None
        log_progress(f"{path}: {holder} runs {what} there; waiting until it ends")
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError as error:
        os.close(folder)
        if error.errno not in NO_LOCKS:
            raise UserError(f"{path}: cannot lock this folder ({error.strerror}); {remedy}") from None
        notice(f"{path}: no locks there ({error.strerror}); do not start {what} there twice at the same time")
        return None
    return folder


@contextlib.contextmanager
def locked_folder(path: str, what: str, wait: bool = False, remedy: str = ANOTHER) -> Iterator[None]:
    """Hold the lock of the folder `path` in the block; see `lock_folder`."""
    folder = lock_folder(path, what, wait, remedy)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)
