"""Answer LoadGen's queries: the life of a query, once, for every scenario and every backend.

LoadGen's threads only put samples on a queue. Worker threads form a batch of the pending samples, run it on the backend
and return its logits to LoadGen.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import mlperf_loadgen as lg
import numpy as np

from backends import Backend
from batching import BatchPlan, Pending
from config import UserError
from models.memory import keep_memory
from squad_QSL import Batch


class Worker:
    """Make calls in one daemon thread, one after another.

    A backend must be loaded, warmed up and run by the same worker. OpenMP keeps a pool of threads for each thread that
    computes, and if there are more of them than cores, they sleep at every barrier: PyTorch on two cores then gave, for
    a small BERT, 77 samples/s in int8 instead of 104, and 43 in fp32 instead of 46.
    """

    def __init__(self) -> None:
        keep_memory()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> "Future[Any]":
        """Call `call()` after the calls before it; the future gets what it returns or raises."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - the thread that waits for the result gets it
                future.set_exception(error)


class SquadSUT:
    """Answer LoadGen's queries on a sample library with a backend, as `plan` says.

    `qsl` is a `SquadQSL`, or has its `lengths` and `batch`. `worker`, which loaded the backend, runs it; further
    workers are started for a higher concurrency. `fail` is called with any exception that ends the run: no exception
    may leave a callback of LoadGen's, which would abort the process, and LoadGen would wait forever for a query that is
    never answered.
    """

    def __init__(
        self, backend: Backend, qsl: Any, plan: BatchPlan, fail: Callable[[BaseException], object], worker: Worker
    ) -> None:
        self.backend, self.qsl, self.plan, self.fail = backend, qsl, plan, fail
        # (LoadGen's QuerySamples, their time of arrival); None ends the workers.
        self._arrivals: queue.SimpleQueue[tuple[list[Any], float] | None] = queue.SimpleQueue()
        self._forming = threading.Lock()  # held while a worker waits for samples and forms its batch
        self._counting = threading.Lock()  # guards `issued` and `answered`
        self.issued = self.answered = 0  # samples so far, for the progress line
        self.pending: deque[Pending] = deque()  # in the order in which they will run
        self.deferred: deque[Pending] = deque()  # run only if no other sample is pending
        workers = [worker, *(Worker() for _ in range(plan.concurrency - 1))]
        self._running = [worker.submit(self._work) for worker in workers]

    def issue_queries(self, samples: list[Any]) -> None:
        """Take LoadGen's new samples, [QuerySample], and return at once (a callback of LoadGen's)."""
        self._arrivals.put((samples, time.perf_counter()))
        with self._counting:
            self.issued += len(samples)

    def flush_queries(self) -> None:
        """Do nothing: no sample is held back (a callback of LoadGen's at the end of a series of queries)."""

    def stop(self) -> None:
        """End the workers; call it when no query is open."""
        self._arrivals.put(None)
        for running in self._running:
            running.result()

    def _work(self) -> None:
        try:
            while samples := self._next_samples():
                rows, ids, _ = zip(*samples)
                self.answer(ids, self.qsl.batch(np.array(rows)))
                with self._counting:
                    self.answered += len(ids)
        except BaseException as error:  # noqa: BLE001 - any fault of a worker ends the run
            self.fail(error)

    def answer(self, ids: Sequence[Any], batch: Batch) -> None:
        """Run a batch and complete its queries `ids`."""
        respond(ids, batch.lengths, self.backend.predict(batch))

    def _next_samples(self) -> list[Pending]:
        """Wait for samples and remove the next batch of them; return [] at the end."""
        with self._forming:
            while not (self.pending or self.deferred) or not self._arrivals.empty():
                arrival = self._arrivals.get()
                if arrival is None:
                    self._arrivals.put(None)  # for the next worker
                    return []
                samples, when = arrival
                self.pending.extend(Pending(sample.index, sample.id, when) for sample in samples)
                if self.plan.sort_by_length:
                    self.pending = deque(sorted(self.pending, key=lambda sample: -self.qsl.lengths[sample.row]))
            self.deferred.extend(self.plan.defer_late(self.pending, time.perf_counter(), self.qsl.lengths))
            return self.plan.next_batch(self.pending or self.deferred, self.qsl.lengths)


def validate_logits(lengths: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return `logits`, which a backend gave for samples of `lengths` tokens, as a contiguous array.

    Raises RuntimeError if they are not float32 (tokens, 2), UserError if one is not a finite number.
    """
    expected = (int(lengths.sum()), 2)
    if logits.dtype != np.float32 or logits.shape != expected:
        raise RuntimeError(f"the backend returned {logits.dtype} {logits.shape}, expected float32 of shape {expected}")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits hold NaN or infinity; its weights are damaged, or too large for the dtype")
    return np.ascontiguousarray(logits)


def respond(ids: Sequence[int], lengths: np.ndarray, logits: np.ndarray) -> None:
    """Complete the queries `ids`: the response of sample i is the next `lengths[i]` rows of `logits`.

    LoadGen copies what it keeps before this returns. Raises what `validate_logits` raises.
    """
    logits = validate_logits(lengths, logits)
    sizes = lengths.astype(np.int64) * logits.strides[0]
    starts = logits.ctypes.data + np.cumsum(sizes) - sizes
    responses = zip(ids, starts.tolist(), sizes.tolist())
    lg.QuerySamplesComplete([lg.QuerySampleResponse(*response) for response in responses])
