"""Ray's actors on GPUs: two calls at once, as many as the backend takes, and what the driver learns of the backend."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from helpers import DEMO_ENV, LIMIT_S, ROOT, random_batch

from backends import Backend

if not importlib.util.find_spec("ray"):
    pytest.skip("the package ray is absent", allow_module_level=True)

# The driver, in a separate process, on a local cluster that is told to have a GPU.
SCRIPT = f"""\
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from backends import RunOptions
from helpers import random_batch
from ray_SUT import RayBackend
from test_ray_gpu import busy_class

if __name__ == "__main__":
    backend = RayBackend("pytorch", busy_class(2), RunOptions())
    found = []
    threads = [threading.Thread(target=lambda: found.append(backend.predict(random_batch(20)).max())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(backend.name, (backend.concurrency, backend.in_flight, backend.batch_tokens), max(found))
    backend.close()
"""


def busy_class(calls):
    """Return a backend of no model that `calls` threads may use at once. It travels to an actor by value."""

    class Busy(Backend):
        batch_tokens, in_flight, concurrency = 5120, 2, calls

        def __init__(self, options=None):
            self.name = f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}"
            self.inside = 0

        def predict(self, batch):
            """Return how many calls are inside at once; a sample of 20 tokens waits 3 s for a second call."""
            self.inside += 1
            end = time.monotonic() + 3 * (batch.lengths[0] == 20)
            while time.monotonic() < end and self.inside == 1:
                time.sleep(0.01)
            most = self.inside
            time.sleep(0.1)
            self.inside -= 1
            return np.full((batch.lengths.sum(), 2), most, np.float32)

    return Busy


@pytest.mark.slow
def test_an_actor_on_a_gpu_has_two_calls_at_once(tmp_path):
    (tmp_path / "driver.py").write_text(SCRIPT)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        variables = {"RAY_TMPDIR": folder, "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}', **DEMO_ENV}
        drop = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "USE_GPU")
        env = {name: value for name, value in os.environ.items() if name not in drop} | variables
        command = [sys.executable, tmp_path / "driver.py"]
        result = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("1 actors on 1 nodes: GPUs 0 (2, 2, 5120) 2.0")


@pytest.mark.parametrize("calls", [1, 2])
def test_an_actor_gives_its_backend_no_more_calls_than_it_takes(monkeypatch, calls):
    from ray_SUT import Actor

    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", "")  # which an actor sets
    actor = Actor(None, {})
    description = actor.load(busy_class(calls), {}, "model")
    assert (description.batch_tokens, description.in_flight) == (5120, 2)
    found = []
    threads = [threading.Thread(target=lambda: found.append(actor.predict(random_batch(20)).max())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and max(found) == calls
