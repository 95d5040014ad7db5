"""Read LoadGen's conf files: each line takes effect as it is written, or the run ends with the form that works.

LoadGen 6.0.17 silently ignores or misreads many lines. So the lines are read here as LoadGen reads them, and after
LoadGen has applied the file, its TestSettings are compared with what the lines ask for.
"""

import difflib
import filecmp
import math
import os
import re
from decimal import Decimal
from typing import Any, NamedTuple

import config
from config import SCENARIOS, UserError, log_progress
from files import read_text, require_utf8

MODEL, ANY = "bert", "*"  # LoadGen applies the lines of these models of user.conf; of an audit file, only those of "*"
AUDIT_FILES = ("audit.conf", "audit.config")  # the MLPerf reference's name, and MLCommons'


class Setting(NamedTuple):
    """A key of LoadGen's conf files."""

    attribute: dict[str, str]  # {scenario: attribute of TestSettings}; other scenarios do not have the key
    scale: float = 1  # how many of TestSettings' units make one of the file's
    limit: float = 2**64  # a value must be below it
    positive: bool = False  # a value must not be 0
    fixed: bool = False  # LoadGen takes the value from no file but its own; see SEEDS


# LoadGen takes these from no file but its own, too; each MLPerf round sets them anew, so `apply_conf` sets them.
SEEDS = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
# The keys that LoadGen 6.0 knows. With a value outside the limits, it waits forever, takes all memory or computes with
# another number: its durations end at 2^63 ns, its integers at 2^64.
# fmt: off
SETTINGS = {
    "target_qps": Setting({"Offline": "offline_expected_qps", "Server": "server_target_qps"}, 1, 1e9, True),
    "target_latency": Setting({
        "SingleStream": "single_stream_expected_latency_ns", "MultiStream": "multi_stream_expected_latency_ns",
        "Server": "server_target_latency_ns",
    }, 1e6, 1e12, True),
    "target_latency_percentile": Setting({
        "SingleStream": "single_stream_target_latency_percentile",
        "MultiStream": "multi_stream_target_latency_percentile", "Server": "server_target_latency_percentile",
    }, 0.01, 100, True),
    "samples_per_query": Setting({"MultiStream": "multi_stream_samples_per_query"}, 1, 1e6, True),
    "max_async_queries": Setting({"Server": "server_max_async_queries"}, 1, 2**31),
    "coalesce_queries": Setting({"Server": "server_coalesce_queries"}),
    **{key: Setting(dict.fromkeys(SCENARIOS, f"{key}_ms"), 1, 1e12) for key in ("min_duration", "max_duration")},
    **{key: Setting({"Server": key}, 1e6, 1e12) for key in ("ttft_latency", "tpot_latency")},
    **{key: Setting(dict.fromkeys(SCENARIOS, key)) for key in (
        "mode", "min_query_count", "max_query_count", "print_timestamps", "performance_issue_unique",
        "performance_issue_same", "performance_issue_same_index", "performance_sample_count_override",
        "accuracy_sample_count_override", "sample_concatenate_permutation", "accuracy_log_rng_seed",
        "accuracy_log_sampling_target", "use_token_latencies", "infer_token_latencies", "token_latency_scaling_factor",
    )},
    **{key: Setting(dict.fromkeys(SCENARIOS, key), fixed=True) for key in (
        *SEEDS, "accuracy_log_probability", "test05", "test05_qsl_rng_seed", "test05_sample_index_rng_seed",
        "test05_schedule_rng_seed",
    )},
}
# fmt: on
CONF_FORM = "each line must be model.scenario.key = number, or a # comment"
# What LoadGen and a person may both read as a number: decimal, hexadecimal, and inf and nan, which the limits exclude.
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?|0x[\da-f]+|inf(inity)?|nan)", re.ASCII | re.IGNORECASE)
# Kinds of conf files, FromConfig's last argument: MLPerf's own, which is a part of LoadGen; a user's, with which
# LoadGen applies MLPerf's, too, but only once per process; a user's alone.
MLPERF, USER, AUDIT = 0, 1, 2
MAX_SAMPLES = 1e9  # of a run; LoadGen holds all of them in memory


class ConfLine(NamedTuple):
    """A setting in a conf file."""

    place: str  # the file, the number and the text of the line, for messages
    number: int
    model: str
    scenario: str
    key: str
    text: str  # the value as it is written
    value: float  # as a person reads it; an exact int if it is whole


