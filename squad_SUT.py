"""The system under test: the life of a query, once, for every scenario and every backend.

LoadGen's threads only put samples on a queue. Worker threads take what waits there, form a batch, hand it to the
backend and give its logits back to LoadGen.

A backend is an object with
    name                what runs, for people: framework, version, device, dtype
    vocab_size          how many tokens the model knows
    workers             how many threads may call predict at once
    together            which samples it wants in one batch: "any"; "equal", those of one length, where padding costs
                        more than it gains; "one", where its graph takes no more
    path                the model's file, for the run's record; a backend without one has no such attribute
    predict(batch)      takes a `squad_QSL.Batch` and returns the start and end logits of every token, sample after
                        sample without padding, as float32 (tokens, 2)
    close()             only where it has started what outlives the process: ends that
"""

import queue
import threading
from collections import deque

import mlperf_loadgen as lg
import numpy as np


class SquadSUT:
    """Answers LoadGen's queries on a `SquadQSL` with a backend.

    `fail` is called, once or more, with whatever exception ends the run: nothing may leave a callback of LoadGen, which
    would abort the process, and a query that is never answered would keep it waiting for ever.
    """

    def __init__(self, backend, qsl, batching, fail):
        """`batching` is a `Batching`; starts the backend's `workers` threads."""
        self.backend, self.qsl, self.batching, self.fail = backend, qsl, batching, fail
        self.arrived = queue.SimpleQueue()  # lists of LoadGen's QuerySamples; None ends a worker
        self.forming = threading.Lock()  # held while a worker waits for samples and forms its batch
        self.issued = self.answered = 0  # samples so far, for whoever watches the run
        self.waiting = deque()  # (sample index, query id), in the order in which they will run
        self.workers = [threading.Thread(target=self.work, daemon=True) for _ in range(backend.workers)]
        for worker in self.workers:
            worker.start()

    def issue_queries(self, samples):
        """LoadGen's callback: new samples, [QuerySample]. Returns at once."""
        self.arrived.put(samples)
        self.issued += len(samples)

    def flush_queries(self):
        """LoadGen's callback: no more samples follow in this series. Nothing is held back, so nothing is to do."""

    def stop(self):
        """End the workers; to be called when LoadGen has no query open."""
        self.arrived.put(None)
        for worker in self.workers:
            worker.join()

    def work(self):
        """A worker thread: batches, until `stop`."""
        try:
            while samples := self.next_samples():
                indices, ids = zip(*samples)
                self.answer(ids, self.qsl.batch(np.array(indices)))
                done = len(ids)
                self.answered += done  # in one step of the interpreter's, so that no other worker's falls between
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run cannot go on without this worker
            self.fail(error)

    def answer(self, ids, batch):
        """Run a batch and complete its queries `ids`."""
        respond(ids, batch.lengths, self.backend.predict(batch))

    def next_samples(self):
        """Wait for samples and take the next batch of them: [(sample index, query id)], empty at the end."""
        with self.forming:
            while not self.waiting or not self.arrived.empty():
                samples = self.arrived.get()
                if samples is None:
                    self.arrived.put(None)  # for the next worker
                    return []
                self.waiting.extend((sample.index, sample.id) for sample in samples)
                if self.batching.sort:
                    self.waiting = deque(sorted(self.waiting, key=lambda sample: -self.qsl.lengths[sample[0]]))
            return self.batching.take(self.waiting, self.qsl.lengths)


class Batching:
    """How waiting samples become batches."""

    def __init__(self, together, max_tokens, sort):
        """The samples that a backend wants `together`, and at most `max_tokens` tokens (but one sample at least) a batch.

        `sort`: longest first, not in turn.
        """
        self.together, self.max_tokens, self.sort = together, max_tokens, sort

    def take(self, waiting, lengths):
        """Remove the next batch from the deque `waiting` of (sample index, query id) and return it as a list.

        `lengths` are the tokens of each sample of the library.
        """
        samples = [waiting.popleft()]
        first = tokens = lengths[samples[0][0]]
        while waiting and self.together != "one":
            length = lengths[waiting[0][0]]
            if tokens + length > self.max_tokens or (self.together == "equal" and length != first):
                break
            tokens += length
            samples.append(waiting.popleft())
        return samples


def checked(lengths, logits):
    """`logits`, what a backend gave for samples of `lengths` tokens. Raises RuntimeError where it is not its duty."""
    if logits.dtype != np.float32 or logits.shape != (lengths.sum(), 2):
        raise RuntimeError(f"the backend gave logits {logits.dtype} {logits.shape} for {lengths.sum()} tokens; "
                           "float32 (tokens, 2) is its duty")
    return np.ascontiguousarray(logits)


def respond(ids, lengths, logits):
    """Complete the queries `ids`: sample i's response is the next `lengths[i]` rows of `logits`.

    `logits` is float32 (sum of lengths, 2). LoadGen copies what it keeps before this returns. Raises RuntimeError where
    the backend gave anything else.
    """
    logits = checked(lengths, logits)
    sizes = lengths.astype(np.int64) * logits.strides[0]
    starts = logits.ctypes.data + np.cumsum(sizes) - sizes
    lg.QuerySamplesComplete([lg.QuerySampleResponse(*response)
                             for response in zip(ids, starts.tolist(), sizes.tolist())])
