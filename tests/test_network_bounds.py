"""No peer of --network=sut can delay, exhaust or confuse it: what a request may cost, deadlines, refusals."""

import contextlib
import gzip
import json
import socket
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from helpers import LIMIT_S, random_batch
from servers import Echo, echo_server, post, running_servers, serving

import network_format
import network_SUT
from backends import RunOptions
from network_format import CONTENT_TYPE, INPUTS, MAX_SAMPLES
from network_LON import NetworkBackend

HEAD = b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"


def samples_json(count, length=1, padding=0):
    """Return a JSON request of `count` samples."""
    lists = ([7] * length + [0] * padding, [1] * length + [0] * padding, [0] * (length + padding))
    return json.dumps({"query": [dict(zip(INPUTS, lists))] * count}).encode()


def refusal(server, body, content_type="application/json", **headers):
    """Return (status, text) with which a request is refused; the text is one line."""
    request = urllib.request.Request(server.url + "/predict/", body, {"Content-Type": content_type, **headers})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=LIMIT_S)
    text = error.value.read().decode()
    assert len(text.splitlines()) == 1
    return error.value.code, text


def answers(server):
    """Return whether the server answers a small request with its own logits."""
    batch = random_batch(4)
    body = server.post(network_format.encode(batch), CONTENT_TYPE)
    return body == Echo().predict(batch).tobytes()


@contextlib.contextmanager
def health_checks(server):
    """Ask /getname/ all the time; afterwards, assert that each answer came soon, also on a busy machine."""
    times, over = [], threading.Event()

    def ask():
        while not over.is_set():
            started = time.monotonic()
            post(server.url, b"", path="/getname/")
            times.append(time.monotonic() - started)
            time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    over.set()
    thread.join()
    assert times and max(times) < 2


@pytest.fixture
def server():
    with serving(Echo()) as started:
        yield started


@pytest.fixture
def impatient(monkeypatch):
    """Return a server that gives its peers little time."""
    monkeypatch.setattr(network_SUT, "TRANSFER_S", 0.5)
    monkeypatch.setattr(network_SUT, "LOOK_S", 0.05)
    with serving(Echo()) as started:
        yield started


def test_a_request_of_a_third_of_a_million_samples_is_refused_and_delays_nobody(server):
    text, count = samples_json(316_549), 1_860_000
    arrays = np.array([count]), np.ones(count), np.ones(count), np.zeros(count)
    body = b"".join(array.astype(kind).tobytes() for array, kind in zip(arrays, ("<u4", "<u4", "<i4", "u1")))
    with health_checks(server):
        assert refusal(server, text[: 16 * 2**20 - 1])[0] == 413
        assert refusal(server, text[: 4 * 2**20 - 1])[0] == 400
        assert refusal(server, body, CONTENT_TYPE)[0] == 413
        assert refusal(server, body[: 4 * 2**20], CONTENT_TYPE)[0] == 400


@pytest.mark.parametrize("encode", [lambda n: samples_json(n), lambda n: network_format.encode(random_batch(*[3] * n))])
def test_a_request_has_at_most_512_samples(server, encode):
    kind = CONTENT_TYPE if encode(1)[0] == 1 else "application/json"
    assert server.post(encode(MAX_SAMPLES), kind)
    status, text = refusal(server, encode(MAX_SAMPLES + 1), kind)
    assert status == 400 and str(MAX_SAMPLES) in text


