"""MLCommons' automation: its command lines, variables and settings, run twice into the same folders.

The commands are those of mlperf-automations with mlcflow 1.3.8, seen in 2026. The test reads what the automation reads.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import DEMO_ENV, LIMIT_S, ONE_THREAD, ROOT

MODEL = ROOT / "demo/model/model.onnx"
SAMPLES = 80
# The automation's settings of a test run. Its own target_qps of 1.0 would make a Server run take 80 seconds, and its 80
# queries are 640 samples in MultiStream.
USER_CONF = """
bert.{scenario}.{target}
bert.{scenario}.max_query_count = {queries}
bert.{scenario}.min_query_count = {queries}
bert.{scenario}.min_duration = 0
bert.{scenario}.sample_concatenate_permutation = 0
bert.{scenario}.max_duration = 30000
"""
TARGETS = {
    "Offline": "target_qps = 1.0",
    "Server": "target_qps = 40.0",
    "SingleStream": "target_latency = 1000",
    "MultiStream": "target_latency = 1000",
}
# TEST01's settings.
AUDIT_CONFIG = """*.*.mode = 2
*.*.accuracy_log_rng_seed = 720381539243781796
*.*.accuracy_log_sampling_target = 4096
"""
RUN = """
python3 run.py --backend=onnxruntime --scenario={scenario} {flags} --user_conf '{conf}' \
    2>&1 | tee "$LOG_PATH/console.out"; echo ${{PIPESTATUS[0]}} > exitstatus
"""
SCORE = """
python3 accuracy-squad.py --val_data "$DATASET_FILE" --log_file "$LOG_PATH/mlperf_log_accuracy.json" \
    --vocab_file "$VOCAB_FILE" --out_file "$LOG_PATH/predictions.json" \
    --features_cache_file "$LOG_PATH/eval_features.pickle" --output_dtype float32 --max_examples {samples} \
    > "$LOG_PATH/accuracy.txt"
"""


@pytest.fixture
def shell(tmp_path):
    """Return a function that runs a script of bash as the automation does, in a folder with the project's scripts."""
    for path in (*ROOT.glob("*.py"), ROOT / "convert", ROOT / "models", ROOT / "tools"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)

    def call(script, log_path):
        log_path.mkdir(parents=True, exist_ok=True)
        env = (
            os.environ
            | DEMO_ENV
            | ONE_THREAD
            | {
                "ML_MODEL_FILE_WITH_PATH": str(MODEL),
                "LOG_PATH": str(log_path),
                "SKIP_VERIFY_ACCURACY": "True",
                "USE_GPU": "False",
                "USE_CUDA": "False",
                "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": "CPUExecutionProvider",
                "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            }
        )
        command = ["bash", "-c", script]
        return subprocess.run(command, cwd=tmp_path, env=env, timeout=LIMIT_S, capture_output=True, text=True)

    return call


def detail(folder):
    """Return {key: value} of a detail log."""
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    return {entry["key"]: entry["value"] for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", TARGETS)
def test_what_the_automation_runs_and_reads(shell, tmp_path, scenario):
    """Offline runs twice into the same folders, as a repeated command of the automation does."""
    results = tmp_path / "results/bert-99" / scenario.lower()
    conf, audit = tmp_path / "user.conf", tmp_path / "compliance/TEST01/bert/audit.config"
    queries = SAMPLES // 8 if scenario == "MultiStream" else SAMPLES
    conf.write_text(USER_CONF.format(scenario=scenario, target=TARGETS[scenario], queries=queries))
    audit.parent.mkdir(parents=True)
    audit.write_text(AUDIT_CONFIG)
    kinds = {
        "performance/run_1": "",
        "accuracy": f"--max_examples {SAMPLES} --accuracy",
        "TEST01": f"--audit '{audit}'",
    }
    for _ in range(2 if scenario == "Offline" else 1):
        for kind, flags in kinds.items():
            result = shell(RUN.format(scenario=scenario, flags=flags, conf=conf), results / kind)
            assert (tmp_path / "exitstatus").read_text() == "0\n", result.stdout
            log = detail(results / kind)
            assert log["effective_scenario"] == scenario
            summary = (results / kind / "mlperf_log_summary.txt").read_text()
            if kind == "accuracy":
                shell(SCORE.format(samples=SAMPLES), results / kind)
                (line,) = (results / kind / "accuracy.txt").read_text().splitlines()
                assert json.loads(line)["f1"] > 80
                assert len(json.loads((results / kind / "mlperf_log_accuracy.json").read_text())) == SAMPLES
            else:
                assert log["result_validity"] in ("VALID", "INVALID")
                assert "Result is" in summary
                assert (scenario != "Offline") or "Samples per second: " in summary
            if kind == "TEST01":
                assert log["effective_accuracy_log_sampling_target"] == 4096
                assert json.loads((results / kind / "mlperf_log_accuracy.json").read_text())
        assert sorted(path.name for path in results.iterdir()) == ["TEST01", "accuracy", "performance"]
        assert [path.name for path in (results / "performance").iterdir()] == ["run_1"]
    assert not (tmp_path / "build/logs").exists()


@pytest.mark.slow
def test_the_network_mode_takes_the_automations_two_servers(shell, tmp_path):
    """A shell joins the two quoted servers of the automation into one word with a comma."""
    conf = tmp_path / "user.conf"
    conf.write_text(USER_CONF.format(scenario="Offline", target=TARGETS["Offline"], queries=SAMPLES))
    servers = "'http://localhost:18611','http://localhost:18612'"
    script = f"""
    for port in 18611 18612; do
        python3 run.py --backend=onnxruntime --user_conf '{conf}' --network sut --node node$port --port $port &
    done
    for port in 18611 18612; do until (exec 3<>/dev/tcp/localhost/$port) 2>/dev/null; do sleep 0.2; done; done
    python3 run.py --backend=onnxruntime --scenario=Offline --user_conf '{conf}' --network lon --sut_server {servers}
    echo $? > exitstatus
    kill %1 %2
    """
    result = shell(script, tmp_path / "results")
    assert (tmp_path / "exitstatus").read_text() == "0\n", result.stderr
    assert detail(tmp_path / "results")["sut_name"].count("node1861") == 2