def parse_number(text: str) -> float | None:
    """Return the number that a person reads in `text`, as an exact int if it is whole; None if it is not a number."""
    if not NUMBER.fullmatch(text):
        return None
    if "x" in text.lower():
        return int(text, 16)
    exact = Decimal(text)
    return int(exact) if exact.is_finite() and exact == int(exact) else float(text)


def read_line(place: str, number: int, line: str) -> ConfLine | None:
    """Return the setting in a line of a conf file, None for a comment.

    LoadGen reads a name, "=" and numbers, of which the last counts. Only "#" as the first or second word begins a
    comment. Raises UserError if LoadGen ignores the line, or the whole file because of it.
    """
    words = [word.decode() for word in line.encode().split()]  # at ASCII's white space only
    if not words or words[0] == "#":
        return None
    if words[0].startswith("#"):  # "#name = 5" sets a key that LoadGen never looks up
        if words[1:2] in ([], ["#"]) or (words[1] == "=" and None not in map(parse_number, words[2:])):
            return None
        fault = f"LoadGen takes {words[0]} for a setting, not a comment"
        raise UserError(f"{place}: {fault}; write `# {line.lstrip('# ')}`")
    if words[0].startswith("\ufeff"):
        fault = "LoadGen takes the byte order mark for a part of the first word"
        raise UserError(f"{place}: {fault}; save the file as UTF-8 without BOM")
    if len(words) == 3 and words[1] == "=" and "#" not in words[2]:
        if name := re.fullmatch(r"([!-~]+)\.([^.\s]+)\.(\w+)", words[0]):
            if (value := parse_number(words[2])) is not None:
                return ConfLine(place, number, name[1], name[2], name[3], words[2], value)
            raise UserError(f"{place}: {words[2]} is not a number; give one")
    elif form := re.fullmatch(r"([^\s=]+)\s*=\s*([^\s=]+)", line.partition("#")[0].strip()):
        fault = "allows no comment behind a value" if "#" in line else "needs spaces around the ="
        raise UserError(f"{place}: LoadGen {fault}; write only `{form[1]} = {form[2]}`")
    raise UserError(f"{place}: not a setting; {CONF_FORM}")


def read_conf(path: str) -> list[ConfLine]:
    """Return the settings in a conf file. Raises UserError for a line that LoadGen does not read as a person does."""
    text = read_text(path, "LoadGen's settings", "give a text file", newline="")
    lines = [line.strip().decode() for line in text.encode().split(b"\n")]  # bytes: only ASCII's white space counts
    found = [read_line(f"{path}: line {number}: {line!r}", number, line) for number, line in enumerate(lines, 1)]
    return [line for line in found if line]


def check_conf(path: str, model: str, accuracy: bool) -> list[ConfLine]:
    """Return the lines of a conf file for `model` (ANY: only those of all models), with a notice of the others.

    Raises UserError if the file has a line that LoadGen ignores silently or hangs on.
    """
    lines: list[ConfLine] = []
    others: dict[str, list[str]] = {}  # {model: [numbers of its lines]}
    for line in read_conf(path):
        place, key = line.place, line.key
        if line.model == MODEL != model:
            remedy = f"write `{ANY}.{line.scenario}.{key} = {line.text}`"
            raise UserError(f"{place}: of an audit file, LoadGen applies only the lines of model {ANY}; {remedy}")
        if line.model not in (model, ANY):
            others.setdefault(line.model, []).append(str(line.number))
            continue
        for found, known in ((line.scenario, {ANY, *SCENARIOS}), (key, SETTINGS.keys())):
            if found not in known:
                near = difflib.get_close_matches(found, known, 1)
                remedy = f"did you mean {near[0]}?" if near else "remove the line"
                raise UserError(f"{place}: LoadGen does not know {found}; {remedy}")
        limit, minimum = SETTINGS[key].limit, "above 0" if SETTINGS[key].positive else "from 0"
        if not 0 <= line.value < limit or (minimum == "above 0" and not line.value):
            raise UserError(f"{place}: {line.text} is out of range; give a number {minimum} and below {limit:g}")
        if key == "mode" and line.value != (1 if accuracy else 2):
            raise UserError(f"{place}: not this run's mode; --accuracy chooses the mode, remove the line")
        lines.append(line)
    if others:
        found = ", ".join(f"{name} (line {', '.join(numbers)})" for name, numbers in others.items())
        config.notice(f"{path}: LoadGen ignores the lines of models other than {MODEL} and {ANY}: {found}")
    return lines


