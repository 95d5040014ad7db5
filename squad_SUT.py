"""The system under test: the life of a query, once, for every scenario and every backend.

LoadGen's threads only put samples on a queue. Worker threads take what waits there, form a batch, hand it to the
backend and give its logits back to LoadGen. `Backend` says what a backend has.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple, Protocol

import mlperf_loadgen as lg
import numpy as np

from config import UserError
from squad_QSL import Batch

LOOK_AHEAD = 64  # samples; each takes under 1 us of the time in which no other worker forms its batch


class Backend(Protocol):
    """What every backend has. Some have more:

        path        the model's file, for the run's record; a backend without one has no such attribute
        close()     only where it has started what outlives the process: ends that
        threads     where `workers` may be set: the most workers, each of which computes with its part of these threads
    """

    name: str  # what runs, for people: framework, version, device, dtype
    vocab_size: int  # how many tokens the model knows
    workers: int  # how many threads may call predict at once
    # Which samples it wants in one batch: "any"; "equal", those of one length, where padding costs more than it gains;
    # "one", where its graph takes no more.
    together: str

    def predict(self, batch: Batch) -> np.ndarray:
        """The start and end logits of every token, sample after sample without padding, as float32 (tokens, 2)."""


class Worker:
    """A thread that makes calls, one after another. It ends with the process.

    A backend is to be loaded, warmed up and run in the same one. OpenMP keeps a pool of threads for each thread that
    computes, and once there are more of them than cores they sleep at every barrier: PyTorch on two cores then gave, for
    a small BERT, 77 samples/s in int8 instead of 104, and 43 in fp32 instead of 46.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self.work, daemon=True).start()

    def start(self, call: Callable[[], Any]) -> "Future[Any]":
        """Make the call `call()` when those before are made; the future has what it returns or raises."""
        future: Future[Any] = Future()
        self.calls.put((future, call))
        return future

    def work(self) -> None:
        while True:
            future, call = self.calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
                future.set_exception(error)


class Waiting(NamedTuple):
    """A sample that waits for its batch."""

    row: int  # in the library
    id: Any  # of LoadGen's query
    arrived: float  # time.perf_counter()


class SquadSUT:
    """Answers LoadGen's queries on a `SquadQSL` with a backend.

    `fail` is called, once or more, with whatever exception ends the run: nothing may leave a callback of LoadGen, which
    would abort the process, and a query that is never answered would keep it waiting for ever.
    """

    def __init__(self, backend: Backend, qsl: Any, batching: "Batching",
                 fail: Callable[[BaseException], object], worker: Worker) -> None:
        """`qsl` is a `SquadQSL`, or has its `lengths` and `batch`. `worker`, which loaded the backend, runs it.

        Others of its `workers` are started.
        """
        self.backend, self.qsl, self.batching, self.fail = backend, qsl, batching, fail
        # (LoadGen's QuerySamples, when they came); None ends a worker.
        self.arrived: queue.SimpleQueue[tuple[list[Any], float] | None] = queue.SimpleQueue()
        self.forming = threading.Lock()  # held while a worker waits for samples and forms its batch
        self.issued = self.answered = 0  # samples so far, for whoever watches the run
        self.waiting: deque[Waiting] = deque()  # in the order in which they will run
        self.late: deque[Waiting] = deque()  # these when no others wait
        workers = [worker, *(Worker() for _ in range(backend.workers - 1))]
        self.working = [worker.start(self.work) for worker in workers]

    def issue_queries(self, samples: list[Any]) -> None:
        """LoadGen's callback: new samples, [QuerySample]. Returns at once."""
        self.arrived.put((samples, time.perf_counter()))
        self.issued += len(samples)

    def flush_queries(self) -> None:
        """LoadGen's callback: no more samples follow in this series. Nothing is held back, so nothing is to do."""

    def stop(self) -> None:
        """End the workers; to be called when LoadGen has no query open."""
        self.arrived.put(None)
        for work in self.working:
            work.result()

    def work(self) -> None:
        """What a worker does: batches, until `stop`."""
        try:
            while samples := self.next_samples():
                rows, ids, _ = zip(*samples)
                self.answer(ids, self.qsl.batch(np.array(rows)))
                done = len(ids)
                self.answered += done  # in one step of the interpreter's, so that no other worker's falls between
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run cannot go on without this worker
            self.fail(error)

    def answer(self, ids: Sequence[Any], batch: Batch) -> None:
        """Run a batch and complete its queries `ids`."""
        respond(ids, batch.lengths, self.backend.predict(batch))

    def next_samples(self) -> list[Waiting]:
        """Wait for samples and take the next batch of them; empty at the end."""
        with self.forming:
            while not (self.waiting or self.late) or not self.arrived.empty():
                arrived = self.arrived.get()
                if arrived is None:
                    self.arrived.put(None)  # for the next worker
                    return []
                samples, when = arrived
                self.waiting.extend(Waiting(sample.index, sample.id, when) for sample in samples)
                if self.batching.sort:
                    self.waiting = deque(sorted(self.waiting, key=lambda sample: -self.qsl.lengths[sample.row]))
            now = time.perf_counter()
            self.late.extend(self.batching.give_way(self.waiting, now, self.qsl.lengths))
            return self.batching.take(self.waiting or self.late, self.qsl.lengths)


