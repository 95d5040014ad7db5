"""tools/submission: what depends on MLPerf's version (seeds, folders), on the division, and MLPerf's own checker."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PLAN_VALUES, ROOT, refused
from submission_trees import log, remove, replace, valid_tree, write_tree

from backends import RunOptions
from loadgen import loadgen_settings
from tools.submission import __main__
from tools.submission.check import VERSIONS, check, seeds
from tools.submission.runs import check_seeds

RESULTS = "results/machine/bert-99/Offline"
SEEDS = {
    "v6.1": (2085463073848966840, 2747215439041700203, 16159082839903944936),
    "v6.0": (2465351861681999779, 14276810075590677512, 3936089224930324775),
    "v5.1": (1780908523862526354, 14771362308971278857, 18209322760996052031),
    "v5.0": (6023615788873153749, 15036839855038426416, 9933818062894767841),
}
MEASUREMENTS = {
    "v6.1": RESULTS,
    "v6.0": RESULTS,
    "v5.1": "measurements/machine/bert-99/Offline",
    "v5.0": "measurements/machine/bert-99/Offline",
}
TEST01 = {
    "v6.1": f"{RESULTS}/TEST01",
    "v6.0": f"{RESULTS}/TEST01",
    "v5.1": "compliance/machine/bert-99/Offline/TEST01",
    "v5.0": "compliance/machine/bert-99/Offline/TEST01",
}


@pytest.fixture
def submission(monkeypatch, capsys):
    """Return a function that runs the command in this process: (exit status, lines of standard output)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["submission", *map(str, args)])
        status = __main__.main()
        return status, capsys.readouterr().out.splitlines()

    return run


# Versions.


def test_the_seeds_of_each_version_are_those_of_mlperfs_checker():
    assert {version: tuple(seeds(version).values()) for version in VERSIONS} == SEEDS
    assert all(
        list(seeds(version)) == ["qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed"] for version in SEEDS
    )


