"""The Dockerfile and its make targets, as far as they can be tested without a Docker engine."""

import os
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
