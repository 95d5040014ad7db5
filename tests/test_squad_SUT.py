"""How waiting samples become batches. The life of a query under LoadGen is test_run.py's."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squad_SUT import Batching


def batches(together, max_tokens, lengths):
    """The samples 0, 1, … of these lengths in batches, each a list of sample indices."""
    batching, waiting = Batching(together, max_tokens, sort=False), deque((row, None) for row in range(len(lengths)))
    result = []
    while waiting:
        result.append([row for row, _ in batching.take(waiting, np.array(lengths))])
    return result


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


@given(st.sampled_from(["any", "equal", "one"]), st.integers(1, 2000), st.lists(st.integers(1, 384), max_size=50))
def test_every_sample_is_in_one_batch_in_its_turn_and_no_batch_is_too_large(together, max_tokens, lengths):
    result = batches(together, max_tokens, lengths)
    assert [row for batch in result for row in batch] == list(range(len(lengths)))
    for batch in result:
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= max_tokens
        assert together == "any" or len({lengths[row] for row in batch}) == 1
        assert together != "one" or len(batch) == 1
