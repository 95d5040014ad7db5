"""The server of --network=sut: the forms of requests, what it refuses, its batches and how it ends."""

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from helpers import DEMO_ENV, LIMIT_S, NullBackend, random_batch, refused
from servers import Server, echo_server, running_servers

import network_format
import network_SUT
from backends import Backend, RunOptions
from batching import BatchPlan
from create_squad_data import load_features
from network_format import describe
from network_SUT import NetworkSUT, serve
from pytorch_SUT import PyTorchBackend
from squad_QSL import SquadQSL
from squad_SUT import Worker

INPUTS = ("input_ids", "input_mask", "segment_ids")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return a server of the demo's model."""
    with running_servers(Server(tmp_path_factory.mktemp("server"), "--node=B")) as (server,):
        yield server


@pytest.fixture(scope="module")
def qsl(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "features.npz"
    return SquadQSL(load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(cache))[1])


@pytest.fixture(scope="module")
def local():
    """Return the backend of the demo's model in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML_MODEL_FILE_WITH_PATH", DEMO_ENV["ML_MODEL_FILE_WITH_PATH"])
        patch.setenv("MLC_MAX_NUM_THREADS", "1")
        return PyTorchBackend(RunOptions(backend="pytorch"))


@pytest.mark.parametrize("padding", [384, None])
def test_the_json_form_of_the_reference_returns_the_backends_logits(demo, local, qsl, padding):
    def query(row):
        end = padding or qsl.lengths[row]
        return {name: getattr(qsl.features, name)[row, :end].tolist() for name in INPUTS}

    answer = json.loads(demo.post(json.dumps({"query": query(3), "id": 17}).encode()))
    assert answer["id"] == 17
    assert np.array(answer["result"], np.float32).tobytes() == local.predict(qsl.batch(np.array([3]))).tobytes()
    answer = json.loads(demo.post(json.dumps({"query": [query(row) for row in range(20)]}).encode(), "text/plain"))
    assert answer.keys() == {"result"}
    assert list(map(len, answer["result"])) == qsl.lengths[:20].tolist()
    logits = np.concatenate(answer["result"]).astype(np.float32)
    assert logits.tobytes() == local.predict(qsl.batch(np.arange(20))).tobytes()


def test_the_binary_form_returns_the_backends_logits(demo, local, qsl):
    batch = qsl.batch(np.arange(20)[::-1])
    logits = demo.post(network_format.encode(batch), network_format.CONTENT_TYPE)
    assert logits == local.predict(batch).tobytes()


def test_the_server_tells_its_name_and_node(demo):
    assert json.loads(demo.post(b"", path="/getname/"))["name"].endswith("(Network SUT) node B")
    with urllib.request.urlopen(demo.url + "/getname/", timeout=LIMIT_S) as response:
        assert json.load(response)["name"].endswith("(Network SUT) node B")


def test_the_description_has_the_same_form_in_every_version():
    backend = NullBackend(concurrency=3)
    unknown = describe(backend, "")
    backend.vocab_size, backend.batch_policy = 2400, "same_length"
    known = describe(backend, "A")
    assert unknown.pop("instance") != known.pop("instance")
    logits = hashlib.sha256(bytes(384 * 2 * 4)).hexdigest()
    common = {"workers": 3, "backend": "null", "logits": logits}
    assert unknown == {"name": "null (Network SUT)", "vocab_size": sys.maxsize, "together": "any", **common}
    assert known == {"name": "null (Network SUT) node A", "vocab_size": 2400, "together": "equal", **common}
    backend.predict = lambda batch: np.ones((batch.lengths.sum(), 2), np.float32)
    assert describe(backend, "")["logits"] != logits


class Echo(Backend):
    """Answer with the token ids; keep the lengths of each batch in `batches`."""

    name = "echo"

    def __init__(self, batch_policy="mixed"):
        self.batch_policy, self.batches = batch_policy, []

    def predict(self, batch):
        self.batches.append(batch.lengths.tolist())
        assert 13 not in batch.lengths, "no such layer"
        return np.repeat(batch.packed(batch.input_ids)[:, None], 2, 1).astype(np.float32)


def answers(backend, *requests, max_tokens=100):
    """Return the logits or the exception of each of some requests, which are made at once."""

    async def ask():
        sut = NetworkSUT(backend, BatchPlan(backend.batch_policy, max_tokens), Worker())
        calls = [sut.logits(network_format.decode(network_format.encode(batch))) for batch in requests]
        try:
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            sut.stop()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "policy, batches",
    [
        ("single", [[5], [5], [7], [7], [7], [200]]),
        ("same_length", [[5, 5], [7, 7, 7], [200]]),
        ("mixed", [[5, 5, 7, 7, 7], [200]]),
    ],
)
def test_a_backend_gets_only_batches_of_its_policy(policy, batches):
    backend, request = Echo(policy), random_batch(5, 5, 7, 7, 7, 200)
    (logits,) = answers(backend, request)
    assert (logits[:, 0] == request.packed(request.input_ids)).all()
    assert backend.batches == batches


def test_requests_share_a_batch_and_each_gets_its_own_logits():
    backend, requests = Echo(), [random_batch(length, 2 * length) for length in range(3, 12)]
    for request, logits in zip(requests, answers(backend, *requests, max_tokens=1000)):
        assert (logits[:, 0] == request.packed(request.input_ids)).all()
    assert len(backend.batches) < len(requests)


def test_a_fault_of_the_backend_ends_only_the_requests_in_its_batch():
    requests = random_batch(10), random_batch(13), random_batch(20)
    first, fault, last = answers(Echo("single"), *requests)
    assert len(first) == 10 and len(last) == 20
    assert isinstance(fault, AssertionError) and str(fault).startswith("no such layer")


def test_a_worker_that_fails_ends_the_process(monkeypatch):
    ends = []
    monkeypatch.setattr("config.end_process", lambda *end: ends.append(end))
    network_SUT.fail(RuntimeError("no batch\n(a second line)"))
    assert ends == [("error: a worker failed: RuntimeError: no batch", 1)]


def form(ids=(5, 6, 7), mask=(1, 1, 1), segments=(0, 0, 1)):
    return json.dumps({"query": dict(zip(INPUTS, (ids, mask, segments)))}).encode()


def binary(lengths, ids, segments, count=None):
    arrays = (
        np.array([len(lengths) if count is None else count], "<u4"),
        np.array(lengths, "<u4"),
        np.array(ids, "<i4"),
        np.array(segments, "u1"),
    )
    return b"".join(array.tobytes() for array in arrays)


def answers_still(server):
    """Return whether the server answers, and has had no fault."""
    return len(json.loads(server.post(form()))["result"]) == 3 and "Traceback" not in server.log.read_text()


def assert_refused(server, body, content_type, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(body, content_type)
    assert error.value.code == status
    assert len(error.value.read().decode().splitlines()) == 1
    assert answers_still(server)


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"no JSON", 400),
        (b"[" * 100000, 400),
        (b"[]", 400),
        (b"7", 400),
        (b'{"query": []}', 400),
        (b'{"query": 7}', 400),
        (b'{"query": {"input_ids": [1]}}', 400),
        (b'{"query": {"input_ids": [1', 400),
        (b"\xff\xfe", 400),
        (form(ids=[]), 400),
        (form(ids=[5, 6]), 400),
        (form(ids=[5, 6, "7"]), 400),
        (form(ids=[5, 6, 7.5]), 400),
        (form(ids=[5, 6, None]), 400),
        (form(ids=[5, 6, [7]]), 400),
        (form(ids=7), 400),
        (form(ids=[[5, 6, 7]]), 400),
        (form(ids=[5, 6, -7]), 400),
        (form(ids=[5, 6, 10**6]), 400),
        (form(ids=[5, 6, 2**32 + 7]), 400),
        (form(ids=[5, 6, 10**40]), 400),
        (form(ids=[True] * 3), 400),
        (form(ids={"a": 1}), 400),
        (form(mask=[1, 0, 1]), 400),
        (form(mask=[0, 0, 0]), 400),
        (form(mask=[1, 1, 2]), 400),
        (form(segments=[0, 0, 2]), 400),
        (form(segments=[0, 0, -1]), 400),
        (form([5] * 385, [1] * 385, [0] * 385), 400),
        (form([5] * 385, [1] * 3 + [0] * 382, [0] * 385), 400),
        (form([], [], []), 400),
        (form().replace(b" ", b" " * 2**20), 413),
    ],
)
def test_a_bad_json_request_is_refused_and_the_server_still_answers(demo, body, status):
    assert_refused(demo, body, "application/json", status)


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"\1", 400),
        (b"\1\0\0\0", 400),
        (b"\0\0\0\0", 400),
        (b"\xff\xff\xff\xff", 400),
        (b"x" * 1000, 400),
        (binary([3], [5, 6, 7], [0, 0]), 400),
        (binary([3], [5, 6, 7], [0, 0, 1, 1]), 400),
        (binary([2], [5, 6, 7], [0, 0, 1]), 400),
        (binary([3], [5, 6, 7], [0, 0, 1], 2), 400),
        (binary([0], [], []), 400),
        (binary([3, 0], [5, 6, 7], [0, 0, 1]), 400),
        (binary([2**32 - 1], [5], [0]), 400),
        (binary([385], [5] * 385, [0] * 385), 400),
        (binary([3], [5, 6, -7], [0, 0, 1]), 400),
        (binary([3], [5, 6, 2400], [0, 0, 1]), 400),
        (binary([3], [5, 6, 2**31 - 1], [0, 0, 1]), 400),
        (binary([3], [5, 6, 7], [0, 0, 2]), 400),
        (bytes(17 * 2**20), 413),
    ],
)
def test_a_bad_binary_request_is_refused_and_the_server_still_answers(demo, body, status):
    assert_refused(demo, body, network_format.CONTENT_TYPE, status)


def test_a_model_of_unknown_vocabulary_takes_every_token_id():
    network_format.check((np.array([1]), np.array([2**31 - 1]), np.array([0])), None)
    with pytest.raises(ValueError, match="0 to 99 are possible"):
        network_format.check((np.array([1]), np.array([100]), np.array([0])), 100)


def test_a_slow_client_and_a_thousand_idle_connections_delay_nobody(demo):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("localhost", demo.port), LIMIT_S)) for _ in range(1000)]
        idle[0].sendall(b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        started = time.monotonic()
        for _ in range(20):
            idle[0].sendall(b" ")
            assert answers_still(demo)
        assert time.monotonic() - started < 60
    assert answers_still(demo)


@pytest.mark.parametrize(
    "path, method, status", [("/predict/", "GET", 405), ("/predict", "POST", 404), ("/../etc/passwd", "GET", 404)]
)
def test_other_paths_and_methods_are_refused(demo, path, method, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(demo.url + path, method=method), timeout=LIMIT_S)
    assert error.value.code == status


def test_other_protocols_are_refused(demo):
    with socket.create_connection(("localhost", demo.port), LIMIT_S) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in connection.recv(1000)
    assert answers_still(demo)


def test_the_server_listens_on_loopback_only(demo):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = outward.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((address, demo.port), 5)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_although_a_request_is_open(tmp_path, sent):
    with running_servers(echo_server(tmp_path, "time.sleep(2 if len(tokens) < 384 else 0)")) as (server,):

        def ask():
            with contextlib.suppress(OSError):  # answered or cut off, but not left waiting
                server.post(form())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(0.3)
        started = time.monotonic()
        assert server.end(sent) == 0
        assert time.monotonic() - started < 10
        asking.join(20)
        assert "Traceback" not in server.log.read_text() and not asking.is_alive()


def test_an_address_on_which_it_cannot_listen_is_named():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (RunOptions(port=port), (str(port), "--port")),
            (RunOptions(port=70000), ("70000", "--port")),
            (RunOptions(host="192.0.2.1"), ("192.0.2.1", "--host")),
        ):
            with refused(*words):
                serve(NullBackend(), BatchPlan("mixed", 100), Worker(), options)
