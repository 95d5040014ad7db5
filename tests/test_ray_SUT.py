"""The Ray backend on a local cluster and on two nodes, through run.py, with the demo's model: scores, losses, faults."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from conftest import DEMO_ENV, ROOT, fails
from test_run import CONF, responses

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """RAY_ADDRESS and so on of a cluster of two nodes of one core, each on a loopback address of its own."""
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, whose paths must be short
    with socket.create_server(("127.0.0.2", 0)) as server:
        address = f"127.0.0.2:{server.getsockname()[1]}"
    variables = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    common = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    nodes = []
    try:
        for ip, args in (("127.0.0.2", ["--head", f"--port={address.split(':')[1]}", f"--temp-dir={folder}",
                                        "--include-dashboard=false"]),
                         ("127.0.0.3", [f"--address={address}"])):
            nodes.append(subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={ip}", *args, *common],
                env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            while "--block" not in (line := nodes[-1].stdout.readline()):
                assert line, "ray start failed"
        yield variables
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(script, tmp_path):
    """run.py with a user.conf of short runs: run("--backend=…", …, NAME=value)."""
    (tmp_path / "user.conf").write_text(CONF.replace("target_qps = 40", "target_qps = 200"))
    return lambda *args, **variables: script("run.py", *args, **variables)


@pytest.fixture
def local(run, tmp_path):
    """The responses of an accuracy run without Ray: local("--backend=…", …, NAME=value)."""
    def call(*args, **variables):
        result = run("--accuracy", *args, LOG_PATH="local", **variables)
        assert result.returncode == 0, result.stderr
        return logged(tmp_path / "local")
    return call


def logged(folder):
    return {row: response.tobytes() for row, response in responses(folder).items()}


@pytest.fixture
def ray_folder(monkeypatch):
    """Where Ray keeps the files of a local cluster; not in the test's own folder, for sockets' paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield folder


def open_files(folder):
    """{process id: set of what its file descriptors are} of the processes that have a file in `folder` open."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:
            continue  # ended meanwhile
        if any(file.startswith(folder) for file in files):
            found[int(process.name)] = files
    return found


def gone(folder):
    """Whether no process has a file in `folder` open, now or within ten seconds."""
    deadline = time.monotonic() + 10
    while open_files(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not open_files(folder)


def listening(files):
    """The addresses on which the sockets among `files` listen, as in /proc/net: hexadecimal, without the port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in files}


# run.py with another backend in the actors: PyTorch's, whose predict first does as the test says, but for the warming up
# with one sample.
ODD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import config, run
from pytorch_SUT import PyTorchBackend

class Odd(PyTorchBackend):
    def predict(self, batch):
        if len(batch) > 1:
            BODY
        return super().predict(batch)