def test_loadgen_ships_the_seeds_of_v6_1(tmp_path):
    """In a new process, because LoadGen reads its own settings only once."""
    (tmp_path / "user.conf").write_text("")
    code = """if True:
        import mlperf_loadgen as lg
        settings = lg.TestSettings()
        settings.FromConfig("user.conf", "bert", "Offline")
        print(settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert tuple(map(int, result.stdout.split())) == SEEDS["v6.1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tree_in_the_form_of_its_version_has_no_faults(tmp_path, version, caplog):
    caplog.set_level("INFO", "bert")
    tree = write_tree(tmp_path / "tree", valid_tree(version))
    top = tree / "closed/Someone"
    if version.startswith("v5"):
        path = top / MEASUREMENTS[version] / "measurements.json"
        for scenario in ("Offline", "SingleStream"):
            path = top / MEASUREMENTS[version].replace("Offline", scenario) / "measurements.json"
            path.rename(path.with_name("machine.json"))
    assert check(str(tree)) == check(str(tree), version) == [] and "notice" not in caplog.text
    assert (
        f"by the rules of {version}, whose seeds its logs have (this check knows v6.1, v6.0, v5.1, v5.0)" in caplog.text
    )
    name = "machine.json" if version.startswith("v5") else "measurements.json"
    source = "code/bert-99/run.py" if version.startswith("v5") else "src/run.py"
    for path in (
        f"{MEASUREMENTS[version]}/{name}",
        f"{MEASUREMENTS[version]}/user.conf",
        f"{MEASUREMENTS[version]}/README.md",
        f"{TEST01[version]}/verify_accuracy.txt",
        f"{TEST01[version]}/performance/run_1/mlperf_log_detail.txt",
        source,
    ):
        text = (top / path).read_text()
        remove(top / path)
        (fault,) = check(str(tree), version)
        assert fault.startswith(str(top / path).removesuffix(name).removesuffix("/run.py")) and "is missing" in fault
        (top / path).write_text(text)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_seeds_of_another_version_are_faults(tmp_path, version, submission):
    other = "v6.1" if version == "v6.0" else "v6.0"
    tree = write_tree(tmp_path / "tree", valid_tree(version))
    path = tree / "closed/Someone" / RESULTS / "performance/run_1/mlperf_log_detail.txt"
    log(**{f"effective_{name}": seed for name, seed in seeds(other).items()})(path)
    status, lines = submission("--check", tree, "--version", version)
    wanted = [
        f"{path}: effective_{name} is {found}, expected {expected}"
        for (name, expected), found in zip(seeds(version).items(), seeds(other).values())
    ]
    assert status == 1 and lines == wanted


def test_the_layout_of_another_version_is_a_fault(tmp_path):
    tree = write_tree(tmp_path / "tree", valid_tree("v6.1"))
    faults = check(str(tree), "v5.1")
    for path in (f"{MEASUREMENTS['v5.1']}/measurements.json", f"{TEST01['v5.1']}/verify_accuracy.txt", "code/bert-99"):
        assert f"{tree}/closed/Someone/{path}: is missing" in faults


def test_without_logs_of_a_known_version_the_newest_counts(tmp_path, caplog):
    caplog.set_level("INFO", "bert")
    tree = write_tree(tmp_path / "tree", {"closed/Someone/results/machine/bert-99/Offline/user.conf": ""})
    assert check(str(tree)) and "by the rules of v6.1, the newest; its logs have no known seeds" in caplog.text


def test_v5_1_reads_measurements_from_a_file_with_the_systems_name(tmp_path, caplog):
    tree = write_tree(tmp_path / "tree", valid_tree("v5.1"))
    assert check(str(tree)) == []
    assert "measurements.json: MLPerf's checker of v5.1 reads a file whose name begins with the system's" in caplog.text


def uncited(rules):
    """Return the lines of a rules.toml without a source: on it, in the comment before it, or at its table."""
    source = re.compile(r'#.*(\b[\w/]+\.(py|md|sh|config)|\b[A-Z]+_[A-Z_]+|"[a-z]+[a-z-]+")')
    found, table, comment = [], False, False
    for line in rules.split("\n\n", 1)[1].splitlines():  # without the comment at the top
        if line.startswith("#"):
            comment = comment or bool(source.search(line))
        elif line.startswith("["):
            cited = comment or bool(source.search(line))
            table, comment = cited or (table and line.startswith('[versions."')), False
        elif re.match(r'["\w.-]+ = ', line):
            if not (table or comment or source.search(line)):
                found.append(line)
            comment = False
    return found


def test_every_rule_cites_its_source():
    text = (ROOT / "tools/submission/rules.toml").read_text()
    assert uncited(text) == []
    assert uncited(text.replace("# TEST_DURATION_MS", "")) == ["effective_min_duration_ms = 600000          "]
    assert len(uncited(re.sub("#.*", "", text))) > 20


# Seeds in user.conf.


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["*.*.qsl_rng_seed = 14276810075590677512"], 14276810075590677512),  # more than 2^63
        (["*.*.qsl_rng_seed = 1", "bert.*.qsl_rng_seed = 2"], 2),
        (["*.Offline.qsl_rng_seed = 3", "bert.*.qsl_rng_seed = 2"], 3),
        (["bert.Offline.qsl_rng_seed = 4", "*.Offline.qsl_rng_seed = 3"], 4),
        (["*.Server.qsl_rng_seed = 5", "resnet.*.qsl_rng_seed = 6", "# *.*.qsl_rng_seed = 7"], None),
    ],
)
def test_the_seeds_of_a_user_conf_reach_loadgen(tmp_path, lines, expected):
    """LoadGen itself ignores them there."""
    path = tmp_path / "user.conf"

    def seed():
        return loadgen_settings(RunOptions(scenario="Offline", user_conf=str(path)))[0].qsl_rng_seed

    path.write_text("")
    seed()  # LoadGen reads its own settings only once in a process
    default = seed()
    path.write_text("\n".join(lines))
    assert seed() == (expected or default)


@pytest.mark.parametrize("value", ["1.5", "1e-5", "seven"])
def test_a_seed_that_is_no_whole_number_is_refused(tmp_path, value):
    path = tmp_path / "user.conf"
    path.write_text(f"*.*.schedule_rng_seed = {value}\n")
    with refused(str(path), "schedule_rng_seed", value):
        loadgen_settings(RunOptions(scenario="Offline", user_conf=str(path)))


def test_a_user_conf_with_other_seeds_than_the_versions_is_refused(tmp_path):
    path = tmp_path / "user.conf"
    path.write_text("".join(f"*.*.{name} = {seed}\n" for name, seed in seeds("v5.0").items()))
    check_seeds(str(path), "v5.0")
    with refused("user.conf", f"qsl_rng_seed = {SEEDS['v5.0'][0]}", "v6.0, sets the seeds; remove this line"):
        check_seeds(str(path), "v6.0")


# The open division needs no compliance test.


@pytest.mark.parametrize(
    "path, change, words",
    [
        ("TEST01/performance/run_1/mlperf_log_detail.txt", log(result_samples_per_second=89), "is not within 10%"),
        (
            "TEST01/performance/run_1/mlperf_log_detail.txt",
            log(result_validity="INVALID"),
            "result_validity is INVALID",
        ),
        ("TEST01/verify_performance.txt", replace("PASS", "FAIL"), "has no line TEST PASS"),
        ("TEST01/verify_accuracy.txt", remove, "verify_accuracy.txt: is missing"),
        ("TEST01", remove, "TEST01/verify_performance.txt: is missing"),
    ],
)
def test_a_fault_of_test01_is_a_notice_in_the_open_division(tmp_path, submission, caplog, path, change, words):
    for division in ("closed", "open"):
        tree = write_tree(tmp_path / division, valid_tree(division=division))
        change(tree / division / "Someone" / RESULTS / path)
        caplog.clear()
        status, lines = submission("--check", tree)
        if division == "closed":
            assert status == 1 and words in "\n".join(lines) and "notice" not in caplog.text
        else:
            assert (status, lines) == (0, [f"{tree}: no faults"])
            assert any(
                words in line and "the open division needs no compliance test" in line for line in caplog.messages
            )


def test_other_faults_count_in_the_open_division(tmp_path, submission):
    tree = write_tree(tmp_path / "tree", valid_tree(division="open"))
    log(result_validity="INVALID")(tree / "open/Someone" / RESULTS / "performance/run_1/mlperf_log_detail.txt")
    status, lines = submission("--check", tree)
    assert status == 1 and len(lines) == 1 and "result_validity is INVALID" in lines[0]


# MLPerf's own checker, by a stand-in with the same module and command line.

STAND_IN = """\
import argparse, logging, os, sys
{statement}
logging.basicConfig(level=logging.INFO)
log = logging.getLogger("main")
parser = argparse.ArgumentParser()
parser.add_argument("--input", required=True)
parser.add_argument("--version", default="v5.1", choices=["v5.0", "v5.1", "v6.0"])
parser.add_argument("--submitter")
parser.add_argument("--csv", default="summary.csv")
args = parser.parse_args()
open(args.csv, "w").write("Organization\\n")
valid = True
for division in sorted(os.listdir(args.input)):
    log.info("%s by the rules of %s", division, args.version)
    if not os.path.isdir(os.path.join(args.input, division, "Someone", "results")):
        log.error("%s has no results", division)
        valid = False
