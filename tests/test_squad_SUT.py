"""The life of a query between LoadGen and the backend. test_run.py has it under LoadGen itself."""

import platform
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, NullBackend, refused

from batching import BatchPlan
from squad_SUT import SquadSUT, Worker, validate_logits


class Waiting(NullBackend):
    """Wait for `go` in every call and note the calls' threads."""

    def __init__(self):
        super().__init__()
        self.go, self.threads = threading.Event(), [threading.get_ident()]

    def predict(self, batch):
        self.threads.append(threading.get_ident())
        self.go.wait()


class Library:
    """A library whose samples have as many tokens as their index says."""

    lengths = np.arange(100)

    def batch(self, rows):
        return rows


class Recorder(SquadSUT):
    """Note the batches instead of answering them."""

    def answer(self, ids, batch):
        self.backend.predict(batch)
        self.batches = [*getattr(self, "batches", []), batch.tolist()]


def run_samples(plan, arrivals, pause_s=0.0):
    """Return (batches, backend) of samples that arrive in groups, `pause_s` apart, while the first one is running."""
    worker = Worker()
    backend = worker.submit(Waiting).result()
    errors = []
    sut = Recorder(backend, Library(), plan, errors.append, worker)
    for number, rows in enumerate(arrivals):
        sut.issue_queries([SimpleNamespace(index=row, id=row) for row in rows])
        while not number and len(backend.threads) == 1:
            time.sleep(0.001)
        time.sleep(pause_s * (number < len(arrivals) - 1))
    backend.go.set()
    end = time.monotonic() + 10
    while sut.answered < sut.issued and not errors and time.monotonic() < end:
        time.sleep(0.001)
    assert not errors and sut.answered == sut.issued == sum(map(len, arrivals))
    sut.stop()
    return sut.batches, backend


def test_a_backend_runs_in_the_thread_that_loaded_it():
    _, backend = run_samples(BatchPlan("mixed", 50), [[10], [20]])
    assert len(set(backend.threads)) == 1 and backend.threads[0] != threading.get_ident()


def test_samples_run_in_order_of_arrival_or_longest_first():
    arrivals = [[10], [20, 40], [30]]
    assert run_samples(BatchPlan("mixed", 50), arrivals)[0] == [[10], [20], [40], [30]]
    assert run_samples(BatchPlan("mixed", 50, sort_by_length=True), arrivals)[0] == [[10], [40], [30, 20]]


def test_a_sample_that_cannot_meet_the_target_is_deferred_and_answered_last():
    """After 0.5 s the samples of the second group are late; so is a sample of 90 tokens at 100 a second."""
    plan = BatchPlan("mixed", 50, latency_s=0.4, tokens_per_s=1e6)
    assert run_samples(plan, [[10], [20, 21], [30, 31]], pause_s=0.5)[0] == [[10], [30], [31], [20, 21]]
    plan = BatchPlan("single", 50, latency_s=0.5, tokens_per_s=100)
    assert run_samples(plan, [[1], [90, 10, 80], [20]])[0] == [[1], [10], [20], [90], [80]]


def test_a_worker_passes_on_what_a_call_raises_and_continues():
    worker = Worker()
    failed = worker.submit(lambda: 1 / 0)
    assert worker.submit(lambda: 2).result() == 2
    with pytest.raises(ZeroDivisionError):
        failed.result()


@pytest.mark.parametrize(
    "logits, words",
    [
        (np.zeros((3, 2), np.float32), "float32 (3, 2)"),
        (np.zeros((5, 2)), "float64"),
        (np.zeros((2, 5), np.float32), "(2, 5)"),
    ],
)
def test_logits_of_another_shape_or_dtype_are_refused(logits, words):
    with pytest.raises(RuntimeError) as error:
        validate_logits(np.array([2, 3]), logits)
    assert words in str(error.value) and "expected float32 of shape (5, 2)" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = np.zeros((5, 2), np.float32)
    logits[3, 1] = value
    with refused("NaN or infinity"):
        validate_logits(np.array([2, 3]), logits)


def test_logits_in_any_memory_order_become_contiguous():
    logits = np.arange(10, dtype=np.float32).reshape(2, 5).T
    assert validate_logits(np.array([5]), logits).tobytes() == logits.tobytes()


BATCHES_OF_50_MB = """
import resource
from squad_SUT import Worker

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

workers = [Worker(), Worker()]
for worker in workers:
    worker.submit(lambda: len(b"x" * 50_000_000)).result()
before = faults()
for worker in 10 * workers:
    worker.submit(lambda: len(b"x" * 50_000_000)).result()
print(faults() - before, 50_000_000 // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_large_value_takes_the_memory_of_the_one_before_it():
    """In any worker; else each of its pages is a page fault each time."""
    command = [sys.executable, "-c", BATCHES_OF_50_MB]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    faults, pages = map(int, result.stdout.split())
    assert faults < pages, f"{faults} page faults in 20 values of {pages} pages"
