"""Form batches: which samples run together, in what order, and how a scenario is planned."""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from backends import BATCH_TOKENS, Backend, BatchPolicy, RunOptions
from squad_QSL import SquadQSL

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
    # it does not, because a GPU takes far less time for a batch than for its samples one after another.
    count_queue: bool = False

    def next_batch(self, pending: deque[Pending], lengths: Lengths) -> list[Pending]:
        """Remove the next batch from `pending`, which is not empty, and return it."""
        max_tokens = self.max_tokens
        if self.shares > 1:
            tokens = 0
            for sample in pending:
                tokens += lengths[sample.row]
                if tokens >= self.shares * max_tokens:
                    break
            max_tokens = min(max_tokens, tokens // self.shares)
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
        tokens = 0
        for sample in islice(pending, LOOK_AHEAD):
            kept.append(sample)
            tokens += lengths[sample.row]
            while kept and now + self._seconds(tokens, lengths[kept[-1].row]) > kept[-1].arrived + self.latency_s:
                longest = max(kept, key=lambda one: lengths[one.row])
                kept.remove(longest)
                deferred.append(longest)
                tokens -= lengths[longest.row]
        for sample in deferred:
            pending.remove(sample)
        return deferred

    def _seconds(self, tokens: int, length: int) -> float:
        """Return the time to answer a sample of `length` tokens that ends the first `tokens` tokens of the queue."""
        before = (tokens - length) / self.shares if self.count_queue else 0
        return (before + length) / self.tokens_per_s


def plan_batching(options: RunOptions, backend: Backend, qsl: SquadQSL, latency_s: float = math.inf) -> BatchPlan:
    """Plan the batches of a run; `latency_s` is Server's target latency in seconds.

    In Server a query may wait for one batch before its own batch runs; a third of the target latency for each leaves a
    margin. A backend with an adjustable concurrency runs as many batches at once as keep the longest sample within half
    of the latency. These are single samples: all queries of a batch end with it, and batches gain little on a core.
    """
    max_tokens = options.batch_tokens or BATCH_TOKENS
    if options.scenario != "Server" or options.reference:
        concurrency = backend.concurrency
        if options.one_batch_per_core:
            concurrency = max(concurrency, backend.max_concurrency)
        sort = options.scenario == "Offline" and not options.reference
        return BatchPlan(backend.batch_policy, max_tokens, concurrency, sort, shares=concurrency if sort else 1)

    batch = qsl.longest_batch()

    def seconds(concurrency: int) -> float:
        if adjustable:
            backend.set_concurrency(concurrency)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            backend.predict(batch)
            times.append(time.perf_counter() - start)
        return min(times)

    adjustable = backend.max_concurrency > 1
    concurrency = backend.max_concurrency if adjustable else backend.concurrency
    duration = seconds(concurrency)
    while adjustable and concurrency > 1 and duration > latency_s / 2:
        concurrency //= 2
        duration = seconds(concurrency)
    tokens_per_s = float(batch.lengths.sum() / duration)
    if not options.batch_tokens:
        single = adjustable and concurrency > 1
        max_tokens = 1 if single else min(BATCH_TOKENS, max(1, int(tokens_per_s * latency_s / 3)))
    return BatchPlan(
        backend.batch_policy,
        max_tokens,
        concurrency,
        shares=concurrency,
        latency_s=latency_s,
        tokens_per_s=tokens_per_s,
        count_queue=max_tokens == 1,
    )
