"""The parsers of what a peer of the network mode sends take it completely or refuse it with a ValueError.

NETWORK_EXAMPLES=20000 tries that many inputs for each parser instead of a few seconds of them.
"""

import contextlib
import json
import os

import numpy as np
import pytest
from helpers import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import DESCRIPTION

import network_format
from network_format import INPUTS, POLICY_NAMES

EXAMPLES = settings(max_examples=int(os.environ.get("NETWORK_EXAMPLES", 100)), deadline=None)
VOCAB = 100
BATCH = random_batch(3, 1, 5, vocab_size=VOCAB)
COUNTS = st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), max_size=3), st.binary(max_size=99))
KEYS = st.sampled_from(["query", "id", "result", *INPUTS])
NUMBERS = st.integers(-2, 2**65) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
)
LISTS = st.fixed_dictionaries({name: st.lists(st.integers(-1, 2), max_size=3) | VALUES for name in INPUTS})
JSON = VALUES.map(json.dumps)
TEXTS = st.sampled_from(["NaN", "Infinity", "1e999", "-0", "1" * 5000, '"\\ud800"', "[" * 3000, "[]" * 9, "true", "{}"])
ANSWERS = st.tuples(JSON | TEXTS, JSON | TEXTS).map(
    lambda parts: f'{{"result": {parts[0]}, "id": {parts[1]}}}'.encode()
)
QUERIES = st.tuples(LISTS.map(json.dumps), JSON | TEXTS).map(
    lambda parts: f'{{"query": {parts[0]}, "id": {parts[1]}}}'.encode()
)


@st.composite
def damaged(draw, valid):
    """Draw a valid message in which some bytes are changed, left out, added or repeated."""
    body = bytearray(draw(valid))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(body)))
        piece = draw(st.binary(max_size=4) | TEXTS.map(str.encode) | st.just(bytes(body[place : place + 9])))
        body[place : place + draw(st.integers(0, 5))] = piece
    return bytes(body)


def sample_json(batch):
    """Return the JSON request for a batch, without padding."""
    queries = [
        {name: getattr(batch, name)[row, :length].tolist() for name in INPUTS}
        for row, length in enumerate(batch.lengths)
    ]
    return json.dumps({"query": queries, "id": 7}).encode()


def assert_taken_or_refused(body, binary):
    """Decode a request; if it is taken, its samples are valid, and the JSON response to it is valid JSON."""
    with contextlib.suppress(ValueError):  # the handler answers it with 400
        (lengths, ids, segments), query = network_format.decode_request(bytearray(body), binary, VOCAB)
        assert len(ids) == len(segments) == lengths.sum() and 0 < len(lengths) <= network_format.MAX_SAMPLES
        assert (lengths > 0).all() and (ids >= 0).all() and (ids < VOCAB).all() and {*segments.tolist()} <= {0, 1}
        if binary:
            assert len(body) == 4 + 4 * len(lengths) + 5 * len(ids)
        else:
            response = network_format.encode_json(np.zeros((len(ids), 2), np.float32), lengths, query)
            assert json.loads(response, parse_constant=pytest.fail).keys() == query.keys() & {"id"} | {"result"}


@EXAMPLES
@given(
    st.binary(max_size=200)
    | COUNTS.map(lambda parts: np.array([parts[0], *parts[1]], "<u4").tobytes() + parts[2])
    | damaged(st.just(network_format.encode(BATCH)))
)
def test_any_binary_request_is_taken_completely_or_refused(body):
    assert_taken_or_refused(body, True)


@EXAMPLES
@given(
    st.binary(max_size=50)
    | JSON.map(str.encode)
    | VALUES.map(lambda value: json.dumps({"query": value, "id": 1}).encode())
    | QUERIES
    | damaged(st.just(sample_json(BATCH)))
)
def test_any_json_request_is_taken_completely_or_refused(body):
    assert_taken_or_refused(body, False)


@EXAMPLES
@given(
    st.binary(max_size=50) | ANSWERS | damaged(st.just(json.dumps({"result": [[1, 2], [3.5, -4]], "id": "i"}).encode()))
)
def test_any_json_response_is_two_finite_logits_a_token_or_refused(content):
    with contextlib.suppress(ValueError):
        logits = network_format.decode_result(content, 2, "i")
        assert logits.dtype == np.float32 and logits.shape == (2, 2) and np.isfinite(logits).all()


@EXAMPLES
@given(
    JSON.map(str.encode)
    | st.dictionaries(st.sampled_from([*DESCRIPTION, "open"]), VALUES).map(
        lambda changes: json.dumps(DESCRIPTION | changes).encode()
    )
    | st.fixed_dictionaries({"name": VALUES}).map(lambda only: json.dumps(only).encode())
    | damaged(st.just(json.dumps(DESCRIPTION).encode()))
)
def test_any_description_is_usable_or_refused(content):
    with contextlib.suppress(ValueError):
        found = network_format.read_description(content)
        assert found.name.isprintable() or not found.name
        assert found.workers > 0 and found.model["vocabulary size"] > 0
        assert found.model["batch policy"] in POLICY_NAMES and found.open in (None, True, False)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_description_is_read_as_it_was_written(policy):
    class Model:
        name, concurrency, vocab_size, batch_policy = "m", 3, 2400, policy

        def predict(self, batch):
            return np.zeros((batch.lengths.sum(), 2), np.float32)

    written = network_format.describe(Model(), "A")
    found = network_format.read_description(json.dumps(written | {"open": True}).encode())
    assert found == network_format.read_description(json.dumps(written | {"open": True}).encode())
    assert (found.name, found.workers, found.open, found.of_reference) == ("m (Network SUT) node A", 3, True, False)
    assert found.model["batch policy"] == policy and found.model["vocabulary size"] == 2400
