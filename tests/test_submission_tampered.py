"""tools/submission --check and the plan on foreign or tampered files: a fault in one line, never a traceback."""

import json
import os
import re
import sys

import pytest
from helpers import PLAN_VALUES, ROOT, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from submission_trees import SCORE, fields, log, sha256, valid_tree, write, write_tree

from config import UserError
from tools.submission import __main__, plan
from tools.submission.check import check

TOP = "closed/Someone"
SYSTEM = f"{TOP}/systems/machine.json"
OFFLINE = f"{TOP}/results/machine/bert-99/Offline"
SCORES = f"{OFFLINE}/accuracy/accuracy.txt"
ACCURACY_LOG = f"{OFFLINE}/accuracy/mlperf_log_accuracy.json"
PERFORMANCE, TEST01 = (f"{OFFLINE}/{name}performance/run_1/mlperf_log_detail.txt" for name in ("", "TEST01/"))
MEASUREMENTS = f"{OFFLINE}/measurements.json"
HASH = f"hash={64 * 'a'}\n"
DEEP = 100_000 * "["


@pytest.fixture
def tree(tmp_path):
    """Return the folder of a tree without a fault."""
    return write_tree(tmp_path / "tree", valid_tree())


def entry(**values):
    """Append an entry to a detail log as it is."""
    return lambda path: path.write_text(f"{path.read_text()}:::MLLOG {json.dumps(values)}\n")


def two_lines(figures):
    return write(SCORE.format(90) + figures + "\n" + HASH)


