"""How waiting samples become batches. The life of a query under LoadGen is test_run.py's."""

import threading
import time
from collections import deque
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squad_SUT import LOOK_AHEAD, Batching, SquadSUT, Waiting, Worker


def batches(together, max_tokens, lengths, workers=1):
    """The samples 0, 1, … of these lengths in batches, each a list of sample indices."""
    batching = Batching(together, max_tokens, sort=False, workers=workers)
    waiting = deque(Waiting(row, None, 0) for row in range(len(lengths)))
    result = []
    while waiting:
        result.append([sample.row for sample in batching.take(waiting, np.array(lengths))])
    return result


class Slow:
    """A backend that waits for `go` and notes the thread of each call; its library has samples of their index in tokens."""

    workers, together = 1, "any"

    def __init__(self):
        self.go, self.threads = threading.Event(), [threading.get_ident()]

    def predict(self, batch):
        self.threads.append(threading.get_ident())
        self.go.wait()


class Library:
    lengths = np.arange(100)

    def batch(self, rows):
        return rows


class Order(SquadSUT):
    """Notes the batches instead of answering."""

    def answer(self, ids, batch):
        self.backend.predict(batch)
        self.batches = [*getattr(self, "batches", []), batch.tolist()]


def order(batching, arrivals, wait=0.0):
    """The batches of samples that arrive in groups, `wait` seconds apart, while the first is at work; and the backend."""
    worker = Worker()
    backend = worker.start(Slow).result()
    errors = []
    sut = Order(backend, Library(), batching, errors.append, worker)
    for number, rows in enumerate(arrivals):
        sut.issue_queries([SimpleNamespace(index=row, id=row) for row in rows])
        while not number and len(backend.threads) == 1:
            time.sleep(0.001)
        time.sleep(wait * (number < len(arrivals) - 1))
    backend.go.set()
    end = time.monotonic() + 10
    while sut.answered < sum(map(len, arrivals)) and not errors and time.monotonic() < end:
        time.sleep(0.001)
    assert not errors and sut.answered == sum(map(len, arrivals))
    sut.stop()
    return sut.batches, backend


def test_a_backend_runs_in_the_thread_that_loaded_it():
    _, backend = order(Batching("any", 50, sort=False), [[10], [20]])
    assert len(set(backend.threads)) == 1 and backend.threads[0] != threading.get_ident()


def test_samples_run_in_turn_or_longest_first():
    arrivals = [[10], [20, 40], [30]]
    assert order(Batching("any", 50, sort=False), arrivals)[0] == [[10], [20], [40], [30]]
    assert order(Batching("any", 50, sort=True), arrivals)[0] == [[10], [40], [30, 20]]


def test_a_sample_that_cannot_be_answered_in_time_gives_way_to_those_that_can_and_is_answered():
    """After 0.5 s the samples of the second group are late; so is a sample of 90 tokens at 100 a second."""
    batching = Batching("any", 50, sort=False, latency=0.4, tokens_a_second=1e6)
    assert order(batching, [[10], [20, 21], [30, 31]], wait=0.5)[0] == [[10], [30], [31], [20, 21]]
    batching = Batching("one", 50, sort=False, latency=0.5, tokens_a_second=100)
    assert order(batching, [[1], [90, 10, 80], [20]])[0] == [[1], [10], [20], [90], [80]]


def in_time(samples, workers, latency, now=100):
    """Whether one token a second and worker, in turn, answers these samples of (row, tokens, arrived) in time."""
    begun = 0
    for _, tokens, arrived in samples:
        if now + begun / workers + tokens > arrived + latency:
            return False
        begun += tokens
    return True


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(80, 100)), max_size=7), st.integers(1, 4))
def test_the_fewest_samples_give_way_for_all_others_to_be_in_time(tokens_arrived, workers):
    samples = [(row, *one) for row, one in enumerate(sorted(tokens_arrived, key=lambda one: one[1]))]
    waiting = deque(Waiting(row, None, arrived) for row, _, arrived in samples)
    lengths = {row: tokens for row, tokens, _ in samples}
    late = Batching("any", 1, False, workers, latency=25, tokens_a_second=1).give_way(waiting, 100, lengths)
    kept = [sample.row for sample in waiting]
    assert sorted(kept) == kept and sorted(kept + [sample.row for sample in late]) == list(range(len(samples)))
    assert in_time([samples[row] for row in kept], workers, 25)
    if workers == 1:  # for more of them the rule is a good one, not the best
        assert not any(in_time(others, 1, 25) for others in combinations(samples, len(kept) + 1))


