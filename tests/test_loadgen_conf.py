"""LoadGen's conf files: LoadGen's TestSettings hold what a person reads in the file, or one line says what is wrong.

Each table has a row per form of a line or file. test_loadgen_conf_generated.py makes further lines.
"""

import re

import pytest
from helpers import ROOT, SHORT_RUNS, backend_script, refused, run_loadgen, run_script

from backends import RunOptions
from config import SCENARIOS
from loadgen import loadgen_settings
from loadgen_conf import SEEDS, SETTINGS
from loadgen_logs import read_detail_log

RUN = ("run.py", "--backend=pytorch")


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """Return a function that writes c.conf and returns the TestSettings that `loadgen_settings` makes of it."""
    monkeypatch.chdir(tmp_path)

    def call(content, scenario="Offline", **options):
        (tmp_path / "c.conf").write_bytes(content if isinstance(content, bytes) else content.encode())
        return loadgen_settings(RunOptions(user_conf="c.conf", scenario=scenario, **options))[0]

    return call


def same_class(*values):
    """Return rows of target_qps in Offline: each of `values` as it is written and as a person reads it."""
    return [(f"*.Offline.target_qps = {text}", "Offline", {"offline_expected_qps": number}) for text, number in values]


QPS = {"offline_expected_qps": 500}
LINE = "*.Offline.target_qps = 500"
# (content, scenario, {attribute of TestSettings: value})
APPLIED = [
    ((ROOT / "user.conf").read_bytes(), "Offline", {"offline_expected_qps": 32, "min_query_count": 10833}),
    (f"# tuned\n#\n#tuned\n  # tuned\n\n \t\n{LINE}", "Offline", QPS),
    (f"#*.Offline.target_qps = 9\n{LINE}\n#*.Offline.target_qps=9\n#bert.Offline.mode # 9", "Offline", QPS),
    (f"*.*.min_duration = 7\r\n{LINE}\r\n", "Offline", QPS | {"min_duration_ms": 7}),
    ("\t*.Offline.target_qps\t=\t500 \f", "Offline", QPS),
    *same_class(("0x1F4", 500), ("+5", 5), ("5.", 5), (".5", 0.5), ("1e3", 1000), ("2.5E-1", 0.25), ("010", 10)),
    ("*.*.min_query_count = 0X10\n*.*.max_query_count = +5", "Server", {"min_query_count": 16, "max_query_count": 5}),
    ("*.*.min_duration = 600000.0\n*.*.max_duration = 00", "Server", {"min_duration_ms": 600000, "max_duration_ms": 0}),
    ("*.*.accuracy_log_rng_seed = 18446744073709551615", "Offline", {"accuracy_log_rng_seed": 2**64 - 1}),
    ("*.*.accuracy_log_rng_seed = 9007199254740993.0", "Offline", {"accuracy_log_rng_seed": 2**53 + 1}),
    ("*.*.schedule_rng_seed = 16159082839903944936", "Server", {"schedule_rng_seed": 16159082839903944936}),
    ("bert.*.qsl_rng_seed = 7\n*.*.qsl_rng_seed = 8", "Offline", {"qsl_rng_seed": 7}),  # LoadGen alone ignores both
    ("*.*.sample_index_rng_seed = 0600", "Server", {"sample_index_rng_seed": 600}),
    ("*.*.target_latency = 0.5", "SingleStream", {"single_stream_expected_latency_ns": 500_000}),
    ("*.*.target_latency = 1.25", "MultiStream", {"multi_stream_expected_latency_ns": 1_250_000}),
    ("*.*.target_latency = 130", "Server", {"server_target_latency_ns": 130_000_000}),
    ("*.*.target_latency_percentile = 99.9", "Server", {"server_target_latency_percentile": 99.9 * 0.01}),
    ("*.*.coalesce_queries = 1\n*.*.print_timestamps = 1", "Server", {"server_coalesce_queries": True}),
    ("*.*.use_token_latencies = 1\n*.*.ttft_latency = 7", "Server", {"ttft_latency": 7_000_000}),
    ("*.*.min_duration = 9\nbert.*.min_duration = 8", "Offline", {"min_duration_ms": 8}),
    ("*.Offline.min_duration = 7\nbert.*.min_duration = 8", "Offline", {"min_duration_ms": 7}),
    ("bert.Offline.min_duration = 6\n*.Offline.min_duration = 7", "Offline", {"min_duration_ms": 6}),
    (f"*.Server.min_duration = 0600\n*.Server.target_latency = 0.5\n{LINE}", "Offline", QPS),  # other scenarios
]


