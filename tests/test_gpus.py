"""models.gpus.py: what NVML says of the machine's GPUs, and the notice if a framework does not use them."""

import re
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from models import gpus
from models.gpus import Gpu, describe, find_gpus, notice_unused, visible

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, 2**30, "580.65.06", "13.0")


class NvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """Install a stand-in for NVML with two GPUs; `.fails` names a function that raises, `.open` counts connections."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = SimpleNamespace(fails=None, open=0)

    def give(name, result):
        def call(*args):
            if library.fails == name:
                raise NvmlError("Driver/library version mismatch")
            library.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return result(*args)

        return call

    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13010,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: ["GPU-1a", "GPU-2b"][handle],
        "nvmlDeviceGetName": lambda handle: ["NVIDIA H100 80GB HBM3", "Tesla T4"][handle],
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=(handle + 1) * 2**34, used=5),
    }
    module = SimpleNamespace(NVMLError=NvmlError, **{name: give(name, result) for name, result in functions.items()})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return library


def test_a_gpu_has_its_name_memory_driver_and_cuda_version(nvml):
    assert find_gpus() == [
        Gpu("NVIDIA H100 80GB HBM3", 2**34, 5, "580.65.06", "13.1"),
        Gpu("Tesla T4", 2**35, 5, "580.65.06", "13.1"),
    ]
    assert nvml.open == 0


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("1,7,0", [1]),
        ("GPU-2b", [1]),
        ("GPU-2b,0", [1, 0]),
        ("GPU-", []),  # of several
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted, expected):
    assert visible(["GPU-1a", "GPU-2b", "GPU-3c"], wanted) == expected


def test_hidden_gpus_are_not_found(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in find_gpus()] == ["Tesla T4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []


def test_without_a_driver_or_nvmls_package_there_is_no_gpu(nvml, monkeypatch, caplog):
    nvml.fails = "nvmlInit"
    assert find_gpus() == [] and not caplog.text
    nvml.fails = "nvmlDeviceGetName"
    assert find_gpus() == [] and "version mismatch" in caplog.text and nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert find_gpus() == []


def test_nvmls_real_package_has_every_function_that_is_called():
    nvml = pytest.importorskip("pynvml")
    called = set(re.findall(r"pynvml\.(\w+)", (ROOT / "models/gpus.py").read_text(encoding="utf-8")))
    assert {"nvmlInit", "nvmlShutdown", "nvmlDeviceGetName"} <= called
    assert [name for name in called if not hasattr(nvml, name)] == []


def test_a_description_names_each_kind_once_and_has_no_comma():
    assert describe([H100]) == "NVIDIA H100 80GB HBM3 (80 GiB); driver 580.65.06; CUDA 13.0"
    assert describe([H100, H100]).startswith("2 x NVIDIA H100 80GB HBM3 (80 GiB); driver")
    mixed = describe([H100, H100._replace(name="Tesla T4", memory_bytes=2**34)])
    assert mixed.startswith("2 x NVIDIA H100 80GB HBM3 (80 GiB) and Tesla T4 (16 GiB); driver")


@pytest.mark.parametrize("count", [1, 8])
def test_a_submission_describes_the_gpus_that_a_run_has_recorded(count):
    from tools.submission.plan import describe_system

    system = describe_system({"system": {}}, f"PyTorch 2.13.0, {describe([H100] * count)}, fp16")
    assert system["framework"] == "PyTorch 2.13.0" and system["accelerators_per_node"] == str(count)
    assert system["accelerator_model_name"] == "NVIDIA H100 80GB HBM3"
    assert system["accelerator_memory_capacity"] == "80 GiB"
    assert system["sw_notes"] == "NVIDIA driver 580.65.06, CUDA 13.0"
    assert gpus.parse_description("cpu") == gpus.parse_description("Tesla T4; CUDA 13.0") == {}


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        (None, "13.0", ["this PyTorch is built without CUDA; install another"]),
        ("13.0", "12.8", ["it needs a driver for CUDA 13.0", "12.8 at most; update the driver"]),
        ("13.2", "13.0", ["finds no GPU that it can use"]),
        ("9.2", "13.0", ["finds no GPU that it can use"]),
    ],
)
def test_a_gpu_that_a_framework_does_not_use_is_a_notice(monkeypatch, caplog, cuda, driver, words):
    monkeypatch.delenv("USE_GPU", raising=False)
    monkeypatch.setattr(gpus, "find_gpus", lambda: [H100._replace(cuda=driver)])
    notice_unused("PyTorch", cuda, "install another")
    for word in ["notice: PyTorch runs on the CPU, not on the NVIDIA H100 80GB HBM3", "USE_GPU=0", *words]:
        assert word in caplog.text


def test_there_is_no_notice_without_a_gpu_or_if_the_cpu_is_wanted(monkeypatch, caplog):
    monkeypatch.setattr(gpus, "find_gpus", lambda: [])
    notice_unused("PyTorch", None, "")
    monkeypatch.setattr(gpus, "find_gpus", lambda: [H100])
    monkeypatch.setenv("USE_GPU", "0")
    notice_unused("PyTorch", None, "")
    assert not caplog.text