class Batching:
    """How waiting samples become batches."""

    def __init__(self, together: str, max_tokens: int, sort: bool, workers: int = 1, latency: float = math.inf,
                 tokens_a_second: float = math.inf) -> None:
        """The samples that a backend wants `together`, and at most `max_tokens` tokens (but one sample at least) a batch.

        `sort`: longest first, not in turn. Of `workers` each gets its part of what waits, so that none is idle while
        another has a large batch. Where not all can be answered within `latency` seconds, at `tokens_a_second` each
        worker, some give way to the others.
        """
        self.together, self.max_tokens, self.sort, self.workers = together, max_tokens, sort, workers
        self.latency, self.tokens_a_second = latency, tokens_a_second

    def give_way(self, waiting: deque[Waiting], now: float, lengths: np.ndarray | dict[int, int]) -> list[Waiting]:
        """Remove from `waiting` the fewest samples without which the others can be answered in time, and return them.

        Where a sample's turn would come too late, the longest up to it goes: Moore and Hodgson's rule for the fewest late
        jobs, over the first `LOOK_AHEAD`.
        """
        if self.latency == math.inf:
            return []
        late: list[Waiting] = []
        kept: list[Waiting] = []
        tokens = 0
        for sample in islice(waiting, LOOK_AHEAD):
            kept.append(sample)
            tokens += lengths[sample.row]
            while kept and now + self.seconds(tokens, lengths[kept[-1].row]) > kept[-1].arrived + self.latency:
                late.append(max(kept, key=lambda one: lengths[one.row]))
                kept.remove(late[-1])
                tokens -= lengths[late[-1].row]
        for sample in late:
            waiting.remove(sample)
        return late

    def seconds(self, tokens: float, length: int) -> float:
        """How long a sample of `length` tokens takes from now on, with those before it `tokens` tokens.

        Those before it count where a batch is one sample; a GPU takes far less for a batch than for its samples alone.
        """
        before = (tokens - length) / self.workers if self.max_tokens == 1 else 0
        return (before + length) / self.tokens_a_second

    def take(self, waiting: deque[Waiting], lengths: np.ndarray | dict[int, int]) -> list[Waiting]:
        """Remove the next batch from `waiting` and return it. `lengths` are the tokens of each sample of the library."""
        most = self.max_tokens
        if self.workers > 1:
            tokens = 0
            for sample in waiting:
                tokens += lengths[sample.row]
                if tokens >= self.workers * most:
                    break
            most = min(most, tokens // self.workers)
        samples = [waiting.popleft()]
        first = tokens = lengths[samples[0].row]
        while waiting and self.together != "one":
            length = lengths[waiting[0].row]
            if tokens + length > most or (self.together == "equal" and length != first):
                break
            tokens += length
            samples.append(waiting.popleft())
        return samples


def checked(lengths: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """`logits`, what a backend gave for samples of `lengths` tokens. Raises RuntimeError where it is not its duty.

    Raises UserError where they are no finite numbers.
    """
    if logits.dtype != np.float32 or logits.shape != (lengths.sum(), 2):
        raise RuntimeError(f"the backend gave logits {logits.dtype} {logits.shape} for {lengths.sum()} tokens; "
                           "float32 (tokens, 2) is its duty")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits hold NaN or infinity; its weights are damaged, or too large for the dtype")
    return np.ascontiguousarray(logits)


def respond(ids: Sequence[int], lengths: np.ndarray, logits: np.ndarray) -> None:
    """Complete the queries `ids`: sample i's response is the next `lengths[i]` rows of `logits`.

    `logits` is float32 (sum of lengths, 2). LoadGen copies what it keeps before this returns. Raises RuntimeError where
    the backend gave anything else.
    """
    logits = checked(lengths, logits)
    sizes = lengths.astype(np.int64) * logits.strides[0]
    starts = logits.ctypes.data + np.cumsum(sizes) - sizes
    lg.QuerySamplesComplete([lg.QuerySampleResponse(*response)
                             for response in zip(ids, starts.tolist(), sizes.tolist())])