def test_health_checks_are_answered_while_large_requests_are_decoded_and_encoded(server):
    body = samples_json(MAX_SAMPLES, 80, 304)
    assert 2**20 < len(body) < network_SUT.MAX_BYTES
    with health_checks(server):
        threads = [threading.Thread(target=server.post, args=(body,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_large_batches_are_sent_in_several_requests(server):
    batch = random_batch(*[3] * (2 * MAX_SAMPLES + 5))
    backend = NetworkBackend(RunOptions(network="lon", sut_server=(server.url,)))
    assert backend.predict(batch).tobytes() == Echo().predict(batch).tobytes()


@pytest.mark.parametrize("policy", ["mixed", "single", "same_length"])
def test_the_work_of_a_closed_connection_is_dropped(policy):
    with serving(Echo(policy, seconds=0.1), max_tokens=10) as server:
        body = network_format.encode(random_batch(*[10] * 500))  # 50 s
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            peer.sendall(HEAD % len(body) + body)
            time.sleep(0.3)
        started = time.monotonic()
        assert answers(server)
        assert time.monotonic() - started < 15
        assert len(server.sut.backend.batches) < 20 and not server.sut.chunks and not server.sut.lengths


def test_the_largest_request_is_refused_if_all_of_them_hold_too_much(monkeypatch):
    monkeypatch.setattr(network_SUT, "MAX_HELD", 100_000)
    with serving(Echo(seconds=1), max_tokens=100_000) as server, contextlib.ExitStack() as stack:
        results = []

        def ask(count):
            try:
                results.append(
                    (count, len(server.post(network_format.encode(random_batch(*[10] * count)), CONTENT_TYPE)))
                )
            except urllib.error.HTTPError as error:
                results.append((count, (error.code, error.read().decode())))

        threads = [threading.Thread(target=ask, args=(count,)) for count in (400, 300, 200)]
        for thread in threads:
            stack.callback(thread.join)
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        assert answers(server)
    status, text = dict(results)[400]
    assert status == 503 and "hold more than" in text and len(text.splitlines()) == 1
    assert {count: size for count, size in results if count != 400} == {300: 24_000, 200: 16_000}


def read_all(peer):
    """Return what arrives until the connection is closed."""
    peer.settimeout(20)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := peer.recv(2**16):
            data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"POST /pred", HEAD[:40], HEAD % 1000, HEAD % 1000 + b"half"])
def test_a_peer_that_sends_half_a_request_is_disconnected(impatient, sent):
    with socket.create_connection(("127.0.0.1", impatient.port)) as peer:
        peer.sendall(sent)
        started = time.monotonic()
        answer = read_all(peer)
        assert 0.2 < time.monotonic() - started < 15
    assert not answer or (b" 408 " in answer and b"did not arrive" in answer)
    assert answers(impatient)


def test_a_peer_that_sends_slowly_has_one_deadline_for_all_of_its_request(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port)) as peer:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in (HEAD % 1000 + bytes(1000))[:200]:
                peer.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - started < 10
    assert answers(impatient)


def test_a_peer_that_does_not_take_its_response_is_disconnected(impatient, monkeypatch):
    def wait(peers, connection, *args):
        if connection.transport:  # a short buffer, so that the system does not take all of the response
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return real(peers, connection, *args)

    real = network_SUT.Peers.wait
    monkeypatch.setattr(network_SUT.Peers, "wait", wait)
    body = samples_json(MAX_SAMPLES, 20)
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", impatient.port))
        peer.sendall(HEAD.replace(CONTENT_TYPE.encode(), b"text/plain") % len(body) + body)
        time.sleep(3)
        assert len(read_all(peer)) < len(impatient.post(body))
    assert answers(impatient)


