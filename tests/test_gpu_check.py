"""tools/gpu_check.py: a dry run on the CPU, faults of one part, the table, and a machine without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, fails

pytest.importorskip("torch")
from tools import gpu_check
from tools.gpu_check import DRY, Amounts, in_batches, parts, run_part, table


@pytest.fixture(autouse=True)
def environment():
    """Restore the environment, which a part that runs in this process changes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_a_dry_run_completes_every_part_on_the_cpu(script, tmp_path):
    result = script("tools.gpu_check", "--dry")
    assert result.returncode == 0, result.stderr + result.stdout
    saved = json.loads((tmp_path / "build/gpu_check/result.json").read_text())
    assert list(saved) == [name for name, _, _ in parts(DRY)]
    assert all("error" not in values for values in saved.values())
    assert saved["responses fp32"]["samples with other bytes in a batch"] == "0 of 6"
    assert saved["responses fp32"]["rms error / rms"] < 1e-5
    assert saved["offline fp32"]["samples/s"] > 0 and saved["server fp32"]["highest VALID target_qps (samples/s)"] > 0
    assert (tmp_path / "build/gpu_check/table.md").read_text() == result.stdout


def test_make_starts_the_check_with_its_arguments():
    command = ["make", "--no-print-directory", "-n", "gpu_check", "ARGS=--dry", "PYTHON=some/python"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["some/python", "-m", "tools.gpu_check", "--dry"]


def test_without_a_gpu_the_check_is_refused(script):
    fails(script("tools.gpu_check", CUDA_VISIBLE_DEVICES=""), "no GPU", "--dry")


def good(amounts, known, value):
    return {"value": value, "known": known}


def raising(amounts, known):
    raise ValueError("no such kernel\nsecond line")


def imported(amounts, known):
    return {"modules": list(sys.modules)}


def dying(amounts, known):
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(amounts, known):
    time.sleep(60)


@pytest.mark.slow
def test_the_process_that_parts_are_forked_from_has_not_initialized_cuda():
    """Importing torch.utils.cpp_extension does; a process that is forked afterwards cannot use CUDA."""
    modules = run_part(imported, (DRY, {}), 100)["modules"]
    assert "pytorch_SUT" in modules and "torch.utils.cpp_extension" not in modules


@pytest.mark.slow
def test_a_part_that_raises_dies_or_hangs_leaves_the_others_alone():
    assert run_part(raising, (DRY, {}), 100) == {"error": "ValueError: no such kernel"}
    assert run_part(dying, (DRY, {}), 100) == {"error": "its process died with exit status -9"}
    start = time.monotonic()
    assert run_part(hanging, (DRY, {}), 1) == {"error": "stopped after 1 s"}
    assert time.monotonic() - start < 30
    assert run_part(good, (DRY, {"a": {"b": 1}}, 7), 100) == {"value": 7, "known": {"a": {"b": 1}}}
    assert "left out" in run_part(good, (DRY, {}, 7), 0)["error"]


def test_a_failed_part_is_in_the_table_and_in_the_exit_status(monkeypatch, tmp_path, capsys, caplog):
    def run(function, args, limit_s):
        assert 0 < limit_s <= gpu_check.PART_S
        return {"error": "out of memory"} if function is gpu_check.responses else {"what": 1}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "run_part", run)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--dry"])
    for name in (*gpu_check.DEMO, "USE_GPU"):  # which --dry sets
        monkeypatch.setenv(name, "")
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines if "error" in line]
    assert cells == [["responses fp32", "error", "out of memory"]]
    assert "responses fp32 failed" in caplog.text
    assert json.loads((tmp_path / "build/gpu_check/result.json").read_text())["machine"] == {"what": 1}


def test_every_dtype_is_checked_and_measured_on_a_gpu():
    names = [name for name, _, _ in parts(Amounts())]
    assert {f"{part} {dtype}" for part in ("responses", "offline") for dtype in ("fp32", "fp16", "bf16")} <= set(names)
    assert {"latencies fp16", "server fp16"} <= set(names)
    assert names.index("cpu") < names.index("responses fp32") and names.index("offline fp16") < names.index(
        "server fp16"
    )


def test_the_table_has_the_share_of_the_dtypes_own_peak():
    results = {
        "products": {"fp32 (TFLOP/s)": 50, "fp16 (TFLOP/s)": 700},
        "offline fp16": {"2048 tokens (samples/s)": 3150, "samples/s": 3150.4, "operations/s": 350e12},
        "offline bf16": {"operations/s": 350e12},
    }
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table(results).splitlines()]
    assert ["offline fp16", "% of peak GEMM", "50"] in rows and ["offline bf16", "% of peak GEMM", ""] in rows
    assert ["offline fp16", "2048 tokens (samples/s)", "3150"] in rows
    assert not any("3150.4" in cell for row in rows for cell in row)


def test_a_saved_result_is_printed_without_a_gpu(monkeypatch, tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"machine": {"GPU": "NVIDIA H100"}}')
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--table", str(tmp_path / "result.json")])
    assert gpu_check.main() == 0
    assert "NVIDIA H100" in capsys.readouterr().out


def test_samples_in_batches_keep_their_own_logits():
    import numpy as np
    from helpers import NullBackend, random_batch

    from squad_QSL import SquadQSL

    class Echo(NullBackend):
        sizes = []

        def predict(self, batch):
            self.sizes.append(int(batch.lengths.sum()))
            return np.repeat(batch.packed(batch.input_ids)[:, None], 2, axis=1).astype(np.float32)

    batch = random_batch(20, 30, 40, 100)
    qsl = SquadQSL(batch)
    found = in_batches(Echo(), qsl, np.array([2, 0, 3, 1]), 60)
    assert Echo.sizes == [60, 100, 30] and [row for row, _ in found] == [2, 0, 3, 1]
    assert all((logits[:, 0] == batch.input_ids[row, : batch.lengths[row]]).all() for row, logits in found)