def apply_conf(settings: Any, path: str, model: str, kind: int) -> None:
    """Apply a conf file to the TestSettings `settings`; `model` as for check_conf, `kind` as for FromConfig.

    LoadGen prefers a line of the scenario to one of all scenarios, then a line of the model to one of all models, then
    the last. A notice names a line that is replaced although it is not more general than the other. Raises UserError
    unless `settings` then hold what the lines ask for.
    """
    require_utf8(path)
    scenario = settings.scenario.name
    lines = check_conf(path, model, settings.mode.name == "AccuracyOnly")
    if settings.FromConfig(path, model, scenario, kind):
        raise UserError(f"{path}: LoadGen cannot read it; {CONF_FORM}")
    for key in dict.fromkeys(line.key for line in lines):
        same = [line for line in lines if line.key == key and line.scenario in (ANY, scenario)]
        line = max(same, key=lambda line: (line.scenario != ANY, line.model != ANY, line.number), default=None)
        attribute = SETTINGS[key].attribute.get(scenario)
        if line and attribute:
            if key in SEEDS and kind == USER and isinstance(line.value, int):
                setattr(settings, attribute, line.value)
            check_value(line, getattr(settings, attribute))
            for other in same:
                general = other.model in (ANY, line.model) and other.scenario in (ANY, line.scenario)
                if other.value != line.value and (not general or other[2:5] == line[2:5]):
                    config.notice(f"{other.place}: LoadGen applies line {line.number} instead, with {line.text}")
        elif line and line.scenario == scenario:
            raise UserError(f"{line.place}: LoadGen has no {key} in {scenario}; remove the line")


def check_value(line: ConfLine, held: Any) -> None:
    """Raise UserError unless `held`, the value of a TestSettings' attribute, is what `line` asks for.

    LoadGen reads integers with strtoull in base 0: to it, "0600" is octal, and "6e5" and "6.5" end behind the 6.
    """
    setting, plain, scale = SETTINGS[line.key], line.value, SETTINGS[line.key].scale
    if not isinstance(held, float):
        plain = int(bool(line.value)) if isinstance(held, bool) else math.ceil(line.value)
        held, scale = int(held), int(scale)  # exact
    if held == line.value * scale:
        return
    applied = held if scale == 1 else f"{held / scale:g}"
    fault, remedy = f"LoadGen applies {applied}", "remove the line"
    if setting.fixed:
        fault = f"LoadGen keeps {applied}, because no conf file may change {line.key}"
    elif str(plain) != line.text:
        fault = f"LoadGen reads {line.text} as {applied}"
        remedy = f"write `{line.model}.{line.scenario}.{line.key} = {plain}`"
    raise UserError(f"{line.place}: {fault}; {remedy}")


def find_audit_conf(name: str | None) -> str:
    """Return the path of the audit file `name`; for None, that of either of AUDIT_FILES, "" if none exists.

    Raises UserError if there is no file `name`, or if both of AUDIT_FILES exist and differ.
    """
    names = (name,) if name else AUDIT_FILES
    found = [name for name in names if os.path.isfile(name)]
    if name and not found:
        raise UserError(f"{name}: no such file; --audit_conf names the settings of a compliance run")
    if len(found) == 2 and not filecmp.cmp(found[0], found[1], shallow=False):
        raise UserError(f"{' and '.join(found)} differ, and LoadGen applies only one; remove the other")
    if found:
        log_progress(f"{found[0]}: LoadGen applies these settings of a compliance run")
    return found[0] if found else ""


def check_size(settings: Any, files: str) -> None:
    """Raise UserError if the TestSettings `settings`, read from `files`, make more than MAX_SAMPLES."""
    scenario = settings.scenario.name
    key = "target_qps" if scenario in ("Offline", "Server") else "target_latency"
    target = getattr(settings, SETTINGS[key].attribute[scenario]) / SETTINGS[key].scale
    per_query = settings.multi_stream_samples_per_query if scenario == "MultiStream" else 1
    rate = target if key == "target_qps" else per_query * 1e3 / target
    by_time, by_count = rate * settings.min_duration_ms / 1e3, per_query * settings.min_query_count
    if (samples := max(by_time, by_count)) > MAX_SAMPLES:
        cause = f"{key} {target:g} and min_duration make" if by_time == samples else "min_query_count makes"
        raise UserError(f"{files}: {cause} {samples:.3g} samples, more than {MAX_SAMPLES:g}; change these values")