def test_half_requests_do_not_lock_a_driver_out_at_256_descriptors(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    with running_servers(echo_server(tmp_path, limit)) as (server,), contextlib.ExitStack() as stack:
        for _ in range(400):
            peer = stack.enter_context(socket.create_connection(("localhost", server.port), 10))
            with contextlib.suppress(OSError):  # the server may have closed it
                peer.sendall(HEAD % 100 + b"half")
        batch = random_batch(4)
        backend = NetworkBackend(RunOptions(network="lon", sut_server=(server.url,)))
        assert (backend.predict(batch)[:, 0] == batch.packed(batch.input_ids)).all()
        assert "Traceback" not in server.log.read_text()


def test_json_without_a_content_type_is_json(server):
    with socket.create_connection(("127.0.0.1", server.port)) as peer:
        body, head = samples_json(1), HEAD.replace(b"Content-Type: application/octet-stream", b"Connection: close")
        peer.sendall(head % len(body) + body)
        assert json.loads(read_all(peer).partition(b"\r\n\r\n")[2]) == {"result": [[[7.0, -21.0]]]}


def test_a_compressed_request_is_taken_and_a_broken_one_refused(server):
    for encoding, body in (("deflate", zlib.compress(samples_json(2))), ("gzip", gzip.compress(samples_json(2)))):
        headers = {"Content-Encoding": encoding}
        request = urllib.request.Request(server.url + "/predict/", body, headers | {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            assert len(json.load(response)["result"]) == 2
    for broken in (b"no gzip", body[:-9], body[:20] + b"\xff" * 20 + body[40:]):
        assert refusal(server, broken, **headers)[0] == 400
    with health_checks(server):
        bomb = gzip.compress(bytes(10**8))
        for _ in range(5):
            assert refusal(server, bomb, **headers)[0] == 400
    assert answers(server)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b'[1, {"a": NaN}]', b"1" * 5000])
def test_an_id_that_json_cannot_hold_is_refused(server, number):
    body = samples_json(1)[:-1] + b', "id": ' + number + b"}"
    assert refusal(server, body)[0] == 400


@pytest.mark.parametrize("value", ['"a\\u0000\\ud800"', "null", "1.5e300", '{"b": [1, "ä"]}', str(2**70)])
def test_any_other_id_is_returned(server, value):
    body = samples_json(1)[:-1] + f', "id": {value}}}'.encode()
    assert json.loads(server.post(body))["id"] == json.loads(value)


def test_the_json_response_has_the_bytes_of_json_dumps():
    logits = random_batch(3, 1, 5).packed(random_batch(3, 1, 5).input_ids).astype(np.float32)
    logits = np.stack([logits / 3, -logits], 1)
    for query, lengths in (([{}, {}, {}], [3, 1, 5]), ({}, [9])):
        results = [pairs.tolist() for pairs in np.split(logits, np.cumsum(lengths)[:-1])]
        response = {"result": results if query else results[0], "id": "ä"}
        got = network_format.encode_json(logits, np.array(lengths), {"query": query, "id": "ä"})
        assert got == json.dumps(response).encode()


MALFORMED = [
    b"\x16\x03\x01 hello\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /predict/ HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /predict/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /predict/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /getname/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /getname/ HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nzzzz",
    b"POST /predict/ HTTP/1.1\r\nno header\r\n\r\n",
    b"POST /predict/ HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
    b"POST /predict/ HTTP/1.1\r\nA: \x00\x01\r\n\r\n",
    b"GET /getname/ HTTP/1.1\r\n\r\nGET ??? \r\n\r\n",
    b"HEAD /getname/ HTTP/1.1\r\nConnection: close\r\n\r\n",
]


def test_malformed_http_is_refused_without_a_traceback(tmp_path):
    with running_servers(echo_server(tmp_path)) as (server,):
        for sent in MALFORMED:
            with socket.create_connection(("localhost", server.port), 10) as peer:
                peer.sendall(sent)
                peer.shutdown(socket.SHUT_WR)
                read_all(peer)
        with socket.create_connection(("localhost", server.port), 10) as peer:
            peer.sendall((HEAD % 4 + b"\0\0\0\0") * 50)  # reads no response
        batch = random_batch(4)
        assert server.post(network_format.encode(batch), CONTENT_TYPE)
        assert "Traceback" not in server.log.read_text() and len(server.log.read_text().splitlines()) == 2


def test_a_peer_that_waits_for_100_continue_gets_it(server):
    batch = random_batch(4)
    body = network_format.encode(batch)
    head = (HEAD % len(body)).replace(b"Host: x", b"Host: x\r\nConnection: close\r\nExpect: 100-continue")
    with socket.create_connection(("127.0.0.1", server.port)) as peer:
        peer.sendall(head)
        assert peer.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(body)
        assert read_all(peer).endswith(Echo().predict(batch).tobytes())


def test_a_request_that_was_damaged_on_its_way_is_refused(server):
    body = network_format.encode(random_batch(4))
    headers = {network_format.SEAL: network_format.seal("id", body)}
    status, text = refusal(server, body[:8] + b"\1" + body[9:], CONTENT_TYPE, **headers)
    assert status == 400 and "damaged" in text
