"""The Dockerfile and its make targets, as far as they can be tested without a Docker engine."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, fails


@pytest.fixture
def make(tmp_path):
    """Return a function that runs `make -n` (print the commands, run none); .gpu(works) provides an nvidia-smi."""

    def call(*arguments):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        env.pop("DEVICE", None)
        command = ["make", "--no-print-directory", "-n", *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    def gpu(works):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho a message\nexit {int(not works)}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    call.gpu = gpu
    return call


def test_hadolint_finds_nothing_wrong():
    hadolint = os.path.join(os.path.dirname(sys.executable), "hadolint")
    command = [hadolint, "--no-color", ROOT / "Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("works, device", [(True, "gpu"), (False, "cpu")])
def test_a_working_gpu_decides_which_image_is_built_and_launched(make, works, device):
    make.gpu(works)
    built, launched = make("build_docker").stdout, make("launch_docker").stdout
    assert f"DEVICE={device} " in built
    assert f"mlperf-bert:{device} " in built
    assert launched.endswith(f"mlperf-bert:{device}\n")
    assert ("--gpus=all" in launched) == works


def test_device_overrides_nvidia_smi(make):
    make.gpu(True)
    assert "DEVICE=cpu " in make("build_docker", "DEVICE=cpu").stdout
    assert "--gpus" not in make("launch_docker", "DEVICE=cpu").stdout
    fails(make("build_docker", "DEVICE=cuda"), "DEVICE=cuda", "gpu or cpu")


def test_the_image_with_tensorflow_on_a_gpu_is_one_of_its_own(make):
    """PyTorch and TensorFlow bring different versions of CUDA."""
    launched = make("launch_docker", "DEVICE=tf-gpu").stdout
    assert "--gpus=all" in launched and launched.endswith("mlperf-bert:tf-gpu\n")
    packages = (ROOT / "requirements/tf-gpu.txt").read_text()
    assert "tensorflow[and-cuda]==" in packages and "torch" not in packages.replace("PyTorch", "")
    version = re.search(r"tensorflow==(\S+)", (ROOT / "requirements/tf.txt").read_text())[1]
    assert f"tensorflow[and-cuda]=={version}" in packages


def test_the_container_gets_the_project_the_users_ids_and_further_arguments(make):
    launched = make("launch_docker", "DEVICE=cpu", "DOCKER_ARGS=--env A=b").stdout.replace("\\\n", "")
    for word in (f'"{ROOT}:/workspace"', '"$(id -u):$(id -g)"', "--env A=b"):
        assert word in launched


def test_with_another_python_make_installs_nothing(make):
    for target in ("setup", "demo", "test"):
        lines = make(target, "PYTHON=some/python").stdout
        assert "some/python" in lines
        assert ".venv" not in lines
        assert "pip" not in lines


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RESOLVE_PACKAGES"), reason="takes minutes; RESOLVE_PACKAGES=1 runs it")
def test_the_gpu_images_packages_resolve_together(tmp_path):
    """For Python 3.11 on x86-64, by pip's resolver, which reads the packages' metadata and downloads none of them."""
    systems = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)]
    systems += ["linux_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-input"]
    command += ["--only-binary=:all:", "--python-version=3.11", "--target=none", "--report=report.json"]
    command += [f"--platform={system}" for system in systems]
    command += [f"--requirement={ROOT}/requirements/{name}.txt" for name in ("pytorch", "onnxruntime-gpu")]
    env = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=600)
    if "No matching distribution" in result.stderr and "conflicting dependencies" not in result.stderr:
        pytest.skip(f"the package index has not all packages: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    found = {package["metadata"]["name"].lower() for package in report["install"]}
    assert {"torch", "onnxruntime-gpu", "nvidia-ml-py"} <= found and "onnxruntime" not in found
