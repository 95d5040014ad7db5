"""The Ray backend on a local cluster and on two nodes, with the demo's model: responses, lost actors, faults."""

import importlib.util
import json
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

import numpy as np
import pytest
from helpers import DEMO_ENV, DEMO_ONNX, LIMIT_S, ROOT, SHORT_RUNS, random_batch, refused, run_script, running
from servers import responses

from backends import Backend, RunOptions

if not importlib.util.find_spec("ray"):  # imported by `driver`, because Ray reads its variables then
    pytest.skip("the package ray is absent", allow_module_level=True)
pytestmark = pytest.mark.slow

# run.py with another backend on the actors: ONNX Runtime's, which starts fastest, but its `predict` first executes
# BODY, except for one sample (the warm-up).
SCRIPT = f"""\
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import backends, config, run
from onnxruntime_SUT import OnnxRuntimeBackend

class Fake(OnnxRuntimeBackend):
    def predict(self, batch):
        if len(batch) > 1:
            BODY
        return super().predict(batch)

backends.BACKENDS["onnxruntime"] = backends.Entry("__main__", "Fake", ("fp32",))
config.run_command(run.main)
"""


@pytest.fixture(scope="module")
def cluster():
    """Return the variables (RAY_ADDRESS, …) of a cluster of two nodes of one core, each on its own loopback address."""
    folder = tempfile.mkdtemp(prefix="ray-")  # it holds sockets, whose paths must be short
    with socket.create_server(("127.0.0.2", 0)) as server:
        address = f"127.0.0.2:{server.getsockname()[1]}"
    variables = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    common = "--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"
    common += "--no-monitor", "--include-log-monitor=false"  # processes that run.py does not need
    port = address.split(":")[1]
    head = (
        "--node-ip-address=127.0.0.2",
        "--head",
        f"--port={port}",
        f"--temp-dir={folder}",
        "--include-dashboard=false",
    )
    nodes = []
    try:
        for args in (head, ("--node-ip-address=127.0.0.3", f"--address={address}")):
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *args, *common]
            env = {**os.environ, **variables}
            nodes.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            assert any("--block" in line for line in nodes[-1].stdout), "ray start failed"
        yield variables
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate(timeout=LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def driver(cluster, monkeypatch, tmp_path):
    """Return the module ray_SUT, with this process as the driver and an empty folder as its working folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in (cluster | DEMO_ENV).items():
        monkeypatch.setenv(name, value)
    import ray

    import ray_SUT

    yield ray_SUT
    ray.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the responses of an accuracy run without Ray, {sample: bytes}."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "user.conf").write_text(SHORT_RUNS)
    result = run_script("run.py", "--backend=onnxruntime", "--accuracy", cwd=folder, LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    return logged(folder / "logs")


def logged(folder):
    return {row: response.tobytes() for row, response in responses(folder).items()}


@pytest.fixture
def ray_folder(monkeypatch):
    """Return where Ray keeps the files of a local cluster, a folder with a short path (it holds sockets)."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield folder


def open_files(folder):
    """Return {process id: what its file descriptors are} for the processes that have a file in `folder` open."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:
            continue  # it has ended
        if any(file.startswith(folder) for file in files):
            found[int(process.name)] = files
    return found


def closed(folder):
    """Return whether no process has a file in `folder` open, now or within ten seconds."""
    deadline = time.monotonic() + 10
    while open_files(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not open_files(folder)


def listening(files):
    """Return the addresses on which the sockets among `files` listen, hexadecimal as in /proc/net, without the port."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in files}


@pytest.fixture
def fake_run(tmp_path):
    """Return a function of (BODY of SCRIPT, flag, …, NAME=value) that starts a run and yields its process."""
    (tmp_path / "user.conf").write_text(SHORT_RUNS)

    def start(body, *args, **variables):
        script = tmp_path / "run.py"
        script.write_text(SCRIPT.replace("BODY", body))
        args = "--backend=ray:onnxruntime", "--accuracy", *args
        return running(script, *args, cwd=tmp_path, LOG_PATH="ray", MLC_MAX_NUM_THREADS=None, **variables)

    return start


def test_two_nodes_answer_with_the_bytes_of_one_process(script, local, tmp_path, cluster):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    args = "--backend=ray:onnxruntime", "--scenario=Server", "--accuracy"
    result = script("run.py", *args, LOG_PATH="ray", **cluster)
    assert result.returncode == 0, result.stderr
    assert "2 actors on 2 nodes" in result.stderr
    assert logged(tmp_path / "ray") == local
    record = json.loads((tmp_path / "ray/record.json").read_text())
    assert re.match(r"Ray [\d.]+, 2 actors on 2 nodes: ONNX Runtime", record["backend"])
    assert record["model"] == DEMO_ONNX


def test_a_local_cluster_listens_on_loopback_only_and_ends_with_the_run(tmp_path, fake_run, local, ray_folder):
    with fake_run("time.sleep(0.2)", "--max_examples=60", "--batch_tokens=400") as process:
        addresses = listening(set.union(*open_files(ray_folder).values()))
        out, err = process.communicate(timeout=LIMIT_S)
    assert addresses == {"0100007F", "0000000000000000FFFF00000100007F"}
    assert process.returncode == 0, err
    assert "exact_match" in out.splitlines()[-1]
    assert err.count("\n") < 10, err  # Ray writes nothing
    assert closed(ray_folder)
    assert len([*Path(ray_folder).rglob("python-core-worker-*")]) == 1  # by itself, Ray starts one on each core as well
    assert logged(tmp_path / "ray") == {row: response for row, response in local.items() if row < 60}


def test_a_terminated_run_ends_its_local_cluster(fake_run, ray_folder):
    with fake_run("time.sleep(0.2)") as process:
        assert len(open_files(ray_folder)) > 5
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 143 and "incomplete" in err and "Traceback" not in err
    assert closed(ray_folder)


def test_lost_actors_are_replaced_and_change_no_response(tmp_path, fake_run, local, cluster):
    """The second actor is killed while the first is being replaced; batches end out of order, after random times."""
    body = f"""open(os.path.join({str(tmp_path)!r}, f"{{os.getpid()}}.pid"), "w").close()
            time.sleep(0.1 * int.from_bytes(os.urandom(1)) / 255)"""
    with fake_run(body, "--batch_tokens=400", **cluster) as process:
        deadline = time.monotonic() + LIMIT_S
        while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
        err = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, err
    assert err.count("notice: a Ray actor is lost") == 2
    assert len(list(tmp_path.glob("*.pid"))) == 4  # the replacements have run batches as well
    assert logged(tmp_path / "ray") == local


def fake_class():
    """Return a backend of no model. A class of this function travels to the nodes by value."""

    class Fake(Backend):
        dtype = "fp16"

        def __init__(self, options, prepared_by):
            here = "driver" if prepared_by == os.getpid() else "another process"
            self.name = f"{options.dtype}, prepared in {here}, USE_GPU={os.environ.get('USE_GPU')}"
            self.batch_policy = "single"

        @classmethod
        def prepare(cls, options):
            return {"prepared_by": os.getpid()}

        def predict(self, batch):
            """Do what the length of the sample says."""
            length = batch.lengths[0]
            if length == 1:
                raise ValueError("no such layer")
            if length == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if length == 3:
                import config

                raise ValueError(" ".join(sorted(os.listdir(config.ROOT))))
            return np.full((length, 2), length, np.float32)

    return Fake


@pytest.fixture(scope="class")
def fake_backend(cluster):
    """Return a Ray backend of `fake_class`, whose driver is this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (cluster | DEMO_ENV | {"USE_GPU": "off"}).items():
            patch.setenv(name, value)
        from ray_SUT import RayBackend

        backend = RayBackend("pytorch", fake_class(), RunOptions(dtype="bf16"))
        yield backend
        backend.close()


class TestFakeBackend:
    """What an actor's backend shows of the actor, and what the driver sees of its faults."""

    def test_the_actors_get_the_options_the_environment_and_what_the_driver_prepared(self, fake_backend):
        expected = r"Ray [\d.]+, 2 actors on 2 nodes: bf16, prepared in another process, USE_GPU=off"
        assert re.fullmatch(expected, fake_backend.name), fake_backend.name
        assert (fake_backend.vocab_size, fake_backend.batch_policy, fake_backend.concurrency) == (None, "single", 4)
        assert (fake_backend.dtype, fake_backend.model_path) == (
            "fp16",
            DEMO_ENV["ML_MODEL_FILE_WITH_PATH"],
        )  # for the run's record
        assert (fake_backend.predict(random_batch(5)) == 5).all()

    def test_the_nodes_get_the_python_files_of_the_root_and_models_and_nothing_else(self, fake_backend):
        with pytest.raises(ValueError) as error:
            fake_backend.predict(random_batch(3))
        found = set(str(error.value).split()) - {"__pycache__"}
        assert found == {path.name for path in ROOT.glob("*.py")} | {"models"}

    def test_a_fault_of_an_actors_backend_reaches_the_driver(self, fake_backend):
        with pytest.raises(ValueError, match="no such layer"):
            fake_backend.predict(random_batch(1))

    def test_a_batch_that_kills_every_actor_is_given_up(self, fake_backend):
        with refused("a batch of 1 samples lost its Ray actor 3 times"):
            fake_backend.predict(random_batch(2))
        assert (fake_backend.predict(random_batch(5)) == 5).all()


def test_resources_that_other_work_holds_are_named(driver, monkeypatch):
    import ray

    @ray.remote(num_cpus=1)
    def hold():
        time.sleep(100)

    driver.connect()
    holding = hold.remote()
    while ray.available_resources().get("CPU", 0) > 1:
        time.sleep(0.1)
    monkeypatch.setattr(driver, "connect", lambda: None)
    monkeypatch.setattr(driver, "START_S", 10)
    with refused("1 of 2 Ray actors", "CPUs"):
        driver.RayBackend("pytorch", fake_class(), RunOptions())
    ray.cancel(holding, force=True)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "6379"])
