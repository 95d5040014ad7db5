"""The Makefile: targets of the MLPerf reference, and which packages are installed."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, fails


def make(*arguments, folder=ROOT, **variables):
    """Run make in `folder`; variables of the environment that the tests' own make has set do not count."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "BACKEND")
    }
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=env | variables, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """Return a folder with the Makefile and the requirements, without .venv."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def test_make_alone_is_help():
    result = make()
    assert result.returncode == 0
    assert "make_demo" not in result.stdout and "run the embedded tiny BERT" in result.stdout


@pytest.mark.parametrize("target", ["venv", "demo", "soak"])
def test_an_unknown_backend_is_named_with_the_known_ones(target):
    fails(make("-n", target, "BACKEND=pytroch"), "BACKEND=pytroch", "onnxruntime", "pytorch")


def test_the_demo_needs_only_the_smallest_packages(copy):
    (copy / "demo/model").mkdir(parents=True)
    (copy / "demo/model/model.onnx").touch()
    lines = make("-n", "demo", folder=copy).stdout
    assert "-r requirements/onnxruntime.txt" in lines and "--backend=onnxruntime" in lines
    assert "convert" not in lines and "torch" not in lines
    lines = make("-n", "venv", "BACKEND=onnxruntime", folder=copy).stdout
    assert "-r requirements/onnxruntime.txt" in lines and "downloading" not in lines


@pytest.mark.parametrize("backend, size", [("pytorch", "2.8 GB"), ("test", "3.6 GB"), ("tf", "0.6 GB")])
def test_a_large_download_is_announced(copy, backend, size):
    first = make("-n", "venv", f"BACKEND={backend}", folder=copy).stdout.splitlines()[0]
    assert f"downloading up to {size}" in first
    assert ("TORCH=cpu" in first) == (backend != "tf")


def test_torch_cpu_takes_pytorch_from_its_own_index_first(copy):
    lines = make("-n", "venv", "BACKEND=pytorch", "TORCH=cpu", "TORCH_CPU_INDEX=file:///wheels", folder=copy).stdout
    index, rest = (line for line in lines.splitlines() if "pip install" in line)
    assert "--index-url file:///wheels torch==" in index
    assert "--index-url" not in rest and "requirements/pytorch.txt" in rest
    assert "file:///wheels" not in make("-n", "venv", "BACKEND=tf", "TORCH=cpu", folder=copy).stdout


@pytest.mark.parametrize("target", ["run_pytorch_accuracy", "run_onnxruntime_quantized_performance", "evaluate"])
def test_without_a_venv_the_python_of_the_path_runs_and_make_says_so(copy, target):
    for name in ("run.py", "accuracy-squad.py"):
        (copy / name).write_text("import sys; print(sys.argv)")
    (copy / "bin").mkdir()
    (copy / "bin/python3").symlink_to(sys.executable)
    result = make(target, folder=copy, PATH=f"{copy}/bin:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert f"there is no .venv; running with {copy}/bin/python3" in result.stderr


PIP = '#!/bin/sh\necho "$@" >>.venv/calls\n'
VENV = f"""#!/bin/sh
rm -rf .venv/bin
mkdir -p .venv/bin
printf '%s' '{PIP}' >.venv/bin/python
chmod +x .venv/bin/python
"""


@pytest.mark.parametrize("left", [None, "#!/bin/sh\nexit 1\n", PIP], ids=["nothing", "a Python without pip", "all"])
def test_make_venv_completes_what_an_interrupted_one_left(copy, left):
    """Python's venv makes Python first and pip last."""
    for name, content in (("bin/python3", VENV), (".venv/bin/python", left)):
        if content:
            (copy / name).parent.mkdir(parents=True)
            (copy / name).write_text(content)
            (copy / name).chmod(0o755)
    result = make("venv", "BACKEND=onnxruntime", folder=copy, PATH=f"{copy}/bin:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    calls = (copy / ".venv/calls").read_text()
    assert "-m pip install" in calls and ("--version" in calls) == (left == PIP)
    assert (copy / ".venv/.onnxruntime").exists()


def test_the_targets_of_the_reference_exist(copy):
    assert "no submodules" in make("init_submodule", folder=copy).stdout
    for target, backend in (
        ("download_data", "data"),
        ("download_tf_model", "tf"),
        ("download_pytorch_model", "pytorch"),
        ("download_onnx_model", "onnxruntime"),
    ):
        lines = make("-n", target, "PYTHON=python3", folder=copy).stdout
        assert f"python3 -m tools.download --backend={backend}\n" in lines
    launched = make("-n", "launch_docker", "DEVICE=cpu", "HOST_VOL=/data", "DOCKER_ARGS=--env A=b", folder=copy).stdout
    assert '"/data:/workspace"' in launched and "--env A=b" in launched
