"""Generated conf files: LoadGen holds each number as a person reads it, or one line names what is wrong."""

import re
from fractions import Fraction
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends import RunOptions
from config import SCENARIOS, UserError
from loadgen import loadgen_settings
from loadgen_conf import SETTINGS

COUNTS = st.integers(0, 2**40) | st.integers(2**63 - 2, 2**64 + 2) | st.sampled_from([1, 7, 8, 500, 600_000])
NUMBERS = st.one_of(
    st.builds("{}{}".format, st.sampled_from(["", "", "", "+", "-", "0", "00", "0x"]), COUNTS),
    st.builds("0x{:x}".format, COUNTS),
    st.builds("{}.{}".format, st.integers(0, 1000), st.integers(0, 1000)),
    st.builds("{}e{}".format, st.integers(0, 1000) | st.floats(0, 10), st.integers(-9, 9)),
    st.floats(0, 1e9).map(repr),
    st.sampled_from([".5", "5.", "1e", "1e400", "inf", "-nan", "0x1p4", "1_000", "1,5", "true", "5f", "5ms", "010.5"]),
)
NAMES = st.builds(
    "{}.{}.{}".format,
    st.sampled_from(["*"] * 4 + ["bert", "bert", "bert-99", "BERT"]),
    st.sampled_from(["*"] * 4 + [*SCENARIOS, *SCENARIOS]),
    st.sampled_from([*SETTINGS, "target_qps", "target_latency", "min_duration"]),
)
COMMENTS = st.sampled_from(["", "# tuned", "#tuned", "#*.*.min_duration = 7", "#*.*.min_duration=7 ", " # a = b", "\r"])
LINES = st.builds("{}{}{}{}".format, NAMES, st.sampled_from([" = ", "\t=  "]), NUMBERS, st.sampled_from(["", "", "\r"]))
WRONG_NAMES = st.sampled_from(["*.Sever.target_qps", "*.*.target_qbs", "Offline.target_qps", "\ufeff*.*.min_duration"])
WRONG_LINES = st.one_of(
    st.builds("{}{}{}".format, NAMES, st.sampled_from(["=", " =", "= ", "\u00a0=\u00a0", " : ", " "]), NUMBERS),
    st.builds("{} = {}{}".format, NAMES, NUMBERS, st.sampled_from([" # tuned", "#tuned", " 7", "\u00a0", "\r7"])),
    st.builds("{} = {}".format, WRONG_NAMES, NUMBERS),
    st.sampled_from(["#tuned by hand", "#a = b", "\ufeff# tuned", "\u00a0# tuned", "; tuned", "// tuned"]),
)
RIGHT_FORMS = st.lists(LINES | COMMENTS, min_size=1, max_size=4)
FILES = RIGHT_FORMS | st.tuples(RIGHT_FORMS, WRONG_LINES).map(lambda parts: [*parts[0], parts[1]])


def read_as_person(line):
    """Return (model, scenario, key, value as a Fraction or None) of a setting, None for a line that is none."""
    match = re.fullmatch(r"\ufeff?([^#]+)\.(.+)\.(\w+)\s*[=:]\s*([^\s#]+)\s*(#.*)?", line.strip())
    if not match:
        return None
    text = match[4]
    try:
        value = Fraction(int(text, 16)) if "x" in text else Fraction(text.replace(",", "."))
    except (ValueError, ZeroDivisionError):
        value = None
    return match[1], match[2], match[3], value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conf")


@settings(max_examples=400, deadline=None)
@given(lines=FILES, scenario=st.sampled_from(SCENARIOS))
@example(lines=["*.*.accuracy_log_rng_seed = 18446744073709551615"], scenario="Offline")
@example(lines=["bert.*.target_qps = 3", "*.Offline.target_qps = 5", "*.*.target_qps = 4"], scenario="Offline")
def test_loadgen_holds_each_number_or_one_line_names_what_is_wrong(folder, lines, scenario):
    path = folder / "c.conf"
    path.write_text("\n".join(lines), newline="")
    notices = []
    try:
        with mock.patch("config.notice", notices.append):
            held = loadgen_settings(RunOptions(user_conf=str(path), scenario=scenario))[0]
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and "; " in str(error)
        return
    read = [found for found in map(read_as_person, lines) if found]
    for model in {line[0] for line in read} - {"*", "bert"}:
        assert any(f"{model} (line " in notice for notice in notices)
    # From the most general to the most specific, and otherwise in the file's order: the last of a key counts.
    ours = sorted(
        (line for line in read if line[0] in ("*", "bert")), key=lambda line: (line[1] != "*", line[0] != "*")
    )
    expected = {key: value for _, place, key, value in ours if place in ("*", scenario)}
    for key, value in expected.items():
        if attribute := SETTINGS[key].attribute.get(scenario):
            found = getattr(held, attribute)
            exact = float(value) * SETTINGS[key].scale if isinstance(found, float) else value * int(SETTINGS[key].scale)
            assert (found if isinstance(found, float) else int(found)) == exact, key
