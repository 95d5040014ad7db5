"""What passes a proxy that delays, cuts, repeats, reorders, drips or damages it is right, or the run ends in one line.

NETWORK_SCHEDULES=300 runs that many schedules instead of a few seconds of them.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chaos_proxy import KINDS, Fault, proxies
from helpers import random_batch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from servers import Echo, serving

import network_LON
from backends import RunOptions
from config import UserError
from network_LON import NetworkBackend

SCHEDULES = int(os.environ.get("NETWORK_SCHEDULES", 25))
SCALE = 20  # all times of the driver are divided by this, and so is the limit of 10 s
LONGEST_S = 1.5 * network_LON.ANSWER_S / SCALE  # of a delay
BATCHES = [random_batch(*lengths) for lengths in ([5], [7, 3], [40], [6, 6, 6], [90], [9], [11, 2], [30])]
LOCAL = [Echo().predict(batch).tobytes() for batch in BATCHES]


@pytest.fixture(scope="module")
def chaos():
    """Return (the URLs of two proxies before servers, a function that sets their schedules); times are short."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ANSWER_S", "ASK_S"):
            patch.setattr(network_LON, name, getattr(network_LON, name) / SCALE)
        with serving(Echo()) as one, serving(Echo()) as two, proxies(one.port, two.port, longest_s=LONGEST_S) as made:
            yield made


def outcome(urls):
    """Run all batches in two threads; return None if each logit is right, else the line with which the run ended."""
    try:
        backend = NetworkBackend(RunOptions(network="lon", sut_server=tuple(urls)))
        with ThreadPoolExecutor(2) as pool:
            for logits, expected in zip(pool.map(backend.predict, BATCHES), LOCAL):
                assert np.asarray(logits).tobytes() == expected
    except UserError as error:
        assert "\n" not in str(error) and "http://127.0.0.1" in str(error)
        return str(error)
    return None


FAULTS = st.builds(Fault, st.sampled_from(KINDS), st.booleans(), st.floats(0, 1), st.integers(1, 255))
SCHEDULE = st.lists(st.none() | FAULTS, max_size=12)


@settings(max_examples=SCHEDULES, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEDULE, SCHEDULE, st.integers(1, 2))
def test_every_response_is_that_of_a_local_run_or_the_run_ends_in_one_line(chaos, first, second, servers):
    urls, set_schedules = chaos
    set_schedules(first, second)
    started = time.monotonic()
    ended = outcome(urls[:servers])
    event("refused" if ended else "complete")
    faults = len(first) + len(second)
    assert time.monotonic() - started < 10 / SCALE + faults * LONGEST_S + 3  # a busy machine may add seconds


# The server refuses a damaged request, and a server that is silent for long is lost; both end a run.
TEMPORARY = ["cut", "reset", "repeat", "replay", "swap", "close"]


@pytest.mark.parametrize(
    "kind, request_",
    [*((kind, False) for kind in [*TEMPORARY, "corrupt", "insert"]), *((kind, True) for kind in TEMPORARY)],
)
def test_one_fault_of_a_connection_does_not_end_the_run(chaos, kind, request_):
    urls, set_schedules = chaos
    for exchange in range(1, 5):
        # At 95 % of a message is its body: damage to the length in its head would look like silence.
        set_schedules([None] * exchange + [Fault(kind, request_, 0.95)])
        assert outcome(urls[:1]) is None
