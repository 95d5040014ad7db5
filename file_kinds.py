"""Recognize the kinds of files that commands write: config.atomic_write replaces no file of another kind."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

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
    "a file of answers": json_object(lambda value: all(isinstance(answer, str) for answer in value.values())),
    "a run's record": with_keys("started", "command", "backend"),
    "a run's inputs": with_keys("args", "model"),
    "a report": starts(rb"<!DOCTYPE html>.*BERT on SQuAD under LoadGen</title>"),
    "a chart": starts(rb"\x89PNG.*Matplotlib"),
    "a calibration list": starts(rb"\d+\n"),
    "a benchmark's table": starts(rb"\| run "),
    "a benchmark's results": with_keys("note", "rows"),
}
