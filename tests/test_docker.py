"""The Dockerfile and the commands around it, as far as they go without a Docker engine: hadolint, and what make would run."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, fails


@pytest.fixture
def command(tmp_path):
    """What `make TARGET …` would run, its CompletedProcess; .gpu(answers) puts an nvidia-smi on the path."""
    def call(*arguments):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        env.pop("DEVICE", None)
        return subprocess.run(["make", "--no-print-directory", "-n", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    def gpu(answers):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho a message\nexit {int(not answers)}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    call.gpu = gpu
    return call


def test_hadolint_has_nothing_to_say():
    hadolint = os.path.join(os.path.dirname(sys.executable), "hadolint")
    result = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("answers, device", [(True, "gpu"), (False, "cpu")])
def test_the_gpu_decides_which_image_is_built_and_launched(command, answers, device):
    command.gpu(answers)
    built, launched = command("build_docker").stdout, command("launch_docker").stdout
    assert f"DEVICE={device} " in built and f"mlperf-bert:{device} " in built and launched.endswith(f"mlperf-bert:{device}\n")
    assert ("--gpus=all" in launched) == answers


def test_device_decides_whatever_nvidia_smi_says(command):
    command.gpu(True)
    assert "DEVICE=cpu " in command("build_docker", "DEVICE=cpu").stdout
    assert "--gpus" not in command("launch_docker", "DEVICE=cpu").stdout
    fails(command("build_docker", "DEVICE=cuda"), "DEVICE=cuda", "gpu or cpu")


def test_the_container_gets_the_project_the_users_ids_and_further_arguments(command):
    launched = command("launch_docker", "DEVICE=cpu", "DOCKER_ARGS=--env A=b").stdout.replace("\\\n", "")
    for word in (f'"{ROOT}:/workspace"', '"$(id -u):$(id -g)"', "--env A=b"):
        assert word in launched


def test_with_a_python_of_ones_own_make_installs_nothing(command):
    for target in ("setup", "demo", "test"):
        lines = command(target, "PYTHON=some/python").stdout
        assert "some/python" in lines and ".venv" not in lines and "pip" not in lines
