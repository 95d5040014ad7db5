"""Check the values of log folders, which other programs wrote and anybody may have edited, before the page uses them.

What cannot be is left out, with a line for the page's notes.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config
from files import read_json
from loadgen_logs import METRICS

MAX_TEXT = 2000  # characters of a text that the page shows
LARGEST = 2.0**64  # LoadGen's integers have 64 bits
# Control characters, those that change the direction of the text, and halves of characters: bytes that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Keys of LoadGen's detail log that the page shows: those with a text, and those with a number.
LOG_TEXTS = {
    "effective_scenario", "effective_test_mode", "result_validity", "result_invalid_reason", "early_stopping_result",
    "test_datetime", "loadgen_version",
}  # fmt: skip
LOG_NUMBERS = re.compile(
    r"result_(min|mean|max|[\d.]+_percentile)(_per)?(_query)?_latency_ns|result_(overlatency_)?query_count"
    r"|effective_(samples_per_query|min_query_count|min_duration_ms|target_(qps|latency_ns|latency_percentile))"
    r"|qsl_reported_total_count|" + "|".join(re.escape(key) for metric in METRICS.values() for key in metric.keys)
)
# Keys of record.json that the page uses, by the type of their values.
RECORD_TEXTS = (
    "backend", "dtype", "model", "model_md5", "dataset", "vocab", "processor", "gpu", "system", "revision", "python",
    "name", "memory",
)  # fmt: skip
EMPTY = ("", "N/A", "-")  # in a submission's description of a system
RECORD_NUMBERS = ("batch_tokens", "workers", "max_examples", "cores", "memory_bytes", "accelerators")


def clean(text: str) -> str:
    """Return `text` as the page can show it: on one line, printable, and not longer than MAX_TEXT."""
    text = " ".join(text.split()) if re.search(r"[\t\n\r]", text) else text
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    return UNPRINTABLE.sub("\ufffd", text)


def is_number(value: Any) -> bool:
    """Return whether `value` is a number that a log may hold: from 0 to 2^64."""
    return type(value) in (int, float) and 0 <= value <= LARGEST  # False for NaN


def brief(value: Any) -> str:
    """Return a wrong value for a note, or what it is if it is long or nested."""
    if value is None or isinstance(value, list | dict):
        return "null" if value is None else "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) > LARGEST:  # Python may refuse to write all its digits
        return "a huge number"
    return clean(repr(value)) if len(repr(value)) <= 40 else f"a text of {len(value)} characters"


def checked_log(log: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the texts and numbers of a detail log {key: value} that the page uses; add a note for each wrong one."""
    kept = {}
    for key, value in log.items():
        expected = "a text" if key in LOG_TEXTS else "a number from 0 to 2^64" if LOG_NUMBERS.fullmatch(key) else ""
        if isinstance(value, str) if key in LOG_TEXTS else expected and is_number(value):
            kept[key] = value
        elif expected:
            notes.append(f"LoadGen's log: {key} is {brief(value)}, expected {expected}; it is left out.")
    return kept


def checked_record(record: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the values of record.json, the plain ones of its other keys too; add a note for each of a wrong type."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(RECORD_TEXTS, (lambda value: isinstance(value, str), "a text")),
        **dict.fromkeys(RECORD_NUMBERS, (is_number, "a number")),
        "command": (lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value), "texts"),
        "libraries": (is_table, "texts by name"),
        "variables": (is_table, "texts by name"),
    }
    plain = {key: value for key, value in record.items() if isinstance(value, str | bool) or is_number(value)}
    kept = {key: value for key, value in plain.items() if key not in checks}
    for key, (fits, expected) in checks.items():
        value = record.get(key)
        if value is not None and fits(value):
            kept[key] = value
        elif value is not None:
            notes.append(f"record.json: {key} is {brief(value)}, expected {expected}; it is left out.")
    return kept


def is_table(value: Any) -> bool:
    """Return whether `value` is a dict of texts."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def described_system(folder: str, notes: list[str]) -> dict[str, Any]:
    """Return what a submission says of the system of its log folder, by record.json's keys; {} outside a submission.

    The description of .../results/SYSTEM/BENCHMARK/SCENARIO/... is .../systems/SYSTEM.json.
    """
    place = Path(os.path.abspath(folder))
    for system in place.parents:
        path = system.parent.parent / "systems" / f"{system.name}.json"
        if system.parent.name == "results" and os.path.isfile(path):
            break
    else:
        return {}
    try:
        found = read_json(str(path), "the system's description", "correct it")
    except config.UserError as error:
        notes.append(f"{error}.")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path}: the system's description is not a JSON object.")
        return {}
    texts = {
        "backend": "framework", "processor": "host_processor_model_name", "gpu": "accelerator_model_name",
        "system": "operating_system", "memory": "host_memory_capacity", "name": "system_name",
    }  # fmt: skip
    named = {key: found.get(name) for key, name in texts.items()}
    values: dict[str, Any] = {key: text for key, text in named.items() if isinstance(text, str) and text not in EMPTY}
    nodes, sockets, cores, accelerators = (
        whole_number(found.get(name))
        for name in (
            "number_of_nodes",
            "host_processors_per_node",
            "host_processor_core_count",
            "accelerators_per_node",
        )  # fmt: skip
    )
    if nodes and sockets and cores:
        values["cores"] = nodes * sockets * cores
    if not accelerators:
        values.pop("gpu", None)
    elif nodes:
        values["accelerators"] = nodes * accelerators
    notes.append(f"The system is as {path} describes it.")
    return values


def whole_number(value: Any) -> int | None:
    """Return a whole number, also one that is written as a text, below a million; None for anything else."""
    text = str(value) if isinstance(value, str) or type(value) is int else ""
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else None