@pytest.mark.parametrize("content, scenario, expected", APPLIED, ids=lambda value: str(value)[:60])
def test_loadgen_holds_what_a_person_reads(apply, content, scenario, expected):
    settings = apply(content, scenario)
    assert {name: getattr(settings, name) for name in expected} == expected


# (line, words of the message)
REFUSED = [
    ("*.Offline.target_qps =", ["key = number"]),  # no value
    ("*.Offline.target_qps", ["key = number"]),
    ("*.Offline.target_qps = # 5", ["key = number"]),
    ("*.Offline.target_qps 5", ["key = number"]),
    ("*.Offline.target_qps = 5 6", ["key = number"]),  # LoadGen applies 6
    ("*.Offline.target_qps = 5\r*.Offline.target_qps = 6", ["key = number"]),  # to LoadGen, one line
    ("Offline.target_qps = 5", ["key = number"]),  # no model
    ("\u00a0*.Offline.target_qps = 5", ["'\\xa0*.Offline", "key = number"]),
    ("\u200b*.Offline.target_qps = 5", ["'\\u200b*.Offline", "key = number"]),
    ("*.Offline.target_qps = many", ["many is not a number"]),
    ("*.Offline.target_qps = 5,5", ["5,5 is not a number"]),
    ("*.Offline.target_qps = 1_000", ["1_000 is not a number"]),
    ("*.Offline.target_qps = 0x1p4", ["0x1p4 is not a number"]),
    ("*.Offline.target_qps = \u0665", ["\u0665 is not a number"]),  # a digit of another script
    ("*.Offline.target_qps=500", ["needs spaces", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps =500", ["needs spaces", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps= 500", ["needs spaces", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps\u00a0=\u00a0500", ["\\xa0", "needs spaces", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps = 500 # by hand", ["no comment behind a value", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps = 500 #600", ["no comment behind a value", "`*.Offline.target_qps = 500`"]),
    ("*.Offline.target_qps=500# by hand", ["no comment behind a value", "`*.Offline.target_qps = 500`"]),
    ("#tuned by hand", ["#tuned for a setting", "`# tuned by hand`"]),
    ("## tuned ##", ["## for a setting", "`# tuned ##`"]),
    ("#*.*.mode = 2 # performance", ["for a setting", "`# *.*.mode = 2 # performance`"]),
    ("*.*.target_qbs = 5", ["did you mean target_qps?"]),
    ("*.*.colour = 5", ["does not know colour"]),
    ("*.Sever.target_qps = 5", ["did you mean Server?"]),
    ("bert.Offline.target_qps = 0", ["above 0"]),
    ("*.Server.target_qps = -5", ["above 0"]),
    ("*.Server.target_qps = nan", ["above 0"]),
    ("*.Server.target_qps = inf", ["above 0"]),
    ("*.Server.target_qps = 1e-400", ["above 0"]),  # 0 as a double
    ("*.*.target_qps = 1e10", ["below 1e+09"]),
    ("*.SingleStream.target_latency = 0", ["above 0"]),  # LoadGen hangs
    ("*.*.min_duration = -5", ["from 0"]),
    ("*.*.min_duration = 1e400", ["below 1e+12"]),
    ("*.*.max_duration = 10000000000000", ["below 1e+12"]),  # LoadGen ends at once
    ("*.*.accuracy_log_rng_seed = 18446744073709551616", ["out of range", "below 1.84467e+19"]),
    ("*.*.max_async_queries = 4294967301", ["out of range"]),  # LoadGen applies 5
    ("*.Server.target_latency_percentile = 200", ["below 100"]),
    ("*.*.mode = 1", ["--accuracy"]),  # not this run's mode
    ("*.*.mode = 2.5", ["--accuracy"]),
    ("*.*.min_duration = 0600000", ["0600000 as 196608", "`*.*.min_duration = 600000`"]),
    ("*.*.min_duration = 08", ["08 as 0", "`*.*.min_duration = 8`"]),
    ("bert.Offline.min_query_count = 6e5", ["6e5 as 6", "`bert.Offline.min_query_count = 600000`"]),
    ("*.*.min_query_count = 1.5", ["1.5 as 1", "`*.*.min_query_count = 2`"]),
    ("*.*.print_timestamps = 2", ["2 as 1", "`*.*.print_timestamps = 1`"]),
    ("*.*.schedule_rng_seed = 7.5", ["keeps 16159082839903944936", "remove the line"]),
    ("*.*.test05_schedule_rng_seed = 7", ["no conf file may change", "remove the line"]),
    ("*.*.accuracy_log_probability = 50", ["keeps 0", "remove the line"]),
    ("*.Server.ttft_latency = 7", ["applies 100", "remove the line"]),  # without use_token_latencies
    ("*.Server.target_latency = 130.5", ["130.5 as 130", "`*.Server.target_latency = 131`"]),
    ("*.MultiStream.samples_per_query = 8.5", ["8.5 as 8", "`*.MultiStream.samples_per_query = 9`"]),
    ("*.Offline.target_latency = 5", ["no target_latency in Offline", "remove the line"]),
]


@pytest.mark.parametrize("line, words", REFUSED)
def test_a_line_that_loadgen_would_ignore_misread_or_hang_on_is_named(apply, line, words):
    scenario = next((name for name in SCENARIOS if f".{name}." in line), "Offline")
    with refused("c.conf: line 2: ", *words) as error:
        apply(f"# settings\n{line}\n", scenario)
    if form := re.search("write .*`(.*)`", str(error.value)):
        apply(f"# settings\n{form[1]}\n", scenario)


# A copy of ../shared/cases/conf. Words of the refusal, or {attribute: value}.
CASES = {
    "no_spaces.conf": (b"*.Offline.target_qps=500\n*.Server.target_qps=40\n", ["line 1", "needs spaces"]),
    "leading_zero.conf": (b"*.*.min_duration = 0600000\n", ["line 1", "196608", "`*.*.min_duration = 600000`"]),
    "bom.conf": (b"\xef\xbb\xbf*.Offline.target_qps = 500\n", ["line 1", "byte order mark", "UTF-8 without BOM"]),
    "other_model_name.conf": (b"bert-99.Offline.target_qps = 500\n", {"offline_expected_qps": 1}),
    "server_latency_below_1.conf": (
        b"*.Server.target_latency = 0.5\n*.Server.target_qps = 5\n*.*.min_duration = 1000\n*.*.min_query_count = 5\n",
        ["line 1", "0.5 as 0", "`*.Server.target_latency = 1`"],
    ),
    "trailing_comment.conf": (b"# tuned\n*.Offline.target_qps = 500 # by hand\n", ["line 2", "no comment behind"]),
    "hash_without_space.conf": (b"#tuned by hand\n*.Offline.target_qps = 500\n", ["line 1", "`# tuned by hand`"]),
    "mlperf_seed.conf": (
        b"*.*.schedule_rng_seed = 16159082839903944936\n",
        {"schedule_rng_seed": 16159082839903944936},
    ),
    "audit.config": (
        b"*.*.mode = 2\n*.*.accuracy_log_rng_seed = 720381539243781796\n*.*.accuracy_log_sampling_target = 4096\n",
        {"accuracy_log_rng_seed": 720381539243781796, "accuracy_log_sampling_target": 4096},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reported_cases(apply, name):
    content, expected = CASES[name]
    scenario = "Server" if name.startswith("server") else "Offline"
    if isinstance(expected, list):
        with refused("c.conf: ", *expected):
            apply(content, scenario)
    else:
        settings = apply(content, scenario)
        assert {name: getattr(settings, name) for name in expected} == expected


def test_the_reported_cases_are_those_of_the_shared_folder(shared):
    found = {path.name: path.read_bytes() for path in (shared / "cases/conf").iterdir()}
    assert found == {name: content for name, (content, _) in CASES.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("key", SETTINGS)
def test_loadgen_knows_each_key_or_the_line_is_refused(apply, key, scenario):
    """LoadGen applies a line of each key to the attribute in the table, and none that is called fixed; we set SEEDS."""
    number = 2 if key == "mode" else 3 if SETTINGS[key].limit != 2**64 else 1
    needed = "".join(
        f"*.*.{name} = 1\n" for name in ("use_token_latencies", "infer_token_latencies") if "_latency" in key
    )
    content = f"{needed}*.{scenario}.{key} = {number}\n"
    if (SETTINGS[key].fixed and key not in SEEDS) or scenario not in SETTINGS[key].attribute:
        with refused(f"{key} = ", "remove the line"):
            apply(content, scenario)
    else:
        held = getattr(apply(content, scenario), SETTINGS[key].attribute[scenario])
        assert int(held) == number if key == "mode" else held == number * SETTINGS[key].scale


def test_lines_for_other_models_are_named_in_a_notice(apply, caplog):
    apply("bert-99.Offline.target_qps = 5\n*.*.min_duration = 7\nwan2.2-t2v.Offline.x = 0600\nbert-99.Sever.y = 1\n")
    (line,) = caplog.messages
    assert line.endswith("models other than bert and *: bert-99 (line 1, 4), wan2.2-t2v (line 3)")
    assert line.startswith("notice: c.conf: ")


# (content, the line that is replaced and the one that LoadGen applies, None without a notice)
REPLACED = [
    ("*.*.min_duration = 7\n*.*.min_duration = 8", ("*.*.min_duration = 7", 2)),
    ("*.*.min_duration = 7\n*.*.min_duration = 7", None),
    ("*.*.min_duration = 7\n*.Offline.min_duration = 8\nbert.Offline.min_duration = 9", None),  # ever more specific
    ("bert.Offline.min_duration = 9\n*.*.min_duration = 7", None),
    ("*.Server.min_duration = 9\n*.Offline.min_duration = 7", None),
    ("*.Offline.min_duration = 9\nbert.*.min_duration = 7", ("bert.*.min_duration = 7", 1)),
]


@pytest.mark.parametrize("content, expected", REPLACED)
def test_a_line_that_another_one_replaces_unexpectedly_is_named_in_a_notice(apply, caplog, content, expected):
    apply(content)
    found = [re.search(r": '(.*)': LoadGen applies line (\d)", message).groups() for message in caplog.messages]
    assert found == ([(expected[0], str(expected[1]))] if expected else [])


# (line, scenario, words)
TOO_MANY = [
    ("*.*.target_qps = 9e8", "Offline", ["target_qps 9e+08"]),
    ("*.*.target_qps = 2e6", "Server", ["target_qps 2e+06"]),
    ("*.*.target_latency = 1e-6", "SingleStream", ["target_latency 1e-06"]),
    ("*.*.target_latency = 4e-3", "MultiStream", ["target_latency 0.004"]),
    ("*.*.min_query_count = 200000000", "MultiStream", ["min_query_count"]),  # of 8 samples
    *[("*.*.min_query_count = 1000000000000", scenario, ["min_query_count makes 1e+12"]) for scenario in SCENARIOS[:3]],
]


@pytest.mark.parametrize("line, scenario, words", TOO_MANY)
def test_a_run_of_more_samples_than_memory_holds_is_refused(apply, line, scenario, words):
    with refused("c.conf", "more than 1e+09", *words):
        apply(line, scenario)
    apply(line, scenario, accuracy=True)  # takes the data set once


@pytest.mark.parametrize("flag", ["--user_conf=c.conf", "--audit_conf=c.conf"])
def test_settings_that_are_not_text_or_not_numbers_are_named(command, tmp_path, flag):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    (tmp_path / "c.conf").write_bytes(bytes(range(256)))
    assert "c.conf" in (line := command(*RUN, flag)) and "text file" in line
    (tmp_path / "c.conf").write_text("*.*.accuracy_log_rng_seed = seven")
    assert "c.conf: line 1" in (line := command(*RUN, flag)) and "seven" in line


AUDIT, _ = CASES["audit.config"]


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """Return a function that runs LoadGen with files in the working folder: {name: content}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_PATH", str(tmp_path))

    def call(files, **options):
        for name, content in ({"user.conf": SHORT_RUNS} | files).items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        run_loadgen(*loadgen_settings(RunOptions(**options)))
        return read_detail_log(tmp_path)

    return call


# (files in the working folder, run.py's --audit_conf, the file that LoadGen applies)
AUDIT_FILES = [
    ({}, None, None),
    ({"audit.config": AUDIT}, None, "audit.config"),
    ({"audit.conf": AUDIT}, None, "audit.conf"),
    ({"audit.conf": AUDIT, "audit.config": AUDIT}, None, "audit.conf"),
    ({"audit.conf": AUDIT, "audit.config": "*.*.mode = 2"}, "audit.conf", "audit.conf"),
    ({"audit.config": AUDIT}, "audit.config", "audit.config"),
    ({"my.txt": AUDIT, "audit.config": "*.*.mode = 2"}, "my.txt", "my.txt"),
]


@pytest.mark.parametrize("files, name, applied", AUDIT_FILES, ids=lambda value: str(value)[:30])
def test_loadgen_applies_the_audit_file_under_either_name(audit, caplog, files, name, applied):
    caplog.set_level("INFO")
    log = audit(files, audit_conf=name)
    assert log["effective_accuracy_log_rng_seed"] == (720381539243781796 if applied else 0)
    assert log["effective_accuracy_log_sampling_target"] == (4096 if applied else 0)
    assert [message.split(":")[0] for message in caplog.messages] == ([applied] if applied else [])


AUDIT_FAULTS = [
    ({"audit.config": AUDIT, "audit.conf": "*.*.mode = 2\n"}, ["audit.conf and audit.config differ"]),
    ({"audit.conf": AUDIT.replace(b" = ", b"=")}, ["audit.conf: line 1: ", "needs spaces"]),
    ({"audit.config": "*.*.accuracy_log_rng_seed = 07203"}, ["audit.config: line 1: ", "07203 as 3715"]),
    ({"audit.config": "*.*.qsl_rng_seed = 313588358309856706"}, ["line 1: ", "keeps 2085463073848966840"]),
    (
        {"audit.config": "bert.Offline.max_duration = 7"},
        ["line 1: ", "only the lines of model *", "`*.Offline.max_duration = 7`"],
    ),
    ({"audit.config": "*.*.min_query_count = 1000000000000"}, ["user.conf and audit.config: ", "more than 1e+09"]),
    ({"audit.config": "*.*.mode = 1"}, ["--accuracy"]),
]


@pytest.mark.parametrize("files, words", AUDIT_FAULTS)
def test_an_audit_file_that_loadgen_would_not_apply_is_named(audit, files, words):
    with refused(*words):
        audit(files)


def test_an_audit_file_of_performance_mode_is_refused_in_an_accuracy_run(audit):
    with refused("audit.config: line 1: '*.*.mode = 2': not this run's mode", "--accuracy"):
        audit({"audit.config": AUDIT}, accuracy=True)


def test_lines_of_other_models_in_an_audit_file_are_named_in_a_notice(audit, caplog):
    log = audit({"audit.config": AUDIT + b"stable-diffusion-xl.Offline.min_query_count = 500\n"})
    assert log["effective_accuracy_log_sampling_target"] == 4096
    assert [line for line in caplog.messages if "stable-diffusion-xl (line 4)" in line]


def test_run_py_hands_the_audit_file_to_loadgen(tmp_path):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    (tmp_path / "audit.config").write_bytes(AUDIT)
    script = backend_script(tmp_path)
    result = run_script(script, "--backend=pytorch", "--scenario=Offline", cwd=tmp_path)
    assert result.returncode == 0 and "audit.config: LoadGen applies" in result.stderr
    assert read_detail_log(tmp_path / "build/logs")["effective_accuracy_log_sampling_target"] == 4096