run.BACKENDS["pytorch"] = ("__main__", "Odd", ("fp32",))
config.script(run.main)
"""


def test_two_nodes_answer_with_the_same_bytes_as_one_process(run, local, tmp_path, cluster):
    result = run("--backend=ray", "--scenario=Server", "--accuracy", LOG_PATH="ray", **cluster)
    assert result.returncode == 0, result.stderr
    assert "2 actors on 2 nodes" in result.stderr
    assert logged(tmp_path / "ray") == local("--backend=pytorch", "--scenario=Server")


def test_a_local_cluster_listens_on_loopback_answers_with_the_same_bytes_and_ends(tmp_path, local, ray_folder):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "slow.py").write_text(ODD.replace("len(batch) > 1", "True").replace("BODY", "time.sleep(0.05)"))
    process = start(tmp_path / "slow.py", "--scenario=SingleStream", "--max_examples=60", "--accuracy",
                    LOG_PATH="ray")
    assert listening(set.union(*open_files(ray_folder).values())) == {"0100007F", "0000000000000000FFFF00000100007F"}
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "exact_match" in out.splitlines()[-1]
    assert err.count("\n") < 10, err  # no noise of Ray's
    assert gone(ray_folder)
    assert logged(tmp_path / "ray") == local("--backend=pytorch", "--scenario=SingleStream", "--max_examples=60")


def start(path, *args, **variables):
    """Start the script `path` in its folder; returns the Popen once LoadGen runs."""
    process = subprocess.Popen([sys.executable, path, "--backend=ray", *args], cwd=path.parent, text=True,
                               env={**os.environ, **DEMO_ENV, **variables}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while "running" not in (line := process.stderr.readline()):
        assert line, "run.py failed"
    return process


def test_a_terminated_run_ends_its_local_cluster(tmp_path, ray_folder):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "slow.py").write_text(ODD.replace("BODY", "time.sleep(0.2)"))
    process = start(tmp_path / "slow.py", "--accuracy")
    assert len(open_files(ray_folder)) > 5
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 143 and "incomplete" in err and "Traceback" not in err
    assert gone(ray_folder)


def test_killed_actors_change_nothing(tmp_path, local, cluster):
    """The second is killed while the first is being replaced. Batches take random times, so that they end out of order."""
    (tmp_path / "user.conf").write_text(CONF)
    body = f"""open(os.path.join({str(tmp_path)!r}, f"{{os.getpid()}}.pid"), "w").close()
            time.sleep(0.1 * int.from_bytes(os.urandom(1)) / 255)"""
    (tmp_path / "slow.py").write_text(ODD.replace("BODY", body))
    process = start(tmp_path / "slow.py", "--accuracy", "--batch_tokens=400", LOG_PATH="ray", **cluster)
    deadline = time.monotonic() + 20
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert err.count("a Ray actor is lost") == 2
    assert len(list(tmp_path.glob("*.pid"))) == 4  # the replacements have worked as well
    assert logged(tmp_path / "ray") == local("--backend=pytorch")


def test_a_batch_that_kills_every_actor_ends_the_run(tmp_path, script, cluster):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "poison.py").write_text(ODD.replace("BODY", "os.kill(os.getpid(), signal.SIGKILL)"))
    fails(script(tmp_path / "poison.py", "--backend=ray", **cluster), "lost its Ray actor 3 times")


def test_a_fault_in_an_actor_ends_the_run_with_its_message(tmp_path, script, cluster):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "faulty.py").write_text(ODD.replace("BODY", "raise ValueError('no such layer')"))
    result = script(tmp_path / "faulty.py", "--backend=ray", **cluster)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "run.py: error: the run failed: ValueError: no such layer"


def test_int8_is_calibrated_by_the_driver(run, local, tmp_path, cluster):
    result = run("--backend=ray", "--dtype=int8", "--accuracy", LOG_PATH="ray", **cluster)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("calibrating") == 1
    assert logged(tmp_path / "ray") == local("--backend=pytorch", "--dtype=int8")


def test_actors_run_another_backend(run, local, tmp_path, cluster, demo_models):
    model = demo_models["onnxruntime"]
    result = run("--backend=ray:onnxruntime", "--accuracy", LOG_PATH="ray", ML_MODEL_FILE_WITH_PATH=model, **cluster)
    assert result.returncode == 0, result.stderr
    assert re.search(r"Ray .*: ONNX Runtime", result.stderr)
    assert logged(tmp_path / "ray") == local("--backend=onnxruntime", ML_MODEL_FILE_WITH_PATH=model)


def test_resources_that_others_hold_are_named(tmp_path, script, cluster):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "hog.py").write_text("""
import ray, time
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
def hold():
    time.sleep(100)

hog = hold.remote()
while ray.available_resources().get("CPU", 0) > 1:
    time.sleep(0.1)
print("holding", flush=True)
ray.get(hog)
""")
    hog = subprocess.Popen([sys.executable, tmp_path / "hog.py"], env={**os.environ, **cluster}, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert hog.stdout.readline() == "holding\n"
        (tmp_path / "impatient.py").write_text(ODD.replace("import config, run", "import config, ray_SUT, run")
                                               .replace("class Odd", "ray_SUT.START_S = 12\nclass Odd"))
        fails(script(tmp_path / "impatient.py", "--backend=ray", **cluster), "1 of 2 Ray actors", "CPUs")
    finally:
        hog.kill()
        hog.communicate()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "6379"])
def test_a_cluster_that_does_not_answer_is_named(run, address):
    started = time.monotonic()
    fails(run("--backend=ray", RAY_ADDRESS=address), f"RAY_ADDRESS={address}")
    assert time.monotonic() - started < 40


def test_what_an_actor_cannot_use_is_named(run, tmp_path, cluster):
    (tmp_path / "model.pytorch").write_text("no model")
    fails(run("--backend=ray", ML_MODEL_FILE_WITH_PATH="model.pytorch", **cluster), "model.pytorch", "damaged")
    fails(run("--backend=ray", MLC_MAX_NUM_THREADS="64", **cluster), "64 cores", "MLC_MAX_NUM_THREADS")