def test_a_cluster_that_does_not_answer_is_named(driver, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(driver, "CLUSTER_S", 3)
    started = time.monotonic()
    with refused(f"RAY_ADDRESS={address}"):
        driver.connect()
    assert time.monotonic() - started < 15


def test_what_an_actor_cannot_use_is_named(driver, monkeypatch, tmp_path):
    from onnxruntime_SUT import OnnxRuntimeBackend

    with refused("no-model.onnx", "cannot read the model"):
        monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "no-model.onnx")
        driver.RayBackend("onnxruntime", OnnxRuntimeBackend, RunOptions(backend="ray:onnxruntime"))
    (tmp_path / "model.onnx").write_text("no model")
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "model.onnx")
    with refused("model.onnx", "damaged"):
        driver.RayBackend("onnxruntime", OnnxRuntimeBackend, RunOptions(backend="ray:onnxruntime"))
    monkeypatch.setenv("MLC_MAX_NUM_THREADS", "64")
    with refused("64 cores", "MLC_MAX_NUM_THREADS"):
        driver.find_placements()


def test_a_closed_backend_leaves_its_threads_alive_and_refuses_batches(cluster, tmp_path):
    """In another process, which Ray would end if a thread called it after its end."""
    script = tmp_path / "driver.py"
    script.write_text(f"""\
import sys, threading, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from backends import Backend, RunOptions
from config import UserError
from helpers import NullBackend, random_batch
from ray_SUT import RayBackend

class Slow(Backend):
    name = "slow"

    def __init__(self, options):
        self.zeros = None

    def predict(self, batch):
        time.sleep(0.01 if len(batch) > 1 else 0)
        return batch.input_ids.repeat(2).reshape(-1, 2).astype("float32")

def work():
    try:
        while True:
            backend.predict(random_batch(5, 5))
    except BaseException as error:
        ends.append(error)

ends = []
backend = RayBackend("pytorch", Slow, RunOptions())
threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
time.sleep(0.5)
assert not ends, ends
backend.close()
for thread in threads:
    thread.join(10)
assert len(ends) == 8, ends
try:
    backend.predict(random_batch(5))
except UserError as error:
    print("refused", error)
""")
    result = run_script(script, cwd=tmp_path, **cluster)
    assert result.returncode == 0 and result.stdout.startswith("refused"), result.stderr
