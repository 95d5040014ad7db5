"""Form batches: which samples run together, in what order, and how a scenario is planned."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

import config
from backends import Backend, BatchPolicy, RunOptions
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch, SquadQSL

MIN_VOCAB = 30  # tokens that any vocabulary has, for models that do not tell how many they know
LOOK_AHEAD = 64  # pending samples that `defer_late` looks at; each takes under 1 us while no other batch can be formed

Lengths = np.ndarray | Mapping[int, int]  # tokens of each sample of the library


class Pending(NamedTuple):
    """A sample that waits for its batch."""

    row: int  # in the library
    id: Any  # of LoadGen's query
    arrived: float  # time.perf_counter()


@dataclass(frozen=True)
class BatchPlan:
    """Say how pending samples become batches."""

    policy: BatchPolicy
    max_tokens: int  # of a batch; a batch holds at least one sample
    concurrency: int = 1  # batches that run at once
    sort_by_length: bool = False  # longest first instead of in order of arrival
    # Pending samples are divided among this many batches, so that none of them runs alone at the end.
    shares: int = 1
    latency_s: float = math.inf  # samples that cannot be answered in this time are deferred
    tokens_per_s: float = math.inf  # of one batch
    # Whether a sample's time includes those before it in the queue: if batches are single samples. In larger batches
    # its time is that of its batch, with which it is answered.
    count_queue: bool = False

    def next_batch(self, pending: deque[Pending], lengths: Lengths) -> list[Pending]:
        """Remove the next batch from `pending`, which is not empty, and return it."""
        max_tokens = self.max_tokens
        if self.shares > 1:
            max_tokens = min(max_tokens, count_tokens(pending, lengths, self.shares * max_tokens) // self.shares)
        batch = [pending.popleft()]
        first = tokens = lengths[batch[0].row]
        while pending and self.policy != "single":
            length = lengths[pending[0].row]
            if tokens + length > max_tokens or (self.policy == "same_length" and length != first):
                break
            tokens += length
            batch.append(pending.popleft())
        return batch

    def defer_late(self, pending: deque[Pending], now: float, lengths: Lengths) -> list[Pending]:
        """Remove the fewest samples from `pending` so that the others can meet the latency, and return them.

        If a sample would be late, the longest of those up to it is removed: the Moore-Hodgson rule for the fewest late
        jobs (Moore 1968), over the first LOOK_AHEAD samples. `now` is time.perf_counter().
        """
        if self.latency_s == math.inf:
            return []
        deferred: list[Pending] = []
        kept: list[Pending] = []
        batch = min(self.max_tokens, count_tokens(pending, lengths, self.max_tokens)) if self.policy == "mixed" else 0
        tokens = 0
        for sample in islice(pending, LOOK_AHEAD):
            kept.append(sample)
            tokens += lengths[sample.row]
            while (
                kept and now + self._seconds(tokens, lengths[kept[-1].row], batch) > kept[-1].arrived + self.latency_s
            ):
                longest = max(kept, key=lambda one: lengths[one.row])
                kept.remove(longest)
                deferred.append(longest)
                tokens -= lengths[longest.row]
        for sample in deferred:
            pending.remove(sample)
        return deferred

    def _seconds(self, tokens: int, length: int, batch: int) -> float:
        """Return the time to answer a sample of `length` tokens that ends the first `tokens` tokens of the queue.

        `batch` is the number of tokens in the next batch, 0 if each sample is answered alone.
        """
        if self.count_queue:
            return ((tokens - length) / self.shares + length) / self.tokens_per_s
        return max(length, batch) / self.tokens_per_s


def count_tokens(pending: deque[Pending], lengths: Lengths, limit: int) -> int:
    """Return the tokens of `pending`, counted until they reach `limit`."""
    tokens = 0
    for sample in pending:
        tokens += lengths[sample.row]
        if tokens >= limit:
            break
    return tokens


def plan_batching(options: RunOptions, backend: Backend, qsl: SquadQSL, latency_s: float = math.inf) -> BatchPlan:
    """Plan the batches of a run; `latency_s` is Server's target latency in seconds.

    In Server a query may wait for each batch in flight and for the one that is formed before its own batch runs: a
    third of the target latency for each batch leaves a margin, a fifth if two share a device. A backend with an
    adjustable concurrency runs as many batches at once as keep the longest sample within half of the latency. These are
    single samples: all queries of a batch end with it, and batches gain little on a core.
    """
    if options.scenario != "Server" or options.reference:
        concurrency = backend.concurrency
        if options.one_batch_per_core:
            concurrency = max(concurrency, backend.max_concurrency)
        sort = options.scenario == "Offline" and not options.reference
        shares = max(1, concurrency // backend.in_flight) if sort else 1
        return BatchPlan(
            backend.batch_policy, options.batch_tokens or backend.batch_tokens, concurrency, sort, shares=shares
        )

    batch = qsl.longest_batch()

    def seconds(batch: Batch) -> float:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            backend.predict(batch)
            times.append(time.perf_counter() - start)
        return min(times)

    adjustable = backend.max_concurrency > 1
    concurrency = backend.max_concurrency if adjustable else backend.concurrency
    if adjustable:
        backend.set_concurrency(concurrency)
    duration = seconds(batch)
    while adjustable and concurrency > 1 and duration > latency_s / 2:
        concurrency //= 2
        backend.set_concurrency(concurrency)
        duration = seconds(batch)
    single = adjustable and concurrency > 1

    def limit() -> int:
        fitting = max(1, int(tokens_per_s * latency_s / (2 * backend.in_flight + 1)))
        return options.batch_tokens or (1 if single else min(backend.batch_tokens, fitting))

    tokens_per_s = float(batch.lengths.sum() / duration)
    # A GPU takes far less time for a token of a large batch: measure larger batches, of copies of the longest sample,
    # until no more of them fit.
    while backend.in_flight > 1 and (samples := limit() // int(batch.lengths[0])) > len(batch):
        batch = qsl.batch(np.full(samples, qsl.lengths.argmax()))
        tokens_per_s = float(batch.lengths.sum() / seconds(batch))
    max_tokens = limit()
    return BatchPlan(
        backend.batch_policy,
        max_tokens,
        concurrency,
        shares=max(1, concurrency // backend.in_flight),
        latency_s=latency_s,
        tokens_per_s=tokens_per_s,
        count_queue=max_tokens == 1,
    )


def check_bytes(backend: Backend, vocab_size: int, max_tokens: int) -> None:
    """Set `backend.same_bytes` to whether its batches agree, and log a notice if they do not."""
    backend.same_bytes = batches_agree(backend.predict, vocab_size, max_tokens)
    if not backend.same_bytes:
        config.notice("on this GPU the last bits of a sample's logits depend on the other samples of its batch")


def batches_agree(predict: Callable[[Batch], np.ndarray], vocab_size: int, max_tokens: int) -> bool:
    """Return whether samples have the same logits, byte for byte, alone, in a small batch and in a full one.

    `predict` is a backend's, for a model that knows `vocab_size` tokens, and a batch has at most `max_tokens`.
    """
    generator = np.random.default_rng(0)
    lengths = np.array([3, 40, 100, 178, 250, MAX_SEQ_LENGTH], np.int32)
    mask = (np.arange(MAX_SEQ_LENGTH) < lengths[:, None]).astype(np.int32)
    ids, segments = (generator.integers(below, size=mask.shape, dtype=np.int32) * mask for below in (vocab_size, 2))

    def results(rows: list[int]) -> list[bytes]:
        logits = predict(Batch(ids[rows], mask[rows], segments[rows], lengths[rows]))
        return [part.tobytes() for part in np.split(logits, np.cumsum(lengths[rows])[:-1])]

    count = max(1, int(np.searchsorted(lengths.cumsum(), max_tokens, side="right")))  # of the samples that fit together
    small = list(range(count))
    full = small[::-1] * max(1, max_tokens // int(lengths[:count].sum()))
    alone = [results([row])[0] for row in small]
    return all(results(rows) == [alone[row] for row in rows] for rows in (small, full))