@pytest.mark.parametrize("workers, latency, lengths, late", [
    (1, 100, [90, 10, 1], [0]),
    (2, 15, [10, 10], []),
    (4, 11, [10] + 30 * [1] + [9], [0, 31]),
    (1, 100, 70 * [101], list(range(LOOK_AHEAD))),
])
def test_the_longest_give_way_of_those_that_are_looked_at(workers, latency, lengths, late):
    waiting = deque(Waiting(row, None, 0) for row in range(len(lengths)))
    batching = Batching("any", 1, False, workers, latency, tokens_a_second=1)
    assert [sample.row for sample in batching.give_way(waiting, 0, dict(enumerate(lengths)))] == late
    assert [sample.row for sample in waiting] == sorted(set(range(len(lengths))) - set(late))


def test_none_gives_way_for_what_runs_in_its_batch():
    waiting = deque(Waiting(row, None, 0) for row in range(3))
    batching = Batching("any", 500, False, latency=100, tokens_a_second=1)
    assert not batching.give_way(waiting, 0, {0: 90, 1: 90, 2: 90}) and len(waiting) == 3
    assert [sample.row for sample in batching.give_way(waiting, 0, {0: 90, 1: 101, 2: 90})] == [1]


def test_a_worker_passes_on_what_a_call_raises_and_goes_on():
    worker = Worker()
    failed = worker.start(lambda: 1 / 0)
    assert worker.start(lambda: 2).result() == 2
    with pytest.raises(ZeroDivisionError):
        failed.result()


@pytest.mark.parametrize("together, max_tokens, expected", [
    ("any", 100, [[0, 1, 2], [3, 4], [5], [6]]),
    ("any", 1, [[0], [1], [2], [3], [4], [5], [6]]),
    ("any", 10**6, [[0, 1, 2, 3, 4, 5, 6]]),
    ("equal", 10**6, [[0, 1], [2], [3, 4], [5], [6]]),
    ("equal", 59, [[0], [1], [2], [3], [4], [5], [6]]),
    ("one", 10**6, [[0], [1], [2], [3], [4], [5], [6]]),
])
def test_a_batch_takes_what_the_backend_wants_together_up_to_its_tokens(together, max_tokens, expected):
    assert batches(together, max_tokens, [30, 30, 40, 50, 50, 384, 30]) == expected


def test_the_last_samples_are_shared_by_the_workers():
    """Each takes its part of the tokens that wait: no worker is idle while another has a large batch."""
    assert list(map(len, batches("any", 1000, [100] * 40, workers=2))) == [10, 10, 10, 5, 2, 1, 1, 1]
    assert list(map(len, batches("any", 10**6, [100] * 9, workers=4))) == [2, 1, 1, 1, 1, 1, 1, 1]
    assert batches("any", 1000, [50, 50, 99], workers=2) == [[0], [1], [2]]  # no more than half of 199 tokens


@given(st.sampled_from(["any", "equal", "one"]), st.integers(1, 2000), st.lists(st.integers(1, 384), max_size=50),
       st.integers(1, 4))
def test_every_sample_is_in_one_batch_in_its_turn_and_no_batch_is_too_large(together, max_tokens, lengths, workers):
    result = batches(together, max_tokens, lengths, workers)
    assert [row for batch in result for row in batch] == list(range(len(lengths)))
    for batch in result:
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= max_tokens
        assert together == "any" or len({lengths[row] for row in batch}) == 1
        assert together != "one" or len(batch) == 1