log.info("SUMMARY: submission looks OK") if valid else log.error("SUMMARY: submission has errors")
sys.exit(0 if valid else 1)
"""


@pytest.fixture
def checkout(tmp_path):
    """Return a function that writes a checkout with the stand-in, which first runs `statement`; returns its folder."""

    def make(statement="from . import constants", file="submission_checker/main.py"):
        text = STAND_IN.format(statement=statement)
        files = {file: text, "submission_checker/constants.py": ""}
        return write_tree(tmp_path / "inference", {f"tools/submission/{name}": files[name] for name in files})

    return make


def test_mlperfs_own_checker_checks_the_tree_and_is_shown(tmp_path, submission, checkout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "tree", valid_tree("v6.0"))
    before = sorted(tmp_path.rglob("*"))
    folder = checkout()
    status, lines = submission("--check", "tree", "--official", "inference")
    assert status == 0 and lines == [
        "tree: no faults",
        "INFO:main:closed by the rules of v6.0",
        "INFO:main:SUMMARY: submission looks OK",
        "tree: MLPerf's checker (inference) accepts it: INFO:main:SUMMARY: submission looks OK",
    ]
    assert [path for path in sorted(tmp_path.rglob("*")) if folder not in (path, *path.parents)] == before
    (tmp_path / "tree/new\nline").mkdir()
    status, lines = submission("--check", "tree", "--official", folder)
    assert status == 1 and "ERROR:main:new" in lines
    assert lines[-1].endswith("does not accept it: ERROR:main:SUMMARY: submission has errors")


def test_the_checker_may_be_one_file_as_before_v6_0(tmp_path, submission, checkout):
    tree = write_tree(tmp_path / "tree", valid_tree("v5.1"))
    folder = checkout("import log_parser", "submission_checker.py")
    (folder / "tools/submission/log_parser.py").touch()
    status, lines = submission("--check", tree, "--official", folder)
    assert status == 0 and "INFO:main:closed by the rules of v5.1" in lines


@pytest.mark.parametrize(
    "statement, version, words",
    [
        ("import yaml_that_is_missing", "v6.0", ["needs the package yaml_that_is_missing", "-m pip install"]),
        ("raise ModuleNotFoundError(\"No module named 'yaml'\")", "v6.0", ["-m pip install pyyaml"]),
        ("", "v6.1", ["ended with status 2", "invalid choice: 'v6.1'", "give a checkout that knows v6.1"]),
        ("os.abort()", "v6.0", ["ended with status -6"]),
    ],
)
def test_a_checker_that_cannot_run_is_one_line(tmp_path, submission, checkout, statement, version, words):
    tree = write_tree(tmp_path / "tree", valid_tree(version))
    with refused("inference", *words):
        submission("--check", tree, "--official", checkout(statement))


def test_a_folder_without_the_checker_is_refused_before_any_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user.conf").touch()
    text = (ROOT / "tools/submission/plan.toml").read_text()
    for name, value in PLAN_VALUES.items():
        text = re.sub(rf'^{name} = "[^"]*"', f'{name} = "{value}"', text, flags=re.MULTILINE)
    Path("plan.toml").write_text(text)
    with refused("nowhere: no tools/submission/submission_checker in it", "mlcommons/inference"):
        __main__.submit("plan.toml", "nowhere")
    assert not Path("build").exists()