FIGURES = "has no line {"
TAMPERED = [
    # The figures of accuracy.txt.
    *(
        (SCORES, write(f"{line}\n{HASH}"), FIGURES)
        for line in (
            '{"exact_match": 80.0, "f1": 90.9.1}',
            '{"exact_match": 8.0.0, "f1": 90.9}',
            '{"exact_match": ., "f1": 90.9}',
            '{"exact_match": 80.0, "f1": "90.9"}',
            '{"exact_match": 80.0, "f1": -90.9}',
            '{"exact_match": 80.0, "f1": NaN}',
            '{"exact_match": 80.0, "f1": 1e2}',
            '{"exact_match": 80.0, "f1": 90.9} # really',
            f'{{"exact_match": 80.0, "f1": {5000 * "9"}}}',
            f'{{"exact_match": {DEEP}, "f1": 90.9}}',
        )
    ),
    (SCORES, write(SCORE.format(999) + HASH), "expected two percentages"),
    (SCORES, write(SCORE.format(100.1) + HASH), "expected two percentages"),
    (SCORES, write('{"exact_match": 101, "f1": 90}\n' + HASH), "expected two percentages"),
    (SCORES, two_lines('{"exact_match": 80.0, "f1": 99.0}'), "2 lines of figures"),
    (SCORES, two_lines('{"f1": 99.0, "exact_match": 80.0}'), "2 lines of figures"),
    (SCORES, two_lines("{'exact_match': 80.0, 'f1': 99.0}"), "2 lines of figures"),
    (SCORES, two_lines(HASH.strip()), "2 lines hash="),
    (SCORES, write(SCORE.format(90) + "hash=xyz\n"), "a malformed line hash="),
    (SCORES, lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    # A complete accuracy log.
    (ACCURACY_LOG, write('[{"seq_id": 0, "qsl_idx": 0, "data": "00"}]\n'), "its sha256 is not the hash="),
    (ACCURACY_LOG, write("{}\n"), "first and last 4096 characters"),
    (ACCURACY_LOG, write(DEEP[:5000]), "first and last 4096 characters"),
    (ACCURACY_LOG, write(f"[{5000 * '9'}]"), "first and last 4096 characters"),
    # JSON files.
    (SYSTEM, write(DEEP), "cannot be read"),
    (SYSTEM, write(f'{{"cooling": {5000 * "9"}}}'), "cannot be read"),
    (SYSTEM, fields(cooling=["air"]), "cooling is a list, expected a text or a number"),
    (SYSTEM, fields(status={"a": 1}), "status is a dict, expected a text or a number"),
    (SYSTEM, fields(status=7), "status is 7, expected available"),
    (SYSTEM, fields(submitter="Some\none"), r"submitter is 'Some\none', expected Someone"),
    (MEASUREMENTS, write(DEEP), "cannot be read"),
    (MEASUREMENTS, write('"text"'), "is not a JSON object"),
    (MEASUREMENTS, fields(weight_data_types=["int8"]), "documentation/calibration.md: is missing"),
    # Detail logs.
    (PERFORMANCE, write(f":::MLLOG {DEEP}\n"), "cannot be read"),
    (PERFORMANCE, write(":::MLLOG []\n"), "cannot be read"),
    (PERFORMANCE, log(effective_min_duration_ms="600000"), "effective_min_duration_ms is 600000, expected at least"),
    (PERFORMANCE, log(effective_min_duration_ms=None), "effective_min_duration_ms is None"),
    (PERFORMANCE, log(effective_min_duration_ms=[1]), "effective_min_duration_ms is a list"),
    (PERFORMANCE, log(effective_min_duration_ms=True), "effective_min_duration_ms is True"),
    (PERFORMANCE, log(effective_min_duration_ms=float("nan")), "effective_min_duration_ms is nan"),
    (PERFORMANCE, log(effective_min_duration_ms=float("inf")), "effective_min_duration_ms is inf"),
    (PERFORMANCE, log(effective_scenario="Offline\nall is well"), r"effective_scenario is Offline\nall is well"),
    (PERFORMANCE, log(effective_scenario=9000 * "x"), "effective_scenario is xxx"),
    (PERFORMANCE, log(result_samples_per_second="100"), "has no result_samples_per_second"),
    (PERFORMANCE, log(result_samples_per_second=10**400), "has no result_samples_per_second"),
    (TEST01, log(result_samples_per_second={"a": 1}), "has no result_samples_per_second"),
    (TEST01, log(result_samples_per_second=-100), "is not within 10%"),
    (PERFORMANCE, entry(key="a", value=1, metadata="none"), "is damaged"),
    (PERFORMANCE, entry(key="a", value=1, metadata={"is_error": "yes"}), "LoadGen logged 1 errors"),
    # Names and kinds.
    (SYSTEM, lambda path: path.with_name("a\ntree: no faults").touch(), r"a\ntree: no faults: has a space"),
    (SYSTEM, lambda path: path.with_name("\x1b[2J").touch(), r"\x1b[2J: has a character in its name"),
    (SYSTEM, lambda path: open(os.fsencode(path) + b"\xff", "w").close(), r"machine.json\udcff: has a character"),
    (f"{TOP}/src", lambda path: os.mkfifo(path / "pipe"), "pipe: is not a file or a folder"),
]


@pytest.mark.parametrize("path, change, words", TAMPERED, ids=range(len(TAMPERED)))
def test_a_tampered_file_is_one_fault(tree, path, change, words):
    change(tree / path)
    faults = check(str(tree), "v6.1")
    assert len(faults) == 1 and words in faults[0], faults
    assert faults[0].isprintable() and len(faults[0]) < 2000


def test_an_entry_whose_key_is_not_a_text_is_damage(tree):
    entry(key=["a"], value=1)(tree / PERFORMANCE)
    (fault,) = check(str(tree))
    assert "mlperf_log_detail.txt: line " in fault and "is damaged" in fault


def test_a_complete_log_with_its_hash_has_no_fault(tree):
    path = tree / ACCURACY_LOG
    path.write_text('[{"seq_id": 0, "qsl_idx": 0, "data": "00"}]\n')
    (tree / SCORES).write_text(f"{SCORE.format(90)}hash={sha256(path)}\n")
    assert check(str(tree)) == []


@pytest.mark.parametrize("name", [SCORES, SYSTEM, PERFORMANCE, MEASUREMENTS])
def test_a_pipe_or_a_device_in_place_of_a_file_does_not_block_the_check(tree, name):
    (tree / name).unlink()
    os.mkfifo(tree / name)
    assert f"{tree / name}: is not a file" in check(str(tree))
    (tree / name).unlink()
    (tree / name).symlink_to("/dev/zero")
    assert {f"{tree / name}: is a symbolic link", f"{tree / name}: is not a file"} <= set(check(str(tree)))


def test_deep_folders_are_followed_to_their_end(tree, monkeypatch):
    """Deeper than Python's limit of recursion."""
    depth = sys.getrecursionlimit() + 50
    monkeypatch.chdir(tree / TOP / "src")
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    os.mkdir(".git")
    try:
        (fault,) = check(str(tree))
        assert fault.endswith("/d/d/.git: is a git folder")
    finally:
        os.rmdir(".git")
        for _ in range(depth):  # pytest could not remove them
            os.chdir("..")
            os.rmdir("d")


def test_no_name_forges_a_line_of_the_output(tree, monkeypatch, capsys):
    (tree / f"closed\n{tree.name}: no faults").mkdir()
    monkeypatch.setattr(sys, "argv", ["submission", "--check", str(tree)])
    assert __main__.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{tree}/closed\\n") for line in lines) and lines


# Generated files.

FAST = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
PATHS = [name for name in valid_tree() if OFFLINE in name or name == SYSTEM]
KEYS = sorted(
    {json.loads(line.removeprefix(":::MLLOG "))["key"] for line in valid_tree()[PERFORMANCE].splitlines()}
    | set(json.loads(valid_tree()[SYSTEM]))
    | set(json.loads(valid_tree()[MEASUREMENTS]))
)


@pytest.fixture(scope="module")
def kept_tree(tmp_path_factory):
    """Return the folder of a tree without a fault; a test puts back the files that it changes."""
    return write_tree(tmp_path_factory.mktemp("kept") / "tree", valid_tree())


def one_line_each(tree):
    """Assert that the check ends without an exception and that every fault is one printable line."""
    faults = check(str(tree))
    assert all(fault.isprintable() and fault.startswith(str(tree)) for fault in faults)


@pytest.mark.slow
@FAST
@given(path=st.sampled_from(PATHS), data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_in_a_file_of_a_tree_are_faults_at_most(kept_tree, path, data):
    (kept_tree / path).write_bytes(data)
    one_line_each(kept_tree)
    (kept_tree / path).write_text(valid_tree()[path])


@pytest.mark.slow
@FAST
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_of_any_entry_or_field_is_a_fault_at_most(kept_tree, key, value):
    for path in (PERFORMANCE, TEST01):
        log(**{key: value})(kept_tree / path)
    for path in (SYSTEM, MEASUREMENTS):
        fields(**{key: value})(kept_tree / path)
    one_line_each(kept_tree)
    write_tree(kept_tree, {path: valid_tree()[path] for path in (PERFORMANCE, TEST01, SYSTEM, MEASUREMENTS)})


EXAMPLE = (ROOT / "tools/submission/plan.toml").read_text()
VALUES = st.one_of(
    st.text(max_size=20).map(json.dumps),
    st.sampled_from(
        ["1", "1.5", "true", "nan", "2024-13-45", "[]", "[[1]]", "{a = 1}", DEEP, 5000 * "9", "'''\na\n'''"]
    ),
)
NAMES = st.one_of(st.sampled_from(re.findall(r"^(\w+) =", EXAMPLE, re.MULTILINE)), st.text(max_size=9).map(json.dumps))


@FAST
@given(changes=st.dictionaries(NAMES, VALUES, max_size=4), end=st.text(max_size=20), garbage=st.binary(max_size=5))
def test_any_plan_is_accepted_or_refused_in_one_line(tmp_path_factory, changes, end, garbage):
    folder = tmp_path_factory.getbasetemp()
    text = EXAMPLE
    for name, value in PLAN_VALUES.items():
        text = re.sub(rf'^{name} = "[^"]*"', lambda _, name=name, value=value: f'{name} = "{value}"', text, flags=re.M)
    for name, value in changes.items():
        line = f"{name} = {value}"
        text, count = re.subn(rf"^{re.escape(name)} = .*", lambda _, line=line: line, text, flags=re.MULTILINE)
        text = text if count else f"{line}\n{text}"
    (folder / "plan.toml").write_bytes(f"{text}\n{end if len(end) < 15 else ''}".encode() + garbage[4:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "describe_machine", lambda: dict.fromkeys(plan.FIELDS["required"], "known"))
        try:
            found = plan.read_plan(str(folder / "plan.toml"))
        except UserError as error:
            assert str(error).isprintable() and "plan.toml: " in str(error)
        else:
            assert found["version"] in ("v6.1", "v6.0", "v5.1", "v5.0")


@pytest.mark.parametrize("version", ["v4.1", "v7.0", "6.0", "V6.0"])
def test_an_unknown_version_is_refused_in_one_line(tmp_path, version):
    (tmp_path / "plan.toml").write_text(EXAMPLE.replace('version = "v6.1"', f'version = "{version}"'))
    with refused(f"version is '{version}', expected v6.1 or v6.0 or v5.1 or v5.0"):
        plan.read_plan(str(tmp_path / "plan.toml"))
